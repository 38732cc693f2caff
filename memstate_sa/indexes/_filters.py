"""`Filter` in one canonical form that every index can translate, and its meaning in Python; pure."""

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
    """*value* as every index can hold it: NaN and infinity are None, an int beyond 64 bits is the nearest float."""
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, int) and not -(2**63) <= value < 2**63:
        return float(value) if abs(value) < 2**1023 else None
    return value


def canonical(where: Filter) -> dict[str, Any] | None:
    """An equivalent filter with one key per mapping, or ``{}`` when it matches everything, None when nothing.

    Every ``$and`` and ``$or`` has two parts or more, every ``$in`` one or more values, all strings, all booleans or all
    numbers; ``None`` operands are gone. Raises DeliveryRejected for what is not a filter.
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
            raise DeliveryRejected(f"{key} in a filter takes a list of filters, not {condition!r}")
        parts = [canonical(part) for part in condition]
        return _all(parts) if key == "$and" else _any(parts)
    if key.startswith("$") or not isinstance(condition, Mapping) or not condition:
        raise DeliveryRejected(f'a filter reads like {{"role": {{"$eq": "tip"}}}}, not {{{key!r}: {condition!r}}}')
    return _all([_leaf(key, name, operand) for name, operand in condition.items()])


def _leaf(key: str, name: str, operand: Any) -> dict[str, Any] | None:
    if name == "$in" and isinstance(operand, list | tuple | set | frozenset):
        values = [value for value in map(_operand, operand) if value is not None]
        kinds = dict.fromkeys(map(_kind, values))
        return _any([{key: {"$in": [value for value in values if _kind(value) is kind]}} for kind in kinds])
    if name not in _COMPARISONS:
        raise DeliveryRejected(f"unknown filter condition {{{name!r}: {operand!r}}}")
    value = _operand(operand)
    if value is None:
        return None
    if name != "$eq" and _kind(value) is not float:
        raise DeliveryRejected(f"{name} in a filter compares numbers, not {operand!r}")
    return {key: {name: value}}


def _operand(value: Any) -> Scalar:
    if value is not None and not isinstance(value, str | bool | int | float):
        raise DeliveryRejected(f"a filter compares with str, int, float, bool or None, not {value!r}")
    if isinstance(value, float) and math.isinf(value):
        raise DeliveryRejected("a filter cannot compare with infinity")
    return storable(value)


def _kind(value: Scalar) -> type | None:
    """True is no number here: 1 == True in Python, and in no index."""
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
