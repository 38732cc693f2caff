"""`Fact`, the ready-made model, and what `Memory.track` records about a mapped class."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import date, datetime, time
from enum import Enum
from functools import cached_property, lru_cache
from itertools import pairwise
from time import monotonic
from typing import Any, NamedTuple
from uuid import uuid4

from sqlalchemy import (
    BinaryExpression,
    Boolean,
    Column,
    ColumnElement,
    DateTime,
    FromClause,
    Select,
    String,
    Table,
    Text,
    and_,
    func,
    inspect,
    select,
)
from sqlalchemy.engine import Dialect
from sqlalchemy.exc import NoInspectionAvailable
from sqlalchemy.ext.declarative import ConcreteBase
from sqlalchemy.orm import (
    DeclarativeBase,
    Mapped,
    Mapper,
    QueryableAttribute,
    configure_mappers,
    make_transient_to_detached,
    mapped_column,
)
from sqlalchemy.orm.attributes import set_committed_value
from sqlalchemy.sql import operators, visitors

from memstate_sa.arrays import as_json
from memstate_sa.changes import Image
from memstate_sa.codec import decode_image, encode, encode_key
from memstate_sa.columns import JoinedColumns, TableColumns
from memstate_sa.errors import MemstateError
from memstate_sa.indexes.base import Scalar
from memstate_sa.schemas import Validate, validator
from memstate_sa.tables import UTCDateTime, _Json, metadata, utcnow


class _Base(DeclarativeBase):
    metadata = metadata


class Fact(_Base):
    """A fact for people without models of their own: a type and a JSON payload."""

    __tablename__ = "memstate_fact"

    id: Mapped[str] = mapped_column(String(64), primary_key=True, default=lambda: uuid4().hex)
    type: Mapped[str] = mapped_column(String(128), index=True)
    payload: Mapped[dict[str, Any]] = mapped_column(_Json)
    session_id: Mapped[str | None] = mapped_column(Text, index=True)
    ephemeral: Mapped[bool] = mapped_column(Boolean(create_constraint=False), default=False)
    created_at: Mapped[datetime] = mapped_column(UTCDateTime, default=utcnow)
    updated_at: Mapped[datetime] = mapped_column(UTCDateTime, default=utcnow, onupdate=utcnow)
    expires_at: Mapped[datetime | None] = mapped_column(UTCDateTime, index=True)

    def __repr__(self) -> str:
        return f"Fact(id={self.id!r}, type={self.type!r}, payload={self.payload!r})"


class Projection(NamedTuple):
    """What an index should hold for one row. No text: nothing, and no fingerprint."""

    key: str
    text: str | None
    metadata: dict[str, Scalar]
    fingerprint: str | None
    text_fingerprint: str | None


def _part(text: str) -> bytes:
    """Says where it ends, so that no two lists of parts are one text."""
    return f"{len(text)}:{text}".encode("utf-8", "surrogatepass")


@lru_cache(64)
def _digest_of(text: str) -> hashlib.blake2b:
    """A digest that has begun; others go on from a copy."""
    return hashlib.blake2b(_part(text), digest_size=16)


_PLAIN = frozenset((str, int, bool, type(None)))


def _scalar(value: Any) -> Scalar:
    """A metadata value in the form that every index takes."""
    if isinstance(value, Enum):
        value = value.name
    if value is None or isinstance(value, (bool, int, str)):
        return value
    if isinstance(value, float):
        return value if math.isfinite(value) else repr(value)
    if isinstance(value, (datetime, date, time)):
        return str(next(iter(encode(value).values())))
    if isinstance(value, (dict, list, tuple)):
        return json.dumps(value, sort_keys=True, default=str)
    return str(value)


def _same(value: Any) -> Any:
    return value


# Values of these types may be one object wherever they are equal; a copy is known again. (There are two of bool.)
_COPIES: Mapping[type, Callable[[Any], Any]] = {kind: type(kind.__name__, (kind,), {}) for kind in (int, str, bytes)}

TRACKED = "memstate_sa"
"""The key in a MetaData's ``info``: of each table that triggers capture, the class and its version, by entity."""

