"""Columns and indexes that tables of ours lack, because an older version created them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from sqlalchemy import Column, Index, Inspector, Table
from sqlalchemy.engine import Connection
from sqlalchemy.schema import CreateColumn


class Lacking(NamedTuple):
    """What tables that are there lack. `metadata.create_all` leaves them as they are."""

    columns: list[Column[object]]
    indexes: list[Index]


def lacking(inspector: Inspector, tables: Sequence[Table]) -> Lacking:
    names = [table.name for table in tables]
    columns = {name: found for (_, name), found in inspector.get_multi_columns(filter_names=names).items() if found}
    indexes = {name: found for (_, name), found in inspector.get_multi_indexes(filter_names=names).items()}
    there = [table for table in tables if table.name in columns]
    return Lacking(
        [c for t in there for c in t.columns if c.name not in {found["name"] for found in columns[t.name]}],
        [i for t in there for i in t.indexes if i.name not in {found["name"] for found in indexes.get(t.name, ())}],
    )


def amend(connection: Connection, lacks: Lacking) -> None:
    dialect = connection.dialect
    for column in lacks.columns:
        table = dialect.identifier_preparer.format_table(column.table)
        added = CreateColumn(column).compile(dialect=dialect)
        connection.exec_driver_sql(f"ALTER TABLE {table} ADD COLUMN {added}")
    for index in sorted(lacks.indexes, key=lambda each: str(each.name)):
        index.create(connection)
