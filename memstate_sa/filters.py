"""SQL criteria on metadata columns as an index filter, where both sides agree exactly. Pure."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from sqlalchemy import Boolean, Column, ColumnElement, Integer, String, Text, Unicode, UnicodeText
from sqlalchemy.dialects.postgresql import TEXT, VARCHAR
from sqlalchemy.sql import operators
from sqlalchemy.sql.elements import BinaryExpression, BindParameter, BooleanClauseList, Grouping

from memstate_sa.facts import Tracked
from memstate_sa.indexes.base import Filter

_COMPARISONS = {
    operators.eq: "$eq",
    operators.gt: "$gt",
    operators.ge: "$gte",
    operators.lt: "$lt",
    operators.le: "$lte",
}
_MIRRORED = {"$eq": "$eq", "$gt": "$lt", "$gte": "$lte", "$lt": "$gt", "$lte": "$gte"}
_TEXT_TYPES = {String, Text, Unicode, UnicodeText, VARCHAR, TEXT}
_INT64 = 2**63
_MOST_VALUES = 100
"""Indexes are not made for more: Redis takes a minute for 3,000, and PostgreSQL refuses what has 65,536 parameters."""


def push_down(tracked: Tracked, criteria: Sequence[ColumnElement[bool]]) -> Filter | None:
    """The index filter that selects exactly the rows that *criteria* (all of them) do, or None when there is none.

    Strings only with eq and in, which no default collation changes; whole numbers and booleans; a None on either side
    matches nothing in SQL and in an index alike. Nor is there one for criteria with very many values.
    """
    parts = [_translate(tracked, criterion) for criterion in criteria]
    if not parts or None in parts:
        return None
    whole = _all([part for part in parts if part is not None])
    return whole if _count(whole) <= _MOST_VALUES else None


def _count(where: Filter) -> int:
    """How many values *where* compares with."""
    [(key, condition)] = where.items()
    if key in ("$and", "$or"):
        return sum(map(_count, condition))
    return len(condition.get("$in", [condition]))


def _all(parts: list[Filter]) -> Filter:
    return parts[0] if len(parts) == 1 else {"$and": parts}


def _translate(tracked: Tracked, criterion: Any) -> Filter | None:
    if isinstance(criterion, Grouping):
        return _translate(tracked, criterion.element)
    if isinstance(criterion, BooleanClauseList):
        parts = [_translate(tracked, clause) for clause in criterion.clauses]
        if not parts or None in parts or criterion.operator not in (operators.and_, operators.or_):
            return None
        known = [part for part in parts if part is not None]
        if criterion.operator is operators.and_:
            return _all(known)
        return known[0] if len(known) == 1 else {"$or": known}
    if isinstance(criterion, BinaryExpression):
        return _comparison(tracked, criterion)
    return None


def _comparison(tracked: Tracked, criterion: BinaryExpression[Any]) -> Filter | None:
    left, right, mirrored = criterion.left, criterion.right, False
    if isinstance(left, BindParameter):
        left, right, mirrored = right, left, True
    name = _metadata_name(tracked, left)
    if name is None or not isinstance(right, BindParameter):
        return None
    column = tracked.mapper.columns[name]
    if criterion.operator is operators.in_op and not mirrored:
        values = right.effective_value
        if not isinstance(values, (list, tuple)) or not values or not all(_agrees(column, v, "$in") for v in values):
            return None
        return {name: {"$in": list(values)}}
    operator = _COMPARISONS.get(criterion.operator)
    if operator is None or not _agrees(column, right.effective_value, operator):
        return None
    return {name: {_MIRRORED[operator] if mirrored else operator: right.effective_value}}


def _metadata_name(tracked: Tracked, expression: Any) -> str | None:
    if not isinstance(expression, Column) or expression.name not in tracked.table.c:
        return None
    if tracked.table.c[expression.name] is not getattr(expression, "_deannotate", lambda: expression)():
        return None
    name = tracked.attributes.get(expression.name)
    return name if name in tracked.metadata else None


def _agrees(column: Column[Any], value: Any, operator: str) -> bool:
    if isinstance(column.type, Boolean):
        return isinstance(value, bool) and operator in ("$eq", "$in")
    if isinstance(column.type, Integer):
        return isinstance(value, int) and not isinstance(value, bool) and -_INT64 <= value < _INT64
    if isinstance(column.type, String) and type(column.type) in _TEXT_TYPES and column.type.collation is None:
        return isinstance(value, str) and operator in ("$eq", "$in")
    return False
