"""`describe`: check the options of `Memory.track`, and make a `Tracked` of them."""

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
from memstate_sa.options import TrackOptions
from memstate_sa.tracking.inheritance import check_all_tables, tables_of
from memstate_sa.tracking.tracked import Tracked, UniqueValues, Upgrade, attributes_of
from memstate_sa.tracking.validation import field_names, validator


def describe(model: type[Any], text: Any, indexes: Sequence[str], options: TrackOptions) -> Tracked:
    """The `Tracked` of *model*. Raises MemstateError for an option that does not fit the mapping."""
    mapper = _mapper_of(model)
    by_trigger = _choice(options, "capture", "session", "trigger") == "trigger"
    check_all_tables(mapper, by_trigger=by_trigger)
    version, upgrade = options.get("version", 1), options.get("upgrade") or {}
    text_version = options.get("text_version", 1)
    source = _text_source(model, text, text_version)
    metadata, exclude = _attribute_names(options, "metadata"), _attribute_names(options, "exclude")
    unique_by: Any = options.get("unique_by", ())
    unique_names = () if callable(unique_by) else _attribute_names(options, "unique_by")
    require_attributes(mapper, *attributes_of(source), *metadata, *unique_names)
    if reserved := [name for name in metadata if name.startswith("memstate_")]:
        raise MemstateError(
            f"Cannot use metadata={reserved[0]!r}: names that begin with memstate_ are ours in an index. Rename the "
            "attribute."
        )
    on_untracked = _choice(options, "on_untracked", "raise", "warn")
    immutable = options.get("immutable", False)
    if by_trigger and (unique_by or immutable):
        raise MemstateError(
            f"Cannot use unique_by= or immutable= for {model.__name__} with capture='trigger': triggers run after the "
            "write. Give the table a constraint instead."
        )
    schema, expires = options.get("schema"), options.get("expires")
    _check_expiry(mapper, expires)
    users = {
        "text": attributes_of(source),
        "metadata": metadata,
        "unique_by": unique_names,
        "expires": (expires,),
        "schema": field_names(schema),
    }
    _check_excluded(mapper, exclude, users)
    _check_shapes(version, upgrade)
    always = (lambda _values: True) if immutable is True else None
    return Tracked(
        model=model,
        entity=_entity(mapper, options.get("entity")),
        text=source,
        metadata=metadata,
        validate=None if schema is None else validator(schema),
        indexes=tuple(indexes),
        unique_values=unique_by if callable(unique_by) else _unique_values(unique_names),
        immutable=immutable if callable(immutable) else always,
        on_untracked=on_untracked,
        by_trigger=by_trigger,
        unique_names=unique_names,
        expires=expires,
        version=version,
        upgrade=dict(upgrade),
        text_version=text_version,
        exclude=exclude,
    )


def _mapper_of(model: Any) -> Mapper[Any]:
    try:
        mapper = inspect(model)
    except NoInspectionAvailable:
        mapper = None
    if not isinstance(mapper, Mapper):
        raise MemstateError(f"Cannot track {model!r}: it is not a mapped class. Give a SQLAlchemy ORM model.")
    return mapper


def _choice(options: TrackOptions, name: str, default: str, other: str) -> str:
    value: Any = options.get(name, default)
    if value not in (default, other):
        raise MemstateError(f"Cannot use {name}={value!r}. Choose {default!r} or {other!r}.")
    return str(value)


def _attribute_names(options: TrackOptions, option: str) -> tuple[str, ...]:
    names: Any = options.get(option, ())
    if isinstance(names, str):
        raise MemstateError(
            f"Cannot use {option}={names!r}: it is a string. Give a tuple of attributes, for example ({names!r},)."
        )
    return tuple(names)


def _entity(mapper: Mapper[Any], entity: Any) -> str:
    name = tables_of(mapper)[-1].fullname if entity is None else entity
    if not isinstance(name, str) or not name or "[" in name or len(name) > 128:
        raise MemstateError(
            f"Cannot use entity={entity!r}. Give a name of 1 to 128 characters without '[', or leave it out to "
            "use the table's name."
        )
    return str(name)  # a table's name may be a quoted_name


def _text_source(model: type[Any], text: Any, text_version: Any) -> str | Callable[[Any], str | None] | None:
    """The name of the text's attribute, or the function that makes it; None where there is no text."""
    if isinstance(text_version, bool) or not isinstance(text_version, int):
        raise MemstateError(f"Cannot use text_version={text_version!r}. Give a whole number, and change it with text=.")
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
        raise MemstateError(
            f"Cannot use expires={expires!r}: its column holds no times, but {type_!r}. Give a DateTime column."
        )


def _check_excluded(mapper: Mapper[Any], exclude: Sequence[str], needed: Mapping[str, Collection[str | None]]) -> None:
    """Raise MemstateError for an excluded attribute that the log, an index or the mapper needs."""
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
        raise MemstateError(f"Cannot use version={version!r}. Give a whole number from 1 to {2**15 - 1}.")
    for shape, step in upgrade.items():
        if shape not in range(1, version) or not callable(step):
            raise MemstateError(
                f"Cannot use upgrade={shape!r}. Give a dict: each version before {version}, and a function from its "
                "columns to the columns of the next version."
            )


def derive(base: Tracked, mapper: Mapper[Any]) -> Tracked:
    """The `Tracked` of *mapper*, a concrete subclass of *base*: it has its own table and keys, and the same options."""
    table = check_all_tables(mapper, by_trigger=base.by_trigger)
    try:
        require_attributes(mapper, *attributes_of(base.text), *base.metadata, *base.unique_names, *base.expiry)
    except MemstateError as error:
        raise MemstateError(f"{error} The options of {base.model.__name__} hold for its subclasses, too.") from error
    entity, exclude = str(table.fullname), tuple(name for name in base.exclude if name in mapper.columns)
    model: type[Any] = mapper.class_
    return replace(base, model=model, entity=entity, derived=True, exclude=exclude, hydrations={}, _columns={})


def require_attributes(mapper: Mapper[Any], *names: str) -> None:
    # The mapper's columns contain column_property expressions too.
    columns = {name for name, column in mapper.columns.items() if isinstance(column, Column)}
    for name in names:
        if name not in columns:
            raise MemstateError(
                f"{mapper.class_.__name__} has no column attribute {name!r}. Choose from: {', '.join(sorted(columns))}."
            )


def _unique_values(names: tuple[str, ...]) -> UniqueValues | None:
    if not names:
        return None

    def values(row: Mapping[str, Any]) -> Sequence[Any] | None:
        unique = [row[name] for name in names]
        return None if None in unique else unique  # as in SQL, NULL equals nothing

    return values
