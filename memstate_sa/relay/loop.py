"""`Relay`: delivers to all indexes in a loop, in the caller's thread or in one background thread per index."""

from __future__ import annotations

import math
import random
import threading
import time
from collections.abc import Callable, Collection, Mapping
from contextlib import ExitStack
from datetime import timedelta
from functools import partial
from itertools import chain
from types import TracebackType
from typing import Self, TypeVar

from sqlalchemy.engine import Connection, Engine

from memstate_sa.db.dialects import database_of
from memstate_sa.db.sqlite import is_in_memory, require_no_transaction
from memstate_sa.embedding.batches import Destination
from memstate_sa.errors import DeliveryError, DeliveryRetryable, MemstateError
from memstate_sa.log.outbox import read_present
from memstate_sa.log.positions import Position
from memstate_sa.relay import backlog, deadletters, projections, retention
from memstate_sa.relay.clean_up import CleanUpThread
from memstate_sa.relay.deadletters import DeadLetter
from memstate_sa.relay.delivery import Delivery
from memstate_sa.relay.index_key import IndexKey
from memstate_sa.relay.index_worker import IndexWorker
from memstate_sa.relay.progress import reporting
from memstate_sa.relay.retention import Retention
from memstate_sa.relay.retry import Breaker, RetryPolicy, describe
from memstate_sa.relay.slot_owner import Counters
from memstate_sa.relay.wakeup import Listener, Notifier
from memstate_sa.runtime import forks
from memstate_sa.runtime.display import summary
from memstate_sa.runtime.printable import printable_logger
from memstate_sa.tracking.tracked import Tracked

logger = printable_logger("memstate_sa.relay")
T = TypeVar("T")

STOP_TIMEOUT_S = 5.0
"""The time that a stopping relay waits for a running call. Docker, for example, kills a process after ten seconds."""

_CLEAN_UP_EVERY_S = 60.0
_TELL_AFTER_S = 2.0
"""The time after which a drain that delivers nothing logs its reason, once. The command line shows it on stderr."""


