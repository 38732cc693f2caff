"""A graph with memory: its nodes use the store, and their puts are ordinary facts."""

from __future__ import annotations

import operator
from collections.abc import Iterator
from typing import Annotated, Any, TypedDict

import pytest
from sqlalchemy import Engine

pytest.importorskip("langgraph.graph")

from langgraph.graph import START, StateGraph
from langgraph.runtime import Runtime
from langgraph.store.base import BaseStore

from memstate_sa import Fact, Memory, MemoryStore
from memstate_sa.embedders import WordLlamaEmbedder
from memstate_sa.indexes import InMemoryIndex
from memstate_sa.integrations.langgraph import MemStateCheckpointer, MemStateStore
from memstate_sa.testing import HashEmbedder


class State(TypedDict, total=False):
    said: str
    trail: Annotated[list[str], operator.add]


def config(thread: str, **more: Any) -> Any:
    return {"configurable": {"thread_id": thread, **more}}


class Agent:
    """A MemoryStore, with a store and a checkpointer on it."""

    def __init__(self, engine: Engine) -> None:
        self.facts = MemoryStore(engine, InMemoryIndex(), embedder=HashEmbedder(), background=False)
        self.store = MemStateStore(self.facts, index={"fields": ["text"]})
        self.saver = MemStateCheckpointer(self.facts)
        self.store.setup()
        self.saver.setup()

    def graph(self, *nodes: Any) -> Any:
        builder = StateGraph(State)
        before = START
        for node in nodes:
            builder.add_node(node.__name__, node)
            builder.add_edge(before, node.__name__)
            before = node.__name__
        return builder.compile(checkpointer=self.saver, store=self.store)

    def values(self, *namespace: str) -> dict[str, Any]:
        return {item.key: item.value for item in self.store.search(namespace)}


@pytest.fixture
def agent(engine: Engine) -> Iterator[Agent]:
    made = Agent(engine)
    yield made
    made.facts.close()


def remember(state: State, *, store: BaseStore) -> State:
    store.put(("memories", "ann"), state["said"][:8], {"text": state["said"]})
    return {"trail": ["remembered"]}


def recall(state: State, runtime: Runtime) -> State:
    assert runtime.store is not None
    found = runtime.store.search(("memories", "ann"), query=state["said"], limit=1)
    return {"trail": [item.value["text"] for item in found]}


async def aremember(state: State, *, store: BaseStore) -> State:
    await store.aput(("memories", "ann"), state["said"][:8], {"text": state["said"]})
    return {"trail": ["remembered"]}


async def arecall(state: State, *, store: BaseStore) -> State:
    return {
        "trail": [item.value["text"] for item in await store.asearch(("memories", "ann"), query=state["said"], limit=1)]
    }


def test_a_graph_remembers_across_threads(agent: Agent) -> None:
    graph = agent.graph(remember, recall)
    graph.invoke({"said": "i like green pears"}, config("one"))
    graph.invoke({"said": "my sister is called jo"}, config("two"))
    found = agent.graph(recall).invoke({"said": "do i like pears?"}, config("three"))
    assert found["trail"] == ["i like green pears"]


async def test_graph_of_coroutines_remembers_across_threads(agent: Agent) -> None:
    graph = agent.graph(aremember, arecall)
    await graph.ainvoke({"said": "i like green pears"}, config("one"))
    found = await graph.ainvoke({"said": "my sister is called jo"}, config("two"))
    assert found["trail"] == ["remembered", "my sister is called jo"]
    [change] = agent.store.history(("memories", "ann"), "my siste")
    assert (change.session_id, change.reason) == ("two", "node aremember")


def test_puts_of_a_thread_can_be_undone(agent: Agent) -> None:
    """The labels have the thread and the node."""
    graph = agent.graph(remember)
    graph.invoke({"said": "i like green pears"}, config("one"))
    graph.invoke({"said": "my sister is called jo"}, config("two"))
    agent.store.put(("memories", "ann"), "by hand", {"text": "not by a graph"})
    [change] = agent.store.history(("memories", "ann"), "i like g")
    assert (change.session_id, change.reason) == ("one", "node remember")
    [by_hand] = agent.store.history(("memories", "ann"), "by hand")
    assert (by_hand.session_id, by_hand.reason) == (None, None)
    agent.saver.delete_thread("one", facts=True)
    assert set(agent.values("memories")) == {"my siste", "by hand"}
    assert agent.store.search((), query="green pears", limit=1)[0].key != "i like g"


def test_transaction_in_a_node_keeps_its_own_labels(agent: Agent) -> None:
    def work(state: State, *, store: BaseStore) -> State:
        with agent.facts.transaction(actor="me", reason="mine", session_id="s"):
            store.put(("memories",), "item", {"text": "green pears"})
        return {"trail": ["done"]}

    agent.graph(work).invoke({"trail": []}, config("t"))
    [change] = agent.store.history(("memories",), "item")
    assert (change.actor, change.reason, change.session_id) == ("me", "mine", "s")


