"""What tasks of a graph write to the application's tables, kept open until what they write to its state is saved.

Committed together, neither a crash nor a failed save leaves one without the other. Four rules make the order one that
a crash cannot turn into a lost or a doubled effect:

- a task's Session begins when the checkpoint that it runs at is saved (else a crash would have it run again, as
  another task, at another checkpoint);
- it commits in the transaction of the task's writes, or rolls back when the task will run again;
- where the task leaves its graph by a Command to a parent, the writes are those of the parent's task;
- the next checkpoint is saved when all of them have (else it would say of a task that it is done).
"""

from __future__ import annotations

import _thread
import asyncio
import threading
import time
import weakref
from collections import Counter, OrderedDict
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, NamedTuple

from sqlalchemy import event
from sqlalchemy.engine import Connection
from sqlalchemy.exc import DBAPIError
from sqlalchemy.orm import Session, SessionTransaction

from memstate_sa.db import sqlite
from memstate_sa.errors import MemstateError
from memstate_sa.integrations.langgraph.checkpoint_rows import Place
from memstate_sa.integrations.langgraph.fair_semaphore import FairSemaphore
from memstate_sa.runtime import forks

_REMEMBERED = 4096
"""How many saved checkpoints are known without asking the database."""
_ANY_RUN = object()


class Task(NamedTuple):
    """A task, the checkpoint that it runs at, and which attempt at it this is: the *number*th of a *run*, an object.

    *path* names the task and all tasks around it, as LangGraph's ``checkpoint_ns`` does.
    """

    at: Place
    id: str
    run: object
    number: int
    path: str = ""

    @property
    def key(self) -> tuple[str, str]:
        return self.at.thread_id, self.id

    def is_attempt(self, other: Task) -> bool:
        """Whether the two are of the same attempt."""
        return self.run is other.run and self.number == other.number

    def is_around(self, thread_id: str, path: str) -> bool:
        """Whether *path* is this task's, or one inside of it."""
        return self.at.thread_id == thread_id and f":{self.id}" in path

    @property
    def depth(self) -> int:
        """How many tasks are around it."""
        return self.path.count("|")


class Life:
    """What ends a step that nobody settles: the end of an object. `Execution` knows more of its task."""

    def __init__(self, of: Any) -> None:
        self.of = of

    def waiting(self) -> AbstractContextManager[None]:
        """What to enter while a thread of the graph waits."""
        return nullcontext()

    def watch(self, steps: Steps, task: Task) -> None:
        """Tell *steps* how the task ends, where LangGraph does not."""


class _Step:
    def __init__(self, task: Task, session: Session, turns: FairSemaphore, changed: threading.Condition) -> None:
        self.task, self.session = task, session
        self.holder = task  # whose writes it commits with
        self.turns, self.turn = turns, turns.ask()
        self.lock = threading.RLock()  # tools of one node run in threads: one at a time has the Session
        self.blocks = 0
        self.abandoned = False
        self.leaves: str | None = None  # the graph that it leaves, and that has to end before it is settled
        self.finalizer: Any = None
        self._changed = changed
        self._riders: list[Callable[[], None]] | None = []
        self._driver: Any = None  # SQLite's connection, whose state may be read in any thread

        @event.listens_for(session, "after_begin")
        def _begun(_: Session, __: SessionTransaction, connection: Connection) -> None:
            if connection.dialect.name == "sqlite":
                self._driver = connection.connection.driver_connection

        @event.listens_for(session, "after_transaction_end")
        def _ended(_: Session, transaction: SessionTransaction) -> None:
            if transaction.parent is None:  # by hand, too: the connection may be another's now
                self._driver = None

    @property
    def has_the_only_writer(self) -> bool:
        return bool(getattr(self._driver, "in_transaction", False))

    def holds_up(self, thread_id: str, ns: str) -> bool:
        """Whether a save of the graph *ns* might have to wait for this step, and the step for it."""
        holder = self.holder
        if holder.at.thread_id != thread_id or holder.is_around(thread_id, ns) or self._riders is None:
            return False
        # Elsewhere in the run, a save takes a thread that the step may need to end. In its graph, the graph cannot end.
        writes = self.blocks > 0 or self.has_the_only_writer
        return self.turn.done() and (writes or _is_inside(ns, holder.at.ns))

    def take_along(self, job: Callable[[], None]) -> None:
        """Do *job* when this has ended."""
        assert self._riders is not None
        self._riders.append(job)

    @contextmanager
    def block(self) -> Iterator[Session]:
        try:
            with self._locked_block() as session:
                yield session
        finally:
            if self.abandoned:  # perhaps after the block has looked, and before it let go of the lock
                self.abandon()

    @contextmanager
    def _locked_block(self) -> Iterator[Session]:
        with self.lock:
            self.blocks += 1
            try:
                if self.blocks == 1:
                    yield self.session
                else:  # what came before stays when this fails
                    with self.session.begin_nested():
                        yield self.session
                self.session.flush()  # what is wrong with it is the task's own error
            except BaseException:
                if self.abandoned:
                    self.close()
                elif self.blocks == 1:
                    self.session.rollback()
                self.blocks -= 1
                raise
            if self.abandoned:
                self.close()
                raise MemstateError(
                    "this task has ended, or was given up and runs again: what it wrote here is rolled back"
                )

    def abandon(self) -> None:
        """Roll back now, or when the thread that is in it leaves."""
        self.abandoned = True
        if self.lock.acquire(blocking=False):
            try:
                self.close()
            finally:
                self.lock.release()

    def close(self) -> None:
        """Give its connection back, and its turn to the next one; then do what was put off."""
        if self.finalizer is not None:
            self.finalizer.detach()
        self.abandoned = True  # a thread that comes to it later would begin another transaction, which nobody ends
        try:
            self.session.close()
        finally:
            self.turns.end(self.turn)
            while (job := self._next_rider()) is not None:
                job()

    def _next_rider(self) -> Callable[[], None] | None:
        with self._changed:
            if self._riders:
                return self._riders.pop(0)
            self._riders = None  # what comes now has not to wait any longer
            return None


