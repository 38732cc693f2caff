"""Write rows back for an undo, in an order that foreign keys and unique values allow."""

from __future__ import annotations

import secrets
from collections.abc import Iterable, Iterator, Mapping, Sequence
from datetime import date, datetime, timedelta
from decimal import Decimal
from itertools import groupby
from typing import Any, NamedTuple, TypeAlias
from uuid import uuid4

from sqlalchemy import (
    Column,
    ColumnElement,
    Date,
    DateTime,
    Enum,
    Float,
    ForeignKeyConstraint,
    Integer,
    LargeBinary,
    Numeric,
    SmallInteger,
    String,
    Table,
    UniqueConstraint,
    Uuid,
    and_,
    delete,
    insert,
    update,
)
from sqlalchemy.engine import Connection
from sqlalchemy.exc import CircularDependencyError, DataError, IntegrityError
from sqlalchemy.schema import sort_tables_and_constraints

from memstate_sa.db.codec import FactKey, Image, by_entity, decode, decode_key, same
from memstate_sa.db.dialects import POSTGRESQL, database_of
from memstate_sa.db.rows import TableColumns
from memstate_sa.errors import ConflictError
from memstate_sa.tracking.registry import Registry
from memstate_sa.tracking.tracked import Tracked
from memstate_sa.undo.order import Columns, Kind, Order, Wait, Write, waits_for_references, waits_for_unique_values
from memstate_sa.undo.refusals import message_of

Rows: TypeAlias = dict[Table, dict[str, Image | None]]
"""Images by table and canonical key; None for rows that must not exist."""


def restore(
    connection: Connection, registry: Registry, final: Mapping[FactKey, Image | None]
) -> dict[FactKey, Image | None]:
    """Write the rows of *final*, and return them as the database then has them.

    Raises ConflictError if the database refuses a row. The caller must then roll back to a SAVEPOINT.
    """
    if final:
        _Restoration(connection, registry, rows_by_table(connection, registry, final)).run()
    return read_facts(connection, registry, final)


def rows_by_table(connection: Connection, registry: Registry, final: Mapping[FactKey, Image | None]) -> Rows:
    """The rows of *final* by table: a fact may have rows in several tables."""
    rows: Rows = {}
    for (entity, key), image in final.items():
        for table, part in registry.by_entity[entity].columns_for(connection.dialect).parts(image).items():
            rows.setdefault(table, {})[key] = part
    return rows


def read_facts(connection: Connection, registry: Registry, facts: Iterable[FactKey]) -> dict[FactKey, Image | None]:
    """The current images of *facts*; None for facts that do not exist."""
    present: dict[FactKey, Image | None] = dict.fromkeys(facts)
    for entity, keys in by_entity(present).items():
        columns = registry.by_entity[entity].columns_for(connection.dialect)
        images = columns.read(connection, [decode_key(key) for key in keys])
        present.update({(entity, key): image for key, image in images.items()})
    return present


class Row(NamedTuple):
    """A statement for the row of a write, and the values that it sets."""

    kind: Kind
    write: Write
    values: Mapping[str, Any]

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(self.values)


