"""Parts of statements that every module uses: batches, upserts, the write lock of SQLite."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, TypeVar

from sqlalchemy import (
    Delete,
    Table,
    delete,
    false,
)
from sqlalchemy.dialects import postgresql, sqlite
from sqlalchemy.engine import Connection

from memstate_sa.db import sqlite as sqlite_engines
from memstate_sa.db.tables import outbox

READ_CHUNK = 1000
"""Keys per SELECT: under SQLite's 32,766 and PostgreSQL's 65,535 parameters for a key of up to 32 columns."""


T = TypeVar("T")


def batches(items: Sequence[T], size: int = READ_CHUNK) -> Iterator[Sequence[T]]:
    for start in range(0, len(items), size):
        yield items[start : start + size]


def take_write_lock(connection: Connection) -> None:
    """On SQLite, become the writer now: what is read next stays true until this transaction ends.

    PostgreSQL locks rows instead. A DELETE that matches nothing takes the lock, begins the transaction in the driver's
    legacy mode too, and writes nothing.
    """
    if connection.dialect.name == "sqlite" and not sqlite_engines.begin_to_write(connection):
        connection.execute(_nothing)


_nothing: Delete = delete(outbox).where(false())


def upsert(dialect_name: str, table: Table) -> Any:
    """An INSERT that can say ON CONFLICT."""
    return {"sqlite": sqlite, "postgresql": postgresql}[dialect_name].insert(table)
