"""Tables of ours, made by one process at a time: workers that start together all find, or make, them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from sqlalchemy import Engine, Inspector, Table, func, inspect, select
from sqlalchemy.engine import Connection
from sqlalchemy.engine.mock import MockConnection

from memstate_sa.db import sqlite
from memstate_sa.db.amendments import amend, lacking, old_names, rename
from memstate_sa.db.functions import dollar_quoted
from memstate_sa.db.tables import metadata

_one_at_a_time = select(func.pg_advisory_xact_lock(func.hashtextextended("memstate_sa", 0)))


@contextmanager
def creating(engine: Engine) -> Iterator[Connection]:
    """A transaction in which no other process creates anything of ours."""
    with engine.connect() as connection:
        if engine.dialect.name == "postgresql":
            # Whatever the engine's own: what the process before has made is to be seen, and undone as a whole.
            connection.execution_options(isolation_level="READ COMMITTED")
        with connection.begin():
            if engine.dialect.name == "postgresql":
                connection.execute(_one_at_a_time)
            elif not sqlite.in_transaction(connection):  # else a listener of the application's has begun
                connection.exec_driver_sql("BEGIN IMMEDIATE")
            yield connection


def create(
    engine: Engine, tables: Sequence[Table] | None = None, install: Callable[[Connection], None] | None = None
) -> None:
    """Create what of *tables* (default: all of memstate_sa) is not there yet, then *install* what belongs to them.

    Tables of an older version get the name of today, and the columns and indexes that they lack. SQLite is locked only
    if something is missing. A worker that starts would else wait for whoever writes.
    """
    if tables is None:
        tables = metadata.sorted_tables
    is_whole = _is_whole(inspect(engine), tables)
    if is_whole and install is None:
        return
    alone = not is_whole or engine.dialect.name == "postgresql"
    with creating(engine) if alone else engine.begin() as connection:
        if not is_whole:  # looked at again, now alone
            for name in old_names(inspect(connection).get_table_names(), tables):
                rename(connection, name)
            names = inspect(connection).get_table_names()
            missing_tables = [table for table in tables if table.name not in names]
            _create(connection, missing_tables)
            if len(missing_tables) < len(tables):
                amend(connection, lacking(inspect(connection), tables))
        if install is not None:
            install(connection)


def _create(connection: Connection, tables: Sequence[Table]) -> None:
    """Create *tables*, with their indexes and comments: on PostgreSQL by one statement, not by a hundred."""
    if connection.dialect.name != "postgresql":
        metadata.create_all(connection, tables=tables, checkfirst=False)
        return
    statements: list[str] = []

    def collect(ddl: Any, *_: Any) -> None:
        statements.append(f"{ddl.compile(dialect=connection.dialect)};")

    metadata.create_all(MockConnection(connection.dialect, collect), tables=tables, checkfirst=False)
    body = "\n".join(("BEGIN", *statements, "END"))
    connection.exec_driver_sql(f"DO {dollar_quoted(body)}", execution_options={"no_parameters": True})


def _is_whole(inspector: Inspector, tables: Sequence[Table]) -> bool:
    names = inspector.get_table_names()
    has_all = all(table.name in names for table in tables)
    return has_all and not old_names(names, tables) and not any(lacking(inspector, tables))
