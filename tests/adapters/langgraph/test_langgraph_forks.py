"""A run continues from a checkpoint that is deleted during the run. Its saves are complete, or it gets an error."""

from __future__ import annotations

import operator
import threading
import time
from collections.abc import Callable
from itertools import chain
from typing import Annotated, Any, TypedDict

import pytest
from sqlalchemy import Engine, text

pytest.importorskip("langgraph.graph")

from langgraph.channels.delta import DeltaChannel
from langgraph.graph import START, StateGraph

from memstate_sa import ConflictError
from memstate_sa.integrations.langgraph import MemStateCheckpointer, thread_rows
from tests.support import WAITING_FOR_A_LOCK, Tag, World

CONFIG: Any = {"configurable": {"thread_id": "t"}, "run_id": None}
BIG = "B" * 500


class State(TypedDict):
    big: str
    trail: Annotated[list[str], operator.add]


class Growing(TypedDict):
    big: str
    trail: Annotated[list[str], DeltaChannel(lambda old, new: [*old, *chain(*new)])]


def graph_of(saver: MemStateCheckpointer, state: Any = State, **nodes: Any) -> Any:
    builder = StateGraph(state)
    for name, after in (("a", START), ("b", "a"), ("c", "b")):
        builder.add_node(name, nodes.get(name, lambda _, name=name: {"trail": [name]})).add_edge(after, name)
    return builder.compile(checkpointer=saver)


DELETIONS: dict[str, Callable[[MemStateCheckpointer], None]] = {
    "prune": lambda saver: saver.prune(["t"]),
    "prune all": lambda saver: saver.prune(["t"], strategy="delete"),
    "delete_thread": lambda saver: saver.delete_thread("t"),
    "delete_for_runs": lambda saver: saver.delete_for_runs(["first"]),
}
RUNS: dict[str, Callable[[Any, Any], Any]] = {
    "invoke": lambda graph, config: graph.invoke(None, config),
    "invoke with durability exit": lambda graph, config: graph.invoke(None, config, durability="exit"),
    "update_state": lambda graph, config: graph.update_state(config, {"trail": ["fixed"]}, as_node="a"),
    "copy": lambda graph, config: graph.update_state(config, None, as_node="__copy__"),
}


@pytest.mark.parametrize(
    ("state", "deletion", "run"),
    [
        *((State, "prune", run) for run in RUNS),
        *((State, deletion, "invoke") for deletion in list(DELETIONS)[1:]),
        (Growing, "prune", "invoke"),
        (Growing, "delete_thread", "update_state"),
    ],
)
def test_fork_saves_its_whole_state_when_its_parent_is_deleted(
    engine: Engine, state: Any, deletion: str, run: str
) -> None:
    """The deletion removed blobs that the fork shares, and a channel was missing without an error.

    The same kind: a run of a thread that is deleted, a replay, a copy.
    """
    with MemStateCheckpointer(engine) as saver:
        saver.setup()
        graph = graph_of(saver, state)
        graph.invoke({"big": BIG, "trail": []}, {**CONFIG, "metadata": {"run_id": "first"}})
        graph.invoke({"big": "C" * 500, "trail": []}, {**CONFIG, "metadata": {"run_id": "second"}})
        old = [state for state in graph.get_state_history(CONFIG) if state.next == ("b",)][-1]
        put, deleted = saver.put, []

        def put_late(*args: Any) -> Any:
            if not deleted:
                deleted.append(True)
                DELETIONS[deletion](saver)
            return put(*args)

        saver.put = put_late  # type: ignore[method-assign]
        RUNS[run](graph, old.config)
        trail = {"update_state": ["a", "fixed"], "copy": ["a"]}.get(run, ["a", "b", "c"])
        assert deleted and graph_of(MemStateCheckpointer(engine), state).get_state(CONFIG).values == {
            "big": BIG,
            "trail": trail,
        }
        assert graph.invoke(None, CONFIG)["big"] == BIG


def test_a_run_that_cannot_be_saved_whole_says_so(engine: Engine) -> None:
    """A DeltaChannel is rebuilt from the writes of its ancestors. Without them it would come back incomplete."""
    with MemStateCheckpointer(engine) as saver:
        saver.setup()

        def delete(_: Any) -> Any:
            saver.delete_thread("t")
            return {"trail": ["b"]}

        graph_of(saver, Growing).invoke({"big": BIG, "trail": ["in"]}, CONFIG)
        graph = graph_of(saver, Growing, b=delete)
        with pytest.raises(ConflictError, match="parent was deleted"):
            graph.invoke({"trail": ["again"]}, CONFIG, durability="sync")
        assert list(saver.list(CONFIG)) == []


@pytest.mark.parametrize("deletion", DELETIONS)
def test_saving_and_deleting_wait_for_each_other(
    engine: Engine, deletion: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A checkpoint is saved after a deletion has chosen its rows, and before it has ended."""
    with MemStateCheckpointer(engine) as saver:
        saver.setup()
        graph = graph_of(saver)
        graph.invoke({"big": BIG, "trail": []}, {**CONFIG, "metadata": {"run_id": "first"}})
        graph.invoke({"trail": ["more"]}, CONFIG)
        old = [state for state in graph.get_state_history(CONFIG) if state.next == ("b",)][-1]
        fork = threading.Thread(target=lambda: graph.update_state(old.config, {"trail": ["fixed"]}, as_node="a"))
        lock, put, saving = thread_rows.lock_threads, saver.put, threading.Event()
        deleter = threading.get_ident()

        def lock_and_let_in(connection: Any, threads: Any) -> None:
            lock(connection, threads)
            if threading.get_ident() == deleter and not fork.ident:
                fork.start()
                assert saving.wait(60)
                until = time.monotonic() + 60
                # SQLite's writers wait inside the driver, which no query shows.
                while engine.dialect.name == "postgresql" and time.monotonic() < until:
                    with engine.connect() as other:
                        if other.scalar(text(f"SELECT count(*) {WAITING_FOR_A_LOCK}")):
                            break

        def put_and_tell(*args: Any) -> Any:
            saving.set()
            return put(*args)

        saver.put = put_and_tell  # type: ignore[method-assign]
        monkeypatch.setattr(thread_rows, "lock_threads", lock_and_let_in)
        DELETIONS[deletion](saver)
        fork.join(60)
        values = graph.get_state(CONFIG).values
        assert (values["big"], values["trail"][-1]) == (BIG, "fixed")


def test_a_step_of_a_fork_whose_checkpoint_is_pruned_commits(world: World) -> None:
    """It used to wait for a checkpoint that was already saved, and blamed ``checkpointer=False``."""
    with MemStateCheckpointer(world.engine, memory=world.memory, step_timeout_s=5.0) as saver:

        def write(_: Any) -> Any:
            saver.prune(["t"])
            with saver.step() as session:
                session.merge(Tag(name="b"))
            return {"trail": ["b"]}

        saver.setup()
        graph = graph_of(saver, b=write)
        graph.invoke({"big": BIG, "trail": []}, CONFIG)
        graph.invoke({"big": BIG, "trail": []}, CONFIG)
        world_before = [state for state in graph.get_state_history(CONFIG) if state.next == ("b",)]
        with world.session() as session, session.begin():
            session.delete(session.get_one(Tag, "b"))
        assert graph.invoke(None, world_before[0].config)["trail"][-2:] == ["b", "c"]
        with world.session() as session:
            assert session.get(Tag, "b") is not None
    world.assert_log_is_truth()
