"""Columns that a table has in the database, and that the log does not hold, as its class does not declare them."""

from __future__ import annotations

from collections.abc import Sequence

from sqlalchemy import Inspector, Table

_LOST = (
    "has columns that the log does not hold, as its class does not declare or track() excludes them: {}. A row that an "
    "undo brings back has their defaults, or NULL."
)


def undeclared_columns(inspector: Inspector, table: Table) -> list[str]:
    """Their names, without those that the database computes."""
    declared = {column.name for column in table.columns}
    columns = inspector.get_columns(table.name, schema=table.schema)
    return [column["name"] for column in columns if column["name"] not in declared and "computed" not in column]


def what_is_lost(columns: Sequence[str]) -> str:
    """What an undo does to *columns*, as a message about their table."""
    return _LOST.format(", ".join(sorted(columns)))