class Relay:
    """Converges the indexes of a Memory to the committed rows of one database.

    Any number of relays may run, in any number of processes. On PostgreSQL they share the keys of each index. On SQLite
    one of them delivers, and the others stand by. A relay is thread-safe. As a context manager it runs in the
    background.
    """

    def __init__(
        self,
        engine: Engine,
        destinations: Mapping[str, tuple[Destination, Callable[[], Mapping[str, Tracked]]]],
        *,
        page_size: int = 2000,
        lease_s: float = 30.0,
        poll_s: tuple[float, float] | None = None,
        policy: RetryPolicy | None = None,
        retention: Retention | None = None,
        sweep: Callable[[], int] | None = None,
        notifier: Notifier | None = None,
    ) -> None:
        """See `RelayOptions` for the options.

        *sweep* is called from time to time. It deletes expired facts, and returns their number. *notifier* tells other
        processes about commits of this process. This relay ignores its messages.
        """
        if not database_of(engine).has_one_writer:
            # READ COMMITTED: each statement sees all commits, and locks last until the transaction ends.
            engine = engine.execution_options(isolation_level="READ COMMITTED")
        self._engine = engine
        self._destinations = destinations
        poll_s = poll_s or ((0.002, 0.05) if database_of(engine).runs_in_process else (0.05, 5.0))
        policy = policy or RetryPolicy()
        self._workers = [
            IndexWorker(
                engine,
                Delivery(engine, name, *destination, page_size=page_size, lease_s=lease_s, policy=policy),
                Breaker(policy, random.random),
                poll_s,
            )
            for name, destination in destinations.items()
        ]
        self._notifier = notifier
        self._sweep = sweep
        self._retention = retention or Retention()
        self._clean_up_at = time.monotonic()
        self._folded_up_to = 0
        self._listener: Listener | None = None
        self._cleaner: CleanUpThread | None = None
        self._make_locks()
        forks.in_child(self, Relay._forked)

    def _make_locks(self) -> None:
        self._lock = threading.RLock()
        self._clean_up_lock = threading.Lock()

    def _forked(self) -> None:
        """Start without threads after a fork: they run only in the parent process."""
        self._make_locks()
        self._cleaner = None
        listener, self._listener = self._listener, None
        if listener is not None:
            listener.left_to_parent()

    # -- in the caller's thread --------------------------------------------------------------------------------------

    def run_once(self) -> int:
        """Deliver up to one page from each source (parked, new, refill) to each index. Return the number of keys.

        Raises DeliveryRetryable when an index or the embedder is unavailable. Nothing is lost: call again later.
        """
        succeeded = False
        try:
            count, failure = self._deliver_once()
            succeeded = failure is None
        finally:
            if not succeeded:
                self._stop_unless_running()  # this relay may never be called again
        if failure is not None:
            raise failure
        return count

    def drain(self, timeout: float = 30.0, *, progress: Callable[[int], None] | bool | None = None) -> int:
        """Deliver until every index holds all rows that are committed now. Return the number of keys.

        This call tries again when a delivery fails, but it does not wait for parked keys, which an index refused.
        *progress* is called after every page and every wait, with the number of keys so far; True shows a progress bar.
        Raises DeliveryError after *timeout* seconds, with the last failure as its cause.
        """
        deadline = time.monotonic() + timeout
        try:
            if callable(progress):
                return self._drain(deadline, timeout, progress)
            with reporting(progress, "delivering") as report:
                return self._drain(deadline, timeout, report and (lambda count: report(count, None)))
        finally:
            self._stop_unless_running()

    def _stop_unless_running(self) -> None:
        """Release the lease if no threads run, so that the next relay need not wait until it ends."""
        with self._lock:  # start() must not come between the check and the stop
            if not self.is_running:
                self.stop()

    def _drain(self, deadline: float, timeout: float, progress: Callable[[int], None] | None) -> int:
        require_no_transaction(self._engine)
        with self._engine.connect() as connection:
            present = read_present(connection)
        total, tell_at = 0, time.monotonic() + _TELL_AFTER_S
        while True:
            count, failure = self._deliver_once()
            total += count
            if progress is not None:
                progress(total)
            if failure is None and not self._has_more() and not self._behind(present):
                return total
            if failure is None and not count and time.monotonic() > tell_at:
                logger.warning("Still waiting: %s.", self._why_behind(present))
                tell_at = math.inf
            wait = 0.0 if count or self._has_more() else 0.02
            if failure is not None:
                wait = min(worker.breaker.wait_s(time.monotonic()) for worker in self._workers if worker.failure)
            if time.monotonic() + wait > deadline:
                reason = failure or self._why_behind(present)
                raise DeliveryError(f"The relay has not drained within {timeout:g} s: {reason}") from failure
            time.sleep(wait)

    def _deliver_once(self) -> tuple[int, DeliveryRetryable | None]:
        """Deliver one page of each source to each index. Return the number of keys, and the first failure.

        The failure of one index does not stop the others.
        """
        total, failure = 0, None
        require_no_transaction(self._engine)
        for worker in self._workers:
            try:
                total += worker.deliver(save=True) or 0
            except DeliveryRetryable as error:
                failure = failure or error
        self._clean_up()
        return total, failure

    def _clean_up(self) -> None:
        """Delete data that is no longer needed: once a minute, or again at once while there is more to delete.

        Each call is short, and does not wait for a call in another thread, because it runs in the delivery's thread.
        """
        if time.monotonic() < self._clean_up_at or not self._clean_up_lock.acquire(blocking=False):
            return
        try:
            self._clean_up_at = time.monotonic() + _CLEAN_UP_EVERY_S
            with forks.uninterrupted():
                count = self._clean_up_once()
            if count:
                self._clean_up_at = 0.0
        except Exception as error:  # noqa: BLE001  # a sweep runs the application's code, which must not stop delivery
            logger.warning("The clean-up failed and will be tried again (%s).", type(error).__name__)
        finally:
            self._clean_up_lock.release()

    def _clean_up_once(self) -> int:
        keep, jobs = self._retention, list[Callable[[Connection], int]]()
        if keep.index is not None:
            jobs.append(partial(retention.forget_idle_indexes, keep=keep.index))
        jobs.append(retention.forget_delivered if self._workers else retention.forget_unneeded)
        if keep.ledger is not None:
            jobs.append(partial(retention.forget_ledger, keep=keep.ledger))
        if keep.log is not None:
            jobs.append(partial(self._fold_log, keep=keep.log))
        count = 0 if self._sweep is None else self._sweep()
        for job in jobs:
            with self._engine.begin() as connection:
                count += job(connection)
        return count

    def _fold_log(self, connection: Connection, keep: timedelta) -> int:
        before = self._folded_up_to
        self._folded_up_to = retention.fold_log(connection, keep, before)
        return self._folded_up_to - before

    def counters(self) -> dict[str, Counters]:
        """The counters of each index since this relay was made."""
        return {worker.delivery.name: worker.delivery.slot_worker.counters for worker in self._workers}

    def problems(self) -> dict[str, str]:
        """The indexes whose last delivery failed, with the reason."""
        return {
            worker.delivery.name: describe(worker.failure) for worker in self._workers if worker.failure is not None
        }

    # -- operation ---------------------------------------------------------------------------------------------------

    def pause(self, *indexes: str) -> None:
        """Stop the delivery to *indexes* (default: all) in every relay of every process, until `resume`.

        Commits go on. A search still finds undelivered rows, within its limits.
        """
        self._run_for(indexes, partial(deadletters.set_paused, paused=True))

    def resume(self, *indexes: str) -> None:
        """End a `pause` of *indexes* (default: all)."""
        self._run_for(indexes, partial(deadletters.set_paused, paused=False))
        self.wake()

    def dead(self, *indexes: str, limit: int = 1000) -> list[DeadLetter]:
        """The keys that *indexes* (default: all) refused too often."""
        letters = self._run_for(indexes, partial(deadletters.read_dead, limit=limit))
        return list(chain.from_iterable(letters))

    def retry_dead(self, *indexes: str, keys: Collection[str] | None = None) -> int:
        """Try the dead keys in *keys* (default: all) again. Return their number.

        A key is written as in `DeadLetter.key`, or with its entity before it, as in log lines: ``preference[7]``.
        """
        count = sum(self._run_for(indexes, partial(deadletters.retry_dead, keys=keys)))
        self.wake()
        return count

    def drop_dead(self, *indexes: str, keys: Collection[str] | None = None) -> int:
        """Drop the dead keys in *keys* (default: all). Return their number. A change of a row delivers it again."""
        return sum(self._run_for(indexes, partial(deadletters.drop_dead, keys=keys)))

    def _run_for(self, names: Collection[str], work: Callable[[Connection, IndexKey], T]) -> list[T]:
        """Run *work* for each index in *names* (default: all), in one transaction per index. Return the results."""
        unknown = [name for name in names if name not in self._destinations]
        if unknown:
            raise MemstateError(f"Unknown index {unknown[0]!r}. This relay has: {', '.join(self._destinations)}.")
        require_no_transaction(self._engine)
        results = []
        for worker in self._workers:
            if not names or worker.delivery.name in names:
                key = worker.delivery.open()
                with self._engine.begin() as connection:
                    results.append(work(connection, key))
        return results

    def _has_more(self) -> bool:
        return any(worker.delivery.slot_worker.more for worker in self._workers)

    def _behind(self, present: Position) -> list[str]:
        with self._engine.connect() as connection:
            return [
                name
                for name, (destination, tracked) in self._destinations.items()
                if not backlog.is_delivered(
                    connection, IndexKey(name, destination.index.incarnation), _delivered_entities(tracked()), present
                )
            ]

    def _why_behind(self, present: Position) -> str:
        reasons = []
        for name in self._behind(present):
            destination, read_classes = self._destinations[name]
            key, classes = IndexKey(name, destination.index.incarnation), read_classes()
            with self._engine.connect() as connection:
                index_backlog = backlog.backlog(connection, key, _delivered_entities(classes))
                own_projections = {entity: tracked.projection for entity, tracked in classes.items()}
                foreign = projections.differing(connection, key, own_projections)
            reason = "it is paused" if index_backlog.paused else "another relay may hold its lease"
            if foreign:
                reason = f"a relay of another release delivers {', '.join(sorted(foreign))} in another projection"
            reasons.append(f"{index_backlog.pending} keys are pending for {name!r} ({reason})")
        return ", ".join(reasons)

    # -- in the background -------------------------------------------------------------------------------------------

    def start(self) -> Self:
        """Run in daemon threads, one for each index.

        Raises IndexMismatch if another embedder has filled an index. Raises MemstateError on an in-memory SQLite
        database: it has only one connection, and a background transaction would end the application's.
        """
        if is_in_memory(self._engine):
            raise MemstateError(
                "Cannot start the relay in the background: it needs its own connection, and an in-memory SQLite "
                "database has only one. Call drain() after commits, or use a database file."
            )
        with self._lock:
            if not self.is_running:
                for worker in self._workers:
                    worker.open()
                if not self._workers:
                    self._cleaner = CleanUpThread(self._clean_up)
                    return self
                self._listener = Listener(self._engine, self.wake, self._notifier)
                for worker in self._workers:
                    worker.start(self._clean_up)
        return self

    def stop(self, timeout: float = STOP_TIMEOUT_S) -> None:
        """Finish the current batch, and let other relays take over at once.

        This call waits at most *timeout* seconds. If a call of an index or embedder takes longer, a daemon thread
        finishes the batch and releases the lease. Nothing is lost if the process ends before that.
        """
        deadline = time.monotonic() + timeout
        for worker in self._workers:
            worker.ask_to_stop()
        with self._lock:
            if self._listener is not None:
                self._listener.close(timeout)
                self._listener = None
            if self._cleaner is not None:
                self._cleaner.stop(deadline)
                self._cleaner = None
            with ExitStack() as stack:  # this stops all workers, even if one raises
                for worker in self._workers:
                    stack.callback(worker.stop, deadline)

    def after_stop(self, index: str, call: Callable[[], None]) -> None:
        """Make *call* when this relay no longer uses *index*: now, or in the thread that `stop` has left running."""
        for worker in self._workers:
            if worker.delivery.name == index:
                worker.after_stop(call)
                return
        call()

    def wake(self) -> None:
        """Make the background threads read the database now, because something was committed."""
        for worker in self._workers:
            worker.woken.set()

    @property
    def is_running(self) -> bool:
        """Whether this relay runs in the background."""
        return self._cleaner is not None or any(worker.is_running for worker in self._workers)

    def __repr__(self) -> str:
        problems = self.problems()
        delivered = (
            f"{name}: {counters.converged} delivered{f', {problems[name]}' if name in problems else ''}"
            for name, counters in self.counters().items()
        )
        return summary(self, "running" if self.is_running else "not running", *delivered)

    def __enter__(self) -> Self:
        return self.start()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.stop()


def _delivered_entities(classes: Mapping[str, Tracked]) -> list[str]:
    """The entities of *classes* that an index must hold."""
    return [entity for entity, tracked in classes.items() if not tracked.withdrawn]
