"""Metadata in a form that a server filters without knowing our types: tags for equality, doubles for order; pure.

What the server lets through may be more than what matches (a tag is a short hash, a double rounds an int beyond 53
bits), never less; the caller keeps what `memstate_sa.indexes._filters.matches`.
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
                f"metadata {key!r} of {name} is {type(value).__name__}: neither text, bool nor number"
            )
        storable_value = storable(value)
        if storable_value is not None:
            kept[key] = storable_value
    return kept


def tags(metadata: Mapping[str, Scalar]) -> list[str]:
    """One for each value, and one for each key that has a number."""
    return [tag(key, value) for key, value in metadata.items()] + [has_number(key) for key in numbers(metadata)]


def numbers(metadata: Mapping[str, Scalar]) -> dict[str, float]:
    return {
        key: float(value)
        for key, value in metadata.items()
        if isinstance(value, int | float) and not isinstance(value, bool)
    }


def tag(key: str, value: Scalar) -> str:
    """Ten hex digits, the same for 1 and 1.0, others for True and "1"."""
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    return _digest(key, f"{type(value).__name__} {value}")


def has_number(key: str) -> str:
    return _digest(key, _NUMERIC)


def number_name(key: str) -> str:
    """A field name for the number under *key*, which may hold any character."""
    return f"n{_digest(key, 'name')}"


@lru_cache(10_000)
def _digest(*parts: str) -> str:
    text = "".join(f"{len(part)}:{part}" for part in parts)
    return blake2b(text.encode("utf-8", "surrogatepass"), digest_size=5).hexdigest()
