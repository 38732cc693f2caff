"""What tasks of a graph write to the application's tables, kept open until what they write to its state is saved.

Committed together, neither a crash nor a failed save leaves one without the other. Three rules make the order one that
a crash cannot turn into a lost or a doubled effect:

- a task's Session begins when the checkpoint that it runs at is saved (else a crash would have it run again, as
  another task, at another checkpoint);
- it commits in the transaction of the task's writes, or rolls back when the task will run again;
- the next checkpoint is saved when all of them have (else it would say of a task that it is done).
"""

from __future__ import annotations

import _thread
import threading
import time
import weakref
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

from sqlalchemy import event
from sqlalchemy.engine import Connection
from sqlalchemy.orm import Session, SessionTransaction

from memstate_sa.errors import MemstateError
from memstate_sa.integrations.checkpoints import Place
from memstate_sa.integrations.turns import Turns

_REMEMBERED = 4096
"""How many saved checkpoints are known without asking the database."""
_ANY_RUN = object()


class Task(NamedTuple):
    """A task, the checkpoint that it runs at, and which attempt at it this is: the *number*th of a *run*, an object."""

    at: Place
    id: str
    run: object
    number: int

    @property
    def key(self) -> tuple[str, str]:
        return self.at.thread_id, self.id

    def is_attempt(self, other: Task) -> bool:
        """Whether the two are of the same attempt."""
        return self.run is other.run and self.number == other.number


