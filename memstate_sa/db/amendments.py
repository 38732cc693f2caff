"""Tables of ours that an older version created: they get the name of today, and the columns and indexes they lack."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from sqlalchemy import Column, Index, Inspector, Table, inspect, text
from sqlalchemy.engine import Connection
from sqlalchemy.schema import CreateColumn

from memstate_sa.db.tables import trigger_context

RENAMED = {"memstate_current": trigger_context}
"""Tables by the names that they had in older versions."""


class Lacking(NamedTuple):
    """What tables that are there lack. `metadata.create_all` leaves them as they are."""

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
    for index in sorted(lacks.indexes, key=lambda each: str(each.name)):
        index.create(connection)


def old_names(names: Sequence[str], tables: Sequence[Table]) -> list[str]:
    """Those of *names* under which an older version created one of *tables*."""
    return [name for name, table in RENAMED.items() if name in names and table in tables]


def rename(connection: Connection, old_name: str) -> None:
    """Give a table the name of today. It keeps its rows, and triggers that name it follow."""
    table = RENAMED[old_name]
    if connection.dialect.name == "postgresql":
        _rename_on_postgresql(connection, old_name, table)
    else:
        _rename_on_sqlite(connection, old_name, table)


# Triggers are in the schema of our tables, of which a database may have several. A function keeps its owner, its rights
# and its settings.
_RENAME_IN_FUNCTIONS = """DO $memstate_do$
DECLARE
  f record;
  ours oid := (SELECT relnamespace FROM pg_catalog.pg_class WHERE oid = CAST('{new}' AS regclass));
  path text := pg_catalog.current_setting('search_path');
BEGIN
  PERFORM pg_catalog.set_config('search_path', 'pg_catalog, pg_temp', true);
  FOR f IN
    SELECT pg_get_functiondef(p.oid) AS source FROM pg_proc AS p
    WHERE p.pronamespace = ours AND p.proname LIKE 'memstate\\_%' AND p.prorettype = 'trigger'::regtype
      AND position('.{old} ' IN p.prosrc) > 0
  LOOP
    EXECUTE replace(f.source, '.{old} ', '.{new} ');
  END LOOP;
  PERFORM pg_catalog.set_config('search_path', path, true);
END
$memstate_do$"""


def _rename_on_postgresql(connection: Connection, old: str, table: Table) -> None:
    new = str(table.name)
    if inspect(connection).has_table(new):
        statements = [f"DROP TABLE {old}"]
    else:  # it keeps its rights
        constraint = f"ALTER TABLE {new} RENAME CONSTRAINT pk_{old} TO pk_{new}"
        statements = [f"ALTER TABLE {old} RENAME TO {new}", constraint]
    for statement in (*statements, _RENAME_IN_FUNCTIONS.format(old=old, new=new)):
        connection.exec_driver_sql(statement, execution_options={"no_parameters": True})


_naming = text("SELECT name, sql FROM sqlite_master WHERE type = 'trigger' AND instr(sql, :old)")


def _rename_on_sqlite(connection: Connection, old: str, table: Table) -> None:
    """Copy the rows: SQLite cannot rename a constraint, and would write another name into triggers."""
    new = str(table.name)
    table.create(connection, checkfirst=True)
    names = ", ".join(column.name for column in table.columns)
    connection.exec_driver_sql(f"INSERT OR IGNORE INTO {new} ({names}) SELECT {names} FROM {old}")
    quote = connection.dialect.identifier_preparer.quote
    for name, source in connection.execute(_naming, {"old": old}).all():
        connection.exec_driver_sql(f"DROP TRIGGER {quote(name)}")
        connection.exec_driver_sql(source.replace(old, new), execution_options={"no_parameters": True})
    connection.exec_driver_sql(f"DROP TABLE {old}")
