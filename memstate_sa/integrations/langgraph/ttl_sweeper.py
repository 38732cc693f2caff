"""The thread that deletes the expired items of a store."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import Future

from memstate_sa.runtime.printable import printable_logger

logger = printable_logger("memstate_sa.langgraph")


class TtlSweeper:
    """Sweeps repeatedly in one thread, from `start` until `stop`."""

    def __init__(self) -> None:
        self.thread: threading.Thread | None = None
        self.stop_event = threading.Event()

    @property
    def is_running(self) -> bool:
        return self.thread is not None and self.thread.is_alive() and not self.stop_event.is_set()

    def start(self, sweep: Callable[[], object], interval_s: float) -> Future[None]:
        """Call *sweep* every *interval_s* seconds, until the result is cancelled. A running thread continues."""
        is_running = self.is_running
        if not is_running:
            # Use a new event, because a previous thread may not yet have seen that the old one is set.
            self.stop_event = threading.Event()
        stop_event = self.stop_event
        future: Future[None] = Future()
        future.add_done_callback(lambda future: stop_event.set() if future.cancelled() else None)
        if is_running:
            return future
        self.thread = threading.Thread(
            target=_sweep_until, args=(stop_event, sweep, interval_s, future), name="memstate-ttl-sweeper", daemon=True
        )
        self.thread.start()
        return future

    def stop(self, timeout: float | None) -> bool:
        """Stop the thread. Returns whether it ended within *timeout* seconds."""
        self.stop_event.set()
        if self.thread is not None:
            self.thread.join(timeout)
        return self.thread is None or not self.thread.is_alive()


def _sweep_until(
    stop_event: threading.Event, sweep: Callable[[], object], interval_s: float, future: Future[None]
) -> None:
    while not stop_event.wait(interval_s):
        try:
            sweep()
        except Exception as error:  # noqa: BLE001  # the database may be back next time
            logger.warning("Could not sweep expired items, will try again: %s", type(error).__name__)
    if not future.cancelled():
        future.set_result(None)
