"""Steps and sweepers, and another thread that acts between two of their looks or changes."""

from __future__ import annotations

import operator
import threading
from collections import defaultdict
from collections.abc import Iterable
from typing import Annotated, Any, TypedDict

import pytest
from sqlalchemy import Engine, event, select, text

pytest.importorskip("langgraph.graph")

from langgraph.graph import START, StateGraph
from langgraph.pregel._runner import FuturesDict
from langgraph.store.base import PutOp
from langgraph.types import Command

from memstate_sa import MemstateError
from memstate_sa.integrations.langgraph import MemStateCheckpointer, MemStateStore
from memstate_sa.integrations.langgraph.checkpoint_rows import CheckpointKey
from memstate_sa.integrations.langgraph.item_rows import item_id
from memstate_sa.integrations.langgraph.node_transactions import StepLifetime, Task
from memstate_sa.integrations.langgraph.step_coordinator import StepCoordinator
from tests.support import Tag, World, in_threads
from tests.support.shelf import NOTES, Shelf

RUN = threading.Event()  # an object
TASK = Task(CheckpointKey("t", "", "1"), "task", RUN, 1)


@pytest.fixture
def steps(world: World) -> StepCoordinator:
    return StepCoordinator(world.session, 20.0)


def begin(steps: StepCoordinator) -> None:
    with steps.step(TASK, lambda _: True, StepLifetime(RUN)) as (session, _):
        session.add(Tag(name="a"))


class Other(threading.Thread):
    """A thread that works between two steps of the first thread, and records whether it finished there."""

    def __init__(self, work: Any) -> None:
        super().__init__()
        self.work, self.was_over, self.errors = work, False, list[BaseException]()

    def run(self) -> None:
        try:
            self.work()
        except MemstateError as error:
            self.errors.append(error)

    def come_in(self) -> None:
        self.start()
        self.join(0.3)
        self.was_over = not self.is_alive()


def test_step_given_up_as_its_block_ends_is_closed(world: World, steps: StepCoordinator) -> None:
    """The step is given up after the block's last check, before it releases the lock. The Session used to stay open."""
    step = steps.begin(TASK, lambda _: True, StepLifetime(RUN))
    lock, given_up = step.lock, list[int]()

    class Lock:
        acquire, release = lock.acquire, lock.release

        def __enter__(self) -> Any:
            return lock.__enter__()

        def __exit__(self, *_: object) -> None:
            if not given_up:
                given_up.append(1)
                assert in_threads(1, lambda _: steps.give_up(TASK)) == []
            lock.release()

    step.lock = Lock()  # type: ignore[assignment]
    with step.block() as session:
        session.add(Tag(name="a"))
    assert given_up and not step.session.in_transaction()
    assert step.semaphore.request().done()
    with world.session() as session:
        session.add(Tag(name="a"))
        session.commit()
    world.assert_in_step()


def test_checkpoint_waits_for_a_task_that_begins_to_commit(steps: StepCoordinator) -> None:
    """It waits all the time."""
    begin(steps)
    saving = Other(lambda: steps.wait_for_tasks("t", "", "1", RUN))

    class Committing(list[Any]):
        def __iadd__(self, others: Iterable[Any]) -> Any:  # type: ignore[misc]
            saving.come_in()
            return super().__iadd__(others)

    steps._committing = Committing()
    with steps.settle(TASK.checkpoint, "task", RUN, commits=True):
        assert not saving.was_over
        assert saving.is_alive()
    saving.join(30)
    assert saving.errors == []


@pytest.mark.parametrize("saved", ["checkpoint", "writes"])
def test_save_fails_while_its_task_is_given_up(steps: StepCoordinator, saved: str) -> None:
    """The task's facts are rolled back, so no later save may succeed."""

    def save() -> None:
        if saved == "checkpoint":
            steps.wait_for_tasks("t", "", "1", RUN)
        else:
            with steps.settle(TASK.checkpoint, "task", RUN, commits=True):
                pass

    begin(steps)
    saving, failed = Other(save), steps.save_failed

    def save_first(*given: Any) -> None:
        saving.come_in()
        failed(*given)

    steps.save_failed = save_first  # type: ignore[method-assign]
    steps.give_up(TASK)
    saving.join(30)
    assert ["cancelled" in str(error) for error in saving.errors] == [True]


def test_sweeper_starts_while_another_ends(engine: Engine) -> None:
    """The old sweeper was still alive, so no new one started, and a moment later there was none."""
    world = World(engine)
    store = MemStateStore(engine, memory=world.memory, ttl={"default_ttl": 1})
    store.setup()
    sweeps, busy, go_on = list[int](), threading.Event(), threading.Event()

    def sweep() -> int:
        sweeps.append(1)
        busy.set()
        assert go_on.wait(30)
        return 0

    store.sweep_ttl = sweep  # type: ignore[method-assign]
    first = store.start_ttl_sweeper(sweep_interval_minutes=0.0001)
    assert busy.wait(30)
    assert first.cancel()
    second = store.start_ttl_sweeper(sweep_interval_minutes=0.0001)
    go_on.set()
    count = len(sweeps)
    for _ in range(3000):
        if len(sweeps) > count + 1:
            break
        threading.Event().wait(0.01)
    assert len(sweeps) > count + 1
    assert store.stop_ttl_sweeper(timeout=30)
    assert second.result(timeout=30) is None


