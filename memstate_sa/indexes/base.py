"""The port to a vector index: its methods, their arguments and their results."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Protocol, TypeAlias, TypeGuard, runtime_checkable

import numpy as np
from numpy.typing import NDArray

from memstate_sa.errors import DeliveryRejected

Vector: TypeAlias = NDArray[np.float32]
Scalar: TypeAlias = str | int | float | bool | None
Filter: TypeAlias = Mapping[str, Any]
"""A condition on point metadata: ``{"role": {"$eq": "tip"}}``, combined with ``{"$and": [...]}`` and
``{"$or": [...]}``.

Operators: ``$eq``, ``$in``, ``$gt``, ``$gte``, ``$lt``, ``$lte``. A missing or None value matches none of them.
Strings, booleans and numbers never equal each other (True is not 1, but 1 is 1.0), and only numbers are ordered. NaN
and infinity are stored as None.
"""


@dataclass(frozen=True, slots=True)
class Point:
    """One fact as an index stores it.

    - ``vector`` has shape ``(dimension,)``.
    - ``fingerprint`` identifies the content from which the vector was made.
    - ``epoch`` is that of the claim under which the point is written. A `FencedIndex` refuses a lower one.
    - ``text`` is set only with ``store_text=True``.
    """

    id: str
    vector: Vector
    fingerprint: str
    epoch: int = 0
    metadata: Mapping[str, Scalar] = field(default_factory=dict)
    text: str | None = None


class Match(NamedTuple):
    """A neighbour of a query vector. ``distance`` is the cosine distance: from 0 (identical) to 2 (opposite)."""

    id: str
    distance: float
    fingerprint: str


class Entry(NamedTuple):
    """A stored point in the list of `VectorIndex.scan`."""

    id: str
    fingerprint: str


class Stored(NamedTuple):
    """A stored point with its vector, the result of `VectorIndex.get`.

    The last bit of the vector may differ, because some indexes store it normalised.
    """

    id: str
    fingerprint: str
    vector: Vector


@runtime_checkable
class VectorIndex(Protocol):
    """A vector index. Implement this protocol to use your own.

    Every call may come from any thread. Writes are idempotent: the last upsert of an id wins, and deleting an absent id
    is not an error. Failures are raised as `DeliveryRetryable` (unavailable, try again) or `DeliveryRejected` (these
    points are refused), chained from the vendor's error.
    """

    @property
    def incarnation(self) -> str:
        """An id for one lifetime of the content. The relay refills an index if it does not know the incarnation.

        It changes when the index was lost, emptied or swapped. An index that does not outlive its process has a new
        incarnation each time.
        """
        ...

    @property
    def max_batch(self) -> int:
        """The largest number of points for one `upsert`, and of ids for one `delete` or `get`."""
        ...

    # An index inside the writing process may set an attribute ``in_process = True``. An ended process cannot write to
    # it any more, so the next relay does not wait until that process's lease ends. For other indexes, a relay makes
    # each call in a thread, and reads and embeds the next page at the same time.

    def open(self, *, embedder: str, dimension: int) -> None:
        """Create the index, or check that the stored one fits. Callers open an index first, and perhaps repeatedly.

        ``embedder`` is `Embedder.fingerprint`. Raises IndexMismatch if the stored index was built by another embedder,
        with another dimension, or with another distance than cosine. The message names both sides.
        """
        ...

    def upsert(self, points: Sequence[Point]) -> None:
        """Store *points*. Replace vector, fingerprint, text and all metadata of ids that exist already."""
        ...

    def delete(self, ids: Sequence[str]) -> None: ...

    def query(
        self, vector: Vector, limit: int, *, where: Filter | None = None, ids: Sequence[str] | None = None
    ) -> list[Match]:
        """The *limit* nearest points, nearest first. *where* and *ids*, if set, restrict the choice.

        A result shorter than *limit* holds all points that match.
        """
        ...

    def get(self, ids: Sequence[str]) -> list[Stored]:
        """The stored points among *ids*, in any order. Absent ids are left out."""
        ...

    def scan(self, after: str | None, limit: int) -> list[Entry]:
        """Up to *limit* stored points with an id greater than *after*, ordered by id (code point order).

        Points that memstate_sa did not write are left out. An empty list means the end.
        """
        ...

    def close(self) -> None: ...


@runtime_checkable
class FencedIndex(VectorIndex, Protocol):
    """An index that ignores a write if its id was written or deleted under a higher epoch.

    A relay that lost its claim may still be writing. In this index its writes have no effect. In other indexes its keys
    are delivered again as soon as the relay notices.
    """

    @property
    def fences(self) -> bool: ...

    def delete(self, ids: Sequence[str], *, epoch: int = 0) -> None:
        """Delete the points, and remember *epoch* for each id."""
        ...


def is_fenced(index: VectorIndex) -> TypeGuard[FencedIndex]:
    """Whether *index* is a `FencedIndex`.

    The check does not use isinstance(). Before Python 3.12, that reads ``incarnation``, which may call the server.
    """
    return bool(getattr(index, "fences", False))


@runtime_checkable
class PurgeableIndex(VectorIndex, Protocol):
    """An index whose files still hold deleted points until they are rewritten."""

    def purge(self) -> None:
        """Rewrite the files without the deleted points. The index may have another incarnation afterwards.

        Raises MemstateError if the files are out of reach. The message says what to do.
        """
        ...


@runtime_checkable
class RemakableIndex(Protocol):
    """An index whose files can be damaged. `open` then raises IndexBroken."""

    def remake(self) -> None:
        """Delete the index. The next `open` creates it again, with another incarnation."""
        ...


@runtime_checkable
class MarkedIndex(VectorIndex, Protocol):
    """An index that keeps one short text, the mark, in the same place as its points. It never loses only one of them.

    The relay compares the mark with the database. A difference shows that one of them was restored from a backup.
    """

    def read_mark(self) -> str | None:
        """The text that any process wrote last, or None."""
        ...

    def write_mark(self, mark: str) -> None:
        """Replace the mark by *mark*, of at most 100 characters. Points and incarnation do not change.

        When this returns, *mark* is as durable as points are.
        """
        ...


def keeps_mark(index: VectorIndex) -> TypeGuard[MarkedIndex]:
    """Whether *index* is a `MarkedIndex`. The check does not use isinstance(), for the reason in `is_fenced`."""
    return callable(getattr(index, "write_mark", None))


def matrix(vectors: Sequence[Vector], dimension: int, names: Sequence[str]) -> NDArray[np.float32]:
    """*vectors* as one matrix of shape ``(n, dimension)``.

    Raises DeliveryRejected for a vector of another shape, or with NaN or infinity. Every distance to such a vector
    would be meaningless. The message has the vector's name, from *names*.
    """
    for vector, name in zip(vectors, names, strict=True):
        shape = np.shape(vector)
        if shape != (dimension,):
            raise DeliveryRejected(
                f"The vector of {name} has shape {shape}, but this index holds ({dimension},). Check the embedder."
            )
    with np.errstate(over="ignore"):  # a float64 too large for float32 becomes infinity, which is refused below
        rows = np.array(vectors, dtype=np.float32).reshape(len(vectors), dimension)
    finite = np.isfinite(rows).all(axis=1)
    if not finite.all():
        raise DeliveryRejected(
            f"The vector of {names[int(np.argmin(finite))]} holds NaN or infinity. Check the embedder."
        )
    return rows
