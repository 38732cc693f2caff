"""Translate SQL criteria on metadata columns into an index filter, if both sides agree exactly."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from sqlalchemy import Column, ColumnElement
from sqlalchemy.sql import operators
from sqlalchemy.sql.elements import BinaryExpression, BindParameter, BooleanClauseList, Grouping

from memstate_sa.indexes.base import Filter
from memstate_sa.search.comparable import Comparable
from memstate_sa.tracking.tracked import Tracked

_COMPARISONS = {
    operators.eq: "$eq",
    operators.gt: "$gt",
    operators.ge: "$gte",
    operators.lt: "$lt",
    operators.le: "$lte",
}
_MIRRORED = {"$eq": "$eq", "$gt": "$lt", "$gte": "$lte", "$lt": "$gt", "$lte": "$gte"}
_INT64 = 2**63
_MOST_VALUES = 100
"""The greatest number of values in a filter. Redis takes a minute for 3,000; PostgreSQL refuses 65,536 parameters."""


def push_down(tracked: Tracked, criteria: Sequence[ColumnElement[bool]], comparable: Comparable) -> Filter | None:
    """The index filter that selects exactly the rows that match all *criteria*, or None if there is no such filter.

    Whole numbers have a filter for every comparison. Booleans and strings have one for ``==`` and ``in_()``, which do
    not depend on the default collation. None matches nothing, both in SQL and in an index. Criteria with very many
    values have no filter.
    """
    if sum(map(_size, criteria)) > _MOST_VALUES:
        return None
    translation = _FilterTranslation(tracked, comparable)
    parts = [translation.of(criterion) for criterion in criteria]
    return _all([part for part in parts if part is not None]) if parts and None not in parts else None


def _size(criterion: Any) -> int:
    """The number of values that *criterion* puts into a filter. A part without a filter counts as one value."""
    if isinstance(criterion, Grouping):
        return _size(criterion.element)
    if isinstance(criterion, BooleanClauseList):
        return sum(map(_size, criterion.clauses))
    right = getattr(criterion, "right", None)
    return len(right.effective_value or ()) if isinstance(right, BindParameter) and right.expanding else 1


def _all(parts: list[Filter]) -> Filter:
    return parts[0] if len(parts) == 1 else {"$and": parts}


class _FilterTranslation:
    """Translates criteria on the metadata of one class. It returns None for a criterion that an index cannot apply."""

    def __init__(self, tracked: Tracked, comparable: Comparable) -> None:
        self._tracked = tracked
        self._comparable = comparable

    def of(self, criterion: Any) -> Filter | None:
        if isinstance(criterion, Grouping):
            return self.of(criterion.element)
        if isinstance(criterion, BooleanClauseList):
            parts = [self.of(clause) for clause in criterion.clauses]
            if not parts or None in parts or criterion.operator not in (operators.and_, operators.or_):
                return None
            filters = [part for part in parts if part is not None]
            if criterion.operator is operators.and_:
                return _all(filters)
            return filters[0] if len(filters) == 1 else {"$or": filters}
        if isinstance(criterion, BinaryExpression):
            return self._comparison(criterion)
        return None

    def _comparison(self, criterion: BinaryExpression[Any]) -> Filter | None:
        column_side, value_side, mirrored = criterion.left, criterion.right, False
        if isinstance(column_side, BindParameter):
            column_side, value_side, mirrored = value_side, column_side, True
        is_in = criterion.operator is operators.in_op and not mirrored
        operator = "$in" if is_in else _COMPARISONS.get(criterion.operator)
        name = self._metadata_name(column_side)
        if (
            name is None
            or operator is None
            or not isinstance(value_side, BindParameter)
            or value_side.expanding is not is_in
        ):
            return None
        kind = self._comparable.kind(self._tracked.mapper.columns[name])
        if kind is None or (kind is not int and operator not in ("$eq", "$in")):
            return None
        values = self._comparable.values(value_side, kind)
        if not values or (kind is int and not all(-_INT64 <= value < _INT64 for value in values)):  # type: ignore[operator]
            return None
        return {name: {"$in": values}} if is_in else {name: {_MIRRORED[operator] if mirrored else operator: values[0]}}

    def _metadata_name(self, expression: Any) -> str | None:
        tracked = self._tracked
        if not isinstance(expression, Column) or expression.name not in tracked.table.c:
            return None
        if tracked.table.c[expression.name] is not getattr(expression, "_deannotate", lambda: expression)():
            return None
        name = tracked.attributes.get(expression.name)
        return name if name in tracked.metadata else None
