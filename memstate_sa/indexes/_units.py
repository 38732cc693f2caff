"""Unit vectors, for indexes that compare directions only. Such an index loses lengths, or overflows on them. Pure."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from memstate_sa.indexes.base import Vector


def unit_rows(rows: NDArray[np.float32]) -> tuple[NDArray[np.float32], NDArray[np.float64]]:
    """*rows* scaled to length 1, and their lengths, of shape ``(n,)``. A zero vector is unchanged.

    The lengths are computed in double precision. In float32, the square of 3e38 overflows, and that of 1e-38 is zero.
    """
    doubles = rows.astype(np.float64)
    norms = np.linalg.norm(doubles, axis=1)
    return (doubles / np.where(norms > 0, norms, 1.0)[:, None]).astype(np.float32), norms


def clipped_distance(distance: float) -> float:
    """*distance* clipped to 0 … 2, the range of the cosine distance. Rounding can leave this range."""
    return min(max(distance, 0.0), 2.0)


def at_length(unit: Vector, norm: float) -> Vector:
    """The vector from which `unit_rows` made *unit*. The last bit may differ."""
    return (unit.astype(np.float64) * norm).astype(np.float32)
