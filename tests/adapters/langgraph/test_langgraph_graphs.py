"""The checkpointer as a user of a graph sees it."""

from __future__ import annotations

import operator
import threading
from collections import deque
from dataclasses import dataclass
from datetime import UTC, date, datetime, timedelta
from decimal import Decimal
from enum import Enum
from pathlib import Path
from typing import Annotated, Any, TypedDict
from uuid import UUID

import pytest
from pydantic import BaseModel
from sqlalchemy import Engine, create_engine, event, func, select

pytest.importorskip("langgraph.graph")

from langchain_core.messages import AIMessage, HumanMessage, ToolMessage
from langgraph.channels.delta import DeltaChannel
from langgraph.graph import END, START, StateGraph
from langgraph.types import Command, RetryPolicy, Send, interrupt

from memstate_sa import MemstateError
from memstate_sa.db.tables import log, outbox
from memstate_sa.integrations.langgraph import checkpoint_rows, tables
from memstate_sa.integrations.langgraph.checkpoint_codec import storable
from memstate_sa.integrations.langgraph.checkpointer import MemStateCheckpointer
from tests.support import World


class State(TypedDict, total=False):
    trail: Annotated[list[str], operator.add]
    value: Any


def config(thread: str = "t", **more: Any) -> Any:
    return {"configurable": {"thread_id": thread, **more}}


def step(name: str) -> Any:
    def node(state: State) -> State:
        return {"trail": [name]}

    return node


@pytest.fixture
def saver(engine: Engine) -> MemStateCheckpointer:
    made = MemStateCheckpointer(engine)
    made.setup()
    return made


def line(saver: MemStateCheckpointer, *names: str, **nodes: Any) -> Any:
    """A graph of nodes one after the other."""
    builder = StateGraph(State)
    for name in names:
        builder.add_node(name, nodes.get(name, step(name)))
    for before, after in zip((START, *names), (*names, END), strict=True):
        builder.add_edge(before, after)
    return builder.compile(checkpointer=saver)


def test_an_interrupt_waits_for_its_answer(saver: MemStateCheckpointer) -> None:
    """A graph of another process sees the question. An answered question is not asked again."""
    asked = []

    def ask(state: State) -> State:
        asked.append("asked")
        return {"trail": [interrupt("first?"), interrupt("second?")]}

    graph = line(saver, "before", "ask", "after", ask=ask)
    assert graph.invoke({"trail": ["in"]}, config())["__interrupt__"][0].value == "first?"
    again = line(MemStateCheckpointer(saver.engine), "before", "ask", "after", ask=ask)
    state = again.get_state(config())
    assert state.next == ("ask",) and state.tasks[0].interrupts[0].value == "first?"
    assert again.invoke(Command(resume="one"), config())["__interrupt__"][0].value == "second?"
    assert again.invoke(Command(resume="two"), config())["trail"] == ["in", "before", "one", "two", "after"]
    assert len(asked) == 3 and again.get_state(config()).next == ()


def test_finished_siblings_do_not_run_again(saver: MemStateCheckpointer) -> None:
    """One of two parallel nodes fails. The next invoke runs only this node."""
    ran: list[str] = []
    broken = [True]
    saved = threading.Event()
    put_writes = saver.put_writes

    def put_and_tell(config: Any, writes: Any, *rest: Any) -> None:
        put_writes(config, writes, *rest)
        if ("trail", ["good"]) in list(writes):
            saved.set()

    saver.put_writes = put_and_tell  # type: ignore[method-assign]

    def good(state: State) -> State:
        ran.append("good")
        return {"trail": ["good"]}

    def bad(state: State) -> State:
        ran.append("bad")
        # Wait, because LangGraph may drop the writes of a sibling that ends while the graph fails.
        assert saved.wait(60)
        if broken:
            raise ValueError("once")
        return {"trail": ["bad"]}

    builder = StateGraph(State).add_node("good", good).add_node("bad", bad)
    for name in ("good", "bad"):
        builder.add_edge(START, name)
    graph = builder.compile(checkpointer=saver)
    with pytest.raises(ValueError, match="once"):
        graph.invoke({"trail": []}, config())
    broken.clear()
    assert sorted(graph.invoke(None, config())["trail"]) == ["bad", "good"]
    assert sorted(ran) == ["bad", "bad", "good"]


