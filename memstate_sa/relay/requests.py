"""The requests of the delivery protocol, and the types of their replies.

This module is pure. `protocol` yields the requests. `delivery` answers them with a database and an index, and the
simulation in the tests answers them with simulated ones.
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
    """A request of the protocol for I/O. Its reply is an R or an exception."""


Exchange: TypeAlias = Generator[Request[Any], Any, R]
"""A part of the protocol: it yields requests, is sent their replies, and returns an R."""


def ask(request: Request[R]) -> Exchange[R]:
    reply: R = yield request
    return reply


# -- the lease --------------------------------------------------------------------------------------------------------


class HeldSlot(NamedTuple):
    """A slot that we have claimed. ``settle``: its last owner may have written points without recording them."""

    epoch: int
    position: Position
    fresh: bool
    settle: bool


class Claimed(NamedTuple):
    """The slots that we have, and the state of the index.

    - ``quota``: the number of slots that are our share among ``owners``.
    - ``marked``: the points carry their entity.
    - ``entities``: the entities that we deliver, which may be fewer than we know. None means all.
    """

    slots: Mapping[int, HeldSlot]
    present: Position
    owners: int
    quota: int
    marked: bool
    entities: Collection[str] | None = None


@dataclass(frozen=True, slots=True)
class Claim(Request[Claimed]):
    """Renew the lease, and claim free slots up to our share.

    ``epochs`` has the slots that we think are ours. ``went_back``: the database lacks changes that we have delivered.
    """

    epochs: Mapping[int, int]
    went_back: bool = False


@dataclass(frozen=True, slots=True)
class Renew(Request[int]):
    """Renew the lease. The reply is the number of our slots."""


class DatabaseState(NamedTuple):
    """The state of the database.

    - ``own_slots``: the number of our slots.
    - ``free``: a slot has no owner.
    - ``due``: a parked key of our slots is due.
    - ``elsewhere``: the database was restored since we claimed our slots.
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
    """Release slots, with the positions up to which they are delivered.

    The next owner delivers the ``unsure`` keys again. ``unsettled`` slots keep their owner's name, as if it had died,
    so that the next owner settles them.
    """

    epochs: Mapping[int, int]
    positions: Mapping[int, Position]
    unsettled: Collection[int]
    unsure: Mapping[FactKey, Parked]
    leave: bool


# -- sources of dirty keys --------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class ReadPage(Request[Page]):
    """Read the outbox entries of these slots after ``position``, up to ``present``."""

    position: Position
    present: Position
    slots: Collection[int]
    limit: int


@dataclass(frozen=True, slots=True)
class ReadDue(Request[Sequence[FactKey]]):
    """Read the parked keys of these slots that are due."""

    slots: Collection[int]
    limit: int


class Refill(NamedTuple):
    """The progress of a refill: ``slots`` have the rows of ``entity`` up to ``position``.

    The entity '' stands for the points of the index itself. A position of None is the beginning, or with ``done`` the
    end.
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
    """Keys of all slots, with the fingerprints that the index lists.

    The next page begins after ``last``, which is None at the end.
    """

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
    """A parked key: its attempts so far, the version of its parked row, and whether it must be delivered again."""

    attempts: int
    version: str
    deliver_again: bool = False


class PageState(NamedTuple):
    """The state of some keys.

    - ``truth``: the projections of their committed rows. A key without a row is absent.
    - ``failed``: keys that could not be projected.
    - ``ledger``, ``parked``: the rows of the keys in these tables.
    - ``impossible``: keys that no row can have. The index must hold nothing for them.
    """

    truth: Mapping[FactKey, Projection] = MappingProxyType({})
    failed: Mapping[FactKey, MemstateError] = MappingProxyType({})
    ledger: Mapping[FactKey, Delivered] = MappingProxyType({})
    parked: Mapping[FactKey, ParkedKey] = MappingProxyType({})
    impossible: Mapping[FactKey, MemstateError] = MappingProxyType({})

    def updated(self, facts: Collection[FactKey], newer: PageState) -> PageState:
        """This state, but with the *newer* state of *facts*."""
        outdated = set(facts)
        parts: Any = zip(self, newer, strict=True)
        return PageState(*({**{fact: old[fact] for fact in old if fact not in outdated}, **new} for old, new in parts))


@dataclass(frozen=True, slots=True)
class Read(Request[PageState]):
    facts: Collection[FactKey]


class Embedded(NamedTuple):
    """Vectors by text fingerprint. ``asked``: the number of texts that the embedder got. The others were cached."""

    vectors: Mapping[str, Vector]
    asked: int


@dataclass(frozen=True, slots=True)
class Embed(Request[Embedded]):
    """Embed ``texts``, which are keyed by their text fingerprints."""

    texts: Mapping[str, str]


@dataclass(frozen=True, slots=True)
class Fetch(Request[Mapping[FactKey, Stored]]):
    """Read the points of these facts that the index holds."""

    facts: Collection[FactKey]


class PointWrite(NamedTuple):
    """The point to write for a fact, under the epoch of its slot. None removes the point."""

    fact: FactKey
    epoch: int
    delivered: Delivered
    point: Point | None


@dataclass(frozen=True, slots=True)
class Upsert(Request[None]):
    """Write points. ``meanwhile`` makes requests to run during the call, until the function that it gets says False."""

    writes: Sequence[PointWrite]
    meanwhile: Callable[[Callable[[], bool]], Exchange[None]] | None = field(default=None, compare=False)


@dataclass(frozen=True, slots=True)
class Remove(Request[None]):
    writes: Sequence[PointWrite]


@dataclass(frozen=True, slots=True)
class Acknowledge(Request[frozenset[int]]):
    """Record a page in one transaction. The reply has the lost slots: slots in ``epochs`` that are no longer ours.

    Nothing is recorded for lost slots. ``resolved`` has parked keys that are delivered now, with the version of the
    parked row that was read. A key that was parked again since then stays parked. ``foreign`` keys belong to entities
    that this owner does not know.
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
    """Let the present owner of these keys deliver them again, because our late writes may undo the owner's writes."""

    facts: Mapping[FactKey, Parked]
