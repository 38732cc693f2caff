"""`Relay`: the loop around the deliveries of every index, in the caller's thread or in one of its own."""

from __future__ import annotations

import logging
import random
import threading
import time
from collections.abc import Mapping
from types import TracebackType
from typing import Any, Self

from sqlalchemy import text
from sqlalchemy.engine import Engine
from sqlalchemy.exc import SQLAlchemyError

from memstate_sa.errors import DeliveryError, DeliveryRetryable, MemstateError
from memstate_sa.facts import Tracked
from memstate_sa.indexes.base import VectorIndex
from memstate_sa.relay import state
from memstate_sa.relay.delivery import Delivery
from memstate_sa.relay.plan import RetryPolicy
from memstate_sa.relay.state import IndexKey
from memstate_sa.sqlite import is_in_memory, open_transaction
from memstate_sa.vectors import Vectors

logger = logging.getLogger("memstate_sa.relay")

_FORGET_EVERY_S = 60.0
_LONGEST_PAUSE_S = 0.25


class Relay:
    """Converges the indexes of a Memory to the committed rows of one database.

    Any number may run, in any number of processes: one at a time holds the lease of an index, the others stand by.
    Thread-safe. As a context manager it runs in the background.
    """

    def __init__(
        self,
        engine: Engine,
        indexes: Mapping[str, tuple[VectorIndex, Mapping[str, Tracked]]],
        vectors: Vectors,
        *,
        page_size: int = 1000,
        lease_s: float = 30.0,
        poll_s: tuple[float, float] | None = None,
        policy: RetryPolicy | None = None,
    ) -> None:
        """See the options below; all times are in seconds.

        *page_size*: keys converged at a time. *lease_s*: how long others wait for a holder that died elsewhere.
        *poll_s*: the shortest and the longest wait between two looks at an idle database (default: 2 to 50 ms on
        SQLite, where a look is a PRAGMA; 50 ms to 5 s on PostgreSQL); a commit in this process is seen at once.
        """
        self._engine = engine
        self._indexes = indexes
        self._page_size = page_size
        self._policy = policy or RetryPolicy()
        self._poll_s = poll_s or ((0.002, 0.05) if engine.dialect.name == "sqlite" else (0.05, 5.0))
        self._deliveries = [
            Delivery(engine, name, index, tracked, vectors, page_size=page_size, lease_s=lease_s, policy=self._policy)
            for name, (index, tracked) in indexes.items()
        ]
        self._lock = threading.RLock()
        self._woken = threading.Event()
        self._stopping = threading.Event()
        self._thread: threading.Thread | None = None
        self._forget_at = time.monotonic() + _FORGET_EVERY_S

    # -- in the caller's thread --------------------------------------------------------------------------------------

    def run_once(self) -> int:
        """Deliver up to a page from each source (parked, new, refill) to each index; returns the keys converged.

        Raises DeliveryRetryable when an index or the embedder is unavailable: nothing is lost, call again later.
        """
        return self._step() or 0

    def drain(self, timeout: float = 30.0) -> int:
        """Deliver until every index holds what is committed now, waiting out failures; returns the keys converged.

        Parked keys (refused by an index) are not waited for. Raises DeliveryError after *timeout* seconds, with the
        last failure as its cause.
        """
        try:
            return self._drain(time.monotonic() + timeout, timeout)
        finally:
            if self._thread is None:
                self.stop()  # whoever comes next need not wait for the lease to run out

    def _drain(self, deadline: float, timeout: float) -> int:
        total, failures = 0, 0
        last: DeliveryRetryable | None = None
        while True:
            try:
                count = self._step()
            except DeliveryRetryable as error:
                last = error
                failures += 1
                wait = error.retry_after_s or self._policy.delay(failures, random.random)
            else:
                if count is None and not self._behind():
                    return total
                total += count or 0
                wait, failures = (0.02, 0) if count is None else (0.0, 0)
            if time.monotonic() + wait > deadline:
                raise DeliveryError(f"not drained within {timeout:g} s: {last or self._why_behind()}") from last
            time.sleep(wait)

    def _step(self) -> int | None:
        with self._lock:
            if is_in_memory(self._engine) and open_transaction(self._engine):
                raise MemstateError(
                    "a transaction is open on the only connection of this in-memory SQLite: commit it before draining"
                )
            counts, failure = [], None
            for delivery in self._deliveries:  # an index that is down must not stop the others
                try:
                    counts.append(delivery.step())
                except DeliveryRetryable as error:
                    failure = failure or error
            if time.monotonic() >= self._forget_at:
                self._forget_at = time.monotonic() + _FORGET_EVERY_S
                with self._engine.begin() as connection:
                    state.forget_delivered(connection)
        if failure is not None:
            raise failure
        done = [count for count in counts if count is not None]
        return sum(done) if done else None

    def _backlogs(self) -> dict[str, state.Backlog]:
        with self._engine.connect() as connection:
            return {
                name: state.backlog(connection, IndexKey(name, index.incarnation), list(tracked))
                for name, (index, tracked) in self._indexes.items()
            }

    def _behind(self) -> bool:
        return any(backlog.pending or backlog.refilling for backlog in self._backlogs().values())

    def _why_behind(self) -> str:
        return ", ".join(
            f"{backlog.pending} keys pending for {name!r} (is another relay holding its lease?)"
            for name, backlog in self._backlogs().items()
        )

    # -- in the background -------------------------------------------------------------------------------------------

    def start(self) -> Self:
        """Run in a daemon thread. Raises MemstateError on an in-memory SQLite, and IndexMismatch.

        An in-memory database has one connection: a background transaction would end the application's.
        """
        if is_in_memory(self._engine):
            raise MemstateError(
                "a background relay needs a connection of its own, which an in-memory SQLite does not have: call "
                "drain() after commits, or use a file"
            )
        with self._lock:
            if self._thread is None:
                for delivery in self._deliveries:
                    try:
                        delivery.open()
                    except DeliveryRetryable as error:  # it may come up later
                        logger.warning("%s: %s", delivery.name, error)
                self._stopping.clear()
                self._thread = threading.Thread(target=self._run, name="memstate-relay", daemon=True)
                self._thread.start()
        return self

    def stop(self) -> None:
        """Finish the page in work, and let another relay take over at once."""
        self._stopping.set()
        self._woken.set()
        thread, self._thread = self._thread, None
        if thread is not None:
            thread.join()
        with self._lock:
            for delivery in self._deliveries:
                delivery.release()

    def wake(self) -> None:
        """Look now: something was committed."""
        self._woken.set()

    def __enter__(self) -> Self:
        return self.start()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.stop()

    def _run(self) -> None:
        changes = _Changes(self._engine)
        failures = 0
        try:
            while not self._stopping.is_set():
                self._woken.clear()
                started = time.monotonic()
                try:
                    count = self._step()
                except Exception as error:  # whatever it is, the next look may succeed; nothing is lost meanwhile
                    failures += 1
                    after = getattr(error, "retry_after_s", None)
                    wait = after or self._policy.delay(failures, random.random)
                    level = logging.WARNING if isinstance(error, (MemstateError, SQLAlchemyError)) else logging.ERROR
                    logger.log(
                        level,
                        "delivery failed (%s), next attempt in %.1f s",
                        error if isinstance(error, MemstateError) else type(error).__name__,
                        wait,
                        exc_info=error if level == logging.ERROR else None,
                    )
                    self._stopping.wait(wait)
                    continue
                failures = 0
                if count is None:
                    self._wait_for_work(changes)
                elif count < self._page_size:
                    # The application commits in this process too: leave it twice the time that was taken, and find more
                    # to do at once, which indexes like. An idle relay still answers a commit immediately.
                    self._stopping.wait(min(2 * (time.monotonic() - started), _LONGEST_PAUSE_S))
        finally:
            changes.close()

    def _wait_for_work(self, changes: _Changes) -> None:
        """Until something was committed here or elsewhere, or a parked key or the lease may be due."""
        shortest, longest = self._poll_s
        wait, until = shortest, time.monotonic() + 1.0
        while not self._stopping.is_set() and not self._woken.wait(wait):
            if changes.seen() or time.monotonic() >= until:
                return
            wait = min(wait * 1.5, longest)


class _Changes:
    """Whether another connection has committed since the last look.

    SQLite answers with PRAGMA data_version, a few microseconds on a connection that does nothing else; elsewhere every
    poll has to look.
    """

    def __init__(self, engine: Engine) -> None:
        self._connection: Any = None
        self._version: int | None = None
        if engine.dialect.name == "sqlite":
            self._connection = engine.connect()
            self._connection.detach()  # not one of the application's pool

    def seen(self) -> bool:
        if self._connection is None:
            return True
        try:
            version: int = self._connection.execute(_DATA_VERSION).scalar_one()
        except SQLAlchemyError:
            return True
        finally:
            self._connection.rollback()
        changed: bool = version != self._version
        self._version = version
        return changed

    def close(self) -> None:
        if self._connection is not None:
            self._connection.close()


_DATA_VERSION = text("PRAGMA data_version")
