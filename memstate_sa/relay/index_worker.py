"""`IndexWorker`: runs the delivery to one index, in the caller's thread or in a background thread."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable
from functools import partial

from sqlalchemy.engine import Engine
from sqlalchemy.exc import SQLAlchemyError

from memstate_sa.errors import DeliveryRetryable, MemstateError
from memstate_sa.relay.delivery import Delivery
from memstate_sa.relay.retry import Breaker
from memstate_sa.relay.wakeup import Changes
from memstate_sa.runtime import forks
from memstate_sa.runtime.printable import printable_logger

logger = printable_logger("memstate_sa.relay")
_LONGEST_PAUSE_S = 0.1


class IndexWorker:
    """The delivery to one index, by one thread at a time: the caller's, or a background thread."""

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
        """Begin without a thread. A forked child begins again: another thread of the parent may have had the lock."""
        self.woken = threading.Event()
        self._lock = threading.RLock()
        self._thread: _WorkerThread | None = None
        self._unjoined_thread: _WorkerThread | None = None

    def open(self) -> None:
        try:
            self.delivery.open()
        except DeliveryRetryable as error:  # the index may become available later
            logger.warning("index %s: %s", self.delivery.name, error)

    def deliver(self, *, save: bool = False) -> int | None:
        counters = self.delivery.slot_worker.counters
        with self._lock:
            converged_before = counters.converged
            try:
                count = self.delivery.deliver()
                if save:
                    self.delivery.save()
            except Exception as error:
                if counters.converged > converged_before:
                    self.breaker.succeeded()  # keys were delivered before the failure: count it as the first
                self._failed(error)
                raise
            self.breaker.succeeded()
            if self.failure is not None:
                logger.info("index %s: The delivery works again.", self.delivery.name)
            self.failure = None
            return count

    def _failed(self, error: Exception) -> None:
        self.failure = error
        wait = self.breaker.failed(error, time.monotonic())
        is_known = isinstance(error, (MemstateError, SQLAlchemyError))
        reason = str(error) if isinstance(error, MemstateError) else type(error).__name__
        if isinstance(error, SQLAlchemyError):
            reason = f"the database: {reason}"
        logger.log(
            logging.WARNING if is_known else logging.ERROR,
            "index %s: The delivery failed (%s). The next attempt is in %.1f s.",
            self.delivery.name,
            reason,
            wait,
            exc_info=None if is_known else error,
        )

    # -- in the background -------------------------------------------------------------------------------------------

    @property
    def is_running(self) -> bool:
        return self._thread is not None and not self._thread.is_over

    def start(self, clean_up: Callable[[], None]) -> None:
        """Deliver in a thread. It calls *clean_up* after every delivery."""
        self.delivery.slot_worker.stopping = False
        self._thread = _WorkerThread(f"memstate-relay-{self.delivery.name}", partial(self._run, clean_up))

    def ask_to_stop(self) -> None:
        if self._thread is not None:
            self._thread.stopping.set()
        self.delivery.slot_worker.stopping = True
        self.woken.set()

    def stop(self, deadline: float) -> None:
        self.ask_to_stop()  # start() may have been called since the relay asked
        thread, self._thread = self._thread or self._unjoined_thread, None
        if thread is not None:
            thread.join(deadline)
            if thread.call_at_end(self._release):
                self._unjoined_thread = thread
                logger.warning(
                    "index %s: The index or the embedder does not answer. The relay's thread ends when it does.",
                    self.delivery.name,
                )
                return
        if self._lock.acquire(timeout=max(0.0, deadline - time.monotonic())):  # run_once() may hold the lock
            try:
                self._release()
            finally:
                self._lock.release()

    def after_stop(self, call: Callable[[], None]) -> None:
        if self._unjoined_thread is None or not self._unjoined_thread.call_at_end(call):
            call()

    def _release(self) -> None:
        with self._lock:
            if self._thread is not None:  # the relay was started again, and keeps the same lease
                return
            self.delivery.slot_worker.stopping = False
            try:
                self.delivery.release()
            except SQLAlchemyError as error:  # the database is unavailable: the lease ends by itself
                logger.warning("index %s: Could not release the lease (%s).", self.delivery.name, type(error).__name__)
                self.delivery.slot_worker.reset()

    def _run(self, clean_up: Callable[[], None], stopping: threading.Event) -> None:
        changes = Changes(self._engine)
        wait = self._poll_s[0]
        try:
            while not stopping.is_set():
                try:
                    wait = self._deliver_and_wait(clean_up, changes, wait, stopping)
                except Exception as error:  # noqa: BLE001  # nothing is lost, and the next attempt may succeed
                    if error is not self.failure:
                        self._failed(error)
        finally:
            changes.close()

    def _deliver_and_wait(
        self, clean_up: Callable[[], None], changes: Changes, wait: float, stopping: threading.Event
    ) -> float:
        """Deliver a page from each source, then pause. Return the time to wait when there is nothing to do."""
        self.woken.clear()
        began = time.thread_time()
        breaker_wait = self.breaker.wait_s(time.monotonic())
        if breaker_wait > 0:
            stopping.wait(min(breaker_wait, 1.0))
            self._keep()
            return wait
        count = self.deliver()
        clean_up()
        if count is None:
            return self._wait_for_work(changes, wait, stopping)
        if self.delivery.slot_worker.more:
            return self._poll_s[0]
        if self.woken.is_set():
            # The application in this process commits faster than we deliver. Give it four times the time that the
            # delivery took. The next page is then larger. An idle relay does not pause.
            stopping.wait(min(4 * (time.thread_time() - began), _LONGEST_PAUSE_S))
        return self._wait_for_work(changes, self._poll_s[0], stopping)

    def _keep(self) -> None:
        """Renew the lease. A failure is not the index's fault, so it must not keep the breaker open."""
        try:
            with self._lock:
                self.delivery.keep()
        except (MemstateError, SQLAlchemyError) as error:
            logger.debug("index %s: Could not renew the lease (%s).", self.delivery.name, type(error).__name__)

    def _wait_for_work(self, changes: Changes, wait: float, stopping: threading.Event) -> float:
        """Wait for a commit in any process, or until the database must be read anyway. Return the next wait."""
        shortest, longest = self._poll_s
        look_at = min(time.monotonic() + max(longest, 1.0), self.delivery.slot_worker.due_at)
        while not stopping.is_set():
            remaining = look_at - time.monotonic()
            if self.woken.wait(max(0.0, min(wait, remaining))):
                return shortest
            wait = min(wait * 1.5, longest)
            if changes.seen() or remaining <= 0:
                return wait
        return wait


class _WorkerThread:
    """A thread that works until it is asked to stop, and then makes some last calls."""

    def __init__(self, name: str, work: Callable[[threading.Event], None]) -> None:
        self.stopping = threading.Event()
        self._ending = threading.Lock()
        self._calls_at_end: list[Callable[[], None]] | None = []
        self._thread = threading.Thread(target=self._run, args=(work,), name=name, daemon=True)
        self._thread.start()

    def _run(self, work: Callable[[threading.Event], None]) -> None:
        try:
            work(self.stopping)
        finally:
            with self._ending:
                calls, self._calls_at_end = self._calls_at_end or [], None
            for call in calls:
                call()

    @property
    def is_over(self) -> bool:
        return self._calls_at_end is None or not self._thread.is_alive()

    def join(self, deadline: float) -> None:
        self._thread.join(max(0.0, deadline - time.monotonic()))

    def call_at_end(self, call: Callable[[], None]) -> bool:
        """Add *call* to the calls at the thread's end. Return False if the thread has ended already."""
        with self._ending:
            if self._calls_at_end is None:
                return False
            self._calls_at_end.append(call)
            return True
