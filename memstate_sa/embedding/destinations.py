"""The indexes and embedders of a Memory, as its arguments say."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

from memstate_sa.embedders import Embedder, WordLlamaEmbedder
from memstate_sa.embedding.batches import Destination, Vectors
from memstate_sa.errors import MemstateError
from memstate_sa.indexes.base import VectorIndex


def indexes_by_name(index: VectorIndex | Mapping[str, VectorIndex]) -> dict[str, VectorIndex]:
    """The indexes of *index*. One alone is named "memory"."""
    indexes: dict[str, VectorIndex] = dict(index) if isinstance(index, Mapping) else {"memory": index}
    if not indexes:
        raise MemstateError("give at least one index")
    for name, one in indexes.items():
        if not isinstance(name, str) or not callable(getattr(type(one), "upsert", None)):
            raise MemstateError(f"index={one!r}: give a VectorIndex, or a dict of them by name")
    return indexes


def make_destinations(indexes: Mapping[str, VectorIndex], embedder: Any, *, stored: int) -> dict[str, Destination]:
    """Each index with the vectors of its embedder: *embedder*, or the one of its name.

    Indexes of one embedder share their vectors. *stored*: how many of them the database keeps.
    """
    embedders = _embedders(embedder, indexes)
    vectors = {id(one): Vectors(one, stored=stored) for one in embedders.values()}
    return {name: Destination(index, vectors[id(embedders[name])]) for name, index in indexes.items()}


def _embedders(embedder: Any, indexes: Collection[str]) -> dict[str, Embedder]:
    """The embedder of each index, in their order."""
    if isinstance(embedder, Mapping):
        by_index = dict(embedder)
    else:
        by_index = dict.fromkeys(indexes, embedder or WordLlamaEmbedder())
    for one in by_index.values():
        if not callable(getattr(one, "embed", None)):
            raise MemstateError(f"embedder={one!r}: give an Embedder; without one it is WordLlamaEmbedder()")
    if by_index.keys() != set(indexes):
        raise MemstateError(f"embedder={embedder!r}: give one for each index: {', '.join(indexes)}")
    return {name: by_index[name] for name in indexes}
