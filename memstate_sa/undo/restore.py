"""Writing rows back as an undo demands, in an order that foreign keys and unique values allow."""

from __future__ import annotations

import secrets
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from datetime import date, datetime, timedelta
from decimal import Decimal
from functools import partial
from graphlib import CycleError, TopologicalSorter
from itertools import groupby
from typing import Any, TypeAlias
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
from sqlalchemy.exc import CircularDependencyError, DataError, DBAPIError, IntegrityError
from sqlalchemy.schema import sort_tables_and_constraints

from memstate_sa.db.codec import FactKey, Image, by_entity, decode, decode_key, same
from memstate_sa.db.dialects import POSTGRESQL, database_of
from memstate_sa.db.rows import TableColumns, columns_of, values_of
from memstate_sa.errors import ConflictError
from memstate_sa.tracking.registry import Registry
from memstate_sa.undo.refusals import message_of

Rows: TypeAlias = dict[Table, dict[str, Image | None]]
"""By table and canonical key; None where no row is to be."""


def restore(
    connection: Connection, registry: Registry, final: Mapping[FactKey, Image | None]
) -> dict[FactKey, Image | None]:
    """Write the rows that *final* demands; returns them as the database then has them.

    Raises ConflictError when a constraint allows it in no order; the caller's SAVEPOINT takes back what was written.
    """
    if final:
        _Restoration(connection, registry, rows_by_table(connection, registry, final)).run()
    return read_facts(connection, registry, final)


def rows_by_table(connection: Connection, registry: Registry, final: Mapping[FactKey, Image | None]) -> Rows:
    """The rows of *final*, by table: a fact may be rows in several."""
    rows: Rows = {}
    for (entity, key), image in final.items():
        for table, part in registry.by_entity[entity].columns_for(connection.dialect).parts(image).items():
            rows.setdefault(table, {})[key] = part
    return rows


def read_facts(connection: Connection, registry: Registry, facts: Iterable[FactKey]) -> dict[FactKey, Image | None]:
    """The facts as they are; None for those that are not."""
    present: dict[FactKey, Image | None] = dict.fromkeys(facts)
    for entity, keys in by_entity(present).items():
        columns = registry.by_entity[entity].columns_for(connection.dialect)
        images = columns.read(connection, [decode_key(key) for key in keys])
        present.update({(entity, key): image for key, image in images.items()})
    return present


