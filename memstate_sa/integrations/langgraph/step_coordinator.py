"""Coordinate the steps and saves of a graph: decide which of them must wait for others."""

from __future__ import annotations

import _thread
import threading
import time
import weakref
from collections import Counter, OrderedDict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

from sqlalchemy.engine import Connection
from sqlalchemy.exc import DBAPIError
from sqlalchemy.orm import Session

from memstate_sa.db import sqlite
from memstate_sa.errors import MemstateError
from memstate_sa.integrations.langgraph.checkpoint_rows import CheckpointKey
from memstate_sa.integrations.langgraph.fair_semaphore import FairSemaphore
from memstate_sa.integrations.langgraph.node_transactions import NodeTransaction, StepLifetime, StepSession, Task
from memstate_sa.runtime import forks

_REMEMBERED = 4096
"""The number of saved checkpoints to remember, so that fewer queries are needed."""
_ANY_RUN = object()


class StepCoordinator:
    """The open steps of one checkpointer. Thread-safe.

    *room* is the number of connections. A step has one until its node returns, so steps must leave some for other work
    of the nodes. The steps of a graph get half of them, the steps of its subgraphs half of the rest, and so on. A step
    waits only for steps of inner graphs, so steps never wait in a circle.

    With only one writing connection, a save in a graph with an open step would wait for the step. If the step leaves
    the graph by a Command, it would wait for the save. So the save is postponed until the step has ended.
    """

    def __init__(self, sessions: Callable[[], StepSession], timeout_s: float, room: int = 1) -> None:
        self._sessions, self._timeout_s, self._room = sessions, timeout_s, room
        self._reset()
        forks.in_child(self, StepCoordinator._forked)

    def _forked(self) -> None:
        """Start without steps and locks, because they belong to the parent's threads."""
        for transaction in (*self._open.values(), *self._committing):
            forks.leave_to_parent(transaction)
        self._reset()

    def _reset(self) -> None:
        self._semaphores: dict[int, FairSemaphore] = {}  # the keys are the depths of tasks
        self._changed = threading.Condition()
        self._open: dict[tuple[str, str], NodeTransaction] = {}  # the keys are thread and task
        self._committing: list[NodeTransaction] = []
        self._saved: OrderedDict[CheckpointKey, None] = OrderedDict()
        self._writer = threading.Lock()
        self._saving: Counter[str] = Counter()  # counts the running saves of a thread
        self._postponed: Counter[tuple[str, str]] = Counter()  # counts the postponed checkpoints of a graph
        self._broken: dict[tuple[str, str], BaseException] = {}  # the error for threads that wait for a graph
        # The same errors, with the failed run. No checkpoint of that run may be saved, even after another run begins.
        self._lost: OrderedDict[tuple[str, str], tuple[BaseException, object]] = OrderedDict()

    # -- the checkpointer's reports --------------------------------------------------------------------------------

    def run_begins(self, thread_id: str, ns: str) -> None:
        """Clear the failures of earlier runs."""
        if self._broken:
            with self._changed:
                self._broken.pop((thread_id, ns), None)
                if self._lost.get((thread_id, ns), (None, None))[1] is _ANY_RUN:
                    del self._lost[thread_id, ns]
        if self._postponed[thread_id, ns]:  # the run must begin with the latest checkpoint
            with self._changed:
                self._wait(lambda: not self._postponed[thread_id, ns], lambda: None, "A checkpoint is not saved yet")

    def checkpoint_saved(self, key: CheckpointKey) -> None:
        with self._changed:
            self._saved[key] = None
            while len(self._saved) > _REMEMBERED:
                self._saved.popitem(last=False)
            self._changed.notify_all()

    def save_failed(self, thread_id: str, ns: str, error: BaseException, run: object) -> None:
        """Refuse later checkpoints of the *run*, and wake the threads that wait for one."""
        with self._changed:
            self._broken[thread_id, ns] = error
            self._lost[thread_id, ns] = error, run
            while len(self._lost) > _REMEMBERED:
                self._lost.popitem(last=False)
            self._changed.notify_all()

    def check_around(self, thread_id: str, path: str) -> None:
        """Raise an error if a node around *path* (of a task or a graph) has SQLite's writer until it returns."""
        if not self._open:
            return
        with self._changed:
            around = [step for step in self._open.values() if step.settling_task.is_around(thread_id, path)]
        if any(transaction.has_the_only_writer for transaction in around):
            raise MemstateError(
                "Cannot write: SQLite has one writer. A step of this node, or of a node that called this graph, has it "
                "until that node returns. Write in the same step or before it. Call the subgraph before the step, or "
                "compile it with checkpointer=False."
            )

    def wait_for_tasks(self, thread_id: str, ns: str, checkpoint_id: str | None, run: object) -> None:
        """Wait until the tasks that ran at a checkpoint have committed their writes. Raise the error of lost writes."""
        if not (self._open or self._committing or self._lost):
            return

        def are_settled() -> bool:
            transactions = [*self._open.values(), *self._committing]
            key = (thread_id, ns, checkpoint_id)
            return not any(transaction.settling_task.checkpoint == key for transaction in transactions)

        def failure() -> BaseException | None:
            error, of_run = self._lost.get((thread_id, ns), (None, None))
            return error if of_run is _ANY_RUN or (of_run is run and run is not None) else None

        with self._changed:
            self._wait(are_settled, failure, "A task of the previous superstep has not saved its writes")

    def _wait(self, is_done: Callable[[], bool], failure: Callable[[], BaseException | None], problem: str) -> None:
        deadline = time.monotonic() + self._timeout_s
        while True:
            if (error := failure()) is not None:
                if isinstance(error, MemstateError):
                    raise error
                raise MemstateError(
                    f"Cannot save: an earlier save of this run failed with {type(error).__name__}."
                ) from error
            if is_done():
                return
            if not self._changed.wait(deadline - time.monotonic()) and time.monotonic() > deadline:
                raise MemstateError(f"{problem} after {self._timeout_s:g} s.")

    # -- saves -----------------------------------------------------------------------------------------------------

    @contextmanager
    def saving(self, thread_id: str) -> Iterator[None]:
        """Count a running save of the thread. A step that could block the save waits for its end before it writes."""
        with self._changed:
            self._saving[thread_id] += 1
        try:
            yield
        finally:
            self._end_save(thread_id)

    def _end_save(self, thread_id: str) -> None:
        with self._changed:
            self._saving[thread_id] -= 1
            if not self._saving[thread_id]:
                del self._saving[thread_id]
            self._changed.notify_all()

    def save(self, thread_id: str, ns: str, run: object, job: Callable[[], None], *, checkpoint: bool = False) -> None:
        """Run *job*, a save of the graph *ns*: now, or after the step that blocks it."""
        with self._changed:
            blocking_step = self._blocking_step(thread_id, ns)
            if blocking_step is None:
                self._saving[thread_id] += 1
            else:
                self._postponed[thread_id, ns] += checkpoint
                blocking_step.postpone(lambda: self._save_postponed(thread_id, ns, run, job, checkpoint=checkpoint))
                return
        try:
            with self._one_at_a_time(), self.explaining_busy_errors():
                job()
        finally:
            self._end_save(thread_id)

    @contextmanager
    def _one_at_a_time(self) -> Iterator[None]:
        """With one writing connection, let saves wait here. In the pool, each waiting save would use a connection."""
        if self._room > 1:
            yield
            return
        if not self._writer.acquire(timeout=self._timeout_s):
            raise self._busy_error()
        try:
            yield
        finally:
            self._writer.release()

    def _save_postponed(
        self, thread_id: str, ns: str, run: object, job: Callable[[], None], *, checkpoint: bool
    ) -> None:
        try:
            with self.explaining_busy_errors():
                job()
        except BaseException as error:  # noqa: BLE001  # later saves and waits raise it
            self.save_failed(thread_id, ns, error, run)
        finally:
            with self._changed:
                self._postponed[thread_id, ns] -= checkpoint
                if not self._postponed[thread_id, ns]:
                    del self._postponed[thread_id, ns]
                self._changed.notify_all()

    def would_postpone(self, thread_id: str, ns: str) -> bool:
        """Whether a save of the graph *ns* would be postponed."""
        with self._changed:
            return self._blocking_step(thread_id, ns) is not None

    def _blocking_step(self, thread_id: str, ns: str) -> NodeTransaction | None:
        if self._room > 1:
            return None
        transactions = (*self._open.values(), *self._committing)
        return next((transaction for transaction in transactions if transaction.blocks_save(thread_id, ns)), None)

    @contextmanager
    def explaining_busy_errors(self) -> Iterator[None]:
        """If the driver reports a locked SQLite database, raise an error that names the owner of the lock."""
        try:
            yield
        except DBAPIError as error:
            if not sqlite.is_busy(error):
                raise
            raise self._busy_error() from error

    def _busy_error(self) -> MemstateError:
        with self._changed:
            transactions = [*self._open.values(), *self._committing]
            threads = {step.task.checkpoint.thread_id for step in transactions if step.has_the_only_writer}
        owner = f"A step of thread {min(threads)!r}" if threads else "Another connection"
        return MemstateError(
            f"Cannot write: SQLite has one writer, and it was not free in time. {owner} has it. Let nodes return soon "
            "after they write in a step, or use PostgreSQL."
        )

    # -- tasks -----------------------------------------------------------------------------------------------------

    @contextmanager
    def step(
        self, task: Task, is_saved: Callable[[CheckpointKey], bool], lifetime: StepLifetime
    ) -> Iterator[tuple[StepSession, bool]]:
        """The Session of *task*, and whether this is the first block that uses it.

        The step ends at the latest with *lifetime*, because LangGraph does not report the end of a cancelled run.
        """
        transaction = self.begin(task, is_saved, lifetime)
        if not transaction.permit.done():
            with lifetime.waiting():
                transaction.semaphore.wait_blocking(transaction.permit, self._timeout_s)
        transaction.semaphore.check(transaction.permit)
        if self._room == 1:
            self._wait_for_saves(task.checkpoint.thread_id)
        with self.explaining_busy_errors(), transaction.block() as session:
            yield session, transaction.block_count == 1

    def begin(self, task: Task, is_saved: Callable[[CheckpointKey], bool], lifetime: StepLifetime) -> NodeTransaction:
        """The transaction of *task*. Wait for its permit before `step` enters it."""
        self.check_around(task.checkpoint.thread_id, task.path.rpartition("|")[0])
        if (open_transaction := self.find(task)) is not None:
            return open_transaction
        self.drop(task, other_attempts=True)
        self._wait_for_checkpoint(task, is_saved, lifetime)
        with self._changed:
            transaction = self._open.get(task.key)
            if transaction is None:
                semaphore = self._semaphore_at(task.depth)
                transaction = NodeTransaction(task, self._sessions(), semaphore, self._changed)
                self._open[task.key] = transaction
                self._end_with(transaction, lifetime)
                self._reject_stuck()
        lifetime.watch(self, task)
        return transaction

    def _end_with(self, transaction: NodeTransaction, lifetime: StepLifetime) -> None:
        if transaction.finalizer is not None:
            transaction.finalizer.detach()
        # A finalizer may run anywhere and must not wait, so use a thread. start_new_thread takes no lock.
        start, task = _thread.start_new_thread, transaction.task
        transaction.finalizer = weakref.finalize(lifetime.graph, start, self.give_up, (task,))
        transaction.finalizer.atexit = False

    def find(self, task: Task) -> NodeTransaction | None:
        """The open transaction of this attempt at a task."""
        with self._changed:
            transaction = self._open.get(task.key)
        return transaction if transaction is not None and transaction.task.is_attempt(task) else None

    async def wait_for_permit(self, transaction: NodeTransaction) -> None:
        """Wait until *transaction* may begin. It has no connection yet. Raises MemstateError after the timeout."""
        await transaction.semaphore.wait(transaction.permit, self._timeout_s)

    def _semaphore_at(self, depth: int) -> FairSemaphore:
        return self._semaphores.setdefault(depth, FairSemaphore(max(1, self._room >> (depth + 1)), self._changed))

    def _wait_for_saves(self, thread_id: str) -> None:
        """Wait for earlier saves before the step writes. Otherwise each could wait for the other."""
        with self._changed:
            problem = "A save of this thread that began before the step has not ended"
            self._wait(lambda: not self._saving[thread_id], lambda: None, problem)

    # -- the end of tasks ------------------------------------------------------------------------------------------

    def give_up(self, task: Task) -> None:
        """Roll back the step of an attempt that will not be saved. The run may save no more checkpoints."""
        with self._changed:
            transaction = self.find(task)
            if transaction is None:
                return
            # A run that catches the cancellation and continues must not save a state without the lost changes. Record
            # the failure before removing the step, because other threads check for open steps without the lock.
            error = MemstateError("Cannot save: a task was cancelled while its step was open.")
            self.save_failed(task.checkpoint.thread_id, transaction.settling_task.checkpoint.ns, error, _ANY_RUN)
            self._remove(transaction)
        transaction.abandon_from_anywhere()

    def drop(self, task: Task, *, other_attempts: bool = False) -> None:
        """Roll back the step of this attempt at a task, or else of *other_attempts* at it. The task runs again."""
        with self._changed:
            transaction = self._open.get(task.key)
            if transaction is None or transaction.task.is_attempt(task) == other_attempts:
                return
            self._remove(transaction)
        transaction.abandon_from_anywhere()

    def _remove(self, transaction: NodeTransaction) -> None:
        del self._open[transaction.task.key]
        transaction.is_abandoned = True
        self._reject_stuck()
        self._changed.notify_all()

    def leave_graph(self, task: Task, ns: str) -> None:
        """Record that the task left the graph *ns* by a Command. Its step commits after the end of that graph."""
        with self._changed:
            transaction = self.find(task)
            if transaction is not None and transaction.settling_task.checkpoint.ns == ns:
                transaction.left_graph = ns
                self._reject_stuck()
                self._changed.notify_all()

    def hand_over(self, task: Task, parent: Task, lifetime: StepLifetime) -> None:
        """Hand the step to *parent*, because the graph has ended. It commits with the writes of *parent*."""
        with self._changed:
            transaction = self.find(task)
            if transaction is not None:
                transaction.settling_task, transaction.left_graph = parent, None
                self._end_with(transaction, lifetime)
                self._changed.notify_all()

    def _reject_stuck(self) -> None:
        """Reject a request for a permit if all holders of permits wait for the requesting task."""
        if not any(transaction.left_graph is not None for transaction in self._open.values()):
            return
        for transaction in list(self._open.values()):
            semaphore, open_steps = transaction.semaphore, self._open.values()
            ahead = [other for other in open_steps if other.semaphore is semaphore and other.permit.done()]
            is_stuck = bool(ahead) and all(other.waits_for_graph_of(transaction.task) for other in ahead)
            if not transaction.permit.done() and is_stuck:
                semaphore.reject(transaction.permit, _stuck_error())

    def _wait_for_checkpoint(
        self, task: Task, is_saved: Callable[[CheckpointKey], bool], lifetime: StepLifetime
    ) -> None:
        key = task.checkpoint
        if key in self._saved or is_saved(key):
            return
        graph = (key.thread_id, key.ns)

        def failure() -> BaseException | None:
            if self._postponed[graph] and any(step.waits_for_graph_of(task) for step in self._open.values()):
                return _stuck_error()
            return self._broken.get(graph)

        with lifetime.waiting(), self._changed:
            problem = "The checkpoint at which this task runs was not saved by this checkpointer"
            self._wait(lambda: key in self._saved, failure, problem)

    # -- commits ---------------------------------------------------------------------------------------------------

    @property
    def is_any_open(self) -> bool:
        """Whether any step is open. The check takes no lock."""
        return bool(self._open)

    def is_open(self, thread_id: str, task_id: str) -> bool:
        """Whether the task may have an open step."""
        with self._changed:
            return bool(self._keys_settled_by(thread_id, task_id))

    @contextmanager
    def settle(self, key: CheckpointKey, task_id: str, run: object, *, commits: bool) -> Iterator[Connection | None]:
        """The connection of the task's step, for saving the task's writes. The step commits at the end.

        The result is None if there is no step. Without *commits*, the step is rolled back first. If an inner task left
        its graph by a Command to this task, its step belongs to this task.
        """
        self.check_around(key.thread_id, key.ns)
        if not commits:
            self.roll_back(key.thread_id, task_id)
        transactions = self._take(key.thread_id, task_id)
        if not transactions:
            error, of_run = self._lost.get((key.thread_id, key.ns), (None, None))
            if commits and error is not None and of_run is _ANY_RUN:
                raise error
            yield None
            return
        try:
            transaction = _only(transactions)
            with transaction.lock, self.explaining_busy_errors():
                yield transaction.session.connection()
                Session.commit(transaction.session)  # `session.commit()` would be refused
        except BaseException as error:
            self.save_failed(key.thread_id, key.ns, error, run)
            raise
        finally:
            self._close(transactions)

    def roll_back(self, thread_id: str, task_id: str) -> None:
        """Roll back the steps of a task that will run again. This does not wait for saves."""
        self._close(self._take(thread_id, task_id))

    def _close(self, transactions: Sequence[NodeTransaction]) -> None:
        for transaction in transactions:
            with transaction.lock:
                transaction.close()
        with self._changed:
            self._committing = [other for other in self._committing if other not in transactions]
            self._changed.notify_all()

    def _keys_settled_by(self, thread_id: str, task_id: str) -> list[tuple[str, str]]:
        """The keys of the open steps that commit with the task's writes."""
        return [key for key, step in self._open.items() if step.settling_task.key == (thread_id, task_id)]

    def _take(self, thread_id: str, task_id: str) -> list[NodeTransaction]:
        if not self._open:
            return []
        with self._changed:
            keys = self._keys_settled_by(thread_id, task_id)
            transactions = [self._open[key] for key in keys]
            # Add them before removing them from _open, which others read without the lock.
            self._committing += transactions
            for key in keys:
                del self._open[key]
            return transactions


def _only(transactions: Sequence[NodeTransaction]) -> NodeTransaction:
    if len(transactions) > 1:
        raise MemstateError(
            f"Cannot commit {len(transactions)} steps together. A node, or subgraphs that it called, opened more than "
            "one step, and the subgraphs ended by a Command to the parent. Use one step for all of them."
        )
    return transactions[0]


def _stuck_error() -> MemstateError:
    return MemstateError(
        "Cannot begin this step: it waits for the step of a parallel node. That node left the graph by a Command to "
        "the parent, so its step ends only when this graph ends. Let only one of the parallel nodes use a step, or use "
        "a database and a pool with more connections."
    )
