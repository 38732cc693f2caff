"""The requests of the delivery protocol: what it asks for, and what it gets back.

Pure. `protocol` yields them; `delivery` answers them with a database and an index, the simulation with made-up ones.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Generator, Mapping, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any, Generic, NamedTuple, TypeAlias, TypeVar

from memstate_sa.db.codec import FactKey
from memstate_sa.errors import MemstateError
from memstate_sa.indexes.base import Point, Stored, Vector
from memstate_sa.log.positions import Page, Position
from memstate_sa.relay.plan import Delivered, Parked
from memstate_sa.tracking.projection import Projection

R = TypeVar("R")


class Request(Generic[R]):
    """A request to the world outside. Its outcome is an R or an exception."""


Steps: TypeAlias = Generator[Request[Any], Any, R]


def ask(request: Request[R]) -> Steps[R]:
    reply: R = yield request
    return reply


# -- the lease --------------------------------------------------------------------------------------------------------


class HeldSlot(NamedTuple):
    """A slot that we have claimed. ``settle``: its last owner may have written points without a record of it."""

    epoch: int
    position: Position
    fresh: bool
    settle: bool


class Claimed(NamedTuple):
    """``quota``: how many slots are our share among ``owners``. ``marked``: points carry their entity.

    ``entities`` are those that we deliver: perhaps not all that we know. None: all.
    """

    slots: Mapping[int, HeldSlot]
    present: Position
    owners: int
    quota: int
    marked: bool
    entities: Collection[str] | None = None


@dataclass(frozen=True, slots=True)
class Claim(Request[Claimed]):
    """Renew the lease and take free slots up to our share. ``epochs`` are those of the slots we believe to hold.

    ``went_back``: the database lacks changes that we have delivered.
    """

    epochs: Mapping[int, int]
    went_back: bool = False


@dataclass(frozen=True, slots=True)
class Renew(Request[int]):
    """Renew the lease. The reply is how many slots are ours."""


class DatabaseState(NamedTuple):
    """``free``: a slot has no owner. ``due``: a parked key of our slots is. ``own_slots``: how many slots are ours.

    ``elsewhere``: the database is not at the past in which we claimed our slots.
    """

    present: Position
    owners: int
    own_slots: int
    free: bool
    due: bool
    paused: bool
    elsewhere: bool = False


@dataclass(frozen=True, slots=True)
class Look(Request[DatabaseState]):
    slots: Collection[int]


@dataclass(frozen=True, slots=True)
class Release(Request[None]):
    """Give up slots, delivered up to these positions. The next owner delivers the ``unsure`` keys again.

    ``unsettled`` slots keep their owner's name, as if it had died, so that the next owner settles them.
    """

    epochs: Mapping[int, int]
    positions: Mapping[int, Position]
    unsettled: Collection[int]
    unsure: Mapping[FactKey, Parked]
    leave: bool


# -- sources of dirty keys --------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class ReadPage(Request[Page]):
    """Read the entries of these slots that ``present`` has and ``position`` has not."""

    position: Position
    present: Position
    slots: Collection[int]
    limit: int


@dataclass(frozen=True, slots=True)
class ReadDue(Request[Sequence[FactKey]]):
    """Read the parked keys of these slots whose time has come."""

    slots: Collection[int]
    limit: int


class Refill(NamedTuple):
    """Progress of a delivery in full: ``slots`` have the rows of ``entity`` (of the index itself: '') to ``position``.

    None is the beginning, or with ``done`` the end.
    """

    entity: str
    position: str | None
    slots: frozenset[int]
    done: bool = False


@dataclass(frozen=True, slots=True)
class ReadRefill(Request[Refill | None]):
    """Read the next part of the refill of these slots."""

    slots: Collection[int]


class KeyPage(NamedTuple):
    """Keys of all slots, with the fingerprints that the index lists; ``last``: where to go on, None at the end."""

    facts: Mapping[FactKey, str | None]
    last: str | None


@dataclass(frozen=True, slots=True)
class ListFacts(Request[KeyPage]):
    """List the next rows of an entity, or the next points of the index itself."""

    entity: str
    after: str | None
    limit: int


# -- one page ---------------------------------------------------------------------------------------------------------


class ParkedKey(NamedTuple):
    """A parked key: how often it was rejected, the version of its row, and whether it has to be delivered again."""

    attempts: int
    version: str
    deliver_again: bool = False


class PageState(NamedTuple):
    """The committed rows of keys (absent: no row), the keys that could not be projected, and the records of them.

    ``impossible`` keys are those that no row can have: the index must hold nothing for them.
    """

    truth: Mapping[FactKey, Projection] = MappingProxyType({})
    failed: Mapping[FactKey, MemstateError] = MappingProxyType({})
    ledger: Mapping[FactKey, Delivered] = MappingProxyType({})
    parked: Mapping[FactKey, ParkedKey] = MappingProxyType({})
    impossible: Mapping[FactKey, MemstateError] = MappingProxyType({})

    def updated(self, facts: Collection[FactKey], newer: PageState) -> PageState:
        """This state, with the *newer* one of *facts*."""
        outdated = set(facts)
        parts: Any = zip(self, newer, strict=True)
        return PageState(*({**{fact: old[fact] for fact in old if fact not in outdated}, **new} for old, new in parts))


@dataclass(frozen=True, slots=True)
class Read(Request[PageState]):
    facts: Collection[FactKey]


class Embedded(NamedTuple):
    """Vectors by text fingerprint, and for how many of them the embedder was asked; the others were known."""

    vectors: Mapping[str, Vector]
    asked: int


@dataclass(frozen=True, slots=True)
class Embed(Request[Embedded]):
    """Embed texts, given by text fingerprint."""

    texts: Mapping[str, str]


@dataclass(frozen=True, slots=True)
class Fetch(Request[Mapping[FactKey, Stored]]):
    """Get the points that the index holds already."""

    facts: Collection[FactKey]


class PointWrite(NamedTuple):
    """The point to be written for a fact, under the epoch of its slot. A point of None is to be removed."""

    fact: FactKey
    epoch: int
    delivered: Delivered
    point: Point | None


@dataclass(frozen=True, slots=True)
class Upsert(Request[None]):
    """Write points. ``meanwhile``: steps that may be run during the call, as long as what they are given is true."""

    writes: Sequence[PointWrite]
    meanwhile: Callable[[Callable[[], bool]], Steps[None]] | None = field(default=None, compare=False)


@dataclass(frozen=True, slots=True)
class Remove(Request[None]):
    writes: Sequence[PointWrite]


@dataclass(frozen=True, slots=True)
class Acknowledge(Request[frozenset[int]]):
    """Record a page, in one transaction. The reply is which of the slots in ``epochs`` are lost.

    Nothing is recorded for lost slots. ``resolved`` are parked keys that are delivered now, with the version of the
    parked row that was read: a key that was parked again since then stays parked. ``foreign`` keys are of entities that
    this owner does not know.
    """

    epochs: Mapping[int, int]
    written: Mapping[FactKey, Delivered] = field(default_factory=dict)
    resolved: Mapping[FactKey, str] = field(default_factory=dict)
    parking: Mapping[FactKey, Parked] = field(default_factory=dict)
    foreign: Collection[FactKey] = ()
    positions: Mapping[int, Position] = field(default_factory=dict)
    refill: Refill | None = None


@dataclass(frozen=True, slots=True)
class Redirty(Request[None]):
    """Have the owner of these keys deliver them again: our writes may land after its writes."""

    facts: Mapping[FactKey, Parked]
