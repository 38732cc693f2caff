"""Strict delivery: the indexes are written before COMMIT, and their failure prevents it.

The transaction may still roll back after that. So an intent is recorded first, in a place that no rollback can reach.
The intent says that the points of its keys are uncertain. When the transaction has ended in any way, the relay finds
the intent and delivers its keys. Until then, searches compare fingerprints, so they do not show rows that SQL lacks.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Collection, Mapping, Sequence
from weakref import WeakKeyDictionary, WeakSet

from sqlalchemy import Text, cast, func, select
from sqlalchemy.engine import Connection, Engine
from sqlalchemy.exc import SQLAlchemyError
from sqlalchemy.orm import Session

from memstate_sa.capture.transaction import OpenTransaction
from memstate_sa.db.codec import FactKey, by_entity
from memstate_sa.db.dialects import database_of
from memstate_sa.db.engines import with_separate_pool
from memstate_sa.db.json_params import as_array, unnest_strings
from memstate_sa.db.sqlite_database import in_transaction
from memstate_sa.db.statements import batches
from memstate_sa.db.tables import log
from memstate_sa.embedding import cache
from memstate_sa.embedding.batches import Destination, Vectors
from memstate_sa.errors import DeliveryRetryable
from memstate_sa.indexes.base import Point, Vector, is_fenced
from memstate_sa.log.outbox import slots
from memstate_sa.log.positions import slot_of
from memstate_sa.relay import claims
from memstate_sa.relay.index_key import IndexKey
from memstate_sa.relay.intents import IntentJournal, IntentsInMemory, add_intents, open_journal
from memstate_sa.relay.points import make_point
from memstate_sa.relay.retry import classify, guarded
from memstate_sa.runtime import forks, listening
from memstate_sa.runtime.calls import Call, call_directly, call_in_thread
from memstate_sa.runtime.printable import printable_logger
from memstate_sa.tracking import committed
from memstate_sa.tracking.projection import Projection, point_id
from memstate_sa.tracking.registry import Registry

logger = printable_logger("memstate_sa.strict")

LOCK_TIMEOUT_S = 10.0
"""The longest wait of an intent for a lock. The announced transaction may hold that lock itself."""

_txs = unnest_strings("txs")

# Read from the log, which has an index on tx. Entries of a SAVEPOINT that rolled back are gone. The keys are locked.
_changed = (
    select(log.c.entity, log.c.key)
    .where(log.c.tx.in_(select(_txs.c.value)), log.c.op != "baseline")
    .distinct()
    .order_by(log.c.entity, log.c.key)
)

_read_xid = select(cast(func.pg_current_xact_id(), Text))


class Strict:
    """Writes the indexes of one Memory before its transactions commit, and keeps their intents."""

    def __init__(
        self,
        registry: Registry,
        destinations: Mapping[str, Destination],
        *,
        blocking: Callable[[Engine], Engine],
        wake: Callable[[Engine], None],
    ) -> None:
        """*blocking* returns a synchronous engine for an asynchronous one. *wake* is called when intents are due."""
        self._registry = registry
        self._destinations = destinations
        self._blocking = blocking
        self._wake = wake
        self._journals: WeakKeyDictionary[Engine, IntentJournal] = WeakKeyDictionary()
        self._watched: WeakSet[Engine] = WeakSet()
        self._make_lock()
        forks.in_child(self, Strict._make_lock)

    def _make_lock(self) -> None:
        self._recovering = threading.Lock()

    # -- the transaction ---------------------------------------------------------------------------------------------

    def write(self, session: Session, transaction: OpenTransaction) -> None:
        """Write the rows of *transaction* to the indexes. The transaction is flushed and about to commit.

        The transaction is rolled back at once if anything fails. Raises DeliveryError if an index or the embedder
        fails, or if the intent cannot be recorded.
        """
        try:
            self._write(transaction)
        except BaseException:
            _roll_back(session)
            self.ended(transaction)
            raise

    def _write(self, transaction: OpenTransaction) -> None:
        connection = transaction.written_on
        assert connection is not None
        # Cancelling the commit does not stop a call in a thread. The call may still land, and the intent remains.
        call = call_in_thread if connection.dialect.is_async else call_directly
        with transaction.writing():
            txs = as_array({transaction.tx, *transaction.txs})
            classes = self._registry.by_entity  # our transaction may have entries by triggers of another Memory
            changed = connection.execute(_changed, {"txs": txs}).all()
            facts = [(entity, key) for entity, key in changed if entity in classes]
            if not facts:
                return
            # Do everything that may fail before the intent is recorded, because an intent costs the relay some work.
            facts_of = {
                name: [fact for fact in facts if name in classes[fact[0]].indexes] for name in self._destinations
            }
            facts_by_vectors: dict[Vectors, dict[FactKey, None]] = {}
            for name, index_facts in facts_of.items():
                facts_by_vectors.setdefault(self._destinations[name].vectors, {}).update(dict.fromkeys(index_facts))
            contents = {
                vectors: self._embedded(connection, list(vector_facts), vectors, call)
                for vectors, vector_facts in facts_by_vectors.items()
            }
            keys = call(self._open, [name for name, index_facts in facts_of.items() if index_facts])
            epochs_of = self._announce(connection, transaction, facts, keys, call)
        slot_count = len(slots(database_of(connection)))
        for name, slot_epochs in epochs_of.items():
            deletes: dict[int, list[str]] = {}
            points: list[Point] = []
            projections, vectors_by_text = contents[self._destinations[name].vectors]
            for fact in facts_of[name]:
                # A relay that claims the slot later has a higher epoch, so we cannot overwrite its points.
                epoch = slot_epochs.epochs.get(slot_of(*fact) % slot_count, 0)
                projection = projections.get(fact)
                if projection is None:
                    deletes.setdefault(epoch, []).append(point_id(*fact))
                else:
                    assert projection.text_fingerprint is not None
                    vector = vectors_by_text[projection.text_fingerprint]
                    points.append(make_point(fact, projection, vector, epoch, marked=slot_epochs.marked))
            call(self._put, name, deletes, points)

    def _embedded(
        self, connection: Connection, facts: Sequence[FactKey], vectors: Vectors, call: Call
    ) -> tuple[dict[FactKey, Projection], dict[str, Vector]]:
        """The projections of *facts* in their transaction, and the vectors by text fingerprint.

        A blank text has no vector. New vectors are kept in this process, and not stored in the database. Otherwise two
        transactions that store the same vector would wait for each other.
        """
        projections: dict[FactKey, Projection] = {}
        for entity, keys in by_entity(facts).items():
            tracked = self._registry.by_entity[entity]
            for row in committed.project(connection, tracked, keys, vectors.embedder.fingerprint):
                if not isinstance(row, Projection):
                    raise classify(row[1], "the text callable") from row[1]
                if row.fingerprint is not None:
                    projections[entity, row.key] = row
        texts = {p.text_fingerprint: p.text for p in projections.values() if p.text_fingerprint and p.text}
        cached = cache.known(connection, vectors, texts)
        missing = {digest: text for digest, text in texts.items() if digest not in cached}
        return projections, cached | call(vectors.embed, missing, remember=True)

    def _open(self, names: Collection[str]) -> dict[str, IndexKey]:
        return {name: IndexKey(name, guarded(self._destinations[name].open, f"index {name!r}")) for name in names}

    def _put(self, name: str, deletes: Mapping[int, list[str]], points: Sequence[Point]) -> None:
        index = self._destinations[name].index

        def put() -> None:
            size = index.max_batch
            for epoch, ids in deletes.items():
                for id_batch in batches(ids, size):
                    if is_fenced(index):
                        index.delete(id_batch, epoch=epoch)
                    else:
                        index.delete(id_batch)
            for point_batch in batches(points, size):
                index.upsert(point_batch)

        guarded(put, f"index {name!r}")

    # -- intents -----------------------------------------------------------------------------------------------------

    def _announce(
        self,
        connection: Connection,
        transaction: OpenTransaction,
        facts: Sequence[FactKey],
        keys: Mapping[str, IndexKey],
        call: Call,
    ) -> dict[str, claims.SlotEpochs]:
        """Record the intent durably. Return the epochs of each index's slots, which are read after that."""
        try:
            if not database_of(connection).has_one_writer:
                xid: str = connection.execute(_read_xid).scalar_one()
                transaction.has_intents = True
                return call(self._announce_apart, connection.engine, xid, transaction.tx, facts, keys)
            journal = self._journal(connection)
            transaction.has_intents = True
            call(journal.write, transaction.tx, facts)
            add_intents(connection, transaction.tx, facts)  # if the transaction commits, the outbox has them at once
            return {name: claims.read_slot_epochs(connection, key) for name, key in keys.items()}
        except (OSError, SQLAlchemyError) as error:
            raise DeliveryRetryable(
                f"Cannot commit: the intent of a strict delivery was not recorded ({type(error).__name__}). Try again."
            ) from error

    def _announce_apart(
        self, engine: Engine, xid: str, tx: str, facts: Sequence[FactKey], keys: Mapping[str, IndexKey]
    ) -> dict[str, claims.SlotEpochs]:
        """Commit the intent on another connection, under the xid of its transaction (PostgreSQL).

        So no position can pass the intent before that transaction ends.
        """
        with self._separate(engine).begin() as connection:
            database_of(connection).limit_transaction(connection, LOCK_TIMEOUT_S)
            add_intents(connection, tx, facts, the_xid=xid)
            # Read the epochs on this connection, because the transaction itself may have an older snapshot.
            return {name: claims.read_slot_epochs(connection, key) for name, key in keys.items()}

    def committed(self, transaction: OpenTransaction) -> None:
        """Drop the intent of a committed *transaction*. On SQLite, keep it while an outer transaction is open."""
        if transaction.has_intents:
            assert transaction.written_on is not None
            journal = self._journals.get(transaction.written_on.engine)
            if journal is None:
                transaction.has_intents = False
            elif not in_transaction(transaction.written_on):
                transaction.has_intents = False
                journal.drop(transaction.tx)

    def ended(self, transaction: OpenTransaction) -> None:
        """Leave the intent of *transaction* to the relay, because the transaction has ended."""
        if transaction.has_intents:
            assert transaction.written_on is not None
            transaction.has_intents = False
            self._recover(transaction.written_on.engine)
            self._wake(transaction.written_on.engine)

    def _separate(self, engine: Engine) -> Engine:
        return self._blocking(engine) if engine.dialect.is_async else with_separate_pool(engine)

    # -- SQLite ------------------------------------------------------------------------------------------------------

    def watch(self, engine: Engine) -> None:
        """Recover intents of ended transactions of any process, whenever *engine* is used."""
        if database_of(engine).has_one_writer and engine not in self._watched:
            self._watched.add(engine)
            listening.listen(engine, "engine_connect", self._connected)

    def stop(self) -> None:
        """Stop watching all engines."""
        for engine in list(self._watched):
            listening.stop(engine, "engine_connect", self._connected)
        self._watched.clear()

    def _connected(self, connection: Connection) -> None:
        self._journal(connection)
        self._recover(connection.engine)

    def _journal(self, connection: Connection) -> IntentJournal:
        journal = self._journals.get(connection.engine)
        if journal is None:
            journal = self._journals.setdefault(connection.engine, open_journal(connection))
        return journal

    def intended(self, engine: Engine) -> set[FactKey]:
        """The keys of all intents on SQLite. On PostgreSQL the outbox has them."""
        journal = self._journals.get(engine)
        return set() if journal is None else journal.facts()

    def _recover(self, engine: Engine) -> None:
        """Turn the intents of ended transactions into outbox entries, unless another transaction is writing."""
        journal = self._journals.get(engine)
        if journal is None or not self._recovering.acquire(blocking=False):
            return
        try:
            if not journal.is_empty:
                journal.replay(engine if isinstance(journal, IntentsInMemory) else self._separate(engine))
        except (OSError, SQLAlchemyError) as error:
            logger.debug("Intents stay for later (%s).", type(error).__name__)
        finally:
            self._recovering.release()


def _roll_back(session: Session) -> None:
    """Roll back like a failed flush, because a commit event cannot call rollback().

    The Session then demands a rollback() before it can be used again.
    """
    transaction = session._transaction  # noqa: SLF001
    assert transaction is not None
    transaction._begin().rollback(_capture_exception=True)  # noqa: SLF001
