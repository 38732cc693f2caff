"""What a holder of slots does, without doing it: it yields requests, and is sent what came of them.

Pure. The same code runs on a database and an index (`delivery`) and, with a seeded clock, on simulated ones.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Generator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Generic, NamedTuple, TypeAlias, TypeVar

from memstate_sa.db.codec import FactKey
from memstate_sa.embedding.batches import text_batches
from memstate_sa.errors import DeliveryRejected, DeliveryRetryable, MemstateError
from memstate_sa.indexes.base import Point, Stored, Vector
from memstate_sa.log.positions import Page, Position, slot_of
from memstate_sa.relay.plan import AGAIN, Delivered, Parked, Write, park, plan
from memstate_sa.relay.retry import RetryPolicy, halves
from memstate_sa.tracking.projection import Projection, point_id

R = TypeVar("R")
T = TypeVar("T")

ENTITY = "memstate_entity"
"""The metadata name under which points carry their entity, in an index that has several."""


class Request(Generic[R]):
    """Something to be done outside, whose outcome is an R or an exception."""


Steps: TypeAlias = Generator[Request[Any], Any, R]


def ask(request: Request[R]) -> Steps[R]:
    reply: R = yield request
    return reply


# -- requests: the lease ----------------------------------------------------------------------------------------------


class HeldSlot(NamedTuple):
    """A slot that is ours. ``settle``: whoever held it before may have written what it did not record."""

    epoch: int
    at: Position
    fresh: bool
    settle: bool


class Claimed(NamedTuple):
    """``quota``: how many slots are our share among ``holders``. ``marked``: points carry their entity.

    ``entities`` are those that we deliver: perhaps not all that we know. None: all.
    """

    slots: Mapping[int, HeldSlot]
    present: Position
    holders: int
    quota: int
    marked: bool
    entities: Collection[str] | None = None


@dataclass(frozen=True, slots=True)
class Claim(Request[Claimed]):
    """Renew the lease and take free slots up to our share; ``epochs`` are those of the slots we believe to hold.

    ``went_back``: the database lacks what we have delivered of it.
    """

    epochs: Mapping[int, int]
    went_back: bool = False


@dataclass(frozen=True, slots=True)
class Renew(Request[int]):
    """Renew the lease; how many slots are ours."""


class DatabaseState(NamedTuple):
    """``free``: a slot has no owner. ``due``: a parked key of our slots is. ``mine``: how many slots are ours.

    ``elsewhere``: the database is not at the past in which we claimed our slots.
    """

    present: Position
    holders: int
    mine: int
    free: bool
    due: bool
    paused: bool
    elsewhere: bool = False


@dataclass(frozen=True, slots=True)
class Look(Request[DatabaseState]):
    slots: Collection[int]


@dataclass(frozen=True, slots=True)
class Release(Request[None]):
    """Let slots go, delivered up to these positions; ``unsure`` keys are to be delivered again by the next holder.

    ``unsettled`` slots keep their owner's name, as if it had died: the next one settles what this one has not.
    """

    epochs: Mapping[int, int]
    positions: Mapping[int, Position]
    unsettled: Collection[int]
    unsure: Mapping[FactKey, Parked]
    leave: bool


# -- requests: sources of dirty keys ----------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class ReadPage(Request[Page]):
    at: Position
    present: Position
    slots: Collection[int]
    limit: int


@dataclass(frozen=True, slots=True)
class ReadDue(Request[Sequence[FactKey]]):
    """Parked keys of these slots whose time has come."""

    slots: Collection[int]
    limit: int


class Refill(NamedTuple):
    """Progress of delivering in full: ``slots`` have the rows of ``entity`` (of the index itself: '') to ``position``.

    None is the beginning, or with ``done`` the end.
    """

    entity: str
    position: str | None
    slots: frozenset[int]
    done: bool = False


@dataclass(frozen=True, slots=True)
class ReadRefill(Request[Refill | None]):
    """What is not done yet of these slots."""

    slots: Collection[int]


class KeyPage(NamedTuple):
    """Keys of all slots, with the fingerprint where the index told; ``last``: where to go on, None at the end."""

    facts: Mapping[FactKey, str | None]
    last: str | None


@dataclass(frozen=True, slots=True)
class ListFacts(Request[KeyPage]):
    """The next rows of an entity, or points of the index itself."""

    entity: str
    after: str | None
    limit: int


# -- requests: one page -----------------------------------------------------------------------------------------------


class ParkedKey(NamedTuple):
    """A parked key: how often it was rejected, which parking this is, and whether it has to be repeated."""

    attempts: int
    mark: str
    repeat: bool = False


@dataclass(frozen=True, slots=True)
class PageState:
    """The committed rows of some keys (absent: no row), which could not be projected, and what is known of them.

    ``impossible`` keys are those that no row can have: nothing is to be held for them.
    """

    truth: Mapping[FactKey, Projection] = field(default_factory=dict)
    failed: Mapping[FactKey, MemstateError] = field(default_factory=dict)
    ledger: Mapping[FactKey, Delivered] = field(default_factory=dict)
    parked: Mapping[FactKey, ParkedKey] = field(default_factory=dict)
    impossible: Mapping[FactKey, MemstateError] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Read(Request[PageState]):
    facts: Collection[FactKey]


class Embedded(NamedTuple):
    """Vectors by text fingerprint, and for how many of them the embedder was asked; the others were known."""

    vectors: Mapping[str, Vector]
    asked: int


@dataclass(frozen=True, slots=True)
class Embed(Request[Embedded]):
    """Vectors of texts, by text fingerprint."""

    texts: Mapping[str, str]


@dataclass(frozen=True, slots=True)
class Fetch(Request[Mapping[FactKey, Stored]]):
    """What the index holds already."""

    facts: Collection[FactKey]


class Put(NamedTuple):
    """What is to be written for a fact, under the epoch of its slot; a point of None is to be removed."""

    fact: FactKey
    epoch: int
    delivered: Delivered
    point: Point | None


@dataclass(frozen=True, slots=True)
class Upsert(Request[None]):
    puts: Sequence[Put]


@dataclass(frozen=True, slots=True)
class Remove(Request[None]):
    puts: Sequence[Put]


@dataclass(frozen=True, slots=True)
class Acknowledge(Request[frozenset[int]]):
    """Record a page, in one transaction; the answer is which of the slots in ``epochs`` are lost.

    Of lost slots nothing is recorded. ``resolved`` are parked keys that are delivered now, each with the mark that was
    read: one that was parked again meanwhile stays parked. ``foreign`` keys are of entities that this holder does not
    know.
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
    """Have the holder of these keys deliver them again: what we wrote may land after what it wrote."""

    facts: Mapping[FactKey, Parked]


