"""A thread has one run at a time if runs ask for a lease. An overtaken run gets an error, and writes nothing."""

from __future__ import annotations

import operator
import time
from datetime import timedelta
from typing import Annotated, Any, TypedDict

import pytest
from sqlalchemy import Engine, create_engine, event, select, update

pytest.importorskip("langgraph.graph")

from langgraph.graph import START, StateGraph
from langgraph.types import Command

from memstate_sa.db.tables import utcnow
from memstate_sa.integrations.langgraph import MemStateCheckpointer, thread_leases
from memstate_sa.integrations.langgraph.tables import lease
from memstate_sa.integrations.langgraph.thread_leases import StaleRun
from tests.support import Tag, World


class State(TypedDict, total=False):
    trail: Annotated[list[str], operator.add]


CONFIG: Any = {"configurable": {"thread_id": "t"}}


def another(engine: Engine) -> MemStateCheckpointer:
    """A checkpointer as in another process: it shares only the database."""
    made = MemStateCheckpointer(engine)
    made.setup()
    return made


def graph(saver: MemStateCheckpointer, **nodes: Any) -> Any:
    builder = StateGraph(State)
    before = START
    for name, node in nodes.items():
        builder.add_node(name, node)
        builder.add_edge(before, name)
        before = name
    return builder.compile(checkpointer=saver)


def say(name: str, then: Any = None) -> Any:
    def node(state: State) -> State:
        if then is not None:
            then()
        return {"trail": [name]}

    return node


def wait_for_a_checkpoint(saver: MemStateCheckpointer) -> None:
    """Wait, because checkpoints are saved in the background."""
    deadline = time.monotonic() + 60
    while saver.get_tuple(CONFIG) is None:
        assert time.monotonic() < deadline
        time.sleep(0.005)


def test_the_second_run_is_refused(engine: Engine) -> None:
    """It is refused while the first run has the thread. Other threads are free."""
    a, b = another(engine), another(engine)
    with a.run(CONFIG) as config:
        graph(a, one=say("one")).invoke({"trail": []}, config)
        with pytest.raises(StaleRun, match="another run has it"), b.run(CONFIG):
            pytest.fail("two runs have the thread")
        with b.run({"configurable": {"thread_id": "another"}}) as other:
            graph(b, one=say("one")).invoke({"trail": []}, other)
    with b.run(CONFIG) as config:
        assert graph(b, one=say("one")).invoke({"trail": []}, config)["trail"] == ["one", "one"]
    with engine.connect() as connection:
        assert connection.execute(select(lease)).all() == []


@pytest.mark.parametrize("durability", ["sync", "async"])
def test_overtaken_run_writes_nothing(engine: Engine, durability: Any) -> None:
    """A process stops inside a node. Another process takes the thread and finishes it. The first one resumes with an
    error.
    """
    late, new = another(engine), another(engine)
    taken: list[Any] = []

    def take_over() -> None:
        wait_for_a_checkpoint(new)
        with new.run(CONFIG, take_over=True) as config:
            taken.append(graph(new, one=say("one"), two=say("new")).invoke(None, config))

    with pytest.raises(StaleRun, match="taken over thread"), late.run(CONFIG) as config:
        graph(late, one=say("one"), two=say("late", take_over)).invoke({"trail": []}, config, durability=durability)
    assert taken[0]["trail"] == ["one", "new"]
    found = [t.checkpoint["channel_values"].get("trail") for t in new.list(CONFIG)]
    assert found[0] == ["one", "new"] and not any("late" in (trail or ()) for trail in found)
    assert all(value != ["late"] for t in new.list(CONFIG) for _, _, value in t.pending_writes or ())


def test_overtaken_run_commits_no_facts(world: World) -> None:
    """The fence is checked in the step's transaction."""
    late = MemStateCheckpointer(world.engine, memory=world.memory)
    new = MemStateCheckpointer(world.engine, memory=world.memory)
    late.setup()

    def write() -> None:
        wait_for_a_checkpoint(new)
        with new.run(CONFIG, take_over=True) as config:
            graph(new, one=say("new")).invoke(None, config)
        with late.step() as session:
            session.add(Tag(name="late"))

    with pytest.raises(StaleRun), late.run(CONFIG) as config:
        graph(late, one=say("late", write)).invoke({"trail": []}, config)
    with world.session() as session:
        assert session.scalars(select(Tag.name)).all() == []


