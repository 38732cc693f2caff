"""The decisions of a delivery to an index, without I/O. Its generators yield requests, and are sent the replies.

The same code runs on a database and an index (`delivery`), and on simulated ones with a seeded clock in the tests.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
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
    Exchange,
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
    Upsert,
    ask,
)
from memstate_sa.relay.retry import RetryPolicy, halves
from memstate_sa.relay.slot_owner import SlotGroup, SlotOwner
from memstate_sa.relay.sources import OutboxPage, RefillPage, Source
from memstate_sa.tracking.projection import Projection

T = TypeVar("T")


@dataclass
class _Page:
    """The page that is being delivered: the epochs under which its rows were read, and the outcome of its keys."""

    source: Source
    epochs: Mapping[int, int]
    state: PageState
    doubted: Collection[FactKey]
    failed: dict[FactKey, MemstateError]
    written: dict[FactKey, Delivered] = field(default_factory=dict)
    texts: dict[str, str] = field(default_factory=dict)
    complete: bool = True
    reads_ahead: bool = True  # becomes False when reading ahead fails


@dataclass
class _PageAhead:
    """A page that was read before its turn, while the index was writing the page before it.

    The page is used if slots and classes have not changed since. Keys that another page has delivered since are
    ``outdated``, and their rows are read again.
    """

    source: Source
    epochs: Mapping[int, int]
    entities: Collection[str]
    state: PageState
    texts: Mapping[str, str]
    outdated: set[FactKey]


class SlotWorker(SlotOwner):
    """The delivery to one index by one owner.

    Nothing is lost when an exchange ends with an exception. Unrecorded writes are unsure, and are repeated.
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
        self.stopping = False  # callers set this, to stop the delivery after the current batch
        self.more = False  # whether the last delivery knows of more pages
        self._page_size = page_size
        self._policy = policy
        self._jitter = jitter

    def reset(self) -> None:
        super().reset()
        self._embedded: dict[str, Vector] = {}
        self._ahead: _PageAhead | None = None

    def deliver(self) -> Exchange[int | None]:
        """Deliver up to one page from each source. Return the number of keys, or None if there was nothing to do.

        Raises DeliveryRetryable when the index or the embedder is unavailable.
        """
        self.more = False
        ahead = self._ahead
        count = yield from self._deliver()
        if self._ahead is ahead:  # the page was not used in its turn
            self._ahead = None
        return count

    def _deliver(self) -> Exchange[int | None]:
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
        # Merge groups only here: the position of a slot that is claimed during a page must not move with that page.
        self._merge_groups()
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

    def _deliver_parked(self) -> Exchange[int | None]:
        facts = yield from ask(ReadDue(tuple(self.epochs), self._page_size))
        if not facts:
            return None
        self.more |= len(facts) == self._page_size
        return (yield from self._converge(Source(facts=facts)))

    def _deliver_page(self, group: SlotGroup, present: Position) -> Exchange[int | None]:
        if self.stopping or not group.slots or group.position.covers(present):
            return None
        slots, start = frozenset(group.slots), group.position
        source = self._page_ahead((group, slots, start))
        if source is None:
            source = page = yield from self._read_outbox(group, slots, start, present)
            if page.is_empty:
                group.move_to(page.end)
                return None
        self.more |= source.following is not None
        return (yield from self._converge(source))

    def _read_outbox(
        self, group: SlotGroup, slots: frozenset[int], start: Position, present: Position
    ) -> Exchange[OutboxPage]:
        page = yield from ask(ReadPage(start, present, slots, self._page_size))
        end = start.advance(present, page.last)
        return OutboxPage(
            facts=[fact for fact in dict.fromkeys(page.facts) if fact[0] in self.entities],
            foreign={fact for fact in page.facts if fact[0] not in self.entities},
            intents=page.intents,
            following=None if page.last is None else partial(self._read_outbox, group, slots, end, present),
            group=group,
            slots=slots,
            start=start,
            end=end,
        )

    def _deliver_refill(self) -> Exchange[int | None]:
        refill = yield from ask(ReadRefill(tuple(self.epochs)))
        if refill is None:
            self._filled = True
            return None
        self.more = True
        source = self._page_ahead(refill)
        return (yield from self._converge(source or (yield from self._read_refill(refill))))

    def _read_refill(self, refill: Refill) -> Exchange[RefillPage]:
        page = yield from ask(ListFacts(refill.entity, refill.position, self._page_size))
        listed = {fact: fingerprint for fact, fingerprint in page.facts.items() if self._slot(fact) in refill.slots}
        facts = {fact: fingerprint for fact, fingerprint in listed.items() if fact[0] in self.entities}
        end = refill._replace(position=page.last, done=page.last is None)
        return RefillPage(
            facts=list(facts),
            foreign=listed.keys() - facts.keys(),
            listed={fact: Delivered(fingerprint, None, False) for fact, fingerprint in facts.items() if fingerprint},
            following=None if end.done or not refill.entity else partial(self._read_refill, end),
            start=refill,
            end=end,
        )

    # -- reading ahead -------------------------------------------------------------------------------------------------

    def _read_ahead(self, page: _Page, goes_on: Callable[[], bool]) -> Exchange[None]:
        """Embed the rest of *page*, then read and embed the next page, as long as *goes_on* returns True.

        The exchange may run while the index has not answered an `Upsert` of *page*. It changes neither slots nor
        positions, so its result is the same as just before the `Upsert`. It ends before the lease must be renewed.
        Errors are ignored, because they occur again in the page's own turn.
        """
        try:
            yield from self._embed_ahead(page.texts, goes_on)
            if self._ahead is None and page.source.following is not None:
                self._ahead = yield from self._read_following(page, page.source.following)
            if self._ahead is not None:
                yield from self._embed_ahead(self._ahead.texts, goes_on)
        except (DeliveryRejected, DeliveryRetryable):
            page.reads_ahead = False

    def _embed_ahead(self, texts: Mapping[str, str], goes_on: Callable[[], bool]) -> Exchange[None]:
        missing = {digest: text for digest, text in texts.items() if digest not in self._embedded}
        for batch in text_batches(missing):
            if self.stopping or not goes_on() or self._clock() >= self._renew_at:
                return
            yield from self._embed(batch)

    def _read_following(self, page: _Page, following: Callable[[], Exchange[Source]]) -> Exchange[_PageAhead | None]:
        source = yield from following()
        if source.is_empty:
            return None
        state = yield from ask(Read(source.facts))
        doubted = source.doubted(self._unsure, state)
        readable = [fact for fact in source.facts if fact not in state.failed]
        texts = _new_texts(plan(readable, state.truth, source.listed or state.ledger, doubted), doubted)
        return _PageAhead(source, dict(self.epochs), self.entities, state, texts, set(page.source.facts))

    def _page_ahead(self, beginning: object) -> Source | None:
        """The page that begins at *beginning*, if it was read ahead and can be used."""
        ahead = self._ahead
        if ahead is None or ahead.source.beginning != beginning:
            return None
        return ahead.source if ahead.epochs == self.epochs and ahead.entities is self.entities else None

    # -- one page ------------------------------------------------------------------------------------------------------

    def _converge(self, source: Source) -> Exchange[int]:
        """Make the index agree with the committed rows of *source*, then record the progress.

        Return the number of keys that agree now.
        """
        epochs, facts, listed = dict(self.epochs), source.facts, source.listed
        state = yield from self._state_of(source)
        # Park a changed key that no row can have, so that operators see it. If only the index has it, remove its point.
        refused = [fact for fact, parked in state.parked.items() if parked.attempts]
        changed = facts if source.move is not None else refused
        impossible = {fact: state.impossible[fact] for fact in changed if fact in state.impossible}
        page = _Page(source, epochs, state, source.doubted(self._unsure, state), {**state.failed, **impossible})
        readable = [fact for fact in facts if fact not in state.failed]
        writes = plan(readable, state.truth, listed or state.ledger, page.doubted)
        differing = {write.fact for write in writes}
        if self._marked:
            # Write listed points again: the index does not tell whether they carry their entity.
            unmarked = [fact for fact in readable if fact in listed and fact not in differing]
            writes += [PlannedWrite(fact, state.truth[fact], True) for fact in unmarked]
            differing.update(unmarked)
        page.texts = _new_texts(writes, page.doubted)
        failure: DeliveryRetryable | None = None
        try:
            yield from self._write(page, writes)
        except DeliveryRetryable as error:
            failure, page.complete = error, False
        agreed = [fact for fact in readable if fact not in differing]
        page.written.update({fact: _delivered(state.truth[fact]) for fact in agreed if fact in listed})
        count = yield from self._record(page, agreed)
        if failure is not None:
            raise failure
        self.counters.unchanged += len(agreed)
        return count

    def _state_of(self, source: Source) -> Exchange[PageState]:
        """The state of the keys of *source*. Keys that were not read ahead are read now."""
        ahead, facts, state = self._ahead, source.facts, PageState()
        if ahead is not None and ahead.source is source:
            self._ahead = None
            facts, state = [fact for fact in facts if fact in ahead.outdated], ahead.state
        elif ahead is not None:
            ahead.outdated.update(facts)
        return state.updated(facts, (yield from ask(Read(facts)))) if facts else state

    def _record(self, page: _Page, agreed: Collection[FactKey]) -> Exchange[int]:
        """Record the outcome of *page*. Its *agreed* keys needed no write. Return the number of converged keys."""
        parked = page.state.parked
        parking = self._parking(page)
        self.counters.rejected += len(page.failed)
        converged = [fact for fact in dict.fromkeys([*page.written, *agreed]) if fact not in page.failed]
        move = page.source.move
        positions: Mapping[int, Position] = {}
        if page.complete and self._clock() >= self._save_at:
            positions = self._unsaved_positions(move)
        resolved = {fact: parked[fact].version for fact in converged if fact in parked}
        refill = page.source.refill if page.complete else None
        foreign = page.source.foreign if page.complete else ()
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
            next_texts = self._ahead.texts if self._ahead is not None else {}
            self._embedded = {digest: vector for digest, vector in self._embedded.items() if digest in next_texts}
            if move is not None:
                move.group.has_passed_entries = not positions
                move.group.move_to(move.position)
        count = sum(map(self._is_held_since(page.epochs), converged))
        self.counters.converged += count
        return count

    def _parking(self, page: _Page) -> dict[FactKey, Parked]:
        """The keys to park: keys that failed, and keys that an unanswered call may still write."""
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
        """The keys that an unanswered call may still write. They are delivered again when no call can land any more."""
        intents = page.source.intents
        repeated = {fact for fact, parked in page.state.parked.items() if parked.deliver_again}
        landing = (repeated | set(intents)) & (page.written.keys() | page.failed.keys())
        # Intents of other entities are not delivered now, so they must be repeated too.
        landing |= {fact for fact in intents if fact[0] not in self.entities}
        return landing.union(fact for fact, may_land in self._unsure.items() if may_land)

    # -- writing -------------------------------------------------------------------------------------------------------

    def _write(self, page: _Page, writes: Sequence[PlannedWrite]) -> Exchange[None]:
        """Write to the index. Bisection finds the keys that it or the embedder refuses, for ``page.failed``.

        Keys that failed before are written separately, so that bisection does not slow down the others. Raises
        DeliveryRetryable when the index or the embedder is unavailable.
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

    def _may_continue(self, page: _Page) -> Exchange[bool]:
        """Renew the lease if necessary, so that it outlasts the next call. Return False if the relay is stopping."""
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

    def _embedded_writes(self, page: _Page, writes: Sequence[PlannedWrite]) -> Exchange[list[PointWrite]]:
        """Embed the texts of *writes* where necessary. Leave out writes of lost slots and of refused texts."""
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

            def embed(batch: Sequence[str]) -> Exchange[None]:
                return self._embed({digest: missing[digest] for digest in batch})

            refused.update((yield from _isolate(list(texts), embed)))
        for digest in refused:
            page.texts.pop(digest, None)
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

    def _embed(self, texts: Mapping[str, str]) -> Exchange[None]:
        embedded = yield from ask(Embed(texts))
        self._embedded.update(embedded.vectors)
        self.counters.embedded += embedded.asked
        self.counters.reused += len(embedded.vectors) - embedded.asked

    def _send(self, page: _Page, writes: Sequence[PointWrite]) -> Exchange[None]:
        def send(batch: Sequence[PointWrite]) -> Exchange[None]:
            # A key is unsure until it is recorded. Keep True for keys that an earlier call may still write.
            self._unsure.update({write.fact: self._unsure.get(write.fact, False) for write in batch})
            try:
                yield from ask(Remove(batch) if batch[0].point is None else Upsert(batch, meanwhile))
            except DeliveryRetryable as error:
                if error.may_land:
                    self._unsure.update({write.fact: True for write in batch})
                raise
            page.written.update({write.fact: write.delivered for write in batch})

        has_more = page.source.following is not None or not self._embedded.keys() >= page.texts.keys()
        meanwhile = partial(self._read_ahead, page) if has_more and page.reads_ahead else None
        if writes:
            failed = yield from _isolate(writes, send)
            page.failed.update({write.fact: error for write, error in failed})


def _isolate(
    items: Sequence[T], call: Callable[[Sequence[T]], Exchange[None]]
) -> Exchange[list[tuple[T, MemstateError]]]:
    """Run *call* on *items*. Find the rejected items by bisection, and return them with their errors."""
    try:
        yield from call(items)
    except DeliveryRejected as error:
        if len(items) == 1:
            return [(items[0], error)]
    else:
        return []
    first, second = halves(items)
    return [*(yield from _isolate(first, call)), *(yield from _isolate(second, call))]


def _new_texts(writes: Iterable[PlannedWrite], doubted: Collection[FactKey]) -> dict[str, str]:
    """The texts of *writes* by text fingerprint, without the texts whose vectors the index may already have."""
    return {
        _text_fingerprint(write): write.projection.text or ""
        for write in writes
        if write.projection is not None and not write.same_text and write.fact not in doubted
    }


def _delivered(projection: Projection | None) -> Delivered:
    if projection is None:
        return Delivered(None, None, True)
    return Delivered(projection.fingerprint, projection.text_fingerprint, False)


def _text_fingerprint(write: PlannedWrite) -> str:
    assert write.projection is not None
    assert write.projection.text_fingerprint is not None
    return write.projection.text_fingerprint
