"""Parts of statements that every module uses: batches, the write lock of SQLite."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TypeVar

from sqlalchemy import Delete, delete, false
from sqlalchemy.engine import Connection

from memstate_sa.db.dialects import database_of
from memstate_sa.db.tables import outbox

READ_CHUNK = 1000
"""Keys per SELECT: under SQLite's 32,766 and PostgreSQL's 65,535 parameters for a key of up to 32 columns."""


T = TypeVar("T")


def batches(items: Sequence[T], size: int = READ_CHUNK) -> Iterator[Sequence[T]]:
    for start in range(0, len(items), size):
        yield items[start : start + size]


def take_write_lock(connection: Connection) -> None:
    """Where there is one writer, become it now: what is read next stays true until this transaction ends.

    Elsewhere rows are locked instead. A DELETE that matches nothing takes the lock, begins the transaction in the
    driver's legacy mode too, and writes nothing.
    """
    if database_of(connection).has_one_writer:
        connection.execute(_nothing)


_nothing: Delete = delete(outbox).where(false())
