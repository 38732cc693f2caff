"""A semaphore that serves those who wait in the order in which they asked, coroutines and threads alike."""

from __future__ import annotations

import asyncio
import concurrent.futures
import threading
from concurrent.futures import Future
from typing import TypeAlias

from memstate_sa.errors import MemstateError

Permit: TypeAlias = Future[None]
"""It is done when it is granted, or when the request for it was rejected."""


class FairSemaphore:
    """Grants *limit* permits at a time. Each further request waits until a permit is released. Thread-safe."""

    def __init__(self, limit: int, lock: threading.Condition | None = None) -> None:
        self._limit = limit
        self._lock = lock or threading.Condition()
        self._permits: list[Permit] = []  # granted ones first, then those that are waited for
        self._releases = 0

    def request(self) -> Permit:
        """A permit, which may be granted later."""
        permit: Permit = Future()
        with self._lock:
            self._permits.append(permit)
            self._grant()
        return permit

    def release(self, permit: Permit) -> None:
        """Give back a permit, or withdraw the request for it. It may be released twice."""
        with self._lock:
            self._remove(permit)
        permit.cancel()  # nobody needs to wait for it any more

    def reject(self, permit: Permit, error: Exception) -> None:
        """Raise *error* in those who wait for *permit*, unless it was granted already."""
        with self._lock:
            if not permit.done():
                permit.set_exception(error)
                self._remove(permit)

    def _remove(self, permit: Permit) -> None:
        if permit in self._permits:
            self._permits.remove(permit)
            self._releases += 1
            self._grant()

    def _grant(self) -> None:
        for permit in self._permits[: self._limit]:
            if not permit.done():
                permit.set_result(None)

    async def wait(self, permit: Permit, timeout_s: float) -> None:
        """Return when *permit* is granted. Raises MemstateError when none is released for *timeout_s* seconds."""
        while not permit.done():
            releases = self._releases
            # Not the future itself: who is cancelled would cancel it for all that wait for it.
            granted = asyncio.wrap_future(permit)
            granted.add_done_callback(lambda granted: granted.cancelled() or granted.exception())  # `check` raises it
            await asyncio.wait([granted], timeout=timeout_s)
            self._check_progress(permit, releases, timeout_s)
        self.check(permit)

    def wait_blocking(self, permit: Permit, timeout_s: float) -> None:
        """Wait as `wait` does, and block this thread."""
        while not permit.done():
            releases = self._releases
            concurrent.futures.wait([permit], timeout=timeout_s)
            self._check_progress(permit, releases, timeout_s)

    @staticmethod
    def check(permit: Permit) -> None:
        """Raise the error with which the request for *permit* was rejected."""
        if not permit.cancelled():
            permit.result()

    def _check_progress(self, permit: Permit, releases: int, timeout_s: float) -> None:
        if not permit.done() and self._releases == releases:
            raise MemstateError(
                f"as many steps are open as may be ({self._limit}), and none has ended for {timeout_s:g} s: a node "
                "that has begun one is to return soon, and not to wait for another node that has not"
            )
