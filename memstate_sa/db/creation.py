"""The creation of our tables. One process at a time creates them, so that workers can start together."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

from sqlalchemy import Engine, Inspector, Table, inspect
from sqlalchemy.engine import Connection

from memstate_sa.db.amendments import RENAMED, amend, lacking, old_names
from memstate_sa.db.dialects import database_of
from memstate_sa.db.tables import metadata


@contextmanager
def creating(engine: Engine) -> Iterator[Connection]:
    """A transaction during which no other process creates our tables."""
    database = database_of(engine)
    with engine.connect() as connection:
        # The engine's own level will not do: we must see the tables of another process, and must not be in AUTOCOMMIT.
        connection.execution_options(**database.isolation("READ COMMITTED"))
        with connection.begin():
            database.lock_creation(connection)
            yield connection


def create(
    engine: Engine, tables: Sequence[Table] | None = None, install: Callable[[Connection], None] | None = None
) -> None:
    """Create the missing *tables* (default: all of memstate_sa), then call *install* to add triggers.

    Tables of an older version get their current names, and the columns and indexes that they lack. On a database with
    one writer, the write lock is taken only if something is missing. Otherwise each starting worker would wait for it.
    """
    if tables is None:
        tables = metadata.sorted_tables
    database = database_of(engine)
    is_whole = _is_whole(inspect(engine), tables)
    if is_whole and install is None:
        return
    alone = not is_whole or not database.has_one_writer
    with creating(engine) if alone else engine.begin() as connection:
        if not is_whole:  # another process may have created some before we got the lock
            for name in old_names(inspect(connection).get_table_names(), tables):
                database.rename_table(connection, name, RENAMED[name])
            names = inspect(connection).get_table_names()
            missing_tables = [table for table in tables if table.name not in names]
            database.create_tables(connection, metadata, missing_tables)
            if len(missing_tables) < len(tables):
                amend(connection, lacking(inspect(connection), tables))
        if install is not None:
            install(connection)


def _is_whole(inspector: Inspector, tables: Sequence[Table]) -> bool:
    names = inspector.get_table_names()
    has_all = all(table.name in names for table in tables)
    return has_all and not old_names(names, tables) and not any(lacking(inspector, tables))
