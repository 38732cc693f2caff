"""Steps and sweepers, and another thread between two of the looks or changes that they make."""

from __future__ import annotations

import threading
from collections.abc import Iterable
from typing import Any

import pytest
from sqlalchemy import Engine

pytest.importorskip("langgraph.graph")

from memstate_sa import MemstateError
from memstate_sa.integrations.langgraph import MemStateStore
from memstate_sa.integrations.langgraph.checkpoint_rows import CheckpointKey
from memstate_sa.integrations.langgraph.node_transactions import StepLifetime, Task
from memstate_sa.integrations.langgraph.step_coordinator import StepCoordinator
from tests.support import Tag, World, in_threads

RUN = threading.Event()  # an object
TASK = Task(CheckpointKey("t", "", "1"), "task", RUN, 1)


@pytest.fixture
def steps(world: World) -> StepCoordinator:
    return StepCoordinator(world.session, 20.0)


def begin(steps: StepCoordinator) -> None:
    with steps.step(TASK, lambda _: True, StepLifetime(RUN)) as (session, _):
        session.add(Tag(name="a"))


class Other(threading.Thread):
    """What it does, and whether that was over before the first thread went on."""

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


def test_given_up_as_a_block_ends(world: World, steps: StepCoordinator) -> None:
    """After the block has looked whether it is, and before it lets go of the lock: nobody closed the Session."""
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


def test_a_checkpoint_while_a_task_begins_to_commit(steps: StepCoordinator) -> None:
    """It waits for it, all the time."""
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
def test_a_save_while_a_task_is_given_up(steps: StepCoordinator, saved: str) -> None:
    """What it has written is rolled back, so nothing may be saved that comes after it."""

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


def test_a_sweeper_that_is_started_as_another_ends(engine: Engine) -> None:
    """That was still alive, so there was none a moment later."""
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
