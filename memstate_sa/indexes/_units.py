"""Vectors at length 1, for an index that compares directions and loses, or overflows on, their lengths; pure."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from memstate_sa.indexes.base import Vector


def unit_rows(rows: NDArray[np.float32]) -> tuple[NDArray[np.float32], NDArray[np.float64]]:
    """*rows* at length 1, and their lengths, of shape ``(n,)``; a zero vector stays what it is.

    In double precision: the square of 3e38 is no float32, and that of 1e-38 is zero.
    """
    doubles = rows.astype(np.float64)
    norms = np.linalg.norm(doubles, axis=1)
    return (doubles / np.where(norms > 0, norms, 1.0)[:, None]).astype(np.float32), norms


def clipped_distance(distance: float) -> float:
    """*distance* in the range of the cosine distance, which rounding may leave."""
    return min(max(distance, 0.0), 2.0)


def at_length(unit: Vector, norm: float) -> Vector:
    """The vector that `unit_rows` made *unit* of, but for its last bit."""
    return (unit.astype(np.float64) * norm).astype(np.float32)
