"""The SQL that writes a row's image as tagged JSON, and its canonical key. Triggers and `TableLog` use it.

The text is the same as `TableColumns` and `codec` make in Python.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Collection, Mapping, Sequence
from functools import cached_property
from typing import Any, NamedTuple

from sqlalchemy import Column, types as sqltypes
from sqlalchemy.dialects.postgresql import INTERVAL
from sqlalchemy.engine import Dialect
from sqlalchemy.sql.util import ClauseAdapter

from memstate_sa.capture.captured_tables import Capturable, header
from memstate_sa.capture.sql_text import as_sent, literal
from memstate_sa.db import intervals, unreadable_times
from memstate_sa.db.codec import to_json
from memstate_sa.db.dialects import POSTGRESQL, SQLITE
from memstate_sa.db.raw_values import implementation
from memstate_sa.db.rows import TableColumns, logged_columns
from memstate_sa.errors import MemstateError


def _tagged(tag: str, value: str) -> str:
    return f"""'{{"{tag}":"' || {value} || '"}}'"""


def _iso(value: str, format_: str) -> str:
    """SQL for the same text as Python's isoformat(), which writes microseconds only when they are not zero."""
    return (
        f"to_char({value}, '{format_}') || CASE WHEN date_trunc('second', {value}) = {value} THEN '' "
        f"ELSE to_char({value}, '.US') END"
    )


_DATETIME = 'YYYY-MM-DD"T"HH24:MI:SS'
_SECONDS = "(extract(hour FROM {0}) * 3600 + extract(minute FROM {0}) * 60) * 1000000 + extract(microseconds FROM {0})"


def _datetime(type_: Any, value: str) -> str:
    if not type_.timezone:
        return _tagged("$datetime", _iso(value, _DATETIME))
    utc = _iso(f"timezone('UTC', {value})", _DATETIME)
    return _tagged("$datetime", f"{utc} || '+00:00'")


def _uuid(type_: Any, value: str) -> str:
    if not type_.native_uuid:  # CHAR(32)
        return f"to_json({value})::text"
    return _tagged("$uuid", f"replace({value}::text, '-', '')")


def _interval(_: Any, value: str) -> str:
    days, micros = f"extract(day FROM {value})", _SECONDS.format(value)
    image = f"""'{{"$timedelta":[' || ({days})::bigint || ',0,' || ({micros})::bigint || ']}}'"""
    return f"CASE WHEN {intervals.is_timedelta(value)} THEN {image} ELSE to_json({intervals.as_text(value)})::text END"


_POSTGRESQL: Mapping[type, Callable[[Any, str], str]] = {
    sqltypes.Boolean: lambda _, value: f"{value}::text",
    sqltypes.Integer: lambda _, value: f"{value}::text",
    # Float comes before Numeric, its base class in SQLAlchemy 2.0.
    sqltypes.Float: lambda _, value: _tagged("$float", f"{value}::text"),
    sqltypes.Numeric: lambda _, value: _tagged("$decimal", f"{value}::text"),
    sqltypes.String: lambda _, value: f"to_json({value})::text",
    sqltypes.Uuid: _uuid,
    sqltypes.LargeBinary: lambda _, value: _tagged("$bytes", f"encode({value}, 'hex')"),
    sqltypes.DateTime: _datetime,
    sqltypes.Date: lambda _, value: _tagged("$date", f"to_char({value}, 'YYYY-MM-DD')"),
    sqltypes.Time: lambda type_, value: _tagged(
        "$time", f"{value}::text" if type_.timezone else _iso(f"{value}::interval", "HH24:MI:SS")
    ),
    sqltypes.Interval: _interval,
    INTERVAL: _interval,
}
_STORED_AS: Mapping[type, Collection[str]] = {
    sqltypes.Boolean: {"bool"},
    sqltypes.Integer: {"int2", "int4", "int8"},
    sqltypes.Float: {"float4", "float8"},
    sqltypes.Numeric: {"numeric"},
    sqltypes.String: {"varchar", "text", "bpchar", "citext", "name"},
    sqltypes.LargeBinary: {"bytea"},
    sqltypes.Date: {"date"},
    sqltypes.Interval: {"interval"},
    INTERVAL: {"interval"},
}


def stored_as(type_: Any) -> Collection[str]:
    """The names of the PostgreSQL types for which the SQL of *type_* works. Empty when it works for all.

    A column may have another type in the database than in the model, for example when a migration is missing.
    """
    if isinstance(type_, (sqltypes.DateTime, sqltypes.Time)):
        name = "timestamp" if isinstance(type_, sqltypes.DateTime) else "time"
        return {f"{name}tz" if type_.timezone else name}
    if isinstance(type_, sqltypes.Uuid):
        return {"uuid"} if type_.native_uuid else _STORED_AS[sqltypes.String]
    if isinstance(type_, sqltypes.Enum) and type_.native_enum:
        return ()
    return next((names for kind, names in _STORED_AS.items() if isinstance(type_, kind)), ())


_ITEMS = (sqltypes.Boolean, sqltypes.Integer, sqltypes.String)
_KEYS = (
    sqltypes.Boolean,
    sqltypes.Integer,
    sqltypes.Numeric,
    sqltypes.String,
    sqltypes.Uuid,
    sqltypes.LargeBinary,
    sqltypes.DateTime,
    sqltypes.Date,
    sqltypes.Time,
)


