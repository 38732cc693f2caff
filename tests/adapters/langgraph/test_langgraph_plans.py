"""Keys serve all statements of a checkpointer, for any number of checkpoints."""

from __future__ import annotations

from functools import partial
from typing import Any
from uuid import uuid4

import pytest
from sqlalchemy import Engine, event, text

pytest.importorskip("langgraph.graph")

from langgraph.checkpoint.base.id import uuid6

from memstate_sa.integrations.langgraph import MemStateCheckpointer
from tests.support import World
from tests.support.plans import assert_served, plans

TABLES = "checkpoint|checkpoint_blob|checkpoint_write|thread_lease|log"


@pytest.fixture
def saver(world: World) -> MemStateCheckpointer:
    made = MemStateCheckpointer(world.engine, memory=world.memory)
    made.setup()
    fill(made, 5)
    return made


@pytest.fixture
def large(saver: MemStateCheckpointer) -> MemStateCheckpointer:
    """A saver with enough checkpoints for a planner to prefer an index, and with fresh statistics."""
    fill(saver, 60)
    if saver.engine.dialect.name == "postgresql":
        with saver.engine.begin() as connection:
            connection.execute(text("ANALYZE"))
    return saver


def fill(saver: MemStateCheckpointer, count: int) -> None:
    for thread in ("t", "u"):
        config: Any = {"configurable": {"thread_id": thread, "checkpoint_ns": ""}}
        for step in range(count):
            config = put(saver, config, step)


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


def leased(saver: MemStateCheckpointer) -> None:
    with saver.run(T) as config:
        put(saver, config, 1000)


def test_no_table_is_read_as_a_whole(large: MemStateCheckpointer) -> None:
    for action in (leased, *ACTIONS.values()):  # deletions come last
        assert_served(large.engine, plans(large.engine, partial(action, large)), TABLES)


def statements(engine: Engine, action: Any) -> list[str]:
    seen: list[str] = []

    def note(connection: Any, cursor: Any, statement: str, parameters: Any, context: Any, many: bool) -> None:
        seen.append(" ".join(statement.split()[:3]))

    event.listen(engine, "before_cursor_execute", note)
    action()
    event.remove(engine, "before_cursor_execute", note)
    return seen


def test_checkpoint_takes_few_statements(saver: MemStateCheckpointer) -> None:
    """One statement reads a checkpoint with all that belongs to it. On PostgreSQL one saves it, without a BEGIN."""
    assert len(statements(saver.engine, lambda: saver.get_tuple(T))) == 1
    saved = statements(saver.engine, lambda: put(saver, T, 1000))
    if saver.engine.dialect.name == "postgresql":
        assert saved == ["WITH putting_blobs AS", "INSERT INTO memstate_checkpoint_write"]
    else:
        assert saved == [
            "INSERT INTO memstate_checkpoint_blob",
            "INSERT INTO memstate_checkpoint",
            "INSERT INTO memstate_checkpoint_write",
        ]


def test_page_of_checkpoints_takes_one_statement(saver: MemStateCheckpointer) -> None:
    fill(saver, 60)
    assert len(statements(saver.engine, lambda: list(saver.list(T, limit=50)))) == 1
    assert len(statements(saver.engine, lambda: list(saver.list(T)))) == 2
