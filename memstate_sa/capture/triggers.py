"""Capture by the database: triggers write log and outbox for every change of a table, by any program.

They write the same as `rows` and `codec` in Python: the image of a row as tagged JSON, and its canonical key. The
trigger context names the transaction of a Session. Other programs' changes get a transaction of their own.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from types import ModuleType

from sqlalchemy import Table, inspect
from sqlalchemy.engine import Connection, Dialect

from memstate_sa.capture import postgresql_triggers, sqlite_triggers
from memstate_sa.capture.captured_tables import Capturable, Trigger, read_header
from memstate_sa.capture.row_images import TableWriter
from memstate_sa.db.dialects import POSTGRESQL, SQLITE, Database, database_of
from memstate_sa.errors import MemstateError

_OF: Mapping[Database, ModuleType] = {POSTGRESQL: postgresql_triggers, SQLITE: sqlite_triggers}


def triggers(connection: Connection, captured: Capturable) -> list[Trigger]:
    """The triggers for *captured*. Raises MemstateError when triggers cannot log it, or its table does not exist."""
    writer, table = TableWriter(captured, connection.dialect), captured.table
    if not inspect(connection).has_table(table.name, schema=table.schema):
        raise MemstateError(
            f"Cannot create the triggers of {table.fullname}: the table does not exist. Create it before its triggers."
        )
    triggers_: list[Trigger] = _OF[database_of(connection)].triggers(connection, writer)
    return triggers_


def creating(captured: Capturable, dialect: Dialect) -> list[str]:
    """Statements that create the triggers of *captured*, for a script that runs without a connection."""
    statements: list[str] = _OF[database_of(dialect)].creating_offline(TableWriter(captured, dialect))
    return statements


def dropping(captured: Capturable, dialect: Dialect) -> list[str]:
    """Statements that drop the triggers of *captured* and their functions, if they exist."""
    statements: list[str] = _OF[database_of(dialect)].dropping(TableWriter(captured, dialect))
    return statements


def install(connection: Connection, captured: Capturable) -> None:
    """Create the triggers of *captured*, and replace outdated ones."""
    replace(connection, captured.table, triggers(connection, captured))


def uninstall(connection: Connection, captured: Capturable) -> None:
    """Drop the triggers of *captured*, if any. Call it when Sessions log the class: each change must be logged once."""
    if captured.entity in entities_of(connection, captured.table):
        run(connection, dropping(captured, connection.dialect))


def entities_of(connection: Connection, table: Table) -> set[str]:
    """The entities for which our triggers log *table*."""
    headers = (read_header(source) for source in installed(connection, table).values())
    return {header["entity"] for header in headers if header is not None}


def replace(connection: Connection, table: Table, expected: Sequence[Trigger]) -> None:
    """Create the *expected* triggers that *table* lacks, and replace outdated ones."""
    sources = installed(connection, table)
    for trigger in expected:
        if sources.get(trigger.name) != trigger.source:
            run(connection, trigger.statements)


def run(connection: Connection, statements: Iterable[str]) -> None:
    for statement in statements:
        connection.exec_driver_sql(statement, execution_options={"no_parameters": True})  # a statement may contain a %


def installed(connection: Connection, table: Table) -> dict[str, str]:
    """The sources of our triggers on *table*, by name."""
    by_table = everywhere(connection, _OF[database_of(connection)].name_in_catalog(table, connection.dialect))
    return {trigger: source for sources in by_table.values() for trigger, source in sources.items()}


def everywhere(connection: Connection, table: str | None = None) -> dict[tuple[str | None, str], dict[str, str]]:
    """The sources of our triggers on every table, or on one. Keys are (schema or None for the default, name)."""
    by_table: dict[tuple[str | None, str], dict[str, str]] = {}
    for schema, name, trigger, source in connection.execute(_OF[database_of(connection)].INSTALLED, {"table": table}):
        by_table.setdefault((schema, name), {})[trigger] = source
    return by_table
