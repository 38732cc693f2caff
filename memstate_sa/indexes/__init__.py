"""Vector indexes: the port, and one file per adapter. Importing this needs no extra; constructing an adapter may."""

from memstate_sa.indexes.base import Entry, FencedIndex, Filter, Match, Point, PurgeableIndex, Stored, VectorIndex
from memstate_sa.indexes.chroma import ChromaIndex
from memstate_sa.indexes.memory import InMemoryIndex
from memstate_sa.indexes.qdrant import QdrantIndex
from memstate_sa.indexes.redis import RedisIndex

__all__ = [
    "ChromaIndex",
    "Entry",
    "FencedIndex",
    "Filter",
    "InMemoryIndex",
    "Match",
    "Point",
    "PurgeableIndex",
    "QdrantIndex",
    "RedisIndex",
    "Stored",
    "VectorIndex",
]
