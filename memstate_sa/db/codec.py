"""Stored column values as JSON and back, exactly.

Images and keys hold the values that the *driver* reads, so that no user type runs during capture. JSONB refuses NUL in
strings, does not know NaN, and rewrites floats. Such values get a tag: ``{"$bytes": "…"}``.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from datetime import UTC, date, datetime, time, timedelta
from decimal import Decimal
from typing import Any, TypeAlias, TypeGuard
from uuid import UUID

Image: TypeAlias = Mapping[str, Any]
"""A row: encoded column values by column name."""
FactKey: TypeAlias = tuple[str, str]
"""(entity, canonical key)"""


def by_entity(facts: Iterable[FactKey]) -> dict[str, list[str]]:
    """The keys of *facts*, by entity."""
    groups: dict[str, list[str]] = {}
    for entity, key in facts:
        groups.setdefault(entity, []).append(key)
    return groups


def _datetime(value: datetime) -> dict[str, str]:
    # The offset of an aware value depends on the connection that read it. The database stores only the instant.
    return {"$datetime": (value if value.tzinfo is None else value.astimezone(UTC)).isoformat()}


def _float(value: float) -> float | dict[str, str]:
    # JSONB stores numbers as numeric: 1e300 comes back as an int, -0.0 as 0.0, and NaN is refused.
    if math.isfinite(value) and 1e-4 <= abs(value) < 1e15:
        return value
    return {"$float": repr(value)}


def _str(value: str) -> str | dict[str, str]:
    if value.isprintable() or is_text(value):
        return value
    return {"$text": value.encode("utf-8", "surrogatepass").hex()}


def is_text(value: Any) -> TypeGuard[str]:
    """Whether every database can store *value* in a text column: a string without NUL and lone surrogates."""
    if not isinstance(value, str) or "\x00" in value:
        return False
    return value.isascii() or not any("\ud800" <= char <= "\udfff" for char in value)


_TAGGERS: dict[type, Callable[[Any], Any]] = {
    type(None): lambda value: value,
    bool: lambda value: value,
    int: lambda value: value,
    str: _str,
    float: _float,
    bytes: lambda value: {"$bytes": value.hex()},  # hex, because triggers on both databases can write it
    memoryview: lambda value: {"$bytes": value.hex()},
    Decimal: lambda value: {"$decimal": str(value)},
    UUID: lambda value: {"$uuid": value.hex},
    datetime: _datetime,
    date: lambda value: {"$date": value.isoformat()},
    time: lambda value: {"$time": value.isoformat()},
    timedelta: lambda value: {"$timedelta": [value.days, value.seconds, value.microseconds]},
    list: lambda value: [encode(item) for item in value],
    tuple: lambda value: [encode(item) for item in value],
    dict: lambda value: {"$dict": [[key, encode(item)] for key, item in value.items()]},
}

_READERS: dict[str, Callable[[Any], Any]] = {
    "$text": lambda data: bytes.fromhex(data).decode("utf-8", "surrogatepass"),
    "$float": float,
    "$bytes": bytes.fromhex,
    "$decimal": Decimal,
    "$uuid": UUID,
    "$datetime": datetime.fromisoformat,
    "$date": date.fromisoformat,
    "$time": time.fromisoformat,
    "$timedelta": lambda data: timedelta(*data),
    "$dict": lambda data: {key: decode(item) for key, item in data},
}


to_json = json.JSONEncoder(ensure_ascii=False, separators=(",", ":")).encode
"""Writes JSON in the canonical form, so that equal keys are equal texts."""


def encode(value: Any) -> Any:
    """*value* as JSON. Raises TypeError for an unknown Python type."""
    tagger = _TAGGERS.get(type(value))
    if tagger is None:
        tagger = next((_TAGGERS[base] for base in type(value).__mro__ if base in _TAGGERS), None)
        if tagger is None:
            raise TypeError(f"The log cannot hold a {type(value).__name__}.")
    return tagger(value)


def decode(data: Any) -> Any:
    """The value that `encode` encoded."""
    if isinstance(data, dict):
        ((tag, inner),) = data.items()
        return _READERS[tag](inner)
    if isinstance(data, list):
        return [decode(item) for item in data]
    return data


def encode_image(names: Sequence[str], values: Iterable[Any]) -> dict[str, Any]:
    """The image of a row with these *names* and *values*."""
    return {
        name: value
        if (kind := type(value)) is int or value is None or (kind is str and value.isprintable())
        else encode(value)
        for name, value in zip(names, values, strict=True)
    }


def decode_image(image: Mapping[str, Any]) -> dict[str, Any]:
    return {name: decode(data) for name, data in image.items()}


def encode_key(values: Sequence[Any]) -> str:
    """The canonical text of primary key values. It identifies a fact in all our tables."""
    if len(values) == 1 and type(values[0]) is int:
        return f"[{values[0]}]"
    return to_json([encode(value) for value in values])


def decode_key(key: str) -> tuple[Any, ...]:
    if key[1:-1].isdecimal() and key.isascii() and key[0] + key[-1] == "[]":
        return (int(key[1:-1]),)
    values = json.loads(key)
    if not isinstance(values, list):
        raise ValueError("A key must be a JSON array.")  # noqa: TRY004  # json.loads raises a ValueError too
    return tuple(map(decode, values))


def decoded(key: str) -> tuple[Any, ...] | None:
    """The values of *key*, or None when the text is not a key."""
    try:
        return decode_key(key)
    except (ValueError, TypeError, AttributeError, LookupError, ArithmeticError, RecursionError):
        return None


def normalized(data: Any) -> Any:
    """An encoded value in the form of `encode`. Databases write floats differently."""
    return encode(decode(data)) if isinstance(data, dict) else data


def same(one: Any, other: Any) -> bool:
    """Whether two encoded values are equal. A database may have encoded one in another form than Python."""
    return bool(one == other) or _equal(decode(one), decode(other))


def _equal(one: Any, other: Any) -> bool:
    if isinstance(one, list) and isinstance(other, list):
        return len(one) == len(other) and all(map(_equal, one, other))
    return bool(one == other) or repr(one) == repr(other)  # NaN differs from itself, but has one repr


def differ(one: Mapping[str, Any] | None, other: Mapping[str, Any] | None) -> bool:
    """Whether two images differ. A column that only one of them has was added or dropped, and does not count."""
    if one is None or other is None:
        return one is not other
    return not all(same(one[name], other[name]) for name in one.keys() & other.keys())
