"""Shared parts of writers and workers: their own log file, and an end on request."""

from __future__ import annotations

import faulthandler
import logging
import os
import signal
import sys
import threading
from multiprocessing import parent_process

from tests.torture.app import Setting


class Stopping:
    """Set by SIGTERM, and by the death of the run."""

    def __init__(self) -> None:
        self._told = threading.Event()
        signal.signal(signal.SIGTERM, lambda *_: self._told.set())
        signal.signal(signal.SIGINT, signal.SIG_IGN)

    def wait(self, seconds: float) -> bool:
        """Whether it is time to stop, within *seconds*."""
        parent = parent_process()
        return self._told.wait(seconds) or (parent is not None and not parent.is_alive())


def begin(setting: Setting, name: str, life: int) -> Stopping:
    """Send all output to ``logs/<name>.log``. SIGUSR1 adds the stack of every thread."""
    path = setting.folder / "logs" / f"{name}.log"
    path.parent.mkdir(exist_ok=True)
    descriptor = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    sys.stderr.reconfigure(line_buffering=True)  # type: ignore[union-attr]
    faulthandler.enable()
    faulthandler.register(signal.SIGUSR1, all_threads=True)
    logging.captureWarnings(capture=True)
    logging.basicConfig(level=logging.WARNING, format=f"%(asctime)s life {life} %(name)s %(levelname)s %(message)s")
    return Stopping()
