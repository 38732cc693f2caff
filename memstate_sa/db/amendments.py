"""Upgrades of our tables from an older version: their current names, and missing columns and indexes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from sqlalchemy import Column, Index, Inspector, Table
from sqlalchemy.engine import Connection
from sqlalchemy.schema import CreateColumn

from memstate_sa.db.tables import trigger_context

RENAMED = {"memstate_current": trigger_context}
"""Tables by their names in older versions."""


class Lacking(NamedTuple):
    """The missing parts of existing tables. `metadata.create_all` does not add them."""

    columns: list[Column[object]]
    indexes: list[Index]


def lacking(inspector: Inspector, tables: Sequence[Table]) -> Lacking:
    names = [table.name for table in tables]
    columns = {name: parts for (_, name), parts in inspector.get_multi_columns(filter_names=names).items() if parts}
    indexes = {name: parts for (_, name), parts in inspector.get_multi_indexes(filter_names=names).items()}
    existing = [table for table in tables if table.name in columns]
    return Lacking(
        [c for t in existing for c in t.columns if c.name not in {part["name"] for part in columns[t.name]}],
        [i for t in existing for i in t.indexes if i.name not in {part["name"] for part in indexes.get(t.name, ())}],
    )


def amend(connection: Connection, lacks: Lacking) -> None:
    dialect = connection.dialect
    for column in lacks.columns:
        table = dialect.identifier_preparer.format_table(column.table)
        added = CreateColumn(column).compile(dialect=dialect)
        connection.exec_driver_sql(f"ALTER TABLE {table} ADD COLUMN {added}")
    for index in sorted(lacks.indexes, key=lambda index: str(index.name)):
        index.create(connection)


def old_names(names: Sequence[str], tables: Sequence[Table]) -> list[str]:
    """The *names* under which an older version created one of *tables*."""
    return [name for name, table in RENAMED.items() if name in names and table in tables]