class _Restoration:
    def __init__(self, connection: Connection, registry: Registry, final: Rows) -> None:
        self._connection = connection
        self._registry = registry
        self._final = final
        self._tables: list[Table] = []
        self._circular: set[ForeignKeyConstraint] = set()  # no order satisfies them: their columns are set last
        self._placeholders: dict[tuple[Table, str], dict[str, Any]] = {}
        for table, constraints in sorted_tables(list(final)):
            if table is None:
                self._circular.update(fk for fk in constraints if _can_be_null(fk))
            else:
                self._tables.append(table)
        dialect = connection.dialect
        self._by_table = {
            table: registry.by_table[table].columns_for(dialect).of_table[table] for table in self._tables
        }
        self._current = {table: self._read(table) for table in self._tables}

    def run(self) -> None:
        """Write the rows in the first of these orders that no constraint refuses."""
        orders: tuple[tuple[Callable[[], None], ...], ...] = (
            (self._insert_missing, self._update_differing, self._delete_unwanted),
            # First free the unique values that move from one row to another.
            (self._free_unique_values, self._insert_missing, self._update_differing, self._delete_unwanted),
            (self._delete_unwanted, self._update_differing, self._insert_missing),
            # First clear the references to such values, too.
            (
                self._clear_references,
                self._free_unique_values,
                self._insert_missing,
                self._update_differing,
                self._delete_unwanted,
            ),
        )
        refused: DBAPIError | None = None
        for order in orders:
            try:
                with self._connection.begin_nested():
                    for act in order:
                        act()
            except DBAPIError as error:  # a value that stood in for another may be refused as one of its type
                if error.connection_invalidated or not isinstance(error, (IntegrityError, DataError)):
                    raise
                refused = error if refused is None or isinstance(error, IntegrityError) else refused
            else:
                return
        assert refused is not None
        raise ConflictError(message_of(refused)) from refused

    # -- acts ----------------------------------------------------------------------------------------------------------

    def _insert_missing(self) -> None:
        inserted: list[tuple[Table, dict[str, Image], list[str]]] = []
        for table in self._tables:
            missing = {
                key: image
                for key, image in self._final[table].items()
                if image is not None and key not in self._current[table]
            }
            order = self._parents_first(table, missing)
            deferred = self._deferred_columns(table)
            generated = [column.name for column in _generated_always(self._connection, table)]
            if missing and generated:
                raise ConflictError(
                    f"{table.name}.{generated[0]} is GENERATED ALWAYS: a deleted row cannot be brought back"
                )
            rows = []
            for key in order:
                values = self._values(table, missing[key])
                rows.append((key, values | {name: None for name in deferred if name in values}))
            self._insert(table, rows)
            if deferred:
                inserted.append((table, missing, deferred))
        for table, images, deferred in inserted:
            self._update(table, [(key, self._values(table, image, only=deferred)) for key, image in images.items()])

    def _update_differing(self) -> None:
        differing = {table: self._differing(table) for table in self._tables}
        for table in self._tables:
            rows = []
            for key, names in differing[table].items():
                image = self._final[table][key]
                assert image is not None
                entity = self._registry.by_table[table]
                changes = any(
                    of.get(key) for other, of in differing.items() if self._registry.by_table[other] is entity
                )
                values = self._values(table, image, only=names)
                rows.append((key, self._with_version(table, values, self._current[table][key]) if changes else values))
            self._update(table, rows)

    def _differing(self, table: Table) -> dict[str, list[str]]:
        """The columns that are to change, of each row that exists and is to stay."""
        differing: dict[str, list[str]] = {}
        version = self._registry.by_table[table].mapper.version_id_col
        counter = version.name if version is not None and version.table is table else None
        for key, image in self._final[table].items():
            current = self._current[table].get(key)
            if image is not None and current is not None:
                placeholders = self._placeholders.get((table, key), {})
                names = (name for name in image if name in current and name != counter)
                differing[key] = [n for n in names if n in placeholders or not same(current[n], image[n])]
        return differing

    def _delete_unwanted(self) -> None:
        for table in self._tables:
            if deferred := self._deferred_columns(table):
                self._update(table, [(key, dict.fromkeys(deferred)) for key in self._deleted_keys(table)])
        for table in reversed(self._tables):
            images = {key: self._current[table][key] for key in self._deleted_keys(table)}
            rows: list[tuple[str, dict[str, Any]]] = [(key, {}) for key in reversed(self._parents_first(table, images))]
            self._execute(rows, partial(self._deletion, table), table)

    def _clear_references(self) -> None:
        """Give foreign keys that may be NULL, and are to change, no value."""
        for table in self._tables:
            self._set_placeholders(table, [tuple(fk.columns) for fk in table.foreign_key_constraints])

    def _free_unique_values(self) -> None:
        """Give unique columns whose value is to change a value that no row has."""
        for table in self._tables:
            self._set_placeholders(table, unique_columns(table))

    def _set_placeholders(self, table: Table, groups: Iterable[tuple[Column[Any], ...]]) -> None:
        rows = []
        for key, current in self._current[table].items():
            final = self._final[table][key]
            differing = [
                columns
                for columns in groups
                if final is None or not all(same(final.get(c.name, current[c.name]), current[c.name]) for c in columns)
            ]
            placeholders = dict(self._placeholder(table, columns) for columns in differing)
            placeholders.pop("", None)
            self._placeholders.setdefault((table, key), {}).update(placeholders)
            rows.append((key, placeholders))
        self._update(table, rows)

    def _placeholder(self, table: Table, columns: Sequence[Column[Any]]) -> tuple[str, Any]:
        """One of *columns*, which are unique together, and a value that no row has; ("", None): none is known."""
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

    def _deletion(self, table: Table, _: Sequence[str]) -> Any:
        return delete(table).where(self._key_criterion(table))

    def _insert(self, table: Table, rows: Sequence[tuple[str, Mapping[str, Any]]]) -> None:
        by_name = self._columns(table).by_name
        self._execute(
            rows,
            lambda names: insert(table).values({by_name[name].key: self._bind(table, name) for name in names}),
            table,
        )

    def _update(self, table: Table, rows: Iterable[tuple[str, Mapping[str, Any]]]) -> None:
        by_name = self._columns(table).by_name
        fixed = {column.name for column in (*table.primary_key.columns, *_generated_always(self._connection, table))}

        def statement(names: Sequence[str]) -> Any:
            values: dict[str, Any] = {by_name[name].key: self._bind(table, name) for name in names}
            # onupdate would overwrite what is being restored.
            unchanged = {c.key: c for c in table.columns if c.onupdate is not None and c.key not in values}
            return update(table).where(self._key_criterion(table)).values({**unchanged, **values})

        changes = [(key, {n: v for n, v in values.items() if n not in fixed}) for key, values in rows]
        # Of those that set the same columns, one executemany: their order is of no matter.
        changes.sort(key=lambda row: tuple(row[1]))
        self._execute([(key, values) for key, values in changes if values], statement, table)

    def _execute(
        self,
        rows: Sequence[tuple[str, Mapping[str, Any]]],
        statement: Callable[[Sequence[str]], Any],
        table: Table,
    ) -> None:
        """One executemany for each run of rows that set the same columns; the order of rows is kept."""
        for names, together in groupby(rows, key=lambda row: tuple(row[1])):
            parameters = [f"memstate_key_{n}" for n in range(len(table.primary_key.columns))]
            parameters += [self._parameter(table, name) for name in names]
            run = [dict(zip(parameters, (*decode_key(key), *values.values()), strict=True)) for key, values in together]
            self._connection.execute(statement(names), run)

    def _bind(self, table: Table, name: str) -> ColumnElement[Any]:
        columns = self._columns(table)
        return columns.raw_parameter(columns.by_name[name], self._parameter(table, name))

    def _parameter(self, table: Table, name: str) -> str:
        """By number: a column's own name would be taken for its value, and may hold anything."""
        return f"memstate_{self._columns(table).names.index(name)}"

    def _key_criterion(self, table: Table) -> ColumnElement[bool]:
        columns = self._columns(table)
        return and_(
            *(
                column == columns.raw_parameter(column, f"memstate_key_{n}")
                for n, column in enumerate(table.primary_key.columns)
            )
        )

    # -- rows --------------------------------------------------------------------------------------------------------

    def _columns(self, table: Table) -> TableColumns:
        return self._by_table[table]

    def _read(self, table: Table) -> dict[str, dict[str, Any]]:
        keys = [decode_key(key) for key in self._final[table]]
        return self._columns(table).read(self._connection, keys, for_update=True)

    def _deleted_keys(self, table: Table) -> list[str]:
        return [key for key, image in self._final[table].items() if image is None and key in self._current[table]]

    def _values(self, table: Table, image: Image, *, only: Sequence[str] | None = None) -> dict[str, Any]:
        """What of *image* can be written, by column name: columns that are still there and not computed."""
        by_name = self._columns(table).by_name
        return {
            name: decode(image[name])
            for name in (image if only is None else only)
            if name in by_name and name in image and by_name[name].computed is None
        }

    def _with_version(self, table: Table, values: dict[str, Any], current: Image) -> dict[str, Any]:
        """A stale copy somewhere must still notice that the row, or another part of the fact, moved on."""
        mapper = self._registry.by_table[table].mapper
        version, generate = mapper.version_id_col, mapper.version_id_generator
        if version is None or version.table is not table or not callable(generate):
            return values
        columns = self._columns(table)
        newest = columns.to_python(version.name, decode(current.get(version.name)))
        return values | {version.name: columns.to_raw(version.name, generate(newest))}

    def _deferred_columns(self, table: Table) -> list[str]:
        """The columns of circular foreign keys that can be set later."""
        return [c.name for fk in self._circular if fk.table is table for c in fk.columns if c.nullable]

    def _parents_first(self, table: Table, images: Mapping[str, Image]) -> list[str]:
        """Keys ordered so that a row comes after the row of the same table that it refers to."""
        own = [fk for fk in table.foreign_key_constraints if fk.referred_table is table and fk not in self._circular]
        if not own:
            return list(images)
        sorter: TopologicalSorter[str] = TopologicalSorter(dict.fromkeys(images, ()))
        for fk in own:
            local, remote = columns_of(fk)
            owners = {values_of(image, remote): key for key, image in images.items()}
            for key, image in images.items():
                value = values_of(image, local)
                parent = None if value is None else owners.get(value)
                if parent is not None and parent != key:
                    sorter.add(key, parent)
        try:
            return list(sorter.static_order())
        except CycleError:
            self._circular.update(own)
            return list(images)


