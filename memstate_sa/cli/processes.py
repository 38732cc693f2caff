"""A relay as a process of its own: logs, signals, metrics, and a supervisor for several of them.

How processes of the command line are started and ended is here for `backfill`, too.
"""

from __future__ import annotations

import json
import logging
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from socketserver import ThreadingMixIn
from typing import Any
from wsgiref.simple_server import WSGIRequestHandler, WSGIServer, make_server

from prometheus_client import CollectorRegistry, make_wsgi_app
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from pythonjsonlogger.json import JsonFormatter
from rich.logging import RichHandler
from sqlalchemy import Engine, select
from sqlalchemy.exc import SQLAlchemyError

from memstate_sa.errors import MemstateError
from memstate_sa.relay import Relay
from memstate_sa.relay.backlog import Backlog
from memstate_sa.runtime.printable import printable_logger

logger = printable_logger("memstate_sa.worker")

Process = subprocess.Popen[bytes]

_RESTART_S = (1.0, 30.0)
_GRACE_S = 60.0


def configure_logging(*, as_json: bool) -> None:
    """Log records of memstate_sa to stderr: for people, or one JSON object a line."""
    handler: logging.Handler
    if as_json:
        handler = logging.StreamHandler()
        fields = "{asctime}{levelname}{name}{message}{process}"
        handler.setFormatter(JsonFormatter(fields, style="{", rename_fields={"asctime": "at", "levelname": "level"}))
    else:
        from rich.console import Console

        handler = RichHandler(console=Console(stderr=True), show_path=False)
    package = logging.getLogger("memstate_sa")
    package.handlers[:] = [handler]
    package.setLevel(logging.INFO)
    package.propagate = False


@contextmanager
def interruption() -> Iterator[threading.Event]:
    """Set by SIGINT or SIGTERM, while the context lasts."""
    interrupted = threading.Event()
    before = {number: signal.signal(number, lambda *_: interrupted.set()) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield interrupted
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


# -- metrics ----------------------------------------------------------------------------------------------------------

_GAUGES: Mapping[str, tuple[str, Callable[[Backlog], float]]] = {
    "oldest_undelivered_seconds": ("Age of the oldest change not delivered", lambda backlog: backlog.oldest_s or 0.0),
    "backlog_keys": ("Changed keys not delivered", lambda backlog: backlog.pending),
    "parked_keys": ("Keys refused, to be tried again", lambda backlog: backlog.parked),
    "dead_keys": ("Keys refused too often", lambda backlog: backlog.dead),
    "refilling": ("1 while the index is delivered in full", lambda backlog: backlog.refilling),
    "paused": ("1 while the index is paused", lambda backlog: backlog.paused),
}
_COUNTERS: Mapping[str, tuple[str, str]] = {
    "converged_keys": ("Keys brought up to date by this worker", "converged"),
    "embedded_texts": ("Texts given to the embedder", "embedded"),
    "reused_vectors": ("Embeddings saved: only metadata changed, or the index or the cache had it", "reused"),
    "unchanged_keys": ("Embeddings saved: the index had it all", "unchanged"),
    "rejected_keys": ("Refusals by index or embedder", "rejected"),
    "lost_slots": ("Slots that another worker took over while this one was late", "lost"),
}


class _Collector:
    """The metrics, read when Prometheus asks. The gauges are the database's: the same from every worker."""

    def __init__(self, relay: Relay, status: Callable[[], Mapping[str, Backlog]]) -> None:
        self._relay = relay
        self._status = status

    def collect(self) -> Iterable[Metric]:
        backlogs = self._status()
        for name, (text, value) in _GAUGES.items():
            gauge = GaugeMetricFamily(f"memstate_{name}", text, labels=["index"])
            for index, backlog in backlogs.items():
                gauge.add_metric([index], float(value(backlog)))
            yield gauge
        counters = self._relay.counters()
        for name, (text, attribute) in _COUNTERS.items():
            counter = CounterMetricFamily(f"memstate_{name}", text, labels=["index"])
            for index, counts in counters.items():
                counter.add_metric([index], float(getattr(counts, attribute)))
            yield counter


class _Server(ThreadingMixIn, WSGIServer):
    daemon_threads = True


class _QuietHandler(WSGIRequestHandler):
    def log_message(self, format: str, *args: Any) -> None:  # noqa: A002  # as in the base class
        logger.debug(format, *args)


@contextmanager
def metrics_server(
    relay: Relay, engine: Engine, status: Callable[[], Mapping[str, Backlog]], host: str, port: int
) -> Iterator[int]:
    """Serve ``/metrics`` (Prometheus) and ``/readyz`` (200, or 503 and why); the port, which 0 leaves to the system."""
    registry = CollectorRegistry()
    registry.register(_Collector(relay, status))
    metrics = make_wsgi_app(registry)

    def application(environ: Any, start_response: Any) -> Any:
        if environ["PATH_INFO"] != "/readyz":
            return metrics(environ, start_response)
        problems = _problems(relay, engine)
        code = "503 Service Unavailable" if problems else "200 OK"
        start_response(code, [("Content-Type", "application/json")])
        return [json.dumps({"ready": not problems, "problems": problems}).encode()]

    try:
        server = make_server(host, port, application, _Server, _QuietHandler)
    except OSError as error:
        raise MemstateError(f"cannot serve metrics on {host}:{port}: {error.strerror}") from error
    thread = threading.Thread(target=server.serve_forever, name="memstate-metrics", daemon=True)
    thread.start()
    try:
        yield server.server_port
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def _problems(relay: Relay, engine: Engine) -> dict[str, str]:
    """The reasons why this worker is not ready. Cheap: it is asked all the time."""
    problems = relay.problems()
    try:
        with engine.connect() as connection:
            connection.execute(select(1))
    except SQLAlchemyError as error:
        problems["the database"] = type(error).__name__
    return problems


# -- several workers --------------------------------------------------------------------------------------------------


@contextmanager
def child_processes(environment: Mapping[str, str], *, stdout: int | None = None) -> Iterator[Callable[..., Process]]:
    """A function that starts a process of this command line, by its arguments; all end with the context.

    What should not show in a list of processes travels in *environment*.
    """
    running: list[Process] = []

    def start(*arguments: str) -> Process:
        running[:] = [process for process in running if process.poll() is None]  # a supervisor goes on for months
        command = [sys.executable, "-m", "memstate_sa.cli", *arguments]
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
    """Run `memstate-sa relay` with each of these arguments, as `child_processes`, until SIGINT or SIGTERM.

    One that ends is started again.
    """
    with interruption() as interrupted, child_processes(environment) as start:
        running = {n: (time.monotonic(), start("relay", *arguments)) for n, arguments in enumerate(workers)}
        delays = dict.fromkeys(running, _RESTART_S[0])
        while not interrupted.wait(0.2):
            for n, (since, process) in running.items():
                code = process.poll()
                if code is None:
                    continue
                if time.monotonic() - since > _RESTART_S[1]:
                    delays[n] = _RESTART_S[0]
                logger.error("worker %d ended with %s, starting it again in %.0f s", n + 1, code, delays[n])
                if interrupted.wait(delays[n]):
                    break
                delays[n] = min(2 * delays[n], _RESTART_S[1])
                running[n] = (time.monotonic(), start("relay", *workers[n]))
