"""The databases that memstate_sa works with. Only this module reads the name of a dialect.

A small difference is a method of `Database`. A caller whose algorithm depends on the database checks a capability.
A module in a higher layer keeps its own differences in a mapping by `POSTGRESQL` and `SQLITE`.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import AbstractContextManager
from datetime import datetime
from typing import Any, Protocol, TypeAlias

from sqlalchemy import ColumnElement, MetaData, Table
from sqlalchemy.engine import Connection, Dialect, Engine

from memstate_sa.db.postgresql import Postgresql
from memstate_sa.db.sqlite_database import Sqlite
from memstate_sa.errors import MemstateError


class Database(Protocol):
    """The differences between databases. Each database has one object, which can be the key of a cache."""

    def __hash__(self) -> int: ...

    name: str
    blocking_driver: str
    """The name of the driver for threads, as in a URL."""

    has_one_writer: bool
    """Transactions write one after the other. So ids are in the order of commits, and rows need no locks."""
    runs_in_process: bool
    """The database is a library in this process. There is no server, so no roles and no NOTIFY."""
    has_writing_ctes: bool
    """One statement can write to several tables."""
    has_arrays: bool
    """A parameter can be an array."""
    has_laterals: bool
    """A subquery of a join can refer to the tables before it."""
    has_dynamic_types: bool
    """A column may hold a value of any type."""
    has_transaction_settings: bool
    """Triggers can read settings of the transaction."""
    aborts_on_error: bool
    """A failed statement ends its transaction."""

    # -- statements ----------------------------------------------------------------------------------------------------

    def upsert(self, table: Any) -> Any:
        """An INSERT that supports ON CONFLICT."""

    def clock(self) -> ColumnElement[datetime]:
        """The clock of leases: the server's, or the parameter ``now`` if all users are on this machine."""

    def now(self, connection: Connection) -> datetime:
        """The current time on the clock of leases."""

    # -- transactions --------------------------------------------------------------------------------------------------

    def isolation(self, level: str) -> dict[str, Any]:
        """Execution options for the isolation *level*. SQLite has only one level, so it needs none."""

    def snapshot(self, engine: Engine) -> AbstractContextManager[Connection]:
        """A connection that sees one state of the database during all its reads, and blocks no writer."""

    def read_only(self, connection: Connection) -> AbstractContextManager[None]:
        """Refuse writes until the end of the block or of the transaction."""

    def prefer_temporary_tables(self, connection: Connection) -> None:
        """Make a table name mean the temporary table of that name, if there is one."""

    def limit_transaction(self, connection: Connection, seconds: float) -> None:
        """Make the server end this transaction when its process stops, and limit its waits for locks."""

    def cluster(self, connection: Connection) -> str | None:
        """The cluster and timeline to which transaction ids belong. None on SQLite, or without the right to ask."""

    # -- tables --------------------------------------------------------------------------------------------------------

    def lock_creation(self, connection: Connection) -> None:
        """Keep other processes from creating our tables until the transaction ends."""

    def create_tables(self, connection: Connection, metadata: MetaData, tables: list[Table]) -> None:
        """Create *tables*, with their indexes and comments."""

    def rename_table(self, connection: Connection, old: str, table: Table) -> None:
        """Give our table *old* its current name. It keeps its rows, and triggers that use it are updated."""

    def skip_keys(self, connection: Connection, table: Table, highest: int) -> None:
        """Make the *table* generate only keys above *highest*."""

    def vacuum(self, engine: Engine, tables: list[Table], deadline: float) -> None:
        """Rewrite *tables* so that no deleted data is left. *deadline* is a time of `time.monotonic`."""


POSTGRESQL: Database = Postgresql()
SQLITE: Database = Sqlite()
Bind: TypeAlias = Engine | Connection | Dialect
BY_NAME: Mapping[str, Database] = {database.name: database for database in (POSTGRESQL, SQLITE)}


def find_database(bind: Bind) -> Database | None:
    """The database of *bind*, or None if memstate_sa does not support it."""
    dialect: Any = getattr(bind, "dialect", bind)
    return BY_NAME.get(dialect.name)


def database_of(bind: Bind) -> Database:
    """The database of *bind*. Raises MemstateError if memstate_sa does not support it."""
    dialect: Any = getattr(bind, "dialect", bind)
    try:
        return BY_NAME[dialect.name]
    except KeyError:
        raise MemstateError(
            f"Cannot use a database of the dialect {dialect.name!r}. memstate_sa works with PostgreSQL and SQLite. "
            "Pass an engine of one of them."
        ) from None
