"""Whose turn it is, where few can have one at a time: nobody blocks a thread by waiting for it."""

from __future__ import annotations

import asyncio
import threading
from concurrent.futures import Future

from memstate_sa.errors import MemstateError


class Turns:
    """The first *limit* of those who have asked have a turn, until they end it. Thread-safe."""

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._lock = threading.Lock()
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
        """Whether it has come or not; any number of times."""
        with self._lock:
            if turn in self._asked:
                self._asked.remove(turn)
                self._ended += 1
                self._advance()
        turn.cancel()  # who still waits for it need not

    def _advance(self) -> None:
        for turn in self._asked[: self._limit]:
            if not turn.done():
                turn.set_result(None)

    async def wait(self, turn: Future[None], timeout_s: float) -> None:
        """Return when *turn* has come. Raises MemstateError when none ends for *timeout_s* seconds."""
        while not turn.done():
            ended = self._ended
            # Not the future itself: who is cancelled would cancel it for all that wait for it.
            await asyncio.wait([asyncio.wrap_future(turn)], timeout=timeout_s)
            if not turn.done() and self._ended == ended:
                raise MemstateError(
                    f"as many steps are open as may be ({self._limit}), and none has ended for {timeout_s:g} s: a node "
                    "that has begun one is to return soon, and not to wait for another node that has not"
                )
