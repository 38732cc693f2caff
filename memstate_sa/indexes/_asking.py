"""Asking a server again until enough of what it lets through matches."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from memstate_sa.indexes._filters import matches
from memstate_sa.indexes.base import Match, Scalar


class Found(NamedTuple):
    match: Match
    metadata: Mapping[str, Scalar]


class Answer(NamedTuple):
    found: Sequence[Found]
    """Ours, nearest first."""
    short: bool
    """Fewer than asked for."""


def nearest(
    ask: Callable[[int, bool], Answer], limit: int, condition: Mapping[str, Any], *, exact: bool
) -> list[Match]:
    """The *limit* nearest that satisfy the canonical filter; ``ask(wanted, exact)`` answers with a superset.

    A graph may not lead to every point, least of all past those that are filtered out: what it leaves short is asked
    for again, exactly.
    """
    wanted = limit
    while True:
        answer = ask(wanted, exact)
        hits = [each.match for each in answer.found if matches(condition, each.metadata)]
        if len(hits) >= limit or (exact and answer.short):
            return hits[:limit]
        exact, wanted = exact or answer.short, wanted * 4
