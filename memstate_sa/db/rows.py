"""The rows of one table: they are read into images and written back without any user-defined type.

Images have driver-level values, for two reasons:

1. Capture then runs no application code.
2. Some types do not return the value that was stored: Numeric on SQLite, or a TypeDecorator that normalises.
   Driver-level values are exact.

Two kinds of values travel as the server's own text: PostgreSQL types without a generic SQLAlchemy type, and JSON, where
the driver cannot tell SQL NULL from 'null'.
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
    types as sqltypes,
)
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
"""The longest key. A B-tree entry on PostgreSQL holds about 2,700 bytes, entity and ids included."""


_PLAIN = (
    sqltypes.Integer,
    Numeric,
    Float,  # SQLAlchemy 2.1: Float is no Numeric
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
    """The columns of *table*, without PostgreSQL's system columns such as xmin, which cannot be written."""
    return [column for column in table.columns if not column.system]


def logged_columns(table: Table, excluded: Collection[str]) -> list[Column[Any]]:
    """The columns of an image: `stored_columns` without the *excluded* names."""
    return [column for column in stored_columns(table) if column.name not in excluded]


def columns_of(fk: ForeignKeyConstraint) -> tuple[list[Column[Any]], list[Column[Any]]]:
    """The referring columns of *fk*, and the columns that they refer to."""
    return [element.parent for element in fk.elements], [element.column for element in fk.elements]


def values_of(image: Mapping[str, Any] | None, columns: Iterable[Column[Any]]) -> tuple[Any, ...] | None:
    """The values of *image* in *columns*. None if one is NULL, because NULL equals nothing."""
    values = (None,) if image is None else tuple(hashable(decode(image.get(column.name))) for column in columns)
    return None if None in values else values


Refusals: TypeAlias = tuple[type[Exception], ...]
REFUSALS: Refusals = (TypeError, ValueError, AttributeError, LookupError)
"""The errors of a type that refuses a value."""


def _unless_refused(process: Callable[[Any], Any], value: Any, refusals: Refusals = REFUSALS) -> Any:
    """The result of *process* for *value*, or *value* itself if the type refuses it."""
    try:
        return process(value)
    except refusals:
        return value


def _listed(value: Any) -> Any:
    """The inverse of `hashable`: lists in place of tuples."""
    return list(map(_listed, value)) if isinstance(value, tuple) else value


