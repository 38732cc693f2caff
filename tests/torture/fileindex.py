"""An exact index in one SQLite file, with fencing, shared by any number of processes."""

from __future__ import annotations

import json
import sqlite3
import uuid
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from memstate_sa.errors import DeliveryRetryable, IndexMismatch
from memstate_sa.indexes._filters import canonical, matches, storable
from memstate_sa.indexes.base import Entry, Filter, Match, Point, Stored, Vector, matrix

_SCHEMA = """
CREATE TABLE IF NOT EXISTS lifetime (incarnation TEXT, embedder TEXT, dimension INTEGER);
CREATE TABLE IF NOT EXISTS point (id TEXT PRIMARY KEY, epoch INTEGER, fingerprint TEXT, vector BLOB, metadata TEXT);
"""
# A deleted point stays for its epoch, without a fingerprint. 0 stands for no epoch.
_WRITE = """
INSERT INTO point VALUES (?, ?, ?, ?, ?) ON CONFLICT (id) DO UPDATE SET
epoch = max(epoch, excluded.epoch), fingerprint = excluded.fingerprint, vector = excluded.vector,
metadata = excluded.metadata
WHERE excluded.epoch = 0 OR excluded.epoch >= point.epoch
"""


class FileIndex:
    fences = True
    max_batch = 500

    def __init__(self, path: Path) -> None:
        self._path = path
        self._dimension = 0

    @property
    def incarnation(self) -> str:
        with self._connection() as connection:
            return str(connection.execute("SELECT incarnation FROM lifetime").fetchone()[0])

    def open(self, *, embedder: str, dimension: int) -> None:
        if self._dimension:
            return
        with self._connection() as connection:
            connection.execute("PRAGMA journal_mode = WAL")
            connection.executescript(_SCHEMA)
            connection.execute("BEGIN IMMEDIATE")
            found = connection.execute("SELECT embedder, dimension FROM lifetime").fetchone()
            if found is None:
                connection.execute("INSERT INTO lifetime VALUES (?, ?, ?)", (uuid.uuid4().hex, embedder, dimension))
            elif found != (embedder, dimension):
                raise IndexMismatch(f"{self._path.name} holds {found}, not {(embedder, dimension)}")
            connection.execute("COMMIT")
        self._dimension = dimension

    def upsert(self, points: Sequence[Point]) -> None:
        vectors = matrix([point.vector for point in points], self._dimension, [point.id for point in points])
        self._write(
            [
                (
                    point.id,
                    point.epoch,
                    point.fingerprint,
                    vector.tobytes(),
                    json.dumps({name: storable(value) for name, value in point.metadata.items()}),
                )
                for point, vector in zip(points, vectors, strict=True)
            ]
        )

    def delete(self, ids: Sequence[str], *, epoch: int = 0) -> None:
        self._write([(id_, epoch, None, None, None) for id_ in ids])

    def query(
        self, vector: Vector, limit: int, *, where: Filter | None = None, ids: Sequence[str] | None = None
    ) -> list[Match]:
        condition = canonical(where or {})
        if condition is None or limit < 1:
            return []
        rows = [
            row
            for row in self._rows()
            if (ids is None or row[0] in set(ids)) and matches(condition, json.loads(row[3]))
        ]
        if not rows:
            return []
        stored = np.stack([np.frombuffer(row[2], dtype=np.float32) for row in rows])
        norms = np.linalg.norm(stored, axis=1) * np.linalg.norm(vector)
        distances = 1.0 - np.divide(stored @ vector, norms, out=np.zeros_like(norms), where=norms > 0)
        order = np.argsort(distances, kind="stable")[:limit]
        return [Match(rows[n][0], float(np.clip(distances[n], 0.0, 2.0)), rows[n][1]) for n in order]

    def get(self, ids: Sequence[str]) -> list[Stored]:
        rows = self._rows("id IN (SELECT value FROM json_each(?))", json.dumps(list(ids)))
        return [Stored(row[0], row[1], np.frombuffer(row[2], dtype=np.float32)) for row in rows]

    def scan(self, after: str | None, limit: int) -> list[Entry]:
        return [Entry(row[0], row[1]) for row in self._rows("id > ? ORDER BY id LIMIT ?", after or "", limit)]

    def metadata(self) -> dict[str, dict[str, Any]]:
        return {row[0]: json.loads(row[3]) for row in self._rows()}

    def close(self) -> None:
        """Nothing to close: every call has its own connection."""

    def _rows(self, where: str = "TRUE", *parameters: Any) -> list[Any]:
        # `fingerprint IS NOT NULL` first: *where* may end with ORDER BY.
        statement = f"SELECT id, fingerprint, vector, metadata FROM point WHERE fingerprint IS NOT NULL AND {where}"
        with self._connection() as connection:
            return connection.execute(statement, parameters).fetchall()

    def _write(self, rows: Sequence[tuple[Any, ...]]) -> None:
        with self._connection() as connection:
            connection.execute("BEGIN IMMEDIATE")
            connection.executemany(_WRITE, rows)
            connection.execute("COMMIT")

    @contextmanager
    def _connection(self) -> Iterator[sqlite3.Connection]:
        """A connection in autocommit mode. SQLite's errors, such as a stopped process's lock, may go away later."""
        try:
            with closing(sqlite3.connect(self._path, timeout=2.0, isolation_level=None)) as connection:
                # Processes are killed here, not machines.
                connection.execute("PRAGMA synchronous = OFF")
                yield connection
        except sqlite3.Error as error:
            raise DeliveryRetryable(f"{self._path.name}: {type(error).__name__}") from error
