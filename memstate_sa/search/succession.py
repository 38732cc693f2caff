"""`Succession`: which index takes the place of which, and which of them searches ask."""

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
        """*indexes*, and all that are to take their place."""
        names = list(indexes)
        for name in names:
            if (successor_name := self._successors.get(name, name)) not in names:
                names.append(successor_name)  # which is looked at in its turn
        return names

    def pair(self, index: str | None) -> tuple[str, str]:
        """*index* and its successor. None is the index with a successor, when there is only one."""
        if index is None and len(self._successors) == 1:
            [index] = self._successors
        if index not in self._successors:
            raise MemstateError(
                f"index={index!r}: which index is to be replaced, and by what? Memory(..., successors={{'memory': "
                "'memory_v2'}) says that, for indexes that it has"
            )
        return index, self._successors[index]

    def index_for(self, tracked: Tracked, index: str | None) -> str:
        """The index that a search of *tracked* is meant for; see `current` for the one that is asked."""
        if not tracked.indexes:
            raise MemstateError("Cannot search: this Memory has no index. Use Memory(index, embedder=…).")
        if index is None:
            following = {*self._successors.values()}
            return next((name for name in tracked.indexes if name not in following), tracked.indexes[0])
        if index not in tracked.indexes:
            raise MemstateError(f"{tracked.model.__name__} does not go to an index {index!r}")
        return index

    def current(self, connection: Connection, name: str) -> str:
        """The index that searches of *name* ask: itself, or the one that has taken its place.

        An index that was lost or made anew since does not count. Searches ask the old one until the new one is filled
        and takes its place again.
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
    """Raise MemstateError when *successors* are not among *indexes*, or go in a circle."""
    for name, other in successors.items():
        for index in (name, other):
            if index not in indexes:
                raise MemstateError(f"successors={dict(successors)!r}: this Memory has no index {index!r}")
        seen = {name}
        last = other
        while last not in seen and last in successors:
            seen.add(last)
            last = successors[last]
        if last in seen:
            raise MemstateError(f"successors={dict(successors)!r}: {last!r} would be its own successor")
