"""The vectors of texts in the application's database, by text fingerprint. The texts themselves are not stored.

So a rollback, a repeated text and a new index need no embedding. The oldest vectors are evicted first, so vectors of
an embedder that is no longer used disappear first.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from functools import cache
from typing import Any

import numpy as np
from sqlalchemy import Integer, LargeBinary, bindparam, delete, func, select
from sqlalchemy.engine import Connection

from memstate_sa.db.dialects import Database, database_of
from memstate_sa.db.json_params import as_array, as_json, row_value, unnest_rows, unnest_strings
from memstate_sa.db.statements import upsert_select
from memstate_sa.db.tables import embedding
from memstate_sa.embedding.batches import Vectors
from memstate_sa.indexes.base import Vector

_FLOAT32 = np.dtype("<f4")

_of_digests = embedding.c.text_fingerprint.in_(select(unnest_strings("digests").c.value))
_read = select(embedding.c.text_fingerprint, embedding.c.vector).where(_of_digests)
_forget = delete(embedding).where(_of_digests)
_count = select(func.count()).select_from(embedding)
# SKIP LOCKED: another relay may be evicting vectors too.
_oldest = select(embedding.c.id).order_by(embedding.c.id).limit(bindparam("number")).with_for_update(skip_locked=True)
_evict = delete(embedding).where(embedding.c.id.in_(_oldest))


def read(connection: Connection, digests: Iterable[str], dimension: int) -> dict[str, Vector]:
    """The stored vectors of *digests* (text fingerprints), without damaged vectors."""
    rows = connection.execute(_read, {"digests": as_array(digests)}).all()
    return {digest: vector for digest, stored in rows if (vector := _vector(stored, dimension)) is not None}


def known(connection: Connection, vectors: Vectors, digests: Collection[str]) -> dict[str, Vector]:
    """The vectors of *digests* that are remembered in this process, or stored in the database."""
    cached = vectors.recent(digests)
    missing = [digest for digest in digests if digest not in cached]
    if missing and vectors.stored:
        stored = read(connection, missing, vectors.embedder.dimension)
        vectors.remember(stored)
        cached |= stored
    return cached


def _vector(stored: bytes, dimension: int) -> Vector | None:
    if len(stored) != dimension * _FLOAT32.itemsize:
        return None
    vector: Vector = np.frombuffer(stored, dtype=_FLOAT32).astype(np.float32)
    return vector if np.isfinite(vector).all() else None


def store(connection: Connection, vectors: Mapping[str, Vector], embedder: str) -> None:
    """Store *vectors*, which all have the same length. A vector that is stored already is not changed."""
    digests = sorted(vectors)  # the order prevents deadlocks of transactions that store the same vectors
    stored = np.stack([vectors[digest] for digest in digests]).astype(_FLOAT32)
    size = stored.shape[1] * _FLOAT32.itemsize
    offsets = [(digest, n * size + 1) for n, digest in enumerate(digests)]
    parameters = {"embedder": embedder, "vectors": stored.tobytes(), "size": size, "rows": as_json(offsets)}
    connection.execute(_store(database_of(connection)), parameters)


@cache
def _store(database: Database) -> Any:
    """The INSERT of vectors. One parameter has all of them: executemany takes three times as long on PostgreSQL."""
    rows = unnest_rows("rows")
    vectors, size = bindparam("vectors", type_=LargeBinary()), bindparam("size", type_=Integer())
    values = {
        "text_fingerprint": row_value(rows, 0, embedding.c.text_fingerprint.type),
        "embedder": bindparam("embedder", type_=embedding.c.embedder.type),
        "vector": func.substr(vectors, row_value(rows, 1, Integer()), size),
    }
    return upsert_select(database, embedding, values).on_conflict_do_nothing()


def count(connection: Connection) -> int:
    """The number of stored vectors. It takes a few ms to count 100,000."""
    number: int = connection.execute(_count).scalar_one()
    return number


def evict(connection: Connection, number: int) -> None:
    """Delete the *number* oldest vectors."""
    connection.execute(_evict, {"number": number})


def forget(connection: Connection, fingerprints: Iterable[str]) -> int:
    """Delete the vectors of texts, by text fingerprint. Return their number.

    If a row with such a text is delivered later, or is being delivered now, its vector is stored again.
    """
    return connection.execute(_forget, {"digests": as_array(fingerprints)}).rowcount