def test_history_is_newest_first(saver: MemStateCheckpointer) -> None:
    graph = line(saver, "a", "b")
    graph.invoke({"trail": ["in"]}, config())
    trails = [snapshot.values.get("trail", []) for snapshot in graph.get_state_history(config())]
    assert trails == [["in", "a", "b"], ["in", "a"], ["in"], []]
    steps = [snapshot.metadata["step"] for snapshot in graph.get_state_history(config(), filter={"source": "loop"})]
    assert steps == [2, 1, 0]
    assert [snapshot.metadata["step"] for snapshot in graph.get_state_history(config(), limit=2)] == [2, 1]


def test_a_fork_leaves_its_origin_unchanged(saver: MemStateCheckpointer) -> None:
    """Two branches that write the same channel at the same step both keep their own value."""
    graph = line(saver, "a", "b", "c")
    graph.invoke({"trail": ["in"]}, config())
    at_b = next(snapshot for snapshot in graph.get_state_history(config()) if snapshot.next == ("b",))
    first = graph.get_state(config())
    forked = graph.update_state(at_b.config, {"trail": ["forked"]})
    assert graph.invoke(None, forked)["trail"] == ["in", "a", "forked", "b", "c"]
    assert graph.get_state(first.config).values["trail"] == ["in", "a", "b", "c"]
    assert graph.get_state(config()).values["trail"] == ["in", "a", "forked", "b", "c"]


def test_replay_runs_only_the_later_nodes(saver: MemStateCheckpointer) -> None:
    ran: list[str] = []

    def counted(state: State) -> State:
        ran.append("b")
        return {"trail": ["b"]}

    graph = line(saver, "a", "b", b=counted)
    graph.invoke({"trail": ["in"]}, config())
    at_b = next(snapshot for snapshot in graph.get_state_history(config()) if snapshot.next == ("b",))
    assert graph.invoke(None, at_b.config)["trail"] == ["in", "a", "b"]
    assert ran == ["b", "b"]


def test_update_state_saves_a_checkpoint(saver: MemStateCheckpointer) -> None:
    graph = line(saver, "a")
    graph.invoke({"trail": ["in"]}, config())
    graph.update_state(config(), {"trail": ["by hand"]}, as_node="a")
    state = graph.get_state(config())
    assert state.values["trail"] == ["in", "a", "by hand"] and state.metadata["source"] == "update"


def test_subgraphs_have_states_of_their_own(saver: MemStateCheckpointer) -> None:
    """A waiting subgraph is visible from outside, and resumes at its position."""
    ran: list[str] = []

    def first(state: State) -> State:
        ran.append("first")
        return {"trail": ["first"]}

    def ask(state: State) -> State:
        return {"trail": [interrupt("inside?")]}

    inner = StateGraph(State).add_node("first", first).add_node("ask", ask)
    inner.add_edge(START, "first").add_edge("first", "ask")
    outer = StateGraph(State).add_node("inner", inner.compile()).add_edge(START, "inner")
    graph = outer.compile(checkpointer=saver)
    graph.invoke({"trail": ["in"]}, config())
    task = graph.get_state(config(), subgraphs=True).tasks[0]
    assert task.state.values["trail"] == ["in", "first"] and task.state.next == ("ask",)
    assert graph.invoke(Command(resume="yes"), config())["trail"] == ["in", "in", "first", "yes"]
    assert ran == ["first"]


def test_threads_know_nothing_of_each_other(saver: MemStateCheckpointer) -> None:
    graph = line(saver, "a")
    graph.invoke({"trail": ["one"]}, config("1"))
    graph.invoke({"trail": ["two"]}, config("2"))
    graph.invoke({"trail": ["more"]}, config("1"))
    assert graph.get_state(config("1")).values["trail"] == ["one", "a", "more", "a"]
    saver.delete_thread("1")
    assert graph.get_state(config("1")).values == {} and graph.get_state(config("2")).values["trail"] == ["two", "a"]