def _can_be_null(fk: ForeignKeyConstraint) -> bool:
    """Whether it can be NULL until the row that it refers to is there."""
    return any(column.nullable for column in fk.columns)


def sorted_tables(tables: Sequence[Table]) -> list[tuple[Table | None, Collection[ForeignKeyConstraint]]]:
    """Parents first. In a circle the foreign keys that can wait give way: they are what comes with None, at the end."""
    sort: Any = sort_tables_and_constraints
    firm = [fk for table in tables for fk in table.foreign_key_constraints if not _can_be_null(fk)]
    # As dependencies, too: what says use_alter is none by itself.
    parents = [(fk.referred_table, fk.table) for fk in firm if fk.referred_table is not fk.table]
    try:
        return list(sort(tables, filter_fn=lambda fk: None if _can_be_null(fk) else False, extra_dependencies=parents))
    except CircularDependencyError:  # of keys that are checked at COMMIT
        return list(sort(tables))


def unique_columns(table: Table, *, partial: bool = True) -> list[tuple[Column[Any], ...]]:
    """The columns of each unique constraint and unique index, beside the primary key; *partial* ones included."""
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
"""Microseconds of the years in which nobody's dates are."""


def _unused(type_: Any) -> Any:  # a case a type
    """A value of *type_* that hardly any row has; None: of this type none is known."""
    value: Any = None
    match type_:
        case Enum():
            pass  # it has few
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
            value = datetime(100, 1, 1) + timedelta(microseconds=secrets.randbelow(_SPAN_US))  # noqa: DTZ001  # either
        case Uuid():
            value = uuid4() if type_.as_uuid else str(uuid4())
        case LargeBinary():
            value = secrets.token_bytes(16)[: type_.length]
    return value


def _generated_always(connection: Connection, table: Table) -> list[Column[Any]]:
    """Columns that only PostgreSQL may write; SQLite has no such thing, and ignores that they were declared so."""
    if database_of(connection) is not POSTGRESQL:
        return []
    return [column for column in table.columns if column.identity is not None and column.identity.always]
