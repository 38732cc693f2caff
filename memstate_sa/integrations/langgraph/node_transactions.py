"""A node's transaction: what its `step` writes to the application's tables, open until its writes are saved.

Both commit together, so neither a crash nor a failed save leaves one without the other. Four rules make the order one
that a crash cannot turn into a lost or a doubled effect:

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
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import TYPE_CHECKING, Any, NamedTuple

from sqlalchemy import event
from sqlalchemy.engine import Connection
from sqlalchemy.orm import Session, SessionTransaction

from memstate_sa.db.dialects import database_of
from memstate_sa.errors import MemstateError
from memstate_sa.integrations.langgraph.checkpoint_rows import CheckpointKey
from memstate_sa.integrations.langgraph.fair_semaphore import FairSemaphore

if TYPE_CHECKING:
    from memstate_sa.integrations.langgraph.step_coordinator import StepCoordinator


class Task(NamedTuple):
    """A task, the checkpoint that it runs at, and the attempt at it: the *number*th of a *run*, which is an object.

    *path* names the task and all tasks around it, as LangGraph's ``checkpoint_ns`` does.
    """

    checkpoint: CheckpointKey
    id: str
    run: object
    number: int
    path: str = ""

    @property
    def key(self) -> tuple[str, str]:
        """Its thread and its id."""
        return self.checkpoint.thread_id, self.id

    def is_attempt(self, other: Task) -> bool:
        """Whether the two are of the same attempt."""
        return self.run is other.run and self.number == other.number

    def is_around(self, thread_id: str, path: str) -> bool:
        """Whether *path* is this task's, or one inside of it."""
        return self.checkpoint.thread_id == thread_id and f":{self.id}" in path

    @property
    def depth(self) -> int:
        """How many tasks are around it."""
        return self.path.count("|")


class StepLifetime:
    """A step that nothing settles ends with *graph*, the object that runs it. `Execution` knows more of its task."""

    def __init__(self, graph: Any) -> None:
        self.graph = graph

    def waiting(self) -> AbstractContextManager[None]:
        """The context in which a thread of the graph waits."""
        return nullcontext()

    def watch(self, steps: StepCoordinator, task: Task) -> None:
        """Report to *steps* how the task ends, where LangGraph does not."""


class NodeTransaction:
    """The open transaction of a task. It waits for a permit, then all ``with step():`` blocks of the task share it."""

    def __init__(self, task: Task, session: Session, semaphore: FairSemaphore, changed: threading.Condition) -> None:
        self.task, self.session = task, session
        self.settling_task = task  # whose writes it commits with
        self.semaphore, self.permit = semaphore, semaphore.request()
        self.lock = threading.RLock()  # tools of one node run in threads: one at a time has the Session
        self.block_count = 0
        self.is_abandoned = False
        self.left_graph: str | None = None  # the graph that the task left, and that has to end before it is settled
        self.finalizer: Any = None
        self._changed = changed
        self._postponed_saves: list[Callable[[], None]] | None = []
        self._driver: Any = None  # SQLite's connection, whose state may be read in any thread

        @event.listens_for(session, "after_begin")
        def _keep_driver(_: Session, __: SessionTransaction, connection: Connection) -> None:
            if database_of(connection).has_one_writer:
                self._driver = connection.connection.driver_connection

        @event.listens_for(session, "after_transaction_end")
        def _drop_driver(_: Session, transaction: SessionTransaction) -> None:
            if transaction.parent is None:  # by hand, too: the connection may be another's now
                self._driver = None

    @property
    def has_the_only_writer(self) -> bool:
        return bool(getattr(self._driver, "in_transaction", False))

    def blocks_save(self, thread_id: str, ns: str) -> bool:
        """Whether a save of the graph *ns* might have to wait for this transaction, and this for the save."""
        task = self.settling_task
        if task.checkpoint.thread_id != thread_id or task.is_around(thread_id, ns) or self._postponed_saves is None:
            return False
        # Elsewhere in the run, a save takes a thread that the step may need to end. In its graph, the graph cannot end.
        writes = self.block_count > 0 or self.has_the_only_writer
        return self.permit.done() and (writes or _is_inside(ns, task.checkpoint.ns))

    def waits_for_graph_of(self, task: Task) -> bool:
        """Whether this waits for the end of a graph that *task* is in."""
        same_thread = self.settling_task.checkpoint.thread_id == task.checkpoint.thread_id
        return same_thread and self.left_graph is not None and _is_inside(task.checkpoint.ns, self.left_graph)

    def postpone(self, save: Callable[[], None]) -> None:
        """Call *save* when this has ended."""
        assert self._postponed_saves is not None
        self._postponed_saves.append(save)

    @contextmanager
    def block(self) -> Iterator[Session]:
        """The Session, for one block of the task. A block that fails takes back what it wrote."""
        try:
            with self._locked_block() as session:
                yield session
        finally:
            if self.is_abandoned:  # perhaps after the block has looked, and before it let go of the lock
                self.abandon()

    @contextmanager
    def _locked_block(self) -> Iterator[Session]:
        with self.lock:
            self.block_count += 1
            try:
                if self.block_count == 1:
                    yield self.session
                else:  # what came before stays when this fails
                    with self.session.begin_nested():
                        yield self.session
                self.session.flush()  # what is wrong with it is the task's own error
            except BaseException:
                if self.is_abandoned:
                    self.close()
                elif self.block_count == 1:
                    self.session.rollback()
                self.block_count -= 1
                raise
            if self.is_abandoned:
                self.close()
                raise MemstateError(
                    "this task has ended, or was given up and runs again: what it wrote here is rolled back"
                )

    def abandon(self) -> None:
        """Roll back now, or when the thread that is in it leaves."""
        self.is_abandoned = True
        if self.lock.acquire(blocking=False):
            try:
                self.close()
            finally:
                self.lock.release()

    def abandon_from_anywhere(self) -> None:
        """Do as `abandon` does; where an event loop runs, in another thread."""
        try:
            asyncio.get_running_loop()
        except RuntimeError:
            self.abandon()
        else:  # which must not wait for the database
            _thread.start_new_thread(self.abandon, ())

    def close(self) -> None:
        """Return its connection and its permit. Then run the saves that waited for this."""
        if self.finalizer is not None:
            self.finalizer.detach()
        self.is_abandoned = True  # a thread that comes to it later would begin another transaction, which nobody ends
        try:
            self.session.close()
        finally:
            self.semaphore.release(self.permit)
            while (save := self._next_postponed_save()) is not None:
                save()

    def _next_postponed_save(self) -> Callable[[], None] | None:
        with self._changed:
            if self._postponed_saves:
                return self._postponed_saves.pop(0)
            self._postponed_saves = None  # what comes now has not to wait any longer
            return None


def _is_inside(ns: str, graph: str) -> bool:
    return not graph or ns == graph or ns.startswith(f"{graph}|")
