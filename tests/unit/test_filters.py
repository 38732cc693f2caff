"""Filters: the canonical form has the same meaning, and every index can translate it."""

from __future__ import annotations

import math
import operator
from collections.abc import Mapping
from typing import Any

from hypothesis import example, given, settings, strategies as st

from memstate_sa.indexes._filters import canonical, matches, storable
from memstate_sa.indexes.base import Filter

COMPARISONS = {"$gt": operator.gt, "$gte": operator.ge, "$lt": operator.lt, "$lte": operator.le}
numbers = st.one_of(st.integers(-3, 3), st.sampled_from([0.5, -0.5, 1.0]))
scalars = st.one_of(st.none(), st.booleans(), numbers, st.sampled_from(["", "a", "1"]))
keys = st.sampled_from("ab")
conditions = st.one_of(
    st.fixed_dictionaries({"$eq": scalars}),
    st.fixed_dictionaries({"$in": st.lists(scalars, max_size=4)}),
    st.dictionaries(st.sampled_from(sorted(COMPARISONS)), numbers, min_size=1, max_size=2),
)
filters: st.SearchStrategy[Any] = st.recursive(
    st.dictionaries(keys, conditions, max_size=2),
    lambda inner: st.dictionaries(
        st.sampled_from(["$and", "$or"]), st.lists(inner, max_size=3), min_size=1, max_size=2
    ),
    max_leaves=6,
)


def equal(value: Any, other: Any) -> bool:
    kinds = [bool if isinstance(v, bool) else str if isinstance(v, str) else float for v in (value, other)]
    return value is not None and other is not None and kinds[0] is kinds[1] and bool(value == other)


def meaning(where: Filter, metadata: Mapping[str, Any]) -> bool:
    """The documentation of `Filter`, word for word."""

    def holds(name: str, value: Any, operand: Any) -> bool:
        if name == "$eq":
            return equal(value, operand)
        if name == "$in":
            return any(equal(value, one) for one in operand)
        number = isinstance(value, int | float) and not isinstance(value, bool)
        return number and COMPARISONS[name](value, operand)

    return all(
        all(meaning(part, metadata) for part in condition)
        if key == "$and"
        else any(meaning(part, metadata) for part in condition)
        if key == "$or"
        else all(holds(name, metadata.get(key), operand) for name, operand in condition.items())
        for key, condition in where.items()
    )


def well_formed(where: dict[str, Any]) -> bool:
    """Chroma's rules for a filter."""
    [(key, condition)] = where.items()
    if key.startswith("$"):
        return len(condition) >= 2 and all(well_formed(part) for part in condition)
    [(name, operand)] = condition.items()
    operands = operand if name == "$in" else [operand]
    return bool(operands) and all(equal(one, one) for one in operands)


@settings(max_examples=60)
@given(filters, st.dictionaries(keys, scalars))
def test_the_canonical_form_means_the_same(where: Filter, metadata: dict[str, Any]) -> None:
    """A filter and its canonical form match the same metadata."""
    form = canonical(where)
    assert (form is not None and matches(form, metadata)) == meaning(where, metadata)


@settings(max_examples=60)
@given(filters)
def test_the_canonical_form_is_well_formed(where: Filter) -> None:
    """One key per mapping, two parts or more in a list, no None, no empty $in. The form is its own canonical form."""
    form = canonical(where)
    if form:
        assert well_formed(form)
        assert canonical(form) == form


@given(st.one_of(scalars, st.integers(), st.floats()))
@example(10**400)
def test_stored_values_fit_64_bits(value: Any) -> None:
    """NaN and infinity become None, huge integers the nearest float. Other values stay."""
    stored = storable(value)
    if value == 10**400 or (isinstance(value, float) and not math.isfinite(value)):
        assert stored is None
    elif isinstance(value, int) and not isinstance(value, bool) and abs(value) > 2**63:
        assert stored == float(value)
    else:
        assert stored == value
        assert type(stored) is type(value) or abs(value) == 2**63
