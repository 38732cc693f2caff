"""`Relay`: the loop around the deliveries of every index, in the caller's thread or in one of its own."""

from __future__ import annotations

import logging
import random
import threading
import time
from collections.abc import Mapping
from types import TracebackType
from typing import Any, Self

from sqlalchemy import func, select, text
from sqlalchemy.engine import Engine
from sqlalchemy.exc import SQLAlchemyError

from memstate_sa.errors import DeliveryError, DeliveryRetryable, MemstateError
from memstate_sa.facts import Tracked
from memstate_sa.indexes.base import VectorIndex
from memstate_sa.relay import state
from memstate_sa.relay.delivery import Delivery
from memstate_sa.relay.plan import RetryPolicy
from memstate_sa.relay.state import IndexKey
from memstate_sa.sqlite import is_in_memory, require_no_transaction
from memstate_sa.tables import outbox
from memstate_sa.vectors import Vectors

logger = logging.getLogger("memstate_sa.relay")

_FORGET_EVERY_S = 60.0
_LONGEST_PAUSE_S = 0.5


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
        page_size: int = 2000,
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
        self._forget_at = time.monotonic()
        self._failures: dict[str, int] = {}  # by index, since its last success
        self._not_before: dict[str, float] = {}  # by index: the end of its backoff

    # -- in the caller's thread --------------------------------------------------------------------------------------

    def run_once(self) -> int:
        """Deliver up to a page from each source (parked, new, refill) to each index; returns the keys converged.

        Raises DeliveryRetryable when an index or the embedder is unavailable: nothing is lost, call again later.
        """
        count, failure = self._step()
        if failure is not None:
            raise failure
        return count or 0

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
        require_no_transaction(self._engine)
        with self._engine.connect() as connection:
            newest = connection.execute(select(func.max(outbox.c.id))).scalar() or 0
        total = 0
        while True:
            count, failure = self._step()
            total += count or 0
            if failure is not None and not isinstance(failure, DeliveryRetryable):
                raise failure
            if failure is None and not self._behind(newest):
                return total
            wait = 0.0 if count else 0.02
            if failure is not None:
                wait = max(0.0, min(self._not_before.values()) - time.monotonic())
            if time.monotonic() + wait > deadline:
                reason = failure or self._why_behind(newest)
                raise DeliveryError(f"not drained within {timeout:g} s: {reason}") from failure
            time.sleep(wait)

    def _step(self, *, background: bool = False) -> tuple[int | None, Exception | None]:
        """One page for each index: the keys converged, or None when there was nothing to do, and the first failure.

        An index that is down stops no other; in the background it is left alone until its backoff is over.
        """
        counts: list[int] = []
        failure: Exception | None = None
        with self._lock:
            require_no_transaction(self._engine)
            for delivery in self._deliveries:
                if background and time.monotonic() < self._not_before.get(delivery.name, 0.0):
                    continue
                pages = delivery.pages
                try:
                    count = delivery.step()
                except Exception as error:  # whatever it is, the next look may succeed; nothing is lost meanwhile
                    if not (background or isinstance(error, DeliveryRetryable)):
                        raise
                    if delivery.pages > pages:
                        self._failures.pop(delivery.name, None)  # it failed after some success: a new failure
                    failure = failure or error
                    self._back_off(delivery.name, error)
                else:
                    self._failures.pop(delivery.name, None)
                    self._not_before.pop(delivery.name, None)
                    if count is not None:
                        counts.append(count)
            if time.monotonic() >= self._forget_at:
                self._forget()
        return (sum(counts) if counts else None), failure

    def _back_off(self, name: str, error: Exception) -> None:
        failures = self._failures[name] = self._failures.get(name, 0) + 1
        asked: float | None = getattr(error, "retry_after_s", None)
        delay = self._policy.delay(failures, random.random)
        wait = delay if asked is None else min(max(asked, delay), self._policy.max_delay_s)
        self._not_before[name] = time.monotonic() + wait
        known = isinstance(error, (MemstateError, SQLAlchemyError))
        logger.log(
            logging.WARNING if known else logging.ERROR,
            "%s: delivery failed (%s), next attempt in %.1f s",
            name,
            error if isinstance(error, MemstateError) else type(error).__name__,
            wait,
            exc_info=None if known else error,
        )

    def _forget(self) -> None:
        self._forget_at = time.monotonic() + _FORGET_EVERY_S
        with self._engine.begin() as connection:
            state.forget_delivered(connection)

    def _backlogs(self, up_to: int) -> dict[str, state.Backlog]:
        with self._engine.connect() as connection:
            return {
                name: state.backlog(connection, IndexKey(name, index.incarnation), list(tracked), up_to)
                for name, (index, tracked) in self._indexes.items()
            }

    def _behind(self, up_to: int) -> bool:
        return any(backlog.pending or backlog.refilling or backlog.due for backlog in self._backlogs(up_to).values())

    def _why_behind(self, up_to: int) -> str:
        return ", ".join(
            f"{backlog.pending} keys pending for {name!r} (is another relay holding its lease?)"
            for name, backlog in self._backlogs(up_to).items()
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
            if self._thread is None or not self._thread.is_alive():
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
        idle = self._poll_s[0]
        try:
            while not self._stopping.is_set():
                self._woken.clear()
                started = time.monotonic()
                try:
                    count, _ = self._step(background=True)
                except Exception as error:  # noqa: BLE001  # the database is away, say
                    self._back_off("the database", error)
                    self._stopping.wait(self._not_before["the database"] - time.monotonic())
                    continue
                self._failures.pop("the database", None)
                self._not_before.pop("the database", None)
                if count is None:
                    idle = self._wait_for_work(changes, idle)
                    continue
                idle = self._poll_s[0]
                if count < self._page_size:
                    # The application commits in this process too, and Chroma holds the interpreter while it writes:
                    # leave it four times the time that was taken, and find more to do at once, which indexes like. An
                    # idle relay still answers a commit immediately.
                    self._stopping.wait(min(4 * (time.monotonic() - started), _LONGEST_PAUSE_S))
        finally:
            changes.close()

    def _wait_for_work(self, changes: _Changes, wait: float) -> float:
        """Until something was committed here or elsewhere, or it is time for another look; the next wait."""
        shortest, longest = self._poll_s
        look_at = time.monotonic() + max(longest, 1.0)
        if self._not_before:
            look_at = min(look_at, *self._not_before.values())
        while not self._stopping.is_set():
            left = look_at - time.monotonic()
            if self._woken.wait(max(0.0, min(wait, left))):
                return shortest
            wait = min(wait * 1.5, longest)
            if changes.seen() or left <= 0:
                return wait
        return wait


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
