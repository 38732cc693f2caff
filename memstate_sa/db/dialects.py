"""The databases that memstate_sa works with. The name of a dialect is looked at here, and nowhere else.

A small difference is a method of `Database`. A caller that takes another way on one database asks for a capability.
A module of a higher folder keeps its own differences in a mapping by `POSTGRESQL` and `SQLITE`.
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
    """The differences between databases. There is one object of each, so a statement can be cached by it."""

    def __hash__(self) -> int: ...

    name: str
    blocking_driver: str
    """The driver for threads, as a URL names it."""

    has_one_writer: bool
    """Transactions write one after the other: ids are in the order of commits, and no rows need to be locked."""
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
    """Triggers can read what was set for a transaction."""
    aborts_on_error: bool
    """A statement that fails ends its transaction."""

    # -- statements ----------------------------------------------------------------------------------------------------

    def upsert(self, table: Any) -> Any:
        """An INSERT that can say ON CONFLICT."""

    def clock(self) -> ColumnElement[datetime]:
        """The clock of leases. It is the server's, or the parameter ``now`` where all users are on this machine."""

    def now(self, connection: Connection) -> datetime:
        """The time by that clock."""

    # -- transactions --------------------------------------------------------------------------------------------------

    def isolation(self, level: str) -> dict[str, Any]:
        """Execution options for the isolation *level*. SQLite has but one, so it needs none."""

    def snapshot(self, engine: Engine) -> AbstractContextManager[Connection]:
        """A connection that sees one state of the database for as long as it reads, and holds up no writer."""

    def read_only(self, connection: Connection) -> AbstractContextManager[None]:
        """Refuse all that would write, until the end of the block, or of the transaction."""

    def prefer_temporary_tables(self, connection: Connection) -> None:
        """Have a name mean a temporary table, if there is one."""

    def limit_transaction(self, connection: Connection, seconds: float) -> None:
        """Have a server end this transaction if its process stops in it, and limit its waits for locks."""

    def cluster(self, connection: Connection) -> str | None:
        """The cluster and timeline of transaction ids. None where the database does not tell them."""

    # -- tables --------------------------------------------------------------------------------------------------------

    def lock_creation(self, connection: Connection) -> None:
        """Be the only one that creates tables of ours, until the transaction ends."""

    def create_tables(self, connection: Connection, metadata: MetaData, tables: list[Table]) -> None:
        """Create *tables*, with their indexes and comments."""

    def rename_table(self, connection: Connection, old: str, table: Table) -> None:
        """Give a table of ours the name of today. It keeps its rows, and triggers that name it follow."""

    def skip_keys(self, connection: Connection, table: Table, highest: int) -> None:
        """Have the *table* give out no key up to *highest*."""

    def vacuum(self, engine: Engine, tables: list[Table], deadline: float) -> None:
        """Rewrite *tables* without what was deleted from them. *deadline* is a time of `time.monotonic`."""


POSTGRESQL: Database = Postgresql()
SQLITE: Database = Sqlite()
Bind: TypeAlias = Engine | Connection | Dialect
BY_NAME: Mapping[str, Database] = {database.name: database for database in (POSTGRESQL, SQLITE)}


def find_database(bind: Bind) -> Database | None:
    """The database of *bind*, or None for one that memstate_sa does not know."""
    dialect: Any = getattr(bind, "dialect", bind)
    return BY_NAME.get(dialect.name)


def database_of(bind: Bind) -> Database:
    """The database of *bind*. Raises MemstateError for one that memstate_sa does not know."""
    dialect: Any = getattr(bind, "dialect", bind)
    try:
        return BY_NAME[dialect.name]
    except KeyError:
        raise MemstateError(
            f"Cannot use a database of the dialect {dialect.name!r}. memstate_sa works with PostgreSQL and SQLite. "
            "Give an engine of one of them."
        ) from None
