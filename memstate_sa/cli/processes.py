"""The relay as a process of its own: its logs, its signals, and a supervisor of several relays.

`backfill` starts and ends its processes with the same functions.
"""

from __future__ import annotations

import logging
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager

from memstate_sa.errors import MissingExtra
from memstate_sa.runtime.printable import printable_logger

logger = printable_logger("memstate_sa.worker")

Process = subprocess.Popen[bytes]

_RESTART_S = (1.0, 30.0)
_GRACE_S = 60.0
_TIME = "%Y-%m-%dT%H:%M:%SZ"


def configure_logging(*, level: str, as_json: bool, worker: int) -> None:
    """Send log records of memstate_sa to stderr: for people on a terminal, else one line each, or one JSON object."""
    handler: logging.Handler = logging.StreamHandler()
    if as_json:
        handler.setFormatter(_json_formatter(worker))
    elif sys.stderr.isatty():
        from rich.console import Console
        from rich.logging import RichHandler

        handler = RichHandler(console=Console(stderr=True), show_path=False, log_time_format="%Y-%m-%d %X")
    else:
        handler.setFormatter(_LineFormatter(worker))
    package = logging.getLogger("memstate_sa")
    package.handlers[:] = [handler]
    package.setLevel(level.upper())
    package.propagate = False


class _LineFormatter(logging.Formatter):
    """Formats a record and its traceback in one line, because log systems take each line for a record."""

    def __init__(self, worker: int) -> None:
        fields = f"%(asctime)s %(levelname)s worker={worker} pid=%(process)d %(name)s: %(message)s"
        super().__init__(fields, _TIME)
        self.converter = time.gmtime

    def format(self, record: logging.LogRecord) -> str:
        return super().format(record).replace("\n", " | ")


def _json_formatter(worker: int) -> logging.Formatter:
    try:
        from pythonjsonlogger.json import JsonFormatter
    except ModuleNotFoundError as error:
        raise MissingExtra("python-json-logger", "cli") from error
    formatter = JsonFormatter(
        "{asctime}{levelname}{name}{message}{process}",
        datefmt=_TIME,
        style="{",
        rename_fields={"asctime": "at", "levelname": "level"},
        static_fields={"worker": worker},
    )
    formatter.converter = time.gmtime
    return formatter


@contextmanager
def interruption() -> Iterator[threading.Event]:
    """An event that SIGINT or SIGTERM sets, while the context lasts."""
    interrupted = threading.Event()
    before = {number: signal.signal(number, lambda *_: interrupted.set()) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield interrupted
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


# -- several workers --------------------------------------------------------------------------------------------------


@contextmanager
def child_processes(environment: Mapping[str, str], *, stdout: int | None = None) -> Iterator[Callable[..., Process]]:
    """A function that starts this command line with other arguments. The processes end with the context.

    Secrets belong in *environment*: a list of processes shows the arguments.
    """
    running: list[Process] = []

    def start(*arguments: str) -> Process:
        # A supervisor runs for months, so drop the processes that have ended.
        running[:] = [process for process in running if process.poll() is None]
        command = [sys.executable, "-m", "memstate_sa", *arguments]
        running.append(subprocess.Popen(command, env={**os.environ, **environment}, stdout=stdout))  # noqa: S603
        return running[-1]

    try:
        yield start
    finally:
        for process in running:
            process.terminate()
        for process in running:
            try:
                process.wait(_GRACE_S)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


def supervise(workers: Sequence[Sequence[str]], environment: Mapping[str, str]) -> None:
    """Run `memstate-sa relay` once for each list of arguments, until SIGINT or SIGTERM.

    A worker that ends is started again.
    """
    commands = [["relay", "--worker", str(n), *arguments] for n, arguments in enumerate(workers, 1)]
    with interruption() as interrupted, child_processes(environment) as start:
        running = {n: (time.monotonic(), start(*command)) for n, command in enumerate(commands)}
        delays = dict.fromkeys(running, _RESTART_S[0])
        while not interrupted.wait(0.2):
            for n, (since, process) in running.items():
                code = process.poll()
                if code is None:
                    continue
                if time.monotonic() - since > _RESTART_S[1]:
                    delays[n] = _RESTART_S[0]
                logger.error("worker %d ended with %s. It starts again in %.0f s.", n + 1, code, delays[n])
                if interrupted.wait(delays[n]):
                    break
                delays[n] = min(2 * delays[n], _RESTART_S[1])
                running[n] = (time.monotonic(), start(*commands[n]))
