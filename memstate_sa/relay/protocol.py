"""The delivery of an index, decided without I/O: it yields requests, and is sent the replies.

Pure. The same code runs on a database and an index (`delivery`) and, with a seeded clock, on simulated ones.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TypeVar

from memstate_sa.db.codec import FactKey
from memstate_sa.embedding.batches import text_batches
from memstate_sa.errors import DeliveryRejected, DeliveryRetryable, MemstateError
from memstate_sa.indexes.base import Vector
from memstate_sa.log.positions import Position
from memstate_sa.relay.plan import Delivered, Parked, ParkedState, PlannedWrite, park, plan
from memstate_sa.relay.points import make_point
from memstate_sa.relay.requests import (
    Acknowledge,
    Embed,
    Fetch,
    ListFacts,
    Look,
    PageState,
    PointWrite,
    Read,
    ReadDue,
    ReadPage,
    ReadRefill,
    Refill,
    Remove,
    Steps,
    Upsert,
    ask,
)
from memstate_sa.relay.retry import RetryPolicy, halves
from memstate_sa.relay.slot_owner import Move, SlotGroup, SlotOwner
from memstate_sa.tracking.projection import Projection

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class KeyBatch:
    """Keys to converge, and the progress to record when they are done.

    ``settle``: the ledger is believed about none of them. ``indexed``: the content that the index listed for them.
    ``intents``: keys that a strict transaction may be writing. ``foreign``: keys of entities that we do not deliver.
    """

    facts: Sequence[FactKey]
    settle: bool = False
    indexed: Mapping[FactKey, Delivered] = field(default_factory=dict)
    intents: Collection[FactKey] = ()
    foreign: Collection[FactKey] = ()
    move: Move | None = None
    refill: Refill | None = None


@dataclass
class _Page:
    """A batch in work: the epochs under which its rows were read, and the outcome of its keys."""

    batch: KeyBatch
    epochs: Mapping[int, int]
    state: PageState
    doubted: Collection[FactKey]
    failed: dict[FactKey, MemstateError]
    written: dict[FactKey, Delivered] = field(default_factory=dict)
    complete: bool = True


class SlotWorker(SlotOwner):
    """The delivery to one index by one owner.

    When a step ends with an exception, nothing is lost: writes that may have happened and were not recorded are unsure,
    and are repeated.
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
        super().__init__(entities, slots=slots, lease_s=lease_s, save_every_s=save_every_s, clock=clock)
        self.max_batch = page_size
        self.stopping = False  # set from outside: end after the batch in work
        self.more = False  # whether the last step left something that it knows of
        self._page_size = page_size
        self._policy = policy
        self._jitter = jitter

    def reset(self) -> None:
        super().reset()
        self._embedded: dict[str, Vector] = {}

    def step(self) -> Steps[int | None]:
        """Deliver up to a page from each source. Return the number of keys converged, or None without any work.

        Raises DeliveryRetryable when the index or the embedder is unavailable.
        """
        self.more = False
        renewed = yield from self.keep()
        if self._late:
            yield from self._redirty()
        state = yield from ask(Look(tuple(self.epochs)))
        present = state.present
        may_take_slots = state.free and len(self.epochs) < self._quota
        went_back = any(not present.covers(group.position) for group in self._groups if group.slots)
        if went_back or state.elsewhere:
            present = (yield from self._claim(went_back=went_back)).present
        elif may_take_slots or state.owners != self._owner_count or state.own_slots != len(self.epochs):
            present = (yield from self._claim()).present
        if len(self.epochs) > self._quota:
            yield from self._give_up_surplus()
        self._merge_groups()  # not before: a slot that is claimed in the middle of a page must not move with it
        if state.paused or not self.epochs:
            yield from self._save_in_time(renewed)
            return None
        counts = []
        if state.due:
            counts.append((yield from self._deliver_parked()))
        for group in tuple(self._groups):
            counts.append((yield from self._deliver_page(group, present)))  # noqa: PERF401
        if not self._filled:
            counts.append((yield from self._deliver_refill()))
        done = [count for count in counts if count is not None]
        if renewed or not done:
            yield from self._save_in_time(renewed)
        return sum(done) if done else None

    # -- sources of dirty keys -----------------------------------------------------------------------------------------

    def _deliver_parked(self) -> Steps[int | None]:
        facts = yield from ask(ReadDue(tuple(self.epochs), self._page_size))
        if not facts:
            return None
        self.more |= len(facts) == self._page_size
        return (yield from self._converge(KeyBatch(facts)))

    def _deliver_page(self, group: SlotGroup, present: Position) -> Steps[int | None]:
        if self.stopping or not group.slots or group.position.covers(present):
            return None
        page = yield from ask(ReadPage(group.position, present, frozenset(group.slots), self._page_size))
        position = group.position.advance(present, page.last)
        self.more |= page.last is not None
        if not page.facts:
            group.move_to(position)
            return None
        batch = KeyBatch(
            [fact for fact in dict.fromkeys(page.facts) if fact[0] in self.entities],
            settle=group.unsettled_until is not None,
            intents=page.intents,
            foreign={fact for fact in page.facts if fact[0] not in self.entities},
            move=Move(group, position),
        )
        return (yield from self._converge(batch))

    def _deliver_refill(self) -> Steps[int | None]:
        refill = yield from ask(ReadRefill(tuple(self.epochs)))
        if refill is None:
            self._filled = True
            return None
        self.more = True
        page = yield from ask(ListFacts(refill.entity, refill.position, self._page_size))
        own = {fact: fingerprint for fact, fingerprint in page.facts.items() if self._slot(fact) in refill.slots}
        facts = {fact: fingerprint for fact, fingerprint in own.items() if fact[0] in self.entities}
        batch = KeyBatch(
            list(facts),
            indexed={fact: Delivered(fingerprint, None, False) for fact, fingerprint in facts.items() if fingerprint},
            foreign=own.keys() - facts.keys(),
            refill=refill._replace(position=page.last, done=page.last is None),
        )
        return (yield from self._converge(batch))

    # -- one page ------------------------------------------------------------------------------------------------------

    def _converge(self, batch: KeyBatch) -> Steps[int]:
        """Make the index agree with the committed rows of *batch*, then record its progress.

        Returns the number of keys that agree now.
        """
        epochs = dict(self.epochs)
        facts, indexed = batch.facts, batch.indexed
        state = (yield from ask(Read(facts))) if facts else PageState()
        # The index may hold anything for keys that failed before or are unsure, whatever the ledger says.
        doubted = set(facts) if batch.settle else {*self._unsure, *state.parked, *batch.intents}
        # An operator must learn of a change to a key that no row can have. A mere point of such a key is removed.
        refused = [fact for fact, parked in state.parked.items() if parked.attempts]
        announced = facts if batch.move is not None else refused
        unknown = {fact: state.impossible[fact] for fact in announced if fact in state.impossible}
        page = _Page(batch, epochs, state, doubted, {**state.failed, **unknown})
        readable = [fact for fact in facts if fact not in state.failed]
        writes = plan(readable, state.truth, indexed or state.ledger, doubted)
        if indexed and self._marked:
            # The index tells the content of its points, not whether they carry their entity.
            differing = {write.fact for write in writes}
            writes += [
                PlannedWrite(fact, state.truth[fact], True) for fact in readable if fact in indexed.keys() - differing
            ]
        failure: DeliveryRetryable | None = None
        try:
            yield from self._write(page, writes)
        except DeliveryRetryable as error:
            failure, page.complete = error, False
        differing = {write.fact for write in writes}
        agreed = [fact for fact in readable if fact not in differing]
        if indexed:
            page.written.update({fact: _delivered(state.truth[fact]) for fact in agreed if fact in indexed})
        count = yield from self._record(page, agreed)
        if failure is not None:
            raise failure
        self.counters.unchanged += len(agreed)
        return count

    def _record(self, page: _Page, agreed: Collection[FactKey]) -> Steps[int]:
        """Record the outcome of *page*, whose *agreed* keys needed no write. Returns the number of converged keys."""
        parked = page.state.parked
        parking = self._parking(page)
        self.counters.rejected += len(page.failed)
        converged = [fact for fact in dict.fromkeys([*page.written, *agreed]) if fact not in page.failed]
        move = page.batch.move
        positions: Mapping[int, Position] = {}
        if page.complete and self._clock() >= self._save_at:
            positions = self._unsaved_positions(move)
        resolved = {fact: parked[fact].version for fact in converged if fact in parked}
        refill = page.batch.refill if page.complete else None
        foreign = page.batch.foreign if page.complete else ()
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
            if move is not None:
                move.group.has_passed_entries = not positions
                move.group.move_to(move.position)
        count = sum(map(self._is_held_since(page.epochs), converged))
        self.counters.converged += count
        return count

    def _parking(self, page: _Page) -> dict[FactKey, Parked]:
        """The keys to set aside: those that failed, and those that a call may still write."""
        parked = page.state.parked
        parking = {
            fact: park(error, (parked[fact].attempts if fact in parked else 0) + 1, self._policy, self._jitter)
            for fact, error in page.failed.items()
        }
        for fact in parking.keys() & parked.keys():  # replace the row that was read, not a newer one
            parking[fact] = parking[fact]._replace(expected_version=parked[fact].version)
        for fact in self._landing(page):
            attempts = parking[fact].attempts if fact in parking else 0
            parking[fact] = Parked(attempts, self._lease_s, ParkedState.AGAIN, "may land late")
        return parking

    def _landing(self, page: _Page) -> set[FactKey]:
        """Keys that an unanswered call may still write: deliver them again when no such call can land any more."""
        intents = page.batch.intents
        repeated = {fact for fact, parked in page.state.parked.items() if parked.deliver_again}
        landing = (repeated | set(intents)) & (page.written.keys() | page.failed.keys())
        landing |= {fact for fact in intents if fact[0] not in self.entities}  # passed by, and to be repeated there
        return landing.union(fact for fact, may_land in self._unsure.items() if may_land)

    # -- writing -------------------------------------------------------------------------------------------------------

    def _write(self, page: _Page, writes: Sequence[PlannedWrite]) -> Steps[None]:
        """Write to the index. Bisection finds the keys that it or the embedder refuses; they go to ``page.failed``.

        Keys that failed before are written apart, so that they do not have others bisected. Raises DeliveryRetryable.
        """
        for is_suspect in (False, True):
            of_group = [write for write in writes if (write.fact in page.state.parked) is is_suspect]
            for is_removal in (True, False):
                of_kind = [write for write in of_group if (write.projection is None) is is_removal]
                for start in range(0, len(of_kind), self.max_batch):
                    batch = of_kind[start : start + self.max_batch]
                    if not (yield from self._may_continue(page)):
                        return
                    if is_removal:
                        is_ours = self._is_held_since(page.epochs)
                        point_writes = [self._point_write(write, page) for write in batch if is_ours(write.fact)]
                    else:
                        point_writes = yield from self._embedded_writes(page, batch)
                    yield from self._send(page, point_writes)
                    if not page.complete:
                        return

    def _may_continue(self, page: _Page) -> Steps[bool]:
        """Before each long call: renew the lease so that it outlasts the call, unless we are to stop."""
        if self.stopping:
            page.complete = False
            return False
        yield from self.keep()
        return True

    def _point_write(self, write: PlannedWrite, page: _Page, vector: Vector | None = None) -> PointWrite:
        epoch, projection, point = page.epochs[self._slot(write.fact)], write.projection, None
        if projection is not None:
            assert vector is not None
            point = make_point(write.fact, projection, vector, epoch, marked=self._marked)
        return PointWrite(write.fact, epoch, _delivered(projection), point)

    def _embedded_writes(self, page: _Page, writes: Sequence[PlannedWrite]) -> Steps[list[PointWrite]]:
        """The *writes* with their vectors, without lost slots and refused texts."""
        digests = {write.fact: _text_fingerprint(write) for write in writes}
        reusable = [write.fact for write in writes if write.same_text or write.fact in page.doubted]
        stored = (yield from ask(Fetch(reusable))) if reusable else {}
        fetched = {
            write.fact: stored[write.fact].vector
            for write in writes
            if write.fact in stored
            and write.projection is not None
            and stored[write.fact].fingerprint in (write.projection.fingerprint, write.ledger_fingerprint)
        }
        missing = {
            digests[write.fact]: write.projection.text or ""
            for write in writes
            if write.projection is not None and write.fact not in fetched and digests[write.fact] not in self._embedded
        }
        refused: dict[str, MemstateError] = {}
        for texts in text_batches(missing):
            if not (yield from self._may_continue(page)):
                break

            def embed(batch: Sequence[str]) -> Steps[None]:
                embedded = yield from ask(Embed({digest: missing[digest] for digest in batch}))
                self._embedded.update(embedded.vectors)
                self.counters.embedded += embedded.asked
                self.counters.reused += len(embedded.vectors) - embedded.asked

            refused.update((yield from _isolate(list(texts), embed)))
        yield from self.keep()
        point_writes, is_ours = [], self._is_held_since(page.epochs)
        for write in writes:
            digest = digests[write.fact]
            vector = fetched.get(write.fact, self._embedded.get(digest))
            if digest in refused:
                page.failed[write.fact] = refused[digest]
            elif vector is not None and is_ours(write.fact):
                point_writes.append(self._point_write(write, page, vector))
                self.counters.reused += write.fact in fetched
        return point_writes

    def _send(self, page: _Page, writes: Sequence[PointWrite]) -> Steps[None]:
        def send(batch: Sequence[PointWrite]) -> Steps[None]:
            # A key is unsure until it is recorded. A call that may still land from an earlier attempt, still may.
            self._unsure.update({write.fact: self._unsure.get(write.fact, False) for write in batch})
            try:
                yield from ask(Remove(batch) if batch[0].point is None else Upsert(batch))
            except DeliveryRetryable as error:
                if error.may_land:
                    self._unsure.update({write.fact: True for write in batch})
                raise
            page.written.update({write.fact: write.delivered for write in batch})

        if writes:
            failed = yield from _isolate(writes, send)
            page.failed.update({write.fact: error for write, error in failed})


def _isolate(items: Sequence[T], call: Callable[[Sequence[T]], Steps[None]]) -> Steps[list[tuple[T, MemstateError]]]:
    """Run *call*. When it is rejected, find the items at fault by bisection."""
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


def _text_fingerprint(write: PlannedWrite) -> str:
    assert write.projection is not None
    assert write.projection.text_fingerprint is not None
    return write.projection.text_fingerprint
