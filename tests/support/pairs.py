"""A smaller set of a test's parameters that still has each pair of values once: what `make test` runs of a product."""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from itertools import combinations


def covering(cases: Sequence[Mapping[str, Hashable]]) -> list[int]:
    """The numbers of the *cases* that together have each pair of values that any case has.

    Greedy, the first of the best: the same cases give the same answer.
    """
    names = [name for name in cases[0] if len({case[name] for case in cases}) > 1]
    pairs = [{(a, case[a], b, case[b]) for a, b in combinations(names, 2)} for case in cases]
    missing = set[tuple[Hashable, ...]]().union(*pairs)
    chosen: list[int] = []
    while missing:
        best = max(range(len(cases)), key=lambda number: (len(pairs[number] & missing), -number))
        chosen.append(best)
        missing -= pairs[best]
    return chosen
