"""`Query`: the arguments of a search."""

from __future__ import annotations

import math
from dataclasses import dataclass
from datetime import datetime

from memstate_sa.errors import MemstateError
from memstate_sa.tracking.validation import require_count


@dataclass(frozen=True, slots=True)
class Query:
    """What `Memory.search` was asked, but for the Session and the target. Raises MemstateError for a bad argument."""

    text: str
    limit: int
    max_distance: float | None
    consistency: str
    index: str | None
    as_of: datetime | str | None

    def __post_init__(self) -> None:
        if not isinstance(self.text, str):
            raise MemstateError(f"query={self.text!r}: a string to search for")
        require_count("limit", self.limit, "how many hits, at least 1")
        distance = self.max_distance
        if distance is not None and (
            isinstance(distance, bool) or not isinstance(distance, (int, float)) or math.isnan(distance)
        ):
            raise MemstateError(f"max_distance={distance!r}: a cosine distance, from 0 (identical) to 2 (opposite)")
        if self.consistency not in ("fresh", "eventual"):
            raise MemstateError(f"consistency={self.consistency!r}: 'fresh' or 'eventual'")
