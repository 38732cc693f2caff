"""How far an index has come in the outbox: slots, and arithmetic on PostgreSQL's snapshots. Pure.

Entries become visible when their transaction commits, in another order than that of their ids. So a position is not a
number but a snapshot: the difference of two of them is what was committed between, late committers included.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from functools import lru_cache, reduce
from hashlib import sha256
from typing import NamedTuple

SLOTS = 64
"""Keys are spread over this many slots by hash, the unit in which relays share work. Fixed: it is stored."""


@lru_cache(8192)
def slot_of(entity: str, key: str) -> int:
    """The slot of a key. Stored, and computed by triggers too, so it must never change."""
    return sha256((entity + key).encode()).digest()[0] % SLOTS


@dataclass(frozen=True, slots=True)
class Snapshot:
    """Transactions below ``xmax`` that were not ``running`` (sorted, all below ``xmax``) are seen."""

    xmax: int
    running: tuple[int, ...] = ()

    @classmethod
    def parse(cls, text: str) -> Snapshot:
        """The snapshot in PostgreSQL's form, ``xmin:xmax:xip,…``."""
        _, xmax, running = text.split(":")
        return cls(int(xmax), tuple(map(int, running.split(","))) if running else ())

    def __str__(self) -> str:
        return f"{self.xmin}:{self.xmax}:{','.join(map(str, self.running))}"

    @property
    def xmin(self) -> int:
        """All transactions below are seen."""
        return self.running[0] if self.running else self.xmax

    def sees(self, xid: int) -> bool:
        return xid < self.xmax and xid not in self.running

    def includes(self, other: Snapshot) -> bool:
        """Whether this snapshot sees everything that *other* sees."""
        return self.xmax >= other.xmax and all(xid in other.running for xid in self.running if xid < other.xmax)

    def below(self, xmax: int) -> Snapshot:
        """The same snapshot without the transactions from *xmax* on."""
        return Snapshot(xmax, tuple(xid for xid in self.running if xid < xmax)) if xmax < self.xmax else self

    def meet(self, other: Snapshot) -> Snapshot:
        """The snapshot of everything that both see."""
        xmax = min(self.xmax, other.xmax)
        running = {xid for xid in (*self.running, *other.running) if xid < xmax}
        return Snapshot(xmax, tuple(sorted(running)))


@dataclass(frozen=True, slots=True)
class Position:
    """How far an index has come: it has all that ``snapshot`` sees, and the entries of ``xid`` up to ``id``.

    Entries are delivered in order of (xid, id). On SQLite all of them have xid 0 and the snapshot sees none: its one
    writer makes id order commit order.
    """

    snapshot: Snapshot
    xid: int = 0
    id: int = 0

    @classmethod
    def parse(cls, snapshot: str, xid: int, id_: int) -> Position:
        """The position that is stored in these columns."""
        return cls(Snapshot.parse(snapshot), xid, id_)

    def covers(self, other: Position) -> bool:
        """Whether everything that is delivered at *other* is delivered here."""
        covers_xid = other.id == 0 or self.snapshot.sees(other.xid) or (self.xid == other.xid and self.id >= other.id)
        return covers_xid and self.snapshot.includes(other.snapshot)

    def after(self, xid: int) -> int:
        """The id after which entries of transaction *xid*, which the snapshot does not see, are undelivered."""
        return self.id if xid == self.xid else 0

    @property
    def floor(self) -> tuple[int, int]:
        """Every entry up to this (xid, id) is delivered."""
        xmin = self.snapshot.xmin
        return xmin, self.after(xmin)

    def advance(self, present: Position, last: tuple[int, int] | None) -> Position:
        """The position after a page of entries that *present* has and this has not.

        *last* is the (xid, id) at which the page ended because it was full, None when there is no more.
        """
        if last is None:
            return present if present.covers(self) else self
        xid, id_ = last
        if xid >= self.snapshot.xmax:
            return Position(present.snapshot.below(xid), xid, id_)
        # Among the transactions that were running at the last snapshot and have ended since.
        running = tuple(x for x in self.snapshot.running if x >= xid or not present.snapshot.sees(x))
        return Position(Snapshot(self.snapshot.xmax, running), xid, id_)


def meet(positions: Iterable[Position]) -> Position:
    """The position that all of *positions* cover, or a little less. There must be at least one."""

    def both(one: Position, other: Position) -> Position:
        if one == other:
            return one
        snapshot = one.snapshot.meet(other.snapshot)
        if one.xid == other.xid:
            return Position(snapshot, one.xid, min(one.id, other.id))
        return Position(snapshot)

    return reduce(both, positions)


class Page(NamedTuple):
    """Dirty keys, oldest first, perhaps repeated; ``last`` is the (xid, id) at which it ended if it was full.

    ``intents`` are keys that the application itself may have written to the index, or may be writing.
    """

    facts: list[tuple[str, str]]
    last: tuple[int, int] | None
    intents: frozenset[tuple[str, str]] = frozenset()