def _abandon(step: _Step) -> None:
    try:
        asyncio.get_running_loop()
    except RuntimeError:
        step.abandon()
    else:  # which must not wait for the database
        _thread.start_new_thread(step.abandon, ())


def _is_inside(ns: str, graph: str) -> bool:
    return not graph or ns == graph or ns.startswith(f"{graph}|")


def _only(steps: Sequence[_Step]) -> _Step:
    if len(steps) > 1:
        raise MemstateError(
            f"{len(steps)} steps would have to commit together: those of a node, and of graphs that ended in it by a "
            "Command to the parent"
        )
    return steps[0]


class Steps:
    """The open steps of one checkpointer. Thread-safe.

    *room* is how many connections there are. A step has one until its node returns, so some are left for what nodes do
    meanwhile: half of them may be had by the steps of a graph, half of the rest by those of its subgraphs, and so on.
    As steps wait for those of a graph further in alone, they never wait in a circle.

    Where there is one connection that writes, a save of a graph that a step is open in would wait for the step, and
    the step, if it leaves the graph by a Command, for the save. So it is put off until the step has ended.
    """

    def __init__(self, sessions: Callable[[], Session], timeout_s: float, room: int = 1) -> None:
        self._sessions, self._timeout_s, self._room = sessions, timeout_s, room
        self._begin()
        forks.in_child(self, Steps._forked)

    def _forked(self) -> None:
        """Begin without steps and locks: those are of the parent's threads."""
        for step in (*self._open.values(), *self._committing):
            forks.leave_to_parent(step)
        self._begin()

    def _begin(self) -> None:
        self._turns: dict[int, FairSemaphore] = {}  # by how far in
        self._changed = threading.Condition()
        self._open: dict[tuple[str, str], _Step] = {}  # by thread and task
        self._committing: list[_Step] = []
        self._saved: OrderedDict[Place, None] = OrderedDict()
        self._writer = threading.Lock()
        self._saving: Counter[str] = Counter()  # saves that have begun, by thread
        self._put_off: Counter[tuple[str, str]] = Counter()  # checkpoints that are saved later, by thread and graph
        self._broken: dict[tuple[str, str], BaseException] = {}  # by thread and graph, for who waits
        # The same, and of which run: no checkpoint of that may be saved, whoever looks at the thread meanwhile.
        self._lost: OrderedDict[tuple[str, str], tuple[BaseException, object]] = OrderedDict()

    def session(self) -> Session:
        return self._sessions()

    # -- what the checkpointer tells -------------------------------------------------------------------------------

    def run_begins(self, thread_id: str, ns: str) -> None:
        """What failed before is over."""
        if self._broken:
            with self._changed:
                self._broken.pop((thread_id, ns), None)
                if self._lost.get((thread_id, ns), (None, None))[1] is _ANY_RUN:
                    del self._lost[thread_id, ns]
        if self._put_off[thread_id, ns]:  # or it would begin with an earlier checkpoint than the latest
            with self._changed:
                self._wait(lambda: not self._put_off[thread_id, ns], lambda: None, "a checkpoint is not saved yet")

    def checkpoint_saved(self, place: Place) -> None:
        with self._changed:
            self._saved[place] = None
            while len(self._saved) > _REMEMBERED:
                self._saved.popitem(last=False)
            self._changed.notify_all()

    def save_failed(self, thread_id: str, ns: str, error: BaseException, run: object) -> None:
        """No later checkpoint of the *run* may be saved, and what waits for one need not wait any longer."""
        with self._changed:
            self._broken[thread_id, ns] = error
            self._lost[thread_id, ns] = error, run
            while len(self._lost) > _REMEMBERED:
                self._lost.popitem(last=False)
            self._changed.notify_all()

    def check_around(self, thread_id: str, path: str) -> None:
        """Raise where *path*, of a task or a graph, could write nothing before a node returns that is around it."""
        if not self._open:
            return
        with self._changed:
            around = [step for step in self._open.values() if step.holder.is_around(thread_id, path)]
        if any(step.has_the_only_writer for step in around):
            raise MemstateError(
                "SQLite has one writer. A step of this node, or of a node that called this graph, has it until that "
                "node returns. Write in the same step or before it, call the subgraph before it, or compile that with "
                "checkpointer=False"
            )

    def wait_for_tasks(self, thread_id: str, ns: str, checkpoint_id: str | None, run: object) -> None:
        """Return when no task that ran at a checkpoint has its writes still uncommitted; raise if some are lost."""
        if not (self._open or self._committing or self._lost):
            return

        def settled() -> bool:
            steps = [*self._open.values(), *self._committing]
            return not any(step.holder.at == (thread_id, ns, checkpoint_id) for step in steps)

        def failure() -> BaseException | None:
            error, of = self._lost.get((thread_id, ns), (None, None))
            return error if of is _ANY_RUN or (of is run and run is not None) else None

        with self._changed:
            self._wait(settled, failure, "a task of the step before has not saved its writes")

    def _wait(self, done: Callable[[], bool], failure: Callable[[], BaseException | None], why: str) -> None:
        deadline = time.monotonic() + self._timeout_s
        while True:
            if (error := failure()) is not None:
                if isinstance(error, MemstateError):
                    raise error
                raise MemstateError(f"an earlier save of this run failed: {type(error).__name__}") from error
            if done():
                return
            if not self._changed.wait(deadline - time.monotonic()) and time.monotonic() > deadline:
                raise MemstateError(f"{why}, for {self._timeout_s:g} s")

    @contextmanager
    def saving(self, thread_id: str) -> Iterator[None]:
        """A save of the thread is under way. A step that would be in its way begins to write when it has ended."""
        with self._changed:
            self._saving[thread_id] += 1
        try:
            yield
        finally:
            self._save_ends(thread_id)

    def _save_ends(self, thread_id: str) -> None:
        with self._changed:
            self._saving[thread_id] -= 1
            if not self._saving[thread_id]:
                del self._saving[thread_id]
            self._changed.notify_all()

    def save(self, thread_id: str, ns: str, run: object, job: Callable[[], None], *, checkpoint: bool = False) -> None:
        """Do *job*, which saves something of the graph *ns*: now, or when the step has ended that is in its way."""
        with self._changed:
            step = self._in_the_way(thread_id, ns)
            if step is None:
                self._saving[thread_id] += 1
            else:
                self._put_off[thread_id, ns] += checkpoint
                step.take_along(lambda: self._save_later(thread_id, ns, run, job, checkpoint=checkpoint))
                return
        try:
            with self._one_at_a_time(), self.explaining():
                job()
        finally:
            self._save_ends(thread_id)

    @contextmanager
    def _one_at_a_time(self) -> Iterator[None]:
        """Where one connection writes, saves wait for it here: there, each would keep another connection."""
        if self._room > 1:
            yield
            return
        if not self._writer.acquire(timeout=self._timeout_s):
            raise self._busy()
        try:
            yield
        finally:
            self._writer.release()

    def _save_later(self, thread_id: str, ns: str, run: object, job: Callable[[], None], *, checkpoint: bool) -> None:
        try:
            with self.explaining():
                job()
        except BaseException as error:  # noqa: BLE001  # told to whoever saves, or waits for, something after it
            self.save_failed(thread_id, ns, error, run)
        finally:
            with self._changed:
                self._put_off[thread_id, ns] -= checkpoint
                if not self._put_off[thread_id, ns]:
                    del self._put_off[thread_id, ns]
                self._changed.notify_all()

    def is_in_the_way(self, thread_id: str, ns: str) -> bool:
        """Whether a save of the graph *ns* would be put off."""
        with self._changed:
            return self._in_the_way(thread_id, ns) is not None

    def _in_the_way(self, thread_id: str, ns: str) -> _Step | None:
        if self._room > 1:
            return None
        steps = (*self._open.values(), *self._committing)
        return next((step for step in steps if step.holds_up(thread_id, ns)), None)

    @contextmanager
    def explaining(self) -> Iterator[None]:
        """Say who has SQLite's writer, where the driver says that it is locked."""
        try:
            yield
        except DBAPIError as error:
            if not sqlite.is_busy(error):
                raise
            raise self._busy() from error

    def _busy(self) -> MemstateError:
        with self._changed:
            steps = [*self._open.values(), *self._committing]
            threads = {step.task.at.thread_id for step in steps if step.has_the_only_writer}
        holder = f"A step of thread {min(threads)!r}" if threads else "Another connection"
        return MemstateError(
            f"Cannot write: SQLite has one writer, and it was not free in time. {holder} has it. Let nodes return "
            "soon after they have written in a step, or use PostgreSQL"
        )

    # -- tasks -----------------------------------------------------------------------------------------------------

    @contextmanager
    def step(self, task: Task, is_saved: Callable[[Place], bool], life: Life) -> Iterator[tuple[Session, bool]]:
        """The Session of *task*, and whether this is its first use of it.

        *life* lasts as long as somebody may settle it: a run that is cancelled, or times out, tells nobody.
        """
        step = self.begin(task, is_saved, life)
        if not step.turn.done():
            with life.waiting():
                step.turns.wait_here(step.turn, self._timeout_s)
        step.turns.check(step.turn)
        if self._room == 1:
            self._wait_for_saves(task.at.thread_id)
        with self.explaining(), step.block() as session:
            yield session, step.blocks == 1

    def begin(self, task: Task, is_saved: Callable[[Place], bool], life: Life) -> _Step:
        """The step of *task*: what `step` enters. Its turn is to be awaited first."""
        self.check_around(task.at.thread_id, task.path.rpartition("|")[0])
        if (found := self.begun(task)) is not None:
            return found
        self.drop(task, other_attempts=True)
        self._wait_for_checkpoint(task, is_saved, life)
        with self._changed:
            found = self._open.get(task.key)
            if found is None:
                turns = self._turns_at(task.depth)
                found = self._open[task.key] = _Step(task, self._sessions(), turns, self._changed)
                self._live(found, life)
                self._refuse_stuck()
        life.watch(self, task)
        return found

    def _live(self, step: _Step, life: Life) -> None:
        if step.finalizer is not None:
            step.finalizer.detach()
        # In a thread, as a finalizer may run anywhere, and must not wait; by the call that takes no lock.
        step.finalizer = weakref.finalize(life.of, _thread.start_new_thread, self.give_up, (step.task,))
        step.finalizer.atexit = False

    def begun(self, task: Task) -> _Step | None:
        """The step of *task*, if there is one."""
        with self._changed:
            found = self._open.get(task.key)
        return found if found is not None and found.task.is_attempt(task) else None

    async def turn(self, step: _Step) -> None:
        """Return when *step* may be used: it takes no connection before. Raises MemstateError when nothing moves."""
        await step.turns.wait(step.turn, self._timeout_s)

    def _turns_at(self, depth: int) -> FairSemaphore:
        return self._turns.setdefault(depth, FairSemaphore(max(1, self._room >> (depth + 1)), self._changed))

    def _wait_for_saves(self, thread_id: str) -> None:
        """Until those are over that began before the step: they would wait for it, and it perhaps for them."""
        with self._changed:
            why = "a save of this thread that began before the step has not ended"
            self._wait(lambda: not self._saving[thread_id], lambda: None, why)

    # -- how tasks end ---------------------------------------------------------------------------------------------

    def give_up(self, task: Task) -> None:
        """Roll back what is open of an attempt that nobody will settle. Its run saves nothing more."""
        with self._changed:
            step = self.begun(task)
            if step is None:
                return
            # Whoever has caught the cancellation, and goes on, must not get away with what was written before it. Said
            # first: others look without the lock whether there is something.
            error = MemstateError("a task was cancelled while its step was open")
            self.save_failed(task.at.thread_id, step.holder.at.ns, error, _ANY_RUN)
            self._forget(step)
        _abandon(step)

    def drop(self, task: Task, *, other_attempts: bool = False) -> None:
        """Roll back what is open of this attempt at a task, or of *other_attempts*: the task runs again."""
        with self._changed:
            step = self._open.get(task.key)
            if step is None or step.task.is_attempt(task) == other_attempts:
                return
            self._forget(step)
        _abandon(step)

    def _forget(self, step: _Step) -> None:
        del self._open[step.task.key]
        step.abandoned = True
        self._refuse_stuck()
        self._changed.notify_all()

    def leaves(self, task: Task, ns: str) -> None:
        """The task has left the graph *ns* by a Command; it is settled when that graph has ended."""
        with self._changed:
            step = self.begun(task)
            if step is not None and step.holder.at.ns == ns:
                step.leaves = ns
                self._refuse_stuck()
                self._changed.notify_all()

    def hand_over(self, task: Task, to: Task, life: Life) -> None:
        """The graph that the task left has ended: its step commits with the writes of the task that called it."""
        with self._changed:
            step = self.begun(task)
            if step is not None:
                step.holder, step.leaves = to, None
                self._live(step, life)
                self._changed.notify_all()

    def _refuse_stuck(self) -> None:
        """Tell those who wait for the turn of a step that waits for them."""
        if not any(step.leaves is not None for step in self._open.values()):
            return
        for step in list(self._open.values()):
            ahead = [other for other in self._open.values() if other.turns is step.turns and other.turn.done()]
            if not step.turn.done() and ahead and all(_blocks(other, step.task) for other in ahead):
                step.turns.refuse(step.turn, _stuck())

    def _wait_for_checkpoint(self, task: Task, is_saved: Callable[[Place], bool], life: Life) -> None:
        place = task.at
        if place in self._saved or is_saved(place):
            return

        def failure() -> BaseException | None:
            if self._put_off[place[:2]] and any(_blocks(step, task) for step in self._open.values()):
                return _stuck()
            return self._broken.get(place[:2])

        with life.waiting(), self._changed:
            why = "the checkpoint at which this task runs was not saved by this checkpointer"
            self._wait(lambda: place in self._saved, failure, why)

    # -- saving what they wrote ------------------------------------------------------------------------------------

    @property
    def are_open(self) -> bool:
        """Whether any step is. Cheap."""
        return bool(self._open)

    def is_open(self, thread_id: str, task_id: str) -> bool:
        """Whether the task may have something to commit."""
        with self._changed:
            return bool(self._held_by(thread_id, task_id))

    @contextmanager
    def settle(self, at: Place, task_id: str, run: object, *, commits: bool) -> Iterator[Connection | None]:
        """What is open of the task, to save its writes on: committed at the end, or rolled back first.

        None: there is nothing. The step of a task that left a graph inside of it, by a Command to the parent, is one of
        this task.
        """
        self.check_around(at.thread_id, at.ns)
        if not commits:
            self.roll_back(at.thread_id, task_id)
        steps = self._take(at.thread_id, task_id)
        if not steps:
            error, of = self._lost.get((at.thread_id, at.ns), (None, None))
            if commits and error is not None and of is _ANY_RUN:
                raise error
            yield None
            return
        try:
            step = _only(steps)
            with step.lock, self.explaining():
                yield step.session.connection()
                step.session.commit()
        except BaseException as error:
            self.save_failed(at.thread_id, at.ns, error, run)
            raise
        finally:
            self._close(steps)

    def roll_back(self, thread_id: str, task_id: str) -> None:
        """End what is open of a task that will run again. It waits for no save."""
        self._close(self._take(thread_id, task_id))

    def _close(self, steps: Sequence[_Step]) -> None:
        for step in steps:
            with step.lock:
                step.close()
        with self._changed:
            self._committing = [step for step in self._committing if step not in steps]
            self._changed.notify_all()

    def _held_by(self, thread_id: str, task_id: str) -> list[tuple[str, str]]:
        """The open steps that commit with the task's writes."""
        return [key for key, step in self._open.items() if step.holder.key == (thread_id, task_id)]

    def _take(self, thread_id: str, task_id: str) -> list[_Step]:
        if not self._open:
            return []
        with self._changed:
            keys = self._held_by(thread_id, task_id)
            steps = [self._open[key] for key in keys]
            self._committing += steps  # before they are open no more: others look without the lock
            for key in keys:
                del self._open[key]
            return steps


def _blocks(step: _Step, task: Task) -> bool:
    """Whether *step* waits for the end of a graph that *task* is in."""
    same_thread = step.holder.at.thread_id == task.at.thread_id
    return same_thread and step.leaves is not None and _is_inside(task.at.ns, step.leaves)


def _stuck() -> MemstateError:
    return MemstateError(
        "Cannot begin this step: it waits for the step of a node beside it, which left the graph by a Command to the "
        "parent. That step ends when this graph has ended. Let one node of those that run together write in a step, or "
        "use a database and a pool with more connections"
    )
