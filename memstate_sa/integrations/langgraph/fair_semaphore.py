"""Turns: only a few steps may be open at a time, and the others wait in the order in which they asked."""

from __future__ import annotations

import asyncio
import concurrent.futures
import threading
from concurrent.futures import Future

from memstate_sa.errors import MemstateError


class FairSemaphore:
    """The first *limit* of those that have asked have a turn, until they end it. Thread-safe."""

    def __init__(self, limit: int, lock: threading.Condition | None = None) -> None:
        self._limit = limit
        self._lock = lock or threading.Condition()
        self._asked: list[Future[None]] = []
        self._ended = 0

    def ask(self) -> Future[None]:
        """A turn: it is done when it has come."""
        turn: Future[None] = Future()
        with self._lock:
            self._asked.append(turn)
            self._advance()
        return turn

    def end(self, turn: Future[None]) -> None:
        """End a turn, whether it has come or not. It may be ended twice."""
        with self._lock:
            self._remove(turn)
        turn.cancel()  # whoever still waits for it need not

    def refuse(self, turn: Future[None], error: Exception) -> None:
        """Raise *error* in whoever waits for a turn that has not come."""
        with self._lock:
            if not turn.done():
                turn.set_exception(error)
                self._remove(turn)

    def _remove(self, turn: Future[None]) -> None:
        if turn in self._asked:
            self._asked.remove(turn)
            self._ended += 1
            self._advance()

    def _advance(self) -> None:
        for turn in self._asked[: self._limit]:
            if not turn.done():
                turn.set_result(None)

    async def wait(self, turn: Future[None], timeout_s: float) -> None:
        """Return when *turn* has come. Raises MemstateError when none ends for *timeout_s* seconds."""
        while not turn.done():
            ended = self._ended
            # Not the future itself: who is cancelled would cancel it for all that wait for it.
            come = asyncio.wrap_future(turn)
            come.add_done_callback(lambda come: come.cancelled() or come.exception())  # `check` raises it
            await asyncio.wait([come], timeout=timeout_s)
            self._check_progress(turn, ended, timeout_s)
        self.check(turn)

    def wait_here(self, turn: Future[None], timeout_s: float) -> None:
        """Wait as `wait` does, in this thread."""
        while not turn.done():
            ended = self._ended
            concurrent.futures.wait([turn], timeout=timeout_s)
            self._check_progress(turn, ended, timeout_s)

    @staticmethod
    def check(turn: Future[None]) -> None:
        """Raise the error of a turn that was refused."""
        if not turn.cancelled():
            turn.result()

    def _check_progress(self, turn: Future[None], ended: int, timeout_s: float) -> None:
        if not turn.done() and self._ended == ended:
            raise MemstateError(
                f"as many steps are open as may be ({self._limit}), and none has ended for {timeout_s:g} s: a node "
                "that has begun one is to return soon, and not to wait for another node that has not"
            )
