"""Vector indexes: the port, and one file per adapter. Only constructing an adapter may need an extra."""

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
