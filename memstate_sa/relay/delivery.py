"""Bringing one index up to date, page by page: read what is dirty, read the truth, write, acknowledge.

No database transaction is open during an embedding or an index call.
"""

from __future__ import annotations

import logging
import random
import time
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import replace
from typing import TypeVar

from sqlalchemy.engine import Connection, Engine

from memstate_sa import truth
from memstate_sa.columns import batches
from memstate_sa.errors import DeliveryRejected, MemstateError
from memstate_sa.facts import Projection, Tracked, split_point_id
from memstate_sa.indexes.base import Point, Vector, VectorIndex
from memstate_sa.outbox import Position, advance, take_write_lock
from memstate_sa.relay import state
from memstate_sa.relay.plan import (
    Delivered,
    FactKey,
    Parked,
    RetryPolicy,
    Write,
    classify,
    halves,
    park,
    plan,
)
from memstate_sa.relay.state import Claim, IndexKey, RefillStep
from memstate_sa.sqlite import is_in_memory, open_transaction
from memstate_sa.tables import utcnow
from memstate_sa.vectors import Vectors

logger = logging.getLogger("memstate_sa.relay")
T = TypeVar("T")

ENTITY = "memstate_entity"
"""The metadata name under which points carry their entity, in an index that has several."""


class _LeaseLost(Exception):
    """Another holds the index now."""


