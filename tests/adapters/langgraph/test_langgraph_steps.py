"""A node's writes to the application's tables commit with its writes to the state, or not at all."""

from __future__ import annotations

import asyncio
import gc
import operator
import threading
import time
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextvars import copy_context
from pathlib import Path
from typing import Annotated, Any, TypedDict

import pytest
from sqlalchemy import Engine, create_engine, insert, select
from sqlalchemy.orm import Session

pytest.importorskip("langgraph.graph")

from langchain_core.runnables import RunnableConfig
from langgraph.config import get_config
from langgraph.graph import START, StateGraph
from langgraph.types import Command, RetryPolicy, interrupt

from memstate_sa import ConflictError, Fact, MemoryStore, MemstateError, sqlite
from memstate_sa.indexes import InMemoryIndex
from memstate_sa.integrations.langgraph import MemStateCheckpointer, checkpoint_inserts
from memstate_sa.integrations.langgraph.checkpoint_rows import CheckpointKey
from memstate_sa.integrations.langgraph.fair_semaphore import FairSemaphore
from memstate_sa.integrations.langgraph.node_transactions import StepLifetime, Task
from memstate_sa.integrations.langgraph.step_coordinator import StepCoordinator
from memstate_sa.testing import HashEmbedder
from tests.support import Tag, World
from tests.support.relays import eventually


class State(TypedDict, total=False):
    trail: Annotated[list[str], operator.add]


CONFIG: Any = {"configurable": {"thread_id": "t"}}


class Agent:
    """A graph whose nodes write facts, and the results."""

    def __init__(self, world: World, **options: Any) -> None:
        self.world = world
        self.saver = MemStateCheckpointer(world.engine, memory=world.memory, **options)
        self.saver.setup()
        self.ran: list[str] = []

    def graph(self, *nodes: Any, parallel: bool = False, retry: bool = False) -> Any:
        builder = StateGraph(State)
        before = START
        for node in nodes:
            policy = RetryPolicy(initial_interval=0.001, jitter=False, retry_on=ConnectionError) if retry else None
            builder.add_node(node.__name__, node, retry_policy=policy)
            builder.add_edge(before, node.__name__)
            before = START if parallel else node.__name__
        return builder.compile(checkpointer=self.saver)

    def tags(self) -> list[str]:
        with self.world.session() as session:
            return sorted(session.scalars(select(Tag.name)))

    def saved_writes(self, graph: Any) -> list[str]:
        """The stored task writes at the latest checkpoint."""
        found = self.saver.get_tuple(CONFIG)
        assert found is not None
        return [value for _, channel, values in found.pending_writes or () if channel == "trail" for value in values]

    def writer(self, name: str, then: Any = None) -> Any:
        def node(state: State) -> State:
            self.ran.append(name)
            with self.saver.step() as session:
                session.add(Tag(name=f"{name} {len(self.ran)}"))
            if then is not None:
                then()
            return {"trail": [name]}

        node.__name__ = name
        return node


@pytest.fixture
def agent(world: World) -> Agent:
    return Agent(world)


def fail_once(error: type[Exception] = ValueError) -> Any:
    failures = [error("once")]

    def fail() -> None:
        if failures:
            raise failures.pop()

    return fail


def test_facts_commit_with_the_writes(agent: Agent) -> None:
    """The commit comes when the node's writes are saved, not at the end of the block. Others see nothing before."""
    seen: list[Any] = []
    graph = agent.graph(agent.writer("a", lambda: seen.append(agent.tags())), agent.writer("b"))
    assert graph.invoke({"trail": []}, CONFIG)["trail"] == ["a", "b"]
    assert seen == [[]] and agent.tags() == ["a 1", "b 2"]
    agent.world.assert_in_step()


