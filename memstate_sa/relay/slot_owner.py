"""The owner of slots. This module is pure: it yields requests to claim, keep, save and release slots."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from typing import NamedTuple

from memstate_sa.db.codec import FactKey
from memstate_sa.log.positions import Position, slot_of
from memstate_sa.relay.plan import Parked, ParkedState
from memstate_sa.relay.requests import Acknowledge, Claim, Claimed, Exchange, Redirty, Release, Renew, ask


@dataclass(eq=False)
class SlotGroup:
    """Slots at the same position. The ledger is not trusted until the group reaches ``unsettled_until``.

    ``has_passed_entries``: the group has passed outbox entries since its position was saved.
    """

    slots: set[int]
    position: Position
    unsettled_until: Position | None
    saved_position: Position
    has_passed_entries: bool = False

    @property
    def is_unsaved(self) -> bool:
        return self.has_passed_entries and self.position != self.saved_position

    def move_to(self, position: Position) -> None:
        self.position = position
        if self.unsettled_until is not None and position.covers(self.unsettled_until):
            self.unsettled_until = None


class Move(NamedTuple):
    """The position that a group reaches when the current page is done."""

    group: SlotGroup
    position: Position


@dataclass
class Counters:
    """The work of a relay for an index since it was created. The numbers count keys, except where noted.

    - ``converged``: keys that agree with their rows now.
    - ``embedded``: texts that the embedder got.
    - ``reused``: keys that were written with an existing vector.
    - ``unchanged``: keys that needed no write.
    - ``rejected``: keys that the index or the embedder refused.
    - ``lost``: slots that another owner took before their page was recorded.
    """

    converged: int = 0
    embedded: int = 0
    reused: int = 0
    unchanged: int = 0
    rejected: int = 0
    lost: int = 0


class SlotOwner:
    """The slots of one index that one owner has, their positions, and the keys whose last write is unsure.

    A method that returns `Exchange` must run to its end before the next one begins.
    """

    def __init__(
        self,
        entities: Collection[str],
        *,
        slots: int,
        lease_s: float,
        save_every_s: float,
        clock: Callable[[], float],
    ) -> None:
        self.counters = Counters()
        self.entities = entities
        self._slot_count = slots
        self._lease_s = lease_s
        self._save_every_s = save_every_s
        self._clock = clock
        self._save_at = clock()
        self.reset()

    def reset(self) -> None:
        """Forget all slots. As after a crash, the next owner settles them."""
        self.epochs: dict[int, int] = {}
        self._groups: list[SlotGroup] = []
        self._unsure: dict[FactKey, bool] = {}  # the value is True if an unanswered call may still land
        self._late: dict[FactKey, Parked] = {}
        self._filled = False
        self._marked = False
        self._renew_at = self._clock()
        self._owner_count = self._quota = 0

    @property
    def due_at(self) -> float:
        """The time when the next delivery is needed, even if nothing is committed until then."""
        return min(self._renew_at, self._save_at) if self._has_unsaved() else self._renew_at

    # -- the lease ---------------------------------------------------------------------------------------------------

    def keep(self) -> Exchange[bool]:
        """Renew the lease, or claim slots, if half of the lease is over. Return whether that was necessary."""
        now = self._clock()
        if now < self._renew_at:
            return False
        if self.epochs and (yield from ask(Renew())) == len(self.epochs):
            self._renew_at = now + self._lease_s / 2
        else:
            yield from self._claim()
        return True

    def release(self) -> Exchange[None]:
        """Release all slots, so that other owners can claim them at once."""
        if self._late:
            yield from self._redirty()
        yield from self._give_up(set(self.epochs), leave=True)
        self.reset()

    def _claim(self, *, went_back: bool = False) -> Exchange[Claimed]:
        claimed_at = self._clock()
        claimed = yield from ask(Claim(dict(self.epochs), went_back))
        self._renew_at = claimed_at + self._lease_s / 2
        self._owner_count, self._quota = claimed.owners, claimed.quota
        kept_slots = {slot for slot, claim in claimed.slots.items() if not claim.fresh}
        yield from self._lose(set(self.epochs) - kept_slots)
        if claimed.marked != self._marked or kept_slots != claimed.slots.keys():
            self._filled = False
        self._marked = claimed.marked
        if claimed.entities is not None:
            self.entities = claimed.entities
        for slot, claim in claimed.slots.items():
            if claim.fresh:
                self.epochs[slot] = claim.epoch
                unsettled_until = claimed.present if claim.settle else None
                self._groups.append(SlotGroup({slot}, claim.position, unsettled_until, claim.position))
        return claimed

    def _merge_groups(self) -> None:
        groups: dict[tuple[object, ...], SlotGroup] = {}
        for group in self._groups:
            if group.slots:
                state = (group.position, group.unsettled_until, group.saved_position, group.has_passed_entries)
                groups.setdefault(state, group).slots.update(group.slots)
        self._groups = list(groups.values())

    def _give_up_surplus(self) -> Exchange[None]:
        """Release the slots beyond our share, beginning with the highest positions. Unsettled slots stay."""
        settled = [
            (group.position.floor, slot)
            for group in self._groups
            if group.unsettled_until is None
            for slot in group.slots
        ]
        surplus = len(self.epochs) - self._quota
        slots = {slot for _, slot in sorted(settled, reverse=True)[:surplus]}
        if slots:
            yield from self._give_up(slots, leave=False)

    def _give_up(self, slots: set[int], *, leave: bool) -> Exchange[None]:
        unsure = self._repeats(slots, "interrupted")
        positions = {slot: group.position for group in self._groups for slot in group.slots & slots}
        epochs = {slot: self.epochs[slot] for slot in slots}
        unsettled = slots & self._unsettled_slots()
        yield from ask(Release(epochs, positions, unsettled, unsure, leave))
        self._drop(slots)
        for fact in unsure:
            del self._unsure[fact]

    def _unsettled_slots(self) -> set[int]:
        return {slot for group in self._groups if group.unsettled_until is not None for slot in group.slots}

    def _lose(self, slots: set[int]) -> Exchange[None]:
        """Drop *slots*, which another owner has taken.

        Our late writes may reach the index after its writes, so the new owner must repeat these keys.
        """
        if not slots:
            return
        self.counters.lost += len(slots)
        self._drop(slots)
        late = self._repeats(slots, "lease lost")
        self._late |= late
        for fact in late:
            del self._unsure[fact]
        if self._late:
            yield from self._redirty()

    def _redirty(self) -> Exchange[None]:
        yield from ask(Redirty(dict(self._late)))
        self._late.clear()

    def _repeats(self, slots: Collection[int], why: str) -> dict[FactKey, Parked]:
        """The unsure keys of *slots*, as parked keys for the next owner."""
        return {
            fact: Parked(0, 0.0, ParkedState.AGAIN, why, deliver_again=may_land)
            for fact, may_land in self._unsure.items()
            if self._slot(fact) in slots
        }

    def _drop(self, slots: set[int]) -> None:
        for group in self._groups:
            group.slots -= slots
        for slot in slots:
            self.epochs.pop(slot, None)

    def _slot(self, fact: FactKey) -> int:
        return slot_of(*fact) % self._slot_count

    def _is_held_since(self, epochs: Mapping[int, int]) -> Callable[[FactKey], bool]:
        """A function that tells whether we have had the slot of a key without a break since *epochs* were read."""
        if self.epochs == epochs:
            return lambda _: True
        kept_slots = {slot for slot, epoch in epochs.items() if self.epochs.get(slot) == epoch}
        return lambda fact: self._slot(fact) in kept_slots

    # -- positions ---------------------------------------------------------------------------------------------------

    def save(self) -> Exchange[None]:
        """Record the positions that have changed."""
        positions = self._unsaved_positions()
        if positions:
            yield from self._acknowledge(
                Acknowledge({slot: self.epochs[slot] for slot in positions}, positions=positions)
            )

    def _save_in_time(self, renewed: bool) -> Exchange[None]:
        """Save the changed positions when the lease is renewed, and sooner if a group has passed outbox entries."""
        if renewed or (self._clock() >= self._save_at and self._has_unsaved()):
            yield from self.save()

    def _has_unsaved(self) -> bool:
        return any(group.is_unsaved for group in self._groups)

    def _unsaved_positions(self, move: Move | None = None) -> dict[int, Position]:
        """The unrecorded positions by slot, as they will be after *move*."""
        positions = (
            (group, move.position if move is not None and group is move.group else group.position)
            for group in self._groups
        )
        return {
            slot: position for group, position in positions if position != group.saved_position for slot in group.slots
        }

    def _acknowledge(self, record: Acknowledge) -> Exchange[None]:
        lost_slots = yield from ask(record)
        if record.positions:
            self._save_at = self._clock() + self._save_every_s
            for group in self._groups:
                group.saved_position = record.positions.get(next(iter(group.slots), -1), group.saved_position)
                group.has_passed_entries = False
        yield from self._lose(set(lost_slots) & self.epochs.keys())
