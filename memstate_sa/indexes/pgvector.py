"""PostgreSQL with pgvector as a vector index: a separate table, in the facts' database or in another one.

Each vector is stored as a unit vector and its length. So the inner product is the cosine, no square overflows, and a
zero vector has distance 1. Its own cosine distance would be NaN in pgvector, and the graph would leave it out.
"""

from __future__ import annotations

import json
import math
import threading
import time
import uuid
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from typing import TYPE_CHECKING, Any

import numpy as np
from sqlalchemy import Connection, Engine, func, make_url, select, text
from sqlalchemy.engine import URL
from sqlalchemy.exc import DataError, DBAPIError
from sqlalchemy.schema import CreateIndex, CreateTable, DropIndex

from memstate_sa.db.dialects import POSTGRESQL, database_of
from memstate_sa.db.engines import blocking_engine, with_separate_pool
from memstate_sa.errors import (
    DeliveryError,
    DeliveryRejected,
    DeliveryRetryable,
    IndexMismatch,
    MemstateError,
    MissingExtra,
)
from memstate_sa.indexes._adapter import REMEMBERED_S, Adapter, OpenState
from memstate_sa.indexes._filters import canonical
from memstate_sa.indexes._tags import stored
from memstate_sa.indexes._units import at_length, clipped_distance, unit_rows
from memstate_sa.indexes.base import Entry, Filter, Match, Point, Stored, Vector, matrix
from memstate_sa.indexes.pgvector_statements import (
    EXACT_UP_TO,
    ONE_AT_A_TIME,
    Statements,
    key_of,
    value_of,
    vectors_text,
)
from memstate_sa.indexes.provider_errors import delivery_error
from memstate_sa.indexes.provider_messages import words

if TYPE_CHECKING:
    from sqlalchemy.ext.asyncio import AsyncEngine

_RECOUNT_S = 10.0
"""The points are counted again after this time. In between, relays add too few to make comparing all of them slow."""
_REMEMBERED = timedelta(seconds=REMEMBERED_S)
_OLDEST_VERSION = (0, 8)
"""Older versions of pgvector do not continue the graph search when a filter removes too many points."""
# The SQLSTATE classes that blame the values: data exceptions, integrity, program limits. For other errors, a retry may
# help.
_VALUE_ERRORS = ("22", "23", "54")
# These states need an administrator: insufficient_privilege, and two states for missing files of the extension.
_NEEDS_AN_ADMINISTRATOR = ("42501", "0A000", "58P01")
_UNDEFINED_TABLE = "42P01"


