"""The pages of keys that the protocol delivers, one class for each source. This module is pure."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field

from memstate_sa.db.codec import FactKey
from memstate_sa.log.positions import Position
from memstate_sa.relay.plan import Delivered
from memstate_sa.relay.requests import Exchange, PageState, Refill
from memstate_sa.relay.slot_owner import Move, SlotGroup


@dataclass(frozen=True, kw_only=True)
class Source:
    """A page of keys. This class is for parked keys that are due; the subclasses are for the other sources.

    - ``foreign``: keys of entities that we do not deliver.
    - ``intents``: keys that a strict transaction may be writing.
    - ``listed``: the content of keys, as the index itself lists it.
    - ``following``: reads the next page of the same source, or None if there is none.
    """

    facts: Sequence[FactKey]
    foreign: Collection[FactKey] = ()
    intents: Collection[FactKey] = ()
    listed: Mapping[FactKey, Delivered] = field(default_factory=dict)
    following: Callable[[], Exchange[Source]] | None = None

    @property
    def is_empty(self) -> bool:
        return not self.facts and not self.foreign

    @property
    def beginning(self) -> object:
        """The place where the page begins. It identifies a page that was read ahead when its turn comes."""
        return None

    @property
    def move(self) -> Move | None:
        """The position to record when the page is done."""
        return None

    @property
    def refill(self) -> Refill | None:
        """The progress of a refill to record when the page is done."""
        return None

    def doubted(self, unsure: Collection[FactKey], state: PageState) -> Collection[FactKey]:
        """The keys for which the ledger is not trusted, because the index may hold any content for them."""
        return {*unsure, *state.parked, *self.intents}


@dataclass(frozen=True, kw_only=True)
class OutboxPage(Source):
    """The keys that were changed after the position of a group of slots, up to ``end``."""

    group: SlotGroup
    slots: frozenset[int]
    start: Position
    end: Position

    @property
    def beginning(self) -> object:
        return self.group, self.slots, self.start

    @property
    def move(self) -> Move:
        return Move(self.group, self.end)

    def doubted(self, unsure: Collection[FactKey], state: PageState) -> Collection[FactKey]:
        return set(self.facts) if self.group.unsettled_until is not None else super().doubted(unsure, state)


@dataclass(frozen=True, kw_only=True)
class RefillPage(Source):
    """The next rows of an entity, or the next points of the index itself, during a refill."""

    start: Refill
    end: Refill

    @property
    def beginning(self) -> object:
        return self.start

    @property
    def refill(self) -> Refill:
        return self.end