Upgrade = Callable[[dict[str, Any]], Mapping[str, Any]]
UniqueValues = Callable[[Mapping[str, Any]], Sequence[Any] | None]


@dataclass(frozen=True, eq=False)
class Tracked:
    """One tracked class: where its rows are, which of their columns an index sees, what may be written."""

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
    derived: bool = False  # of a base class that was tracked
    unique_names: tuple[str, ...] = ()
    expires: str | None = None
    version: int = 1
    upgrade: Mapping[int, Upgrade] = field(default_factory=dict, repr=False)
    text_version: int = 1
    withdrawn: bool = False  # from an index: it is to hold no point of the class any more
    since: float = field(default_factory=monotonic, repr=False)  # when it was tracked
    hydrations: dict[str, Select[Any]] = field(default_factory=dict, repr=False)
    _columns: dict[str, TableColumns] = field(default_factory=dict, repr=False)

    @cached_property
    def everything(self) -> Select[Any]:
        return select(self.model)

    @property
    def mapper(self) -> Mapper[Any]:
        mapper: Mapper[Any] = inspect(self.model)
        return mapper

    @cached_property
    def tables(self) -> tuple[Table, ...]:
        """Where rows of the class are: the table that gives them their key, and what joined inheritance adds to it."""
        mappers = [each for each in self.mapper.self_and_descendants if not _is_concrete_below(each, self.mapper)]
        return tuple(dict.fromkeys(table for mapper in mappers for table in tables_of(mapper)))

    @cached_property
    def inherited(self) -> int:
        """How many of the tables are of base classes: without a row in the next one, there is no fact."""
        return len(tables_of(self.mapper)) - 1

    @property
    def table(self) -> Table:
        return self.tables[0]

    def check(self, mapper: Mapper[Any]) -> None:
        """Raise MemstateError when rows of *mapper*, a subclass, cannot be tracked along."""
        check_tables(mapper)
        if self.by_trigger:
            check_trigger_table(mapper, self.table)

    def tell_alembic(self) -> None:
        """Leave in the MetaData what autogenerate makes triggers from: `triggers.captured_in` finds it.

        Not in the Table's own ``info``, which Alembic prints into the migration that creates it.
        """
        if self.by_trigger:
            of_tables = self.table.metadata.info.setdefault(TRACKED, {})
            of_tables.setdefault(self.table.fullname, {})[self.entity] = (self.model, self.version)

    @property
    def expiry(self) -> tuple[str, ...]:
        return () if self.expires is None else (self.expires,)

    def forget(self) -> None:
        """Another subclass was mapped: work out anew what depends on the tables."""
        for name in (
            "tables",
            "attributes",
            "_names",
            "_attribute_columns",
            "_projected",
            "projected_columns",
            "rows",
            "criterion",
        ):
            self.__dict__.pop(name, None)
        self._columns.clear()
        self.hydrations.clear()

    def on(self, dialect: Dialect) -> TableColumns:
        """This class's statements and conversions for *dialect*."""
        # Keyed by name: dialect instances of one database differ only in what they learnt from their server.
        columns = self._columns.get(dialect.name)
        if columns is None:
            if len(self.tables) > 1:
                columns = JoinedColumns(self.tables, dialect, required=self.inherited)
            else:
                columns = TableColumns(self.table, dialect)
            self._columns[dialect.name] = columns
        return columns

    @cached_property
    def attributes(self) -> dict[str, str]:
        """Attribute name by the name of a column in an image."""
        return {self._names[column]: name for name, columns in self._attribute_columns.items() for column in columns}

    @cached_property
    def _names(self) -> dict[Column[Any], str]:
        """Each column's name in an image."""
        return {column: image_name(column, self.table) for table in self.tables for column in table.columns}

    @cached_property
    def _attribute_columns(self) -> dict[str, list[Column[Any]]]:
        """The columns behind each attribute of the class, and of the subclasses in its tables."""
        found: dict[str, list[Column[Any]]] = {}
        for mapper in self.mapper.self_and_descendants:
            for name, column in mapper.columns.items():
                if column in self._names and column not in (columns := found.setdefault(name, [])):
                    columns.append(column)
        return found

    def by_attribute(self, values: Mapping[str, Any]) -> dict[str, Any]:
        """Column values by attribute name."""
        return {self.attributes.get(name, name): value for name, value in values.items()}

    def upcast(self, image: Image, version: int, dialect: Dialect) -> Image:
        """An image of an older shape, of which *version* says which, in today's.

        What a function was given stays the driver's, whatever it is named now; what it made is as the ORM takes it.
        """
        if version >= self.version or not self.upgrade:
            return image
        stored = decode_image(image)
        given = {name: _COPIES.get(type(value), _same)(value) for name, value in stored.items()}
        values: Mapping[str, Any] = given
        for shape in range(version, self.version):
            if shape in self.upgrade:
                values = self.upgrade[shape](dict(values))
                if not isinstance(values, Mapping):
                    raise MemstateError(
                        f"upgrade[{shape}] of {self.entity} returned {values!r}: give a dict of columns"
                    )
        columns, sources = self.on(dialect), {id(value): name for name, value in given.items()}
        upgraded: dict[str, Any] = {}
        for name, value in values.items():
            source = name if isinstance(value, bool) else sources.get(id(value))
            if value is None:
                upgraded[name] = None
            elif source in given and given[source] is value:
                upgraded[name] = encode(stored[source])
            else:
                upgraded[name] = encode(columns.to_raw(name, value))
        return upgraded

    # -- what an index sees ----------------------------------------------------------------------------------------

    @cached_property
    def from_no_index(self) -> Tracked:
        """The same class, for an index that it does not go to: no row of it has a vector there."""
        return replace(self, text=None, metadata=(), text_version=1, withdrawn=True, hydrations={}, _columns={})

    @cached_property
    def projection(self) -> str:
        """What an index holds of each row, as JSON: with another one, every row has to be delivered again.

        Of a function it says only that there is one, and which `text_version`: nothing tells what a function does.
        """
        if self.text is None:
            return json.dumps({"text": None})
        columns = self.mapper.columns
        kinds = {
            name: type(columns[name].type).__name__ for name in (*_attributes_of(self.text), *self._sorted_metadata)
        }
        text = "a function" if callable(self.text) else {self.text: kinds[self.text]}
        metadata = {name: kinds[name] for name in self._sorted_metadata}
        return json.dumps({"text": text, "version": self.text_version, "metadata": metadata})

    @cached_property
    def _projected(self) -> tuple[str, ...]:
        if callable(self.text):
            configure_mappers()  # a process that only relays has loaded no instance yet
            return tuple(self._attribute_columns)
        return (*_attributes_of(self.text), *self.metadata)

    @cached_property
    def key_attributes(self) -> tuple[str, ...]:
        return tuple(self.attributes[column.name] for column in self.key_columns)

    @cached_property
    def key_columns(self) -> tuple[Column[Any], ...]:
        return tuple(self.table.primary_key.columns)

    @cached_property
    def _sorted_metadata(self) -> list[str]:
        """Whatever the order in which they are declared, the fingerprint is the same."""
        return sorted(self.metadata)

    @cached_property
    def criterion(self) -> ColumnElement[bool] | None:
        return inheritance_criterion(self.mapper)

    @cached_property
    def projected_columns(self) -> tuple[ColumnElement[Any], ...]:
        """What `project` needs, in its order, of a row of `rows`."""
        return tuple(self._projected_column(self._attribute_columns[name]) for name in self._projected)

    def _projected_column(self, columns: Sequence[Column[Any]]) -> ColumnElement[Any]:
        # Of the same name in several subclasses: a row is of one of them.
        only = len(columns) == 1 or columns[0].table in self.tables[: self.inherited + 1]
        return columns[0] if only else func.coalesce(*columns)

    @cached_property
    def rows(self) -> FromClause:
        """The tables that tell whether there is a row, and what an index should hold for it."""
        if not self.is_projected_of_many:
            return self.table
        rows: FromClause = self.table
        for position, table in enumerate(self.tables[1:], start=1):
            same = and_(*(a == b for a, b in zip(self.key_columns, table.primary_key.columns, strict=True)))
            if position <= self.inherited or callable(self.text):
                rows = rows.join(table, same, isouter=position > self.inherited)
        return rows

    @property
    def is_projected_of_many(self) -> bool:
        """Whether `rows` are of more than one table."""
        return self.inherited > 0 or (len(self.tables) > 1 and callable(self.text))

    def project(self, key: str, row: Sequence[Any], embedder: str) -> Projection:
        """What an index should hold for a row of `projected_columns`; *embedder* is the embedder's fingerprint."""
        values = dict(zip(self._projected, row, strict=True))
        text = self.text
        if text is not None:
            text = text(self._detached(values)) if callable(text) else values[text]
        if text is None or not str(text).strip():
            return Projection(key, None, {}, None, None)
        text = str(text)
        metadata = {
            name: value if type(value := values[name]) in _PLAIN else _scalar(value) for name in self._sorted_metadata
        }
        digest = _digest_of(embedder).copy()
        digest.update(_part(text))
        text_fingerprint = digest.hexdigest()
        digest.update(_part(as_json(metadata)))
        return Projection(key, text, metadata, digest.hexdigest(), text_fingerprint)

    def _detached(self, values: Mapping[str, Any]) -> Any:
        """A detached instance of the row: its own columns are loaded, touching anything else raises."""
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


