"""Ask a server again until enough of its candidates match."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from memstate_sa.indexes._filters import matches
from memstate_sa.indexes.base import Match, Scalar


class Candidate(NamedTuple):
    """A near point of ours, with the metadata that the filter is applied to."""

    match: Match
    metadata: Mapping[str, Scalar]


class Answer(NamedTuple):
    candidates: Sequence[Candidate]
    """Nearest first."""
    is_short: bool
    """Fewer than asked for."""


def nearest(
    ask: Callable[[int, bool], Answer], limit: int, condition: Mapping[str, Any], *, exact: bool
) -> list[Match]:
    """The *limit* nearest that satisfy the canonical filter. ``ask(count, exact)`` answers with a superset.

    A graph may not lead to every point, least of all past points that are filtered out. After a short answer the server
    is asked again, exactly.
    """
    count = limit
    while True:
        answer = ask(count, exact)
        hits = [candidate.match for candidate in answer.candidates if matches(condition, candidate.metadata)]
        if len(hits) >= limit or (exact and answer.is_short):
            return hits[:limit]
        exact, count = exact or answer.is_short, count * 4
