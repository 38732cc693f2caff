"""Mistakes of new users of LangGraph: each raises an error that says what to do, and leaves no fact."""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterator
from typing import Annotated, Any, TypedDict

import pytest
from sqlalchemy import Engine

pytest.importorskip("langgraph.graph")

from langgraph.checkpoint.memory import InMemorySaver
from langgraph.graph import START, StateGraph

from memstate_sa import Fact, HistoryMissing, MemoryStore, MemstateError
from memstate_sa.indexes import InMemoryIndex
from memstate_sa.integrations.langgraph import InvalidItem, MemStateCheckpointer, MemStateStore
from memstate_sa.testing import HashEmbedder


class State(TypedDict, total=False):
    trail: Annotated[list[Any], operator.add]


CONFIG: Any = {"configurable": {"thread_id": "t"}}


@pytest.fixture
def facts(engine: Engine) -> Iterator[MemoryStore]:
    with MemoryStore(engine, InMemoryIndex(), embedder=HashEmbedder(), background=False) as store:
        yield store


@pytest.fixture
def saver(facts: MemoryStore) -> Iterator[MemStateCheckpointer]:
    with MemStateCheckpointer(facts, step_timeout_s=600) as saver:
        saver.setup()
        yield saver


def note(text: str, **columns: Any) -> Fact:
    return Fact(type="note", payload={"text": text}, **columns)


def notes(facts: MemoryStore) -> list[str]:
    return [fact.payload["text"] for fact in facts.query("note")]


def run(checkpointer: Any, work: Callable[[], object], config: Any = CONFIG) -> None:
    """Run a graph with one node, which does *work*."""

    def node(state: State) -> State:
        return {"trail": [work()]}

    graph = StateGraph(State).add_node("node", node).add_edge(START, "node").compile(checkpointer=checkpointer)
    graph.invoke({"trail": []}, config)


# -- stores that the checkpointer does not know ------------------------------------------------------------------------


def test_store_that_the_checkpointer_does_not_know_cannot_write_in_a_step(engine: Engine, facts: MemoryStore) -> None:
    """Its fact would stay when the node fails."""
    with MemStateCheckpointer(engine) as saver:
        saver.setup()

        def work() -> None:
            with saver.step():
                facts.commit(note("lost?"))

        with pytest.raises(MemstateError, match=r"does not include this MemoryStore.*MemStateCheckpointer\(store\)"):
            run(saver, work)
    assert notes(facts) == []


def test_second_store_on_the_same_database_cannot_be_used_in_a_step(
    facts: MemoryStore, saver: MemStateCheckpointer
) -> None:
    with MemoryStore(facts.engine, background=False) as other:
        items = MemStateStore(other)
        items.setup()
        for call in (
            lambda: other.commit(note("another's")),
            lambda: other.query("note"),
            lambda: items.put(("a",), "b", {"text": "another's"}),
            other.status,
        ):

            def work(call: Callable[[], object] = call) -> None:
                with saver.step():
                    facts.commit(note("ours"))
                    call()

            with pytest.raises(MemstateError, match="does not include this MemoryStore"):
                run(saver, work)
        assert notes(facts) == [] and items.get(("a",), "b") is None
        other.commit(note("outside of a step"))
    assert notes(facts) == ["outside of a step"]


# -- commits of the Session --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("commit", ["commit", "begin"])
def test_node_cannot_commit_the_session_of_its_step(
    facts: MemoryStore, saver: MemStateCheckpointer, commit: str
) -> None:
    def work() -> None:
        with saver.step() as session:
            session.add(note("early"))
            session.flush()
            getattr(session, commit)()

    with pytest.raises(MemstateError, match=r"commits with the node. Use session.flush\(\)"):
        run(saver, work)
    assert notes(facts) == []


def test_node_can_go_on_after_a_refused_commit(facts: MemoryStore, saver: MemStateCheckpointer) -> None:
    def work() -> None:
        with saver.step() as session:
            session.add(note("a"))
            with pytest.raises(MemstateError, match="commits with the node"):
                session.commit()
            with session.begin_nested():
                session.add(note("b"))

    run(saver, work)
    assert sorted(notes(facts)) == ["a", "b"]


# -- labels ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("how", ["commit", "annotate", "transaction"])
def test_step_keeps_its_thread_as_session_id(facts: MemoryStore, saver: MemStateCheckpointer, how: str) -> None:
    """Otherwise, deleting the thread would leave its facts. The refused call leaves nothing, even if it is caught."""

    def work() -> None:
        with saver.step() as session:
            facts.commit(note("kept", session_id="run-B"), actor="run-B")
            with pytest.raises(MemstateError, match=r"session_id='run-B' in a step of thread 't'"):
                if how == "commit":
                    facts.commit(note("refused"), session_id="run-B")
                elif how == "annotate":
                    facts.memory.annotate(session, session_id="run-B")
                else:
                    with facts.transaction(session_id="run-B"):
                        facts.commit(note("refused"))
            facts.commit(note("also kept"), session_id="t")

    run(saver, work)
    assert notes(facts) == ["kept", "also kept"]
    assert {(change.session_id, change.actor) for change in facts.history()} == {("t", "run-B")}
    assert len(facts.query("note", session_id="run-B")) == 1  # the fact's own column
    saver.delete_thread("t", facts=True)
    assert notes(facts) == []


