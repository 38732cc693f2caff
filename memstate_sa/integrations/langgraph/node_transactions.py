"""The transaction of a node's `step`, which stays open until LangGraph saves the node's writes.

The changes of the step and the writes commit together. So a crash or a failed save never leaves one without the other.
Four rules prevent lost and doubled effects after a crash:

1. A task's Session begins after the checkpoint at which the task runs is saved. Otherwise the work would run again
   after a crash, as another task at another checkpoint.
2. The Session commits in the transaction that saves the task's writes. It rolls back if the task will run again.
3. If the task leaves its graph by a Command to a parent, the Session commits with the writes of the parent's task.
4. The next checkpoint is saved after all these transactions have committed. Otherwise it would record a task as done
   while its changes can still be lost.
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
    """One attempt of LangGraph to run a task at a checkpoint.

    *run* is an object that all attempts share, and *number* counts them. *path* names the task and all tasks around it,
    like LangGraph's ``checkpoint_ns``.
    """

    checkpoint: CheckpointKey
    id: str
    run: object
    number: int
    path: str = ""

    @property
    def key(self) -> tuple[str, str]:
        """The task's thread and id."""
        return self.checkpoint.thread_id, self.id

    def is_attempt(self, other: Task) -> bool:
        """Whether both are the same attempt."""
        return self.run is other.run and self.number == other.number

    def is_around(self, thread_id: str, path: str) -> bool:
        """Whether *path* belongs to this task, or is inside it."""
        return self.checkpoint.thread_id == thread_id and f":{self.id}" in path

    @property
    def depth(self) -> int:
        """The number of tasks around this one."""
        return self.path.count("|")


class StepLifetime:
    """The lifetime of a step. It ends at the latest with *graph*, the object that runs its task.

    The subclass `Execution` knows more about the task.
    """

    def __init__(self, graph: Any) -> None:
        self.graph = graph

    def waiting(self) -> AbstractContextManager[None]:
        """The context for a thread of the graph that waits."""
        return nullcontext()

    def watch(self, steps: StepCoordinator, task: Task) -> None:
        """Report the end of the task to *steps*, in the cases that LangGraph does not report."""


class StepSession(Session):
    """The Session of a step. Code of the node cannot commit it: the changes would stay when the node fails."""

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self.label: Callable[[], None] = lambda: None
        """Labels the next transaction of this Session."""

    def begin(self, nested: bool = False) -> SessionTransaction:
        if not nested:
            raise _commit_error()
        return super().begin(nested)

    def commit(self) -> None:
        raise _commit_error()

    def rollback(self) -> None:
        super().rollback()
        self.label()  # the labels of the log end with a transaction


def _commit_error() -> MemstateError:
    return MemstateError(
        "Cannot commit the Session of a step: it commits with the node. Use session.flush(), or session.begin_nested() "
        "for a part that may fail."
    )


class NodeTransaction:
    """The open transaction of a task. First it waits for a permit. All ``with step():`` blocks of the task share it."""

    def __init__(
        self, task: Task, session: StepSession, semaphore: FairSemaphore, changed: threading.Condition
    ) -> None:
        self.task, self.session = task, session
        self.settling_task = task  # the task whose save commits this transaction
        self.semaphore, self.permit = semaphore, semaphore.request()
        self.lock = threading.RLock()  # the node's threads take turns with the Session
        self.block_count = 0
        self.is_abandoned = False
        self.left_graph: str | None = None  # the graph that the task left: it must end before the commit
        self.finalizer: Any = None
        self._changed = changed
        self._postponed_saves: list[Callable[[], None]] | None = []
        self._driver: Any = None  # every thread may read the state of SQLite's connection

        @event.listens_for(session, "after_begin")
        def _keep_driver(_: Session, __: SessionTransaction, connection: Connection) -> None:
            if database_of(connection).has_one_writer:
                self._driver = connection.connection.driver_connection

        @event.listens_for(session, "after_transaction_end")
        def _drop_driver(_: Session, transaction: SessionTransaction) -> None:
            # Also after a rollback by the application. Another Session may use the connection afterwards.
            if transaction.parent is None:
                self._driver = None

    @property
    def has_the_only_writer(self) -> bool:
        return bool(getattr(self._driver, "in_transaction", False))

    def blocks_save(self, thread_id: str, ns: str) -> bool:
        """Whether a save of the graph *ns* and this transaction might have to wait for each other."""
        task = self.settling_task
        if task.checkpoint.thread_id != thread_id or task.is_around(thread_id, ns) or self._postponed_saves is None:
            return False
        # A save in another graph of the run takes a thread that the step may need to end. A save in the step's own
        # graph prevents the graph from ending.
        writes = self.block_count > 0 or self.has_the_only_writer
        return self.permit.done() and (writes or _is_inside(ns, task.checkpoint.ns))

    def waits_for_graph_of(self, task: Task) -> bool:
        """Whether this transaction waits for the end of a graph that contains *task*."""
        same_thread = self.settling_task.checkpoint.thread_id == task.checkpoint.thread_id
        return same_thread and self.left_graph is not None and _is_inside(task.checkpoint.ns, self.left_graph)

    def postpone(self, save: Callable[[], None]) -> None:
        """Call *save* when this transaction has ended."""
        assert self._postponed_saves is not None
        self._postponed_saves.append(save)

    @contextmanager
    def block(self) -> Iterator[StepSession]:
        """The Session for one block of the task. If the block fails, its changes are rolled back."""
        try:
            with self._locked_block() as session:
                yield session
        finally:
            if self.is_abandoned:  # another thread may do this after the check in `_locked_block`
                self.abandon()

    @contextmanager
    def _locked_block(self) -> Iterator[StepSession]:
        with self.lock:
            self.block_count += 1
            try:
                if self.block_count == 1:
                    yield self.session
                else:  # the savepoint keeps earlier changes if this block fails
                    with self.session.begin_nested():
                        yield self.session
                self.session.flush()  # so the task itself raises the errors of its changes
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
                    "The changes of this step are rolled back: this task has ended, or it was given up and runs again."
                    " End this thread."
                )

    def abandon(self) -> None:
        """Roll back now. If a thread is inside a block, it rolls back when it leaves the block."""
        self.is_abandoned = True
        if self.lock.acquire(blocking=False):
            try:
                self.close()
            finally:
                self.lock.release()

    def abandon_from_anywhere(self) -> None:
        """Do the same as `abandon`, but in another thread if an event loop runs in this one."""
        try:
            asyncio.get_running_loop()
        except RuntimeError:
            self.abandon()
        else:  # an event loop must not wait for the database
            _thread.start_new_thread(self.abandon, ())

    def close(self) -> None:
        """Return the connection and the permit. Then run the postponed saves."""
        if self.finalizer is not None:
            self.finalizer.detach()
        self.is_abandoned = True  # otherwise a late thread would begin another transaction, which would never end
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
            self._postponed_saves = None  # later saves need not wait
            return None


def _is_inside(ns: str, graph: str) -> bool:
    return not graph or ns == graph or ns.startswith(f"{graph}|")
