"""A smaller set of a test's parameters that still has each pair of values once: what `make test` runs of a product."""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from itertools import combinations


def covering(cases: Sequence[Mapping[str, Hashable]], size: int = 2) -> list[int]:
    """The numbers of the *cases* that together have each combination of *size* values that any case has.

    Greedy, the first of the best: the same cases give the same answer.
    """
    names = [name for name in cases[0] if len({case[name] for case in cases}) > 1]
    parts = [{tuple((name, case[name]) for name in chosen) for chosen in combinations(names, size)} for case in cases]
    missing = set[tuple[tuple[str, Hashable], ...]]().union(*parts)
    chosen: list[int] = []
    while missing:
        best = max(range(len(cases)), key=lambda number: (len(parts[number] & missing), -number))
        chosen.append(best)
        missing -= parts[best]
    return chosen
