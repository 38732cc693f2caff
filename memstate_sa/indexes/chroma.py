"""Chroma as a vector index: in memory, in a folder, or a server.

The workarounds here were measured on chromadb 1.5.9. A comment at each one says why it is needed.
"""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext, suppress
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from memstate_sa.errors import (
    DeliveryError,
    DeliveryRejected,
    DeliveryRetryable,
    IndexBroken,
    IndexMismatch,
    MemstateError,
    require_module,
)
from memstate_sa.indexes._adapter import Adapter, IdListing, OpenState
from memstate_sa.indexes._chroma_files import find_damage
from memstate_sa.indexes._filters import canonical, storable
from memstate_sa.indexes._units import clipped_distance
from memstate_sa.indexes.base import Entry, Filter, Match, Point, Stored, Vector, matrix
from memstate_sa.indexes.provider_errors import retryable_status
from memstate_sa.indexes.provider_messages import words
from memstate_sa.runtime import forks

if TYPE_CHECKING:
    from chromadb.api import ClientAPI
    from chromadb.api.models.Collection import Collection

    from memstate_sa.indexes._folder import LockedFolder

# The name of the fingerprint in a point's metadata. A point without it is foreign. We store only this field, with a
# short name, because each field costs 6 to 13 % of Chroma's write rate.
_FINGERPRINT = "memstate_sa"
_PAUSES_S = (0.01, 0.05, 0.25)
"""The first write to a collection stores metadata before vectors. A query in between fails with InternalError
("Nothing found on disk"), so it is repeated after these pauses."""
_COPIED = 1000
"""The number of points in one batch of a copy: a few MB."""
# The names of our fields in the collection's metadata.
_EMBEDDER = "memstate_embedder"
_DIMENSION = "memstate_dimension"
_MARK = "memstate_mark"


