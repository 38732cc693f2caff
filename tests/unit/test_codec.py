"""Stored values survive JSON, and the changes that PostgreSQL's JSONB makes."""

from __future__ import annotations

import json
import math
from datetime import UTC, datetime, timedelta, timezone
from decimal import Decimal
from typing import Any

import pytest
from hypothesis import given, strategies as st

from memstate_sa.db.codec import decode, decode_key, encode, encode_key

scalars = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-(2**100), 2**100),
    st.floats(),
    st.text(),
    st.text(alphabet=st.characters(codec="utf-16", categories=("Cs", "Lu", "Cc"))),
    st.binary(max_size=50),
    st.decimals(allow_nan=False),
    st.uuids(),
    st.datetimes(),
    st.datetimes(timezones=st.just(UTC)),
    st.dates(),
    st.times(),
    st.timedeltas(),
)
values = st.recursive(
    scalars, lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=3)
)


def same(a: Any, b: Any) -> bool:
    if isinstance(a, float) and isinstance(b, float):
        return (math.isnan(a) and math.isnan(b)) or (a == b and math.copysign(1, a) == math.copysign(1, b))
    if isinstance(a, list) and isinstance(b, list):
        return len(a) == len(b) and all(map(same, a, b))
    if isinstance(a, dict) and isinstance(b, dict):
        return list(a) == list(b) and all(same(a[k], b[k]) for k in a)
    return type(a) is type(b) and a == b


@given(values)
def test_every_value_survives(value: Any) -> None:
    """decode(encode(value)) is value, type included, through real JSON text that JSONB accepts."""
    text = json.dumps(encode(value), allow_nan=False)
    assert "\\u0000" not in json.dumps(encode(value)) or "\x00" not in str(value)
    assert same(decode(json.loads(text)), value)


@given(st.lists(scalars, min_size=1, max_size=3))
def test_a_key_is_canonical_text(key: list[Any]) -> None:
    """Equal keys have equal texts, and a text gives its key back."""
    assert encode_key(key) == encode_key(list(key))
    assert all(map(same, decode_key(encode_key(key)), key))


def test_an_instant_has_one_form() -> None:
    """The stored form does not depend on the offset of the connection that read a timestamptz."""
    noon = datetime(2024, 5, 1, 12, tzinfo=UTC)
    assert encode_key([noon]) == encode_key([noon.astimezone(timezone(timedelta(hours=2)))])


@pytest.mark.parametrize("value", ["a\x00b", float("nan"), -0.0, 1e300, 2**70, Decimal("1.10")])
def test_values_that_jsonb_would_change_are_tagged(value: Any) -> None:
    """No NUL, no NaN, and no float beyond plain notation reaches JSONB."""
    assert same(decode(json.loads(json.dumps(encode(value), allow_nan=False))), value)
    assert "\\u0000" not in json.dumps(encode(value))


def test_an_unknown_type_is_named() -> None:
    """A value that cannot be kept is refused, not converted to a string."""
    with pytest.raises(TypeError, match="complex"):
        encode(1j)
