"""A smaller set of a test's cases that still has each value, or each pair of values. `make test` runs this set."""

from __future__ import annotations

from collections import Counter
from collections.abc import Hashable, Mapping, Sequence
from itertools import combinations


def covering(cases: Sequence[Mapping[str, Hashable]], size: int = 1) -> list[int]:
    """The numbers of the *cases* that together have each combination of *size* values that any case has.

    The choice is greedy. Among equal cases it takes the one with the least used values, so that both databases get a
    share.
    """
    names = [name for name in cases[0] if len({case[name] for case in cases}) > 1]
    parts = [{tuple((name, case[name]) for name in chosen) for chosen in combinations(names, size)} for case in cases]
    missing = set[tuple[tuple[str, Hashable], ...]]().union(*parts)
    uses = Counter[tuple[str, Hashable]]()
    chosen: list[int] = []
    while missing:
        new = [len(part & missing) for part in parts]
        best = max(range(len(cases)), key=lambda n: (new[n], -sum(uses[item] for item in cases[n].items()), -n))
        chosen.append(best)
        missing -= parts[best]
        uses.update(cases[best].items())
    return chosen