class _Step:
    def __init__(self, task: Task, session: Session, turns: Turns | None) -> None:
        self.task, self.session = task, session
        self.turns = turns  # a thread has none: it would wait in LangGraph's own, which are to save what ends others'
        self.turn = None if turns is None else turns.ask()
        self.lock = threading.RLock()  # tools of one node run in threads: one at a time has the Session
        self.blocks = 0
        self.abandoned = False
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
                raise MemstateError("this task was given up, and runs again: what it wrote is rolled back")

    def abandon(self) -> None:
        """Roll back now, or when the thread that is in it leaves."""
        self.abandoned = True
        if self.lock.acquire(blocking=False):
            try:
                self.close()
            finally:
                self.lock.release()

    def close(self) -> None:
        """Give its connection back, and its turn to the next one."""
        try:
            self.session.close()
        finally:
            if self.turns is not None and self.turn is not None:
                self.turns.end(self.turn)


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
    """

    def __init__(self, sessions: Callable[[], Session], timeout_s: float, room: int = 1) -> None:
        self._sessions, self._timeout_s, self._room = sessions, timeout_s, room
        self._turns: dict[int, Turns] = {}  # by how far in
        self._changed = threading.Condition()
        self._open: dict[tuple[str, str], _Step] = {}  # by thread and task
        self._committing: list[_Step] = []
        self._saved: OrderedDict[Place, None] = OrderedDict()
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

    def check_around(self, thread_id: str, ns: str) -> None:
        """Raise where the graph *ns* could save nothing before the node returns that has called it."""
        if not self._open:
            return
        with self._changed:
            around = [s for s in self._open.values() if s.task.at.thread_id == thread_id and f":{s.task.id}" in ns]
        if any(step.has_the_only_writer for step in around):
            raise MemstateError(
                "the node that called this subgraph has written in a step, and SQLite has one writer: let it call "
                "that first, and write then, or compile the subgraph with checkpointer=False"
            )

    def wait_for_tasks(self, thread_id: str, ns: str, checkpoint_id: str | None, run: object) -> None:
        """Return when no task that ran at a checkpoint has its writes still uncommitted; raise if some are lost."""
        if not (self._open or self._committing or self._lost):
            return

        def settled() -> bool:
            steps = [*self._open.values(), *self._committing]
            return not any(step.task.at == (thread_id, ns, checkpoint_id) for step in steps)

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

    # -- tasks -----------------------------------------------------------------------------------------------------

    @contextmanager
    def step(self, task: Task, is_saved: Callable[[Place], bool], lives: object) -> Iterator[tuple[Session, bool]]:
        """The Session of *task*, and whether this is its first use of it.

        *lives* as long as somebody may settle it: a run that is cancelled, or times out, tells nobody.
        """
        step = self.begin(task, is_saved, lives)
        with step.block() as session:
            yield session, step.blocks == 1

    def begin(self, task: Task, is_saved: Callable[[Place], bool], lives: object, *, queued: bool = False) -> _Step:
        """The step of *task*: what `step` enters. If it is a new one and *queued*, `turn` is to be awaited first."""
        self.check_around(task.at.thread_id, task.at.ns)
        with self._changed:
            found = self._open.get(task.key)
            if found is not None and not found.task.is_attempt(task):
                del self._open[task.key]
                found.abandon()
                found = None
        if found is not None:
            return found
        self._wait_for_checkpoint(task.at, is_saved)
        with self._changed:
            found = self._open.get(task.key)
            if found is None:
                found = _Step(task, self._sessions(), self._turns_at(task.at.ns) if queued else None)
                self._open[task.key] = found
        # In a thread, as a finalizer may run anywhere, and must not wait; by the call that takes no lock.
        weakref.finalize(lives, _thread.start_new_thread, self.give_up, (task,)).atexit = False
        return found

    def begun(self, task: Task) -> _Step | None:
        """The step of *task*, if there is one."""
        with self._changed:
            found = self._open.get(task.key)
        return found if found is not None and found.task.is_attempt(task) else None

    async def turn(self, step: _Step) -> None:
        """Return when *step* may be used: it takes no connection before. Raises MemstateError when nothing moves."""
        if step.turns is not None and step.turn is not None:
            await step.turns.wait(step.turn, self._timeout_s)

    def _turns_at(self, ns: str) -> Turns:
        depth = ns.count("|") + 1 if ns else 0
        return self._turns.setdefault(depth, Turns(max(1, self._room >> (depth + 1))))

    def give_up(self, task: Task) -> None:
        """Roll back what is open of an attempt that nobody will settle. Its run saves nothing more."""
        with self._changed:
            step = self._open.get(task.key)
            if step is None or not step.task.is_attempt(task):
                return
            # Whoever has caught the cancellation, and goes on, must not get away with what was written before it. Said
            # first: others look without the lock whether there is something.
            error = MemstateError("a task was cancelled while its step was open")
            self.save_failed(task.at.thread_id, task.at.ns, error, _ANY_RUN)
            del self._open[task.key]
        step.abandon()

    def _wait_for_checkpoint(self, place: Place, is_saved: Callable[[Place], bool]) -> None:
        if place in self._saved or is_saved(place):
            return
        why = (
            "the checkpoint at which this task runs was not saved (a subgraph that is compiled with "
            "checkpointer=False has none: leave that out)"
        )
        with self._changed:
            self._wait(lambda: place in self._saved, lambda: self._broken.get((place.thread_id, place.ns)), why)

    def is_open(self, thread_id: str, task_id: str) -> bool:
        """Whether the task may have something to commit."""
        with self._changed:
            return bool(self._of_task(thread_id, task_id))

    @contextmanager
    def settle(self, at: Place, task_id: str, run: object, *, commits: bool) -> Iterator[Connection | None]:
        """What is open of the task, to save its writes on: committed at the end, or rolled back first.

        None: there is nothing. A task that a graph inside of it has left without saving (a Command to the parent) ends
        with it.
        """
        self.check_around(at.thread_id, at.ns)
        steps = self._take(at.thread_id, task_id)
        if not steps:
            error, of = self._lost.get((at.thread_id, at.ns), (None, None))
            if commits and error is not None and of is _ANY_RUN:
                raise error
            yield None
            return
        try:
            step = _only(steps)
            with step.lock:
                session = step.session
                if not commits:
                    session.close()
                    yield None
                    return
                yield session.connection()
                session.commit()
        except BaseException as error:
            self.save_failed(at.thread_id, at.ns, error, run)
            raise
        finally:
            for step in steps:
                step.close()
            with self._changed:
                self._committing = [step for step in self._committing if step not in steps]
                self._changed.notify_all()

    def _of_task(self, thread_id: str, task_id: str) -> list[tuple[str, str]]:
        """The open steps of the task, and of graphs inside of it."""
        return [
            key
            for key, step in self._open.items()
            if key[0] == thread_id and (key[1] == task_id or f":{task_id}" in step.task.at.ns)
        ]

    def _take(self, thread_id: str, task_id: str) -> list[_Step]:
        if not self._open:
            return []
        with self._changed:
            keys = self._of_task(thread_id, task_id)
            steps = [self._open[key] for key in keys]
            self._committing += steps  # before they are open no more: others look without the lock
            for key in keys:
                del self._open[key]
            return steps
