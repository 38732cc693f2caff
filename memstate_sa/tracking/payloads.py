"""JSON payloads of facts: conversion, checks, comparison and text."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Mapping
from decimal import Decimal
from typing import Any

from pydantic import BaseModel, ValidationError
from pydantic_core import to_jsonable_python

from memstate_sa.db.codec import is_text
from memstate_sa.errors import MemstateError, ValidationFailed
from memstate_sa.tracking.validation import read_names, to_validation_failed

_NOT_JSON = (TypeError, ValueError, RecursionError)
_DEEPEST = 20
"""The most keys that an error names. A payload may contain itself, so there must be a limit."""
_LONGEST_UNIQUE_TEXT = 200


def invalid(field: str, message: str) -> ValidationFailed:
    """The error of a fact whose *field* is not valid."""
    errors = [{"type": "value_error", "loc": (field,), "msg": message}]
    return ValidationFailed(f"Cannot save this Fact: {field}: {message}", errors=errors)


# -- conversion -------------------------------------------------------------------------------------------------------


def json_payload(payload: Any) -> Any:
    """*payload* as plain JSON, by Pydantic's JSON mode: a date becomes its ISO text, and an enum its value."""
    try:
        return to_jsonable_python(payload)
    except _NOT_JSON as error:
        raise _not_json(payload, to_jsonable_python) from error


def payload_of(model: BaseModel) -> Any:
    """*model* as JSON with the field names that its class reads, which may differ from those of a dump.

    Raises ValidationFailed if the class would read another value from this JSON.
    """
    kind = type(model)
    dumped = model.model_dump(mode="json", by_alias=True, round_trip=True)
    payload = dumped
    if isinstance(dumped, dict):  # a RootModel or a serializer may give another type
        names = {
            info.serialization_alias or name: next((n for n in read_names(kind, name) if isinstance(n, str)), name)
            for name, info in kind.model_fields.items()
        }
        payload = {names.get(name, name): value for name, value in dumped.items()}
    try:
        read = kind.model_validate(payload)
    except ValidationError as error:
        raise to_validation_failed("Fact", error) or ValidationFailed() from error
    if read.model_dump(mode="json", by_alias=True, round_trip=True) != dumped:
        field = next((name for name in kind.model_fields if getattr(read, name) != getattr(model, name)), "payload")
        raise invalid(
            field,
            f"{kind.__name__} does not read back the value that it wrote. Check the field's aliases and validators.",
        )
    return payload


def text_of(payload: Mapping[str, Any]) -> str:
    """The payload as text, one line per field, without braces and quotes."""
    return "\n".join(f"{name}: {_flat(value)}" for name, value in payload.items() if value is not None)


def _flat(value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{name} {_flat(item)}" for name, item in value.items() if item is not None)
    if isinstance(value, list):
        return ", ".join(map(_flat, value))
    return str(value)


# -- checks -----------------------------------------------------------------------------------------------------------


def check_payload(payload: Any) -> None:
    """Raise ValidationFailed unless both databases can hold *payload*.

    SQLite accepts NUL, lone surrogates and NaN, but PostgreSQL's JSONB does not.
    """
    if not isinstance(payload, dict):
        raise invalid("payload", f"It must be a JSON object, not a {type(payload).__name__}.")
    try:
        text = _json_text(payload)
    except _NOT_JSON as error:
        raise _not_json(payload, _json_text) from error
    if "\\u0000" in text and "\x00" in _strings(payload):
        raise invalid("payload", "It contains a NUL character, which PostgreSQL's JSONB cannot hold. Remove it.")


def filter_value(name: str, value: Any) -> str | int | float | bool | None:
    """The value of a filter, as a payload holds it. Raises MemstateError when no payload can hold it."""
    try:
        if not isinstance(value, bytes):
            value = to_jsonable_python(value)
    except _NOT_JSON as error:
        raise MemstateError(
            f"Cannot filter by {name}={value!r}: a {type(value).__name__} is not a JSON value. Give a string, number, "
            "boolean or None."
        ) from error
    if value is not None and not isinstance(value, (str, bool, int, float)):
        raise MemstateError(f"Cannot filter by {name}={value!r}. Give a string, number, boolean or None.")
    if not is_text(name) or (isinstance(value, str) and not is_text(value)):
        raise MemstateError(f"Cannot filter by {name}={value!r}. Give strings without NUL or lone surrogates.")
    if isinstance(value, float) and not math.isfinite(value):
        raise MemstateError(f"Cannot filter by {name}={value!r}. Give a finite number.")
    return value


def _strings(value: Any) -> str:
    if isinstance(value, dict):
        return "".join(str(name) + _strings(item) for name, item in value.items())
    return "".join(map(_strings, value)) if isinstance(value, (list, tuple)) else str(value)


def _json_text(payload: Any) -> str:
    """*payload* as JSON text for both databases. Raises for lone surrogates and NaN, which JSONB refuses."""
    text = json.dumps(payload, ensure_ascii=False, allow_nan=False)
    text.encode()
    return text


def _not_json(value: Any, convert: Callable[[Any], Any], *path: Any) -> ValidationFailed:
    """The error that names the innermost value refused by *convert*, with its keys and its type."""
    parts: Any = value.items() if isinstance(value, Mapping) else ()
    if isinstance(value, (list, tuple)):
        parts = enumerate(value)
    for name, part in parts:
        if len(path) < _DEEPEST and not _converts(part, convert):
            return _not_json(part, convert, *path, name)
    kind = type(value)
    type_name = kind.__name__ if kind.__module__ == "builtins" else f"{kind.__module__}.{kind.__name__}"
    where = ".".join(map(str, path)) or "it"
    return invalid("payload", f"Not JSON: {where} is a {type_name}. Give a value that Pydantic's JSON mode accepts.")


def _converts(value: Any, convert: Callable[[Any], Any]) -> bool:
    try:
        convert(value)
    except _NOT_JSON:
        return False
    return True


# -- comparison -------------------------------------------------------------------------------------------------------


def canonical_text(value: Any) -> str:
    """JSON text that is the same for equal values. JSONB returns 1e16 as an int, and names in another order."""
    return json.dumps(json.loads(json.dumps(value), parse_float=_number), sort_keys=True)


def unique_text(value: Any) -> str:
    """The `canonical_text` of a value, or a digest if it is long, because the database indexes it."""
    text = canonical_text(value)
    if len(text) <= _LONGEST_UNIQUE_TEXT:
        return text
    return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()


def _number(text: str) -> int | float:
    number = Decimal(text)
    return int(number) if number == number.to_integral_value() else float(text)
