"""Helpers for statements: batches, and the write lock of SQLite."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, TypeVar

from sqlalchemy import ColumnElement, Delete, Engine, Table, delete, false, select, true
from sqlalchemy.engine import Connection

from memstate_sa.db import sqlite
from memstate_sa.db.dialects import Database, database_of
from memstate_sa.db.tables import outbox

READ_CHUNK = 1000
"""Keys per SELECT: under SQLite's 32,766 and PostgreSQL's 65,535 parameters for a key of up to 32 columns."""


T = TypeVar("T")


def batches(items: Sequence[T], size: int = READ_CHUNK) -> Iterator[Sequence[T]]:
    for start in range(0, len(items), size):
        yield items[start : start + size]


def take_write_lock(connection: Connection) -> None:
    """Become the writer now, if the database has only one. Later reads then stay true until this transaction ends.

    Other databases lock rows instead. A DELETE that matches no row takes the lock, and also begins the transaction in
    the driver's legacy mode.
    """
    if database_of(connection).has_one_writer and not sqlite.begin_to_write(connection):
        connection.execute(_nothing)


@contextmanager
def writing(engine: Engine, isolation_level: str) -> Iterator[Connection]:
    """A transaction that will write. *isolation_level* applies if the database has more than one level."""
    options = database_of(engine).isolation(isolation_level)
    with engine.connect().execution_options(**options) as connection, connection.begin():
        take_write_lock(connection)
        yield connection


_nothing: Delete = delete(outbox).where(false())


def upsert_select(database: Database, table: Table, values: Mapping[str, ColumnElement[Any]]) -> Any:
    """An INSERT of *values*, by column, that supports ON CONFLICT."""
    # Without a WHERE, SQLite reads ON CONFLICT as the ON of a join.
    return database.upsert(table).from_select(list(values), select(*values.values()).where(true()))
