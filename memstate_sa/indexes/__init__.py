"""Vector indexes: the port, and one file per adapter. Only constructing an adapter may need an extra."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from memstate_sa.indexes._filters import canonical, matches, storable
from memstate_sa.indexes.base import (
    Entry,
    FencedIndex,
    Filter,
    MarkedIndex,
    Match,
    Point,
    PurgeableIndex,
    Stored,
    VectorIndex,
    matrix,
)

if TYPE_CHECKING:
    from memstate_sa.indexes.chroma import ChromaIndex
    from memstate_sa.indexes.faiss import FaissIndex
    from memstate_sa.indexes.memory import InMemoryIndex
    from memstate_sa.indexes.pgvector import PgVectorIndex
    from memstate_sa.indexes.qdrant import QdrantIndex
    from memstate_sa.indexes.redis import RedisIndex

__all__ = [
    "ChromaIndex",
    "Entry",
    "FaissIndex",
    "FencedIndex",
    "Filter",
    "InMemoryIndex",
    "MarkedIndex",
    "Match",
    "PgVectorIndex",
    "Point",
    "PurgeableIndex",
    "QdrantIndex",
    "RedisIndex",
    "Stored",
    "VectorIndex",
    "canonical",
    "matches",
    "matrix",
    "storable",
]

_ADAPTERS = {
    "ChromaIndex": "chroma",
    "FaissIndex": "faiss",
    "InMemoryIndex": "memory",
    "PgVectorIndex": "pgvector",
    "QdrantIndex": "qdrant",
    "RedisIndex": "redis",
}


def __getattr__(name: str) -> Any:
    """Import an adapter when it is named: an application uses one or two of them."""
    if name not in _ADAPTERS:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_ADAPTERS[name]}"), name)
