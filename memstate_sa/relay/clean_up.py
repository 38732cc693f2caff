"""`CleanUpThread`: the background work of a relay that has no index: sweeps, and retention of the log."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable

_PAUSE_S = 1.0
"""The pause between two calls. Most calls do nothing: a relay cleans up once a minute, or while there is more to do."""


class CleanUpThread:
    """Calls *clean_up* repeatedly, in a relay without indexes. Other relays call it between deliveries."""

    def __init__(self, clean_up: Callable[[], None]) -> None:
        self._clean_up = clean_up
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._run, name="memstate-relay", daemon=True)
        self._thread.start()

    def _run(self) -> None:
        while not self._stopping.is_set():
            self._clean_up()
            self._stopping.wait(_PAUSE_S)

    def stop(self, deadline: float) -> None:
        """Stop the thread, and wait at most until *deadline*, a time of `time.monotonic`."""
        self._stopping.set()
        self._thread.join(max(0.0, deadline - time.monotonic()))
