"""An index that fails in every way that a remote one does, and records its writes."""

from __future__ import annotations

import json
import os
import random
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any, TypeVar

from memstate_sa.indexes.base import Entry, FencedIndex, Filter, Match, Point, Stored, Vector, VectorIndex, is_fenced

T = TypeVar("T")

EXPOSED_S = 8.0
"""Seconds beyond the lease that a process may need to notice and report a late call or stop, on a busy machine."""

_OF_WRITES = {
    "index: failed before": 3.0,
    "index: applied, timed out": 3.0,
    "index: applied half": 2.0,
    "index: 429, Retry-After": 2.0,
    "index: 400": 0.7,
    "index: slow": 2.0,
    "index: beyond the lease": 0.5,
}
_OF_READS = {name: _OF_WRITES[name] for name in ("index: failed before", "index: 429, Retry-After", "index: slow")}


class HTTPError(Exception):
    """An error like those of vendors' clients: its cause is in ``response``, never in the text."""

    def __init__(self, status: int, **headers: str) -> None:
        super().__init__(f"HTTP {status}")
        self.response = SimpleNamespace(
            status_code=status, headers={k.replace("_", "-"): v for k, v in headers.items()}
        )


class Lines:
    """A file to which lines are appended. Written lines survive a SIGKILL."""

    def __init__(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        self._descriptor = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)

    def add(self, **values: Any) -> None:
        os.write(self._descriptor, json.dumps({"t": round(time.monotonic(), 4), **values}).encode() + b"\n")


class Injector:
    """Decides which calls of one process fail. None does while the file ``calm`` exists."""

    def __init__(self, folder: Path, name: str, seed: str, rate: float) -> None:
        self.calls = Lines(folder / "calls" / f"{name}.jsonl")
        self._faults = Lines(folder / "faults" / f"{name}.jsonl")
        self._calm = folder / "calm"
        self._exposed = folder / f"exposed-{os.getpid()}"
        self._rate = rate
        self._random = random.Random(seed)
        self._lock = threading.Lock()
        self._number = 0

    def draw(self, kinds: dict[str, float]) -> tuple[int, str | None, float]:
        """The call's number, its fault, and a random number for the fault."""
        with self._lock:
            self._number += 1
            fault = None
            if self._random.random() < self._rate and not self._calm.exists():
                [fault] = self._random.choices(list(kinds), list(kinds.values()))
                self._faults.add(kind=fault)
            return self._number, fault, self._random.random()

    def expose(self, until: float) -> None:
        """Record that a kill before *until* could leave a point that only verify() finds; see `Torture.is_exposed`."""
        self._exposed.write_text(str(until))


class FaultyIndex:
    """*inner* behind an unreliable network. Raises vendors' errors. ``open`` and ``incarnation`` do not fail."""

    def __init__(self, inner: VectorIndex, name: str, injector: Injector, lease_s: float) -> None:
        self.inner = inner
        self._name = name
        self._injector = injector
        self._lease_s = lease_s

    @property
    def incarnation(self) -> str:
        return self.inner.incarnation

    @property
    def max_batch(self) -> int:
        return self.inner.max_batch

    def open(self, *, embedder: str, dimension: int) -> None:
        self.inner.open(embedder=embedder, dimension=dimension)

    def close(self) -> None:
        self.inner.close()

    def upsert(self, points: Sequence[Point]) -> None:
        epochs = sorted({point.epoch for point in points})
        given = [(point.id, point.fingerprint, point.metadata.get("mark")) for point in points]
        self._write(points, self.inner.upsert, "upsert", epochs, given)

    def delete(self, ids: Sequence[str]) -> None:
        self._write(ids, self.inner.delete, "delete", [], list(ids))

    def query(
        self, vector: Vector, limit: int, *, where: Filter | None = None, ids: Sequence[str] | None = None
    ) -> list[Match]:
        self._before_read()
        return self.inner.query(vector, limit, where=where, ids=ids)

    def get(self, ids: Sequence[str]) -> list[Stored]:
        self._before_read()
        return self.inner.get(ids)

    def scan(self, after: str | None, limit: int) -> list[Entry]:
        self._before_read()
        return self.inner.scan(after, limit)

    def _before_read(self) -> None:
        _, fault, chance = self._injector.draw(_OF_READS)
        self._before(fault, chance)

    def _write(
        self, items: Sequence[T], call: Callable[[Sequence[T]], None], op: str, epochs: list[int], given: list[Any]
    ) -> None:
        number, fault, chance = self._injector.draw(_OF_WRITES)
        note = {"index": self._name, "call": number}
        self._injector.calls.add(**note, op=op, fault=fault, epochs=epochs, given=given)
        try:
            self._before(fault, chance)
            call(items[: len(items) // 2] if fault == "index: applied half" else items)
            if fault == "index: applied half":
                raise ConnectionResetError("injected: after half of the batch")
            if fault == "index: applied, timed out":
                raise TimeoutError("injected: after the batch")
        except BaseException as error:
            self._injector.calls.add(**note, end=type(error).__name__)
            raise
        self._injector.calls.add(**note, end="ok")

    def _before(self, fault: str | None, chance: float) -> None:
        match fault:
            case "index: failed before":
                raise ConnectionRefusedError("injected: before the call")
            case "index: 429, Retry-After":
                raise HTTPError(429, retry_after=f"{0.1 + chance:.2f}")
            case "index: 400":
                raise HTTPError(400)
            case "index: slow":
                time.sleep(0.05 + 0.45 * chance)
            case "index: beyond the lease":
                delay = self._lease_s * (1.1 + 0.7 * chance)
                if not is_fenced(self.inner):
                    self._injector.expose(time.monotonic() + delay + EXPOSED_S)
                time.sleep(delay)


class FaultyFencedIndex(FaultyIndex):
    inner: FencedIndex
    fences = True

    def delete(self, ids: Sequence[str], *, epoch: int = 0) -> None:
        self._write(ids, lambda some: self.inner.delete(some, epoch=epoch), "delete", [epoch], list(ids))
