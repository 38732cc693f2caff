"""Wait until the indexes have the changes of a transaction."""

from __future__ import annotations

import time
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from functools import cache
from typing import Any

from sqlalchemy import and_, bindparam, exists, literal, select
from sqlalchemy.engine import Connection, Engine

from memstate_sa.db.codec import FactKey, by_entity
from memstate_sa.db.dialects import Database, database_of
from memstate_sa.db.tables import log, outbox, parked
from memstate_sa.embedding.batches import Destination
from memstate_sa.errors import DeliveryError, DeliveryRetryable
from memstate_sa.log.outbox import in_slots, position_parameters, slot_array, slots, undelivered
from memstate_sa.relay import ledger, refills
from memstate_sa.relay.backlog import BEGINNING, read_positions
from memstate_sa.relay.index_key import IndexKey, of_index
from memstate_sa.relay.plan import ParkedState
from memstate_sa.tracking.committed import project
from memstate_sa.tracking.projection import Projection
from memstate_sa.tracking.tracked import Tracked

_FEW = 1000
"""The greatest number of keys that are compared with the ledger, which is newer than the recorded positions."""

_PATIENCE_S = 1.0
"""The interval between the slower checks."""


def wait_for(
    engine: Engine,
    txs: Iterable[str],
    destinations: Mapping[str, tuple[Destination, Mapping[str, Tracked]]],
    timeout: float,
) -> None:
    """Wait until all *destinations*, which are given by name with their tracked classes, have the changes of *txs*.

    Raises DeliveryError after *timeout* seconds, or when an index has refused a key too often.
    """
    deadline = time.monotonic() + timeout
    for tx in txs:
        waits = [_IndexWait(name, destination, tracked, tx) for name, (destination, tracked) in destinations.items()]
        for wait in _unfinished(engine, tx, waits):
            if time.monotonic() > deadline:
                raise DeliveryError(
                    f"The changes have not reached index {wait.name!r} within {timeout:g} s. Check that a relay is "
                    "running."
                )


def _unfinished(engine: Engine, tx: str, waits: Sequence[_IndexWait]) -> Iterator[_IndexWait]:
    """Check repeatedly, and yield one of the unfinished waits after each check, until all are over."""
    with engine.connect() as connection:
        facts = _keys_of(connection, tx)
    pause, look_again = 0.001, time.monotonic() + _PATIENCE_S
    while waits:
        began = time.monotonic()
        is_late = began > look_again
        if is_late:
            look_again = began + _PATIENCE_S
            for wait in waits:
                wait.look_for_index()
        with engine.connect() as connection:
            # Late checks compare positions too: a key that changes all the time never equals its last delivery.
            waits = [
                wait
                for wait in waits
                if not wait.is_over(connection, facts) and not (is_late and wait.is_over(connection, None))
            ]
        if waits:
            yield waits[0]
            time.sleep(max(pause, time.monotonic() - began))  # behind a long backlog, a check takes longer
            pause = min(pause * 1.5, 0.05)


_logged = select(log.c.entity, log.c.key).where(log.c.tx == bindparam("tx")).limit(_FEW + 1)


def _keys_of(connection: Connection, tx: str) -> Collection[FactKey] | None:
    """The keys that transaction *tx* changed; None when there are many."""
    rows = connection.execute(_logged, {"tx": tx}).all()
    return {(entity, key) for entity, key in rows} if len(rows) <= _FEW else None


_refused = (
    select(parked.c.entity, parked.c.key, parked.c.state, parked.c.error)
    .where(of_index(parked), parked.c.state != ParkedState.AGAIN)
    .where(exists().where(log.c.entity == parked.c.entity, log.c.key == parked.c.key, log.c.tx == bindparam("tx")))
)


@cache
def _undelivered(database: Database) -> Any:
    of_tx = and_(outbox.c.tx == bindparam("tx"), in_slots(database, outbox.c.slot))
    return select(undelivered(database, literal(1), where=of_tx))


@dataclass
class _IndexWait:
    """The wait for one index, which gets the classes in ``tracked``."""

    name: str
    destination: Destination
    tracked: Mapping[str, Tracked]
    tx: str
    index: IndexKey = field(init=False)

    def __post_init__(self) -> None:
        self.index = IndexKey(self.name, self.destination.open())

    def look_for_index(self) -> None:
        """Open the index again: it may have been replaced."""
        with suppress(DeliveryRetryable):
            self.index = IndexKey(self.name, self.destination.open())

    def is_over(self, connection: Connection, facts: Collection[FactKey] | None) -> bool:
        """Whether the index has the present rows of *facts*, or with None all changes of the transaction.

        Raises DeliveryError for a key that the index has refused too often.
        """
        pending, refused = False, [] if facts is None else self._refused(connection)
        if facts is None or any(row.state == ParkedState.DEAD for row in refused):
            pending = self._is_pending(connection)  # a dead key with a pending change is tried again
            # Read the refusals after the pending changes: a change that was delivered in between ends a refusal.
            refused = self._refused(connection)
        dead = next((row for row in refused if row.state == ParkedState.DEAD), None)
        if dead is not None and not pending:
            raise DeliveryError(
                f"Index {self.name!r} refused {dead.entity} {dead.key}: {dead.error}. See Relay.dead()."
            )
        if refused:
            return False
        if facts is None:
            return not pending and refills.is_filled(connection, self.index, list(self.tracked))
        return self._has_now(connection, [fact for fact in facts if fact[0] in self.tracked])

    def _has_now(self, connection: Connection, facts: Collection[FactKey]) -> bool:
        delivered = ledger.read_ledger(connection, self.index, facts)
        delivered_fingerprints = {fact: delivery.fingerprint for fact, delivery in delivered.items()}
        embedder = self.destination.vectors.embedder.fingerprint
        true_fingerprints = {
            (entity, row.key): row.fingerprint
            for entity, keys in by_entity(facts).items()
            for row in project(connection, self.tracked[entity], keys, embedder)
            if isinstance(row, Projection)
        }
        return all(delivered_fingerprints.get(fact) == true_fingerprints.get(fact) for fact in facts)

    def _refused(self, connection: Connection) -> Sequence[Any]:
        return connection.execute(_refused, {**self.index.parameters(), "tx": self.tx}).all()

    def _is_pending(self, connection: Connection) -> bool:
        """Whether the transaction has entries after the recorded positions. This may read the whole backlog."""
        database = database_of(connection)
        positions = read_positions(connection, self.index) or {BEGINNING: list(slots(database))}
        return any(
            connection.execute(
                _undelivered(database),
                {**position_parameters(position), "slots": slot_array(group), "tx": self.tx, "limit": 1},
            ).first()
            for position, group in positions.items()
        )
