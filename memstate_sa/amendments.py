"""Columns that tables of ours lack, because an older version created them."""

from __future__ import annotations

from sqlalchemy import inspect
from sqlalchemy.engine import Connection
from sqlalchemy.schema import CreateColumn

from memstate_sa.tables import metadata


def add_columns(connection: Connection) -> None:
    """Add the columns that our tables lack: `metadata.create_all` leaves tables that are there as they are."""
    inspector, dialect = inspect(connection), connection.dialect
    for table in metadata.sorted_tables:
        there = {column["name"] for column in inspector.get_columns(table.name)}
        for column in table.columns:
            if column.name not in there:
                name = dialect.identifier_preparer.format_table(table)
                added = CreateColumn(column).compile(dialect=dialect)
                connection.exec_driver_sql(f"ALTER TABLE {name} ADD COLUMN {added}")
