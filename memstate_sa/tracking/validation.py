"""Validation of facts: Pydantic models bound to tracked classes, and their errors as data."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, TypeAlias

from pydantic import AliasChoices, AliasPath, BaseModel, ValidationError

from memstate_sa.db.codec import is_text
from memstate_sa.errors import MemstateError, ValidationFailed

Validate: TypeAlias = Callable[[Mapping[str, Any]], None]
"""A function that raises pydantic.ValidationError when a fact may not have these values, by attribute name."""


def validator(schema: Any) -> Validate:
    """The check of a row by *schema*, which is a Pydantic model or a `Validate`.

    A model gets only the fields that it declares. Other columns are left out.
    """
    if isinstance(schema, type) and issubclass(schema, BaseModel):
        fields = field_names(schema)

        def check(values: Mapping[str, Any]) -> None:
            schema.model_validate({name: value for name, value in values.items() if name in fields})

        return check
    if callable(schema):
        return schema  # type: ignore[no-any-return]  # a callable must be a Validate
    raise MemstateError(f"schema={schema!r} is not a Pydantic model class. Give one.")


def field_names(schema: Any) -> set[str]:
    """The names under which *schema*, if it is a Pydantic model, reads a row."""
    if not (isinstance(schema, type) and issubclass(schema, BaseModel)):
        return set()
    names = set(schema.model_fields)
    for field in schema.model_fields:
        names.update(str(n.path[0]) if isinstance(n, AliasPath) else n for n in read_names(schema, field))
    return names


def read_names(model: type[BaseModel], field: str) -> tuple[str | AliasPath, ...]:
    """The names under which *model* reads a field, in the order in which it looks for them."""
    config, alias = model.model_config, model.model_fields[field].validation_alias
    if alias is None:
        return (field,)
    names = tuple(alias.choices) if isinstance(alias, AliasChoices) else (alias,)
    by_name = bool(config.get("populate_by_name") or config.get("validate_by_name"))
    return (names if config.get("validate_by_alias") is not False else ()) + (field,) * by_name


def to_validation_failed(
    subject: str, error: ValidationError, *, ignoring: frozenset[str] = frozenset()
) -> ValidationFailed | None:
    """*error* as ValidationFailed. None when all its errors are about fields in *ignoring*, which are not known yet."""
    # Leave out input and context, because they repeat the caller's data, and may not be JSON.
    errors = error.errors(include_url=False, include_input=False, include_context=False)
    errors = [item for item in errors if not (item["loc"] and item["loc"][0] in ignoring)]
    if not errors:
        return None
    where = "; ".join(f"{'.'.join(map(str, item['loc'])) or 'value'}: {item['msg']}" for item in errors[:3])
    return ValidationFailed(f"Cannot save this {subject}: {where}", errors=errors)


def require_count(name: str, value: Any, meaning: str) -> None:
    """Raise MemstateError unless *value* is an int of at least 1."""
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise MemstateError(f"{name}={value!r} must be a whole number: {meaning}.")


def require_label(name: str, value: Any) -> None:
    """Raise MemstateError unless *value* is None, or text that both databases can hold."""
    if value is not None and not is_text(value):
        raise MemstateError(f"{name}={value!r} is not valid. Give a string without NUL or lone surrogates.")
