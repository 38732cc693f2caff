"""What a checkpointer asks of its tables is served by their keys, however many checkpoints there are."""

from __future__ import annotations

from typing import Any
from uuid import uuid4

import pytest
from sqlalchemy import Engine, event, text

pytest.importorskip("langgraph.graph")

from langgraph.checkpoint.base.id import uuid6

from memstate_sa.integrations.langgraph import MemStateCheckpointer
from tests.integration.test_query_plans import assert_served, plans
from tests.support import World

TABLES = "checkpoint|checkpoint_blob|checkpoint_write|thread_lease|log"


@pytest.fixture
def saver(world: World) -> MemStateCheckpointer:
    """Enough checkpoints that a planner prefers an index, and fresh statistics."""
    made = MemStateCheckpointer(world.engine, memory=world.memory)
    made.setup()
    for thread in ("t", "u"):
        config: Any = {"configurable": {"thread_id": thread, "checkpoint_ns": ""}}
        for step in range(300):
            config = put(made, config, step)
    if world.engine.dialect.name == "postgresql":
        with world.engine.begin() as connection:
            connection.execute(text("ANALYZE"))
    return made


def put(saver: MemStateCheckpointer, config: Any, step: int) -> Any:
    values = {"big": "x" * 100, "small": step}
    versions = dict.fromkeys(values, f"{step:08}")
    checkpoint: Any = {
        "v": 4,
        "id": str(uuid6(clock_seq=step)),
        "ts": "2026-01-01T00:00:00+00:00",
        "channel_values": values,
        "channel_versions": versions,
        "versions_seen": {},
    }
    metadata: Any = {"source": "loop", "step": step, "run_id": f"run {step}"}
    config = saver.put(config, checkpoint, metadata, versions)
    saver.put_writes(config, [("big", "y"), ("other", step)], str(uuid4()))
    return config


T: Any = {"configurable": {"thread_id": "t", "checkpoint_ns": ""}}
ACTIONS = {
    "get the latest": lambda saver: saver.get_tuple(T),
    "get one": lambda saver: saver.get_tuple(next(iter(saver.list(T, limit=1))).config),
    "list": lambda saver: list(saver.list(T, limit=100)),
    "list before": lambda saver: list(saver.list(T, before=saver.get_tuple(T).config, filter={"step": 5})),
    "delta history": lambda saver: saver.get_delta_channel_history(config=T, channels=["other", "big"]),
    "prune": lambda saver: saver.prune(["t"]),
    "delete for runs": lambda saver: saver.delete_for_runs(["run 5", "run 7"]),
    "delete": lambda saver: saver.delete_thread("t"),
}


@pytest.mark.parametrize("what", ACTIONS)
def test_reading_and_deleting(saver: MemStateCheckpointer, what: str) -> None:
    assert_served(saver.engine, plans(saver.engine, lambda: ACTIONS[what](saver)), TABLES)


def test_with_a_lease(saver: MemStateCheckpointer) -> None:
    def run() -> None:
        with saver.run(T) as config:
            put(saver, config, 1000)

    assert_served(saver.engine, plans(saver.engine, run), TABLES)


def statements(engine: Engine, action: Any) -> list[str]:
    seen: list[str] = []

    def note(connection: Any, cursor: Any, statement: str, parameters: Any, context: Any, many: bool) -> None:
        seen.append(" ".join(statement.split()[:3]))

    event.listen(engine, "before_cursor_execute", note)
    action()
    event.remove(engine, "before_cursor_execute", note)
    return seen


def test_how_many_statements(saver: MemStateCheckpointer) -> None:
    """One to read a checkpoint with all that belongs to it; on PostgreSQL, one to save it, and no BEGIN."""
    assert len(statements(saver.engine, lambda: saver.get_tuple(T))) == 1
    saved = statements(saver.engine, lambda: put(saver, T, 1000))
    if saver.engine.dialect.name == "postgresql":
        assert saved == ["WITH putting_blobs AS", "INSERT INTO memstate_checkpoint_write"]
    else:
        assert saved == [
            "BEGIN IMMEDIATE",
            "INSERT INTO memstate_checkpoint_blob",
            "INSERT INTO memstate_checkpoint",
            "BEGIN IMMEDIATE",
            "INSERT INTO memstate_checkpoint_write",
        ]


def test_a_page_is_one_statement(saver: MemStateCheckpointer) -> None:
    assert len(statements(saver.engine, lambda: list(saver.list(T, limit=50)))) == 1
    assert len(statements(saver.engine, lambda: list(saver.list(T)))) == 7