def test_sent_tasks_are_kept(saver: MemStateCheckpointer) -> None:
    """Tasks that a node sends, with one argument each, survive a failure."""
    broken = [True]

    def fan_out(state: State) -> list[Send]:
        return [Send("work", {"value": n}) for n in range(3)]

    def work(state: State) -> State:
        if broken and state["value"] == 1:
            raise ValueError("once")
        return {"trail": [f"did {state['value']}"]}

    builder = StateGraph(State).add_node("a", step("a")).add_node("work", work)
    builder.add_edge(START, "a").add_conditional_edges("a", fan_out, ["work"])
    graph = builder.compile(checkpointer=saver)
    with pytest.raises(ValueError, match="once"):
        graph.invoke({"trail": []}, config())
    broken.clear()
    assert graph.invoke(None, config())["trail"] == ["a", "did 0", "did 1", "did 2"]


def test_a_retried_node_counts_once(saver: MemStateCheckpointer) -> None:
    attempts = []

    def flaky(state: State) -> State:
        attempts.append(1)
        if len(attempts) < 3:
            raise ConnectionError
        return {"trail": ["done"]}

    builder = StateGraph(State)
    builder.add_node("flaky", flaky, retry_policy=RetryPolicy(initial_interval=0.001, jitter=False))
    graph = builder.add_edge(START, "flaky").compile(checkpointer=saver)
    assert graph.invoke({"trail": []}, config())["trail"] == ["done"]


@pytest.mark.parametrize("durability", ["sync", "async", "exit"])
async def test_asyncio_and_threads_share_checkpoints(saver: MemStateCheckpointer, durability: Any) -> None:
    """With every durability, a thread continues a run that a coroutine saved."""

    async def slow(state: State) -> State:
        return {"trail": ["slow"]}

    graph = line(saver, "a", "slow", slow=slow)
    await graph.ainvoke({"trail": ["in"]}, config(), durability=durability)
    history = [snapshot.values.get("trail") async for snapshot in graph.aget_state_history(config())]
    assert history[0] == ["in", "a", "slow"]
    assert graph.get_state(config()).values["trail"] == ["in", "a", "slow"]
    await graph.aupdate_state(config(), {"trail": ["x"]}, as_node="slow")
    assert (await graph.aget_state(config())).values["trail"] == ["in", "a", "slow", "x"]


@pytest.mark.parametrize("durability", ["async", "exit"])
def test_a_delta_channel_outlives_pruning(saver: MemStateCheckpointer, durability: Any) -> None:
    """Its state is computed from its writes, and pruning keeps the necessary ones."""

    class Long(TypedDict):
        trail: Annotated[list[str], DeltaChannel(lambda have, new: [*have, *(x for w in new for x in w)])]

    builder = StateGraph(Long).add_node("a", lambda state: {"trail": ["a"]}).add_edge(START, "a")
    graph = builder.compile(checkpointer=saver)
    for n in range(3):
        graph.invoke({"trail": [f"in {n}"]}, config(), durability=durability)
    expected = ["in 0", "a", "in 1", "a", "in 2", "a"]
    assert graph.get_state(config()).values["trail"] == expected
    saver.prune(["t"])
    assert graph.get_state(config()).values["trail"] == expected
    assert graph.invoke({"trail": ["more"]}, config())["trail"] == [*expected, "more", "a"]