class State(TypedDict):
    trail: Annotated[list[str], operator.add]


def test_steps_that_begin_before_langgraph_stores_their_futures(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    """LangGraph starts a thread first, and then stores its future. A step may begin before that.

    Both nodes leave by a Command, and one Command counts. With one writer, the second step is refused at once.
    """
    saver = MemStateCheckpointer(world.engine, memory=world.memory)
    saver.setup()
    has_begun: dict[str, threading.Event] = defaultdict(threading.Event)
    set_item, begin_step = FuturesDict.__setitem__, saver._steps.begin

    def begin(task: Task, *given: Any) -> Any:
        step = begin_step(task, *given)
        has_begun[task.id].set()
        return step

    def store_late(self: Any, future: Any, task: Any) -> None:
        if task is not None:
            assert has_begun[task.id].wait(30)
        set_item(self, future, task)

    monkeypatch.setattr(saver._steps, "begin", begin)
    monkeypatch.setattr(FuturesDict, "__setitem__", store_late)

    def write(name: str, result: Any) -> Any:
        def node(state: State) -> Any:
            with saver.step() as session:
                session.add(Tag(name=name))
            return result

        return node

    inner = StateGraph(State)
    for name in ("x", "y"):
        leave = Command(goto="bob", graph=Command.PARENT, update={"trail": [name]})
        inner.add_node(name, write(name, leave)).add_edge(START, name)
    outer = StateGraph(State).add_node("alice", inner.compile(), destinations=("bob",)).add_edge(START, "alice")
    graph = outer.add_node("bob", write("bob", {"trail": ["bob"]})).compile(checkpointer=saver)
    trail: list[str] = []
    refusal = "left the graph by a Command" if world.engine.dialect.name == "sqlite" else "nothing"
    try:
        trail = graph.invoke({"trail": []}, {"configurable": {"thread_id": "t"}})["trail"]
    except MemstateError as error:
        if refusal not in str(error):
            raise
    with world.session() as session:
        assert sorted(session.scalars(select(Tag.name))) == sorted(trail)
    assert len(has_begun) >= 2
    saver.close()


_WAITING = text(
    "SELECT EXISTS (SELECT 1 FROM pg_stat_activity WHERE datname = current_database() "
    "AND cardinality(pg_blocking_pids(pid)) > 0)"
)


def test_two_batches_that_add_and_change_items_do_not_deadlock(engine: Engine) -> None:
    """The first batch finds neither item, and adds both. A third writer adds one, and the second batch changes it.

    The second batch also adds the other item. It must do that before its change, or the two would deadlock.
    """
    if engine.dialect.name == "sqlite":
        pytest.skip("SQLite has one writer")
    shelf = Shelf(engine)
    before, after = sorted(["a", "b"], key=lambda key: item_id(NOTES, key))
    has_read, has_written = threading.Event(), threading.Event()
    writes: dict[str, list[str]] = defaultdict(list)

    def wait_until_one_waits() -> None:
        with engine.connect() as connection:
            for _ in range(3000):
                if connection.scalar(_WAITING):
                    return
                threading.Event().wait(0.01)
        raise AssertionError("no transaction waits for this one")

    @event.listens_for(engine, "before_cursor_execute")
    def pause(_: Any, __: Any, statement: str, *___: Any) -> None:
        if not statement.startswith(("INSERT INTO memstate_item ", "UPDATE memstate_item ")):
            return
        thread = threading.current_thread().name
        writes[thread].append(statement.split(maxsplit=1)[0])
        if thread == "first" and len(writes[thread]) == 1:
            has_read.set()
            assert has_written.wait(30)
        if thread == "second" and len(writes[thread]) == 2:
            has_written.set()
            wait_until_one_waits()

    errors: list[BaseException] = []

    def put_both(by: str) -> None:
        try:
            shelf.store.batch([PutOp(NOTES, key, {"by": by}) for key in (before, after)])
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=put_both, args=(name,), name=name) for name in ("first", "second")]
    threads[0].start()
    assert has_read.wait(30)
    shelf.store.put(NOTES, after, {"by": "third"})
    threads[1].start()
    for thread in threads:
        thread.join(60)
    event.remove(engine, "before_cursor_execute", pause)
    assert errors == []
    assert sorted(writes["second"]) == ["INSERT", "UPDATE"]
    assert shelf.values() == {"a": {"by": "first"}, "b": {"by": "first"}}
    shelf.assert_in_step()
    shelf.memory.close()
