"""A semaphore that serves coroutines and threads in the order of their requests."""

from __future__ import annotations

import asyncio
import concurrent.futures
import threading
from concurrent.futures import Future
from typing import TypeAlias

from memstate_sa.errors import MemstateError

Permit: TypeAlias = Future[None]
"""A future that is done when the permit is granted, or its request was rejected."""


class FairSemaphore:
    """Grants *limit* permits at a time. Each further request waits until a permit is released. Thread-safe."""

    def __init__(self, limit: int, lock: threading.Condition | None = None) -> None:
        self._limit = limit
        self._lock = lock or threading.Condition()
        self._permits: list[Permit] = []  # granted permits first, then requests
        self._releases = 0

    def request(self) -> Permit:
        """Request a permit. It may be granted later."""
        permit: Permit = Future()
        with self._lock:
            self._permits.append(permit)
            self._grant()
        return permit

    def release(self, permit: Permit) -> None:
        """Give back a permit, or withdraw the request for it. A second call does nothing."""
        with self._lock:
            self._remove(permit)
        permit.cancel()  # this wakes its waiters

    def reject(self, permit: Permit, error: Exception) -> None:
        """Reject the request for *permit*: its waiters get *error*. A granted permit stays."""
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
        """Wait until *permit* is granted. Raises MemstateError if no permit is released for *timeout_s* seconds."""
        while not permit.done():
            releases = self._releases
            # Wait for a wrapper. Otherwise a cancelled waiter would cancel the permit for all other waiters.
            granted = asyncio.wrap_future(permit)
            granted.add_done_callback(lambda granted: granted.cancelled() or granted.exception())  # `check` raises it
            await asyncio.wait([granted], timeout=timeout_s)
            self._check_progress(permit, releases, timeout_s)
        self.check(permit)

    def wait_blocking(self, permit: Permit, timeout_s: float) -> None:
        """Do the same as `wait`, but block the thread."""
        while not permit.done():
            releases = self._releases
            concurrent.futures.wait([permit], timeout=timeout_s)
            self._check_progress(permit, releases, timeout_s)

    @staticmethod
    def check(permit: Permit) -> None:
        """Raise the error of a rejected request."""
        if not permit.cancelled():
            permit.result()

    def _check_progress(self, permit: Permit, releases: int, timeout_s: float) -> None:
        if not permit.done() and self._releases == releases:
            raise MemstateError(
                f"Cannot begin a step: the maximum of {self._limit} open steps is reached, and none has ended for "
                f"{timeout_s:g} s. A node must return soon after its step, and must not wait for a node without one."
            )
