"""How the rows of one table are read into images and written back, bypassing every user-defined type.

Values are what the driver reads: capture then runs no application code, and nothing is lost to a type whose two
directions disagree (Numeric on SQLite, a normalising TypeDecorator). PostgreSQL types outside the generic ones, and
JSON, whose SQL NULL and 'null' the driver cannot tell apart, travel as the server's own text form.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from functools import cached_property
from typing import Any, TypeAlias

from sqlalchemy import (
    JSON,
    BigInteger,
    Column,
    ColumnElement,
    Enum,
    Float,
    ForeignKeyConstraint,
    Interval,
    LargeBinary,
    Numeric,
    Select,
    String,
    Table,
    Text,
    Uuid,
    and_,
    any_,
    bindparam,
    cast,
    literal_column,
    or_,
    select,
    tuple_,
    type_coerce,
)
from sqlalchemy import types as sqltypes
from sqlalchemy.dialects.postgresql import INTERVAL
from sqlalchemy.engine import Connection, Dialect
from sqlalchemy.exc import DataError
from sqlalchemy.sql.elements import BindParameter
from sqlalchemy.types import TypeEngine

from memstate_sa.db import intervals, unreadable_times
from memstate_sa.db.codec import decode, decoded, differ, encode_image, encode_key
from memstate_sa.db.dialects import database_of
from memstate_sa.db.key_values import DoesNotFit, fitted, is_int64, is_read_by_database, tolerate_refusal, types_of
from memstate_sa.db.raw_values import RAW, hashable, implementation
from memstate_sa.db.rows_in import rows_are, rows_in
from memstate_sa.db.statements import batches
from memstate_sa.errors import MemstateError

MAX_KEY_CHARS = 2000
"""A B-tree entry on PostgreSQL holds about 2,700 bytes, entity and ids included."""


_PLAIN = (
    sqltypes.Integer,
    Numeric,
    Float,  # no subclass of Numeric in SQLAlchemy 2.1
    String,
    sqltypes.Date,
    sqltypes.DateTime,
    sqltypes.Time,
    sqltypes.Boolean,
    LargeBinary,
    Enum,
    Interval,
    INTERVAL,
    Uuid,
)


def stored_columns(table: Table) -> list[Column[Any]]:
    """Without PostgreSQL's own (xmin), which every table has by itself, and nobody can write."""
    return [column for column in table.columns if not column.system]


def logged_columns(table: Table, excluded: Collection[str]) -> list[Column[Any]]:
    """Those that an image holds: `stored_columns` without the names that are *excluded*."""
    return [column for column in stored_columns(table) if column.name not in excluded]


def columns_of(fk: ForeignKeyConstraint) -> tuple[list[Column[Any]], list[Column[Any]]]:
    """Those that refer, and those that they refer to."""
    return [element.parent for element in fk.elements], [element.column for element in fk.elements]


def values_of(image: Mapping[str, Any] | None, columns: Iterable[Column[Any]]) -> tuple[Any, ...] | None:
    """What *image* has in *columns*; None: nothing that equals anything, or that refers to anything."""
    values = (None,) if image is None else tuple(hashable(decode(image.get(column.name))) for column in columns)
    return None if None in values else values


Refusals: TypeAlias = tuple[type[Exception], ...]
REFUSALS: Refusals = (TypeError, ValueError, AttributeError, LookupError)
"""The errors by which a type says that it does not take a value."""


def _unless_refused(process: Callable[[Any], Any], value: Any, refusals: Refusals = REFUSALS) -> Any:
    """What *process* makes of *value*; the value as it is, where the type does not take it."""
    try:
        return process(value)
    except refusals:
        return value


def _listed(value: Any) -> Any:
    """What `hashable` was made from."""
    return list(map(_listed, value)) if isinstance(value, tuple) else value


