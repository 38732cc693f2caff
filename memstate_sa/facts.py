"""`Fact`, the ready-made model, and what `Memory.track` records about a mapped class."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import date, datetime, time
from enum import Enum
from functools import cached_property, lru_cache
from typing import Any, NamedTuple
from uuid import uuid4

from sqlalchemy import Boolean, Column, ColumnElement, Select, String, Table, Text, inspect, select
from sqlalchemy.engine import Dialect
from sqlalchemy.exc import NoInspectionAvailable
from sqlalchemy.orm import (
    DeclarativeBase,
    Mapped,
    Mapper,
    configure_mappers,
    make_transient_to_detached,
    mapped_column,
)
from sqlalchemy.orm.attributes import set_committed_value

from memstate_sa.arrays import as_json
from memstate_sa.codec import encode, encode_key
from memstate_sa.columns import TableColumns
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


UniqueValues = Callable[[Mapping[str, Any]], Sequence[Any] | None]


@dataclass(frozen=True, eq=False)
class Tracked:
    """One tracked class: where its rows are, which of their columns an index sees, what may be written."""

    model: type[Any]
    entity: str
    text: str | Callable[[Any], str | None]
    metadata: tuple[str, ...] = ()
    validate: Validate | None = None
    indexes: tuple[str, ...] = ()
    unique_values: UniqueValues | None = None
    immutable: Callable[[Mapping[str, Any]], bool] | None = None
    on_untracked: str = "raise"
    by_trigger: bool = False
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
    def table(self) -> Table:
        table = self.mapper.local_table
        assert isinstance(table, Table)
        return table

    def on(self, dialect: Dialect) -> TableColumns:
        """This table's statements and conversions for *dialect*."""
        # Keyed by name: dialect instances of one database differ only in what they learnt from their server.
        columns = self._columns.get(dialect.name)
        if columns is None:
            columns = self._columns[dialect.name] = TableColumns(self.table, dialect)
        return columns

    @cached_property
    def attributes(self) -> dict[str, str]:
        """Attribute name by column name."""
        return {column.name: key for key, column in self.mapper.columns.items() if column.table is self.table}

    def by_attribute(self, values: Mapping[str, Any]) -> dict[str, Any]:
        """Column values by attribute name."""
        return {self.attributes.get(name, name): value for name, value in values.items()}

    # -- what an index sees ----------------------------------------------------------------------------------------

    @cached_property
    def _projected(self) -> tuple[str, ...]:
        if callable(self.text):
            configure_mappers()  # a process that only relays has loaded no instance yet
            return tuple(self.attributes.values())
        return (self.text, *self.metadata)

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
    def projected_columns(self) -> tuple[Column[Any], ...]:
        """The columns that `project` needs, in its order."""
        columns = self.mapper.columns
        return tuple(columns[name] for name in self._projected)

    def project(self, key: str, row: Sequence[Any], embedder: str) -> Projection:
        """What an index should hold for a row of `projected_columns`; *embedder* is the embedder's fingerprint."""
        values = dict(zip(self._projected, row, strict=True))
        text = self.text(self._detached(values)) if callable(self.text) else values[self.text]
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
            discriminator = values.get(self.attributes[mapper.polymorphic_on.name])
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
    text: str | Callable[[Any], str | None],
    metadata: Sequence[str] = (),
    schema: Any = None,
    entity: str | None = None,
    indexes: tuple[str, ...] = (),
    unique_by: Sequence[str] | UniqueValues = (),
    immutable: bool | Callable[[Mapping[str, Any]], bool] = False,
    on_untracked: str = "raise",
    capture: str = "session",
) -> Tracked:
    """Check what `Memory.track` was asked for against the mapping. Raises MemstateError saying what does not fit."""
    try:
        mapper = inspect(model)
    except NoInspectionAvailable as error:
        raise MemstateError(f"{model!r} is not a mapped class; track() takes SQLAlchemy ORM models") from error
    if not isinstance(mapper, Mapper):
        raise MemstateError(f"{model!r} is not a mapped class; track() takes SQLAlchemy ORM models")
    table = check_single_table(mapper, mapper.local_table)
    for option, given in (("metadata", metadata), ("unique_by", unique_by)):
        if isinstance(given, str):
            raise MemstateError(f"{option}={given!r}: give a tuple of column attributes, for example ({given!r},)")
    unique_names = () if callable(unique_by) else tuple(unique_by)
    columns = set(mapper.columns.keys())
    for name in (*(() if callable(text) else (text,)), *metadata, *unique_names):
        if name not in columns:
            raise MemstateError(
                f"{model.__name__} has no column attribute {name!r}; it has {', '.join(sorted(columns))}"
            )
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
    entity = str(entity if entity is not None else table.fullname)  # not a quoted_name
    if not entity or "[" in entity or len(entity) > 128:
        raise MemstateError(f"entity={entity!r}: a name of 1 to 128 characters without '['")
    always = (lambda _values: True) if immutable is True else None
    return Tracked(
        model=model,
        entity=entity,
        text=text,
        metadata=tuple(metadata),
        validate=None if schema is None else validator(schema),
        indexes=indexes,
        unique_values=unique_by if callable(unique_by) else _unique_values(unique_names),
        immutable=immutable if callable(immutable) else always,
        on_untracked=on_untracked,
        by_trigger=capture == "trigger",
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
    if mapper.polymorphic_on is None or mapper.inherits is None:
        return None
    return mapper.polymorphic_on.in_([each.polymorphic_identity for each in mapper.self_and_descendants])


def check_single_table(mapper: Mapper[Any], table: Any) -> Table:
    """*table*, when all of the class is in it. Raises MemstateError otherwise."""
    if not isinstance(table, Table) or not table.primary_key.columns:
        raise MemstateError(f"{mapper.class_.__name__} is not mapped to a table with a primary key")
    if mapper.persist_selectable is not table:
        raise MemstateError(
            f"{mapper.class_.__name__} is mapped to several tables (joined or concrete inheritance), which cannot be "
            "tracked; single-table inheritance can"
        )
    return table
