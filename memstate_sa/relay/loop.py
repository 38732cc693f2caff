"""`Relay`: the loop around the deliveries of every index, in the caller's thread or in one of each index's own."""

from __future__ import annotations

import logging
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
from sqlalchemy.exc import SQLAlchemyError

from memstate_sa.db.sqlite import is_in_memory, require_no_transaction
from memstate_sa.embedding.batches import Destination
from memstate_sa.errors import DeliveryError, DeliveryRetryable, MemstateError
from memstate_sa.log.outbox import read_present
from memstate_sa.log.positions import Position
from memstate_sa.relay import backlog, deadletters, projections, retention
from memstate_sa.relay.deadletters import DeadLetter
from memstate_sa.relay.delivery import Delivery
from memstate_sa.relay.index_key import IndexKey
from memstate_sa.relay.protocol import Counters
from memstate_sa.relay.retention import Retention
from memstate_sa.relay.retry import Breaker, RetryPolicy, describe
from memstate_sa.relay.wakeup import Changes, Listener, Notifier
from memstate_sa.runtime import forks
from memstate_sa.runtime.printable import printable_logger
from memstate_sa.tracking.tracked import Tracked

logger = printable_logger("memstate_sa.relay")

T = TypeVar("T")

STOP_TIMEOUT_S = 5.0
"""So long a relay that stops waits for a call under way. Docker, for example, kills a process after ten seconds."""

_FORGET_EVERY_S = 60.0
_LONGEST_PAUSE_S = 0.1