class TableColumns:
    """Statements and conversions for one table on one dialect."""

    def __init__(self, table: Table, dialect: Dialect, excluded: Collection[str] = ()) -> None:
        self.table = table
        self.dialect = dialect
        self.database = database_of(dialect)
        self.by_name = {column.name: column for column in logged_columns(table, excluded)}  # table.c is by key
        self.names = tuple(self.by_name)
        self.key_names = tuple(column.name for column in table.primary_key.columns)
        self._key_positions = [self.names.index(name) for name in self.key_names]
        self._impl = {column.name: implementation(column.type, dialect) for column in table.columns}
        self._to_python = {column.name: self._result_processor(column) for column in table.columns}
        self._key_binds = [
            column.type.dialect_impl(dialect).bind_processor(dialect) for column in table.primary_key.columns
        ]
        self._key_is_raw = not any(self._key_binds)
        self._key_is_read_raw = self._key_is_raw and not any(map(self.travels_as_text, table.primary_key.columns))

    @property
    def of_table(self) -> Mapping[Table, TableColumns]:
        """Those of each of the tables that make up a row."""
        return {self.table: self}

    def parts(self, image: Mapping[str, Any] | None) -> dict[Table, Mapping[str, Any] | None]:
        """What *image* says of each of the tables: None where there is no row."""
        return {self.table: image}

    def differ(self, one: Mapping[str, Any] | None, other: Mapping[str, Any] | None) -> bool:
        """Whether two images say that a row, in any of its tables, is another one."""
        parts, other_parts = self.parts(one), self.parts(other)
        return any(differ(parts[table], other_parts[table]) for table in parts)

    def implementation(self, column: Column[Any]) -> TypeEngine[Any]:
        """The dialect's type of *column*, below any TypeDecorator."""
        return self._impl[column.name]

    # -- expressions ---------------------------------------------------------------------------------------------

    def travels_as_text(self, column: Column[Any]) -> bool:
        """Whether *column* is read in the server's own text form."""
        if self.database.has_dynamic_types:
            return False
        impl = self._impl[column.name]
        if isinstance(impl, sqltypes.ARRAY):
            impl = implementation(impl.item_type, self.dialect)
            if isinstance(impl, Enum) and impl.native_enum:
                return True  # drivers differ: psycopg does not take an array of them apart
        return isinstance(impl, JSON) or not isinstance(impl, _PLAIN)

    def _is_interval(self, column: Column[Any]) -> bool:
        """Whether *column* has more than a timedelta, which is all that a key is looked up by."""
        is_left_out = column.primary_key or self.database.has_dynamic_types
        return not is_left_out and isinstance(self._impl[column.name], intervals.KINDS)

    def raw(self, column: Column[Any]) -> ColumnElement[Any]:
        """*column* as the driver reads it, for a SELECT."""
        if self._is_interval(column):
            text: ColumnElement[str] = literal_column(intervals.as_text(self._qualified(column.name)))
            return type_coerce(text, intervals.RawInterval()).label(column.name)
        if self.travels_as_text(column):
            return type_coerce(cast(column, Text), RAW).label(column.name)
        return type_coerce(column, RAW).label(column.name)  # as it is stored, whatever expression reads it

    def raw_bind(self, column: Column[Any], value: Any) -> ColumnElement[Any]:
        """A driver value for an INSERT or UPDATE of *column*."""
        return self._as_stored(column, bindparam(None, value, type_=self._bind_type(column), unique=True))

    def raw_parameter(self, column: Column[Any], name: str) -> ColumnElement[Any]:
        """The same, as the parameter *name* of many executions."""
        return self._as_stored(column, bindparam(name, type_=self._bind_type(column)))

    def _bind_type(self, column: Column[Any]) -> TypeEngine[Any]:
        return intervals.RawInterval() if self._is_interval(column) else RAW

    def _as_stored(self, column: Column[Any], value: BindParameter[Any]) -> ColumnElement[Any]:
        if self.database.has_dynamic_types:
            return value
        # Of a parameter that is a range, for example, asyncpg takes no text.
        is_text = self.travels_as_text(column) or self._is_interval(column)
        return cast(cast(value, Text) if is_text else value, column.type)

    def find(
        self, connection: Connection, columns: Sequence[Column[Any]], values: Sequence[tuple[Any, ...]]
    ) -> list[tuple[str, tuple[Any, ...]]]:
        """The keys of the rows that have one of *values* (driver-level) in *columns*, and which."""
        selected = [*self.table.primary_key.columns, *columns]
        statement: Select[Any] = select(*(self.raw(column).label(f"n{n}") for n, column in enumerate(selected)))
        pairs = []
        for batch in batches(list(dict.fromkeys(values))):
            rows = connection.execute(statement.where(self._having(columns, batch))).all()
            width = len(self.key_names)
            pairs += [(self.encode_key(row[:width]), hashable(row[width:])) for row in rows]
        return pairs

    def _having(self, columns: Sequence[Column[Any]], values: Sequence[tuple[Any, ...]]) -> ColumnElement[bool]:
        """One of *values* in *columns*."""
        if not any(isinstance(self._impl[column.name], sqltypes.ARRAY) for column in columns):
            parameter: BindParameter[Any] = bindparam("values", list(values), expanding=True)
            return tuple_(*(type_coerce(column, RAW) for column in columns)).in_(parameter)
        # What an array is of, PostgreSQL knows of a parameter by itself, not of one in a row.
        rows = [zip(columns, map(_listed, value), strict=True) for value in values]
        return or_(*(and_(*(column == self.raw_bind(column, item) for column, item in row)) for row in rows))

    @cached_property
    def key_in(self) -> ColumnElement[bool]:
        """``key IN (:keys)`` for the parameter `key_parameters` makes."""
        keys: BindParameter[Any] = bindparam("keys", expanding=True, type_=RAW)
        columns = list(self.table.primary_key.columns)
        if len(columns) == 1:
            kind = implementation(columns[0].type, self.dialect)
            is_plain = isinstance(kind, (sqltypes.Integer, sqltypes.String)) and not isinstance(kind, sqltypes.Enum)
            if is_plain and self.database.has_arrays:
                # One parameter, one text: a thousand of them cost more to send than to look up. Of the widest type:
                # a column of fewer bits has no row for a key that does not fit.
                kind = BigInteger() if isinstance(kind, sqltypes.Integer) else kind
                return type_coerce(columns[0], kind) == any_(bindparam("keys", type_=sqltypes.ARRAY(kind)))
            return type_coerce(columns[0], RAW).in_(keys)
        keys = bindparam("keys", expanding=True)
        row = tuple_(*(type_coerce(column, RAW) for column in columns))
        return rows_are(row, keys) if any(column.nullable for column in columns) else rows_in(row, keys)

    def key_parameters(self, keys: Iterable[Sequence[Any]]) -> dict[str, list[Any]]:
        if len(self.key_names) == 1:
            return {"keys": [key[0] for key in keys]}
        return {"keys": [tuple(key) for key in keys]}

    @cached_property
    def _key_types(self) -> list[frozenset[type]]:
        return [types_of(self._impl[name], self.database) for name in self.key_names]

    @cached_property
    def _is_read_by_database(self) -> bool:
        return any(is_read_by_database(self._impl[name], self.database) for name in self.key_names)

    def driver_key(self, key: str) -> tuple[Any, ...] | None:
        """The values of a canonical *key* as the driver takes them; None when no row can have this key."""
        values = decoded(key)
        if values is None or len(values) != len(self._key_types):
            return None
        if len(values) == 1 and type(values[0]) is int and int in self._key_types[0]:
            return values if is_int64(values[0]) else None  # as most keys are: a page has a thousand of them
        try:
            return tuple(map(fitted, values, self._key_types))
        except (DoesNotFit, ArithmeticError):
            return None

    def possible(self, connection: Connection, keys: Iterable[str]) -> dict[str, tuple[Any, ...]]:
        """Those of *keys* that a row may have, with their values as the driver takes them.

        The database is asked where only it can tell.
        """
        readable = {key: values for key in keys if (values := self.driver_key(key)) is not None}
        return self._accepted(connection, readable) if readable and self._is_read_by_database else readable

    def _accepted(self, connection: Connection, keys: dict[str, tuple[Any, ...]]) -> dict[str, tuple[Any, ...]]:
        """Those of *keys* that the database does not refuse, found by halving."""
        statement: Select[Any] = select(literal_column("1")).select_from(self.table).where(self.key_in).limit(1)
        try:
            with tolerate_refusal(connection):
                connection.execute(statement, self.key_parameters(keys.values()))
        except DataError:
            names = list(keys)
            middle = len(names) // 2
            parts = (names[:middle], names[middle:]) if middle else ()
            accepted: dict[str, tuple[Any, ...]] = {}
            for part in parts:
                accepted |= self._accepted(connection, {key: keys[key] for key in part})
            return accepted
        return keys

    @cached_property
    def _rows_by_key(self) -> Select[Any]:
        return select(*(self.raw(column) for column in self.by_name.values())).where(self.key_in)

    # -- rows ------------------------------------------------------------------------------------------------------

    def read(
        self,
        connection: Connection,
        keys: Sequence[Sequence[Any]],
        *,
        for_update: bool = False,
        skip_locked: bool = False,
        where: ColumnElement[bool] | None = None,
    ) -> dict[str, dict[str, Any]]:
        """The images of the rows with these (driver-level) *keys*, by canonical key; absent rows are left out.

        *skip_locked*: so are, with *for_update*, those that another transaction holds.
        """
        statement = self._rows_by_key if where is None else self._rows_by_key.where(where)
        if for_update:
            statement = statement.order_by(*self._key_order)
            statement = statement.with_for_update(key_share=True, skip_locked=skip_locked)
        images: dict[str, dict[str, Any]] = {}
        for batch in batches(keys):
            rows = self._fetch(connection, statement, self.key_parameters(batch))
            try:
                images.update({self.key_of(row): encode_image(self.names, row) for row in rows})
            except TypeError as error:
                raise MemstateError(f"{self.table.fullname}: {error}") from error
        return images

    def _fetch(self, connection: Connection, statement: Select[Any], parameters: Mapping[str, Any]) -> Sequence[Any]:
        """The rows of *statement*, which selects every column; with texts for times that the driver refuses to read."""
        try:
            return connection.execute(statement, parameters).all()  # iterated, it is a fetch a row
        except DataError as error:
            is_of_the_server = getattr(error.orig, "sqlstate", None) is not None
            times = self._times_as_text
            if is_of_the_server or not times:
                raise
        columns = [times.get(name, self.raw(column)) for name, column in self.by_name.items()]
        rows = connection.execute(statement.with_only_columns(*columns), parameters).all()
        impls = [self._impl[name] if name in times else None for name in self.by_name]
        return [
            [
                value if impl is None else unreadable_times.read(impl, value)
                for impl, value in zip(impls, row, strict=True)
            ]
            for row in rows
        ]

    @cached_property
    def _times_as_text(self) -> dict[str, ColumnElement[Any]]:
        if self.database.has_dynamic_types:
            return {}
        times = {name: impl for name, impl in self._impl.items() if isinstance(impl, unreadable_times.KINDS)}
        return {
            name: type_coerce(literal_column(unreadable_times.as_text(impl, self._qualified(name))), RAW).label(name)
            for name, impl in times.items()
        }

    def _qualified(self, name: str) -> str:
        """A column's name in SQL, as `literal_column` takes it."""
        prepare = self.dialect.identifier_preparer
        return f"{prepare.format_table(self.table)}.{prepare.quote(name)}".replace("%%", "%")

    def find_rows(
        self, connection: Connection, keys: Iterable[str], *, for_update: bool = False
    ) -> dict[str, dict[str, Any]]:
        """The images of the rows with these canonical *keys*; a key that no row can have is left out."""
        return self.read(connection, list(self.possible(connection, keys).values()), for_update=for_update)

    def lock(
        self,
        connection: Connection,
        keys: Sequence[Sequence[Any]],
        *,
        leaving: bool = False,
        skip_locked: bool = False,
    ) -> set[str]:
        """Hold the rows of *keys* until the transaction ends: whoever changes another part of them waits.

        Returns the canonical keys of the rows that it holds. (The one writer of SQLite holds those that it is given.)

        *leaving*: so does whoever writes a row that refers to them. They can go then without taking along, by ON DELETE
        CASCADE, a row that nobody saw: look for what refers to them afterwards.
        """
        if self.database.has_one_writer:
            return set(map(self.encode_key, keys))
        names = map(self.raw, self.table.primary_key.columns)
        statement: Select[Any] = select(*names).where(self.key_in).order_by(*self._key_order)
        statement = statement.with_for_update(key_share=not leaving, skip_locked=skip_locked)
        parameters = map(self.key_parameters, batches(keys))
        return {self.encode_key(row) for each in parameters for row in connection.execute(statement, each).all()}

    @cached_property
    def _key_order(self) -> list[ColumnElement[Any]]:
        """The order in which rows are locked: that of the unit of work, which sorts keys in Python.

        Two sessions that lock the same rows in two orders wait for each other. A collation has another order.
        """
        columns: list[Any] = list(self.table.primary_key.columns)
        if self.database.has_one_writer:
            return columns
        return [cast(c, Text).collate("C") if isinstance(self._impl[c.name], String) else c for c in columns]

    def key_of(self, row: Sequence[Any]) -> str:
        """The canonical key of a row selected with `raw` for every column."""
        return self.encode_key([row[position] for position in self._key_positions])

    def encode_key(self, values: Sequence[Any]) -> str:
        key = encode_key(values)
        if len(key) > MAX_KEY_CHARS:
            raise MemstateError(
                f"a primary key of {self.table.fullname} takes {len(key)} characters; at most {MAX_KEY_CHARS} can be "
                "tracked"
            )
        return key

    # -- conversions -----------------------------------------------------------------------------------------------

    def raw_key(self, identity: Sequence[Any]) -> tuple[Any, ...]:
        """Driver-level key values of an ORM *identity*."""
        if self._key_is_raw:
            return tuple(identity)
        return tuple(
            value if bind is None else bind(value) for bind, value in zip(self._key_binds, identity, strict=True)
        )

    def canonical(self, key: Any) -> str:
        """The canonical key of a primary key as the ORM has it: one value, or a tuple."""
        identity = key if isinstance(key, tuple) else (key,)
        if len(identity) != len(self.key_names):
            raise MemstateError(f"key={key!r}: {self.table.fullname} is keyed by {', '.join(self.key_names)}")
        binds = zip(self._key_binds, identity, strict=True)
        # The log may know a key that is not of today's type.
        return self.canonical_raw([v if bind is None else _unless_refused(bind, v) for bind, v in binds])

    def canonical_raw(self, key: Sequence[Any]) -> str:
        """The canonical key of `raw_key`, as far as Python can tell: the database may hold another form of it."""
        if self._key_is_read_raw:
            return self.encode_key(key)
        return self.encode_key(list(map(self._as_read, self.table.primary_key.columns, key)))

    def _as_read(self, column: Column[Any], value: Any) -> Any:
        """What the driver reads, of what it is given: psycopg wraps bytes, and an address is read as text."""
        value = getattr(value, "obj", value)
        return str(value) if self.travels_as_text(column) and value is not None else value

    def identity(self, key: str) -> tuple[Any, ...]:
        """The ORM identity of a canonical *key*; one that no row can have stays as it is written."""
        values = self.driver_key(key)
        if values is None:
            return decoded(key) or (key,)
        return tuple(self.to_python(name, value) for name, value in zip(self.key_names, values, strict=True))

    def to_python(self, name: str, value: Any, refusals: Refusals = REFUSALS) -> Any:
        """*value* as the ORM would load it; one that the type of today refuses stays as it is stored."""
        process = self._to_python.get(name)
        return value if process is None else _unless_refused(process, value, refusals)

    def to_raw(self, name: str, value: Any) -> Any:
        """What the driver is given for a value as the ORM takes it; one that is the driver's already stays as it is."""
        column = self.by_name.get(name)
        bind = None if column is None else column.type.dialect_impl(self.dialect).bind_processor(self.dialect)
        if bind is None:
            return value
        raw = _unless_refused(bind, value)
        inner = getattr(raw, "obj", raw)  # psycopg wraps what it is given of some types, and reads it bare
        if inner is not raw and isinstance(self._impl[name], JSON):
            return (getattr(self.dialect, "_json_serializer", None) or json.dumps)(inner)
        return inner

    def values(self, image: dict[str, Any], refusals: Refusals = REFUSALS) -> dict[str, Any]:
        """An image's values as the ORM would load them; columns that are no longer there keep their stored form."""
        names = [name for name in self.names if name in image]  # JSONB does not keep the order
        names += [name for name in image if name not in self._impl]
        return {name: self.to_python(name, decode(image[name]), refusals) for name in names}

    def past_values(self, image: dict[str, Any]) -> dict[str, Any]:
        """The same of an old row, at which a type may raise any error: its encryption may have lost a key."""
        return self.values(image, (Exception,))

    def _result_processor(self, column: Column[Any]) -> Callable[[Any], Any] | None:
        impl = self._impl[column.name]
        # psycopg's numeric processors choose by the OID of the column: numeric (1700) or float8 (701).
        oid = 701 if isinstance(impl, Float) else 1700
        process = column.type.dialect_impl(self.dialect).result_processor(self.dialect, oid)
        if isinstance(impl, JSON) and self.travels_as_text(column):
            # The driver would have parsed it, so the type's own processor expects it parsed.
            loads = getattr(self.dialect, "_json_deserializer", None) or json.loads

            def parse(value: Any) -> Any:
                parsed = None if value is None else loads(value)
                return parsed if process is None else process(parsed)

            return parse
        if self._is_interval(column):
            return intervals.as_timedelta if process is None else lambda value: process(intervals.as_timedelta(value))
        is_enum_array = isinstance(impl, sqltypes.ARRAY) and isinstance(impl.item_type, Enum)  # reads the text
        return process if is_enum_array or not self.travels_as_text(column) else None