class PgVectorIndex(Adapter):
    """The table *name* of a PostgreSQL database with pgvector 0.8 or later. `open` creates the table and the extension.

    *engine* is an Engine, an AsyncEngine or a URL, and may be the engine of the facts. From an AsyncEngine or a URL,
    the index makes a new Engine with psycopg. The index has its own transactions and a separate connection pool,
    because a searching Session already holds a connection of the engine's pool. Each batch is one transaction, and the
    statement that writes also checks the epochs (`FencedIndex`).

    In a table of up to 5,000 points, a query compares all of them. In a larger one it searches an HNSW graph with
    *ef_search* candidates, and continues if a filter leaves too few. ``exact=True`` always compares all points.
    ``exact=False`` always uses the graph, which may miss a near point. The graph has half precision over 2,000
    dimensions, and there is no graph over 4,000. Distances are always those of the full vectors. Filters run in the
    database. The text of a fact is not stored.
    """

    fences = True
    _vendor = "pgvector"

    def __init__(
        self,
        engine: Engine | AsyncEngine | URL | str,
        name: str = "memstate_vectors",
        *,
        schema: str | None = None,
        exact: bool | None = None,
        ef_search: int = 100,
        max_batch: int = 1000,
    ) -> None:
        self._owned = not isinstance(engine, Engine)
        self._engine = engine if isinstance(engine, Engine) else _blocking(engine)
        if (database := database_of(self._engine)) is not POSTGRESQL:
            raise MemstateError(
                f"PgVectorIndex cannot use {database.name}: pgvector is an extension of PostgreSQL. Pass the engine or "
                "URL of a PostgreSQL database."
            )
        if len(name.encode()) > 63:
            raise MemstateError(f"The table name {name!r} is too long. PostgreSQL allows 63 bytes. Use a shorter name.")
        self._name, self._schema = name, schema
        self._exact = exact
        self._ef_search = ef_search
        self._max_batch = max_batch
        self._mutex = threading.Lock()
        self._prepared: Statements | None = None
        self._counted_at = -math.inf
        self._is_small = False

    @property
    def max_batch(self) -> int:
        return self._max_batch

    @property
    def incarnation(self) -> str:
        with self._translated("identify", sends_facts=False):
            state = self._state(self._statements(self._dimension))
        if state is None:
            raise DeliveryRetryable(f"Table {self._name!r} was dropped or emptied. open() creates it again.")
        return str(state["incarnation"])

    def open(self, *, embedder: str, dimension: int) -> None:
        with self._translated("open", sends_facts=False):
            state = self._resolve(embedder, dimension)
        if (state["embedder"], state["dimension"]) != (embedder, dimension):
            raise IndexMismatch(
                f"Cannot use table {self._name!r}. It was built with embedder {state['embedder']!r} and "
                f"{state['dimension']} dimensions, but this Memory needs {embedder!r} and {dimension} dimensions. Use "
                "another table name, or drop this table to rebuild it."
            )
        self._opened = OpenState(embedder, dimension)

    def upsert(self, points: Sequence[Point]) -> None:
        # Every writer locks the rows in the order of their keys, so there are no deadlocks.
        latest = {key_of(point.id): point for point in points}
        ordered = [latest[key] for key in sorted(latest)]
        vectors = matrix([point.vector for point in ordered], self._dimension, [point.id for point in ordered])
        if not ordered:
            return
        units, norms = unit_rows(vectors)
        with self._using("upsert into") as (connection, statements):
            rows = {
                "key": sorted(latest),
                "id": [point.id for point in ordered],
                "epoch": [point.epoch for point in ordered],
                "fingerprint": [point.fingerprint for point in ordered],
                "unit": vectors_text(units),
                "norm": norms.tolist(),
                "metadata": [
                    json.dumps({key: value_of(value) for key, value in stored(point.metadata, point.id).items()})
                    for point in ordered
                ],
            }
            connection.execute(statements.upsert, rows)

    def delete(self, ids: Sequence[str], *, epoch: int = 0) -> None:
        keys = sorted(set(map(key_of, ids)))
        if not keys:
            return
        with self._using("delete from") as (connection, statements):
            if epoch == 0:
                connection.execute(statements.delete, {"keys": keys})
                return
            connection.execute(statements.bury, {"keys": keys, "epoch": epoch})
            connection.execute(statements.forget, {"remembered": _REMEMBERED, "most": 2 * len(keys)})

    def query(
        self, vector: Vector, limit: int, *, where: Filter | None = None, ids: Sequence[str] | None = None
    ) -> list[Match]:
        units, _ = unit_rows(matrix([vector], self._dimension, ["the query"]))
        condition = canonical(where or {})
        if condition is None or limit < 1 or (ids is not None and not ids):
            return []
        parameters: dict[str, Any] = {"query": str(units[0].tolist()), "limit": limit}
        with self._reading("query") as (connection, statements):
            criteria = [statements.matches(condition)] if condition else []
            if ids is not None:
                criteria.append(statements.named)
                parameters["keys"] = [key_of(id_) for id_ in ids]
            elif statements.graph is not None and not self._compares(connection, statements):
                parameters["explored"] = str(max(self._ef_search, min(2 * limit, 1000)))
                statement = statements.nearest(criteria) if criteria else statements.nearest_of_all
                rows = connection.execute(statement, parameters).all()
                if len(rows) == limit:
                    return _matches(rows)
            # Compare all points. Do this also after a short answer from the graph, because points may be missing in it.
            is_by_name = ids is not None and not condition
            statement = statements.compared_by_name if is_by_name else statements.compared(criteria)
            return _matches(connection.execute(statement, parameters).all())

    def _compares(self, connection: Connection, statements: Statements) -> bool:
        """Whether to compare all points. With a few thousand points, this is as fast as the graph, and misses none."""
        if self._exact is None and time.monotonic() >= self._counted_at + _RECOUNT_S:
            self._is_small = connection.execute(statements.count_some).scalar_one() <= EXACT_UP_TO
            self._counted_at = time.monotonic()
        return self._is_small if self._exact is None else self._exact

    def get(self, ids: Sequence[str]) -> list[Stored]:
        keys = sorted(set(map(key_of, ids)))
        if not keys:
            return []
        with self._reading("read") as (connection, statements):
            rows = connection.execute(statements.get, {"keys": keys}).all()
        return [
            Stored(id_, fingerprint, at_length(np.array(json.loads(unit), dtype=np.float32), norm))
            for id_, fingerprint, unit, norm in rows
        ]

    def scan(self, after: str | None, limit: int) -> list[Entry]:
        with self._reading("scan") as (connection, statements):
            rows = connection.execute(statements.scan, {"after": after or "", "limit": limit}).all()
        return [Entry(*row) for row in rows]

    def purge(self) -> None:
        """Rewrite the table without deleted points. Writers and readers wait.

        Deleted points may remain in write-ahead logs, replicas and backups.
        """
        with self._using("purge") as (connection, statements):
            table = connection.dialect.identifier_preparer.format_table(statements.points).replace("%%", "%")
            # Do not use VACUUM FULL. It also copies deleted rows that an older transaction might still see.
            _run(connection, "SET LOCAL lock_timeout = '30s'")
            _run(connection, f"LOCK TABLE {table} IN ACCESS EXCLUSIVE MODE")
            _run(connection, f"CREATE TEMPORARY TABLE memstate_kept ON COMMIT DROP AS TABLE {table}")
            if statements.graph is not None:  # building a graph at once is faster than adding the points one by one
                connection.execute(DropIndex(statements.graph, if_exists=True))
            _run(connection, f"TRUNCATE {table}")
            _run(connection, f"INSERT INTO {table} TABLE memstate_kept")
            self._build_graph(connection, statements)

    def read_mark(self) -> str | None:
        with self._translated("read the mark of"):
            state = self._state(self._statements(self._dimension))
        return None if state is None else state.get("mark")

    def write_mark(self, mark: str) -> None:
        with self._using("mark") as (connection, statements):
            connection.execute(statements.mark, {"mark": mark})

    def close(self) -> None:
        """Close the connections if the index made its own engine. Otherwise they close with the caller's engine."""
        self._opened = None
        if self._owned:
            self._engine.dispose()

    # -- the table -----------------------------------------------------------------------------------------------------

    @property
    def _place(self) -> str:
        return f"table {self._name!r}"

    def _reader(self) -> Connection:
        """A connection in autocommit: each read is one statement and one round trip."""
        return with_separate_pool(self._engine).connect().execution_options(isolation_level="AUTOCOMMIT")

    @contextmanager
    def _writer(self) -> Iterator[Connection]:
        """A transaction in READ COMMITTED, so that the fence sees the latest epochs, not an older snapshot."""
        connected = with_separate_pool(self._engine).connect().execution_options(isolation_level="READ COMMITTED")
        with connected as connection, connection.begin():
            yield connection

    @contextmanager
    def _using(self, action: str) -> Iterator[tuple[Connection, Statements]]:
        """A transaction. Its errors are raised as DeliveryError."""
        statements = self._statements(self._dimension)
        with self._translated(action), self._writer() as connection:
            yield connection, statements

    @contextmanager
    def _reading(self, action: str) -> Iterator[tuple[Connection, Statements]]:
        statements = self._statements(self._dimension)
        with self._translated(action), self._reader() as connection:
            yield connection, statements

    def _delivery_error(self, error: Exception, message: str, sent: Sequence[str] | None) -> DeliveryError:
        state = _sqlstate(error)
        if state == _UNDEFINED_TABLE:
            return DeliveryRetryable(f"Table {self._name!r} was dropped. open() creates it again.")
        is_refusal = state[:2] in _VALUE_ERRORS if state else isinstance(error, DataError | ValueError | TypeError)
        unknown = DeliveryRejected if is_refusal else DeliveryRetryable
        # SQLAlchemy's message has the statement too. The server quotes a value only if it refuses that value.
        cause = getattr(error, "orig", None) or error
        return delivery_error(cause, message, unknown=unknown, sent=sent if is_refusal else ())

    def _statements(self, dimension: int) -> Statements:
        with self._mutex:
            if self._prepared is None or self._prepared.dimension != dimension:
                self._prepared = Statements(self._name, self._schema, dimension)
            return self._prepared

    def _state(self, statements: Statements) -> dict[str, Any] | None:
        """The table's state. None if the table, or its content, is missing."""
        try:
            with self._reader() as connection:
                state: dict[str, Any] | None = connection.scalar(statements.state)
        except DBAPIError as error:
            if _sqlstate(error) != _UNDEFINED_TABLE:
                raise
            return None
        return state

    def _resolve(self, embedder: str, dimension: int) -> dict[str, Any]:
        statements = self._statements(dimension)
        state = self._state(statements)
        if state is not None and self._opened is not None:
            return state
        with self._writer() as connection:
            if state is None or self._lacks_graph(connection, statements):
                connection.execute(ONE_AT_A_TIME, {"name": f"{self._schema}.{self._name}"})
                self._make(connection, statements)
            if state is None:
                new_state = {"incarnation": uuid.uuid4().hex, "embedder": embedder, "dimension": dimension}
                connection.execute(statements.stamp, {"state": new_state})
                state = connection.scalar(statements.state)
                assert state is not None
        return state

    def _make(self, connection: Connection, statements: Statements) -> None:
        with _permitted(
            "the extension vector",
            "Install pgvector on the server, and run CREATE EXTENSION vector in this database as a superuser.",
        ):
            _extend(connection)
        with _permitted(self._place, "Grant CREATE on the schema to this role."):
            connection.execute(CreateTable(statements.points, if_not_exists=True))
            for index in statements.indexes:
                connection.execute(CreateIndex(index, if_not_exists=True))
            self._build_graph(connection, statements)

    def _build_graph(self, connection: Connection, statements: Statements) -> None:
        if statements.graph is not None and not self._exact:
            connection.execute(CreateIndex(statements.graph, if_not_exists=True))

    def _lacks_graph(self, connection: Connection, statements: Statements) -> bool:
        """Whether the graph is missing. A table that was created with ``exact=True`` has none."""
        if statements.graph is None or self._exact:
            return False
        quoted = connection.dialect.identifier_preparer.format_index(statements.graph)
        if self._schema is not None:
            quoted = f"{connection.dialect.identifier_preparer.quote_schema(self._schema)}.{quoted}"
        return connection.scalar(select(func.to_regclass(quoted))) is None