class Relay:
    """Converges the indexes of a Memory to the committed rows of one database.

    Any number may run, in any number of processes: on PostgreSQL they share the keys of each index between them; on
    SQLite one of them delivers, the others stand by. Thread-safe. As a context manager it runs in the background.
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
        """See the options below; all times are in seconds.

        *page_size*: keys converged at a time. *lease_s*: how long others wait for a holder that died elsewhere; a
        single call of index or embedder should take no longer.
        *poll_s*: the shortest and the longest wait between two looks at an idle database (default: 2 to 50 ms on
        SQLite, where a look is a PRAGMA; 50 ms to 5 s on PostgreSQL); a commit in this process is seen at once.
        *policy*: when to try again, and how often. *retention*: how long log and ledger are kept (default: for ever).
        *sweep* deletes what has expired, now and then, and says how much that was.
        *notifier* tells other processes of this one's commits; what it sends is no news here.
        """
        if engine.dialect.name == "postgresql":
            # Each statement has to see what is committed; and locks have to last until the end of a transaction.
            engine = engine.execution_options(isolation_level="READ COMMITTED")
        self._engine = engine
        self._destinations = destinations
        poll_s = poll_s or ((0.002, 0.05) if engine.dialect.name == "sqlite" else (0.05, 5.0))
        policy = policy or RetryPolicy()
        self._couriers = [
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
        self._forget_at = time.monotonic()
        self._folded = 0
        self._listener: Listener | None = None
        self._make_locks()
        forks.in_child(self, Relay._forked)

    def _make_locks(self) -> None:
        self._lock = threading.RLock()
        self._forget_lock = threading.Lock()

    def _forked(self) -> None:
        """Begin without threads: those are the parent's."""
        self._make_locks()
        listener, self._listener = self._listener, None
        if listener is not None:
            listener.left_to_parent()

    # -- in the caller's thread --------------------------------------------------------------------------------------

    def run_once(self) -> int:
        """Deliver up to a page from each source (parked, new, refill) to each index; returns the keys converged.

        Raises DeliveryRetryable when an index or the embedder is unavailable: nothing is lost, call again later.
        """
        succeeded = False
        try:
            count, failure = self._step()
            succeeded = failure is None
        finally:
            if not succeeded:
                self._let_go()  # this relay may never be called again
        if failure is not None:
            raise failure
        return count

    def drain(self, timeout: float = 30.0, *, progress: Callable[[int], None] | None = None) -> int:
        """Deliver until every index holds what is committed now, waiting out failures; returns the keys converged.

        Parked keys (refused by an index) are not waited for. *progress* is called after every page, and every wait,
        with the keys converged so far. Raises DeliveryError after *timeout* seconds, with the last failure as its
        cause.
        """
        try:
            return self._drain(time.monotonic() + timeout, timeout, progress)
        finally:
            self._let_go()

    def _let_go(self) -> None:
        """Unless threads go on: whoever comes next need not wait for the lease to run out."""
        with self._lock:  # start() comes before this look, or after what follows from it
            if not self._running:
                self.stop()

    def _drain(self, deadline: float, timeout: float, progress: Callable[[int], None] | None) -> int:
        require_no_transaction(self._engine)
        with self._engine.connect() as connection:
            present = read_present(connection)
        total = 0
        while True:
            count, failure = self._step()
            total += count
            if progress is not None:
                progress(total)
            if failure is None and not self._has_more() and not self._behind(present):
                return total
            wait = 0.0 if count else 0.02
            if failure is not None:
                wait = min(courier.breaker.wait_s(time.monotonic()) for courier in self._couriers if courier.failure)
            if time.monotonic() + wait > deadline:
                reason = failure or self._why_behind(present)
                raise DeliveryError(f"not drained within {timeout:g} s: {reason}") from failure
            time.sleep(wait)

    def _step(self) -> tuple[int, DeliveryRetryable | None]:
        """One page of each source for each index: the keys converged, and the first failure. One stops no other."""
        total, failure = 0, None
        require_no_transaction(self._engine)
        for courier in self._couriers:
            try:
                total += courier.step(save=True) or 0
            except DeliveryRetryable as error:
                failure = failure or error
        self._forget()
        return total, failure

    def _forget(self) -> None:
        """Delete what has expired, what every index has, what need not be kept: now and then, and while there is more.

        Never for long, and never waited for: it is delivery's thread.
        """
        if time.monotonic() < self._forget_at or not self._forget_lock.acquire(blocking=False):
            return
        try:
            self._forget_at = time.monotonic() + _FORGET_EVERY_S
            with forks.uninterrupted():
                forgotten = self._forget_some()
            if forgotten:
                self._forget_at = 0.0
        except Exception as error:  # noqa: BLE001  # a sweep runs the application's code; delivery goes on
            logger.warning("nothing was forgotten (%s)", type(error).__name__)
        finally:
            self._forget_lock.release()

    def _forget_some(self) -> int:
        keep, jobs = self._retention, list[Callable[[Connection], int]]()
        if keep.index is not None:
            jobs.append(partial(retention.forget_idle_indexes, keep=keep.index))
        jobs.append(retention.forget_delivered)
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
        before = self._folded
        self._folded = retention.fold_log(connection, keep, before)
        return self._folded - before

    def counters(self) -> dict[str, Counters]:
        """What this relay has done for each index since it was made."""
        return {courier.delivery.name: courier.delivery.holder.counters for courier in self._couriers}

    def problems(self) -> dict[str, str]:
        """Indexes whose last delivery failed, with why."""
        return {
            courier.delivery.name: describe(courier.failure)
            for courier in self._couriers
            if courier.failure is not None
        }

    # -- operation ---------------------------------------------------------------------------------------------------

    def pause(self, *indexes: str) -> None:
        """Have every relay, in every process, leave *indexes* (default: all) alone until `resume`.

        Commits go on, and search finds what is undelivered, as far as its bounds go.
        """
        self._for_each(indexes, partial(deadletters.set_paused, paused=True))

    def resume(self, *indexes: str) -> None:
        self._for_each(indexes, partial(deadletters.set_paused, paused=False))
        self.wake()

    def dead(self, *indexes: str, limit: int = 1000) -> list[DeadLetter]:
        """The keys that *indexes* (default: all) refused too often."""
        letters = self._for_each(indexes, partial(deadletters.read_dead, limit=limit))
        return list(chain.from_iterable(letters))

    def retry_dead(self, *indexes: str, keys: Collection[str] | None = None) -> int:
        """Try dead keys again, those in *keys* or all; returns how many.

        A key is given as in `DeadLetter.key`, or with its entity before it, as logs name it: ``preference[7]``.
        """
        count = sum(self._for_each(indexes, partial(deadletters.retry_dead, keys=keys)))
        self.wake()
        return count

    def drop_dead(self, *indexes: str, keys: Collection[str] | None = None) -> int:
        """Forget dead keys, those in *keys* or all; returns how many. They are tried again when their rows change."""
        return sum(self._for_each(indexes, partial(deadletters.drop_dead, keys=keys)))

    def _for_each(self, names: Collection[str], work: Callable[[Connection, IndexKey], T]) -> list[T]:
        """What *work* returns for each index of these *names* (default: all), in a transaction of its own."""
        unknown = [name for name in names if name not in self._destinations]
        if unknown:
            raise MemstateError(f"no index {unknown[0]!r}; there are: {', '.join(self._destinations)}")
        require_no_transaction(self._engine)
        results = []
        for courier in self._couriers:
            if not names or courier.delivery.name in names:
                key = courier.delivery.open()
                with self._engine.begin() as connection:
                    results.append(work(connection, key))
        return results

    def _has_more(self) -> bool:
        return any(courier.delivery.holder.more for courier in self._couriers)

    def _behind(self, present: Position) -> list[str]:
        with self._engine.connect() as connection:
            return [
                name
                for name, (destination, tracked) in self._destinations.items()
                if not backlog.has(connection, IndexKey(name, destination.index.incarnation), _kept(tracked()), present)
            ]

    def _why_behind(self, present: Position) -> str:
        behind = []
        for name in self._behind(present):
            destination, tracked = self._destinations[name]
            key, classes = IndexKey(name, destination.index.incarnation), tracked()
            with self._engine.connect() as connection:
                left = backlog.backlog(connection, key, _kept(classes))
                wanted = {entity: each.projection for entity, each in classes.items()}
                others = projections.differing(connection, key, wanted)
            why = "it is paused" if left.paused else "is another relay holding its lease?"
            if others:
                why = f"a relay of another release delivers {', '.join(sorted(others))} otherwise"
            behind.append(f"{left.pending} keys pending for {name!r} ({why})")
        return ", ".join(behind)

    # -- in the background -------------------------------------------------------------------------------------------

    def start(self) -> Self:
        """Run in daemon threads, one for each index. Raises MemstateError on an in-memory SQLite, and IndexMismatch.

        An in-memory database has one connection: a background transaction would end the application's.
        """
        if is_in_memory(self._engine):
            raise MemstateError(
                "a background relay needs a connection of its own, which an in-memory SQLite does not have: call "
                "drain() after commits, or use a file"
            )
        with self._lock:
            if not self._running:
                for courier in self._couriers:
                    courier.open()
                self._listener = Listener(self._engine, self.wake, self._notifier)
                for courier in self._couriers:
                    courier.start(self._forget)
        return self

    def stop(self, timeout: float = STOP_TIMEOUT_S) -> None:
        """Finish the batch in work, and let other relays take over at once.

        Waits *timeout* seconds at most. A call of an index or embedder that takes longer is left to a daemon thread,
        which finishes its batch and lets go of the lease. Nothing is lost if the process ends before.
        """
        deadline = time.monotonic() + timeout
        for courier in self._couriers:
            courier.ask_to_stop()
        with self._lock:
            if self._listener is not None:
                self._listener.close(timeout)
                self._listener = None
            with ExitStack() as stack:  # all of them, whatever one raises
                for courier in self._couriers:
                    stack.callback(courier.stop, deadline)

    def after_stop(self, index: str, call: Callable[[], None]) -> None:
        """Make *call* when nothing of this relay uses *index* any more: now, or in the thread that `stop` has left."""
        for courier in self._couriers:
            if courier.delivery.name == index:
                courier.after_stop(call)
                return
        call()

    def wake(self) -> None:
        """Look now: something was committed."""
        for courier in self._couriers:
            courier.woken.set()

    @property
    def _running(self) -> bool:
        return any(courier.is_running for courier in self._couriers)

    def __enter__(self) -> Self:
        return self.start()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.stop()


