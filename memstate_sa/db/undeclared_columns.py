"""Columns of a table that its class does not declare. The log does not have their values."""

from __future__ import annotations

from collections.abc import Sequence

from sqlalchemy import Inspector, Table

_LOST = (
    "has columns that the log does not have, because its class does not declare them or track() excludes them: {}. "
    "When an undo restores a deleted row, they get their defaults or NULL."
)


def undeclared_columns(inspector: Inspector, table: Table) -> list[str]:
    """The names of the undeclared columns of *table*, without computed ones."""
    declared = {column.name for column in table.columns}
    columns = inspector.get_columns(table.name, schema=table.schema)
    return [column["name"] for column in columns if column["name"] not in declared and "computed" not in column]


def what_is_lost(columns: Sequence[str]) -> str:
    """A message about the table: the values of *columns* that an undo loses."""
    return _LOST.format(", ".join(sorted(columns)))
