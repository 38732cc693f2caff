"""`Query`: the arguments of a search."""

from __future__ import annotations

import math
from dataclasses import dataclass
from datetime import datetime

from memstate_sa.errors import MemstateError
from memstate_sa.tracking.validation import require_count


@dataclass(frozen=True, slots=True)
class Query:
    """The arguments of `Memory.search`, without Session and target. Raises MemstateError for an invalid argument."""

    text: str
    limit: int
    max_distance: float | None = None
    consistency: str = "fresh"
    index: str | None = None
    as_of: datetime | str | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.text, str):
            raise MemstateError(f"Cannot search for query={self.text!r}. Give a string.")
        require_count("limit", self.limit, "how many hits, at least 1")
        distance = self.max_distance
        if distance is not None and (
            isinstance(distance, bool) or not isinstance(distance, (int, float)) or math.isnan(distance)
        ):
            raise MemstateError(
                f"Cannot use max_distance={distance!r}. Give a cosine distance, from 0 (identical) to 2 (opposite)."
            )
        if self.consistency not in ("fresh", "eventual"):
            raise MemstateError(f"Cannot use consistency={self.consistency!r}. Choose 'fresh' or 'eventual'.")
