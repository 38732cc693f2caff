"""The HTTP server of a relay: ``/metrics`` for Prometheus, and ``/readyz``."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from socketserver import ThreadingMixIn
from typing import Any
from wsgiref.simple_server import WSGIRequestHandler, WSGIServer, make_server

from prometheus_client import CollectorRegistry, make_wsgi_app
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from sqlalchemy import Engine, select
from sqlalchemy.exc import SQLAlchemyError

from memstate_sa.cli.processes import logger
from memstate_sa.errors import MemstateError
from memstate_sa.relay import Relay
from memstate_sa.relay.backlog import Backlog

_GAUGES: Mapping[str, tuple[str, Callable[[Backlog], float]]] = {
    "oldest_undelivered_seconds": ("Age of the oldest change not delivered", lambda backlog: backlog.oldest_s or 0.0),
    "backlog_keys": ("Changed keys not delivered", lambda backlog: backlog.pending),
    "parked_keys": ("Refused keys that are tried again", lambda backlog: backlog.parked),
    "dead_keys": ("Keys refused too often", lambda backlog: backlog.dead),
    "refilling": ("1 while the index is being filled", lambda backlog: backlog.refilling),
    "paused": ("1 while the index is paused", lambda backlog: backlog.paused),
}
_COUNTERS: Mapping[str, tuple[str, str]] = {
    "converged_keys": ("Keys brought up to date by this worker", "converged"),
    "embedded_texts": ("Texts given to the embedder", "embedded"),
    "reused_vectors": ("Texts not embedded, because the index or the cache had the vector", "reused"),
    "unchanged_keys": ("Keys not written, because the index had them already", "unchanged"),
    "rejected_keys": ("Refusals by index or embedder", "rejected"),
    "lost_slots": ("Slots that another worker took over while this worker was late", "lost"),
}


class _Collector:
    """The metrics, read when Prometheus asks. The gauges come from the database, so every worker shows the same."""

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
    """Serve ``/metrics`` for Prometheus, and ``/readyz``: status 200, or 503 with the problems. Yield the port."""
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
        raise MemstateError(
            f"Cannot serve metrics on {host}:{port}: {error.strerror}. Give another --metrics-port or --metrics-host."
        ) from error
    thread = threading.Thread(target=server.serve_forever, name="memstate-metrics", daemon=True)
    thread.start()
    try:
        yield server.server_port
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def _problems(relay: Relay, engine: Engine) -> dict[str, str]:
    """The reasons why this worker is not ready. Probes ask often, so the check is cheap."""
    problems = relay.problems()
    try:
        with engine.connect() as connection:
            connection.execute(select(1))
    except SQLAlchemyError as error:
        problems["the database"] = type(error).__name__
    return problems
