"""The port to a vector index: its methods, and the values that they take and return."""

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

    ``vector`` has shape ``(dimension,)``; ``fingerprint`` identifies the content the vector was made from; ``epoch`` is
    the claim under which it is written (an index that can fence refuses a lower one); ``text`` is set only with
    ``store_text=True``.
    """

    id: str
    vector: Vector
    fingerprint: str
    epoch: int = 0
    metadata: Mapping[str, Scalar] = field(default_factory=dict)
    text: str | None = None


class Match(NamedTuple):
    """A neighbour of a query vector; ``distance`` is the cosine distance, 0 identical to 2 opposite."""

    id: str
    distance: float
    fingerprint: str


class Entry(NamedTuple):
    """A stored point as `VectorIndex.scan` lists it."""

    id: str
    fingerprint: str


class Stored(NamedTuple):
    """A stored point with its vector, as `VectorIndex.get` returns it.

    The vector may have lost its last bit: Chroma keeps it normalised.
    """

    id: str
    fingerprint: str
    vector: Vector


@runtime_checkable
class VectorIndex(Protocol):
    """A vector index. Implement it to bring your own.

    Every call may come from any thread. Writes are idempotent: the last upsert of an id wins, and deleting an absent id
    is not an error. Failures are raised as `DeliveryRetryable` (unavailable, try again) or `DeliveryRejected` (these
    points are refused), chained from the vendor's error.
    """

    @property
    def incarnation(self) -> str:
        """Identifies this content's lifetime: the relay refills an index whose incarnation it does not know.

        It changes when the index was lost, emptied or swapped; an index that does not outlive its process makes up a
        new one each time.
        """
        ...

    @property
    def max_batch(self) -> int:
        """The most points one `upsert`, and the most ids one `delete` or `get`, may carry."""
        ...

    # An index that lives in the process that writes to it may say so by an attribute ``in_process = True``: nothing of
    # a process that has ended lands in it any more, and the next relay need not wait for its lease. A relay reads and
    # embeds the next page while another index is called, in a thread.

    def open(self, *, embedder: str, dimension: int) -> None:
        """Create the index, or check that the stored one fits. Idempotent; called before anything else.

        ``embedder`` is `Embedder.fingerprint`. Raises IndexMismatch, naming both sides, when the stored index was built
        by another embedder, with another dimension, or with a distance that is not cosine.
        """
        ...

    def upsert(self, points: Sequence[Point]) -> None:
        """Store *points*, replacing vector, fingerprint, text and all metadata of ids already there."""
        ...

    def delete(self, ids: Sequence[str]) -> None: ...

    def query(
        self, vector: Vector, limit: int, *, where: Filter | None = None, ids: Sequence[str] | None = None
    ) -> list[Match]:
        """The *limit* nearest points, nearest first, among *ids* and satisfying *where* when given.

        Fewer than *limit* means that there are no more.
        """
        ...

    def get(self, ids: Sequence[str]) -> list[Stored]:
        """The stored points among *ids*, in any order; absent ones are left out."""
        ...

    def scan(self, after: str | None, limit: int) -> list[Entry]:
        """Up to *limit* entries with an id greater than *after*, ordered by id (code point order).

        Points that memstate_sa did not write are left out. An empty list means the end.
        """
        ...

    def close(self) -> None: ...


@runtime_checkable
class FencedIndex(VectorIndex, Protocol):
    """An index that leaves alone what was written, or deleted, under a higher epoch than a write's.

    A relay that was overtaken may still be writing. Here that has no effect; elsewhere the keys are delivered again as
    soon as it finds out.
    """

    @property
    def fences(self) -> bool: ...

    def delete(self, ids: Sequence[str], *, epoch: int = 0) -> None:
        """Remembers *epoch* for each id."""
        ...


def is_fenced(index: VectorIndex) -> TypeGuard[FencedIndex]:
    """Whether *index* is a `FencedIndex`. Before Python 3.12 isinstance() asks the server for the incarnation."""
    return bool(getattr(index, "fences", False))


@runtime_checkable
class PurgeableIndex(VectorIndex, Protocol):
    """An index whose files go on holding what was deleted from it, until they are rewritten."""

    def purge(self) -> None:
        """Rewrite the files without what is deleted; the index may have another incarnation afterwards.

        Raises MemstateError, saying what to do, where the files are out of reach.
        """
        ...


@runtime_checkable
class RemakableIndex(Protocol):
    """An index whose files may be damaged. `open` then raises IndexBroken."""

    def remake(self) -> None:
        """Delete the index. The next `open` creates it again, with another incarnation."""
        ...


@runtime_checkable
class MarkedIndex(VectorIndex, Protocol):
    """An index that keeps one short text beside its points, wherever it keeps those, and loses it only with them.

    The relay compares it with the database. It tells when either of the two was restored from a backup.
    """

    def read_mark(self) -> str | None:
        """The text that was written last, by any process; None when there was none."""
        ...

    def write_mark(self, mark: str) -> None:
        """Keep *mark*, of at most 100 characters, instead of the one before. It changes neither points nor incarnation.

        When this returns, *mark* is as durable as points are.
        """
        ...


def keeps_mark(index: VectorIndex) -> TypeGuard[MarkedIndex]:
    """Whether *index* is a `MarkedIndex`; not by isinstance, as in `is_fenced`."""
    return callable(getattr(index, "write_mark", None))


def matrix(vectors: Sequence[Vector], dimension: int, names: Sequence[str]) -> NDArray[np.float32]:
    """*vectors* as one matrix of shape ``(n, dimension)``.

    Raises DeliveryRejected, with its name, for a vector of another shape or with NaN or infinity: one of those in an
    index makes every distance to it meaningless.
    """
    for vector, name in zip(vectors, names, strict=True):
        shape = np.shape(vector)
        if shape != (dimension,):
            raise DeliveryRejected(f"the vector of {name} has shape {shape}; this index holds ({dimension},)")
    with np.errstate(over="ignore"):  # a float64 too large for float32 becomes infinity, refused below
        rows = np.array(vectors, dtype=np.float32).reshape(len(vectors), dimension)
    finite = np.isfinite(rows).all(axis=1)
    if not finite.all():
        raise DeliveryRejected(f"the vector of {names[int(np.argmin(finite))]} holds NaN or infinity")
    return rows