class _Restoration:
    def __init__(self, connection: Connection, registry: Registry, final: Rows) -> None:
        self._connection = connection
        self._registry = registry
        self._tables = sorted_tables(list(final))
        self._by_table = {
            table: registry.by_table[table].columns_for(connection.dialect).of_table[table] for table in self._tables
        }
        self._cleared: dict[Write, dict[str, Any]] = {}
        self._replaced: dict[Write, dict[str, Any]] = {}
        self._writes = list(self._to_write(final))

    def run(self) -> None:
        rows: list[Row] = []
        for writes in Order(self._writes, self._waits(), self._clear, self._replace).rounds():
            for early in (self._cleared, self._replaced):
                rows += self._sorted(Row(Kind.UPDATE, write, values) for write, values in early.items())
                early.clear()
            rows += self._sorted(Row(write.kind, write, self._new(write)) for write in writes)
        rows += self._sorted(
            Row(Kind.UPDATE, write, self._values(write, only=sorted(write.postponed))) for write in self._writes
        )
        try:
            for (kind, table, names), group in groupby(rows, key=lambda row: (row.kind, row.write.table, row.names)):
                self._execute(kind, table, names, group)
        except (IntegrityError, DataError) as error:
            raise ConflictError(message_of(error)) from error

    # -- writes and their order --------------------------------------------------------------------------------------

    def _to_write(self, final: Rows) -> Iterator[Write]:
        current = {table: self._read(table, final[table]) for table in self._tables}
        changed: set[tuple[Tracked, str]] = set()
        writes: list[Write] = []
        for table in self._tables:
            for key, image in final[table].items():
                row = current[table].get(key)
                if row is None and image is None:
                    continue
                kind = Kind.INSERT if row is None else Kind.DELETE if image is None else Kind.UPDATE
                write = Write(table, key, kind, row, None if image is None else {**(row or {}), **image})
                writes.append(write)
                if kind is Kind.UPDATE and self._differing(write):
                    changed.add((self._registry.by_table[table], key))
        # Keep unchanged rows of a fact that changes in another of its tables: they may hold its version counter.
        for write in writes:
            if write.kind is not Kind.UPDATE or (self._registry.by_table[write.table], write.key) in changed:
                yield write

    def _waits(self) -> Iterator[Wait]:
        by_table: dict[Table, list[Write]] = {table: [] for table in self._tables}
        for write in self._writes:
            by_table[write.table].append(write)
        for table, writes in by_table.items():
            for columns in unique_columns(table):
                yield from waits_for_unique_values(writes, columns)
            for fk in table.foreign_key_constraints:
                if fk.referred_table in by_table:
                    yield from waits_for_references(writes, by_table[fk.referred_table], fk)

    def _clear(self, write: Write, columns: Columns) -> bool:
        names = [column.name for column in columns if column.nullable and not column.primary_key]
        self._cleared.setdefault(write, {}).update(dict.fromkeys(names))
        write.given_up.update(names)
        return bool(names)

    def _replace(self, write: Write, columns: Columns) -> bool:
        name, value = self._placeholder(write.table, columns)
        if name:
            self._replaced.setdefault(write, {})[name] = value
            write.given_up.add(name)
        return bool(name)

    def _sorted(self, rows: Iterable[Row]) -> list[Row]:
        """The rows with parents first, or with children first for deletes.

        Rows that set the same columns are next to each other, so that they make one executemany.
        """

        def sort_key(row: Row) -> tuple[Any, ...]:
            number = self._tables.index(row.write.table)
            return -number if row.kind is Kind.DELETE else number, row.names

        return sorted((row for row in rows if row.names or row.kind is Kind.DELETE), key=sort_key)

    # -- rows --------------------------------------------------------------------------------------------------------

    def _new(self, write: Write) -> dict[str, Any]:
        """The values that the statement of *write* sets."""
        if write.kind is Kind.DELETE:
            return {}
        if write.kind is Kind.INSERT:
            generated = _generated_always(self._connection, write.table)
            if generated:
                raise ConflictError(
                    f"Cannot bring back a deleted row of {write.table.name}: its column {generated[0].name} is "
                    "GENERATED ALWAYS. Declare the column as GENERATED BY DEFAULT."
                )
            values = self._values(write, only=write.final or ())
        else:
            names = dict.fromkeys([*self._differing(write), *sorted(write.given_up)])
            values = self._with_version(write, self._values(write, only=names))
        return {name: None if name in write.postponed else value for name, value in values.items()}

    def _differing(self, write: Write) -> list[str]:
        """The names of the columns that change."""
        current, final = write.current, write.final
        assert current is not None
        assert final is not None
        version = self._registry.by_table[write.table].mapper.version_id_col
        counter = version.name if version is not None and version.table is write.table else None
        return [n for n in final if n in current and n != counter and not same(current[n], final[n])]

    def _placeholder(self, table: Table, columns: Sequence[Column[Any]]) -> tuple[str, Any]:
        """One of *columns*, which are unique together, and a value that no row has. ("", None) if none is known."""
        for column in columns:
            if column.nullable and not column.primary_key:
                return column.name, None
        for column in columns:
            implementation = self._columns(table).implementation(column)
            value = None if column.primary_key or column.foreign_keys else _unused(implementation)
            if value is not None:
                process = implementation.bind_processor(self._connection.dialect)
                return column.name, value if process is None else process(value)
        return "", None

    # -- statements --------------------------------------------------------------------------------------------------

    def _statement(self, kind: Kind, table: Table, names: Sequence[str]) -> Any:
        by_name = self._columns(table).by_name
        values: dict[str, Any] = {by_name[name].key: self._bind(table, name) for name in names}
        if kind is Kind.INSERT:
            return insert(table).values(values)
        if kind is Kind.DELETE:
            return delete(table).where(self._key_criterion(table))
        # Set these columns to themselves: otherwise onupdate would overwrite their restored values.
        unchanged = {c.key: c for c in table.columns if c.onupdate is not None and c.key not in values}
        return update(table).where(self._key_criterion(table)).values({**unchanged, **values})

    def _execute(self, kind: Kind, table: Table, names: Sequence[str], rows: Iterable[Row]) -> None:
        parameters = [f"memstate_key_{n}" for n in range(len(table.primary_key.columns))]
        parameters += [self._parameter(table, name) for name in names]
        parameter_sets = [
            dict(zip(parameters, (*decode_key(row.write.key), *row.values.values()), strict=True)) for row in rows
        ]
        self._connection.execute(self._statement(kind, table, names), parameter_sets)

    def _bind(self, table: Table, name: str) -> ColumnElement[Any]:
        columns = self._columns(table)
        return columns.raw_parameter(columns.by_name[name], self._parameter(table, name))

    def _parameter(self, table: Table, name: str) -> str:
        """The parameter's name, by the column's number.

        SQLAlchemy would confuse a parameter with the column of the same name, and names may hold any character.
        """
        return f"memstate_{self._columns(table).names.index(name)}"

    def _key_criterion(self, table: Table) -> ColumnElement[bool]:
        columns = self._columns(table)
        parts = []
        for n, column in enumerate(table.primary_key.columns):
            value = columns.raw_parameter(column, f"memstate_key_{n}")
            parts.append(column.is_not_distinct_from(value) if column.nullable else column == value)
        return and_(*parts)

    def _columns(self, table: Table) -> TableColumns:
        return self._by_table[table]

    def _read(self, table: Table, keys: Iterable[str]) -> dict[str, dict[str, Any]]:
        return self._columns(table).read(self._connection, [decode_key(key) for key in keys], for_update=True)

    def _values(self, write: Write, *, only: Iterable[str]) -> dict[str, Any]:
        """The values of the final row that can be written, by column name.

        Columns that no longer exist, and computed columns, are left out.
        """
        by_name, fixed = self._columns(write.table).by_name, self._fixed(write)
        final = write.final or {}
        return {
            name: decode(final[name])
            for name in only
            if name in by_name and name in final and name not in fixed and by_name[name].computed is None
        }

    def _fixed(self, write: Write) -> set[str]:
        """The columns that an UPDATE cannot set."""
        if write.kind is Kind.INSERT:
            return set()
        generated = _generated_always(self._connection, write.table)
        return {column.name for column in (*write.table.primary_key.columns, *generated)}

    def _with_version(self, write: Write, values: dict[str, Any]) -> dict[str, Any]:
        """*values* with the next version counter, so that another Session with a stale copy notices the change."""
        mapper = self._registry.by_table[write.table].mapper
        version, generate = mapper.version_id_col, mapper.version_id_generator
        if version is None or version.table is not write.table or not callable(generate):
            return values
        columns = self._columns(write.table)
        newest = columns.to_python(version.name, decode((write.current or {}).get(version.name)))
        return values | {version.name: columns.to_raw(version.name, generate(newest))}


