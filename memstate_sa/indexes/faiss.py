"""FAISS as a vector index: exact, in this process, and stored in a folder."""

from __future__ import annotations

import threading
import uuid
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from memstate_sa.errors import IndexMismatch, require_module
from memstate_sa.indexes._adapter import Adapter, OpenState
from memstate_sa.indexes._filters import canonical
from memstate_sa.indexes._flat import Flat
from memstate_sa.indexes._journal import Journal, Record
from memstate_sa.indexes._tags import stored
from memstate_sa.indexes._units import at_length, unit_rows
from memstate_sa.indexes.base import Entry, Filter, Match, Point, Stored, Vector, matrix
from memstate_sa.runtime import forks
from memstate_sa.runtime.printable import printable_logger

if TYPE_CHECKING:
    from memstate_sa.indexes._folder import LockedFolder

logger = printable_logger("memstate_sa.indexes")

_ADVICE = "Open it once and share the object. For several processes, use an index with a server, such as PgVectorIndex."
_SPARE = 10_000
"""The journal is rewritten when it has more changes than twice the number of points plus this number."""
_IN_A_RECORD = 5_000
_REMEMBERED = 100_000
"""The number of deleted ids whose epochs are remembered. Only late threads of this process need them."""


class FaissIndex(Adapter):
    """An exact index. A query compares 100,000 points of 256 dimensions in about 10 ms.

    All points are in memory, and in *folder* as a journal of changes with checksums. A change is on the disk when the
    call returns, and a ``kill -9`` at any moment loses none. `purge` rewrites the journal without deleted points. A
    write also rewrites it when most of it is deleted points. If the disk damages the journal, ``incarnation``
    changes, and the relay compares the remaining points with the tables.

    Only one object at a time may open a folder: it is locked (``memstate.lock``). For several processes, use an index
    with a server. Writes are fenced by their epochs (`FencedIndex`). The text of a fact is not stored.
    """

    fences = True
    in_process = True
    _vendor = "FAISS"

    def __init__(self, folder: str | Path, *, max_batch: int = 10_000) -> None:
        self._faiss = require_module("faiss", "faiss", "faiss-cpu")
        require_module("filelock", "faiss")
        self._folders: Any = import_module("memstate_sa.indexes._folder")
        self._max_batch = max_batch
        self._make_mutex()
        forks.in_child(self, FaissIndex._make_mutex)
        self._journal = Journal(Path(folder).resolve() / "points.journal")
        self._written = 0  # the number of changes in the journal
        self._folder: LockedFolder | None = None
        self._state: dict[str, Any] = {}
        self._points: Flat | None = None
        self._buried: dict[str, int] = {}  # the epochs of deleted ids outlive close(), because late threads may write

    def _make_mutex(self) -> None:
        self._mutex = threading.RLock()

    @property
    def incarnation(self) -> str:
        with self._using("identify"):
            return str(self._state["incarnation"])

    @property
    def max_batch(self) -> int:
        return self._max_batch

    def open(self, *, embedder: str, dimension: int) -> None:
        with self._mutex, self._translated("open", sends_facts=False):
            first = self._points is None
            try:
                if first:
                    self._load(embedder, dimension)
                self._fits(embedder, dimension)
            except BaseException:
                if first:
                    self.close()
                raise

    def upsert(self, points: Sequence[Point]) -> None:
        vectors = matrix([point.vector for point in points], self._dimension, [point.id for point in points])
        units, norms = unit_rows(vectors)
        with self._using("write to") as flat:
            rows: dict[str, int] = {}
            epochs: dict[str, int] = {}
            for row, point in enumerate(points):
                highest = self._epoch(point.id)
                if _passes(point.epoch, highest):
                    rows[point.id], epochs[point.id] = row, max(point.epoch, highest)
            if not rows:
                return
            fields = [
                (id_, points[row].fingerprint, float(norms[row]), stored(points[row].metadata, id_))
                for id_, row in rows.items()
            ]
            written_units = units[list(rows.values())]
            self._journal.append({"put": fields}, written_units.tobytes())
            flat.put(fields, written_units, list(epochs.values()))
            for id_ in rows:
                self._buried.pop(id_, None)
            self._wrote(len(rows))

    def delete(self, ids: Sequence[str], *, epoch: int = 0) -> None:
        with self._using("delete from") as flat:
            known = {id_: self._epoch(id_) for id_ in ids}
            epochs = {id_: max(epoch, highest) for id_, highest in known.items() if _passes(epoch, highest)}
            stored_ids = [id_ for id_, _ in flat.find(epochs)]
            if stored_ids:
                self._journal.append({"delete": stored_ids})
                flat.remove(stored_ids)
            for id_, highest in epochs.items():
                if highest:
                    self._buried.pop(id_, None)  # this moves the id to the end: the oldest ids come first
                    self._buried[id_] = highest
            while len(self._buried) > _REMEMBERED:
                del self._buried[next(iter(self._buried))]
            self._wrote(len(stored_ids))

    def query(
        self, vector: Vector, limit: int, *, where: Filter | None = None, ids: Sequence[str] | None = None
    ) -> list[Match]:
        query, _ = unit_rows(matrix([vector], self._dimension, ["the query"]))
        condition = canonical(where or {})
        with self._using("search") as flat:
            if condition is None or limit < 1:
                return []
            return flat.nearest(query, limit, condition) if ids is None else flat.among(query, limit, ids, condition)

    def get(self, ids: Sequence[str]) -> list[Stored]:
        with self._using("read") as flat:
            present = flat.find(ids)
            units = flat.units([id_ for id_, _ in present])
        return [
            Stored(id_, point.fingerprint, at_length(unit, point.norm))
            for (id_, point), unit in zip(present, units, strict=True)
        ]

    def scan(self, after: str | None, limit: int) -> list[Entry]:
        with self._using("scan") as flat:
            ids = flat.in_order()
            start = 0 if after is None else bisect_right(ids, after)
            return [Entry(id_, flat.points[id_].fingerprint) for id_ in ids[start : start + limit]]

    def purge(self) -> None:
        """Rewrite the journal without deleted and replaced points. The incarnation stays."""
        with self._using("purge") as flat:
            self._compact(flat)

    def read_mark(self) -> str | None:
        with self._using("read the mark of"):
            return self._state.get("mark")

    def write_mark(self, mark: str) -> None:
        with self._using("mark"):
            self._journal.append({"mark": mark})
            self._state["mark"] = mark
            self._wrote(1)

    def close(self) -> None:
        """Release the folder and the memory."""
        with self._mutex:
            self._journal.close()
            self._opened = self._points = None
            if self._folder is not None:
                self._folder.release()
                self._folder = None

    # -- the folder ----------------------------------------------------------------------------------------------------

    @contextmanager
    def _using(self, action: str) -> Iterator[Flat]:
        """The points, locked for this thread. Errors are raised as DeliveryError."""
        with self._mutex, self._translated(action):
            assert self._open_state
            assert self._points is not None
            self._check()
            yield self._points

    @property
    def _place(self) -> str:
        return f"the folder {str(self._journal.path.parent)!r}"

    def _check(self) -> None:
        assert self._folder is not None
        self._folder.check()

    def _fits(self, embedder: str, dimension: int) -> None:
        self._check()
        theirs, size = self._state["embedder"], self._state["dimension"]
        if (theirs, size) != (embedder, dimension):
            raise IndexMismatch(
                f"Cannot use {self._place}. It was built with embedder {theirs!r} and {size} dimensions, but this "
                f"Memory needs {embedder!r} and {dimension} dimensions. Use another folder, or delete this one to "
                "rebuild it."
            )

    def _load(self, embedder: str, dimension: int) -> None:
        path = self._journal.path
        path.parent.mkdir(parents=True, exist_ok=True)
        self._folder = self._folders.lock_alone(path, "FAISS", _ADVICE)
        self._state, self._written = {}, 0
        latest: dict[str, tuple[Any, bytes]] = {}
        for value, data in self._journal.read():
            self._state = value.get("state", self._state)
            if "mark" in value:
                self._state["mark"] = value["mark"]
                self._written += 1
            added, deleted = value.get("put", ()), value.get("delete", ())
            width = len(data) // max(1, len(added))
            for row, point in enumerate(added):
                latest[point[0]] = (point, data[row * width : (row + 1) * width])
            for id_ in deleted:
                latest.pop(id_, None)
            self._written += len(added) + len(deleted)
        self._folder.watch()
        has_begun = bool(self._state)
        if not has_begun or self._journal.damaged:
            self._state = {"embedder": embedder, "dimension": dimension, **self._state, "incarnation": uuid.uuid4().hex}
        points = self._points = Flat(self._faiss, self._state["dimension"])
        self._opened = OpenState(self._state["embedder"], int(self._state["dimension"]))
        units = np.frombuffer(b"".join(unit for _, unit in latest.values()), dtype=np.float32)
        fields = [point for point, _ in latest.values()]
        points.put(fields, units.reshape(-1, self._state["dimension"]), [0] * len(fields))
        if self._journal.damaged:
            self._compact(points)
        elif not has_begun:
            self._journal.append({"state": self._state})

    def _wrote(self, count: int) -> None:
        self._written += count
        if self._points is not None and self._written > 2 * len(self._points.points) + _SPARE:
            try:
                self._compact(self._points)
            except OSError as error:  # the write is on the disk, so do not report it as failed
                logger.warning("Could not shorten the journal in %s: %s", self._place, error.strerror)

    def _compact(self, points: Flat) -> None:
        self._written = len(points.points)  # set it first, so that a failure is not repeated at every write
        try:
            self._journal.replace(self._records(points))
        finally:
            if self._folder is not None:
                self._folder.watch()

    def _records(self, points: Flat) -> Iterator[Record]:
        yield {"state": self._state}, b""
        ids = list(points.points)
        for start in range(0, len(ids), _IN_A_RECORD):
            batch = points.find(ids[start : start + _IN_A_RECORD])
            fields = [(id_, point.fingerprint, point.norm, point.metadata) for id_, point in batch]
            yield {"put": fields}, points.units([id_ for id_, _ in batch]).tobytes()

    # -- the fence -----------------------------------------------------------------------------------------------------

    def _epoch(self, id_: str) -> int:
        point = self._points.points.get(id_) if self._points is not None else None
        return point.epoch if point is not None else self._buried.get(id_, 0)


def _passes(epoch: int, highest: int) -> bool:
    """Whether a write under *epoch* may change a point written under epoch *highest*. Epoch 0 always may."""
    return epoch == 0 or epoch >= highest