def point_id(entity: str, key: str) -> str:
    """The id under which an index keeps a fact."""
    return entity + key


def split_point_id(point_id: str) -> tuple[str, str] | None:
    """(entity, key) of a point id, or None for a point that is not ours."""
    entity, bracket, rest = point_id.partition("[")
    return (entity, bracket + rest) if entity and rest.endswith("]") else None


def describe(
    model: type[Any],
    *,
    text: str | QueryableAttribute[Any] | Callable[[Any], str | None] | None,
    metadata: Sequence[str] = (),
    schema: Any = None,
    entity: str | None = None,
    indexes: tuple[str, ...] = (),
    unique_by: Sequence[str] | UniqueValues = (),
    immutable: bool | Callable[[Mapping[str, Any]], bool] = False,
    on_untracked: str = "raise",
    capture: str = "session",
    expires: str | None = None,
    version: int = 1,
    upgrade: Mapping[int, Upgrade] | None = None,
    text_version: int = 1,
) -> Tracked:
    """Check what `Memory.track` was asked for against the mapping. Raises MemstateError saying what does not fit."""
    try:
        mapper = inspect(model)
    except NoInspectionAvailable as error:
        raise MemstateError(f"{model!r} is not a mapped class; track() takes SQLAlchemy ORM models") from error
    if not isinstance(mapper, Mapper):
        raise MemstateError(f"{model!r} is not a mapped class; track() takes SQLAlchemy ORM models")
    _check_all_tables(mapper, by_trigger=capture == "trigger")
    source = _text_source(model, text, text_version)
    for option, given in (("metadata", metadata), ("unique_by", unique_by)):
        if isinstance(given, str):
            raise MemstateError(f"{option}={given!r}: give a tuple of column attributes, for example ({given!r},)")
    unique_names = () if callable(unique_by) else tuple(unique_by)
    _require_attributes(mapper, *_attributes_of(source), *metadata, *unique_names)
    if reserved := [name for name in metadata if name.startswith("memstate_")]:
        raise MemstateError(f"metadata={reserved[0]!r}: names that begin with memstate_ are ours in an index")
    if on_untracked not in ("raise", "warn"):
        raise MemstateError(f"on_untracked={on_untracked!r}: choose 'raise' or 'warn'")
    if capture not in ("session", "trigger"):
        raise MemstateError(f"capture={capture!r}: choose 'session' or 'trigger'")
    if capture == "trigger" and (unique_by or immutable):
        raise MemstateError(
            f"capture='trigger' sees {model.__name__} only once it is written: what must be unique or immutable there, "
            "a constraint of its table has to say"
        )
    if entity is not None and not isinstance(entity, str):
        raise MemstateError(f"entity={entity!r}: give a name, or leave it to be the table's")
    entity = str(entity if entity is not None else tables_of(mapper)[-1].fullname)  # not a quoted_name
    if not entity or "[" in entity or len(entity) > 128:
        raise MemstateError(f"entity={entity!r}: a name of 1 to 128 characters without '['")
    _check_expiry(mapper, expires)
    _check_shapes(version, upgrade or {})
    always = (lambda _values: True) if immutable is True else None
    return Tracked(
        model=model,
        entity=entity,
        text=source,
        metadata=tuple(metadata),
        validate=None if schema is None else validator(schema),
        indexes=indexes,
        unique_values=unique_by if callable(unique_by) else _unique_values(unique_names),
        immutable=immutable if callable(immutable) else always,
        on_untracked=on_untracked,
        by_trigger=capture == "trigger",
        unique_names=unique_names,
        expires=expires,
        version=version,
        upgrade=dict(upgrade or {}),
        text_version=text_version,
    )