def test_pruning_keeps_only_the_rows_that_a_thread_needs(saver: MemStateCheckpointer) -> None:
    """The latest state and its blobs stay. A subgraph's checkpoints go with the checkpoint that called it."""
    inner = StateGraph(State).add_node("x", step("x")).add_edge(START, "x").compile()
    builder = StateGraph(State).add_node("inner", inner).add_node("b", step("b"))
    graph = builder.add_edge(START, "inner").add_edge("inner", "b").compile(checkpointer=saver)
    for n in range(3):
        graph.invoke({"trail": [str(n) * 100]}, config())
    before = graph.get_state(config())
    saver.prune(["t"])
    assert graph.get_state(config()).values == before.values
    with saver.engine.connect() as connection:
        kept = {
            table.name: connection.execute(select(func.count()).select_from(table)).scalar_one()
            for table in checkpoint_rows.TABLES
        }
        channels = connection.scalars(select(tables.checkpoint.c.channels)).all()
    assert kept == {
        "memstate_checkpoint": 1,
        "memstate_checkpoint_blob": sum(channel.count('"0') for channel in channels),
        "memstate_checkpoint_write": 0,
    }
    assert graph.invoke({"trail": ["more"]}, config())["trail"][: len(before.values["trail"])] == before.values["trail"]


def test_copied_thread_shows_one_moment(engine: Engine) -> None:
    """A deletion during the copy does not matter. It waits on SQLite, and does not wait on PostgreSQL."""
    saver, other = MemStateCheckpointer(engine), MemStateCheckpointer(create_engine(engine.url))
    saver.setup()
    graph = line(saver, "a", "b")
    graph.invoke({"trail": ["in"], "value": "v" * 100}, config())
    before = {
        state.config["configurable"]["checkpoint_id"]: state.values for state in graph.get_state_history(config())
    }
    deleted: list[str] = []

    def delete_it(connection: Any, cursor: Any, statement: str, *_: Any) -> None:
        if statement.lstrip().startswith(("INSERT", "WITH")) and engine.dialect.name == "postgresql" and not deleted:
            deleted.append("t")
            other.delete_thread("t")

    event.listen(engine, "after_cursor_execute", delete_it)
    saver.copy_thread("t", "copy")
    copied = graph.get_state_history(config("copy"))
    assert {state.config["configurable"]["checkpoint_id"]: state.values for state in copied} == before
    assert deleted == (["t"] if engine.dialect.name == "postgresql" else [])
    other.engine.dispose()


def test_deleting_a_run_leaves_the_others_whole(saver: MemStateCheckpointer) -> None:
    graph = line(saver, "a", "b")
    for run in ("1", "2"):
        graph.invoke({"trail": ["x" * 100]}, {**config(), "metadata": {"run_id": run}})
    expected = graph.get_state(config()).values
    saver.delete_for_runs(["1"])
    assert graph.get_state(config()).values == expected
    history = list(graph.get_state_history(config()))
    assert {snapshot.metadata["run_id"] for snapshot in history} == {"2"}
    assert history[-1].parent_config is None  # its parent was of the deleted run
    assert all(len(snapshot.values["trail"]) >= 3 for snapshot in history)


# -- values ------------------------------------------------------------------------------------------------------------


class Colour(Enum):
    RED = "red"


@dataclass
class Point:
    x: int
    y: int


class Plan(BaseModel):
    goal: str
    steps: list[str] = []


VALUES = {
    "messages": [HumanMessage("hi", id="1"), AIMessage("yes", id="2"), ToolMessage("42", tool_call_id="3", id="3")],
    "model": Plan(goal="a" * 100, steps=["b"]),
    "dataclass": Point(1, 2),
    "enum": Colour.RED,
    "datetime": datetime(2026, 1, 2, 3, 4, 5, 678, tzinfo=UTC),
    "date": date(2026, 1, 2),
    "timedelta": timedelta(seconds=1.5),
    "uuid": UUID(int=7),
    "decimal": Decimal("1.50"),
    "bytes": b"\x00\xff" * 100,
    "set": {1, 2},
    "deque": deque([1, 2]),
    "path": Path("/a/b"),
    "nested": {"a": [1, {"b": None}], 2: "an int is a key"},
    "text": "with a NUL \x00 and an emoji 🎈" * 10,
    "numbers": [0, -1, 2**62, 1.5, float("inf"), True, None],
    "send": Send("node", {"x": 1}),
}


