"""Time travel: a read-only Session in which tracked classes have the rows of a moment.

On the Session's own connection, a temporary table with the same name hides each tracked table. The temporary table is
filled from the log. So any select() works, in the database's own dialect, and returns ordinary instances.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, TypeAlias

import numpy as np
from sqlalchemy import BigInteger, Column, Integer, MetaData, Select, Table, and_, event, select
from sqlalchemy.engine import Connection, Engine
from sqlalchemy.orm import ORMExecuteState, Session
from sqlalchemy.schema import CreateTable
from sqlalchemy.types import TypeEngine

from memstate_sa.db.codec import decode, decode_key, encode_key
from memstate_sa.db.dialects import database_of
from memstate_sa.db.rows import TableColumns, stored_columns
from memstate_sa.db.sqlite import is_in_memory
from memstate_sa.db.statements import batches
from memstate_sa.embedding import cache
from memstate_sa.embedding.batches import Vectors
from memstate_sa.errors import MemstateError
from memstate_sa.log.history import Moment, images_at, log_at
from memstate_sa.log.unlogged import unlogged_rows
from memstate_sa.runtime.calls import Call
from memstate_sa.search.hits import Hit, Hits, cosine_distance
from memstate_sa.search.hydration import keys_of
from memstate_sa.search.query import Query
from memstate_sa.tracking import committed
from memstate_sa.tracking.committed import raw_key_columns
from memstate_sa.tracking.tracked import Tracked

_READ_ONLY = "Cannot write: this Session shows the past, which is read-only. Write with another Session."


class PastSession(Session):
    """A Session on the tables of a past moment. Every write raises MemstateError."""

    def flush(self, objects: Sequence[Any] | None = None) -> None:  # noqa: ARG002  # as Session has it
        if not self._is_clean():
            raise MemstateError(_READ_ONLY)


@event.listens_for(PastSession, "do_orm_execute")
def _refuse_to_write(state: ORMExecuteState) -> None:
    if state.is_insert or state.is_update or state.is_delete:
        raise MemstateError(_READ_ONLY)


def take_criteria(past: PastSession, session: Session) -> None:
    """Give *past* the same criteria as *session*: the listeners that add them, and the info that they read."""
    past.info.update(session.info)
    for listener in set(session.dispatch.do_orm_execute).difference(past.dispatch.do_orm_execute):
        event.listen(past, "do_orm_execute", listener)


@contextmanager
def as_of_session(engine: Engine, tracked: Iterable[Tracked], at: Moment) -> Iterator[PastSession]:
    """A Session in which the classes of *tracked* have the rows of the moment *at*. Other tables are unchanged.

    The Session uses one connection and one snapshot. To open it takes as much time and space as to write these rows.
    """
    database = database_of(engine)
    if is_in_memory(engine):
        raise MemstateError(
            "Cannot open the past of an in-memory SQLite database: it has only one connection, where the past would "
            "hide the present. Use a database file."
        )
    tracked = list(tracked)
    for table in (table for one in tracked for table in one.tables if table.schema is not None):
        raise MemstateError(
            f"Cannot open the past of {table.fullname}: it names its schema, so no temporary table can hide it. Use "
            "memory.as_of()."
        )
    with database.snapshot(engine) as connection:
        # Check the moment before any table is hidden.
        log_at(connection, at)
        rows_of_classes = [_rows_at(connection, one, at) for one in tracked]
        database.prefer_temporary_tables(connection)
        for columns, rows in (item for rows_of_class in rows_of_classes for item in rows_of_class.items()):
            _hide(connection, columns, rows)
        # With a SAVEPOINT, the Session's rollback() does not end the snapshot.
        with (
            database.read_only(connection),
            PastSession(connection, autoflush=False, join_transaction_mode="create_savepoint") as session,
        ):
            yield session


Rows: TypeAlias = dict[TableColumns, list[Sequence[Any]]]
"""Rows of driver-level values, by table. Each row has the order of `stored_columns`."""


def _rows_at(connection: Connection, tracked: Tracked, at: Moment) -> Rows:
    """The rows of the class at a moment, and the present rows of other classes in the same tables."""
    columns = tracked.columns_for(connection.dialect)
    images = dict(images_at(connection, tracked, at))
    # Leave out keys that no row can have any more: today's table cannot hold their old rows.
    images = {key: images[key] for key in columns.possible(connection, images)}
    for unlogged in unlogged_rows(connection, tracked):  # these rows have never changed
        images |= unlogged
    rows: Rows = {}
    for table, table_columns in columns.of_table.items():
        others = _rows_of_others(connection, tracked, table_columns)
        rows[table_columns] = [row for key, row in others if key not in images]
        parts = (part for image in images.values() if (part := columns.parts(image)[table]) is not None)
        names = [column.name for column in stored_columns(table)]
        rows[table_columns] += [[decode(part.get(name)) for name in names] for part in parts]
    return rows


def _rows_of_others(
    connection: Connection, tracked: Tracked, columns: TableColumns
) -> Iterator[tuple[str, Sequence[Any]]]:
    """The rows of other classes in a table that the class shares, with their keys.

    The class shares the table with other classes of single-table inheritance, or with its base class.
    """
    table = columns.table
    if tracked.criterion is None and table not in tracked.tables[: tracked.base_table_count]:
        return
    keys = select(*tracked.key_columns).select_from(tracked.rows)
    own_keys = (keys if tracked.criterion is None else keys.where(tracked.criterion)).subquery()
    key = list(table.primary_key.columns)
    is_same = and_(*(one == other for one, other in zip(key, own_keys.columns, strict=True)))
    others = select(*map(columns.raw, [*key, *stored_columns(table)])).select_from(table.outerjoin(own_keys, is_same))
    for row in connection.execute(others.where(own_keys.columns[0].is_(None))):
        yield columns.encode_key(row[: len(key)]), row[len(key) :]


def _hide(connection: Connection, columns: TableColumns, rows: Sequence[Sequence[Any]]) -> None:
    """Hide a table by a temporary table with *rows*."""
    stored = stored_columns(columns.table)
    past = Table(
        columns.table.name,
        MetaData(),
        *(Column(c.name, _wide(c.type), primary_key=c.primary_key, autoincrement=False) for c in stored),
        prefixes=["TEMPORARY"],
    )
    connection.execute(CreateTable(past))
    names = [f"memstate_{n}" for n in range(len(stored))]
    values = {c.name: columns.raw_parameter(c, name) for c, name in zip(past.columns, names, strict=True)}
    for batch in batches(rows):
        # If the type of the key was changed, the log may have both 1 and "1". SQLite treats both as the same text.
        statement = database_of(connection).upsert(past).values(values).on_conflict_do_nothing()
        connection.execute(statement, [dict(zip(names, row, strict=True)) for row in batch])


def _wide(type_: TypeEngine[Any]) -> TypeEngine[Any]:
    """A type that also holds values from before the column's type was changed: BIGINT for all integers.

    In SQLite, a BIGINT primary key is no alias of rowid, so it also holds values that are no integers.
    """
    return BigInteger() if isinstance(type_, Integer) else type_


def search_past(
    session: PastSession,
    tracked: Tracked,
    statement: Select[Any],
    vectors: Vectors,
    query: Query,
    call: Call,
) -> Hits[Any]:
    """The facts nearest to *query* among the rows that *statement* selects in *session*. All rows are measured."""
    connection = session.connection()
    keys = [encode_key(row) for row in connection.execute(keys_of(statement, tracked.columns_for(connection.dialect)))]
    embedder = vectors.embedder.fingerprint
    projections = [
        tracked.project(key, row, embedder) for key, row in committed.read(connection, tracked, keys).items()
    ]
    texts = {p.text_fingerprint: p.text for p in projections if p.text_fingerprint and p.text}
    query_vector = np.asarray(call(vectors.of_query, query.text), dtype=np.float32)
    text_vectors = cache.known(connection, vectors, texts)
    missing = {digest: text for digest, text in texts.items() if digest not in text_vectors}
    text_vectors |= call(vectors.embed, missing, remember=True)
    distances = sorted(
        (cosine_distance(query_vector, text_vectors[p.text_fingerprint]), p.key)
        for p in projections
        if p.text_fingerprint
    )
    limit, max_distance = query.limit, query.max_distance
    near = [pair for pair in distances if max_distance is None or pair[0] <= max_distance]
    columns = tracked.columns_for(connection.dialect)
    hydration = statement.order_by(None).add_columns(*raw_key_columns(columns)).where(columns.key_in)
    hydration._for_update_arg = None  # noqa: SLF001  # the past needs no locks
    hits: Hits[Any] = Hits()
    for batch in filter(None, (near[:limit], *batches(near[limit:]))):
        parameters = columns.key_parameters([decode_key(key) for _, key in batch])
        rows = session.execute(hydration, parameters).unique(lambda row: tuple(row[1:]))
        facts = {encode_key(row[1:]): row[0] for row in rows}
        # A key may be missing in *facts*: this select() runs the application's listeners, and they may leave rows out.
        hits += [Hit(facts[key], distance) for distance, key in batch if key in facts]
        if len(hits) >= limit:
            break
    del hits[limit:]
    return hits