def _text_source(model: type[Any], text: Any, text_version: Any) -> str | Callable[[Any], str | None] | None:
    """The name of the text's attribute, or the function that makes it; None where there is no text."""
    if isinstance(text_version, bool) or not isinstance(text_version, int):
        raise MemstateError(f"text_version={text_version!r}: give a whole number, another one for each other text=")
    if isinstance(text, QueryableAttribute) and issubclass(model, text.parent.class_):
        return str(text.key)
    if text is not None and not isinstance(text, str) and not callable(text):
        raise MemstateError(
            f"Cannot track {model.__name__} by text={text!r}: the text comes from one column or from a function. For "
            'several columns, give a function: text=lambda row: f"{row.title} {row.body}".'
        )
    source: str | Callable[[Any], str | None] | None = text
    return source


def _check_expiry(mapper: Mapper[Any], expires: str | None) -> None:
    if expires is None:
        return
    _require_attributes(mapper, expires)
    type_ = mapper.columns[expires].type
    if not isinstance(type_, (DateTime, UTCDateTime)):
        raise MemstateError(f"expires={expires!r}: its column holds no times, but {type_!r}")


def _check_shapes(version: int, upgrade: Mapping[int, Upgrade]) -> None:
    if isinstance(version, bool) or not isinstance(version, int) or not 1 <= version < 2**15:
        raise MemstateError(f"version={version!r}: a whole number from 1, one more for each change of shape")
    for shape, step in upgrade.items():
        if shape not in range(1, version) or not callable(step):
            raise MemstateError(
                f"upgrade={shape!r}: give {{n: function from the columns of version n to those of n + 1}}"
            )