def test_a_lease_ends_by_itself(engine: Engine) -> None:
    """Each save extends it."""
    a, b = another(engine), another(engine)
    with a.run(CONFIG, lease_s=60) as config:
        expire(engine)
        graph(a, one=say("one")).invoke({"trail": []}, config)  # no other run wanted it: renewed
        with pytest.raises(StaleRun), b.run(CONFIG):
            pass
        expire(engine)
        with b.run(CONFIG) as other:
            graph(b, one=say("two")).invoke({"trail": []}, other)
            with pytest.raises(StaleRun, match="wrote nothing"):
                graph(a, one=say("one")).invoke({"trail": []}, config)
        with pytest.raises(StaleRun, match="wrote nothing"):  # it stays refused after the other run has ended
            graph(a, one=say("one")).invoke({"trail": []}, config)


def expire(engine: Engine) -> None:
    with engine.begin() as connection:
        connection.execute(update(lease).values(lease_until=utcnow() - timedelta(seconds=1)))


def test_a_process_that_has_ended_is_not_waited_for(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    a, b = another(engine), another(engine)
    with a.run(CONFIG):
        monkeypatch.setattr(thread_leases, "is_gone", lambda owner: True)
        with b.run(CONFIG):
            pass


def test_run_without_the_lease_does_not_get_the_thread(postgres_engine: Engine) -> None:
    """The lease was released, and another run took it between two statements of this run."""
    another(postgres_engine)
    others = create_engine(postgres_engine.url)
    with others.begin() as connection:
        thread_leases.acquire(connection, "t", "a", 300, take_over=False)
    left: list[Any] = [
        ("INSERT", lambda connection: thread_leases.release(connection, "t", "a")),
        ("SELECT", lambda connection: thread_leases.acquire(connection, "t", "b", 300, take_over=False)),
    ]

    def meanwhile(connection: Any, cursor: Any, statement: str, *_: Any) -> None:
        if left and statement.lstrip().startswith(left[0][0]) and lease.name in statement:
            _, do = left.pop(0)
            with others.begin() as other:
                do(other)

    event.listen(postgres_engine, "after_cursor_execute", meanwhile)
    with pytest.raises(StaleRun), postgres_engine.begin() as connection:
        thread_leases.acquire(connection, "t", "c", 300, take_over=False)
    with postgres_engine.connect() as connection:
        assert (left, connection.scalars(select(lease.c.owner)).all()) == ([], ["b"])
    others.dispose()


@pytest.mark.parametrize("level", ["REPEATABLE READ", "SERIALIZABLE"])
def test_overtaken_run_is_stale_on_every_isolation_level(postgres_engine: Engine, level: Any) -> None:
    """The error is StaleRun, not a serialization failure."""
    strict = create_engine(postgres_engine.url, isolation_level=level)
    late, new = another(strict), another(postgres_engine)
    left = ["take over"]

    def meanwhile(connection: Any, cursor: Any, statement: str, *_: Any) -> None:
        """The first statement of a save has begun its transaction."""
        if left and "clock_timestamp" in statement:
            left.clear()
            with new.run(CONFIG, take_over=True):
                pass

    with pytest.raises(StaleRun, match="taken over thread"), late.run(CONFIG) as config:
        event.listen(strict, "after_cursor_execute", meanwhile)
        graph(late, one=say("one")).invoke({"trail": []}, config)
    assert left == []
    strict.dispose()


def test_late_writer_without_a_lease_makes_a_fork(engine: Engine) -> None:
    """Without a lease no run is refused, and branches of a thread may be written side by side."""
    a, b = another(engine), another(engine)
    graph(a, one=say("a")).invoke({"trail": []}, CONFIG)
    start = list(a.list(CONFIG))[1].config
    graph(b, one=say("b")).invoke(None, start)
    trails = [t.checkpoint["channel_values"].get("trail") for t in a.list(CONFIG)]
    assert ["a"] in trails and ["b"] in trails


async def test_updates_and_coroutines_are_fenced_too(engine: Engine) -> None:
    late, new = another(engine), another(engine)
    with late.run(CONFIG) as config:
        made = graph(late, one=say("one"))
        await made.ainvoke({"trail": []}, config)
        made.update_state(config, {"trail": ["by hand"]})
        with new.run(CONFIG, take_over=True):
            with pytest.raises(StaleRun):
                made.update_state(config, {"trail": ["too late"]})
            with pytest.raises(StaleRun):
                await made.ainvoke(Command(update={"trail": ["too late"]}), config)
    assert graph(new, one=say("one")).get_state(CONFIG).values["trail"] == ["one", "by hand"]
