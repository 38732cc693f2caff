"""What our tables lack that an older version created."""

from __future__ import annotations

from sqlalchemy import Column, String, Table, Text, inspect
from sqlalchemy.engine import Connection
from sqlalchemy.schema import CreateColumn
from sqlalchemy.types import TypeEngine

from memstate_sa.tables import metadata


def amend(connection: Connection) -> None:
    """Add the columns that our tables lack, and widen those that are too narrow: `metadata.create_all` does neither.

    With Alembic, a migration does it.
    """
    inspector = inspect(connection)
    for table in metadata.sorted_tables:
        there = {column["name"]: column["type"] for column in inspector.get_columns(table.name)}
        for column in table.columns:
            if column.name not in there:
                _alter(connection, table, f"ADD COLUMN {CreateColumn(column).compile(dialect=connection.dialect)}")
            elif _is_narrower(there[column.name], column) and connection.dialect.name == "postgresql":
                _alter(connection, table, f"ALTER COLUMN {_quoted(connection, column)} TYPE TEXT")


def _is_narrower(there: TypeEngine[object], column: Column[object]) -> bool:
    return isinstance(column.type, Text) and isinstance(there, String) and there.length is not None


def _alter(connection: Connection, table: Table, change: str) -> None:
    name = connection.dialect.identifier_preparer.format_table(table)
    connection.exec_driver_sql(f"ALTER TABLE {name} {change}")


def _quoted(connection: Connection, column: Column[object]) -> str:
    return connection.dialect.identifier_preparer.format_column(column)
