"""The engine of a Qdrant server without its network: the wheel qdrant-edge-py behind the calls of QdrantIndex.

No wheel has a server. Filters, preconditions, payload indexes, returned payloads and the graph are the engine's own.
HTTP is not tested here.
"""

from __future__ import annotations

import tempfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from uuid import UUID

import httpx
import qdrant_edge as edge
from qdrant_client import models
from qdrant_client.http.exceptions import ResponseHandlingException

_KINDS = {"keyword": edge.PayloadSchemaType.Keyword, "integer": edge.PayloadSchemaType.Integer}
_DISTANCES = {"Cosine": edge.Distance.Cosine, "Dot": edge.Distance.Dot}


class _Collection:
    def __init__(self, shard: Any, vectors: Any, metadata: dict[str, Any]) -> None:
        self.shard, self.vectors, self.metadata = shard, vectors, metadata


class EngineClient:
    """A QdrantClient with the methods that are called. *optimise* builds the graph after every write."""

    init_options: dict[str, Any] = {"path": None, "location": None}  # noqa: RUF012  # as in qdrant-client

    def __init__(self, root: Path, *, optimise: bool = False) -> None:
        self._root, self._optimise = root, optimise
        self._held: dict[str, _Collection] = {}
        self._mutex = threading.Lock()
        self._reachable = True

    @contextmanager
    def unreachable(self) -> Iterator[None]:
        self._reachable = False
        yield
        self._reachable = True

    def close(self) -> None:
        for name in list(self._held):
            self.delete_collection(name)

    # -- collections ---------------------------------------------------------------------------------------------------

    def collection_exists(self, name: str) -> bool:
        self._reach()
        return name in self._held

    def create_collection(self, name: str, vectors_config: Any, metadata: dict[str, Any] | None = None) -> None:
        single = (
            vectors_config if isinstance(vectors_config, models.VectorParams) else next(iter(vectors_config.values()))
        )
        vectors: Any = edge.EdgeVectorParams(size=single.size, distance=_DISTANCES[single.distance.value])
        if single is not vectors_config:
            vectors = dict.fromkeys(vectors_config, vectors)
        graph = edge.EdgeOptimizersConfig(indexing_threshold=1) if self._optimise else None
        folder = tempfile.mkdtemp(dir=self._root)
        shard = edge.EdgeShard.create(f"{folder}/shard", edge.EdgeConfig(vectors=vectors, optimizers=graph))
        self._held[name] = _Collection(shard, vectors_config, dict(metadata or {}))

    def get_collection(self, name: str) -> Any:
        held = self._collection(name)
        params = SimpleNamespace(vectors=held.vectors)
        return SimpleNamespace(config=SimpleNamespace(params=params, metadata=dict(held.metadata)))

    def update_collection(self, name: str, metadata: dict[str, Any]) -> None:
        self._collection(name).metadata.update(metadata)

    def create_payload_index(self, name: str, field: str, kind: Any) -> None:
        self._update(name, edge.UpdateOperation.create_field_index(field, _KINDS[kind.value]))

    def delete_collection(self, name: str) -> None:
        self._held.pop(name).shard.close()

    # -- points --------------------------------------------------------------------------------------------------------

    def upsert(self, name: str, points: list[Any], update_filter: Any = None, wait: bool = True) -> None:
        made = [edge.Point(_id(each.id), each.vector, each.payload) for each in points]
        self._update(name, edge.UpdateOperation.upsert_points(made, condition=_filter(update_filter)))

    def delete(self, name: str, points_selector: Any) -> None:
        if isinstance(points_selector, models.PointIdsList):
            self._update(name, edge.UpdateOperation.delete_points([_id(id_) for id_ in points_selector.points]))
        else:
            self._update(name, edge.UpdateOperation.delete_points_by_filter(_filter(points_selector.filter)))

    def set_payload(self, name: str, payload: dict[str, Any], points: Any) -> None:
        self._update(name, edge.UpdateOperation.set_payload_by_filter(_filter(points), payload))

    def retrieve(self, name: str, ids: list[str], with_payload: Any = True, with_vectors: bool = False) -> list[Any]:
        found = self._collection(name).shard.retrieve(
            [_id(id_) for id_ in ids], with_payload=with_payload, with_vector=with_vectors
        )
        return [_record(each) for each in found]

    def scroll(self, name: str, limit: int = 10, offset: Any = None, with_payload: Any = True) -> tuple[list[Any], Any]:
        request = edge.ScrollRequest(limit=limit, offset=offset, with_payload=with_payload)
        found, offset = self._collection(name).shard.scroll(request)
        return [_record(each) for each in found], offset

    def count(self, name: str) -> Any:
        return SimpleNamespace(count=self._collection(name).shard.count(edge.CountRequest(exact=True)))

    def query_points(
        self, name: str, query: Any, query_filter: Any, search_params: Any, limit: int, with_payload: Any
    ) -> Any:
        request = edge.QueryRequest(
            limit=limit,
            query=edge.Query.Nearest(query),
            filter=_filter(query_filter),
            params=edge.SearchParams(exact=search_params is not None and search_params.exact),
            with_payload=with_payload,
        )
        return SimpleNamespace(points=[_record(each) for each in self._collection(name).shard.query(request)])

    def _reach(self) -> None:
        if not self._reachable:
            raise ResponseHandlingException(httpx.ConnectError("injected")) from httpx.ConnectError("injected")

    def _collection(self, name: str) -> _Collection:
        self._reach()
        return self._held[name]

    def _update(self, name: str, operation: Any) -> None:
        with self._mutex:  # a server applies a shard's updates one after the other
            self._collection(name).shard.update(operation)
            if self._optimise:
                self._collection(name).shard.optimize()


def _id(id_: Any) -> Any:
    return UUID(id_) if isinstance(id_, str) else id_


def _record(found: Any) -> Any:
    return SimpleNamespace(
        id=str(found.id), payload=found.payload, vector=found.vector, score=getattr(found, "score", None)
    )


def _filter(given: Any) -> Any:
    if given is None:
        return None
    parts = {
        name: [_condition(each) for each in getattr(given, name)] for name in ("must", "should") if getattr(given, name)
    }
    return edge.Filter(**parts)


def _condition(given: Any) -> Any:
    if isinstance(given, models.Filter):
        return _filter(given)
    if isinstance(given, models.HasIdCondition):
        return edge.HasIdCondition({_id(id_) for id_ in given.has_id})
    match = edge.MatchAny(list(given.match.any)) if given.match is not None else None
    bounds = edge.RangeFloat(gte=given.range.gte, lte=given.range.lte) if given.range is not None else None
    return edge.FieldCondition(given.key, match=match, range=bounds)