def _kept(classes: Mapping[str, Tracked]) -> list[str]:
    """The entities that an index is to hold."""
    return [entity for entity, tracked in classes.items() if not tracked.withdrawn]


class IndexWorker:
    """The delivery to one index, called by one thread at a time, with a thread of its own in the background."""

    def __init__(self, engine: Engine, delivery: Delivery, breaker: Breaker, poll_s: tuple[float, float]) -> None:
        self.delivery = delivery
        self.breaker = breaker
        self.failure: Exception | None = None
        self.woken = threading.Event()
        self._engine = engine
        self._poll_s = poll_s
        self._begin()
        forks.in_child(self, IndexWorker._begin)

    def _begin(self) -> None:
        """Without a thread. In a forked child, too: another thread of the parent may have had the lock."""
        self.woken = threading.Event()
        self._lock = threading.RLock()
        self._work: _Work | None = None
        self._left: _Work | None = None

    def open(self) -> None:
        try:
            self.delivery.open()
        except DeliveryRetryable as error:  # it may come up later
            logger.warning("%s: %s", self.delivery.name, error)

    def step(self, *, save: bool = False) -> int | None:
        holder = self.delivery.holder
        with self._lock:
            before = holder.counters.converged
            try:
                count = self.delivery.step()
                if save:
                    self.delivery.save()
            except Exception as error:
                if holder.counters.converged > before:
                    self.breaker.succeeded()  # it failed after some success: a new failure
                self._failed(error)
                raise
            self.breaker.succeeded()
            self.failure = None
            return count

    def _failed(self, error: Exception) -> None:
        self.failure = error
        wait = self.breaker.failed(error, time.monotonic())
        known = isinstance(error, (MemstateError, SQLAlchemyError))
        what = str(error) if isinstance(error, MemstateError) else type(error).__name__
        if isinstance(error, SQLAlchemyError):
            what = f"the database: {what}"
        logger.log(
            logging.WARNING if known else logging.ERROR,
            "%s: delivery failed (%s), next attempt in %.1f s",
            self.delivery.name,
            what,
            wait,
            exc_info=None if known else error,
        )

    # -- in the background -------------------------------------------------------------------------------------------

    @property
    def is_running(self) -> bool:
        return self._work is not None and not self._work.is_over

    def start(self, forget: Callable[[], None]) -> None:
        self.delivery.holder.stopping = False
        self._work = _Work(f"memstate-relay-{self.delivery.name}", partial(self._run, forget))

    def ask_to_stop(self) -> None:
        if self._work is not None:
            self._work.stopping.set()
        self.delivery.holder.stopping = True
        self.woken.set()

    def stop(self, deadline: float) -> None:
        self.ask_to_stop()  # again: start() may have come between
        work, self._work = self._work or self._left, None
        if work is not None:
            work.join(deadline)
            if work.afterwards(self._release):
                self._left = work
                logger.warning(
                    "%s: the index or the embedder does not answer; its thread ends when it does", self.delivery.name
                )
                return
        if self._lock.acquire(timeout=max(0.0, deadline - time.monotonic())):  # else a run_once() is under way
            try:
                self._release()
            finally:
                self._lock.release()

    def after_stop(self, call: Callable[[], None]) -> None:
        if self._left is None or not self._left.afterwards(call):
            call()

    def _release(self) -> None:
        with self._lock:
            if self._work is not None:  # it was started again, and goes on with the same lease
                return
            self.delivery.holder.stopping = False
            try:
                self.delivery.release()
            except SQLAlchemyError as error:  # the database is away: the lease runs out by itself
                logger.warning("%s: not released (%s)", self.delivery.name, type(error).__name__)
                self.delivery.holder.forget()

    def _run(self, forget: Callable[[], None], stopping: threading.Event) -> None:
        changes = Changes(self._engine)
        idle = self._poll_s[0]
        try:
            while not stopping.is_set():
                try:
                    idle = self._once(forget, changes, idle, stopping)
                except Exception as error:  # noqa: BLE001  # whatever it is, the next look may succeed; nothing is lost
                    if error is not self.failure:
                        self._failed(error)
        finally:
            changes.close()

    def _once(self, forget: Callable[[], None], changes: Changes, idle: float, stopping: threading.Event) -> float:
        """A step, and the pause after it; how long to wait after the next one that finds nothing."""
        self.woken.clear()
        began = time.thread_time()
        wait = self.breaker.wait_s(time.monotonic())
        if wait > 0:
            stopping.wait(min(wait, 1.0))
            self._keep()
            return idle
        count = self.step()
        forget()
        if count is None:
            return self._wait_for_work(changes, idle, stopping)
        if self.delivery.holder.more:
            return self._poll_s[0]
        if self.woken.is_set():
            # The application commits faster than this delivers, in the same process: leave it four times the time that
            # was taken, and find more to do at once. An idle relay answers immediately.
            stopping.wait(min(4 * (time.thread_time() - began), _LONGEST_PAUSE_S))
        return self._wait_for_work(changes, self._poll_s[0], stopping)

    def _keep(self) -> None:
        """A lease that cannot be renewed is no failure of the index: it must not keep it closed for longer."""
        try:
            with self._lock:
                self.delivery.keep()
        except (MemstateError, SQLAlchemyError) as error:
            logger.debug("%s: the lease was not renewed: %s", self.delivery.name, type(error).__name__)

    def _wait_for_work(self, changes: Changes, wait: float, stopping: threading.Event) -> float:
        """Until something was committed here or elsewhere, or it is time for another look; the next wait."""
        shortest, longest = self._poll_s
        look_at = min(time.monotonic() + max(longest, 1.0), self.delivery.holder.due_at)
        while not stopping.is_set():
            left = look_at - time.monotonic()
            if self.woken.wait(max(0.0, min(wait, left))):
                return shortest
            wait = min(wait * 1.5, longest)
            if changes.seen() or left <= 0:
                return wait
        return wait


class _Work:
    """What one thread does until it is asked to stop, and what is to be done after it."""

    def __init__(self, name: str, work: Callable[[threading.Event], None]) -> None:
        self.stopping = threading.Event()
        self._ending = threading.Lock()
        self._afterwards: list[Callable[[], None]] | None = []
        self._thread = threading.Thread(target=self._run, args=(work,), name=name, daemon=True)
        self._thread.start()

    def _run(self, work: Callable[[threading.Event], None]) -> None:
        try:
            work(self.stopping)
        finally:
            with self._ending:
                calls, self._afterwards = self._afterwards or [], None
            for call in calls:
                call()

    @property
    def is_over(self) -> bool:
        return self._afterwards is None or not self._thread.is_alive()

    def join(self, deadline: float) -> None:
        self._thread.join(max(0.0, deadline - time.monotonic()))

    def afterwards(self, call: Callable[[], None]) -> bool:
        """Have this thread make *call* at its end. Returns False when it has ended."""
        with self._ending:
            if self._afterwards is None:
                return False
            self._afterwards.append(call)
            return True
