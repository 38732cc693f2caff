"""Positions of indexes in the outbox: slots, and arithmetic on PostgreSQL's snapshots. Pure functions.

Rows of the outbox become visible when their transaction commits, and not in the order of their ids. So a position is a
snapshot, and not a number. The difference of two snapshots has all commits between them, late ones included.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from functools import lru_cache, reduce
from hashlib import sha256
from typing import NamedTuple

SLOTS = 64
"""The number of slots. Relays share work by slots, and a hash gives each key its slot. Slots are stored, so the number
must never change."""


@lru_cache(8192)
def slot_of(entity: str, key: str) -> int:
    """The slot of a key. It is stored, and triggers compute it too, so this function must never change."""
    return sha256((entity + key).encode()).digest()[0] % SLOTS


@dataclass(frozen=True, slots=True)
class Snapshot:
    """A snapshot sees the transactions below ``xmax``, except the ``running`` ones (sorted, all below ``xmax``)."""

    xmax: int
    running: tuple[int, ...] = ()

    @classmethod
    def parse(cls, text: str) -> Snapshot:
        """The snapshot from PostgreSQL's text form, ``xmin:xmax:xip,…``."""
        _, xmax, running = text.split(":")
        return cls(int(xmax), tuple(map(int, running.split(","))) if running else ())

    def __str__(self) -> str:
        return f"{self.xmin}:{self.xmax}:{','.join(map(str, self.running))}"

    @property
    def xmin(self) -> int:
        """The snapshot sees all transactions below this one."""
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
        """The snapshot that sees exactly the transactions that both see."""
        xmax = min(self.xmax, other.xmax)
        running = {xid for xid in (*self.running, *other.running) if xid < xmax}
        return Snapshot(xmax, tuple(sorted(running)))


@dataclass(frozen=True, slots=True)
class Position:
    """The progress of an index: it has all dirty keys that ``snapshot`` sees, and those of ``xid`` up to ``id``.

    Keys are delivered in the order of (xid, id). On SQLite all of them have xid 0, and the snapshot sees none: with one
    writer, the order of ids is the order of commits.
    """

    snapshot: Snapshot
    xid: int = 0
    id: int = 0

    @classmethod
    def parse(cls, snapshot: str, xid: int, id_: int) -> Position:
        """The position from its stored columns."""
        return cls(Snapshot.parse(snapshot), xid, id_)

    def covers(self, other: Position) -> bool:
        """Whether this position has all keys that *other* has."""
        covers_xid = other.id == 0 or self.snapshot.sees(other.xid) or (self.xid == other.xid and self.id >= other.id)
        return covers_xid and self.snapshot.includes(other.snapshot)

    def after(self, xid: int) -> int:
        """The id up to which keys of the transaction *xid* are delivered. The snapshot must not see *xid*."""
        return self.id if xid == self.xid else 0

    @property
    def floor(self) -> tuple[int, int]:
        """The (xid, id) up to which every key is delivered."""
        xmin = self.snapshot.xmin
        return xmin, self.after(xmin)

    def advance(self, present: Position, last: tuple[int, int] | None) -> Position:
        """The position after the delivery of a page of keys between this position and *present*.

        *last* is the (xid, id) of the end of a full page, or None if nothing is left after the page.
        """
        if last is None:
            return present if present.covers(self) else self
        xid, id_ = last
        if xid >= self.snapshot.xmax:
            return Position(present.snapshot.below(xid), xid, id_)
        # The page ended among late transactions. They were running at the last snapshot, and have ended since.
        running = tuple(x for x in self.snapshot.running if x >= xid or not present.snapshot.sees(x))
        return Position(Snapshot(self.snapshot.xmax, running), xid, id_)


def meet(positions: Iterable[Position]) -> Position:
    """A position that all of *positions* cover: the largest, or a little less. There must be at least one."""

    def both(one: Position, other: Position) -> Position:
        if one == other:
            return one
        snapshot = one.snapshot.meet(other.snapshot)
        if one.xid == other.xid:
            return Position(snapshot, one.xid, min(one.id, other.id))
        return Position(snapshot)

    return reduce(both, positions)


class Page(NamedTuple):
    """Dirty keys, oldest first; a key may be repeated. ``last`` is the (xid, id) of the end of a full page.

    ``intents`` are keys that the application itself may have written, or may be writing, to the index.
    """

    facts: list[tuple[str, str]]
    last: tuple[int, int] | None
    intents: frozenset[tuple[str, str]] = frozenset()