@contextmanager
def _permitted(place: str, remedy: str) -> Iterator[None]:
    """Raise a DeliveryError that is not retryable, with the *remedy*, if the server cannot or must not create this."""
    try:
        yield
    except DBAPIError as error:
        if _sqlstate(error) not in _NEEDS_AN_ADMINISTRATOR:
            raise
        reason = words([error.orig or error], ())
        raise DeliveryError(f"pgvector could not create {place}: {reason}. {remedy}") from error


def _extend(connection: Connection) -> None:
    version = text("SELECT extversion FROM pg_extension WHERE extname = 'vector'")
    if connection.scalar(version) is None:
        # The index of another table may create the extension at the same time.
        connection.execute(ONE_AT_A_TIME, {"name": "CREATE EXTENSION vector"})
        connection.execute(text("CREATE EXTENSION IF NOT EXISTS vector"))
    installed = str(connection.scalar(version))
    if tuple(map(int, installed.split(".")[:2])) < _OLDEST_VERSION:
        raise MemstateError(
            f"pgvector {installed} is too old. PgVectorIndex needs 0.8 or later: run ALTER EXTENSION vector UPDATE."
        )


def _blocking(engine: Any) -> Engine:
    try:
        return blocking_engine(make_url(getattr(engine, "url", engine)))
    except ModuleNotFoundError as error:
        raise MissingExtra("psycopg", "pgvector") from error


def _sqlstate(error: Exception) -> str | None:
    state: str | None = getattr(getattr(error, "orig", None), "sqlstate", None)
    return state


def _matches(rows: Sequence[Any]) -> list[Match]:
    return [Match(id_, clipped_distance(distance), fingerprint) for id_, distance, fingerprint in rows]


def _run(connection: Connection, statement: str) -> None:
    """Run *statement* without parameters, because a name in it may look like a parameter."""
    connection.exec_driver_sql(statement, execution_options={"no_parameters": True})
