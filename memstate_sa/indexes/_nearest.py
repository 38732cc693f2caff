"""Ask a server again until enough of its candidates match."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from memstate_sa.indexes._filters import matches
from memstate_sa.indexes.base import Match, Scalar


class Candidate(NamedTuple):
    """A near point that memstate_sa wrote, with its metadata for the filter."""

    match: Match
    metadata: Mapping[str, Scalar]


class Answer(NamedTuple):
    candidates: Sequence[Candidate]
    """Nearest first."""
    is_short: bool
    """The server returned fewer candidates than requested."""


def nearest(
    ask: Callable[[int, bool], Answer], limit: int, condition: Mapping[str, Any], *, exact: bool
) -> list[Match]:
    """The *limit* nearest points that satisfy the canonical filter *condition*.

    ``ask(count, exact)`` returns the server's *count* nearest candidates. Some of them may not satisfy the filter.

    A graph search may miss points, most of all behind points that the filter removes. After a short answer, the server
    is asked for an exact search.
    """
    count = limit
    while True:
        answer = ask(count, exact)
        hits = [candidate.match for candidate in answer.candidates if matches(condition, candidate.metadata)]
        if len(hits) >= limit or (exact and answer.is_short):
            return hits[:limit]
        exact, count = exact or answer.is_short, count * 4