def _json_postgresql(columns: TableColumns, column: Column[Any], value: str) -> str:
    type_ = columns.implementation(column)
    if columns.travels_as_text(column):
        return f"to_json({value}::text)::text"
    if isinstance(type_, sqltypes.ARRAY):
        if isinstance(implementation(type_.item_type, columns.dialect), _ITEMS):
            return f"to_jsonb({value})::text"
    else:
        for kind, write in _POSTGRESQL.items():
            if isinstance(type_, kind):
                image = write(type_, value)
                if not isinstance(type_, unreadable_times.KINDS):
                    return image
                condition, as_text = unreadable_times.is_readable(type_, value), unreadable_times.as_text(type_, value)
                return f"CASE WHEN {condition} THEN {image} ELSE to_json({as_text})::text END"
    raise MemstateError(
        f"Cannot capture {column.table.name}.{column.name} by triggers: they cannot write a {column.type!r}. Exclude "
        "the column, or track the class with capture='session'."
    )


def _json_sqlite(_: TableColumns, __: Column[Any], value: str) -> str:
    """SQL for a value by its storage class, because a column's type does not determine it."""
    text_with_nul = _tagged("$text", f"lower(hex(CAST({value} AS BLOB)))")
    images = {
        "integer": f"CAST({value} AS TEXT)",
        "real": _tagged("$float", f"quote({value})"),
        "blob": _tagged("$bytes", f"lower(hex({value}))"),
        "text": f"CASE WHEN instr({value}, char(0)) THEN {text_with_nul} ELSE json_quote({value}) END",
    }
    cases = " ".join(f"WHEN '{kind}' THEN {image}" for kind, image in images.items())
    return f"CASE typeof({value}) {cases} END"


_JSON = {POSTGRESQL: _json_postgresql, SQLITE: _json_sqlite}
_TRUE = {POSTGRESQL: "true", SQLITE: "1"}


_COMMA = " || ',' || "
_PARTS = 250


def _concatenated(parts: Sequence[str]) -> str:
    """*parts* with commas between them, as a tree: SQLite allows at most 1000 levels in an expression."""
    if len(parts) <= _PARTS:
        return _COMMA.join(parts)
    middle = len(parts) // 2
    return f"({_concatenated(parts[:middle])}){_COMMA}({_concatenated(parts[middle:])})"


class RowImage(NamedTuple):
    """SQL expressions for one row in a trigger."""

    key: str
    image: str
    criterion: str


class TableWriter:
    """Writes the SQL of one table's triggers."""

    def __init__(self, captured: Capturable, dialect: Dialect) -> None:
        self.captured = captured
        self.dialect = dialect
        self.entity = literal(captured.entity)
        self.keys = list(captured.table.primary_key.columns)
        self._columns = TableColumns(captured.table, dialect)
        for column in self.keys:
            self._require_key(column)

    @property
    def logged_columns(self) -> list[Column[Any]]:
        return logged_columns(self.captured.table, self.captured.excluded)

    @cached_property
    def header(self) -> str:
        return header(self.captured, self.dialect)

    @property
    def table(self) -> str:
        return as_sent(self.dialect.identifier_preparer.format_table(self.captured.table), self.dialect)

    def name(self, *moment: str) -> str:
        """The name of the trigger of this *moment*."""
        return f"memstate_{'_'.join(moment)}_{self.digest}"

    @property
    def digest(self) -> str:
        named = f"{self.captured.table.fullname} {self.captured.entity}"
        return hashlib.sha256(named.encode()).hexdigest()[:16]

    def quote(self, name: str) -> str:
        """*name* as an identifier."""
        return as_sent(self.dialect.identifier_preparer.quote(name), self.dialect)

    def row(self, alias: str, *, old: bool = False) -> RowImage:
        """The expressions for the row *alias*. *old*: the row is in a transition table, without virtual columns."""
        criterion = _TRUE[self._columns.database]
        if self.captured.criterion is not None:
            adapted = ClauseAdapter(self.captured.table.alias(alias)).traverse(self.captured.criterion)
            compiled = adapted.compile(dialect=self.dialect, compile_kwargs={"literal_binds": True})
            criterion = as_sent(str(compiled), self.dialect)
        return RowImage(self.key(alias), f"'{{' || {self.fields(alias, old=old)} || '}}'", criterion)

    def key(self, alias: str) -> str:
        """The canonical key of the row *alias*."""
        key = _COMMA.join(f"coalesce({self._json(alias, column)}, 'null')" for column in self.keys)
        return f"'[' || {key} || ']'"

    def fields(self, alias: str, *, prefix: str = "", old: bool = False) -> str:
        """SQL for the members of the image as a JSON object. Each name begins with *prefix*."""
        return _concatenated(
            [
                f"{literal(to_json(prefix + column.name) + ':')} || coalesce({self._json(alias, column)}, 'null')"
                for column in self.logged_columns
                if not (old and column.computed is not None and not column.computed.persisted)
            ]
        )

    def _json(self, alias: str, column: Column[Any]) -> str:
        row = alias if alias in ("NEW", "OLD") else self.quote(alias)
        return _JSON[self._columns.database](self._columns, column, f"{row}.{self.quote(column.name)}")

    def _require_key(self, column: Column[Any]) -> None:
        """Refuse a key column whose text in SQL may differ from the text in Python."""
        kind = self._columns.implementation(column)
        good, is_typed = isinstance(kind, _KEYS), not self._columns.database.has_dynamic_types
        if isinstance(kind, sqltypes.Float):
            good = False
        elif isinstance(kind, sqltypes.Numeric):  # SQLite keeps a float, which Python may write as 1E-7
            good = is_typed and kind.scale is not None and kind.scale <= 6
        elif isinstance(kind, sqltypes.Time):
            good = not kind.timezone
        elif isinstance(kind, sqltypes.String):  # on SQLite, other collations may equate keys
            good = is_typed or kind.collation in (None, "BINARY")
        if not good:
            raise MemstateError(
                f"Cannot capture {column.table.name} by triggers: they cannot log a primary key of {column.type!r} "
                f"({column.name}). Track the class with capture='session'."
            )