def derive(base: Tracked, mapper: Mapper[Any]) -> Tracked:
    """As *base* is tracked, *mapper*, a concrete subclass: its rows are elsewhere, and keyed by themselves."""
    table = _check_all_tables(mapper, by_trigger=base.by_trigger)
    try:
        _require_attributes(mapper, *_attributes_of(base.text), *base.metadata, *base.unique_names, *base.expiry)
    except MemstateError as error:
        raise MemstateError(f"{error}: what {base.model.__name__} is tracked by") from error
    return replace(base, model=mapper.class_, entity=str(table.fullname), derived=True, hydrations={}, _columns={})


def _attributes_of(text: Any) -> tuple[str, ...]:
    """The attribute that is embedded, where it is one."""
    return () if text is None or callable(text) else (text,)


def _require_attributes(mapper: Mapper[Any], *names: str) -> None:
    columns = set(mapper.columns.keys())
    for name in names:
        if name not in columns:
            raise MemstateError(
                f"{mapper.class_.__name__} has no column attribute {name!r}; it has {', '.join(sorted(columns))}"
            )


def _unique_values(names: tuple[str, ...]) -> UniqueValues | None:
    if not names:
        return None

    def values(row: Mapping[str, Any]) -> Sequence[Any] | None:
        found = [row[name] for name in names]
        return None if None in found else found  # as in SQL, NULL equals nothing

    return values