def _can_be_null(fk: ForeignKeyConstraint) -> bool:
    """Whether the foreign key can be NULL until the referred row exists."""
    return any(column.nullable for column in fk.columns)


def sorted_tables(tables: Sequence[Table]) -> list[Table]:
    """*tables* with parents first. In a circle, foreign keys that can be NULL are ignored."""
    sort: Any = sort_tables_and_constraints
    not_null = [fk for table in tables for fk in table.foreign_key_constraints if not _can_be_null(fk)]
    # Pass these foreign keys as dependencies too, because SQLAlchemy ignores foreign keys with use_alter.
    parents = [(fk.referred_table, fk.table) for fk in not_null if fk.referred_table is not fk.table]
    try:
        pairs = sort(tables, filter_fn=lambda fk: None if _can_be_null(fk) else False, extra_dependencies=parents)
    except CircularDependencyError:  # a circle of NOT NULL foreign keys: they can only be checked at COMMIT
        pairs = sort(tables)
    return [table for table, _ in pairs if table is not None]


def unique_columns(table: Table, *, partial: bool = True) -> list[tuple[Column[Any], ...]]:
    """The columns of each unique constraint and unique index except the primary key.

    *partial*: include indexes with a WHERE clause or with expressions.
    """
    groups = [tuple(c.columns) for c in table.constraints if isinstance(c, UniqueConstraint)]
    for index in table.indexes:
        columns = tuple(column for column in index.columns if isinstance(column, Column))
        is_whole = len(columns) == len(index.expressions) and not any(
            index.dialect_options[name].get("where") is not None for name in ("postgresql", "sqlite")
        )
        if index.unique and columns and (partial or is_whole):
            groups.append(columns)
    return groups


_SPAN_US = 900 * 365 * 24 * 3600 * 10**6
"""900 years in microseconds: unused dates are taken from the first 1,000 years of the calendar."""


def _unused(type_: Any) -> Any:  # one case per type
    """A value of *type_* that hardly any row has, or None if the type has no such value."""
    value: Any = None
    match type_:
        case Enum():
            pass  # all of its few values may be in use
        case String():
            value = secrets.token_hex(16)[: type_.length]
        case Integer():
            value = -1 - secrets.randbelow(2**15 if isinstance(type_, SmallInteger) else 2**30)
        case Float():
            value = -float(secrets.randbelow(2**40))
        case Numeric():
            digits = min(type_.precision or 15, 15)
            value = Decimal(-1 - secrets.randbelow(10**digits - 1)).scaleb(-(type_.scale or 0))
        case Date():
            value = date.min + timedelta(microseconds=secrets.randbelow(_SPAN_US))
        case DateTime():
            value = datetime(100, 1, 1) + timedelta(microseconds=secrets.randbelow(_SPAN_US))  # noqa: DTZ001  # the column may have no zone
        case Uuid():
            value = uuid4() if type_.as_uuid else str(uuid4())
        case LargeBinary():
            value = secrets.token_bytes(16)[: type_.length]
    return value


def _generated_always(connection: Connection, table: Table) -> list[Column[Any]]:
    """The columns that only PostgreSQL may write. SQLite ignores GENERATED ALWAYS, so it has none."""
    if database_of(connection) is not POSTGRESQL:
        return []
    return [column for column in table.columns if column.identity is not None and column.identity.always]