def test_facts_are_labelled_with_thread_and_node(agent: Agent) -> None:
    """The labels have the thread and the node, so that a single thread can be undone."""
    with agent.world.session() as session:
        session.add(Tag(name="somebody else's"))
        session.commit()
    agent.graph(agent.writer("a"), agent.writer("b")).invoke({"trail": []}, CONFIG)
    with agent.world.session() as session:
        changes = agent.world.memory.history(session, Tag, session_id="t")
        assert [(c.key, c.reason) for c in changes] == [("a 1", "node a"), ("b 2", "node b")]
        agent.world.memory.rollback(session, session_id="t")
        session.commit()
    assert agent.tags() == ["a 1", "somebody else's"]


def test_a_node_that_fails_leaves_no_fact(agent: Agent) -> None:
    """It will run again, so its facts would exist twice."""
    graph = agent.graph(agent.writer("a"), agent.writer("b", fail_once()))
    with pytest.raises(ValueError, match="once"):
        graph.invoke({"trail": []}, CONFIG)
    assert agent.tags() == ["a 1"]
    graph.invoke(None, CONFIG)
    assert agent.tags() == ["a 1", "b 3"]


def test_an_attempt_that_is_retried_leaves_no_fact(agent: Agent) -> None:
    graph = agent.graph(agent.writer("a", fail_once(ConnectionError)), retry=True)
    assert graph.invoke({"trail": []}, CONFIG)["trail"] == ["a"]
    assert agent.ran == ["a", "a"] and agent.tags() == ["a 2"]


def test_a_node_that_waits_for_an_answer_leaves_no_fact(agent: Agent) -> None:
    """It runs from its start again when the answer arrives."""
    graph = agent.graph(agent.writer("a", lambda: interrupt("sure?")))
    graph.invoke({"trail": []}, CONFIG)
    assert agent.tags() == []
    assert graph.invoke(Command(resume="yes"), CONFIG)["trail"] == ["a"]
    assert agent.tags() == ["a 2"]


