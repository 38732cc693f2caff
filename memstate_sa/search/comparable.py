"""The values that the database compares for a criterion: how a column is stored, and the value of a parameter.

A model says how a column should be stored. A collation, an extension or an older migration may have changed that, and
then the database finds other rows than an index filter. So the database itself is asked, once per pool.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, TypeAlias
from weakref import WeakKeyDictionary

from sqlalchemy import (
    BindParameter,
    Boolean,
    Column,
    String,
    Table,
    Text,
    and_,
    bindparam,
    column as sql_column,
    func,
    select,
    table as table_clause,
    text,
    type_coerce,
    types as sqltypes,
)
from sqlalchemy.engine import Connection
from sqlalchemy.pool import Pool
from sqlalchemy.types import TypeEngine

from memstate_sa.db.dialects import POSTGRESQL, SQLITE, database_of
from memstate_sa.db.raw_values import RAW
from memstate_sa.indexes.base import Scalar

Kind: TypeAlias = type[str] | type[int] | type[bool]
"""The way a column is compared: as text by code points, as whole numbers, or as booleans."""

_KINDS: Mapping[type[TypeEngine[Any]], Kind] = {
    **dict.fromkeys((String, Text, sqltypes.Unicode, sqltypes.UnicodeText, sqltypes.VARCHAR, sqltypes.TEXT), str),
    **dict.fromkeys((sqltypes.Integer, sqltypes.SmallInteger, sqltypes.BigInteger), int),
    **dict.fromkeys((sqltypes.INTEGER, sqltypes.SMALLINT, sqltypes.BIGINT), int),
    **dict.fromkeys((Boolean, sqltypes.BOOLEAN), bool),
}
"""The kinds of SQLAlchemy's types. Subclasses are not included, because they may compare in any way."""

_POSTGRESQL_KINDS: Mapping[str, Kind] = {
    **dict.fromkeys(("text", "varchar"), str),
    **dict.fromkeys(("int2", "int4", "int8"), int),
    "bool": bool,
}


class Comparable:
    """Tells how the database of a connection compares the columns of one table."""

    def __init__(self, connection: Connection, table: Table) -> None:
        self._connection = connection
        self._table = table

    def kind(self, column: Column[Any]) -> Kind | None:
        """The kind of *column*, or None if its type in the model or in the database is not known here."""
        kind = _kind_of(column.type, self._connection)
        return kind if kind is not None and kind in self._stored().get(column.name, ()) else None

    def values(self, parameter: BindParameter[Any], kind: Kind) -> list[Scalar] | None:
        """The values that the database gets for *parameter*, or None if one of them is not of *kind*."""
        if _kind_of(parameter.type, self._connection) is not kind:
            return None
        value: Any = parameter.effective_value
        operands = list(value) if parameter.expanding else [value]
        if not all(type(value) is kind for value in operands):
            # The driver may adapt subclasses, an enum for example. Let the database return the values that it gets.
            operands = self._echo(parameter.type, operands)
        if kind is bool and database_of(self._connection).has_dynamic_types:
            operands = [bool(value) if value in (0, 1) else value for value in operands]
        return operands if all(type(value) is kind for value in operands) else None

    def _echo(self, type_: TypeEngine[Any], values: Sequence[Any]) -> list[Any]:
        parameters = (type_coerce(bindparam(None, value, type_=type_, unique=True), RAW) for value in values)
        return list(self._connection.execute(select(*parameters)).one())

    def _stored(self) -> Mapping[str, Sequence[Kind]]:
        tables = _stored_kinds.setdefault(self._connection.engine.pool, {})
        if self._table not in tables:
            read = {POSTGRESQL: _read_postgresql, SQLITE: _read_sqlite}[database_of(self._connection)]
            tables[self._table] = read(self._connection, self._table)
        return tables[self._table]


_stored_kinds: WeakKeyDictionary[Pool, dict[Table, Mapping[str, Sequence[Kind]]]] = WeakKeyDictionary()


def _kind_of(type_: TypeEngine[Any], connection: Connection) -> Kind | None:
    kind = _KINDS.get(type(type_))
    if kind is None or getattr(type_, "collation", None) is not None:
        return None
    # If the model names a variant, the dialect uses another type.
    inner, plain = (one.dialect_impl(connection.dialect) for one in (type_, type(type_)()))
    is_same = type(inner) is type(plain) or _KINDS.get(type(inner)) is kind
    return kind if is_same and getattr(inner, "collation", None) is None else None


_postgresql_columns = text(
    "SELECT a.attname, t.typname FROM pg_catalog.pg_attribute a"
    " JOIN pg_catalog.pg_type t ON t.oid = a.atttypid"
    " LEFT JOIN pg_catalog.pg_collation c ON c.oid = a.attcollation"
    " WHERE a.attrelid = pg_catalog.to_regclass(:table) AND a.attnum > 0 AND NOT a.attisdropped"
    " AND t.typnamespace = 'pg_catalog'::pg_catalog.regnamespace AND coalesce(c.collisdeterministic, true)"
)


def _read_postgresql(connection: Connection, table: Table) -> dict[str, Sequence[Kind]]:
    name = connection.dialect.identifier_preparer.format_table(table).replace("%%", "%")
    rows = connection.execute(_postgresql_columns, {"table": name}).all()
    return {name: (_POSTGRESQL_KINDS[kind],) for name, kind in rows if kind in _POSTGRESQL_KINDS}


def _read_sqlite(connection: Connection, table: Table) -> dict[str, Sequence[Kind]]:
    """The kinds of each column, by its affinity. If the table names any collation, no column compares as text."""
    schema = table.schema or "main"
    column = func.pragma_table_info(table.name, schema).table_valued("name", "type")
    catalog = table_clause("sqlite_master", sql_column("type"), sql_column("name"), sql_column("sql"), schema=schema)
    is_table = and_(catalog.c.type == "table", func.lower(catalog.c.name) == func.lower(table.name))
    statement = select(column.c.name, column.c.type, catalog.c.sql).join_from(column, catalog, is_table)
    rows = connection.execute(statement).all()
    kinds: dict[str, Sequence[Kind]] = {}
    for name, type_name, table_sql in rows:
        upper = type_name.upper()
        if "INT" in upper:
            kinds[name] = (int, bool)
        elif any(word in upper for word in ("CHAR", "CLOB", "TEXT")):
            kinds[name] = () if "COLLATE" in table_sql.upper() else (str,)
        elif "BOOL" in upper or "NUM" in upper or "DEC" in upper:
            kinds[name] = (int, bool)
    return kinds
