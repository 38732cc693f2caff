"""Qdrant as a vector index: a server, a folder, or in memory, through qdrant-client.

The behaviour described here was read in the source of Qdrant 1.19, and measured with the local mode of qdrant-client
1.20.
"""

from __future__ import annotations

import math
import os
import sqlite3
import sys
import threading
import time
import uuid
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext, suppress
from functools import partial
from hashlib import blake2b
from pathlib import Path
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

import numpy as np

from memstate_sa.errors import (
    DeliveryError,
    DeliveryRetryable,
    IndexMismatch,
    MemstateError,
    require_module,
)
from memstate_sa.indexes._adapter import REMEMBERED_S, Adapter, IdListing, OpenState, file_identity, id_bytes
from memstate_sa.indexes._filters import canonical
from memstate_sa.indexes._nearest import Answer, Candidate, nearest
from memstate_sa.indexes._tags import number_name, numbers, stored, tag, tags
from memstate_sa.indexes._units import at_length, clipped_distance, unit_rows
from memstate_sa.indexes.base import Entry, Filter, Match, Point, Stored, Vector, matrix

if TYPE_CHECKING:
    from qdrant_client import QdrantClient

_OURS = "memstate"
"""The key of memstate_sa's own data, in a point's payload and in the collection's metadata."""
_MARK = "memstate_mark"
_LARGEST_REQUEST = 500_000
"""The largest count of numbers in one request. They take 10 MB of JSON, and a server accepts 32 MB."""
_LISTED = 10_000

# Local mode has no locks, and several indexes may share a client. So each client has a lock here.
_locks: WeakKeyDictionary[Any, threading.RLock] = WeakKeyDictionary()
_making = threading.Lock()