@pytest.mark.parametrize("kind", VALUES)
def test_values_come_back_as_they_were(engine: Engine, kind: str) -> None:
    """Both in the state and as a pending write. Classes of the application are allowed here."""
    saver = MemStateCheckpointer(engine, allow=[Plan, Point, Colour])
    saver.setup()

    def stop(state: State) -> State:
        return {"trail": [interrupt(VALUES[kind])]}

    graph = line(saver, "set", "stop", set=lambda state: {"value": VALUES[kind]}, stop=stop)
    graph.invoke({"trail": []}, config())
    again = line(MemStateCheckpointer(engine, allow=[Plan, Point, Colour]), "set", "stop", stop=stop)
    state = again.get_state(config())
    for found in (state.values["value"], state.tasks[0].interrupts[0].value):
        assert found == VALUES[kind] and type(found) is type(VALUES[kind])


def test_class_that_is_not_allowed_is_not_built(engine: Engine) -> None:
    """Anyone who can write to the database must not choose the classes that are imported and called."""
    saver = MemStateCheckpointer(engine)
    saver.setup()
    graph = line(saver, "set", set=lambda state: {"value": Point(1, 2)})
    graph.invoke({"trail": []}, config())
    with pytest.raises(MemstateError, match=r"allow=\[Point\]"):
        graph.get_state(config())
    with pytest.raises(MemstateError, match="serializable"):
        saver.put_writes(config(checkpoint_ns="", checkpoint_id="1"), [("a", lambda: None)], "task")


def test_none_and_empty_values_are_saved(saver: MemStateCheckpointer) -> None:
    """None and empty bytes, as a task's only write."""
    for n, value in enumerate((None, b"", "", [])):
        conf = config(checkpoint_ns="", checkpoint_id=f"{n}")
        checkpoint: Any = {
            "v": 4,
            "id": f"{n}",
            "ts": "",
            "channel_values": {},
            "channel_versions": {},
            "versions_seen": {},
        }
        saver.put(config(checkpoint_ns=""), checkpoint, {}, {})
        saver.put_writes(conf, [("value", value)], "task")
        found = saver.get_tuple(conf)
        assert found is not None and found.pending_writes == [("task", "value", value)]


def test_a_value_that_is_changed_in_place_leaves_the_others(saver: MemStateCheckpointer) -> None:
    """The channel does not notice the change, so the saved value stays as it was, like with LangGraph's own savers."""

    def change(state: State) -> State:
        state["value"].append("x")
        return {"trail": ["a"]}

    graph = line(saver, "a", "b", a=change)
    assert graph.invoke({"trail": [], "value": []}, config(), durability="sync")["value"] == ["x"]
    assert graph.get_state(config()).values == {"trail": ["a", "b"], "value": []}
    assert graph.invoke({"trail": ["again"]}, config(), durability="sync")["trail"] == ["a", "b", "again", "a", "b"]


@pytest.mark.parametrize("bad", [float("nan"), float("-inf"), "\ud800x"])
def test_metadata_that_is_no_json_is_kept_as_far_as_possible(saver: MemStateCheckpointer, bad: Any) -> None:
    """Metadata belongs to the application, and must not fail a run."""
    line(saver, "a").invoke({"trail": []}, {**config(), "metadata": {"score": bad, "label": "x"}})
    found = list(saver.list(None, filter={"label": "x"}))
    expected = "?x" if isinstance(bad, str) else None
    assert len(found) == 3 and [each.metadata["score"] for each in found] == [expected] * 3  # type: ignore[typeddict-item]
    assert storable({"a\udfff": [(bad,), 1.5, "\U0001f9e0"]}) == {"a?": [[expected], 1.5, "\U0001f9e0"]}


def test_forked_versions_do_not_collide(saver: MemStateCheckpointer) -> None:
    """Two successors of one version differ. Both are later than it, also with versions of LangGraph's own savers."""
    for current in (None, saver.get_next_version(None, None), f"{41:032}.{0.5:016}", "00000009.ffffffffffff"):
        a, b = (saver.get_next_version(current, None) for _ in range(2))
        assert a != b and (current is None or (a > current and b > current))


