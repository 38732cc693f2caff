"""An index that fails at random."""

from __future__ import annotations

import random
import threading
from collections.abc import Callable, Sequence
from typing import NoReturn, TypeVar

from memstate_sa.errors import DeliveryRetryable
from memstate_sa.indexes.base import Entry, FencedIndex, Filter, Match, Point, Stored, Vector, VectorIndex

T = TypeVar("T")


class FlakyIndex:
    """Wraps *inner*, and raises DeliveryRetryable in the share *rate* of its calls.

    In one thread, *seed* makes the failures reproducible. A read fails before it happens. A write fails before it
    happens, after it (a lost acknowledgement) or, with *partial*, after half of its batch. ``open``, ``close`` and
    ``incarnation`` never fail. ``rate`` may be changed at any time, and 0 ends the failures.
    """

    def __init__(self, inner: VectorIndex, *, rate: float = 0.1, seed: int = 0, partial: bool = True) -> None:
        self.inner = inner
        self.rate = rate
        self._moments = ("before", "after", "half") if partial else ("before", "after")
        self._random = random.Random(seed)
        self._lock = threading.Lock()

    @property
    def incarnation(self) -> str:
        return self.inner.incarnation

    @property
    def max_batch(self) -> int:
        return self.inner.max_batch

    @property
    def in_process(self) -> bool:
        return getattr(self.inner, "in_process", False)

    def open(self, *, embedder: str, dimension: int) -> None:
        self.inner.open(embedder=embedder, dimension=dimension)

    def close(self) -> None:
        self.inner.close()

    def upsert(self, points: Sequence[Point]) -> None:
        self._write(points, self.inner.upsert, "upsert")

    def delete(self, ids: Sequence[str]) -> None:
        self._write(ids, self.inner.delete, "delete")

    def query(
        self, vector: Vector, limit: int, *, where: Filter | None = None, ids: Sequence[str] | None = None
    ) -> list[Match]:
        if self._moment():
            _fail("before", "query")
        return self.inner.query(vector, limit, where=where, ids=ids)

    def get(self, ids: Sequence[str]) -> list[Stored]:
        if self._moment():
            _fail("before", "get")
        return self.inner.get(ids)

    def scan(self, after: str | None, limit: int) -> list[Entry]:
        if self._moment():
            _fail("before", "scan")
        return self.inner.scan(after, limit)

    def _write(self, items: Sequence[T], write: Callable[[Sequence[T]], None], call: str) -> None:
        moment = self._moment()
        if moment != "before":
            write(items[: len(items) // 2] if moment == "half" else items)
        if moment:
            _fail(moment, call)

    def _moment(self) -> str | None:
        with self._lock:
            return self._random.choice(self._moments) if self._random.random() < self.rate else None


class FlakyFencedIndex(FlakyIndex):
    """A `FlakyIndex` around a `FencedIndex`."""

    inner: FencedIndex
    fences = True

    def delete(self, ids: Sequence[str], *, epoch: int = 0) -> None:
        self._write(ids, lambda batch: self.inner.delete(batch, epoch=epoch), "delete")


def _fail(moment: str, call: str) -> NoReturn:
    raise DeliveryRetryable(f"injected failure: {moment} of {call}")
