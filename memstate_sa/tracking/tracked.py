"""`Tracked`: a mapped class with the options of `Memory.track`."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from time import monotonic
from typing import Any

from sqlalchemy import (
    Column,
    ColumnElement,
    FromClause,
    Select,
    Table,
    and_,
    func,
    inspect,
    select,
)
from sqlalchemy.engine import Dialect
from sqlalchemy.orm import (
    Mapper,
    configure_mappers,
    make_transient_to_detached,
)
from sqlalchemy.orm.attributes import set_committed_value

from memstate_sa.db.codec import Image, decode_image, encode, encode_key
from memstate_sa.db.dialects import Database, database_of
from memstate_sa.db.joined_rows import JoinedColumns
from memstate_sa.db.json_params import as_json
from memstate_sa.db.rows import TableColumns
from memstate_sa.errors import MemstateError
from memstate_sa.tracking.inheritance import (
    check_tables,
    check_trigger_table,
    image_name,
    inheritance_criterion,
    is_concrete_below,
    tables_of,
)
from memstate_sa.tracking.projection import PLAIN_TYPES, Projection, digest_of, part_of, point_id, to_scalar
from memstate_sa.tracking.validation import Validate


def _same(value: Any) -> Any:
    return value


# Equal values of these types may be one object, so `upcast` copies them to recognise each. (bool has only two objects.)
_COPIES: Mapping[type, Callable[[Any], Any]] = {kind: type(kind.__name__, (kind,), {}) for kind in (int, str, bytes)}


TRACKED = "memstate_sa"
"""The key in a MetaData's ``info`` for the tables that triggers capture. Each has, by entity, the class, its version
and its excluded columns."""


Upgrade = Callable[[dict[str, Any]], Mapping[str, Any]]


UniqueValues = Callable[[Mapping[str, Any]], Sequence[Any] | None]


@dataclass(frozen=True, eq=False)
class Tracked:
    """One tracked class: its tables, the columns for an index, and the checks of its values."""

    model: type[Any]
    entity: str
    text: str | Callable[[Any], str | None] | None
    metadata: tuple[str, ...] = ()
    validate: Validate | None = None
    indexes: tuple[str, ...] = ()
    unique_values: UniqueValues | None = None
    immutable: Callable[[Mapping[str, Any]], bool] | None = None
    on_untracked: str = "raise"
    by_trigger: bool = False
    derived: bool = False  # tracked only because its base class is
    unique_names: tuple[str, ...] = ()
    expires: str | None = None
    version: int = 1
    upgrade: Mapping[int, Upgrade] = field(default_factory=dict, repr=False)
    text_version: int = 1
    exclude: tuple[str, ...] = ()
    withdrawn: bool = False  # the index must not hold points of the class any more
    since: float = field(default_factory=monotonic, repr=False)  # the time of the call of `track`
    hydrations: dict[TableColumns, Select[Any]] = field(default_factory=dict, repr=False)
    _columns: dict[Database, TableColumns] = field(default_factory=dict, repr=False)

    @property
    def is_checked(self) -> bool:
        """Whether Python must check each written row."""
        return bool(self.validate or self.immutable or self.unique_values)

    @cached_property
    def select_all(self) -> Select[Any]:
        return select(self.model)

    @property
    def mapper(self) -> Mapper[Any]:
        mapper: Mapper[Any] = inspect(self.model)
        return mapper

    @cached_property
    def tables(self) -> tuple[Table, ...]:
        """The tables of the class' rows: first the table with their keys, then those of joined inheritance."""
        mappers = [mapper for mapper in self.mapper.self_and_descendants if not is_concrete_below(mapper, self.mapper)]
        return tuple(dict.fromkeys(table for mapper in mappers for table in tables_of(mapper)))

    @cached_property
    def base_table_count(self) -> int:
        """The number of tables of base classes. A fact needs a row in the table after them, too."""
        return len(tables_of(self.mapper)) - 1

    @property
    def table(self) -> Table:
        return self.tables[0]

    def check(self, mapper: Mapper[Any]) -> None:
        """Raise MemstateError when rows of the subclass *mapper* cannot be tracked too."""
        check_tables(mapper)
        if self.by_trigger:
            check_trigger_table(mapper, self.table)

    def record_for_autogenerate(self) -> None:
        """Record the class in the MetaData, so that autogenerate can make its triggers (`captured_tables.captured_in`).

        The Table's own ``info`` would not do, because Alembic prints it into the migration that creates the table.
        """
        if self.by_trigger:
            tables = self.table.metadata.info.setdefault(TRACKED, {})
            tables.setdefault(self.table.fullname, {})[self.entity] = (self.model, self.version, self.excluded)

    @property
    def expiry(self) -> tuple[str, ...]:
        return () if self.expires is None else (self.expires,)

    def clear_caches(self) -> None:
        """Forget all values that depend on the tables, because another subclass was mapped."""
        for name in (
            "tables",
            "attributes",
            "_names",
            "_attribute_columns",
            "excluded",
            "projected_attributes",
            "projected_columns",
            "rows",
            "criterion",
        ):
            self.__dict__.pop(name, None)
        self._columns.clear()
        self.hydrations.clear()

    def columns_for(self, dialect: Dialect) -> TableColumns:
        """This class' statements and conversions for *dialect*."""
        # The cache is by database, because its dialects differ only in details of their server.
        database = database_of(dialect)
        columns = self._columns.get(database)
        if columns is None:
            if len(self.tables) > 1:
                columns = JoinedColumns(self.tables, dialect, self.excluded_of, required=self.base_table_count)
            else:
                columns = TableColumns(self.table, dialect, self.excluded)
            self._columns[database] = columns
        return columns

    @cached_property
    def attributes(self) -> dict[str, str]:
        """Attribute names by the names of columns in an image."""
        return {self._names[column]: name for name, columns in self._attribute_columns.items() for column in columns}

    @cached_property
    def _names(self) -> dict[Column[Any], str]:
        """The name of each column in an image."""
        return {column: image_name(column, self.table) for table in self.tables for column in table.columns}

    @cached_property
    def _attribute_columns(self) -> dict[str, list[Column[Any]]]:
        """The columns of each attribute of the class, and of the subclasses in its tables."""
        columns_of: dict[str, list[Column[Any]]] = {}
        for mapper in self.mapper.self_and_descendants:
            for name, column in mapper.columns.items():
                if column in self._names and column not in (columns := columns_of.setdefault(name, [])):
                    columns.append(column)
        return columns_of

    def excluded_of(self, table: Table) -> frozenset[str]:
        """The names of the columns of *table* that are excluded from the log."""
        columns = (column for name in self.exclude for column in self._attribute_columns.get(name, ()))
        return frozenset(str(column.name) for column in columns if column.table is table)

    @cached_property
    def excluded(self) -> frozenset[str]:
        return self.excluded_of(self.table)

    def by_attribute(self, values: Mapping[str, Any]) -> dict[str, Any]:
        """Column values by attribute name."""
        return {self.attributes.get(name, name): value for name, value in values.items()}

    def upcast(self, image: Image, version: int, dialect: Dialect) -> Image:
        """An *image* of the older shape *version*, in today's shape.

        A value that an upgrade function passes on stays driver-level, under its old or a new name. A value that the
        function makes is an ORM value.
        """
        if version >= self.version or not self.upgrade:
            return image
        stored = decode_image(image)
        copies = {name: _COPIES.get(type(value), _same)(value) for name, value in stored.items()}
        values: Mapping[str, Any] = copies
        for shape in range(version, self.version):
            if shape in self.upgrade:
                values = self._upgraded(shape, values)
        columns, sources = self.columns_for(dialect), {id(value): name for name, value in copies.items()}
        upgraded: dict[str, Any] = {}
        for name, value in values.items():
            source = name if isinstance(value, bool) else sources.get(id(value))
            if value is None:
                upgraded[name] = None
            elif source in copies and copies[source] is value:
                upgraded[name] = encode(stored[source])
            else:
                upgraded[name] = encode(columns.to_raw(name, value))
        return upgraded

    def _upgraded(self, shape: int, values: Mapping[str, Any]) -> Mapping[str, Any]:
        """*values*, upgraded from version *shape* to the next version."""
        failure = f"Cannot read an old image of {self.entity}: upgrade[{shape}]"
        try:
            upgraded = self.upgrade[shape](dict(values))
        except Exception as error:
            raise MemstateError(
                f"{failure} raised {type(error).__name__}. It got the columns {', '.join(values)}. Entries between a "
                "migration and the release with version= have the new columns, so the function must accept both."
            ) from error
        if not isinstance(upgraded, Mapping):
            raise MemstateError(f"{failure} returned {upgraded!r}. It must return a dict of columns.")
        return upgraded

    # -- projections -----------------------------------------------------------------------------------------------

    @cached_property
    def from_no_index(self) -> Tracked:
        """The same class for an index that must not hold it: no row has a vector there."""
        return replace(self, text=None, metadata=(), text_version=1, withdrawn=True, hydrations={}, _columns={})

    @cached_property
    def projection(self) -> str:
        """A description of text and metadata, as JSON. When it changes, every row must be delivered again.

        For a text function it has the `text_version`, because the code of a function cannot be compared.
        """
        if self.text is None:
            return json.dumps({"text": None})
        columns = self.mapper.columns
        kinds = {
            name: type(columns[name].type).__name__ for name in (*attributes_of(self.text), *self._sorted_metadata)
        }
        text = "a function" if callable(self.text) else {self.text: kinds[self.text]}
        metadata = {name: kinds[name] for name in self._sorted_metadata}
        return json.dumps({"text": text, "version": self.text_version, "metadata": metadata})

    @cached_property
    def projected_attributes(self) -> tuple[str, ...]:
        if callable(self.text):
            configure_mappers()  # a process that only relays has loaded no instance yet
            return tuple(name for name in self._attribute_columns if name not in self.exclude)
        return (*attributes_of(self.text), *self.metadata)

    @cached_property
    def key_attributes(self) -> tuple[str, ...]:
        return tuple(self.attributes[column.name] for column in self.key_columns)

    @cached_property
    def key_columns(self) -> tuple[Column[Any], ...]:
        return tuple(self.table.primary_key.columns)

    @cached_property
    def _sorted_metadata(self) -> list[str]:
        """The metadata in a fixed order, so that the order of declaration does not change the fingerprint."""
        return sorted(self.metadata)

    @cached_property
    def criterion(self) -> ColumnElement[bool] | None:
        return inheritance_criterion(self.mapper)

    @cached_property
    def projected_columns(self) -> tuple[ColumnElement[Any], ...]:
        """The columns of `rows` that `project` needs, in its order."""
        return tuple(self._projected_column(self._attribute_columns[name]) for name in self.projected_attributes)

    def _projected_column(self, columns: Sequence[Column[Any]]) -> ColumnElement[Any]:
        # Several subclasses may have columns of this name. A row belongs to one of them.
        only = len(columns) == 1 or columns[0].table in self.tables[: self.base_table_count + 1]
        return columns[0] if only else func.coalesce(*columns)

    @cached_property
    def rows(self) -> FromClause:
        """The joined tables that `project` reads. They have a row for each fact."""
        if not self.is_projected_of_many:
            return self.table
        rows: FromClause = self.table
        for position, table in enumerate(self.tables[1:], start=1):
            same = and_(*(a == b for a, b in zip(self.key_columns, table.primary_key.columns, strict=True)))
            if position <= self.base_table_count or callable(self.text):
                rows = rows.join(table, same, isouter=position > self.base_table_count)
        return rows

    @property
    def is_projected_of_many(self) -> bool:
        """Whether `rows` has more than one table."""
        return self.base_table_count > 0 or (len(self.tables) > 1 and callable(self.text))

    def project(self, key: str, row: Sequence[Any], embedder: str) -> Projection:
        """The projection of a row of `projected_columns`. *embedder* is the embedder's fingerprint."""
        values = dict(zip(self.projected_attributes, row, strict=True))
        text = self.text
        if text is not None:
            text = text(self._detached(values)) if callable(text) else values[text]
        if text is None or not str(text).strip():
            return Projection(key, None, {}, None, None)
        text = str(text)
        metadata = {
            name: value if type(value := values[name]) in PLAIN_TYPES else to_scalar(value)
            for name in self._sorted_metadata
        }
        digest = digest_of(embedder).copy()
        digest.update(part_of(text))
        text_fingerprint = digest.hexdigest()
        digest.update(part_of(as_json(metadata)))
        return Projection(key, text, metadata, digest.hexdigest(), text_fingerprint)

    def _detached(self, values: Mapping[str, Any]) -> Any:
        """A detached instance of the row. Its own columns are loaded. Access to other attributes raises."""
        mapper = self.mapper
        if mapper.polymorphic_on is not None:
            discriminator = values.get(mapper.get_property_by_column(mapper.polymorphic_on).key)
            mapper = mapper.polymorphic_map.get(discriminator, mapper)
        instance = mapper.class_manager.new_instance()
        for name, value in values.items():
            if name in mapper.columns:
                set_committed_value(instance, name, value)
        make_transient_to_detached(instance)
        return instance

    def point_id(self, key: str) -> str:
        return point_id(self.entity, key)


def attributes_of(text: Any) -> tuple[str, ...]:
    """The embedded attribute, if *text* names one."""
    return () if text is None or callable(text) else (text,)


def unique_value(tracked: Tracked, values: Mapping[str, Any]) -> str | None:
    """The row's value in the table of unique values, or None."""
    parts = None if tracked.unique_values is None else tracked.unique_values(tracked.by_attribute(values))
    if parts is None:
        return None
    value = encode_key(parts)
    # The value is a key of a B-tree, and PostgreSQL allows about 2,700 bytes there.
    return value if len(value) <= 500 else f"[{digest_of(value).hexdigest()}]"
