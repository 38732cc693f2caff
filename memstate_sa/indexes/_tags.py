"""Metadata in a form that any server can filter: tags for equality, doubles for order. Pure.

The server may return more points than match, never fewer. A tag is a short hash, and a double rounds an int beyond 53
bits. The caller checks each point with `memstate_sa.indexes._filters.matches`.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import lru_cache
from hashlib import blake2b

from memstate_sa.errors import DeliveryRejected
from memstate_sa.indexes._filters import storable
from memstate_sa.indexes.base import Scalar

_NUMERIC = "number under this key"


def stored(metadata: Mapping[str, Scalar], name: str) -> dict[str, Scalar]:
    """The part of *metadata* that an index keeps, without None. Raises DeliveryRejected for another type."""
    kept: dict[str, Scalar] = {}
    for key, value in metadata.items():
        if not isinstance(value, str | bool | int | float | None):
            raise DeliveryRejected(
                f"Cannot store metadata {key!r} of {name}. It is {type(value).__name__}, but must be text, bool or a "
                "number."
            )
        storable_value = storable(value)
        if storable_value is not None:
            kept[key] = storable_value
    return kept


def tags(metadata: Mapping[str, Scalar]) -> list[str]:
    """One tag for each value, and one for each key with a number."""
    return [tag(key, value) for key, value in metadata.items()] + [has_number(key) for key in numbers(metadata)]


def numbers(metadata: Mapping[str, Scalar]) -> dict[str, float]:
    return {
        key: float(value)
        for key, value in metadata.items()
        if isinstance(value, int | float) and not isinstance(value, bool)
    }


def tag(key: str, value: Scalar) -> str:
    """The tag, in ten hex digits. 1 and 1.0 have the same tag, but True and "1" have others."""
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    return _digest(key, f"{type(value).__name__} {value}")


def has_number(key: str) -> str:
    return _digest(key, _NUMERIC)


def number_name(key: str) -> str:
    """The name of the field for the number under *key*. The key itself may hold characters that no field name has."""
    return f"n{_digest(key, 'name')}"


@lru_cache(10_000)
def _digest(*parts: str) -> str:
    text = "".join(f"{len(part)}:{part}" for part in parts)
    return blake2b(text.encode("utf-8", "surrogatepass"), digest_size=5).hexdigest()