def unique_value(tracked: Tracked, values: Mapping[str, Any]) -> str | None:
    """The row's entry in the table of unique values; None where it has none."""
    found = None if tracked.unique_values is None else tracked.unique_values(tracked.by_attribute(values))
    if found is None:
        return None
    value = encode_key(found)
    # It is a key of a B-tree, which on PostgreSQL takes about 2,700 bytes.
    return value if len(value) <= 500 else f"[{_digest_of(value).hexdigest()}]"


def inheritance_criterion(mapper: Mapper[Any]) -> ColumnElement[bool] | None:
    """Which rows of a table shared by single-table inheritance are of this class; None for all of them."""
    if mapper.polymorphic_on is None or not mapper.single:
        return None
    return mapper.polymorphic_on.in_([each.polymorphic_identity for each in mapper.self_and_descendants])


def tables_of(mapper: Mapper[Any]) -> tuple[Table, ...]:
    """The tables of which a row of exactly this class is made, that of the base class first."""
    above = tables_of(mapper.inherits) if mapper.inherits is not None and not mapper.concrete else ()
    table: Any = mapper.local_table  # check_tables() sees to it that it is one
    return above if table in above else (*above, table)


def image_name(column: Column[Any], root: Table) -> str:
    """What an image calls *column* of a class whose keys are those of *root*."""
    table = column.table
    return str(column.name if table is root else f"{table.fullname}.{column.name}")  # not a quoted_name


def _is_concrete_below(mapper: Mapper[Any], base: Mapper[Any]) -> bool:
    """Whether *mapper* has its rows elsewhere than *base*, from which it inherits."""
    while mapper is not base and mapper.inherits is not None:
        if mapper.concrete:
            return True
        mapper = mapper.inherits
    return False


def check_tables(mapper: Mapper[Any]) -> Table:
    """The table that the class has its keys from. Raises MemstateError when its rows cannot be told by them."""
    name = mapper.class_.__name__
    tables = tables_of(mapper)
    if not all(isinstance(table, Table) and table.primary_key.columns for table in tables):
        raise MemstateError(f"{name} is not mapped to a table with a primary key")
    if issubclass(mapper.class_, ConcreteBase) and not mapper.concrete:
        raise MemstateError(f"{name} is a union of tables (ConcreteBase): track its subclasses, or do without it")
    if mapper.single or len(tables) == 1:
        return tables[0]
    keys = [tuple(table.primary_key.columns) for table in tables]
    same = {frozenset((left, right)) for each in mapper.iterate_to_root() for left, right in _equated(each)}
    for above, below in pairwise(keys):
        if len(above) != len(below) or any(frozenset(pair) not in same for pair in zip(above, below, strict=True)):
            raise MemstateError(
                f"the tables of {name} are not joined by their primary keys, in the same order: it cannot be tracked"
            )
    return tables[0]


def _equated(mapper: Mapper[Any]) -> Iterator[tuple[Any, Any]]:
    """The pairs of columns by which a joined subclass' table is joined to that of its base class."""
    if mapper.inherit_condition is not None:
        for part in visitors.iterate(mapper.inherit_condition):
            if isinstance(part, BinaryExpression) and part.operator is operators.eq:
                yield part.left, part.right


def _check_all_tables(mapper: Mapper[Any], *, by_trigger: bool) -> Table:
    """The table of the keys of *mapper*, whose subclasses can be tracked along. Raises MemstateError otherwise."""
    table = check_tables(mapper)
    for each in mapper.self_and_descendants:
        if not _is_concrete_below(each, mapper):
            check_tables(each)
            if by_trigger:
                check_trigger_table(each, table)
    return table


def check_trigger_table(mapper: Mapper[Any], table: Table) -> None:
    """Raise MemstateError when a trigger on *table* would not see all of a row."""
    if tables_of(mapper) != (table,):
        raise MemstateError(
            f"{mapper.class_.__name__} is in several tables (joined inheritance), of which a trigger sees one: track "
            "it with capture='session'"
        )