class QdrantIndex(Adapter):
    """The collection *name* of any qdrant-client: a server (1.16 or later), ``path=`` or ``:memory:``.

    Distance is cosine. The text of a fact is stored only with *store_text*. `close` does not close the client: it
    belongs to the caller. A point's payload holds the metadata twice: unchanged, and as tags. One payload index on the
    tags serves every filter by equality.

    Writes are fenced by their epochs (`FencedIndex`). An upsert carries its epoch as a precondition
    (``update_filter``). A deleted point leaves its epoch behind, for a day, in a point without content.

    With *exact*, a query compares every point. Otherwise a server searches its HNSW graph, which may miss a near point.
    Local mode is always exact. It locks its folder for one process: a second process gets qdrant-client's RuntimeError
    when it creates its client. Use a server for several processes.

    ``incarnation`` is in the collection's metadata. If the collection is deleted, the next call raises
    DeliveryRetryable. The call after it works on a new, empty collection. Foreign points are left alone.
    """

    fences = True
    _vendor = "Qdrant"

    def __init__(
        self, client: QdrantClient, name: str = "memory", *, exact: bool = False, store_text: bool = False
    ) -> None:
        self._models: Any = require_module("qdrant_client.models", "qdrant", "qdrant-client")
        self._client: Any = client
        self._name = name
        self._exact = exact
        self._store_text = store_text
        options = client.init_options
        self._path: str | None = options.get("path")
        self._local = self._path is not None or options.get("location") == ":memory:"
        self._folder: _Folder | None = None
        with _making:
            self._mutex = _locks.setdefault(client, threading.RLock()) if self._local else threading.RLock()
        self._listing = IdListing()
        self._forgot_at = 0.0

    @property
    def in_process(self) -> bool:
        return self._local

    @property
    def incarnation(self) -> str:
        with self._using("identify"):
            opened = self._resolve(self._open_state.embedder, self._open_state.dimension)
            return opened.incarnation

    @property
    def max_batch(self) -> int:
        return max(1, min(1000, _LARGEST_REQUEST // self._open_state.dimension))

    def open(self, *, embedder: str, dimension: int) -> None:
        with self._translated("open", sends_facts=False):
            if self._folder is not None:
                self._folder.check()
            self._opened = self._resolve(embedder, dimension)
            if self._path is not None and self._folder is None:
                self._folder = _Folder(Path(self._path))

    def upsert(self, points: Sequence[Point]) -> None:
        latest: dict[str, Point] = {}
        for point in points:
            if not point.epoch or point.id not in latest or point.epoch >= latest[point.id].epoch:
                latest[point.id] = point
        unique_points = list(latest.values())
        vectors = matrix([point.vector for point in unique_points], self._open_state.dimension, list(latest))
        by_epoch: dict[int, list[Any]] = {}
        for point, unit, norm in zip(unique_points, *unit_rows(vectors), strict=True):
            struct = self._models.PointStruct(
                id=_uuid(point.id), vector=unit.tolist(), payload=self._payload(point, float(norm))
            )
            by_epoch.setdefault(point.epoch, []).append(struct)
        with self._using("write to"):
            if 0 in by_epoch:
                self._keep_epochs(by_epoch[0])
            for epoch, structs in by_epoch.items():
                self._put(structs, epoch)

    def delete(self, ids: Sequence[str], *, epoch: int = 0) -> None:
        uuids = [_uuid(id_) for id_ in dict.fromkeys(ids)]
        if not uuids:
            return
        with self._using("delete from"):
            if not epoch:
                self._client.delete(self._name, points_selector=self._models.PointIdsList(points=uuids))
                return
            # The remaining point has none of our ids, and a zero vector, so no search finds it.
            payload = {_OURS: {"epoch": epoch, "deleted_at": int(time.time())}}
            zeros = [0.0] * self._open_state.dimension
            self._put([self._models.PointStruct(id=id_, vector=zeros, payload=payload) for id_ in uuids], epoch)
            self._forget_epochs()

    def query(
        self, vector: Vector, limit: int, *, where: Filter | None = None, ids: Sequence[str] | None = None
    ) -> list[Match]:
        [query], _ = unit_rows(matrix([vector], self._open_state.dimension, ["the query"]))
        condition = canonical(where or {})
        if condition is None or limit < 1 or (ids is not None and not ids):
            return []
        must = [self._condition(condition)] if condition else []
        if ids is not None:
            must.append(self._models.HasIdCondition(has_id=[_uuid(id_) for id_ in dict.fromkeys(ids)]))
        ask = partial(self._nearest, query, self._models.Filter(must=must) if must else None)
        with self._using("query"):
            return nearest(ask, limit, condition, exact=self._local or self._exact or ids is not None)

    def get(self, ids: Sequence[str]) -> list[Stored]:
        with self._using("read from"):
            return [
                Stored(ours["id"], ours["fingerprint"], at_length(np.asarray(unit, dtype=np.float32), ours["length"]))
                for ours, unit in self._read(ids, with_vectors=True)
            ]

    def scan(self, after: str | None, limit: int) -> list[Entry]:
        """Up to *limit* stored points with an id greater than *after*, ordered by id.

        Qdrant lists in the order of its own ids, which are hashes of ours. So a scan begins with a list of all ids
        (10,000 in a request), which it keeps until its end. Fingerprints are read page by page. A scan may miss a point
        that was first written during the scan: check missing ids with `get`.
        """
        with self._using("scan"):
            opened = self._open_state
            incarnation = self._resolve(opened.embedder, opened.dimension).incarnation
            for page in self._listing.pages(incarnation, after, min(limit, self.max_batch), self._list_ids):
                if entries := sorted(Entry(ours["id"], ours["fingerprint"]) for ours, _ in self._read(page)):
                    return entries
            return []

    def purge(self) -> None:
        """Rewrite the folder's file without deleted points. Raises MemstateError for a server."""
        if not self._local:
            raise MemstateError(
                f"Cannot purge collection {self._name!r}. Its files belong to a Qdrant server, which removes deleted "
                "points when it optimises its segments. To remove them at once, recreate the collection."
            )
        with self._using("purge"):
            if self._folder is not None:
                self._folder.vacuum(self._name)

    def read_mark(self) -> str | None:
        with self._using("read the mark of"):
            return (self._client.get_collection(self._name).config.metadata or {}).get(_MARK)

    def write_mark(self, mark: str) -> None:
        with self._using("mark"):
            self._client.update_collection(self._name, metadata={_MARK: mark})  # this keeps the other fields

    def close(self) -> None:
        """Close the index. The client stays open."""
        self._opened = self._folder = None
        self._listing.clear()

    # -- the collection -----------------------------------------------------------------------------------------------

    @property
    def _place(self) -> str:
        return f"collection {self._name!r}"

    @contextmanager
    def _using(self, action: str) -> Iterator[None]:
        """Make sure that the collection is there, and turn errors of the client into DeliveryError."""
        opened = self._open_state
        with self._translated(action):
            if self._folder is not None:
                self._folder.check()
            if not opened.incarnation:
                self._opened = self._resolve(opened.embedder, opened.dimension)
            yield

    @contextmanager
    def _translated(self, action: str, *, sends_facts: bool = True) -> Iterator[None]:
        # Only one thread at a time may use local mode.
        with super()._translated(action, sends_facts=sends_facts), self._mutex if self._local else nullcontext():
            yield

    def _delivery_error(self, error: Exception, message: str, sent: Sequence[str] | None) -> DeliveryError:
        with suppress(Exception):
            if not self._client.collection_exists(self._name):
                if self._opened is not None:
                    self._opened = self._opened._replace(incarnation="")
                return DeliveryRetryable(
                    f"Qdrant collection {self._name!r} was deleted. The next call creates it again."
                )
        retry_after_s = getattr(error, "retry_after_s", None)  # ResourceExhaustedResponse has this attribute
        if retry_after_s is not None:
            return DeliveryRetryable(f"{message}: {type(error).__name__}", retry_after_s=retry_after_s, may_land=False)
        return super()._delivery_error(error, message, sent)

    def _resolve(self, embedder: str, dimension: int) -> OpenState:
        if not self._client.collection_exists(self._name):
            self._create(embedder, dimension)
        config = self._client.get_collection(self._name).config
        vectors = config.params.vectors
        is_single = isinstance(vectors, self._models.VectorParams)
        size, distance = (vectors.size, vectors.distance.value) if is_single else (None, "named vectors")
        ours = (config.metadata or {}).get(_OURS) or {}
        theirs = ours.get("embedder", embedder)
        if (theirs, size, distance) != (embedder, dimension, self._models.Distance.COSINE.value):
            raise IndexMismatch(
                f"Cannot use Qdrant collection {self._name!r}. It was built with embedder {theirs!r}, {size} "
                f"dimensions and {distance} distance, but this Memory needs {embedder!r}, {dimension} dimensions and "
                "Cosine distance. Use another collection name, or delete this collection to rebuild it."
            )
        if not ours:
            self._client.update_collection(self._name, metadata=_stamp(embedder))
            self._index_payload()
            ours = (self._client.get_collection(self._name).config.metadata or {}).get(_OURS)
            if not ours:
                raise MemstateError(
                    "This Qdrant server is too old. It stores no metadata for a collection. Use Qdrant 1.16 or later."
                )
        return OpenState(embedder, dimension, ours["incarnation"])

    def _create(self, embedder: str, dimension: int) -> None:
        try:
            self._client.create_collection(
                self._name,
                vectors_config=self._models.VectorParams(size=dimension, distance=self._models.Distance.COSINE),
                metadata=_stamp(embedder),
            )
        except Exception:
            if not self._client.collection_exists(self._name):
                raise
        else:
            self._index_payload()

    def _index_payload(self) -> None:
        if not self._local:  # local mode has no payload indexes, and would warn
            kinds = self._models.PayloadSchemaType
            for field, kind in (("tags", kinds.KEYWORD), ("epoch", kinds.INTEGER), ("deleted_at", kinds.INTEGER)):
                self._client.create_payload_index(self._name, f"{_OURS}.{field}", kind)

    # -- points -------------------------------------------------------------------------------------------------------

    def _payload(self, point: Point, norm: float) -> dict[str, Any]:
        metadata = stored(point.metadata, point.id)
        ours = {
            "id": point.id,
            "fingerprint": point.fingerprint,
            "epoch": point.epoch,
            "length": norm,
            "tags": tags(metadata),
            "numbers": {number_name(key): value for key, value in numbers(metadata).items()},
            # Qdrant may change the last bit of a float when it reads JSON.
            "floats": {key: value.hex() for key, value in metadata.items() if isinstance(value, float)},
        }
        text = {"text": point.text} if self._store_text and point.text is not None else {}
        return {_OURS: ours, "metadata": metadata, **text}

    def _put(self, points: list[Any], epoch: int) -> None:
        """Insert or replace *points*, but keep stored points with a higher epoch than *epoch*. Epoch 0 replaces all."""
        self._client.upsert(
            self._name, points=points, update_filter=self._up_to("epoch", epoch) if epoch else None, wait=True
        )

    def _keep_epochs(self, points: list[Any]) -> None:
        """Give *points* the epochs of the stored points. A write without an epoch must not lower them."""
        records = self._client.retrieve(self._name, [point.id for point in points], with_payload=[f"{_OURS}.epoch"])
        epochs = {record.id: (record.payload or {}).get(_OURS, {}).get("epoch", 0) for record in records}
        for point in points:
            point.payload[_OURS]["epoch"] = epochs.get(point.id, 0)

    def _forget_epochs(self) -> None:
        """Delete the epochs of points that were deleted long ago. This runs at most once an hour."""
        now = time.time()
        if now - self._forgot_at > REMEMBERED_S / 24:
            self._forgot_at = now
            old = self._up_to("deleted_at", int(now) - REMEMBERED_S)
            self._client.delete(self._name, points_selector=self._models.FilterSelector(filter=old))

    def _nearest(self, query: Vector, restriction: Any, limit: int, exact: bool) -> Answer:
        points = self._client.query_points(
            self._name,
            query=query.tolist(),
            query_filter=restriction,
            # Local mode is always exact, and warns about this argument.
            search_params=self._models.SearchParams(exact=True) if exact and not self._local else None,
            limit=limit,
            with_payload=[_OURS, "metadata"],
        ).points
        candidates = []
        for point in points:
            ours = _ours(point)
            if ours is not None:
                distance = clipped_distance(1.0 - point.score)
                floats = {key: float.fromhex(value) for key, value in ours["floats"].items()}
                metadata = {**point.payload["metadata"], **floats}
                candidates.append(Candidate(Match(ours["id"], distance, ours["fingerprint"]), metadata))
        return Answer(candidates, is_short=len(points) < limit)

    def _read(self, ids: Sequence[str], *, with_vectors: bool = False) -> Iterator[tuple[dict[str, Any], Any]]:
        uuids = [_uuid(id_) for id_ in dict.fromkeys(ids)]
        for start in range(0, len(uuids), self.max_batch):
            batch = uuids[start : start + self.max_batch]
            for record in self._client.retrieve(self._name, batch, with_payload=[_OURS], with_vectors=with_vectors):
                ours = _ours(record)
                if ours is not None:
                    yield ours, record.vector

    def _list_ids(self) -> list[str]:
        ids: list[str] = []
        offset: Any = None
        while True:
            page, offset = self._client.scroll(self._name, limit=_LISTED, offset=offset, with_payload=[f"{_OURS}.id"])
            ids += [ours["id"] for record in page if (ours := _ours(record)) is not None]
            if offset is None:
                return ids

    def _condition(self, condition: Mapping[str, Any]) -> Any:
        """The canonical filter for Qdrant. It lets through every matching point, and perhaps others."""
        [(key, value)] = condition.items()
        if key in ("$and", "$or"):
            parts = [self._condition(part) for part in value]
            return self._models.Filter(must=parts) if key == "$and" else self._models.Filter(should=parts)
        [(name, operand)] = value.items()
        if name in ("$eq", "$in"):
            operand_tags = [tag(key, value) for value in ([operand] if name == "$eq" else operand)]
            return self._models.FieldCondition(key=f"{_OURS}.tags", match=self._models.MatchAny(any=operand_tags))
        side, outwards = ("gte", -1e-15) if name in ("$gt", "$gte") else ("lte", 1e-15)
        # Move the bound outwards by a few doubles. Neighbouring ints may have the same double, and Qdrant may change
        # the last bit of both numbers.
        bound = math.nextafter(float(operand) + abs(float(operand)) * outwards, outwards * math.inf)
        finite = min(max(bound, -sys.float_info.max), sys.float_info.max)
        return self._models.FieldCondition(
            key=f"{_OURS}.numbers.{number_name(key)}", range=self._models.Range(**{side: finite})
        )

    def _up_to(self, field: str, bound: int) -> Any:
        condition = self._models.FieldCondition(key=f"{_OURS}.{field}", range=self._models.Range(lte=bound))
        return self._models.Filter(must=[condition])


class _Folder:
    """The folder of a local client. The client does not notice that the folder was replaced, or that it was forked."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._identity = file_identity(path / ".lock")
        self._pid = os.getpid()

    def check(self) -> None:
        if os.getpid() != self._pid:
            raise MemstateError(
                "Cannot use this QdrantIndex after a fork. Its folder belongs to the parent process. Open it after the "
                "fork, in one process, or use a server."
            )
        if self._identity is None or file_identity(self._path / ".lock") != self._identity:
            raise DeliveryRetryable(
                f"The Qdrant folder {str(self._path)!r} was deleted or replaced while it was open. Close the client, "
                "and create a new one."
            )

    def vacuum(self, name: str) -> None:
        connection = sqlite3.connect(self._path / "collection" / name / "storage.sqlite")
        connection.execute("VACUUM")
        connection.close()


def _stamp(embedder: str) -> dict[str, Any]:
    return {_OURS: {"embedder": embedder, "incarnation": uuid.uuid4().hex}}


def _ours(record: Any) -> dict[str, Any] | None:
    """Our part of a payload. None for a foreign point, and for the epoch of a deleted point."""
    ours = (record.payload or {}).get(_OURS)
    return ours if isinstance(ours, dict) and "id" in ours else None


def _uuid(id_: str) -> str:
    """The UUID for an id, made by hashing. Qdrant's ids must be numbers or UUIDs."""
    return str(uuid.UUID(bytes=blake2b(id_bytes(id_), digest_size=16).digest()))