# -- the holder -------------------------------------------------------------------------------------------------------


@dataclass(eq=False)
class SlotGroup:
    """Slots that stand at the same position. Until ``settle`` is reached the ledger is not believed."""

    slots: set[int]
    at: Position
    settle: Position | None
    saved: Position
    passed: bool = False  # entries, since it was saved

    @property
    def unsaved(self) -> bool:
        return self.passed and self.at != self.saved


@dataclass
class Counters:
    """What a holder has done since it began, in keys unless it says otherwise.

    ``embedded``: texts given to the embedder · ``reused``: written with the vector that was there · ``unchanged``:
    not written at all · ``lost``: slots that another took before they were acknowledged.
    """

    converged: int = 0
    embedded: int = 0
    reused: int = 0
    unchanged: int = 0
    rejected: int = 0
    lost: int = 0


@dataclass
class _Page:
    """One page in work: under which epochs its truth was read, and what came of it."""

    epochs: Mapping[int, int]
    found: PageState
    doubted: Collection[FactKey]
    again: Collection[FactKey]
    failed: dict[FactKey, MemstateError]
    written: dict[FactKey, Delivered] = field(default_factory=dict)
    complete: bool = True


class SlotWorker:
    """The delivery to one index by one owner: which slots it holds, and how far each of them is.

    A method that returns `Steps` is to be run to its end before the next is begun. When it ends with an exception,
    nothing is lost: what may have been written and was not recorded is unsure, and is written again.
    """

    def __init__(
        self,
        entities: Collection[str],
        *,
        slots: int,
        page_size: int,
        lease_s: float,
        save_every_s: float,
        policy: RetryPolicy,
        clock: Callable[[], float],
        jitter: Callable[[], float],
    ) -> None:
        self.counters = Counters()
        self.max_batch = page_size
        self.stopping = False  # set from outside: end after the batch in work
        self.more = False  # whether the last step left something that it knows of
        self.entities = entities
        self._of = slots
        self._page_size = page_size
        self._lease_s = lease_s
        self._save_every_s = save_every_s
        self._policy = policy
        self._clock = clock
        self._jitter = jitter
        self._save_at = clock()
        self.forget()

    def forget(self) -> None:
        """Begin anew, as after a crash: what was held is settled by whoever claims it."""
        self.epochs: dict[int, int] = {}
        self._lots: list[SlotGroup] = []
        self._unsure: dict[FactKey, bool] = {}  # whether the call may yet land
        self._late: dict[FactKey, Parked] = {}
        self._embedded: dict[str, Vector] = {}
        self._filled = False
        self._marked = False
        self._renew_at = self._clock()
        self._holders = self._quota = 0

    @property
    def due_at(self) -> float:
        """When a step is needed though nothing was committed."""
        return min(self._renew_at, self._save_at) if any(lot.unsaved for lot in self._lots) else self._renew_at

    # -- steps -------------------------------------------------------------------------------------------------------

    def step(self) -> Steps[int | None]:
        """Deliver up to a page from each source that has one: keys converged, or None when there was nothing to do.

        Raises DeliveryRetryable when the index or the embedder is unavailable.
        """
        self.more = False
        renewed = yield from self.keep()
        if self._late:
            yield from self._redirty()
        seen = yield from ask(Look(tuple(self.epochs)))
        present = seen.present
        wants = seen.free and len(self.epochs) < self._quota
        went_back = any(not present.covers(lot.at) for lot in self._lots if lot.slots)
        if went_back or seen.elsewhere:
            present = (yield from self._claim(went_back=went_back)).present
        elif wants or seen.holders != self._holders or seen.mine != len(self.epochs):
            present = (yield from self._claim()).present
        if len(self.epochs) > self._quota:
            yield from self._share()
        self._merge()  # not before: a slot that is claimed in the middle of a page must not move with it
        if seen.paused or not self.epochs:
            yield from self._save_in_time(renewed)
            return None
        counts = []
        if seen.due:
            counts.append((yield from self._deliver_parked()))
        for lot in tuple(self._lots):
            counts.append((yield from self._deliver_page(lot, present)))  # noqa: PERF401
        if not self._filled:
            counts.append((yield from self._deliver_refill()))
        done = [count for count in counts if count is not None]
        if renewed or not done:
            yield from self._save_in_time(renewed)
        return sum(done) if done else None

    def _save_in_time(self, renewed: bool) -> Steps[None]:
        """Whatever moved, with every renewal of the lease; what entries were passed, before long."""
        if renewed or (self._clock() >= self._save_at and any(lot.unsaved for lot in self._lots)):
            yield from self.save()

    def keep(self) -> Steps[bool]:
        """Renew the lease if half of it is over, or claim what can be had; whether that was needed."""
        now = self._clock()
        if now < self._renew_at:
            return False
        if self.epochs and (yield from ask(Renew())) == len(self.epochs):
            self._renew_at = now + self._lease_s / 2
        else:
            yield from self._claim()
        return True

    def save(self) -> Steps[None]:
        """Record how far each slot is, if that changed."""
        positions = self._positions()
        if positions:
            yield from self._acknowledge(
                Acknowledge({slot: self.epochs[slot] for slot in positions}, positions=positions)
            )

    def release(self) -> Steps[None]:
        """Let others claim the slots at once."""
        if self._late:
            yield from self._redirty()
        yield from self._let_go(set(self.epochs), leave=True)
        self.forget()

    # -- the lease ---------------------------------------------------------------------------------------------------

    def _claim(self, *, went_back: bool = False) -> Steps[Claimed]:
        claimed_at = self._clock()
        claimed = yield from ask(Claim(dict(self.epochs), went_back))
        self._renew_at = claimed_at + self._lease_s / 2
        self._holders, self._quota = claimed.holders, claimed.quota
        kept = {slot for slot, held in claimed.slots.items() if not held.fresh}
        yield from self._lose(set(self.epochs) - kept)
        if claimed.marked != self._marked or kept != claimed.slots.keys():
            self._filled = False
        self._marked = claimed.marked
        if claimed.entities is not None:
            self.entities = claimed.entities
        for slot, held in claimed.slots.items():
            if held.fresh:
                self.epochs[slot] = held.epoch
                self._lots.append(SlotGroup({slot}, held.at, claimed.present if held.settle else None, held.at))
        return claimed

    def _merge(self) -> None:
        lots: dict[tuple[object, ...], SlotGroup] = {}
        for lot in self._lots:
            if lot.slots:
                lots.setdefault((lot.at, lot.settle, lot.saved, lot.passed), lot).slots.update(lot.slots)
        self._lots = list(lots.values())

    def _share(self) -> Steps[None]:
        """Others have come: let go what is more than our share, what is furthest first. What is unsettled, stays."""
        settled = [(lot.at.floor, slot) for lot in self._lots if lot.settle is None for slot in lot.slots]
        surplus = len(self.epochs) - self._quota
        slots = {slot for _, slot in sorted(settled, reverse=True)[:surplus]}
        if slots:
            yield from self._let_go(slots, leave=False)

    def _let_go(self, slots: set[int], *, leave: bool) -> Steps[None]:
        unsure = self._repeats(slots, "interrupted")
        positions = {slot: lot.at for lot in self._lots for slot in lot.slots & slots}
        epochs = {slot: self.epochs[slot] for slot in slots}
        unsettled = slots & self._unsettled_slots()
        yield from ask(Release(epochs, positions, unsettled, unsure, leave))
        self._drop(slots)
        for fact in unsure:
            del self._unsure[fact]

    def _unsettled_slots(self) -> set[int]:
        return {slot for lot in self._lots if lot.settle is not None for slot in lot.slots}

    def _lose(self, slots: set[int]) -> Steps[None]:
        """Another has taken *slots*. What we wrote late may have overwritten what it wrote: it writes that again."""
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

    def _redirty(self) -> Steps[None]:
        yield from ask(Redirty(dict(self._late)))
        self._late.clear()

    def _repeats(self, slots: Collection[int], why: str) -> dict[FactKey, Parked]:
        """What is unsure of *slots*, for whoever has them next."""
        return {
            fact: Parked(0, 0.0, AGAIN, why, repeat=may_land)
            for fact, may_land in self._unsure.items()
            if self._slot(fact) in slots
        }

    def _drop(self, slots: set[int]) -> None:
        for lot in self._lots:
            lot.slots -= slots
        for slot in slots:
            self.epochs.pop(slot, None)

    def _slot(self, fact: FactKey) -> int:
        return slot_of(*fact) % self._of

    # -- sources of dirty keys -----------------------------------------------------------------------------------------

    def _deliver_parked(self) -> Steps[int | None]:
        facts = yield from ask(ReadDue(tuple(self.epochs), self._page_size))
        if not facts:
            return None
        self.more |= len(facts) == self._page_size
        return (yield from self._converge(facts))

    def _deliver_page(self, lot: SlotGroup, present: Position) -> Steps[int | None]:
        if self.stopping or not lot.slots or lot.at.covers(present):
            return None
        page = yield from ask(ReadPage(lot.at, present, frozenset(lot.slots), self._page_size))
        after = lot.at.advance(present, page.last)
        self.more |= page.last is not None
        if not page.facts:
            self._move(lot, after)
            return None
        facts = [fact for fact in dict.fromkeys(page.facts) if fact[0] in self.entities]
        foreign = {fact for fact in page.facts if fact[0] not in self.entities}
        settle = lot.settle is not None
        again = page.intents
        return (yield from self._converge(facts, settle=settle, again=again, foreign=foreign, lot=lot, after=after))

    def _move(self, lot: SlotGroup, after: Position) -> None:
        lot.at = after
        if lot.settle is not None and after.covers(lot.settle):
            lot.settle = None

    def _deliver_refill(self) -> Steps[int | None]:
        refill = yield from ask(ReadRefill(tuple(self.epochs)))
        if refill is None:
            self._filled = True
            return None
        self.more = True
        listed = yield from ask(ListFacts(refill.entity, refill.position, self._page_size))
        ours = {fact: found for fact, found in listed.facts.items() if self._slot(fact) in refill.slots}
        facts = {fact: fingerprint for fact, fingerprint in ours.items() if fact[0] in self.entities}
        foreign = ours.keys() - facts.keys()
        held = {fact: Delivered(fingerprint, None, False) for fact, fingerprint in facts.items() if fingerprint}
        after = refill._replace(position=listed.last, done=listed.last is None)
        return (yield from self._converge(list(facts), held=held, foreign=foreign, refill=after))

    # -- one page ------------------------------------------------------------------------------------------------------

    def _converge(
        self,
        facts: Sequence[FactKey],
        *,
        settle: bool = False,
        held: Mapping[FactKey, Delivered] | None = None,
        again: Collection[FactKey] = (),
        foreign: Collection[FactKey] = (),
        lot: SlotGroup | None = None,
        after: Position | None = None,
        refill: Refill | None = None,
    ) -> Steps[int]:
        """Make the index agree with the committed rows of *facts*, then record that, and where it leads to.

        *held* is what the index said that it holds; *again* are keys that somebody else may be writing. Returns how
        many keys agree now.
        """
        epochs = dict(self.epochs)
        found = (yield from ask(Read(facts))) if facts else PageState()
        # Of what failed before, or is unsure, the index may hold anything, whatever the ledger says.
        doubted = set(facts) if settle else {*self._unsure, *found.parked, *again}
        # Somebody is to know of a change to a key that no row can have; a mere point of such a key is removed.
        announced = facts if lot is not None else [fact for fact, stuck in found.parked.items() if stuck.attempts]
        unknown = {fact: found.impossible[fact] for fact in announced if fact in found.impossible}
        page = _Page(epochs, found, doubted, again, {**found.failed, **unknown})
        readable = [fact for fact in facts if fact not in found.failed]
        writes = plan(readable, found.truth, held or found.ledger, doubted)
        if held and self._marked:
            # The index tells the content of its points, not whether they carry their entity.
            differing = {write.fact for write in writes}
            writes += [Write(fact, found.truth[fact], True) for fact in readable if fact in held.keys() - differing]
        failure: DeliveryRetryable | None = None
        try:
            yield from self._write(page, writes)
        except DeliveryRetryable as error:
            failure, page.complete = error, False
        differing = {write.fact for write in writes}
        agreed = [fact for fact in readable if fact not in differing]
        if held:
            page.written.update({fact: _delivered(found.truth[fact]) for fact in agreed if fact in held})
        recorded = yield from self._record(page, agreed, foreign, lot, after, refill)
        if failure is not None:
            raise failure
        self.counters.unchanged += len(agreed)
        return recorded

    def _record(
        self,
        page: _Page,
        agreed: Collection[FactKey],
        foreign: Collection[FactKey],
        lot: SlotGroup | None,
        after: Position | None,
        refill: Refill | None,
    ) -> Steps[int]:
        parked = page.found.parked
        parking = {
            fact: park(error, (parked[fact].attempts if fact in parked else 0) + 1, self._policy, self._jitter)
            for fact, error in page.failed.items()
        }
        self.counters.rejected += len(parking)
        for fact in parking.keys() & parked.keys():  # unless somebody has it tried again meanwhile
            parking[fact] = parking[fact]._replace(instead_of=parked[fact].mark)
        for fact in self._landing(page):
            attempts = parking[fact].attempts if fact in parking else 0
            parking[fact] = Parked(attempts, self._lease_s, AGAIN, "may land late")
        converged = [fact for fact in dict.fromkeys([*page.written, *agreed]) if fact not in page.failed]
        positions: Mapping[int, Position] = {}
        if page.complete and self._clock() >= self._save_at:
            positions = self._positions(lot, after)
        resolved = {fact: parked[fact].mark for fact in converged if fact in parked}
        refill = refill if page.complete else None
        foreign = foreign if page.complete else ()
        slots = {self._slot(fact) for fact in (*page.written, *resolved, *parking)}
        slots.update(positions, refill.slots if refill else ())
        if slots or foreign:
            epochs = {slot: epoch for slot, epoch in page.epochs.items() if slot in slots}
            yield from self._acknowledge(
                Acknowledge(epochs, page.written, resolved, parking, foreign, positions, refill)
            )
        for fact in (*converged, *page.failed):
            self._unsure.pop(fact, None)
        if page.complete:
            self._embedded.clear()
            if lot is not None and after is not None:
                lot.passed = not positions
                self._move(lot, after)
        count = sum(map(self._still_ours(page), converged))
        self.counters.converged += count
        return count

    def _landing(self, page: _Page) -> set[FactKey]:
        """Keys that a call may yet write which nobody waits for: once more, when no such call can land any more."""
        repeats = {fact for fact, stuck in page.found.parked.items() if stuck.repeat}
        told = (repeats | set(page.again)) & (page.written.keys() | page.failed.keys())
        told |= {fact for fact in page.again if fact[0] not in self.entities}  # passed by, and to be repeated there
        return told.union(fact for fact, may_land in self._unsure.items() if may_land)

    def _acknowledge(self, record: Acknowledge) -> Steps[None]:
        lost = yield from ask(record)
        if record.positions:
            self._save_at = self._clock() + self._save_every_s
            for lot in self._lots:
                lot.saved = record.positions.get(next(iter(lot.slots), -1), lot.saved)
                lot.passed = False
        yield from self._lose(set(lost) & self.epochs.keys())

    def _positions(self, moving: SlotGroup | None = None, after: Position | None = None) -> dict[int, Position]:
        """Where each slot is, if it is not recorded there; *moving* will be at *after*."""
        places = ((lot, after if lot is moving and after is not None else lot.at) for lot in self._lots)
        return {slot: at for lot, at in places if at != lot.saved for slot in lot.slots}

    def _still_ours(self, page: _Page) -> Callable[[FactKey], bool]:
        """Tells of a fact whether its slot is held as it was when *page* was begun."""
        if self.epochs == page.epochs:
            return lambda _: True
        kept = {slot for slot, epoch in page.epochs.items() if self.epochs.get(slot) == epoch}
        return lambda fact: self._slot(fact) in kept

    # -- writing -------------------------------------------------------------------------------------------------------

    def _write(self, page: _Page, writes: Sequence[Write]) -> Steps[None]:
        """Write to the index; keys that it or the embedder refuses go to ``page.failed``, found by bisection.

        Those that failed before are written apart, lest they drag others into their bisection. Raises
        DeliveryRetryable.
        """
        for suspect in (False, True):
            some = [write for write in writes if (write.fact in page.found.parked) is suspect]
            for removing in (True, False):
                of_kind = [write for write in some if (write.projection is None) is removing]
                for start in range(0, len(of_kind), self.max_batch):
                    batch = of_kind[start : start + self.max_batch]
                    if not (yield from self._go_on(page)):
                        return
                    if removing:
                        ours = self._still_ours(page)
                        puts = [self._put(write, page) for write in batch if ours(write.fact)]
                    else:
                        puts = yield from self._embedded_puts(page, batch)
                    yield from self._send(page, puts)
                    if not page.complete:
                        return

    def _go_on(self, page: _Page) -> Steps[bool]:
        """Before each call that takes long: whether to, and with a lease that will outlast it."""
        if self.stopping:
            page.complete = False
            return False
        yield from self.keep()
        return True

    def _put(self, write: Write, page: _Page, vector: Vector | None = None) -> Put:
        epoch, projection, point = page.epochs[self._slot(write.fact)], write.projection, None
        if projection is not None:
            assert projection.fingerprint is not None
            assert vector is not None
            metadata = {ENTITY: write.fact[0], **projection.metadata} if self._marked else projection.metadata
            point = Point(point_id(*write.fact), vector, projection.fingerprint, epoch, metadata, projection.text)
        return Put(write.fact, epoch, _delivered(projection), point)

    def _embedded_puts(self, page: _Page, writes: Sequence[Write]) -> Steps[list[Put]]:
        """*writes* with their vectors, those that are still ours and whose text was not refused."""
        digests = {write.fact: _text_fingerprint(write) for write in writes}
        held = [w.fact for w in writes if w.same_text or w.fact in page.doubted]
        stored = (yield from ask(Fetch(held))) if held else {}
        fetched = {
            write.fact: stored[write.fact].vector
            for write in writes
            if write.fact in stored
            and write.projection is not None
            and stored[write.fact].fingerprint in (write.projection.fingerprint, write.held)
        }
        missing = {
            digests[write.fact]: write.projection.text or ""
            for write in writes
            if write.projection is not None and write.fact not in fetched and digests[write.fact] not in self._embedded
        }
        refused: dict[str, MemstateError] = {}
        for texts in text_batches(missing):
            if not (yield from self._go_on(page)):
                break

            def embed(some: Sequence[str]) -> Steps[None]:
                embedded = yield from ask(Embed({digest: missing[digest] for digest in some}))
                self._embedded.update(embedded.vectors)
                self.counters.embedded += embedded.asked
                self.counters.reused += len(embedded.vectors) - embedded.asked

            refused.update((yield from _isolate(list(texts), embed)))
        yield from self.keep()
        puts, ours = [], self._still_ours(page)
        for write in writes:
            digest = digests[write.fact]
            vector = fetched.get(write.fact, self._embedded.get(digest))
            if digest in refused:
                page.failed[write.fact] = refused[digest]
            elif vector is not None and ours(write.fact):
                puts.append(self._put(write, page, vector))
                self.counters.reused += write.fact in fetched
        return puts

    def _send(self, page: _Page, puts: Sequence[Put]) -> Steps[None]:
        def send(some: Sequence[Put]) -> Steps[None]:
            # Until it is recorded, whatever interrupts us; and what may land from an earlier call, still may.
            self._unsure.update({put.fact: self._unsure.get(put.fact, False) for put in some})
            try:
                yield from ask(Remove(some) if some[0].point is None else Upsert(some))
            except DeliveryRetryable as error:
                if error.may_land:
                    self._unsure.update({put.fact: True for put in some})
                raise
            page.written.update({put.fact: put.delivered for put in some})

        if puts:
            failed = yield from _isolate(puts, send)
            page.failed.update({put.fact: error for put, error in failed})


def _isolate(items: Sequence[T], call: Callable[[Sequence[T]], Steps[None]]) -> Steps[list[tuple[T, MemstateError]]]:
    """Run *call*; when it is rejected, find by bisection the items at fault."""
    try:
        yield from call(items)
    except DeliveryRejected as error:
        if len(items) == 1:
            return [(items[0], error)]
    else:
        return []
    first, second = halves(items)
    return [*(yield from _isolate(first, call)), *(yield from _isolate(second, call))]


def _delivered(projection: Projection | None) -> Delivered:
    if projection is None:
        return Delivered(None, None, True)
    return Delivered(projection.fingerprint, projection.text_fingerprint, False)


def _text_fingerprint(write: Write) -> str:
    assert write.projection is not None
    assert write.projection.text_fingerprint is not None
    return write.projection.text_fingerprint
