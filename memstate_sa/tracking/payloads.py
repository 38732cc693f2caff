"""JSON payloads of facts: converted, checked, compared and shown as text."""

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
"""An error names so many keys at most: a payload may contain itself."""
_LONGEST_UNIQUE_TEXT = 200


def invalid(field: str, message: str) -> ValidationFailed:
    """The error of a fact whose *field* is not valid."""
    errors = [{"type": "value_error", "loc": (field,), "msg": message}]
    return ValidationFailed(f"Fact may not be remembered: {field}: {message}", errors=errors)


# -- conversion -------------------------------------------------------------------------------------------------------


def json_payload(payload: Any) -> Any:
    """*payload* as JSON holds it, by the rules of Pydantic's JSON mode: a date is its ISO text, an enum its value."""
    try:
        return to_jsonable_python(payload)
    except _NOT_JSON as error:
        raise _not_json(payload, to_jsonable_python) from error


def payload_of(model: BaseModel) -> Any:
    """*model* as JSON, under the names by which its class reads it: those of a dump may be others.

    Raises ValidationFailed when the class would read something else.
    """
    kind = type(model)
    dumped = model.model_dump(mode="json", by_alias=True, round_trip=True)
    payload = dumped
    if isinstance(dumped, dict):  # no RootModel, and no serializer that makes something else of it
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
        raise invalid(field, f"{kind.__name__} reads it back as something else: by another name, or by its validators")
    return payload


def text_of(payload: Mapping[str, Any]) -> str:
    """The payload as one line a field, without the braces and quotes that carry no meaning."""
    return "\n".join(f"{name}: {_flat(value)}" for name, value in payload.items() if value is not None)


def _flat(value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{name} {_flat(item)}" for name, item in value.items() if item is not None)
    if isinstance(value, list):
        return ", ".join(map(_flat, value))
    return str(value)


# -- checks -----------------------------------------------------------------------------------------------------------


def check_payload(payload: Any) -> None:
    """Raise ValidationFailed unless both databases hold *payload*.

    PostgreSQL's JSONB takes neither NUL, lone surrogates nor NaN; SQLite would.
    """
    if not isinstance(payload, dict):
        raise invalid("payload", "a JSON object")
    try:
        text = _json_text(payload)
    except _NOT_JSON as error:
        raise _not_json(payload, _json_text) from error
    if "\\u0000" in text and "\x00" in _strings(payload):
        raise invalid("payload", "contains a NUL character, which JSONB cannot hold")


def filter_value(name: str, value: Any) -> str | int | float | bool | None:
    """The value of a filter, as a payload holds it. Raises MemstateError when no payload can hold it."""
    try:
        if not isinstance(value, bytes):
            value = to_jsonable_python(value)
    except _NOT_JSON as error:
        raise MemstateError(f"filter {name}={value!r}: a {type(value).__name__} is no JSON value") from error
    if value is not None and not isinstance(value, (str, bool, int, float)):
        raise MemstateError(f"filter {name}={value!r}: give a string, number, boolean or None")
    if not is_text(name) or (isinstance(value, str) and not is_text(value)):
        raise MemstateError(f"filter {name!r}: {value!r}: no payload holds NUL or lone surrogates")
    if isinstance(value, float) and not math.isfinite(value):
        raise MemstateError(f"filter {name}={value!r}: no payload holds that")
    return value


def _strings(value: Any) -> str:
    if isinstance(value, dict):
        return "".join(str(name) + _strings(item) for name, item in value.items())
    return "".join(map(_strings, value)) if isinstance(value, (list, tuple)) else str(value)


def _json_text(payload: Any) -> str:
    """*payload* as text that both databases take. PostgreSQL's JSONB takes no lone surrogates and no NaN."""
    text = json.dumps(payload, ensure_ascii=False, allow_nan=False)
    text.encode()
    return text


def _not_json(value: Any, convert: Callable[[Any], Any], *path: Any) -> ValidationFailed:
    """The error that names the innermost value that *convert* refuses, by its keys and its type."""
    parts: Any = value.items() if isinstance(value, Mapping) else ()
    if isinstance(value, (list, tuple)):
        parts = enumerate(value)
    for name, part in parts:
        if len(path) < _DEEPEST and not _converts(part, convert):
            return _not_json(part, convert, *path, name)
    kind = type(value)
    type_name = kind.__name__ if kind.__module__ == "builtins" else f"{kind.__module__}.{kind.__name__}"
    where = ".".join(map(str, path)) or "it"
    return invalid("payload", f"not JSON: {where} is a {type_name}; give what Pydantic's JSON mode takes")


def _converts(value: Any, convert: Callable[[Any], Any]) -> bool:
    try:
        convert(value)
    except _NOT_JSON:
        return False
    return True


# -- comparison -------------------------------------------------------------------------------------------------------


def canonical_text(value: Any) -> str:
    """Equal JSON values as equal text: JSONB gives 1e16 back as an int, and names in another order."""
    return json.dumps(json.loads(json.dumps(value), parse_float=_number), sort_keys=True)


def unique_text(value: Any) -> str:
    """The `canonical_text` of a value. A digest stands for a long one, as the text is indexed."""
    text = canonical_text(value)
    if len(text) <= _LONGEST_UNIQUE_TEXT:
        return text
    return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()


def _number(text: str) -> int | float:
    number = Decimal(text)
    return int(number) if number == number.to_integral_value() else float(text)