def test_labels_of_a_step_stay_after_a_rollback_of_its_session(facts: MemoryStore, saver: MemStateCheckpointer) -> None:
    def work() -> None:
        with saver.step() as session:
            facts.commit(note("rolled back"))
            session.rollback()
            facts.commit(note("kept"))

    run(saver, work)
    assert [(change.session_id, change.reason) for change in facts.history()] == [("t", "node node")]
    saver.delete_thread("t", facts=True)
    assert notes(facts) == []


def test_one_run_of_a_thread_is_taken_back_by_its_actor(facts: MemoryStore, saver: MemStateCheckpointer) -> None:
    """A step has one actor. `annotate` gives it to all changes of the step."""

    def learn(actor: str) -> Callable[[], None]:
        def work() -> None:
            with saver.step() as session:
                facts.memory.annotate(session, actor=actor)
                facts.commit(note(f"learned in {actor}"))

        return work

    run(saver, learn("run-A"))
    run(saver, learn("run-B"))
    facts.revoke(actor="run-B")
    assert notes(facts) == ["learned in run-A"]


# -- graphs without this checkpointer ----------------------------------------------------------------------------------


@pytest.mark.parametrize("config", [CONFIG, {}])
def test_step_of_a_graph_without_a_checkpointer_is_refused(saver: MemStateCheckpointer, config: Any) -> None:
    with pytest.raises(MemstateError, match="Compile the graph with checkpointer=checkpointer"):
        run(None, lambda: saver.step().__enter__(), config)


def test_step_of_a_graph_with_another_checkpointer_is_refused_at_once(
    facts: MemoryStore, saver: MemStateCheckpointer
) -> None:
    """Nothing would commit the step. The timeout of this checkpointer is ten minutes."""
    for another in (InMemorySaver(), MemStateCheckpointer(facts)):
        with pytest.raises(MemstateError, match=f"another checkpointer .{type(another).__name__}"):
            run(another, lambda: saver.step().__enter__())
        if isinstance(another, MemStateCheckpointer):
            another.close()


# -- values and arguments ----------------------------------------------------------------------------------------------


def test_value_that_cannot_be_saved_is_named(saver: MemStateCheckpointer) -> None:
    with pytest.raises(MemstateError, match=r"Cannot save 'trail' of the graph's state: .*object\. Store plain data"):
        run(saver, object)


def test_position_of_a_thread_id_is_refused(saver: MemStateCheckpointer) -> None:
    for method in (saver.position, saver.at):
        with pytest.raises(MemstateError, match=r"checkpoint='t'. Pass a config .* or a StateSnapshot"):
            method("t")


def test_item_with_a_value_that_is_not_json_names_its_type(facts: MemoryStore) -> None:
    items = MemStateStore(facts)
    with pytest.raises(InvalidItem, match="a value of type object is not JSON"):
        items.put(("a",), "b", {"x": object()})


def test_undo_of_items_without_the_store_names_it(facts: MemoryStore) -> None:
    """A process that undoes must make the MemStateStore too."""
    items = MemStateStore(facts)
    items.setup()
    items.put(("a",), "b", {"text": "x"})
    with MemoryStore(facts.engine, background=False) as other, pytest.raises(HistoryMissing, match="MemStateStore"):
        other.rollback()


def test_history_of_the_store_leaves_items_out(facts: MemoryStore) -> None:
    """The docstrings say so. `Memory.history` has them, and undo takes them back."""
    items = MemStateStore(facts)
    items.setup()
    items.put(("a",), "b", {"text": "x"})
    assert facts.history() == []
    with facts.transaction() as session:
        assert [change.entity for change in facts.memory.history(session)] == ["memstate_item"]
    facts.rollback()
    assert items.get(("a",), "b") is None


async def test_items_of_a_coroutine_join_its_step(facts: MemoryStore, saver: MemStateCheckpointer) -> None:
    """`aput` would not: it runs in another thread."""
    items = MemStateStore(facts)
    items.setup()

    async def node(state: State) -> State:
        await saver.astep(lambda session: items.put(("a",), "b", {"text": "x"}))
        raise ValueError("after the step")

    graph = StateGraph(State).add_node("node", node).add_edge(START, "node").compile(checkpointer=saver)
    with pytest.raises(ValueError, match="after the step"):
        await graph.ainvoke({"trail": []}, CONFIG)
    assert items.get(("a",), "b") is None
