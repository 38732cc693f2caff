"""The hits of a search, and the distance by which they are ordered."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Generic, TypeVar

import numpy as np

from memstate_sa.indexes.base import Vector

F = TypeVar("F")


@dataclass(frozen=True, slots=True)
class Hit(Generic[F]):
    """A fact that SQL holds, and how near it is: cosine distance, 0 identical to 2 opposite."""

    fact: F
    distance: float

    @property
    def score(self) -> float:
        return 1.0 - self.distance


class Hits(list[Hit[F]]):
    """Hits, best first.

    ``complete`` is False when some rows could not be considered: more undelivered than `OVERLAY_LIMIT`, an embedding
    that failed, an index that is still being filled, a key that no row can have, or a transaction whose snapshot is
    older than the index.
    """

    complete: bool = True


def cosine_distance(a: Vector, b: Vector) -> float:
    """1 − cosine similarity; 1 when either vector is zero."""
    a, b = a.astype(np.float64), b.astype(np.float64)
    norm = float(np.linalg.norm(a) * np.linalg.norm(b))
    return 1.0 - float(a @ b) / norm if norm else 1.0
