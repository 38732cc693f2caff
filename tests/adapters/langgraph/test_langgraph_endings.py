"""A task's facts commit with its part of the state, or not at all, for any end of the task and many waiters."""

from __future__ import annotations

import asyncio
import gc
import itertools
import operator
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, nullcontext
from typing import Annotated, Any, TypedDict

import pytest
from sqlalchemy import Engine, create_engine, insert, select

pytest.importorskip("langgraph.graph")

from langchain_core.messages import AIMessage
from langchain_core.runnables import RunnableLambda
from langchain_core.tools import tool
from langgraph.channels import UntrackedValue
from langgraph.config import get_config
from langgraph.errors import ParentCommand
from langgraph.func import entrypoint, task
from langgraph.graph import START, MessagesState, StateGraph
from langgraph.prebuilt import ToolNode
from langgraph.types import Command, RetryPolicy, Send

from memstate_sa import MemstateError, sqlite
from memstate_sa.integrations.langgraph import MemStateCheckpointer
from tests.support import Tag, World, in_threads


@pytest.fixture
def sqlite_world(sqlite_engine: Engine) -> Iterator[World]:
    made = World(sqlite_engine)
    yield made
    made.memory.close()


class State(TypedDict, total=False):
    trail: Annotated[list[str], operator.add]


class Scratch(State):
    unsaved: Annotated[str, UntrackedValue]


class Agent:
    """Nodes that write a fact, and its name in the state."""

    def __init__(self, world: World, coroutines: bool = False, **options: Any) -> None:
        self.world, self.coroutines = world, coroutines
        self.saver = MemStateCheckpointer(world.engine, memory=world.memory, **options)
        self.saver.setup()
        self.numbers = itertools.count(1)
        self.written: list[str] = []

    def node(self, name: str, then: Callable[[], Any] = lambda: None, leave: Command[Any] | None = None) -> Any:
        """A node that writes *name* with its thread, and returns it, or leaves by the Command *leave*."""

        def write() -> str:
            mine = f"{get_config()['configurable']['thread_id']} {name} {next(self.numbers)}"
            self.written.append(mine)
            return mine

        def result(mine: str) -> Any:
            then()
            update = {"trail": [mine]}
            if leave is None:
                return update
            command = Command(goto=leave.goto, graph=leave.graph, update=update)
            if leave.graph != Command.PARENT:
                raise ParentCommand(command)
            return command

        def function(state: Any) -> Any:
            mine = write()
            with self.saver.step() as session:
                session.add(Tag(name=mine))
            return result(mine)

        async def coroutine(state: Any) -> Any:
            mine = write()
            await self.saver.astep(lambda session: session.add(Tag(name=mine)))
            return result(mine)

        return coroutine if self.coroutines else function

    def run(self, graph: Any, thread: str = "t", durability: Any = None, **options: Any) -> Any:
        config: Any = {"configurable": {"thread_id": thread}, **options}
        if self.coroutines:
            return asyncio.run(graph.ainvoke({"trail": []}, config, durability=durability))
        return graph.invoke({"trail": []}, config, durability=durability)

    def tags(self) -> list[str]:
        with self.world.session() as session:
            return sorted(session.scalars(select(Tag.name)))


@pytest.fixture(params=["functions", "coroutines"])
def agent(request: pytest.FixtureRequest, world: World) -> Iterator[Agent]:
    made = Agent(world, coroutines=request.param == "coroutines")
    yield made
    made.saver.close()


def one(name: str, node: Any, state: Any = State, **options: Any) -> Any:
    """A graph of one node."""
    return StateGraph(state).add_node(name, node, **options).add_edge(START, name)


TO_BOB: Command[Any] = Command(goto="bob", graph=Command.PARENT)


def two_levels(agent: Agent) -> Any:
    return one("alice", one("leave", agent.node("a", leave=TO_BOB)).compile(), destinations=("bob",))


def three_levels(agent: Agent) -> Any:
    """Each graph hands over to the graph around it."""
    inner = one("leave", agent.node("a", leave=Command(goto="on", graph=Command.PARENT))).compile()
    middle = one("inner", inner, destinations=("on",)).add_node("on", agent.node("b", leave=TO_BOB))
    return one("middle", middle.compile(), destinations=("bob",))


def two_levels_up(agent: Agent) -> Any:
    """It leaves two graphs at once, by a Command to the graph with a node of that name."""
    inner = one("leave", agent.node("a", leave=Command(goto="bob", graph="middle"))).compile()
    return one("middle", one("inner", inner).compile(), destinations=("bob",))