class ChromaIndex(Adapter):
    """The collection *name* of any chromadb client: EphemeralClient, PersistentClient or HttpClient.

    Distance is cosine. The text of a fact is stored only with *store_text*. Deleted text stays readable in Chroma's
    files until the collection is rebuilt. `close` does not close the client: it belongs to the caller.

    Two processes on one PersistentClient folder corrupt it. So `open` locks the folder (``memstate.lock``), and a
    second process gets MemstateError. For several processes, run a server (``chroma run --path <folder>``) and use
    an HttpClient.

    ``incarnation`` is the collection's id, which `open` looks up each time. If the collection is deleted later, the
    next call raises DeliveryRetryable. The call after it works on a new, empty collection.

    Foreign points in the same collection are left alone. They make searches slower, because a search fetches more
    points until it has enough of ours.
    """

    _vendor = "Chroma"

    def __init__(self, client: ClientAPI, name: str = "memory", *, store_text: bool = False) -> None:
        self._errors: Any = require_module("chromadb.errors", "chroma")
        require_module("filelock", "chroma")
        self._folders: Any = import_module("memstate_sa.indexes._folder")
        self._client = client
        self._name = name
        self._store_text = store_text
        self._make_mutex()
        forks.in_child(self, ChromaIndex._make_mutex)
        self._copying = threading.Lock()  # a copy would miss a write that happens at the same time
        self._collection: Collection | None = None
        self._max_batch = 0
        self._folder: LockedFolder | None = None
        self._listing = IdListing()
        self._undamaged = ""  # the id of the collection whose files were checked and are complete

    def _make_mutex(self) -> None:
        self._mutex = threading.RLock()

    @property
    def incarnation(self) -> str:
        with self._using("resolve") as collection:
            return str(collection.id)

    @property
    def in_process(self) -> bool:
        return not self._client.get_settings().chroma_server_host

    @property
    def max_batch(self) -> int:
        if not self._max_batch:
            with self._translated("state its batch size"):
                self._max_batch = self._client.get_max_batch_size()
        return self._max_batch

    def open(self, *, embedder: str, dimension: int) -> None:
        with self._mutex:
            try:
                with self._translated("open", sends_facts=False):
                    self._folder = self._folder or self._folders.lock(self._client)
                    self._check_folder()
                    self._collection = self._resolve(embedder, dimension)
                    self._opened = OpenState(embedder, dimension)
            except MemstateError:
                if self._opened is None:
                    self.close()
                raise

    def upsert(self, points: Sequence[Point]) -> None:
        points = list({point.id: point for point in points}.values())
        if not points:
            return
        ids = [point.id for point in points]
        vectors = matrix([point.vector for point in points], self._dimension, ids)
        with self._writing("upsert") as collection:
            # Chroma merges with the stored point. An old metadata key stays unless the write sets it to None, and a
            # document stays unless the write replaces it. Reading the stored points first costs 2-4 % of the write.
            stored = collection.get(ids=ids, include=["metadatas", "documents"])
            keys = {id_: dict.fromkeys(metadata or {}) for id_, metadata in _rows(stored, "metadatas")}
            ids_with_text = {id_ for id_, document in _rows(stored, "documents") if document}
            foreign = [id_ for id_ in keys if _FINGERPRINT not in keys[id_]]
            if foreign:
                raise DeliveryRejected(
                    f"Cannot write point {foreign[0]!r}. Collection {self._name!r} already holds a point with this id "
                    "that memstate_sa did not write."
                )
            metadatas: list[Any] = [
                {
                    **keys.get(point.id, {}),
                    **{key: storable(value) for key, value in point.metadata.items()},
                    _FINGERPRINT: point.fingerprint,
                }
                for point in points
            ]
            texts = [point.text if self._store_text else None for point in points]
            documents: list[Any] = [
                "" if text is None and id_ in ids_with_text else text for id_, text in zip(ids, texts, strict=True)
            ]
            collection.upsert(
                ids=ids,
                embeddings=vectors,
                metadatas=metadatas,
                documents=None if all(document is None for document in documents) else documents,
            )

    def delete(self, ids: Sequence[str]) -> None:
        with self._writing("delete") as collection:
            # Do not use delete(ids=..., where=...). With both arguments, Chroma needs 6 ms for each id.
            own_ids = [id_ for id_, fingerprint in self._fingerprints(collection, ids) if fingerprint is not None]
            if own_ids:
                collection.delete(ids=own_ids)

    def query(
        self, vector: Vector, limit: int, *, where: Filter | None = None, ids: Sequence[str] | None = None
    ) -> list[Match]:
        query = matrix([vector], self._dimension, ["the query"])
        condition = canonical(where or {})
        unique_ids = None if ids is None else list(dict.fromkeys(ids))
        if condition is None or unique_ids == [] or limit < 1:
            return []
        filters = _where(condition) if condition else None
        # Do not filter by the fingerprint. With a condition that all points satisfy, a query over 10,000 points takes
        # 50 ms instead of 2 ms.
        count = limit
        with self._using("query") as collection:
            while True:
                rows = self._nearest(collection, query, count, filters, unique_ids)
                matches = [
                    Match(id_, clipped_distance(float(distance)), metadata[_FINGERPRINT])
                    for id_, distance, metadata in rows
                    if metadata and _FINGERPRINT in metadata
                ]
                if len(matches) >= limit or len(rows) < count:
                    return matches[:limit]
                count *= 4

    def get(self, ids: Sequence[str]) -> list[Stored]:
        unique = list(dict.fromkeys(ids))
        if not unique:
            return []
        with self._using("get") as collection:
            answer = collection.get(ids=unique, include=["embeddings", "metadatas"])
            return [
                Stored(id_, metadata[_FINGERPRINT], np.asarray(embedding, dtype=np.float32))
                for id_, metadata, embedding in _rows(answer, "metadatas", "embeddings")
                if metadata and _FINGERPRINT in metadata
            ]

    def scan(self, after: str | None, limit: int) -> list[Entry]:
        """Up to *limit* stored points with an id greater than *after*, ordered by id.

        Chroma lists only in order of insertion, and its pages shift when points are deleted. So a scan begins with a
        list of all ids, and keeps it until its end. The list takes 27 ms for 10,000 ids, and about 100 bytes an id.
        Fingerprints are read page by page. A scan may miss a point that was first written during the scan: check
        missing ids with `get`.
        """
        with self._using("scan") as collection:
            size = min(limit, self.max_batch)
            for page in self._listing.pages(str(collection.id), after, size, lambda: collection.get(include=[])["ids"]):
                rows = self._fingerprints(collection, page)
                entries = sorted(Entry(id_, fingerprint) for id_, fingerprint in rows if fingerprint is not None)
                if entries:
                    return entries
            return []

    def purge(self) -> None:
        """Replace the collection by a copy, and rewrite the folder. The files hold no deleted points afterwards.

        The copy is another incarnation, so the relay compares it with the tables, without new embeddings. Raises
        MemstateError for a Chroma server, because its files are out of reach.
        """
        settings = self._client.get_settings()
        if settings.chroma_server_host:
            raise MemstateError(
                f"Cannot purge collection {self._name!r}. Its files belong to a Chroma server, and may still "
                "hold deleted points. Stop the server, and purge with a PersistentClient on its folder."
            )
        if not settings.is_persistent:
            return
        with self._copying:
            with self._using("copy") as collection:
                copy = self._copied(collection)
            with self._mutex, self._translated("replace"):  # other threads wait until the collection is replaced
                self._client.delete_collection(self._name)
                copy.modify(name=self._name)
                self._collection = copy
                self._listing.clear()
                assert self._folder is not None
                self._folder.vacuum()

    def remake(self) -> None:
        """Delete the collection, with all foreign points in it. The next call creates a new one."""
        with self._mutex, self._translated("delete"):
            self._folder = self._folder or self._folders.lock(self._client)
            self._client.delete_collection(self._name)
            self._collection = None
            self._listing.clear()

    def read_mark(self) -> str | None:
        with self._using("read the mark of"):
            # Read it from Chroma each time, because another process may write it.
            current = self._client.get_collection(self._name, embedding_function=None)
            return (current.metadata or {}).get(_MARK)

    def write_mark(self, mark: str) -> None:
        with self._writing("mark") as collection:
            collection.modify(metadata=_without_space({**(collection.metadata or {}), _MARK: mark}))

    def close(self) -> None:
        """Release the folder. The client stays open."""
        with self._mutex:
            self._opened = self._collection = None
            self._listing.clear()
            if self._folder is not None:
                self._folder.release()
                self._folder = None

    # -- the collection ---------------------------------------------------------------------------------------------

    @property
    def _place(self) -> str:
        return f"collection {self._name!r}"

    @contextmanager
    def _using(self, action: str) -> Iterator[Collection]:
        """The open collection. Errors of Chroma are raised as DeliveryError."""
        with self._translated(action):
            with self._mutex:
                opened = self._open_state
                self._check_folder()
                if self._collection is None:
                    self._collection = self._resolve(opened.embedder, opened.dimension)
                collection = self._collection
            yield collection

    @contextmanager
    def _writing(self, action: str) -> Iterator[Collection]:
        """The open collection, locked against `purge`. A server's collection needs no lock: `purge` refuses it."""
        with self._copying if self.in_process else nullcontext(), self._using(action) as collection:
            yield collection

    def _delivery_error(self, error: Exception, message: str, sent: Sequence[str] | None) -> DeliveryError:
        if isinstance(error, self._errors.NotFoundError):
            self._collection = None
            return DeliveryRetryable(f"Chroma collection {self._name!r} was deleted. The next call creates it again.")
        if isinstance(error, self._errors.ChromaError):
            is_retryable = retryable_status(error.code())
            reason = "" if sent is None else words([error], sent)
            text = f"{message}: {type(error).__name__}{reason and f': {reason}'}"
            return (DeliveryRetryable if is_retryable else DeliveryRejected)(text)
        return super()._delivery_error(error, message, sent)

    def _check_folder(self) -> None:
        if self._folder is not None:
            self._folder.check()

    def _resolve(self, embedder: str, dimension: int) -> Collection:
        try:
            collection = self._client.get_collection(self._name, embedding_function=None)
        except self._errors.NotFoundError:
            collection = self._client.get_or_create_collection(
                self._name,
                configuration={"hnsw": {"space": "cosine"}},
                metadata={_EMBEDDER: embedder, _DIMENSION: dimension},
                embedding_function=None,
            )
        self._check_files(collection)
        # `collection.configuration` warns about a missing embedding function. `configuration_json` does not.
        configuration = collection.configuration_json
        space = (configuration.get("hnsw") or configuration.get("spann") or {}).get("space", "l2")
        metadata = collection.metadata or {}
        stored_embedder = metadata.get(_EMBEDDER, embedder)
        # Without our metadata, Chroma itself knows the dimension as soon as the collection holds a point.
        stored_dimension = metadata.get(_DIMENSION) or collection.get_model().dimension or dimension
        if (space, stored_embedder, stored_dimension) != ("cosine", embedder, dimension):
            raise IndexMismatch(
                f"Cannot use Chroma collection {self._name!r}. It was built with embedder {stored_embedder!r}, "
                f"{stored_dimension} dimensions and {space} distance, but this Memory needs {embedder!r}, {dimension} "
                "dimensions and cosine distance. Use another collection name, or delete this collection to rebuild it."
            )
        if _EMBEDDER not in metadata:
            collection.modify(metadata=_without_space({**metadata, _EMBEDDER: embedder, _DIMENSION: dimension}))
        return collection

    def _check_files(self, collection: Collection) -> None:
        """Raise IndexBroken for damaged files, before Chroma reads them. It would miss points, or crash the process."""
        if self._folder is None or self._undamaged == str(collection.id):
            return
        folder = Path(self._client.get_settings().persist_directory).resolve()
        damage = find_damage(folder, str(collection.id))
        if damage is not None:
            raise IndexBroken(
                f"The files of Chroma collection {self._name!r} are damaged: {damage}. The cause may be a crash, or a "
                "copy of a folder in use. Rebuild the collection with memory.verify(engine, repair=True)."
            )
        self._undamaged = str(collection.id)

    def _copied(self, collection: Collection) -> Collection:
        """A new collection with the same points, including foreign ones."""
        name = f"{self._name}.copy"
        with suppress(self._errors.NotFoundError):  # a purge that was killed may have left this copy
            self._client.delete_collection(name)
        configuration: Any = {"hnsw": collection.configuration_json["hnsw"]}
        metadata = {key: value for key, value in collection.metadata.items() if not key.startswith("hnsw:")}
        copy = self._client.create_collection(
            name, configuration=configuration, metadata=metadata, embedding_function=None
        )
        ids = collection.get(include=[])["ids"]
        for start in range(0, len(ids), _COPIED):
            batch = ids[start : start + _COPIED]
            points: Any = collection.get(ids=batch, include=["embeddings", "metadatas", "documents"])
            if points["ids"]:  # others may have deleted the whole batch
                copy.add(
                    ids=points["ids"],
                    embeddings=points["embeddings"],
                    metadatas=points["metadatas"],
                    documents=points["documents"] if any(points["documents"]) else None,
                )
        return copy

    # -- points -----------------------------------------------------------------------------------------------------

    def _nearest(
        self, collection: Collection, query: Any, limit: int, where: Any, ids: list[str] | None
    ) -> list[tuple[str, float, Any]]:
        def ask(ids: list[str] | None) -> list[tuple[str, float, Any]]:
            answer: Any = collection.query(
                query_embeddings=query, n_results=limit, where=where, ids=ids, include=["metadatas", "distances"]
            )
            return list(zip(answer["ids"][0], answer["distances"][0], answer["metadatas"][0], strict=True))

        for pause in _PAUSES_S:
            try:
                return ask(ids)
            except self._errors.InternalError:
                if ids is not None:
                    # The whole query fails if one of *ids* is absent, or is being written at the moment. Comparing
                    # the stored points here costs no more, because *ids* are few.
                    with suppress(self._errors.InternalError):
                        return self._exactly(collection, query[0], limit, where, ids)
                time.sleep(pause)
        return ask(None) if ids is None else self._exactly(collection, query[0], limit, where, ids)

    def _exactly(
        self, collection: Collection, query: Vector, limit: int, where: Any, ids: list[str]
    ) -> list[tuple[str, float, Any]]:
        rows: list[tuple[str, Any, Any]] = []
        for start in range(0, len(ids), self.max_batch):
            batch = ids[start : start + self.max_batch]
            answer = collection.get(ids=batch, where=where, include=["metadatas", "embeddings"])
            rows += _rows(answer, "metadatas", "embeddings")
        if not rows:
            return []
        vectors = np.asarray([embedding for _, _, embedding in rows], dtype=np.float32)
        norms = np.linalg.norm(vectors, axis=1) * np.linalg.norm(query)
        with np.errstate(invalid="ignore", divide="ignore"):
            distances = np.where(norms > 0, 1.0 - vectors @ query / norms, 1.0)
        order = np.argsort(distances, kind="stable")[:limit]
        return [(rows[place][0], float(distances[place]), rows[place][1]) for place in order]

    def _fingerprints(self, collection: Collection, ids: Sequence[str]) -> list[tuple[str, str | None]]:
        """The fingerprint of each stored point among *ids*. It is None for a foreign point."""
        unique = list(dict.fromkeys(ids))
        if not unique:
            return []
        answer = collection.get(ids=unique, include=["metadatas"])
        return [(id_, (metadata or {}).get(_FINGERPRINT)) for id_, metadata in _rows(answer, "metadatas")]


