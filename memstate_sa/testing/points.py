"""Small points for tests, and the content of an index in a form that tests can compare."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from memstate_sa.indexes.base import Filter, Point, Vector, VectorIndex

X, Y, Z = (1.0, 0.0, 0.0), (0.0, 1.0, 0.0), (0.0, 0.0, 1.0)


def vector(*values: float) -> Vector:
    return np.array(values, dtype=np.float32)


def point(
    id_: str,
    values: Sequence[float] = X,
    *,
    fingerprint: str = "f",
    epoch: int = 0,
    text: str | None = None,
    metadata: Mapping[str, Any] | None = None,
) -> Point:
    return Point(id_, vector(*values), fingerprint, epoch, metadata=metadata or {}, text=text)


def fingerprints(index: VectorIndex, page: int = 100) -> dict[str, str]:
    """The fingerprints of all points in *index*, by id. Asserts that `scan` lists them in order."""
    listed: dict[str, str] = {}
    after: str | None = None
    while entries := index.scan(after, page):
        assert [entry.id for entry in entries] == sorted(entry.id for entry in entries)
        assert after is None or entries[0].id > after
        listed.update(entries)
        after = entries[-1].id
    return listed


def contents(index: VectorIndex, ids: Sequence[str]) -> dict[str, tuple[str, list[float]]]:
    """Fingerprint and vector of the stored points among *ids*. Values are rounded: an index may lose the last bit."""
    return {stored.id: (stored.fingerprint, stored.vector.round(5).tolist()) for stored in index.get(ids)}


def ids_where(index: VectorIndex, where: Filter) -> set[str]:
    return {match.id for match in index.query(vector(*X), 100, where=where)}