@pytest.mark.parametrize("looked_at", [False, True])
def test_facts_that_cannot_be_committed_take_the_step_along(
    agent: Agent, looked_at: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Neither the node's writes nor the next checkpoint are saved. The next run repeats the node.

    Reading the thread in between changes nothing.
    """
    refused = [True]
    if looked_at:
        failed = agent.saver._steps.save_failed
        look = lambda *given: (failed(*given), agent.saver.get_tuple(CONFIG))  # noqa: E731
        monkeypatch.setattr(agent.saver._steps, "save_failed", look)

    def refuse(session: Any) -> None:
        if refused:
            raise ConflictError("not now")

    from sqlalchemy import event

    def a(state: State) -> State:
        with agent.saver.step() as session:
            session.add(Tag(name="a"))
            event.listen(session, "before_commit", refuse)
        return {"trail": ["a"]}

    def b(state: State) -> State:
        agent.ran.append("b")
        return {"trail": ["b"]}

    graph = agent.graph(a, b)
    with pytest.raises(ConflictError, match="not now"):
        graph.invoke({"trail": []}, CONFIG)
    assert agent.tags() == [] and graph.get_state(CONFIG).next == ("a",)
    refused.clear()
    assert graph.invoke(None, CONFIG)["trail"] == ["a", "b"]
    assert agent.tags() == ["a"]


def test_writes_that_cannot_be_saved_take_the_facts_along(agent: Agent) -> None:
    """An example is a value that msgpack cannot encode."""

    def bad(state: State) -> State:
        with agent.saver.step() as session:
            session.add(Tag(name="bad"))
        return {"trail": [fail_once]}

    graph = agent.graph(bad)
    with pytest.raises(MemstateError, match="serializable"):
        graph.invoke({"trail": []}, CONFIG)
    assert agent.tags() == [] and graph.get_state(CONFIG).next == ("bad",)


def test_node_can_catch_an_error_of_its_block(agent: Agent) -> None:
    """The node catches the error and goes on. Writes of its earlier blocks stay."""

    def a(state: State) -> State:
        with agent.saver.step() as session:
            session.add(Tag(name="kept"))
        with pytest.raises(ValueError, match="inside"), agent.saver.step() as session:
            session.add(Tag(name="dropped"))
            raise ValueError("inside")
        with pytest.raises(Exception, match="name"), agent.saver.step() as session:
            session.add(Tag(name=None))
        with agent.saver.step() as session:
            assert sorted(session.scalars(select(Tag.name))) == ["kept"]
            session.add(Tag(name="also kept"))
        return {"trail": ["a"]}

    agent.graph(a).invoke({"trail": []}, CONFIG)
    assert agent.tags() == ["also kept", "kept"]


def test_parallel_nodes_commit_by_themselves(agent: Agent) -> None:
    """Each commits by itself. If one fails, the others' facts stay with their writes, and are not repeated."""
    names = [f"n{n}" for n in range(4)]
    nodes = [agent.writer(name) for name in names] + [agent.writer("bad", fail_once())]
    graph = agent.graph(*nodes, parallel=True)
    with pytest.raises(ValueError, match="once"):
        graph.invoke({"trail": []}, CONFIG)
    done = [tag.split()[0] for tag in agent.tags()]
    assert sorted(agent.saved_writes(graph)) == sorted(done) and "bad" not in done
    assert sorted(graph.invoke(None, CONFIG)["trail"]) == sorted([*names, "bad"])
    assert sorted(tag.split()[0] for tag in agent.tags()) == sorted([*names, "bad"])
    agent.world.assert_in_step()


def test_tools_of_one_node_share_its_step(agent: Agent) -> None:
    """They run in threads, and take turns."""

    def a(state: State) -> State:
        def tool(n: int) -> None:
            with agent.saver.step() as session:
                session.add(Tag(name=f"tool {n}"))
                session.flush()

        with ThreadPoolExecutor(4) as pool:
            for done in [pool.submit(copy_context().run, tool, n) for n in range(8)]:
                done.result()
        return {"trail": ["a"]}

    agent.graph(a).invoke({"trail": []}, CONFIG)
    assert agent.tags() == [f"tool {n}" for n in range(8)]


@pytest.mark.parametrize("durability", ["sync", "async"])
async def test_coroutines_write_facts_with_astep(agent: Agent, durability: Any) -> None:
    """The work runs in a thread. Nodes that are not coroutines use `step` as before."""

    async def a(state: State) -> State:
        with pytest.raises(MemstateError, match="astep"), agent.saver.step():
            pass
        name = await agent.saver.astep(lambda session: session.add(Tag(name="a")) or "a")
        return {"trail": [name]}

    graph = agent.graph(a, agent.writer("b"), agent.writer("c"))
    assert (await graph.ainvoke({"trail": []}, CONFIG, durability=durability))["trail"] == ["a", "b", "c"]
    assert agent.tags() == ["a", "b 1", "c 2"]


async def test_many_graphs_in_one_loop_do_not_block_each_other(agent: Agent) -> None:
    """More steps wait for their checkpoints than asyncio has threads. The saves still run."""

    async def a(state: State, config: RunnableConfig) -> State:
        name = config["configurable"]["thread_id"]
        await agent.saver.astep(lambda session: session.add(Tag(name=f"{name} {len(state['trail'])}")))
        return {"trail": [name]}

    async def b(state: State, config: RunnableConfig) -> State:
        return await a(state, config)

    graph = agent.graph(a, b)
    threads = [str(n) for n in range(20)]
    await asyncio.gather(*(graph.ainvoke({"trail": []}, {"configurable": {"thread_id": t}}) for t in threads))
    assert agent.tags() == sorted(f"{thread} {n}" for thread in threads for n in (0, 1))


@pytest.fixture
def crowded(agent: Agent) -> Iterator[Agent]:
    """An agent with fewer connections than nodes."""
    engine = create_engine(agent.world.engine.url, pool_size=3, max_overflow=1)
    sqlite.configure(engine)
    agent.saver = MemStateCheckpointer(engine, memory=agent.world.memory)
    yield agent
    agent.saver.close()
    engine.dispose()


async def look(agent: Agent) -> None:
    """Read on a separate connection, like a search or a store's get."""

    def select_one() -> None:
        with agent.saver.engine.connect() as connection:
            connection.execute(select(Tag.name)).first()

    await asyncio.to_thread(select_one)


async def test_more_nodes_than_connections_all_finish(crowded: Agent) -> None:
    """Each node has a step and reads on another connection. One connection stays free for a node that can finish."""

    def node(n: int) -> Any:
        async def work(state: State) -> State:
            await crowded.saver.astep(lambda session: session.add(Tag(name=f"{n}")))
            await look(crowded)
            await crowded.saver.astep(lambda session: session.add(Tag(name=f"{n} again")))
            return {"trail": [str(n)]}

        work.__name__ = f"n{n}"
        return work

    graph = crowded.graph(*map(node, range(9)), parallel=True)
    assert sorted((await graph.ainvoke({"trail": []}, CONFIG))["trail"]) == [str(n) for n in range(9)]
    assert crowded.tags() == sorted(name for n in range(9) for name in (f"{n}", f"{n} again"))
    crowded.world.assert_in_step()


async def test_subgraphs_of_more_nodes_than_connections_all_finish(crowded: Agent) -> None:
    """Inner steps have their own connections. The outer steps that wait for them cannot take these."""

    def inside(n: int) -> Any:
        async def write(state: State) -> State:
            await crowded.saver.astep(lambda session: session.add(Tag(name=f"inside {n}")))
            await look(crowded)
            return {"trail": []}

        return StateGraph(State).add_node("write", write).add_edge(START, "write").compile()

    def node(n: int) -> Any:
        graph = inside(n)

        async def around(state: State) -> State:
            await crowded.saver.astep(lambda session: session.scalars(select(Tag.name)).first())
            await graph.ainvoke({"trail": []})
            return {"trail": [str(n)]}

        around.__name__ = f"n{n}"
        return around

    graph = crowded.graph(*map(node, range(6)), parallel=True)
    assert sorted((await graph.ainvoke({"trail": []}, CONFIG))["trail"]) == [str(n) for n in range(6)]
    assert crowded.tags() == [f"inside {n}" for n in range(6)]


@pytest.mark.parametrize("cancelled", [False, True])
async def test_failed_run_gives_all_turns_back(crowded: Agent, cancelled: bool) -> None:
    """A run that fails or is cancelled also gives back its turn. The next run has all turns."""
    begun, fails = asyncio.Event(), [True]

    def node(n: int) -> Any:
        async def work(state: State) -> State:
            await crowded.saver.astep(lambda session: session.add(Tag(name=str(n))))
            begun.set()
            if fails:
                await asyncio.sleep(60 if cancelled else 0.1)
                raise ValueError("once")
            return {"trail": [str(n)]}

        work.__name__ = f"n{n}"
        return work

    graph = crowded.graph(*map(node, range(6)), parallel=True)
    run = asyncio.create_task(graph.ainvoke({"trail": []}, CONFIG))
    await begun.wait()
    if cancelled:
        run.cancel()
    with pytest.raises((ValueError, asyncio.CancelledError)):
        await run
    await asyncio.to_thread(assert_nothing_is_left_open, crowded)
    semaphores = crowded.saver._steps._semaphores.values()
    await asyncio.to_thread(eventually, lambda: all(semaphore._permits == [] for semaphore in semaphores))
    assert crowded.tags() == ["x"]
    fails.clear()
    await graph.ainvoke(None, CONFIG)
    assert crowded.tags() == [*map(str, range(6)), "x"]


async def test_node_that_waits_for_a_node_without_a_turn_is_refused(
    crowded: Agent, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It gets an error with the reason instead of waiting for ever."""
    begun: list[int] = []
    all_begun, done = threading.Event(), asyncio.Event()
    limit, wait = 1 if crowded.world.engine.dialect.name == "sqlite" else 2, FairSemaphore.wait

    async def impatiently(self: FairSemaphore, permit: Any, timeout_s: float) -> None:
        if not permit.done():
            await asyncio.to_thread(all_begun.wait, 60)
        await wait(self, permit, 0.1)

    monkeypatch.setattr(FairSemaphore, "wait", impatiently)

    def begin(n: int) -> None:
        begun.append(n)
        if len(begun) >= limit:
            all_begun.set()

    def node(n: int) -> Any:
        async def work(state: State) -> State:
            try:
                await crowded.saver.astep(lambda session: begin(n))
                await asyncio.wait_for(done.wait(), 60)
            finally:
                done.set()
            return {"trail": [str(n)]}

        work.__name__ = f"n{n}"
        return work

    with pytest.raises(MemstateError, match="maximum of"):
        await crowded.graph(*map(node, range(4)), parallel=True).ainvoke({"trail": []}, CONFIG)
    assert len(begun) == limit
    await asyncio.to_thread(assert_nothing_is_left_open, crowded)


def test_steps_of_subgraphs_are_saved_at_their_checkpoints(agent: Agent) -> None:
    """Steps of a subgraph are saved at its own checkpoints. The step of a Command to the parent is saved at the
    parent's.
    """

    def leave(state: State) -> Any:
        with agent.saver.step() as session:
            session.add(Tag(name="leaving"))
        return Command(graph=Command.PARENT, update={"trail": ["left"]})

    inner = StateGraph(State).add_node("first", agent.writer("first")).add_node("leave", leave)
    inner.add_edge(START, "first").add_edge("first", "leave")
    outer = StateGraph(State).add_node("inner", inner.compile()).add_node("after", agent.writer("after"))
    graph = outer.add_edge(START, "inner").add_edge("inner", "after").compile(checkpointer=agent.saver)
    graph.invoke({"trail": []}, CONFIG)
    assert agent.tags() == ["after 2", "first 1", "leaving"]


@pytest.mark.parametrize("durability", ["sync", "async"])
@pytest.mark.parametrize("inside", [True, False])
def test_subgraph_called_in_a_writing_step_needs_a_second_writer(agent: Agent, durability: Any, inside: bool) -> None:
    """SQLite's one writer is the caller. The called graph would wait for it in vain, so it gets an error."""
    inner = StateGraph(State).add_node("inner", agent.writer("inner")).add_edge(START, "inner").compile()
    writes = False

    def outer(state: State) -> State:
        with agent.saver.step() as session:
            if writes:
                session.add(Tag(name="outer"))
                session.flush()
            else:
                assert session.scalars(select(Tag.name)).all() == []
            if inside:
                inner.invoke({"trail": []}, durability=durability)
        if not inside:
            inner.invoke({"trail": []}, durability=durability)
        return {"trail": ["outer"]}

    graph = agent.graph(outer)
    assert graph.invoke({"trail": []}, CONFIG)["trail"] == ["outer"]  # a step that only reads blocks no other
    assert agent.tags() == ["inner 1"]
    writes = True
    if agent.world.engine.dialect.name == "sqlite":
        with pytest.raises(MemstateError, match="one writer"):
            graph.invoke({"trail": []}, CONFIG)
        assert agent.tags() == ["inner 1"]
    else:
        graph.invoke({"trail": []}, CONFIG)
        assert agent.tags() == ["inner 1", "inner 2", "outer"]


def test_rolled_back_step_does_not_block_others(world: World) -> None:
    """After the rollback, another transaction uses its connection. It blocks others again after its next write."""
    steps, run = StepCoordinator(world.session, 1.0), threading.Event()  # an object
    task = Task(CheckpointKey("t", "", "1"), "task", run, 1)

    def is_in_the_way() -> bool:
        try:
            steps.check_around("t", "node:task")
        except MemstateError:
            return True
        return False

    def write(session: Session, name: str) -> None:
        session.add(Tag(name=name))
        session.flush()

    only = world.engine.dialect.name == "sqlite"
    with steps.step(task, lambda _: True, StepLifetime(run)) as (session, _):
        write(session, "rolled back")
        assert is_in_the_way() == only
        session.rollback()
        with world.engine.begin() as connection:
            connection.execute(insert(Tag), {"name": "another's"})
            assert not is_in_the_way()
    assert not is_in_the_way()
    with world.engine.connect() as connection:
        connection.execute(select(Tag)).all()
        with steps.step(task, lambda _: True, StepLifetime(run)) as (session, _):
            write(session, "again")
            session.begin_nested().rollback()
            assert is_in_the_way() == only
        assert is_in_the_way() == only
    steps.give_up(task)
    assert not is_in_the_way()


def test_tasks_that_must_commit_together_are_refused(agent: Agent) -> None:
    """They are refused, and nothing of the step is saved."""

    def leave(state: State) -> Any:
        with agent.saver.step() as session:
            session.add(Tag(name="leaving"))
        return Command(graph=Command.PARENT, update={"trail": ["left"]})

    inner = StateGraph(State).add_node("leave", leave).add_edge(START, "leave").compile()

    def outer(state: State) -> Any:
        with agent.saver.step() as session:
            session.add(Tag(name="outer"))
            if agent.world.engine.dialect.name == "sqlite":  # its one writer is busy until the node returns
                session.rollback()
        return inner.invoke(state)

    graph = agent.graph(outer)
    with pytest.raises(MemstateError, match="together"):
        graph.invoke({"trail": []}, CONFIG)
    assert agent.tags() == [] and graph.get_state(CONFIG).next == ("outer",)


def test_step_is_refused_where_nothing_is_saved(world: World) -> None:
    """Otherwise facts would be lost, or committed separately from the state."""
    agent = Agent(world, step_timeout_s=0.05)
    graph = agent.graph(agent.writer("a"))
    with pytest.raises(MemstateError, match="durability='exit'"):
        graph.invoke({"trail": []}, CONFIG, durability="exit")
    with pytest.raises(MemstateError, match="not running in a node"), agent.saver.step():
        pass
    inner = StateGraph(State).add_node("a", agent.writer("a")).add_edge(START, "a").compile(checkpointer=False)
    outer = StateGraph(State).add_node("inner", inner).add_edge(START, "inner").compile(checkpointer=agent.saver)
    with pytest.raises(MemstateError, match="checkpointer=False"):
        outer.invoke({"trail": []}, CONFIG)
    assert agent.tags() == []


def test_a_step_waits_for_its_checkpoint(agent: Agent, monkeypatch: pytest.MonkeyPatch) -> None:
    """Otherwise, after a crash, the node would run again at another checkpoint, beside its committed facts."""
    graph = agent.graph(agent.writer("a"), agent.writer("b"))
    order: list[str] = []
    put, go_on = checkpoint_inserts.put_checkpoint, threading.Event()

    def slow(*given: Any, **options: Any) -> bool:
        go_on.wait(0.2)  # a slow save; no time is asserted
        is_stored = put(*given, **options)
        order.append("checkpoint")
        return is_stored

    monkeypatch.setattr(checkpoint_inserts, "put_checkpoint", slow)
    session = agent.saver._steps._sessions
    monkeypatch.setattr(agent.saver._steps, "_sessions", lambda: (order.append("step"), session())[1])
    graph.invoke({"trail": []}, CONFIG)
    # The input's checkpoint, the one before a, step a, the one before b, step b, the last checkpoint.
    assert order == ["checkpoint", "checkpoint", "step", "checkpoint", "step", "checkpoint"]


def test_a_checkpoint_waits_for_its_tasks(agent: Agent, monkeypatch: pytest.MonkeyPatch) -> None:
    """Otherwise a crash would leave a state in which the node is done, without its facts."""
    graph = agent.graph(agent.writer("a"))
    order: list[str] = []
    put, put_writes, go_on = checkpoint_inserts.put_checkpoint, checkpoint_inserts.put_writes, threading.Event()

    def slow(*given: Any, **options: Any) -> None:
        is_a = given[2][0].task_path.endswith(", a")
        if is_a:
            go_on.wait(0.2)
        put_writes(*given, **options)
        order.extend(["writes"] * is_a)

    monkeypatch.setattr(checkpoint_inserts, "put_writes", slow)
    monkeypatch.setattr(
        checkpoint_inserts,
        "put_checkpoint",
        lambda *args, **given: (put(*args, **given), order.append("checkpoint"))[0],
    )
    graph.invoke({"trail": []}, CONFIG)
    assert order == ["checkpoint", "checkpoint", "writes", "checkpoint"]


# -- a MemoryStore -----------------------------------------------------------------------------------------------------


@pytest.fixture
def store(engine: Engine, tmp_path: Path) -> Iterator[MemoryStore]:
    with MemoryStore(engine, InMemoryIndex(), embedder=HashEmbedder(), background=False) as made:
        yield made


@pytest.mark.parametrize("by_engine", [False, True])
def test_calls_of_a_store_join_the_step(store: MemoryStore, by_engine: bool) -> None:
    """Calls inside the block join. Calls outside of it commit by themselves, as before."""
    saver = MemStateCheckpointer(store.engine, memory=store.memory) if by_engine else MemStateCheckpointer(store)
    saver.setup()
    failures = fail_once()

    def a(state: State) -> State:
        with saver.step():
            store.commit(Fact(type="note", payload={"text": "joined"}), reason="because")
            assert [fact.payload["text"] for fact in store.query("note")] == ["joined"]
        failures()
        return {"trail": ["a"]}

    graph = StateGraph(State).add_node("a", a).add_edge(START, "a").compile(checkpointer=saver)
    with pytest.raises(ValueError, match="once"):
        graph.invoke({"trail": []}, CONFIG)
    assert store.query("note") == []
    graph.invoke(None, CONFIG)
    store.commit(Fact(type="note", payload={"text": "alone"}))
    assert [fact.payload["text"] for fact in store.query("note")] == ["joined", "alone"]
    store.rollback(session_id="t")
    assert [fact.payload["text"] for fact in store.query("note")] == ["alone"]


def test_items_by_engine_join_a_transaction_of_the_store(store: MemoryStore) -> None:
    """It does not matter how store and items were made."""
    from memstate_sa.integrations.langgraph import MemStateStore

    items = MemStateStore(store.engine, memory=store.memory)
    items.setup()
    with pytest.raises(ValueError, match="once"), store.transaction():
        items.put(("a",), "b", {"text": "rolled back with it"})
        assert items.get(("a",), "b") is not None
        raise ValueError("once")
    assert items.get(("a",), "b") is None


def test_deleting_a_thread_keeps_its_facts_by_default(store: MemoryStore) -> None:
    """The facts stay unless deletion is requested. Other threads' facts always stay."""
    saver = MemStateCheckpointer(store)
    saver.setup()

    def a(state: State) -> State:
        with saver.step():
            store.commit(Fact(type="note", payload={"text": "the thread's"}))
        return {"trail": ["a"]}

    graph = StateGraph(State).add_node("a", a).add_edge(START, "a").compile(checkpointer=saver)
    store.commit(Fact(type="note", payload={"text": "somebody's"}))
    graph.invoke({"trail": []}, CONFIG)
    saver.delete_thread("t")
    assert graph.get_state(CONFIG).values == {} and len(store.query("note")) == 2
    graph.invoke({"trail": []}, CONFIG)
    saver.delete_thread("t", facts=True)
    assert graph.get_state(CONFIG).values == {}
    assert [fact.payload["text"] for fact in store.query("note")] == ["somebody's"]


# -- nodes that were stopped -------------------------------------------------------------------------------------------


def assert_nothing_is_left_open(agent: Agent) -> None:
    """Assert that soon no step and no lock is left. Another thread closes the step, so this may take a moment."""
    deadline = time.monotonic() + 60
    while agent.saver._steps._open or agent.saver._steps._committing:
        assert time.monotonic() < deadline, "a step is still open"
        gc.collect()
        time.sleep(0.01)
    with agent.world.session() as session:
        session.add(Tag(name="x"))
        session.commit()


@pytest.mark.parametrize("parallel", [False, True])
def test_node_that_times_out_keeps_facts_and_writes_together(
    agent: Agent, parallel: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its thread ends after the run has failed. Its facts exist with its writes, or else it runs again."""
    given_up, cancel = threading.Event(), Future.cancel

    def give_up(future: Future[Any]) -> bool:
        if future.running():
            given_up.set()
        return cancel(future)

    monkeypatch.setattr(Future, "cancel", give_up)
    other = agent.writer("b") if parallel else agent.writer("later")
    graph = agent.graph(agent.writer("a", lambda: given_up.wait(60)), other, parallel=parallel)
    graph.step_timeout = 0.1
    with pytest.raises(TimeoutError):
        graph.invoke({"trail": []}, CONFIG)
    assert_nothing_is_left_open(agent)
    graph.step_timeout = None
    trail = graph.invoke(None, CONFIG)["trail"]
    assert sorted(trail) == sorted(tag.split()[0] for tag in agent.tags() if tag != "x")


async def test_run_that_times_out_after_a_step_rolls_it_back(agent: Agent) -> None:
    """No asyncio.Task is cancelled, so only the end of the node's life shows it."""

    async def a(state: State) -> State:
        await agent.saver.astep(lambda session: session.add(Tag(name="a")))
        limit.reschedule(asyncio.get_running_loop().time())
        await asyncio.sleep(60)
        return {"trail": ["a"]}

    with pytest.raises(TimeoutError):
        async with asyncio.timeout(None) as limit:
            await agent.graph(a).ainvoke({"trail": []}, CONFIG)
    await asyncio.to_thread(assert_nothing_is_left_open, agent)
    assert agent.tags() == ["x"]


async def test_cancelled_coroutine_rolls_its_step_back(agent: Agent) -> None:
    """The step is being written in a thread that cannot be stopped. This does not need garbage collection."""
    begun, go_on, kept = threading.Event(), threading.Event(), []

    def work(session: Any) -> None:
        session.add(Tag(name="a"))
        session.flush()
        begun.set()
        go_on.wait(60)

    async def a(state: State) -> State:
        kept.append(get_config())
        await agent.saver.astep(work)
        return {"trail": ["a"]}

    run = asyncio.create_task(agent.graph(a).ainvoke({"trail": []}, CONFIG))
    await asyncio.to_thread(begun.wait, 60)
    run.cancel()
    await asyncio.sleep(0)
    go_on.set()
    with pytest.raises(asyncio.CancelledError):
        await run
    await asyncio.to_thread(assert_nothing_is_left_open, agent)
    assert agent.tags() == ["x"]


async def test_node_that_catches_a_cancellation_is_not_done(agent: Agent) -> None:
    """The node's earlier writes were rolled back, so it must run again, even if it goes on."""
    catches = [True]

    async def a(state: State) -> State:
        await agent.saver.astep(lambda session: session.add(Tag(name="before")))
        if catches:
            begun, go_on = threading.Event(), threading.Event()
            inner = asyncio.create_task(agent.saver.astep(lambda session: (begun.set(), go_on.wait(60))))
            await asyncio.to_thread(begun.wait, 60)
            inner.cancel()
            with pytest.raises(asyncio.CancelledError):
                await inner
            go_on.set()
        return {"trail": ["a"]}

    graph = agent.graph(a)
    with pytest.raises(MemstateError, match="cancelled"):
        await graph.ainvoke({"trail": []}, CONFIG)
    assert agent.tags() == []
    catches.clear()
    assert (await graph.ainvoke(None, CONFIG))["trail"] == ["a"]
    await asyncio.to_thread(assert_nothing_is_left_open, agent)
    assert agent.tags() == ["before", "x"]


def test_step_ends_when_its_task_is_gone(agent: Agent) -> None:
    """The object that holds the task's writes is gone. This ends the step, even if nothing else settles it."""

    class Writes: ...

    writes = Writes()
    task = Task(CheckpointKey("t", "", "1"), "task", object(), 1)
    with agent.saver._steps.step(task, lambda place: True, StepLifetime(writes)) as (session, _):
        session.add(Tag(name="a"))
    assert agent.saver._steps.is_open("t", "task")
    del writes
    assert_nothing_is_left_open(agent)
    assert agent.tags() == ["x"]