def _without_space(metadata: Mapping[str, Any]) -> dict[str, Any]:
    """*metadata* for modify(), which refuses "hnsw:space". The configuration holds that value as well."""
    return {key: value for key, value in metadata.items() if key != "hnsw:space"}


def _rows(answer: Any, *columns: str) -> Iterator[tuple[Any, ...]]:
    """The columns of Chroma's answer as rows. Each row begins with the id."""
    return zip(answer["ids"], *(answer[column] for column in columns), strict=True)


def _where(condition: dict[str, Any]) -> dict[str, Any]:
    """The canonical filter as a Chroma ``where``.

    Chroma truncates a fraction before it compares it with integers: ``$eq 0.5`` matches 0, ``$lt -0.5`` misses -1. So
    the condition is combined with one on the integer next to the fraction.
    """
    [(key, value)] = condition.items()
    if key in ("$and", "$or"):
        return {key: [_where(part) for part in value]}
    [(name, operand)] = value.items()
    if name == "$in":
        if len({type(item) for item in operand}) == 1 and not any(map(_fraction, operand)):
            return condition
        parts = [_where({key: {"$eq": item}}) for item in operand]
        return {"$or": parts} if len(parts) > 1 else parts[0]
    if not _fraction(operand):
        return condition
    low, high = math.floor(operand), math.ceil(operand)
    exact = {
        "$eq": {"$and": [condition, {key: {"$gt": low}}, {key: {"$lt": high}}]},
        "$gt": {"$or": [condition, {key: {"$gte": high}}]},
        "$gte": {"$and": [condition, {key: {"$gt": low}}]},
        "$lt": {"$or": [condition, {key: {"$lte": low}}]},
        "$lte": {"$and": [condition, {key: {"$lt": high}}]},
    }
    return exact[name]


def _fraction(value: Any) -> bool:
    return isinstance(value, float) and not value.is_integer()