def test_filters_bind_their_values(saver: MemStateCheckpointer) -> None:
    """Names and values may be of any kind, including some that are neither SQL nor a path."""
    odd = {"a.b": 1, "it's": "o'clock", '"$': True, "none": None, "list": [1, {"a": 2}], "float": 1.5, "%s": "?"}
    graph = line(saver, "a")
    graph.invoke({"trail": ["in"]}, config())
    tuple_ = saver.get_tuple(config())
    assert tuple_ is not None
    conf = {**tuple_.config, "configurable": {**tuple_.config["configurable"]}}
    saver.put(conf, {**tuple_.checkpoint, "id": "ffff"}, {**tuple_.metadata, **odd}, {})
    for name, value in odd.items():
        found = [t.checkpoint["id"] for t in saver.list(config(), filter={name: value})]
        assert found[0] == "ffff" and (value is None or len(found) == 1)
        assert list(saver.list(config(), filter={name: "something else"})) == []
    assert [t.checkpoint["id"] for t in saver.list(None, filter=odd)] == ["ffff"]
    assert list(saver.list(config("other"), filter=odd)) == []


def test_nul_in_metadata_is_left_out(saver: MemStateCheckpointer) -> None:
    """PostgreSQL's JSON holds no NUL, and LangGraph removes it only from the outermost strings."""
    graph = line(saver, "a")
    graph.invoke({"trail": ["in"]}, {**config(), "metadata": {"user": "a\x00b"}})
    found = saver.get_tuple(config())
    assert found is not None and found.metadata["user"] == "ab"
    saver.put(found.config, {**found.checkpoint, "id": "ffff"}, {"writes_of": {"a\x00": ["b\x00"]}}, {})
    again = saver.get_tuple(config())
    assert again is not None and again.metadata["writes_of"] == {"a": ["b"]}


# -- beside the facts --------------------------------------------------------------------------------------------------


def test_checkpoints_are_no_facts(world: World) -> None:
    """A conversation leaves no entry in the log, nothing to deliver, and no step for rollback."""
    saver = MemStateCheckpointer(world.engine, memory=world.memory)
    saver.setup()
    line(saver, "a", "b").invoke({"trail": ["in"]}, config())
    with world.session() as session:
        for table in (log, outbox):
            assert session.execute(select(func.count()).select_from(table)).scalar_one() == 0
        assert world.memory.rollback(session) == []


def test_checkpointer_refuses_impossible_arguments(engine: Engine) -> None:
    with pytest.raises(MemstateError, match="Use a file"):
        MemStateCheckpointer("sqlite://")
    with pytest.raises(MemstateError, match="not a database URL"):
        MemStateCheckpointer("nonsense")
    with pytest.raises(MemstateError, match="knows no facts"):
        MemStateCheckpointer(engine).delete_thread("t", facts=True)


async def test_checkpointer_takes_an_async_engine(engine: Engine) -> None:
    """The saver uses the engine's URL for a sync engine, because it works in threads."""
    from sqlalchemy.ext.asyncio import create_async_engine

    driver = "sqlite+aiosqlite" if engine.dialect.name == "sqlite" else "postgresql+psycopg"
    made = create_async_engine(engine.url.set(drivername=driver))
    with MemStateCheckpointer(made) as saver:
        await saver.asetup()
        assert (await line(saver, "a").ainvoke({"trail": ["in"]}, config()))["trail"] == ["in", "a"]
    await made.dispose()
    with pytest.raises(MemstateError, match="pass a MemoryStore"):
        MemStateCheckpointer(42)  # type: ignore


def test_checkpointer_takes_a_url(tmp_path: Any) -> None:
    with MemStateCheckpointer(f"sqlite:///{tmp_path / 'graph.db'}") as saver:
        saver.setup()
        saver.setup()
        assert line(saver, "a").invoke({"trail": ["in"]}, config())["trail"] == ["in", "a"]
    plain = create_engine(f"sqlite:///{tmp_path / 'graph.db'}")  # an engine without sqlite.configure()
    assert line(MemStateCheckpointer(plain), "a").invoke({"trail": ["x"]}, config())["trail"] == ["in", "a", "x", "a"]
    plain.dispose()
