"""Points in memory, compared one by one with FAISS."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from memstate_sa.indexes._filters import matches
from memstate_sa.indexes._units import clipped_distance
from memstate_sa.indexes.base import Match, Scalar


@dataclass(slots=True)
class FlatPoint:
    """A point without its vector. The vector is in row ``row`` of the index."""

    row: int
    fingerprint: str
    norm: float
    metadata: Mapping[str, Scalar]
    epoch: int


class Flat:
    """Unit vectors in the rows of an IndexFlatIP, and the other fields of points by id. Not thread-safe.

    This class does not use IndexIDMap, because removing one point there reads all points (13 ms for 100,000).
    """

    def __init__(self, faiss: Any, dimension: int) -> None:
        self.points: dict[str, FlatPoint] = {}
        self._faiss = faiss
        self._dimension = dimension
        self._index = faiss.IndexFlatIP(dimension)
        self._ids: list[str] = []  # row n belongs to the id at n
        self._sorted: list[str] | None = None

    def find(self, ids: Iterable[str]) -> list[tuple[str, FlatPoint]]:
        return [(id_, self.points[id_]) for id_ in dict.fromkeys(ids) if id_ in self.points]

    def in_order(self) -> list[str]:
        if self._sorted is None:
            self._sorted = sorted(self.points)
        return self._sorted

    def put(self, fields: Sequence[Any], units: NDArray[np.float32], epochs: Sequence[int]) -> None:
        """Add or replace points. *fields* are (id, fingerprint, length, metadata) of each point. Ids are unique."""
        added = [place for place, (id_, *_) in enumerate(fields) if id_ not in self.points]
        replaced = [place for place, (id_, *_) in enumerate(fields) if id_ in self.points]
        if replaced:
            self._rows()[[self.points[fields[place][0]].row for place in replaced]] = units[replaced]
        if added:
            self._index.add(units[added])
            self._sorted = None
        for place in added:
            self._ids.append(fields[place][0])
        rows = {fields[place][0]: len(self._ids) - len(added) + n for n, place in enumerate(added)}
        for (id_, fingerprint, norm, metadata), epoch in zip(fields, epochs, strict=True):
            row = rows[id_] if id_ in rows else self.points[id_].row
            self.points[id_] = FlatPoint(row, fingerprint, norm, metadata, epoch)

    def remove(self, ids: Iterable[str]) -> None:
        points = self.find(ids)
        if not points:
            return
        rows = self._rows()
        for id_, point in points:
            del self.points[id_]
            last = self._ids.pop()
            if last != id_:  # the last row moves into the gap
                rows[point.row] = rows[len(self._ids)]
                self._ids[point.row] = last
                self.points[last].row = point.row
        self._index.remove_ids(self._faiss.IDSelectorRange(len(self._ids), self._index.ntotal))
        self._sorted = None

    def units(self, ids: Sequence[str]) -> NDArray[np.float32]:
        copied: NDArray[np.float32] = self._rows()[[self.points[id_].row for id_ in ids]]
        return copied

    def nearest(self, query: NDArray[np.float32], limit: int, where: Mapping[str, Any]) -> list[Match]:
        """The nearest points that satisfy the canonical filter *where*."""
        if not where:
            return self._searched(query, limit)
        # Enough of the nearest points usually satisfy the filter. If not, check the metadata of all points.
        count = 4 * limit
        while count * 10 < len(self.points):
            hits = [match for match in self._searched(query, count) if matches(where, self.points[match.id].metadata)]
            if len(hits) >= limit:
                return hits[:limit]
            count *= 8
        return self.among(query, limit, self.points, where)

    def among(
        self, query: NDArray[np.float32], limit: int, ids: Iterable[str], where: Mapping[str, Any]
    ) -> list[Match]:
        matching_ids = [id_ for id_, point in self.find(ids) if matches(where, point.metadata)]
        scores = self.units(matching_ids) @ query[0]
        order = np.argsort(-scores, kind="stable")[:limit]
        return [self._match(matching_ids[place], float(scores[place])) for place in order]

    def _rows(self) -> NDArray[np.float32]:
        """All rows, readable and writable in place. The array is valid until a point is added."""
        count = self._index.ntotal
        if not count:
            return np.empty((0, self._dimension), dtype=np.float32)
        rows: NDArray[np.float32] = self._faiss.rev_swig_ptr(self._index.get_xb(), count * self._dimension)
        return rows.reshape(count, self._dimension)

    def _searched(self, query: NDArray[np.float32], limit: int) -> list[Match]:
        if not self.points:
            return []
        # Use one core. A second core saves 3 ms for 100,000 points, but costs 10 ms if it is busy.
        threads = self._faiss.omp_get_max_threads()  # this setting affects the present thread only
        self._faiss.omp_set_num_threads(1)
        try:
            [scores], [rows] = self._index.search(query, min(limit, len(self.points)))
        finally:
            self._faiss.omp_set_num_threads(threads)
        return [self._match(self._ids[row], score) for row, score in zip(rows.tolist(), scores.tolist(), strict=True)]

    def _match(self, id_: str, score: float) -> Match:
        return Match(id_, clipped_distance(1.0 - score), self.points[id_].fingerprint)