class Delivery:
    """The delivery to one index from one database, as one holder. Not thread-safe; the relay serialises its calls."""

    def __init__(
        self,
        engine: Engine,
        name: str,
        index: VectorIndex,
        tracked: Mapping[str, Tracked],
        vectors: Vectors,
        *,
        page_size: int,
        lease_s: float,
        policy: RetryPolicy,
    ) -> None:
        self.name = name
        self.pages = 0  # acknowledged so far
        self._engine = engine
        self._index = index
        self._tracked = tracked
        self._vectors = vectors
        self._page_size = page_size
        self._lease_s = lease_s
        self._policy = policy
        self._owner = state.owner_id()
        self._key: IndexKey | None = None
        self._claim: Claim | None = None
        self._renew_at = 0.0
        self._settle_window = False
        self._settle_refill = False
        self._filled = False

    # -- the holder ------------------------------------------------------------------------------------------------

    def open(self) -> None:
        """Raises IndexMismatch when the index was built by another embedder."""
        embedder = self._vectors.embedder
        self._guarded(lambda: self._index.open(embedder=embedder.fingerprint, dimension=embedder.dimension))

    def _holds(self, index: IndexKey) -> bool:
        """Become, or stay, the holder of *index*; its claim is `_claim`."""
        if index != self._key:
            self._key, self._claim, self._filled = index, None, False
        if self._claim is not None and time.monotonic() < self._renew_at:
            return True
        embedder = self._vectors.embedder
        renew_at = time.monotonic() + self._lease_s / 2
        with self._engine.begin() as connection:
            claim = state.claim(
                connection,
                index,
                self._owner,
                self._lease_s,
                embedder=embedder.fingerprint,
                dimension=embedder.dimension,
                entities=list(self._tracked),
            )
        if claim is not None and not claim.new and self._claim is not None:
            self._filled = self._filled and claim.marked == self._claim.marked
            claim = replace(claim, at=self._claim.at)
        elif claim is not None:
            # Ours in the database, but unknown here: what was done under it is unknown, too.
            self._settle_window = self._settle_refill = claim.settle or not claim.new
            self._filled = False
        self._claim, self._renew_at = claim, renew_at
        return claim is not None

    def release(self) -> None:
        key, claim = self._key, self._claim
        self._claim = None
        if is_in_memory(self._engine) and open_transaction(self._engine):
            return  # its connection is the application's, in the middle of something
        if key is not None and claim is not None:
            with self._engine.begin() as connection:
                clean = not (self._settle_window or self._settle_refill)
                state.release(connection, key, claim, self._owner, clean=clean)

    def step(self) -> int | None:
        """Deliver one page from each source that has one; the keys converged, or None when there was nothing to do.

        Raises DeliveryRetryable when the index or the embedder is unavailable: nothing is lost, call again later.
        """
        self.open()
        key = IndexKey(self.name, self._guarded(lambda: self._index.incarnation))
        if not self._holds(key):
            return None
        results = [self._step_parked(key), self._step_window(key), self._step_refill(key)]
        done = [count for count in results if count is not None]
        return sum(done) if done else None

    # -- sources of dirty keys ---------------------------------------------------------------------------------------

    def _step_parked(self, index: IndexKey) -> int | None:
        with self._engine.connect() as connection:
            due = state.due(connection, index, list(self._tracked), self._page_size)
        if not due or self._claim is None:
            return None
        return self._converge(index, list(due), settle=True, at=self._claim.at)

    def _step_window(self, index: IndexKey) -> int | None:
        if self._claim is None:
            return None
        with self._engine.connect() as connection:
            at, entries = state.next_window(connection, self._claim.at, self._page_size)
        after = advance(at, entries[-1][0] if len(entries) == self._page_size else None)
        facts = list(dict.fromkeys((entity, key) for _, entity, key in entries if entity in self._tracked))
        foreign = {(entity, key) for _, entity, key in entries if entity not in self._tracked}
        if not facts and not foreign:
            # Nothing was read that an acknowledgement would have to follow; saved with the next one.
            self._claim = replace(self._claim, at=after)
            self._settle_window = self._settle_window and after.target is not None
            return 0 if entries else None
        count = self._converge(index, facts, settle=self._settle_window, at=after, foreign=foreign)
        if after.target is None:
            self._settle_window = False
        return count

    def _step_refill(self, index: IndexKey) -> int | None:
        if self._filled or self._claim is None:
            return None
        with self._engine.connect() as connection:
            step = state.next_refill(connection, index, list(self._tracked))
            if step is None:
                self._filled, self._settle_refill = True, False
                return None
            facts, position = self._refill_page(connection, step)
        count = 0
        if facts:
            settle = self._settle_refill or step.entity == state.SCAN
            count = self._converge(index, facts, settle=settle, at=self._claim.at)
            if self._claim is None:
                return 0
            self._settle_refill = False
        with self._engine.begin() as connection:
            state.save_refill(connection, index, RefillStep(step.entity, position), done=position is None)
        return count

    def _refill_page(self, connection: Connection, step: RefillStep) -> tuple[list[FactKey], str | None]:
        """The facts of the next page and the position after it, None at the end."""
        size = self._page_size
        if step.entity == state.SCAN:
            connection.rollback()
            entries = self._guarded(lambda: self._index.scan(step.position, size))
            facts = [fact for entry in entries if (fact := split_point_id(entry.id)) and fact[0] in self._tracked]
            return facts, entries[-1].id if entries else None
        tracked = self._tracked.get(step.entity)
        keys = [] if tracked is None else truth.page(connection, tracked, step.position, size)
        return [(step.entity, key) for key in keys], keys[-1] if len(keys) == size else None

    # -- one page ----------------------------------------------------------------------------------------------------

    def _converge(
        self,
        index: IndexKey,
        facts: Sequence[FactKey],
        *,
        settle: bool,
        at: Position,
        foreign: Collection[FactKey] = (),
    ) -> int:
        """Make the index agree with the committed rows of *facts*, then acknowledge up to *at*.

        Returns how many agree now; the others are parked.
        """
        assert self._claim is not None
        claim = self._claim
        with self._engine.connect() as connection:
            projections, failed = self._read_truth(connection, facts)
            ledger = {} if settle else state.read_ledger(connection, index, facts)
            attempts = state.attempts(connection, index, facts)
        # A key that failed before may be half-written, whatever the ledger says.
        ledger = {fact: record for fact, record in ledger.items() if fact not in attempts}
        clean = [fact for fact in facts if fact not in failed]
        writes = plan([f for f in clean if f not in attempts], projections, ledger, settle=settle)
        writes += plan([f for f in clean if f in attempts], projections, {}, settle=True)
        unsettled = self._settle_window, self._settle_refill
        self._settle_window = self._settle_refill = True  # until it is recorded, whatever interrupts us
        try:
            failed |= self._write(index, writes, claim)
        except _LeaseLost:
            self._give_up(index, facts)
            return 0
        except Exception:
            # It may have been written all the same, and after what a new holder wrote.
            self._renew_at = 0.0
            if not self._still_holds(index, claim):
                self._give_up(index, facts)
            raise
        written = {
            write.fact: Delivered(write.projection.fingerprint, write.projection.text_fingerprint, False)
            if write.projection is not None
            else Delivered(None, None, True)
            for write in writes
            if write.fact not in failed
        }
        now = utcnow()
        parking = {
            fact: park(error, attempts.get(fact, 0) + 1, now, self._policy, random.random)
            for fact, error in failed.items()
        }
        for fact, record in parking.items():
            logger.warning("%s: %s%s %s: %s", self.name, *fact, record.state, record.error)
        renew_at = time.monotonic() + self._lease_s / 2
        with self._engine.begin() as connection:
            kept = state.acknowledge(
                connection,
                index,
                claim,
                self._owner,
                at=at,
                lease_s=self._lease_s,
                written=written,
                done=[fact for fact in attempts if fact not in failed],
                parking=parking,
                foreign=foreign,
            )
        if not kept:
            self._give_up(index, facts)
            return 0
        self.pages += 1
        self._settle_window, self._settle_refill = unsettled
        self._claim, self._renew_at = replace(claim, at=at), renew_at
        return len(facts) - len(failed)

    def _give_up(self, index: IndexKey, facts: Sequence[FactKey]) -> None:
        """Another holds the lease: what was written late may have overwritten what it wrote. It writes them again."""
        logger.warning("%s: the lease was lost; %d keys are delivered again", self.name, len(facts))
        self._claim = None
        again = Parked(0, utcnow(), "parked", "lease lost")
        with self._engine.begin() as connection:
            take_write_lock(connection)
            state.park_all(connection, index, dict.fromkeys(facts, again))

    def _still_holds(self, index: IndexKey, claim: Claim) -> bool:
        return self._holds(index) and self._claim is not None and self._claim.epoch == claim.epoch

    def _keep_lease(self, index: IndexKey, claim: Claim) -> None:
        if not self._still_holds(index, claim):
            raise _LeaseLost

    def _read_truth(
        self, connection: Connection, facts: Iterable[FactKey]
    ) -> tuple[dict[FactKey, Projection], dict[FactKey, MemstateError]]:
        projections: dict[FactKey, Projection] = {}
        failed: dict[FactKey, MemstateError] = {}
        embedder = self._vectors.embedder.fingerprint
        for entity, keys in state.by_entity(facts).items():
            for found in truth.project(connection, self._tracked[entity], keys, embedder):
                if isinstance(found, Projection):
                    projections[entity, found.key] = found
                else:
                    failed[entity, found[0]] = classify(found[1], "the text callable")
        return projections, failed

    def _write(self, index: IndexKey, writes: Sequence[Write], claim: Claim) -> dict[FactKey, MemstateError]:
        """Write to the index; the keys it refused, alone, with why. Raises DeliveryRetryable."""
        upserts = [write for write in writes if write.projection is not None]
        deletes = [write for write in writes if write.projection is None]
        failed: dict[FactKey, MemstateError] = {}
        for batch in batches(deletes, self._index.max_batch):
            self._keep_lease(index, claim)
            failed |= self._isolate(batch, self._delete)
        for batch in batches(upserts, self._index.max_batch):
            failed |= self._isolate(batch, lambda some: self._upsert(index, some, claim))
        return failed

    def _isolate(
        self, writes: Sequence[Write], call: Callable[[Sequence[Write]], None]
    ) -> dict[FactKey, MemstateError]:
        """Run *call*; when it is rejected, find by bisection the keys that are at fault."""
        try:
            self._guarded(lambda: call(writes))
        except DeliveryRejected as error:
            if len(writes) == 1:
                return {writes[0].fact: error}
            first, second = halves(writes)
            return self._isolate(first, call) | self._isolate(second, call)
        return {}

    def _delete(self, writes: Sequence[Write]) -> None:
        self._index.delete([self._point_id(write.fact) for write in writes])

    def _upsert(self, index: IndexKey, writes: Sequence[Write], claim: Claim) -> None:
        vectors = self._stored_vectors([write for write in writes if write.same_text])
        texts = {
            write.projection.text_fingerprint: write.projection.text
            for write in writes
            if write.projection is not None and write.fact not in vectors
        }
        embedded = self._vectors.of(texts, before_batch=lambda: self._keep_lease(index, claim))  # type: ignore[arg-type]  # a projection that is written has both
        self._keep_lease(index, claim)
        points = []
        for write in writes:
            projection = write.projection
            assert projection is not None
            assert projection.fingerprint is not None
            assert projection.text_fingerprint is not None
            vector = vectors.get(write.fact)
            points.append(
                Point(
                    id=self._point_id(write.fact),
                    vector=embedded[projection.text_fingerprint] if vector is None else vector,
                    fingerprint=projection.fingerprint,
                    epoch=claim.epoch,
                    metadata={ENTITY: write.fact[0], **projection.metadata} if claim.marked else projection.metadata,
                    text=projection.text,
                )
            )
        self._index.upsert(points)

    def _stored_vectors(self, writes: Sequence[Write]) -> dict[FactKey, Vector]:
        """The vectors that the index holds already, for texts that did not change."""
        facts = {self._point_id(write.fact): write.fact for write in writes}
        return {facts[stored.id]: stored.vector for stored in self._index.get(list(facts))} if facts else {}

    def _point_id(self, fact: FactKey) -> str:
        entity, key = fact
        return self._tracked[entity].point_id(key)

    def _guarded(self, call: Callable[[], T]) -> T:
        """*call* on the index or the embedder; whatever it raises becomes ours."""
        try:
            return call()
        except _LeaseLost:
            raise
        except Exception as error:
            ours = classify(error, f"index {self.name!r}")
            if ours is error:
                raise
            raise ours from error
