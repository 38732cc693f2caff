"""`covering` keeps each value and each pair of values, and still leaves cases out."""

from __future__ import annotations

from itertools import combinations, product

from hypothesis import given, strategies as st

from tests.support.pairs import covering


@given(st.lists(st.integers(1, 4), min_size=2, max_size=4), st.integers(1, 2))
def test_covering_keeps_every_combination(sizes: list[int], size: int) -> None:
    names = "abcd"[: len(sizes)]
    cases = [dict(zip(names, values, strict=True)) for values in product(*map(range, sizes))]
    kept = [cases[number] for number in covering(cases, size)]
    varying = [name for name in names if len({case[name] for case in cases}) > 1]
    for chosen in combinations(varying, size):
        assert {tuple(case[n] for n in chosen) for case in kept} == {tuple(case[n] for n in chosen) for case in cases}


def test_covering_of_three_parameters_is_smaller_than_their_product() -> None:
    cases = [{"database": d, "capture": c, "cell": n} for d, c, n in product("sp", "ts", range(20))]
    assert len(covering(cases, 2)) == 40
    assert len(covering(cases, 1)) == 20


def test_covering_shares_cases_among_values() -> None:
    cases = [{"database": d, "cell": n} for d, n in product("sp", range(20))]
    assert sorted(cases[number]["database"] for number in covering(cases)) == ["p"] * 10 + ["s"] * 10
