"""The canonical form of a `Filter`, which every index can translate, and its meaning in Python. Pure."""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Mapping
from typing import Any

from memstate_sa.errors import DeliveryRejected
from memstate_sa.indexes.base import Filter, Scalar

_COMPARISONS: dict[str, Callable[[Any, Any], bool]] = {
    "$eq": operator.eq,
    "$gt": operator.gt,
    "$gte": operator.ge,
    "$lt": operator.lt,
    "$lte": operator.le,
}


def storable(value: Scalar) -> Scalar:
    """*value* as every index can hold it. NaN and infinity become None, an int beyond 64 bits the nearest float."""
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, int) and not -(2**63) <= value < 2**63:
        return float(value) if abs(value) < 2**1023 else None
    return value


def canonical(where: Filter) -> dict[str, Any] | None:
    """An equivalent filter with one key per mapping: ``{}`` if it matches everything, None if it matches nothing.

    Every ``$and`` and ``$or`` has at least two parts. Every ``$in`` has at least one value, and its values are all
    strings, all booleans or all numbers. ``None`` operands are removed. Raises DeliveryRejected for an invalid filter.
    """
    parts = [_part(key, condition) for key, condition in where.items()]
    return _all(parts)


def matches(where: Filter, metadata: Mapping[str, Scalar]) -> bool:
    """Whether *metadata* satisfies the canonical filter *where*."""
    if not where:
        return True
    [(key, condition)] = where.items()
    if key == "$and":
        return all(matches(part, metadata) for part in condition)
    if key == "$or":
        return any(matches(part, metadata) for part in condition)
    [(name, operand)] = condition.items()
    value = metadata.get(key)
    operands = operand if name == "$in" else [operand]
    compare = _COMPARISONS["$eq" if name == "$in" else name]
    return any(_kind(value) is _kind(other) and compare(value, other) for other in operands)


def _part(key: str, condition: Any) -> dict[str, Any] | None:
    if key in ("$and", "$or"):
        if not isinstance(condition, list | tuple) or not all(isinstance(part, Mapping) for part in condition):
            raise DeliveryRejected(f"Invalid filter. {key} takes a list of filters, not {condition!r}.")
        parts = [canonical(part) for part in condition]
        return _all(parts) if key == "$and" else _any(parts)
    if key.startswith("$") or not isinstance(condition, Mapping) or not condition:
        raise DeliveryRejected(
            f'Invalid filter {{{key!r}: {condition!r}}}. Write a filter like {{"role": {{"$eq": "tip"}}}}.'
        )
    return _all([_leaf(key, name, operand) for name, operand in condition.items()])


def _leaf(key: str, name: str, operand: Any) -> dict[str, Any] | None:
    if name == "$in" and isinstance(operand, list | tuple | set | frozenset):
        values = [value for value in map(_operand, operand) if value is not None]
        kinds = dict.fromkeys(map(_kind, values))
        return _any([{key: {"$in": [value for value in values if _kind(value) is kind]}} for kind in kinds])
    if name not in _COMPARISONS:
        raise DeliveryRejected(
            f"Unknown filter condition {{{name!r}: {operand!r}}}. The operators are {', '.join(_COMPARISONS)} and $in."
        )
    value = _operand(operand)
    if value is None:
        return None
    if name != "$eq" and _kind(value) is not float:
        raise DeliveryRejected(f"Invalid filter. {name} compares numbers, not {operand!r}.")
    return {key: {name: value}}


def _operand(value: Any) -> Scalar:
    if value is not None and not isinstance(value, str | bool | int | float):
        raise DeliveryRejected(
            f"Invalid filter. It may compare with str, int, float, bool or None, not with {value!r}."
        )
    if isinstance(value, float) and math.isinf(value):
        raise DeliveryRejected("Invalid filter. It cannot compare with infinity.")
    return storable(value)


def _kind(value: Scalar) -> type | None:
    """The type of *value* for comparisons. A bool is not a number here: 1 == True in Python, but in no index."""
    if value is None or isinstance(value, bool | str):
        return None if value is None else type(value)
    return float


def _all(parts: list[dict[str, Any] | None]) -> dict[str, Any] | None:
    if None in parts:
        return None
    conditions = [part for part in parts if part]
    return {"$and": conditions} if len(conditions) > 1 else conditions[0] if conditions else {}


def _any(parts: list[dict[str, Any] | None]) -> dict[str, Any] | None:
    if {} in parts:
        return {}
    conditions = [part for part in parts if part]
    return {"$or": conditions} if len(conditions) > 1 else conditions[0] if conditions else None
