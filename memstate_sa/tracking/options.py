"""`describe`: the options of `Memory.track`, checked and turned into a `Tracked`."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import replace
from typing import Any

from sqlalchemy import (
    Column,
    DateTime,
    inspect,
)
from sqlalchemy.exc import NoInspectionAvailable
from sqlalchemy.orm import (
    Mapper,
    QueryableAttribute,
)

from memstate_sa.db.tables import UTCDateTime
from memstate_sa.errors import MemstateError
from memstate_sa.tracking.inheritance import check_all_tables, tables_of
from memstate_sa.tracking.tracked import Tracked, UniqueValues, Upgrade, attributes_of
from memstate_sa.tracking.validation import field_names, validator


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
    exclude: Sequence[str] = (),
) -> Tracked:
    """Check what `Memory.track` was asked for against the mapping. Raises MemstateError saying what does not fit."""
    try:
        mapper = inspect(model)
    except NoInspectionAvailable as error:
        raise MemstateError(f"{model!r} is not a mapped class; track() takes SQLAlchemy ORM models") from error
    if not isinstance(mapper, Mapper):
        raise MemstateError(f"{model!r} is not a mapped class; track() takes SQLAlchemy ORM models")
    check_all_tables(mapper, by_trigger=capture == "trigger")
    source = _text_source(model, text, text_version)
    for option, names in (("metadata", metadata), ("unique_by", unique_by), ("exclude", exclude)):
        if isinstance(names, str):
            raise MemstateError(f"{option}={names!r}: give a tuple of column attributes, for example ({names!r},)")
    unique_names = () if callable(unique_by) else tuple(unique_by)
    require_attributes(mapper, *attributes_of(source), *metadata, *unique_names)
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
    needed = {
        "text": attributes_of(source),
        "metadata": metadata,
        "unique_by": unique_names,
        "expires": (expires,),
        "schema": field_names(schema),
    }
    _check_excluded(mapper, exclude, needed)
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
        exclude=tuple(exclude),
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
    require_attributes(mapper, expires)
    type_ = mapper.columns[expires].type
    if not isinstance(type_, (DateTime, UTCDateTime)):
        raise MemstateError(f"expires={expires!r}: its column holds no times, but {type_!r}")


def _check_excluded(mapper: Mapper[Any], exclude: Sequence[str], needed: Mapping[str, Collection[str | None]]) -> None:
    """Refuse to leave out of the log what it, an index or the mapper needs."""
    mappers = list(mapper.self_and_descendants)
    mapped: dict[str, set[Any]] = {
        "the primary key": {column for each in mappers for table in tables_of(each) for column in table.primary_key},
        "polymorphic_on": {each.polymorphic_on for each in mappers},
        "version_id_col": {each.version_id_col for each in mappers},
    }
    for name in exclude:
        columns = {each.columns[name] for each in mappers if name in each.columns}
        if not columns or not all(isinstance(column, Column) for column in columns):
            require_attributes(mapper, name)
        users = [option for option, names in needed.items() if name in names]
        users += [option for option, its in mapped.items() if columns & its]
        if users:
            raise MemstateError(
                f"Cannot exclude {mapper.class_.__name__}.{name}: {users[0]} needs it. Take it out of exclude=."
            )


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
    table = check_all_tables(mapper, by_trigger=base.by_trigger)
    try:
        require_attributes(mapper, *attributes_of(base.text), *base.metadata, *base.unique_names, *base.expiry)
    except MemstateError as error:
        raise MemstateError(f"{error}: what {base.model.__name__} is tracked by") from error
    entity, exclude = str(table.fullname), tuple(name for name in base.exclude if name in mapper.columns)
    model: type[Any] = mapper.class_
    return replace(base, model=model, entity=entity, derived=True, exclude=exclude, hydrations={}, _columns={})


def require_attributes(mapper: Mapper[Any], *names: str) -> None:
    # A column_property of an expression is among the mapper's columns.
    columns = {name for name, column in mapper.columns.items() if isinstance(column, Column)}
    for name in names:
        if name not in columns:
            raise MemstateError(
                f"{mapper.class_.__name__} has no column attribute {name!r}; it has {', '.join(sorted(columns))}"
            )


def _unique_values(names: tuple[str, ...]) -> UniqueValues | None:
    if not names:
        return None

    def values(row: Mapping[str, Any]) -> Sequence[Any] | None:
        unique = [row[name] for name in names]
        return None if None in unique else unique  # as in SQL, NULL equals nothing

    return values
