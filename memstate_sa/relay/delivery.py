"""The I/O of one owner for one index: each request of the protocol becomes a short transaction or a call.

No database transaction is open during a call of the embedder or the index, with one exception. A server index is called
in a thread. At the same time, short transactions read the next page and store its vectors. They do not wait for that
call.
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Collection, Iterator, Mapping
from concurrent.futures import wait
from contextlib import contextmanager, suppress
from datetime import datetime, timedelta
from functools import partial, singledispatchmethod
from typing import Any, TypeVar

from sqlalchemy.engine import Connection, Engine

from memstate_sa.db import leases
from memstate_sa.db.codec import FactKey, by_entity
from memstate_sa.db.dialects import database_of
from memstate_sa.db.json_params import as_array
from memstate_sa.db.sqlite import is_in_memory, open_transaction
from memstate_sa.embedding import cache
from memstate_sa.embedding.batches import Destination
from memstate_sa.errors import DeliveryRejected, DeliveryRetryable, MemstateError
from memstate_sa.indexes.base import Stored, Vector, is_fenced, keeps_mark
from memstate_sa.log.outbox import read_page, slots
from memstate_sa.log.positions import Page
from memstate_sa.relay import claims, ledger, marks, refills, registration
from memstate_sa.relay.index_key import IndexKey
from memstate_sa.relay.marks import Bookmark
from memstate_sa.relay.plan import ParkedState
from memstate_sa.relay.projections import Projected
from memstate_sa.relay.protocol import SlotWorker
from memstate_sa.relay.requests import (
    Acknowledge,
    Claim,
    Claimed,
    DatabaseState,
    Embed,
    Embedded,
    Exchange,
    Fetch,
    KeyPage,
    ListFacts,
    Look,
    PageState,
    Read,
    ReadDue,
    ReadPage,
    ReadRefill,
    Redirty,
    Refill,
    Release,
    Remove,
    Renew,
    Request,
    Upsert,
)
from memstate_sa.relay.retry import RetryPolicy, classify, guarded
from memstate_sa.runtime import forks
from memstate_sa.runtime.calls import call_beside
from memstate_sa.runtime.printable import printable_logger
from memstate_sa.tracking import committed
from memstate_sa.tracking.projection import Projection, point_id, split_point_id
from memstate_sa.tracking.tracked import Tracked

logger = printable_logger("memstate_sa.relay")
R = TypeVar("R")
T = TypeVar("T")

SAVE_EVERY_S = 0.5
"""On PostgreSQL, positions are recorded at most this often, because each update makes new versions of their rows."""

_EVICTED = 1_000
"""The number of vectors that one transaction deletes. The transaction blocks other writers of SQLite for ten ms."""

_READS = (Look, ReadPage, ReadDue, ReadRefill, Read)


class Delivery:
    """The delivery from one database to one index. It is not thread-safe: the relay makes one call at a time."""

    def __init__(
        self,
        engine: Engine,
        name: str,
        destination: Destination,
        classes: Callable[[], Mapping[str, Tracked]],
        *,
        page_size: int,
        lease_s: float,
        policy: RetryPolicy,
    ) -> None:
        self.name = name
        self._engine = engine
        self._destination = destination
        self._index, self._vectors = destination.index, destination.vectors
        self._classes = classes
        self._know(classes())
        self._lease_s = lease_s
        self._owner = leases.new_owner(self)
        self._key: IndexKey | None = None
        self._reader: Connection | None = None
        self._unstored: dict[str, Vector] = {}  # vectors that are not in the database yet
        self._bookmark = Bookmark()
        self._room = 0  # the number of vectors that may be stored before the next count
        database = database_of(engine)
        self._page_s = 0.0 if database.has_one_writer else SAVE_EVERY_S
        self.slot_worker = SlotWorker(
            self._tracked,
            slots=len(slots(database)),
            page_size=page_size,
            lease_s=lease_s,
            save_every_s=self._page_s,
            policy=policy,
            clock=time.monotonic,
            jitter=random.random,
        )
        forks.in_child(self, Delivery._forked)

    def _forked(self) -> None:
        """Become a new owner after a fork: slots, lease and open connection belong to the parent process."""
        if database_of(self._engine).runs_in_process:
            self._end_reading()  # SQLite would believe that the locks of the parent's transaction are ours
        else:
            forks.leave_to_parent(self._reader)
        self._owner, self._key, self._reader = leases.new_owner(self), None, None
        self._unstored = {}
        self.slot_worker.stopping = False
        self.slot_worker.reset()

    def open(self) -> IndexKey:
        """Open the index. Raises IndexMismatch if another embedder has filled it."""
        incarnation = self._guarded(self._destination.open)
        self.slot_worker.max_batch = self._guarded(lambda: self._index.max_batch)
        return IndexKey(self.name, incarnation)

    def deliver(self) -> int | None:
        """Deliver one page from each source. Return the number of keys, or None if there was nothing to do.

        Raises DeliveryRetryable when the index or the embedder is unavailable. Nothing is lost: call again later.
        """
        key = self.open()
        if key != self._key:
            self.slot_worker.reset()
            self._key, self._bookmark = key, Bookmark()
        classes = self._classes()
        if classes != self._tracked:  # release the slots: the next claim starts the refill of new classes
            if self.slot_worker.epochs:
                self._run(self.slot_worker.release())
            self._know(classes)
            self.slot_worker.entities = classes
        return self._run(self.slot_worker.deliver())

    def _know(self, classes: Mapping[str, Tracked]) -> None:
        self._tracked = classes
        self._set_delivered(classes)

    def _set_delivered(self, entities: Collection[str]) -> None:
        """Set the entities that we deliver: all or some of the entities that we track."""
        self._delivered, self._entities = list(entities), as_array(entities)

    def save(self) -> None:
        """Record the positions of our slots."""
        if self._key is not None:
            self._run(self.slot_worker.save())

    def keep(self) -> None:
        """Renew the lease if half of it is over."""
        if self._key is not None and self.slot_worker.epochs:
            self._run(self.slot_worker.keep())

    def release(self) -> None:
        """Release all slots, so that other owners can claim them at once."""
        if self._key is None or (is_in_memory(self._engine) and open_transaction(self._engine)):
            return  # the only connection is in a transaction of the application
        self._run(self.slot_worker.release())

    def _run(self, exchange: Exchange[R]) -> R:
        try:
            request = next(exchange)
            while True:
                try:
                    if not isinstance(request, _READS):
                        self._end_reading()
                    reply = self._do(request)
                except Exception as error:  # noqa: BLE001  # the protocol handles it
                    request = exchange.throw(error)
                else:
                    request = exchange.send(reply)
        except StopIteration as end:
            result: R = end.value
            return result
        finally:
            self._end_reading()

    @contextmanager
    def _reading(self) -> Iterator[Connection]:
        """Give consecutive reads the same transaction. Each statement sees all commits before the statement began."""
        with forks.uninterrupted():
            if self._reader is None:
                self._reader = self._engine.connect()
            try:
                yield self._reader
            except BaseException:
                self._end_reading()
                raise

    @contextmanager
    def _writing(self) -> Iterator[Connection]:
        """Open a short transaction. If this process is suspended during it, the database ends it with the lease."""
        with forks.uninterrupted(), self._engine.begin() as connection:
            database_of(connection).limit_transaction(connection, self._lease_s)
            yield connection

    def _end_reading(self) -> None:
        """End the reading transaction, before a write or a call."""
        with forks.uninterrupted():
            reader, self._reader = self._reader, None
            if reader is not None:
                reader.close()

    @property
    def _index_key(self) -> IndexKey:
        assert self._key is not None
        return self._key

    # -- the lease ---------------------------------------------------------------------------------------------------

    @singledispatchmethod
    def _do(self, request: Request[Any]) -> Any:
        raise NotImplementedError(type(request))

    @_do.register
    def _do_claim(self, request: Claim) -> Claimed:
        kept_mark = self._guarded(lambda: marks.kept_by(self._index))
        with self._writing() as connection:
            now = registration.register(connection, self._index_key, self._vectors.embedder)
            claimant = claims.Claimant(
                self._owner,
                self._lease_s,
                self._in_process,
                self._projected(now),
                request.epochs,
                kept_mark,
                request.went_back or self._bookmark.went_back,
                now,
            )
            claimed, past = claims.claim(connection, self._index_key, claimant)
        self._bookmark.claimed(past)
        if claimed.entities is not None:
            self._set_delivered(claimed.entities)
        return claimed

    def _projected(self, now: datetime) -> dict[str, Projected]:
        """The projections of our classes, with the times when the classes were tracked, by the database's clock.

        *now* is the present time of that clock.
        """
        clock = time.monotonic()
        return {
            entity: Projected(tracked.projection, now - timedelta(seconds=clock - tracked.since), tracked.withdrawn)
            for entity, tracked in self._tracked.items()
        }

    @_do.register
    def _do_renew(self, _: Renew) -> int:
        with self._writing() as connection:
            return claims.renew(connection, self._index_key, self._owner, self._lease_s)

    @_do.register
    def _do_look(self, request: Look) -> DatabaseState:
        with self._reading() as connection:
            self._bookmark.end_page(time.monotonic())
            state, past = claims.look(connection, self._index_key, self._owner, self._entities, request.slots)
        return state if self._bookmark.sees(past) else state._replace(elsewhere=True)

    @_do.register
    def _do_release(self, request: Release) -> None:
        with self._writing() as connection:
            if request.leave:
                # A claim locks the row of the index before the slots, so lock that row first here too.
                claims.leave(connection, self._index_key, self._owner)
            own_slots = claims.still_held(connection, self._index_key, self._owner, request.epochs)
            positions = {slot: position for slot, position in request.positions.items() if slot in own_slots}
            claims.save_positions(connection, self._index_key, positions)
            ledger.redirty(connection, self._index_key, request.unsure)
            claims.free_slots(connection, self._index_key, own_slots.difference(request.unsettled))

    # -- sources of dirty keys -----------------------------------------------------------------------------------------

    @_do.register
    def _do_read_page(self, request: ReadPage) -> Page:
        with self._reading() as connection:
            return read_page(connection, request.position, request.present, request.slots, request.limit)

    @_do.register
    def _do_read_due(self, request: ReadDue) -> Any:
        with self._reading() as connection:
            return ledger.due(connection, self._index_key, self._entities, request.slots, request.limit)

    @_do.register
    def _do_read_refill(self, request: ReadRefill) -> Refill | None:
        with self._reading() as connection:
            return refills.next_refill(connection, self._index_key, request.slots, self._delivered)

    @_do.register
    def _do_list_facts(self, request: ListFacts) -> KeyPage:
        size = request.limit
        if request.entity == refills.SCAN:
            entries = self._guarded(lambda: self._index.scan(request.after, size))
            facts = {fact: entry.fingerprint for entry in entries if (fact := split_point_id(entry.id))}
            return KeyPage(facts, entries[-1].id if entries else None)
        with self._reading() as connection:
            keys = committed.page(connection, self._tracked[request.entity], request.after, size)
        return KeyPage({(request.entity, key): None for key in keys}, keys[-1] if len(keys) == size else None)

    # -- one page ------------------------------------------------------------------------------------------------------

    @_do.register
    def _do_read(self, request: Read) -> PageState:
        projections: dict[FactKey, Projection] = {}
        failed: dict[FactKey, MemstateError] = {}
        impossible: dict[FactKey, MemstateError] = {}
        embedder = self._vectors.embedder.fingerprint
        with self._reading() as connection:
            for entity, keys in by_entity(request.facts).items():
                columns = self._tracked[entity].columns_for(connection.dialect)
                impossible_keys = set(keys) - columns.possible(connection, keys).keys()
                error = DeliveryRejected(
                    f"No row of {columns.table.fullname} can have this key. Perhaps the type of the key column was "
                    "changed. If so, call Relay.drop_dead()."
                )
                impossible.update(((entity, key), error) for key in impossible_keys)
                for row in committed.project(connection, self._tracked[entity], keys, embedder):
                    if isinstance(row, Projection):
                        projections[entity, row.key] = row
                    else:
                        failed[entity, row[0]] = classify(row[1], "the text callable")
            delivered = ledger.read_ledger(connection, self._index_key, request.facts)
            parked = ledger.read_parked(connection, self._index_key, request.facts)
        return PageState(projections, failed, delivered, parked, impossible)

    @_do.register
    def _do_embed(self, request: Embed) -> Embedded:
        texts, vectors = request.texts, self._vectors
        stored: dict[str, Vector] = {}
        if vectors.stored:
            with self._reading() as connection:
                stored = cache.read(connection, texts, vectors.embedder.dimension)
            self._end_reading()
        new = vectors.recent(digest for digest in texts if digest not in stored)
        missing = {digest: text for digest, text in texts.items() if digest not in stored and digest not in new}
        new |= self._guarded(lambda: vectors.embed(missing))
        if vectors.stored:
            self._unstored |= new
        return Embedded(stored | new, len(missing))

    def _store_vectors(self) -> None:
        """Store new vectors before the index is called, so that its failure does not cost a second embedding."""
        if not self._unstored:
            return
        with self._writing() as connection:
            cache.store(connection, self._unstored, self._vectors.embedder.fingerprint)
        self._room -= len(self._unstored)
        self._unstored = {}
        if self._room < 0:
            self._evict()

    def _evict(self) -> None:
        """Evict some of the vectors beyond the capacity. This is done rarely, because counting takes long."""
        capacity = self._vectors.stored
        with self._reading() as connection:
            excess = cache.count(connection) - capacity
        self._end_reading()
        evicted = min(excess, 10 * _EVICTED)
        for start in range(0, evicted, _EVICTED):
            with self._writing() as connection:
                cache.evict(connection, min(_EVICTED, evicted - start))
        self._room = capacity // 10 if excess <= evicted else 0

    @_do.register
    def _do_fetch(self, request: Fetch) -> Mapping[FactKey, Stored]:
        facts = {point_id(*fact): fact for fact in request.facts}
        return {facts[stored.id]: stored for stored in self._guarded(lambda: self._index.get(list(facts)))}

    def _mark_page(self) -> None:
        """Write a mark to the database and the index before the page is written.

        If the database is restored to an earlier state, the marks differ. So no undelivered change counts as delivered.
        """
        index, bookmark = self._index, self._bookmark
        if not keeps_mark(index) or (bookmark.is_begun and bookmark.index_has_mark):
            return
        if not bookmark.is_begun:  # otherwise the index did not get the last mark, which must be written first
            with self._writing() as connection:
                past = marks.begin_page(connection, self._index_key)
            if not bookmark.sees(past):
                raise DeliveryRetryable(
                    f"Cannot write to index {self.name!r}: the database has been restored. The relay will compare the "
                    "index with the tables, and try again."
                )
            bookmark.begun(time.monotonic() + self._page_s)
        self._guarded(lambda: index.write_mark(str(bookmark.mark)))
        bookmark.index_has_mark = True

    @_do.register
    def _do_upsert(self, request: Upsert) -> None:
        self._store_vectors()
        self._mark_page()
        points = [write.point for write in request.writes if write.point is not None]
        upsert = partial(self._guarded, lambda: self._index.upsert(points))
        if request.meanwhile is None or self._in_process:
            upsert()
            return
        call = call_beside(upsert, f"memstate-write-{self.name}")
        try:
            # Errors are ignored here: the relay reads the next page again in its turn, and that read raises the error.
            with suppress(Exception):
                self._run(request.meanwhile(lambda: not call.done()))
                self._store_vectors()
        finally:
            wait([call])
        call.result()

    @property
    def _in_process(self) -> bool:
        """Whether the index runs in this process.

        Then a second thread gains nothing, because the index and our code need the same interpreter lock.
        """
        return getattr(self._index, "in_process", False)

    @_do.register
    def _do_remove(self, request: Remove) -> None:
        self._mark_page()
        index = self._index
        if not is_fenced(index):
            self._guarded(lambda: index.delete([point_id(*write.fact) for write in request.writes]))
            return
        by_epoch: dict[int, list[str]] = {}
        for write in request.writes:
            by_epoch.setdefault(write.epoch, []).append(point_id(*write.fact))
        for epoch, ids in by_epoch.items():
            self._guarded(partial(index.delete, ids, epoch=epoch))

    @_do.register
    def _do_acknowledge(self, request: Acknowledge) -> frozenset[int]:
        for fact, parking in request.parking.items():
            if parking.state == ParkedState.AGAIN:
                continue
            logger.warning("index %s: %s%s %s: %s", self.name, *fact, parking.state, parking.error)
        with self._writing() as connection:
            return ledger.acknowledge(connection, self._index_key, self._owner, request)

    @_do.register
    def _do_redirty(self, request: Redirty) -> None:
        logger.warning("index %s: The lease was lost. %d keys are delivered again.", self.name, len(request.facts))
        with self._writing() as connection:
            ledger.redirty(connection, self._index_key, request.facts)

    # -- calls ---------------------------------------------------------------------------------------------------------

    def _guarded(self, call: Callable[[], T]) -> T:
        """Call the index or the embedder, and turn its exceptions into ours."""
        return guarded(call, f"index {self.name!r}")