def test_a_step_and_its_nodes_puts_are_one_transaction(agent: Agent) -> None:
    """A fact, an item and the state are saved together, or not at all."""
    fails = True

    def work(state: State, *, store: BaseStore) -> State:
        with agent.saver.step():
            store.put(("memories",), "item", {"text": "green pears"})
            agent.facts.commit(Fact(id="fact", type="note", payload={"n": 1}))
            assert store.get(("memories",), "item") is not None
            assert [item.key for item in store.search((), query="green pears")] == ["item"]
        if fails:
            raise ZeroDivisionError
        return {"trail": ["done"]}

    graph = agent.graph(work)
    with pytest.raises(ZeroDivisionError):
        graph.invoke({"trail": []}, config("t"))
    assert (agent.values(), agent.facts.get("fact")) == ({}, None)
    assert agent.store.history(("memories",), "item") == []
    fails = False
    assert graph.invoke(None, config("t"))["trail"] == ["done"]
    assert agent.values() == {"item": {"text": "green pears"}}
    [item], [fact] = agent.store.history(("memories",), "item"), agent.facts.history("fact")
    assert (item.tx, item.session_id, item.reason) == (fact.tx, "t", "node work")


@pytest.mark.parametrize("where", ["engine", "url"])
def test_a_store_without_a_memory_store_joins_the_step(engine: Engine, where: str) -> None:
    """It is made of an Engine and a Memory, like the checkpointer. On SQLite it would else wait for its own step."""
    memory = Memory(InMemoryIndex(), embedder=HashEmbedder())
    url = engine.url.render_as_string(hide_password=False)
    store = MemStateStore(engine if where == "engine" else url, memory=memory)
    saver = MemStateCheckpointer(engine, memory=memory)
    saver.setup()
    store.setup()
    fails = True

    def work(state: State) -> State:
        with saver.step() as session:
            session.add(Fact(id="fact", type="note", payload={}))
            session.flush()
            store.put(("a",), "item", {"text": "green pears"})
            assert [item.key for item in store.search((), query="green pears")] == ["item"]
        if fails:
            raise ZeroDivisionError
        return {"trail": ["done"]}

    graph = StateGraph(State).add_node("work", work).add_edge(START, "work").compile(checkpointer=saver)
    with pytest.raises(ZeroDivisionError):
        graph.invoke({"trail": []}, config("t"))
    assert store.search(()) == []
    fails = False
    graph.invoke(None, config("t"))
    [change] = store.history(("a",), "item")
    assert (change.session_id, change.reason) == ("t", "node work")
    store.put(("a",), "by hand", {})
    assert [each.session_id for each in store.history(("a",), "by hand")] == [None]
    store.engine.dispose()
    saver.close()
    memory.close()


def test_a_replay_may_read_the_store_as_it_was(agent: Agent) -> None:
    """LangGraph's own stores answer Berlin."""

    def where(state: State, *, store: BaseStore) -> State:
        assert isinstance(store, MemStateStore)
        found = store.as_of(agent.saver.as_of()).get(("people",), "ann")
        assert found is not None
        return {"trail": [found.value["city"]]}

    agent.store.put(("people",), "ann", {"city": "paris"})
    graph = agent.graph(where)
    graph.invoke({"trail": []}, config("t"))
    agent.store.put(("people",), "ann", {"city": "berlin"})
    before = next(state for state in graph.get_state_history(config("t")) if state.next == ("where",))
    assert graph.invoke(None, agent.saver.at(before))["trail"] == ["paris"]
    assert graph.invoke(None, before.config)["trail"] == ["berlin"]


def test_two_stores_of_one_memory_find_each_others_items(agent: Agent) -> None:
    """This includes a Memory of another process with earlier items."""
    other = MemStateStore(agent.facts, index={"fields": ["other"]}, ttl={"default_ttl": 5})
    other.put(("x",), "k", {"other": "green pears"})
    assert [item.key for item in agent.store.search((), query="green pears")] == ["k"]


def test_search_finds_items_by_meaning(engine: Engine) -> None:
    """This test uses real embeddings."""
    with MemoryStore(engine, InMemoryIndex(), embedder=WordLlamaEmbedder(), background=False) as facts:
        store = MemStateStore(facts, index={"fields": ["text", "facets[*]"]})
        store.setup()
        store.put(("u1",), "diet", {"text": "The user is a vegetarian and avoids meat"})
        store.put(("u1",), "pet", {"text": "The user has a dog named Rex"})
        store.put(
            ("u1",), "job", {"text": "Employment", "facets": ["writes compilers for a living", "dislikes travel"]}
        )
        store.put(("u2",), "diet", {"text": "The user eats steak every day"})
        store.put(("u1",), "raw", {"n": 1})
        for drained in (False, True):
            if drained:
                facts.memory.relay(engine).drain()
            best = {
                query: store.search(("u1",), query=query)[0].key
                for query in ("what should I cook for dinner?", "animals at home", "software engineering")
            }
            assert best == {
                "what should I cook for dinner?": "diet",
                "animals at home": "pet",
                "software engineering": "job",
            }
            found = store.search(("u1",), query="food", limit=10)
            assert [item.score is None for item in found] == [False, False, False, True]
            assert {item.namespace for item in found} == {("u1",)}