class TableColumns:
    """Statements and conversions for one table on one dialect."""

    def __init__(self, table: Table, dialect: Dialect, excluded: Collection[str] = ()) -> None:
        self.table = table
        self.dialect = dialect
        self.database = database_of(dialect)
        self.by_name = {column.name: column for column in logged_columns(table, excluded)}  # table.c is by column.key
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
        """The `TableColumns` of each table of a row."""
        return {self.table: self}

    def parts(self, image: Mapping[str, Any] | None) -> dict[Table, Mapping[str, Any] | None]:
        """The part of *image* for each table. None when the table has no row."""
        return {self.table: image}

    def differ(self, one: Mapping[str, Any] | None, other: Mapping[str, Any] | None) -> bool:
        """Whether two images differ in any table of the row."""
        parts, other_parts = self.parts(one), self.parts(other)
        return any(differ(parts[table], other_parts[table]) for table in parts)

    def implementation(self, column: Column[Any]) -> TypeEngine[Any]:
        """The dialect's type of *column*, below any TypeDecorator."""
        return self._impl[column.name]

    # -- expressions ---------------------------------------------------------------------------------------------

    def travels_as_text(self, column: Column[Any]) -> bool:
        """Whether *column* is read as the server's own text."""
        if self.database.has_dynamic_types:
            return False
        impl = self._impl[column.name]
        if isinstance(impl, sqltypes.ARRAY):
            impl = implementation(impl.item_type, self.dialect)
            if isinstance(impl, Enum) and impl.native_enum:
                return True  # psycopg does not split an array of enums into its items, and other drivers do
        return isinstance(impl, JSON) or not isinstance(impl, _PLAIN)

    def _is_interval(self, column: Column[Any]) -> bool:
        """Whether *column* may hold intervals that are no timedelta. A key column does not count: see `key_values`."""
        is_timedelta = column.primary_key or self.database.has_dynamic_types
        return not is_timedelta and isinstance(self._impl[column.name], intervals.KINDS)

    def raw(self, column: Column[Any]) -> ColumnElement[Any]:
        """*column* as the driver reads it, for a SELECT."""
        if self._is_interval(column):
            text: ColumnElement[str] = literal_column(intervals.as_text(self._qualified(column.name)))
            return type_coerce(text, intervals.RawInterval()).label(column.name)
        if self.travels_as_text(column):
            return type_coerce(cast(column, Text), RAW).label(column.name)
        return type_coerce(column, RAW).label(column.name)  # RAW has no column_expression

    def raw_bind(self, column: Column[Any], value: Any) -> ColumnElement[Any]:
        """A driver-level *value* for an INSERT or UPDATE of *column*."""
        return self._as_stored(column, bindparam(None, value, type_=self._bind_type(column), unique=True))

    def raw_parameter(self, column: Column[Any], name: str) -> ColumnElement[Any]:
        """Like `raw_bind`, but as the parameter *name*, so that one statement can be executed with many values."""
        return self._as_stored(column, bindparam(name, type_=self._bind_type(column)))

    def _bind_type(self, column: Column[Any]) -> TypeEngine[Any]:
        return intervals.RawInterval() if self._is_interval(column) else RAW

    def _as_stored(self, column: Column[Any], value: BindParameter[Any]) -> ColumnElement[Any]:
        if self.database.has_dynamic_types:
            return value
        # The inner cast is for asyncpg, which takes no text for a parameter of type range, for example.
        is_text = self.travels_as_text(column) or self._is_interval(column)
        return cast(cast(value, Text) if is_text else value, column.type)

    def find(
        self, connection: Connection, columns: Sequence[Column[Any]], values: Sequence[tuple[Any, ...]]
    ) -> list[tuple[str, tuple[Any, ...]]]:
        """The keys of the rows that have one of *values* (driver-level) in *columns*, each with its value."""
        selected = [*self.table.primary_key.columns, *columns]
        statement: Select[Any] = select(*(self.raw(column).label(f"n{n}") for n, column in enumerate(selected)))
        pairs = []
        for batch in batches(list(dict.fromkeys(values))):
            rows = connection.execute(statement.where(self._having(columns, batch))).all()
            width = len(self.key_names)
            pairs += [(self.encode_key(row[:width]), hashable(row[width:])) for row in rows]
        return pairs

    def _having(self, columns: Sequence[Column[Any]], values: Sequence[tuple[Any, ...]]) -> ColumnElement[bool]:
        """SQL for "*columns* have one of *values*"."""
        if not any(isinstance(self._impl[column.name], sqltypes.ARRAY) for column in columns):
            parameter: BindParameter[Any] = bindparam("values", list(values), expanding=True)
            return tuple_(*(type_coerce(column, RAW) for column in columns)).in_(parameter)
        # Compare each column separately. PostgreSQL infers the item type of a single array parameter, but not of an
        # array in a row of parameters.
        rows = [zip(columns, map(_listed, value), strict=True) for value in values]
        return or_(*(and_(*(column == self.raw_bind(column, item) for column, item in row)) for row in rows))

    @cached_property
    def key_in(self) -> ColumnElement[bool]:
        """``key IN (:keys)``. `key_parameters` makes the parameter."""
        keys: BindParameter[Any] = bindparam("keys", expanding=True, type_=RAW)
        columns = list(self.table.primary_key.columns)
        if len(columns) == 1:
            kind = implementation(columns[0].type, self.dialect)
            is_plain = isinstance(kind, (sqltypes.Integer, sqltypes.String)) and not isinstance(kind, sqltypes.Enum)
            if is_plain and self.database.has_arrays:
                # One array is one parameter. A thousand parameters would cost more to send than to look up. The array
                # has the widest type, so that a key too large for the column finds no row, and is no error.
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
        """The values of a canonical *key* as the driver takes them. None when no row can have this key."""
        values = decoded(key)
        if values is None or len(values) != len(self._key_types):
            return None
        if len(values) == 1 and type(values[0]) is int and int in self._key_types[0]:
            return values if is_int64(values[0]) else None  # a fast path, because most keys are integers
        try:
            return tuple(map(fitted, values, self._key_types))
        except (DoesNotFit, ArithmeticError):
            return None

    def possible(self, connection: Connection, keys: Iterable[str]) -> dict[str, tuple[Any, ...]]:
        """The *keys* that a row may have, with their values as the driver takes them.

        The database is asked about keys of types that only it can read.
        """
        readable = {key: values for key in keys if (values := self.driver_key(key)) is not None}
        return self._accepted(connection, readable) if readable and self._is_read_by_database else readable

    def _accepted(self, connection: Connection, keys: dict[str, tuple[Any, ...]]) -> dict[str, tuple[Any, ...]]:
        """The *keys* that the database accepts. A refused batch is split in halves."""
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
        """The images of the rows with these (driver-level) *keys*, by canonical key.

        Missing rows are left out. With *for_update* and *skip_locked*, so are rows that another transaction has locked.
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
                raise MemstateError(f"Cannot read a row of {self.table.fullname}. {error}") from error
        return images

    def _fetch(self, connection: Connection, statement: Select[Any], parameters: Mapping[str, Any]) -> Sequence[Any]:
        """The rows of *statement*, which selects every column. A time that the driver refuses to read comes as text."""
        try:
            return connection.execute(statement, parameters).all()  # iteration would fetch one row at a time
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
        """The SQL for the column *name*, for `literal_column`."""
        prepare = self.dialect.identifier_preparer
        return f"{prepare.format_table(self.table)}.{prepare.quote(name)}".replace("%%", "%")

    def find_rows(
        self, connection: Connection, keys: Iterable[str], *, for_update: bool = False
    ) -> dict[str, dict[str, Any]]:
        """The images of the rows with these canonical *keys*. Keys that no row can have are left out."""
        return self.read(connection, list(self.possible(connection, keys).values()), for_update=for_update)

    def lock(
        self,
        connection: Connection,
        keys: Sequence[Sequence[Any]],
        *,
        leaving: bool = False,
        skip_locked: bool = False,
    ) -> set[str]:
        """Lock the rows of *keys* until the transaction ends. Writers of other parts of the same facts wait.

        Returns the canonical keys of the locked rows. (SQLite has one writer, so there it returns all *keys*.)

        *leaving*: the rows will be deleted, so writers of rows that refer to them wait too. Search for such rows after
        this call. Then ON DELETE CASCADE deletes no row that you have not seen.
        """
        if self.database.has_one_writer:
            return set(map(self.encode_key, keys))
        names = map(self.raw, self.table.primary_key.columns)
        statement: Select[Any] = select(*names).where(self.key_in).order_by(*self._key_order)
        statement = statement.with_for_update(key_share=not leaving, skip_locked=skip_locked)
        parameters = map(self.key_parameters, batches(keys))
        return {self.encode_key(row) for batch in parameters for row in connection.execute(statement, batch).all()}

    @cached_property
    def _key_order(self) -> list[ColumnElement[Any]]:
        """The order of locks: the same as that of the unit of work, which sorts keys in Python.

        Two sessions that lock the same rows in different orders could wait for each other. A collation may have a
        different order than Python.
        """
        columns: list[Any] = list(self.table.primary_key.columns)
        if self.database.has_one_writer:
            return columns
        return [cast(c, Text).collate("C") if isinstance(self._impl[c.name], String) else c for c in columns]

    def key_of(self, row: Sequence[Any]) -> str:
        """The canonical key of a row that was selected with `raw` columns."""
        return self.encode_key([row[position] for position in self._key_positions])

    def encode_key(self, values: Sequence[Any]) -> str:
        key = encode_key(values)
        if len(key) > MAX_KEY_CHARS:
            raise MemstateError(
                f"Cannot track a row of {self.table.fullname}: its primary key has {len(key)} characters as JSON. The "
                f"limit is {MAX_KEY_CHARS}. Use shorter keys."
            )
        return key

    # -- conversions -----------------------------------------------------------------------------------------------

    def raw_key(self, identity: Sequence[Any]) -> tuple[Any, ...]:
        """The driver-level key values of an ORM *identity*."""
        if self._key_is_raw:
            return tuple(identity)
        return tuple(
            value if bind is None else bind(value) for bind, value in zip(self._key_binds, identity, strict=True)
        )

    def canonical(self, key: Any) -> str:
        """The canonical key of an ORM primary key, which is one value or a tuple."""
        identity = key if isinstance(key, tuple) else (key,)
        if len(identity) != len(self.key_names):
            raise MemstateError(
                f"Cannot use key={key!r}: the primary key of {self.table.fullname} is {', '.join(self.key_names)}. "
                "Give one value for each column."
            )
        binds = zip(self._key_binds, identity, strict=True)
        # The log may have a key that does not fit today's type.
        return self.canonical_raw([v if bind is None else _unless_refused(bind, v) for bind, v in binds])

    def canonical_raw(self, key: Sequence[Any]) -> str:
        """The canonical key of a `raw_key`, as far as Python can tell. The database may store another form of it."""
        if self._key_is_read_raw:
            return self.encode_key(key)
        return self.encode_key(list(map(self._as_read, self.table.primary_key.columns, key)))

    def _as_read(self, column: Column[Any], value: Any) -> Any:
        """A bound *value* in the form that the driver reads: bytes without psycopg's wrapper, an address as text."""
        value = getattr(value, "obj", value)
        return str(value) if self.travels_as_text(column) and value is not None else value

    def identity(self, key: str) -> tuple[Any, ...]:
        """The ORM identity of a canonical *key*. A key that no row can have stays as it is."""
        values = self.driver_key(key)
        if values is None:
            return decoded(key) or (key,)
        return tuple(self.to_python(name, value) for name, value in zip(self.key_names, values, strict=True))

    def to_python(self, name: str, value: Any, refusals: Refusals = REFUSALS) -> Any:
        """*value* as the ORM would load it, or as it is stored if today's type refuses it."""
        process = self._to_python.get(name)
        return value if process is None else _unless_refused(process, value, refusals)

    def to_raw(self, name: str, value: Any) -> Any:
        """The driver-level value for an ORM *value*. A value that is driver-level already stays as it is."""
        column = self.by_name.get(name)
        bind = None if column is None else column.type.dialect_impl(self.dialect).bind_processor(self.dialect)
        if bind is None:
            return value
        raw = _unless_refused(bind, value)
        inner = getattr(raw, "obj", raw)  # psycopg wraps values of some types on the way in
        if inner is not raw and isinstance(self._impl[name], JSON):
            return (getattr(self.dialect, "_json_serializer", None) or json.dumps)(inner)
        return inner

    def values(self, image: dict[str, Any], refusals: Refusals = REFUSALS) -> dict[str, Any]:
        """An image's values as the ORM would load them. Columns that no longer exist keep their stored form."""
        names = [name for name in self.names if name in image]  # JSONB does not keep the order
        names += [name for name in image if name not in self._impl]
        return {name: self.to_python(name, decode(image[name]), refusals) for name in names}

    def past_values(self, image: dict[str, Any]) -> dict[str, Any]:
        """The `values` of an old image. A type may raise any error there: a key of its encryption may be lost."""
        return self.values(image, (Exception,))

    def _result_processor(self, column: Column[Any]) -> Callable[[Any], Any] | None:
        impl = self._impl[column.name]
        # psycopg's numeric processors depend on the OID of the column: numeric (1700) or float8 (701).
        oid = 701 if isinstance(impl, Float) else 1700
        process = column.type.dialect_impl(self.dialect).result_processor(self.dialect, oid)
        if isinstance(impl, JSON) and self.travels_as_text(column):
            # The type's own processor expects a parsed value, because the driver normally parses it.
            loads = getattr(self.dialect, "_json_deserializer", None) or json.loads

            def parse(value: Any) -> Any:
                parsed = None if value is None else loads(value)
                return parsed if process is None else process(parsed)

            return parse
        if self._is_interval(column):
            return intervals.as_timedelta if process is None else lambda value: process(intervals.as_timedelta(value))
        is_enum_array = isinstance(impl, sqltypes.ARRAY) and isinstance(impl.item_type, Enum)  # the type parses texts
        return process if is_enum_array or not self.travels_as_text(column) else None
