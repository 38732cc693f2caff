"""The SQLite implementation of `dialects.Database`. The module `sqlite` configures engines and transactions."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import datetime
from typing import Any

from sqlalchemy import ColumnElement, MetaData, Table, bindparam, text
from sqlalchemy.dialects.sqlite import insert
from sqlalchemy.engine import Connection, Engine

from memstate_sa.db.tables import UTCDateTime, utcnow
from memstate_sa.errors import MemstateError

_naming = text("SELECT name, sql FROM sqlite_master WHERE type = 'trigger' AND instr(sql, :old)")


def in_transaction(connection: Connection) -> bool:
    """Whether the driver's connection has begun a transaction."""
    return bool(getattr(connection.connection.driver_connection, "in_transaction", False))


class Sqlite:
    name = "sqlite"
    blocking_driver = "sqlite+pysqlite"
    has_one_writer = runs_in_process = has_dynamic_types = True
    has_writing_ctes = has_arrays = has_laterals = has_transaction_settings = aborts_on_error = False

    upsert = staticmethod(insert)

    def clock(self) -> ColumnElement[datetime]:
        return bindparam("now", type_=UTCDateTime())

    def now(self, connection: Connection) -> datetime:
        return utcnow()

    def isolation(self, level: str) -> dict[str, Any]:
        return {}

    @contextmanager
    def snapshot(self, engine: Engine) -> Iterator[Connection]:
        """Send a plain BEGIN, which takes no lock that a writer would wait for."""
        with engine.connect().execution_options(isolation_level="AUTOCOMMIT") as connection:
            connection.exec_driver_sql("BEGIN")
            try:
                yield connection
            finally:
                connection.exec_driver_sql("ROLLBACK")

    @contextmanager
    def read_only(self, connection: Connection) -> Iterator[None]:
        connection.exec_driver_sql("PRAGMA query_only = ON")
        try:
            yield
        finally:
            connection.exec_driver_sql("PRAGMA query_only = OFF")

    def prefer_temporary_tables(self, connection: Connection) -> None:
        """Do nothing: SQLite always prefers them."""

    def limit_transaction(self, connection: Connection, seconds: float) -> None:
        """Do nothing: a process that has ended holds no lock, and the driver limits the waits."""

    def cluster(self, connection: Connection) -> str | None:
        return None

    def lock_creation(self, connection: Connection) -> None:
        if not in_transaction(connection):  # an application's listener may have begun a transaction
            connection.exec_driver_sql("BEGIN IMMEDIATE")

    def create_tables(self, connection: Connection, metadata: MetaData, tables: list[Table]) -> None:
        metadata.create_all(connection, tables=tables, checkfirst=False)

    def rename_table(self, connection: Connection, old: str, table: Table) -> None:
        """Copy the rows, because SQLite cannot rename a constraint, and would change the text of triggers."""
        new = str(table.name)
        table.create(connection, checkfirst=True)
        names = ", ".join(column.name for column in table.columns)
        connection.exec_driver_sql(f"INSERT OR IGNORE INTO {new} ({names}) SELECT {names} FROM {old}")
        quote = connection.dialect.identifier_preparer.quote
        for name, source in connection.execute(_naming, {"old": old}).all():
            connection.exec_driver_sql(f"DROP TRIGGER {quote(name)}")
            connection.exec_driver_sql(source.replace(old, new), execution_options={"no_parameters": True})
        connection.exec_driver_sql(f"DROP TABLE {old}")

    def skip_keys(self, connection: Connection, table: Table, highest: int) -> None:
        """Do nothing: SQLite does this itself."""

    def vacuum(self, engine: Engine, tables: list[Table], deadline: float) -> None:
        pooled = engine.raw_connection()  # on a Connection, our listeners would begin a transaction
        try:
            connection: Any = pooled.driver_connection
            [patience_ms] = connection.execute("PRAGMA busy_timeout").fetchone()
            try:
                connection.execute("VACUUM")
                connection.execute(f"PRAGMA busy_timeout = {max(0, int(1000 * (deadline - time.monotonic())))}")
                [busy, *_] = connection.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchone()
            finally:
                connection.execute(f"PRAGMA busy_timeout = {patience_ms}")
            if busy:
                raise MemstateError(
                    "Cannot purge: a transaction from before the purge is still open, and may read erased data. End "
                    "it, and purge again."
                )
        finally:
            pooled.close()