def beside_others(agent: Agent) -> Any:
    """Other nodes run beside it without a step. The graph that it leaves saves them."""
    inner = one("leave", agent.node("a", leave=TO_BOB))
    for n in range(4):
        inner.add_node(f"n{n}", lambda state: {"trail": []}).add_edge(START, f"n{n}")
    return one("alice", inner.compile(), destinations=("bob",))


def sent(agent: Agent) -> Any:
    """Several tasks run at once, and each leaves its graph."""
    alice = one("leave", agent.node("a", leave=TO_BOB)).compile()
    outer = StateGraph(State).add_node("alice", alice, destinations=("bob",))
    return outer.add_conditional_edges(START, lambda state: [Send("alice", {"trail": [n]}) for n in "123"])


def called(agent: Agent) -> Any:
    """A node calls the graph, which is not a node itself."""
    inner = one("leave", agent.node("a", leave=TO_BOB)).compile()

    async def acall(state: State) -> Any:
        return await inner.ainvoke(state)

    return one("alice", acall if agent.coroutines else lambda state: inner.invoke(state), destinations=("bob",))


SHAPES = [two_levels, three_levels, two_levels_up, beside_others, sent, called]


def slow_saves(agent: Agent, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let saves come after garbage collection, and after the waiting threads have gone on."""
    put_writes = agent.saver.put_writes
    gc.freeze()  # this makes the collector quick

    def slow(config: Any, writes: Any, task_id: str, task_path: str = "") -> None:
        gc.collect()
        threading.Event().wait(0.02)  # no time is asserted
        put_writes(config, writes, task_id, task_path)

    monkeypatch.setattr(agent.saver, "put_writes", slow)


@pytest.mark.deep_on("sqlite")
def test_task_commits_with_the_task_that_it_hands_over_to(agent: Agent, monkeypatch: pytest.MonkeyPatch) -> None:
    """A task that hands over writes nothing to the state, and is gone before the other task's writes are saved.

    The same kind: hand-off tools, supervisors, swarms, a Command from a ToolNode or from a sent task, from any depth to
    any
    outer graph.

    Also graphs that are nodes, graphs that nodes call, and other tasks beside them that end normally.
    """
    slow_saves(agent, monkeypatch)
    for shape in SHAPES:
        graph = shape(agent).add_node("bob", agent.node("bob")).compile(checkpointer=agent.saver)
        trail = agent.run(graph, shape.__name__)["trail"]
        assert trail[-1].startswith(f"{shape.__name__} bob")
        assert agent.tags() == sorted(agent.written)  # the middle graph's own is in its own state
        assert set(trail) - set("123") <= set(agent.written)
        assert agent.saver._steps._open == {}


def test_a_tool_that_hands_over_keeps_its_facts(agent: Agent, monkeypatch: pytest.MonkeyPatch) -> None:
    """Tools run in their own threads. A ToolNode leaves by the Commands that they return."""
    slow_saves(agent, monkeypatch)

    @tool
    def transfer() -> Any:
        """Hand over."""
        with agent.saver.step() as session:
            session.add(Tag(name="tool"))
        return Command(goto="bob", graph=Command.PARENT, update={"messages": []})

    def call(state: MessagesState) -> Any:
        return {"messages": [AIMessage("", tool_calls=[{"name": "transfer", "args": {}, "id": "1"}])]}

    inner = one("call", call, MessagesState).add_node("tools", ToolNode([transfer])).add_edge("call", "tools")
    outer = one("alice", inner.compile(), MessagesState, destinations=("bob",))
    graph = outer.add_node("bob", lambda state: {"messages": [AIMessage("bob")]}).compile(checkpointer=agent.saver)
    config: Any = {"configurable": {"thread_id": "t"}}
    given: Any = {"messages": []}
    found = asyncio.run(graph.ainvoke(given, config)) if agent.coroutines else graph.invoke(given, config)
    assert [message.content for message in found["messages"]] == ["bob"]
    assert agent.tags() == ["tool"]


def test_a_graph_with_a_channel_that_is_not_saved_keeps_its_facts(
    agent: Agent, monkeypatch: pytest.MonkeyPatch
) -> None:
    """LangGraph saves a copy of the task's writes, and forgets the task before the copy is saved."""
    slow_saves(agent, monkeypatch)
    builder = one("a", agent.node("a"), Scratch).add_node("b", agent.node("b")).add_edge("a", "b")
    trail = agent.run(builder.compile(checkpointer=agent.saver))["trail"]
    assert agent.tags() == sorted(trail) == sorted(agent.written)


@contextmanager
def suppress_error(words: str) -> Iterator[None]:
    try:
        yield
    except MemstateError as error:
        if words not in str(error):
            raise


def test_only_one_of_two_leaving_tasks_counts(agent: Agent) -> None:
    """LangGraph takes one Command. The facts of the other task are dropped with its Command.

    With one writer, the second task is refused at once. LangGraph raises its error, or takes the Command.
    """
    inner = one("x", agent.node("x", leave=TO_BOB)).add_node("y", agent.node("y", leave=TO_BOB)).add_edge(START, "y")
    outer = one("alice", inner.compile(), destinations=("bob",)).add_node("bob", agent.node("bob"))
    graph = outer.compile(checkpointer=agent.saver)
    refusal = "left the graph by a Command" if agent.world.engine.dialect.name == "sqlite" else "nothing"
    trail: list[str] = []
    with suppress_error(refusal):
        trail = agent.run(graph)["trail"]
        assert len(trail) == 2
    assert agent.tags() == sorted(trail)


def fail() -> None:
    raise ValueError("inside")


def test_node_does_not_commit_an_inner_failure_that_it_caught(agent: Agent) -> None:
    """The parent goes on without the inner task's result, so its facts are dropped.

    The same kind: an inner task that is cancelled or timed out, an interrupt before it, a graph that is drained.
    """
    inner = one("a", agent.node("a", then=fail)).compile()

    def function(state: State) -> State:
        with pytest.raises(ValueError, match="inside"):
            inner.invoke(state)
        return {"trail": ["caught"]}

    async def coroutine(state: State) -> State:
        with pytest.raises(ValueError, match="inside"):
            await inner.ainvoke(state)
        return {"trail": ["caught"]}

    builder = one("outer", coroutine if agent.coroutines else function).add_node("bob", agent.node("bob"))
    trail = agent.run(builder.add_edge("outer", "bob").compile(checkpointer=agent.saver))["trail"]
    assert trail[0] == "caught"
    assert agent.tags() == trail[1:] == agent.written[1:]


@pytest.mark.parametrize("beside", [False, True])
async def test_node_does_not_commit_an_inner_timeout_that_it_caught(world: World, beside: bool) -> None:
    """No asyncio task is cancelled, and LangGraph saves nothing of it. Only the end of its graph shows the timeout."""
    agent = Agent(world, coroutines=True)

    async def slow(state: State) -> State:
        await agent.node("slow")(state)
        limit.reschedule(asyncio.get_running_loop().time())
        await asyncio.sleep(60)
        return state

    inner = one("slow", slow)
    if beside:
        inner.add_node("other", lambda state: {"trail": []}).add_edge(START, "other")
    compiled = inner.compile()

    async def outer(state: State) -> State:
        nonlocal limit
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(None) as limit:
                await compiled.ainvoke(state)
        return {"trail": ["went on"]}

    limit: Any = None
    builder = one("outer", outer).add_node("bob", agent.node("bob")).add_edge("outer", "bob")
    config: Any = {"configurable": {"thread_id": "t"}}
    trail = (await builder.compile(checkpointer=agent.saver).ainvoke({"trail": []}, config))["trail"]
    assert trail[0] == "went on"
    assert agent.tags() == trail[1:]


@pytest.mark.parametrize("inside", [False, True])
def test_an_attempt_without_a_step_does_not_commit_an_earlier_one(agent: Agent, inside: bool) -> None:
    """The first attempt's facts are rolled back, although the task succeeds later.

    The same kind: a step of a graph that the first attempt called, and that left to it.
    """
    attempts: list[int] = []
    leaving = one("leave", agent.node("a", leave=TO_BOB)).compile() if inside else None
    write = agent.node("a")

    def fails_first() -> State | None:
        attempts.append(1)
        return {"trail": ["second"]} if len(attempts) > 1 else None

    def function(state: State) -> State:
        if (done := fails_first()) is not None:
            return done
        try:
            write(state) if leaving is None else leaving.invoke(state)
        finally:
            raise ConnectionError

    async def coroutine(state: State) -> State:
        if (done := fails_first()) is not None:
            return done
        try:
            await (write(state) if leaving is None else leaving.ainvoke(state))
        finally:
            raise ConnectionError

    policy = RetryPolicy(initial_interval=0.001, jitter=False, retry_on=ConnectionError)
    node = coroutine if agent.coroutines else function
    builder = one("flaky", node, retry_policy=policy).add_node("bob", agent.node("bob")).add_edge("flaky", "bob")
    trail = agent.run(builder.compile(checkpointer=agent.saver))["trail"]
    assert trail[0] == "second" and len(agent.written) == 2
    assert agent.tags() == trail[1:]


@pytest.mark.parametrize("saver", [None, True])
def test_a_command_to_a_graph_that_saves_nothing_is_refused(agent: Agent, saver: bool | None) -> None:
    """No save takes the facts along: there is no checkpointer, or durability='exit' around the graph."""
    inner = one("leave", agent.node("a", leave=TO_BOB)).compile(checkpointer=agent.saver)
    durability: Any = saver and "async"

    async def coroutine(state: State) -> Any:
        return await inner.ainvoke(state, durability=durability)

    outer = coroutine if agent.coroutines else lambda state: inner.invoke(state, durability=durability)
    builder = one("alice", outer, destinations=("bob",)).add_node("bob", lambda state: {"trail": ["bob"]})
    graph = builder.compile(checkpointer=agent.saver if saver else None)
    with pytest.raises(MemstateError, match="does not save checkpoints" if saver else "has no checkpointer"):
        agent.run(graph, durability=saver and "exit")
    assert agent.tags() == []


# -- many at a time ----------------------------------------------------------------------------------------------------


@pytest.mark.deep_on("sqlite")
@pytest.mark.parametrize("kind", ["functions", "coroutines", "functions in a loop"])
def test_many_runs_with_few_threads_lose_nothing(world: World, kind: str) -> None:
    """They do not deadlock on threads, connections, LangGraph's permits, or SQLite's one writer."""
    engine = create_engine(world.engine.url, pool_size=3, max_overflow=1)
    sqlite.configure(engine)
    agent = Agent(world, coroutines=kind == "coroutines")
    agent.saver = MemStateCheckpointer(engine, memory=world.memory)
    graph = sent(agent).add_node("bob", agent.node("bob")).compile(checkpointer=agent.saver)
    trails: list[str] = []

    def config(number: int) -> Any:
        return {"configurable": {"thread_id": str(number)}, "max_concurrency": 1}

    async def run_all() -> None:
        asyncio.get_running_loop().set_default_executor(ThreadPoolExecutor(2))
        for state in await asyncio.gather(*(graph.ainvoke({"trail": []}, config(n)) for n in range(8))):
            trails.extend(state["trail"])

    if kind == "functions":
        run = lambda n: trails.extend(graph.invoke({"trail": []}, config(n))["trail"])  # noqa: E731
        assert in_threads(8, run) == []
    else:
        asyncio.run(run_all())
    assert agent.tags() == sorted(set(trails) - set("123")) == sorted(agent.written)
    agent.saver.close()
    engine.dispose()


async def test_failed_task_is_rolled_back_before_tasks_that_wait_for_it(world: World) -> None:
    """All save threads may wait for another step, which waits for a thread that saves the error."""
    agent = Agent(world, coroutines=True)
    agent.saver._threads |= {kind: ThreadPoolExecutor(1) for kind in ("save", "settle")}
    inner = one("a", agent.node("a", then=fail)).compile()

    async def outer(state: State) -> State:
        with pytest.raises(ValueError, match="inside"):
            await inner.ainvoke(state)
        return {"trail": []}

    builder = one("outer", outer).add_node("bob", agent.node("bob")).add_edge("outer", "bob")
    graph = builder.compile(checkpointer=agent.saver)
    configs: Any = [{"configurable": {"thread_id": str(n)}, "max_concurrency": 2} for n in range(12)]
    states = await asyncio.gather(*(graph.ainvoke({"trail": []}, config) for config in configs))
    assert agent.tags() == sorted(name for state in states for name in state["trail"])
    agent.saver.close()


@pytest.mark.parametrize("routed", [False, True])
async def test_functions_in_a_loop_do_not_wait_for_its_threads(world: World, routed: bool) -> None:
    """Their steps wait in these threads for a save or a turn. Saves and turns need none of them."""
    agent = Agent(world)
    asyncio.get_running_loop().set_default_executor(ThreadPoolExecutor(2))
    builder = one("a", agent.node("a")).add_node("b", agent.node("b"))
    builder = builder.add_conditional_edges("a", lambda state: "b") if routed else builder.add_edge("a", "b")
    graph = builder.compile(checkpointer=agent.saver)
    configs: Any = [{"configurable": {"thread_id": str(n)}} for n in range(10)]
    states = await asyncio.gather(*(graph.ainvoke({"trail": []}, config) for config in configs))
    assert agent.tags() == sorted(name for state in states for name in state["trail"])


@pytest.mark.parametrize("concurrency", [1, None])
def test_more_functions_than_threads_take_turns(agent: Agent, concurrency: int | None) -> None:
    """SQLite allows one step at a time. The end of a step must not need a thread or a permit that the others hold."""
    sends = lambda state: [Send("w", state)] * 9  # noqa: E731
    builder = StateGraph(State).add_node("w", agent.node("w")).add_conditional_edges(START, sends)
    options = {} if concurrency is None else {"max_concurrency": concurrency}
    trail = agent.run(builder.compile(checkpointer=agent.saver), **options)["trail"]
    assert agent.tags() == sorted(trail) and len(trail) == 9


# -- beginning of a step, and the work that it blocks ------------------------------------------------------------------


@pytest.mark.parametrize("in_a_node", [False, True])
def test_a_step_of_a_called_task_commits_with_its_result(world: World, in_a_node: bool) -> None:
    """The task does not run again when its caller fails and is retried."""
    agent, fails = Agent(world), [True]

    @task
    def remember() -> str:
        agent.node("task")({})
        return "result"

    def call(given: Any) -> Any:
        result = remember().result()
        if fails:
            raise ValueError(fails.pop())
        return {"trail": [result]}

    graph: Any = (
        one("call", call).compile(checkpointer=agent.saver) if in_a_node else entrypoint(checkpointer=agent.saver)(call)
    )
    config: Any = {"configurable": {"thread_id": "t"}}
    with pytest.raises(ValueError, match="True"):
        graph.invoke({"trail": []}, config)
    assert agent.tags() == agent.written == ["t task 1"]
    assert graph.invoke(None, config)["trail"] == ["result"]
    assert agent.tags() == agent.written == ["t task 1"]


@pytest.mark.parametrize("beside", ["a task", "a chain", "another attempt"])
def test_a_step_of_a_called_task_survives_work_that_begins_beside_it(world: World, beside: str) -> None:
    """Functions under @task share the callbacks of the node that calls them, so each sees when another one begins.

    The same kind: a graph or a model that the node calls at the same time, a sibling that is tried again. Only the next
    attempt at the same task rolls its step back.
    """
    agent, stepped, begun = Agent(world), threading.Event(), threading.Event()
    attempts: list[int] = []

    @task
    def remember() -> str:
        agent.node("task")({})
        stepped.set()
        assert begun.wait(60)
        return "result"

    @task(retry_policy=RetryPolicy(initial_interval=0.001, jitter=False, retry_on=ConnectionError))
    def other() -> None:
        attempts.append(1)
        if beside == "another attempt" and len(attempts) == 1:
            raise ConnectionError
        begun.set()

    def call(state: State) -> Any:
        result = remember()
        assert stepped.wait(60)
        if beside == "a chain":
            (RunnableLambda(str) | RunnableLambda(str)).invoke("x")
            begun.set()
        else:
            other().result()
        return {"trail": [result.result()]}

    assert agent.run(one("call", call).compile(checkpointer=agent.saver))["trail"] == ["result"]
    assert agent.tags() == agent.written == ["t task 1"]
    agent.saver.close()


@pytest.mark.parametrize("fails", [False, True])
def test_a_thread_that_comes_to_an_ended_step_leaves_nothing_open(world: World, fails: bool) -> None:
    """It would begin a transaction that never ends, and hold SQLite's writer.

    The same kind: astep() of a coroutine that is cancelled before its thread begins, a tool that outlives its node.
    """
    agent, steps = Agent(world), list[Any]()
    write = agent.node("a")

    def node(state: State) -> State:
        result: State = write(state)
        steps.extend(agent.saver._steps._open.values())
        if fails:
            raise ZeroDivisionError
        return result

    graph = one("node", node).compile(checkpointer=agent.saver)
    with pytest.raises(ZeroDivisionError) if fails else nullcontext():
        agent.run(graph)
    with pytest.raises(MemstateError, match="this task has ended"), steps[0].block() as session:
        session.add(Tag(name="late"))
    assert not steps[0].session.in_transaction()
    assert agent.tags() == ([] if fails else agent.written)
    agent.saver.close()


def test_a_called_task_that_is_tried_again_takes_its_step_back(world: World) -> None:
    agent, attempts = Agent(world), list[int]()

    @task(retry_policy=RetryPolicy(initial_interval=0.001, jitter=False, retry_on=ConnectionError))
    def flaky() -> str:
        attempts.append(1)
        if len(attempts) == 1:
            agent.node("task")({})
            raise ConnectionError
        return "second"

    graph = one("call", lambda state: {"trail": [flaky().result()]}).compile(checkpointer=agent.saver)
    assert agent.run(graph)["trail"] == ["second"]
    assert agent.tags() == []
    agent.saver.close()


@pytest.mark.parametrize("by", ["the same engine", "another engine", "a thread"])
def test_a_write_after_a_step_is_refused_by_one_writer(world: World, by: str) -> None:
    """It would wait for the node's own step, and the node for it. The same kind: a store's put, a relay."""
    agent = Agent(world)
    other = create_engine(world.engine.url)
    sqlite.configure(other)

    def write() -> None:
        with (world.engine if by == "the same engine" else other).begin() as connection:
            connection.execute(insert(Tag), {"name": "after"})

    def after() -> None:
        asyncio.run(asyncio.to_thread(write)) if by == "a thread" else write()

    graph = one("a", agent.node("a", then=after)).compile(checkpointer=agent.saver)
    if world.engine.dialect.name == "sqlite":
        with pytest.raises(MemstateError, match="Write in the same step or before it"):
            agent.run(graph)
        assert agent.tags() == []
    else:
        assert sorted([*agent.run(graph)["trail"], "after"]) == agent.tags() + ["t a 1"] * ("t a 1" not in agent.tags())
    agent.saver.close()
    with other.begin() as connection:  # no guard is active any more
        connection.execute(insert(Tag), {"name": "later"})
    other.dispose()


@pytest.mark.parametrize("what", ["a step", "a save"])
def test_error_names_the_holder_of_the_sqlite_writer(sqlite_world: World, what: str) -> None:
    """The driver's message names no holder."""
    world = sqlite_world
    engine = create_engine(world.engine.url)
    sqlite.configure(engine, busy_timeout_s=0.05)
    agent = Agent(world)
    agent.saver = MemStateCheckpointer(engine, memory=world.memory)
    graph = one("a", agent.node("a", then=lambda: None)).compile(checkpointer=agent.saver)
    other = world.engine.connect()

    def lock() -> None:
        other.execute(insert(Tag), {"name": "other"})

    if what == "a step":
        begin = agent.saver._steps._wait_for_saves
        agent.saver._steps._wait_for_saves = lambda thread_id: (begin(thread_id), lock())[0]  # type: ignore[method-assign]
    else:
        lock()
    with pytest.raises(MemstateError, match="Another connection has it"):
        agent.run(graph)
    other.close()
    assert agent.tags() == []
    agent.saver.close()
    engine.dispose()


def test_a_save_beside_a_step_is_put_off_and_not_lost(agent: Agent) -> None:
    """With one writer, the save waits for the step to end. It happens even if the step fails."""
    saved, fails = threading.Event(), [True]
    put_writes = agent.saver.put_writes

    def put(config: Any, writes: Any, task_id: str, task_path: str = "") -> None:
        put_writes(config, writes, task_id, task_path)
        if ("trail", ["other"]) in writes:
            saved.set()

    agent.saver.put_writes = put  # type: ignore[method-assign]

    def wait() -> None:
        assert agent.coroutines or saved.wait(60)
        if fails:
            raise ValueError(fails.pop())

    builder = one("a", agent.node("a", then=wait)).add_node("other", lambda state: {"trail": ["other"]})
    graph = builder.add_edge(START, "other").compile(checkpointer=agent.saver)
    with pytest.raises(ValueError, match="True"):
        agent.run(graph)
    assert agent.tags() == []
    config: Any = {"configurable": {"thread_id": "t"}}
    found = asyncio.run(graph.ainvoke(None, config)) if agent.coroutines else graph.invoke(None, config)
    assert sorted(found["trail"]) == ["other", *agent.tags()]
