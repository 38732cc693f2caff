"""Capture by the database: triggers that write log and outbox, whoever changes the table and by whatever means.

What they write is what `columns` and `codec` would have: the image of a row as tagged JSON, and its canonical key. The
trigger context names the transaction of a Session. What other programs write is a transaction of its own.
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
    """What captures *captured*. Raises MemstateError for what triggers cannot log, and when there is no table."""
    writer, table = TableWriter(captured, connection.dialect), captured.table
    if not inspect(connection).has_table(table.name, schema=table.schema):
        raise MemstateError(f"table {table.fullname} is not there yet: create it before its triggers")
    triggers_: list[Trigger] = _OF[database_of(connection)].triggers(connection, writer)
    return triggers_


def creating(captured: Capturable, dialect: Dialect) -> list[str]:
    """Statements that create the triggers of *captured* where nobody can be asked for the schemas of the tables."""
    statements: list[str] = _OF[database_of(dialect)].creating_offline(TableWriter(captured, dialect))
    return statements


def dropping(captured: Capturable, dialect: Dialect) -> list[str]:
    """Statements that drop the triggers of *captured*, and their functions, as far as they are there."""
    statements: list[str] = _OF[database_of(dialect)].dropping(TableWriter(captured, dialect))
    return statements


def install(connection: Connection, captured: Capturable) -> None:
    """Create the triggers of *captured*, or replace those that are not as they should be."""
    replace(connection, captured.table, triggers(connection, captured))


def uninstall(connection: Connection, captured: Capturable) -> None:
    """Drop the triggers that log *captured*, if there are any: a Session logs it now, and each change only once."""
    if captured.entity in entities_of(connection, captured.table):
        run(connection, dropping(captured, connection.dialect))


def entities_of(connection: Connection, table: Table) -> set[str]:
    """The entities as which triggers of ours log *table*."""
    headers = (read_header(source) for source in installed(connection, table).values())
    return {header["entity"] for header in headers if header is not None}


def replace(connection: Connection, table: Table, expected: Sequence[Trigger]) -> None:
    """Make *table* have the triggers that are *expected*."""
    sources = installed(connection, table)
    for trigger in expected:
        if sources.get(trigger.name) != trigger.source:
            run(connection, trigger.statements)


def run(connection: Connection, statements: Iterable[str]) -> None:
    for statement in statements:
        connection.exec_driver_sql(statement, execution_options={"no_parameters": True})  # it may hold a %


def installed(connection: Connection, table: Table) -> dict[str, str]:
    """The source of each trigger of ours that *table* has, by name."""
    by_table = everywhere(connection, _OF[database_of(connection)].name_in_catalog(table, connection.dialect))
    return {trigger: source for sources in by_table.values() for trigger, source in sources.items()}


def everywhere(connection: Connection, table: str | None = None) -> dict[tuple[str | None, str], dict[str, str]]:
    """The same of every table, or of one; by its schema, None for the default one, and its name."""
    by_table: dict[tuple[str | None, str], dict[str, str]] = {}
    for schema, name, trigger, source in connection.execute(_OF[database_of(connection)].INSTALLED, {"table": table}):
        by_table.setdefault((schema, name), {})[trigger] = source
    return by_table
