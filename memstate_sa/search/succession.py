"""`Succession`: the successors of indexes, and the choice of the index that searches ask."""

from __future__ import annotations

from collections.abc import Mapping

from sqlalchemy import bindparam, select
from sqlalchemy.engine import Connection

from memstate_sa.db.tables import successor
from memstate_sa.embedding.batches import Destination
from memstate_sa.errors import MemstateError
from memstate_sa.relay.retry import guarded
from memstate_sa.tracking.tracked import Tracked

_switched = select(successor.c.successor, successor.c.incarnation).where(successor.c.index == bindparam("index"))


class Succession:
    """The successors of a Memory's indexes. See `Memory.reindex`."""

    def __init__(self, successors: dict[str, str], destinations: Mapping[str, Destination]) -> None:
        self._successors = successors
        self._destinations = destinations

    def has_successor(self, index: str) -> bool:
        return index in self._successors

    def with_successors(self, indexes: list[str]) -> list[str]:
        """*indexes* and all their successors."""
        names = list(indexes)
        for name in names:
            if (successor_name := self._successors.get(name, name)) not in names:
                names.append(successor_name)  # the loop reaches it too, and adds its own successor
        return names

    def pair(self, index: str | None) -> tuple[str, str]:
        """*index* and its successor. None stands for the only index that has a successor."""
        if index is None and len(self._successors) == 1:
            [index] = self._successors
        if index not in self._successors:
            names = ", ".join(self._successors) or "none"
            raise MemstateError(
                f"Cannot reindex index={index!r}. Indexes with a successor: {names}. A successor is another index of "
                "the Memory: Memory(..., successors={'memory': 'memory_v2'})."
            )
        return index, self._successors[index]

    def index_for(self, tracked: Tracked, index: str | None) -> str:
        """The index for a search of *tracked*, before `current` replaces it by its successor."""
        if not tracked.indexes:
            raise MemstateError("Cannot search: there is no index. Give one as index= to Memory or MemoryStore.")
        if index is None:
            successor_names = {*self._successors.values()}
            return next((name for name in tracked.indexes if name not in successor_names), tracked.indexes[0])
        if index not in tracked.indexes:
            raise MemstateError(
                f"Cannot search index {index!r}: {tracked.model.__name__} is not delivered to it. It is delivered to: "
                f"{', '.join(tracked.indexes)}."
            )
        return index

    def current(self, connection: Connection, name: str) -> str:
        """The index that searches of *name* ask: *name* itself, or the successor that has replaced it.

        A successor that was lost or emptied since the switch does not count. Searches ask the old index until the
        successor is filled and has replaced it again.
        """
        while name in self._successors:
            switch = connection.execute(_switched, {"index": name}).one_or_none()
            if switch is None or tuple(switch) != (self._successors[name], self._incarnation(self._successors[name])):
                return name
            name = self._successors[name]
        return name

    def _incarnation(self, name: str) -> str:
        return guarded(self._destinations[name].open, f"index {name!r}")


def check_successors(successors: Mapping[str, str], indexes: Mapping[str, object]) -> None:
    """Raise MemstateError if *successors* are not among *indexes*, or form a circle."""
    for name, other in successors.items():
        for index in (name, other):
            if index not in indexes:
                names = ", ".join(indexes)
                raise MemstateError(
                    f"Unknown index {index!r} in successors={dict(successors)!r}. This Memory has: {names}."
                )
        seen = {name}
        last = other
        while last not in seen and last in successors:
            seen.add(last)
            last = successors[last]
        if last in seen:
            raise MemstateError(
                f"Cannot use successors={dict(successors)!r}: {last!r} would be its own successor. Remove this circle."
            )
