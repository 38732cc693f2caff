"""An exact index in this process's memory, for tests, demos and small sets of facts."""

from __future__ import annotations

import threading
import uuid
from bisect import bisect_right
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from memstate_sa.errors import IndexMismatch
from memstate_sa.indexes._adapter import Adapter, OpenState
from memstate_sa.indexes._filters import canonical, matches, storable
from memstate_sa.indexes.base import Entry, Filter, Match, Point, Scalar, Stored, Vector, matrix
from memstate_sa.runtime import forks
from memstate_sa.runtime.display import counted


class _StoredPoint(NamedTuple):
    row: int
    vector: Vector
    fingerprint: str
    metadata: Mapping[str, Scalar]


class InMemoryIndex(Adapter):
    """Exact cosine distance in NumPy. A search among 10,000 points of 256 dimensions takes 1-2 ms.

    The points live as long as the object. Each object has a new ``incarnation``, so the relay refills it. A zero vector
    has distance 1.0 from every vector. Writes are fenced by their epochs (`FencedIndex`).
    """

    fences = True
    in_process = True

    def __init__(self, *, max_batch: int = 10_000) -> None:
        self._max_batch = max_batch
        # Row n of `_units` is the unit vector of `_ids[n]`. The rows after len(_ids) are spare, because the
        # array grows by many rows at once.
        self._units: NDArray[np.float32] = np.empty((0, 0), dtype=np.float32)
        self._ids: list[str] = []
        self._points: dict[str, _StoredPoint] = {}
        self._epochs: dict[str, int] = {}  # deleted ids have epochs, too
        self._sorted_ids: list[str] | None = None
        self._mark: str | None = None
        self._begin()
        forks.in_child(self, InMemoryIndex._forked)

    def _begin(self) -> None:
        self._incarnation = uuid.uuid4().hex
        self._lock = threading.Lock()

    def _forked(self) -> None:
        """Become another index in the forked child, because the parent's relay does not write to this copy.

        Rebuild all from `_points`: if a thread of the parent was writing, the other attributes may be inconsistent.
        """
        self._begin()
        points = list(self._points.items())
        units = [self._units[point.row] for _, point in points]
        self._ids, self._sorted_ids = [id_ for id_, _ in points], None
        self._points = {id_: point._replace(row=row) for row, (id_, point) in enumerate(points)}
        self._units = np.asarray(units, dtype=np.float32).reshape(len(points), self._units.shape[1])

    @property
    def _place(self) -> str:
        return counted(len(self._points), "point", "points")

    @property
    def incarnation(self) -> str:
        return self._incarnation

    @property
    def max_batch(self) -> int:
        return self._max_batch

    def open(self, *, embedder: str, dimension: int) -> None:
        with self._lock:
            if self._opened is None:
                self._opened = OpenState(embedder, dimension)
                self._units = np.empty((0, dimension), dtype=np.float32)
            elif self._opened != OpenState(embedder, dimension):
                theirs, size, _ = self._opened
                raise IndexMismatch(
                    f"Cannot use this InMemoryIndex. It holds vectors of embedder {theirs!r} ({size} dimensions), but "
                    f"this Memory needs {embedder!r} ({dimension} dimensions). Create another InMemoryIndex."
                )

    def upsert(self, points: Sequence[Point]) -> None:
        vectors = matrix([p.vector for p in points], self._dimension, [p.id for p in points])
        norms = np.linalg.norm(vectors.astype(np.float64), axis=1, keepdims=True)
        units = np.divide(vectors, norms, out=np.zeros_like(norms * vectors), where=norms > 0)
        with self._lock:
            self._reserve(len(self._ids) + len(points))
            for point, vector, unit in zip(points, vectors, units, strict=True):
                if not self._passes(point.id, point.epoch):
                    continue
                old = self._points.get(point.id)
                row = len(self._ids) if old is None else old.row
                if old is None:
                    self._ids.append(point.id)
                    self._sorted_ids = None
                self._units[row] = unit
                metadata = {key: storable(value) for key, value in point.metadata.items()}
                self._points[point.id] = _StoredPoint(row, vector, point.fingerprint, metadata)

    def delete(self, ids: Sequence[str], *, epoch: int = 0) -> None:
        with self._lock:
            for id_ in ids:
                if not self._passes(id_, epoch):
                    continue
                point = self._points.pop(id_, None)
                if point is None:
                    continue
                self._sorted_ids = None
                last = self._ids.pop()
                if last != id_:  # the last row moves into the gap
                    self._ids[point.row] = last
                    self._units[point.row] = self._units[len(self._ids)]
                    self._points[last] = self._points[last]._replace(row=point.row)

    def query(
        self, vector: Vector, limit: int, *, where: Filter | None = None, ids: Sequence[str] | None = None
    ) -> list[Match]:
        [query] = matrix([vector], self._dimension, ["the query"]).astype(np.float64)
        condition = canonical(where or {})
        if condition is None or limit < 1:
            return []
        norm = np.linalg.norm(query)
        unit = (query / norm if norm > 0 else query).astype(np.float32)
        with self._lock:
            if ids is None:
                rows, units = np.arange(len(self._ids)), self._units[: len(self._ids)]
            else:
                rows = np.array(
                    [self._points[id_].row for id_ in dict.fromkeys(ids) if id_ in self._points], dtype=np.intp
                )
                units = self._units[rows]
            distances = np.clip(1.0 - units @ unit, 0.0, 2.0)
            hits: list[Match] = []
            for place in np.argsort(distances, kind="stable"):
                id_ = self._ids[rows[place]]
                point = self._points[id_]
                if matches(condition, point.metadata):
                    hits.append(Match(id_, float(distances[place]), point.fingerprint))
                    if len(hits) == limit:
                        break
            return hits

    def get(self, ids: Sequence[str]) -> list[Stored]:
        with self._lock:
            present = [(id_, self._points[id_]) for id_ in dict.fromkeys(ids) if id_ in self._points]
        return [Stored(id_, point.fingerprint, point.vector.copy()) for id_, point in present]

    def scan(self, after: str | None, limit: int) -> list[Entry]:
        with self._lock:
            if self._sorted_ids is None:
                self._sorted_ids = sorted(self._ids)
            start = 0 if after is None else bisect_right(self._sorted_ids, after)
            page = self._sorted_ids[start : start + limit]
            return [Entry(id_, self._points[id_].fingerprint) for id_ in page]

    def read_mark(self) -> str | None:
        return self._mark

    def write_mark(self, mark: str) -> None:
        self._mark = mark

    def close(self) -> None:
        """Do nothing: the points live as long as the object."""

    def _passes(self, id_: str, epoch: int) -> bool:
        """Whether a write under *epoch* may change *id_*. Epoch 0 always may."""
        if epoch == 0:
            return True
        highest = self._epochs.get(id_, 0)
        self._epochs[id_] = max(highest, epoch)
        return epoch >= highest

    def _reserve(self, rows: int) -> None:
        if rows > len(self._units):
            grown = np.empty((max(rows, 2 * len(self._units), 64), self._units.shape[1]), dtype=np.float32)
            grown[: len(self._ids)] = self._units[: len(self._ids)]
            self._units = grown
