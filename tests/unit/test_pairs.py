"""`covering` leaves no pair of values out, and does leave cases out."""

from __future__ import annotations

from itertools import combinations, product

from hypothesis import given
from hypothesis import strategies as st

from tests.support.pairs import covering


@given(st.lists(st.integers(1, 4), min_size=2, max_size=4))
def test_covering_keeps_every_pair_of_values(sizes: list[int]) -> None:
    cases = [dict(zip("abcd", values, strict=False)) for values in product(*map(range, sizes))]
    kept = [cases[number] for number in covering(cases)]
    for a, b in combinations("abcd"[: len(sizes)], 2):
        if len({case[a] for case in cases}) > 1 and len({case[b] for case in cases}) > 1:
            assert {(case[a], case[b]) for case in kept} == {(case[a], case[b]) for case in cases}


def test_covering_of_single_values_keeps_each_value() -> None:
    cases = [{"database": d, "index": n} for d, n in product("sp", range(5))]
    kept = [cases[number] for number in covering(cases, size=1)]
    assert len(kept) == 5
    assert {case["database"] for case in kept} == set("sp") and {case["index"] for case in kept} == set(range(5))


def test_covering_of_three_parameters_is_smaller_than_their_product() -> None:
    cases = [{"database": d, "capture": c, "cell": n} for d, c, n in product("sp", "ts", range(20))]
    assert len(covering(cases)) == 40
