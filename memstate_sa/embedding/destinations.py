"""The indexes and embedders of a Memory, made of its arguments."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

from memstate_sa.embedders import Embedder
from memstate_sa.embedding.batches import Destination, Vectors
from memstate_sa.errors import MemstateError
from memstate_sa.indexes.base import VectorIndex


def indexes_by_name(index: VectorIndex | Mapping[str, VectorIndex] | None) -> dict[str, VectorIndex]:
    """*index* as a dict of indexes by name. A single index is named "memory"."""
    if index is None:
        return {}
    indexes: dict[str, VectorIndex] = dict(index) if isinstance(index, Mapping) else {"memory": index}
    for name, one in indexes.items():
        if not isinstance(name, str) or not callable(getattr(type(one), "upsert", None)):
            raise MemstateError(f"Cannot use index={one!r}. Give a VectorIndex, or a dict of them by name.")
    return indexes


def make_destinations(indexes: Mapping[str, VectorIndex], embedder: Any, *, stored: int) -> dict[str, Destination]:
    """Each index, with the vectors of its embedder.

    *embedder* is one for all indexes, or a dict by index name. Indexes with the same embedder share its vectors.
    *stored*: the number of vectors that the database keeps.
    """
    embedders = _embedders(embedder, indexes)
    vectors = {id(one): Vectors(one, stored=stored) for one in embedders.values()}
    return {name: Destination(index, vectors[id(embedders[name])]) for name, index in indexes.items()}


def _embedders(embedder: Any, indexes: Collection[str]) -> dict[str, Embedder | None]:
    """The embedder of each index, in the order of *indexes*. None stands for the default embedder."""
    by_index = dict(embedder) if isinstance(embedder, Mapping) else dict.fromkeys(indexes, embedder)
    for one in by_index.values():
        if one is not None and not callable(getattr(one, "embed", None)):
            raise MemstateError(
                f"Cannot use embedder={one!r}. Give an Embedder, or leave embedder= out to use WordLlamaEmbedder()."
            )
    if by_index.keys() != set(indexes):
        raise MemstateError(
            f"Cannot use embedder={embedder!r}: its keys are not the names of the indexes. Give an Embedder for each "
            f"of these names: {', '.join(indexes)}."
        )
    return {name: by_index[name] for name in indexes}
