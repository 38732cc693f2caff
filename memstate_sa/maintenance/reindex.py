"""Move to another index or another embedder while the application runs.

Relays fill the successor, and also go on delivering to the old index. Then one row tells every process which of the two
indexes searches ask. A search asks one index, with the embedder that filled it.
"""

from __future__ import annotations

from collections.abc import Collection

from sqlalchemy import bindparam, delete, not_, or_, select
from sqlalchemy.engine import Connection, Engine

from memstate_sa.db import leases
from memstate_sa.db.codec import FactKey
from memstate_sa.db.dialects import database_of
from memstate_sa.db.statements import take_write_lock
from memstate_sa.db.tables import holder, index_state, ledger, parked, refill, successor, utcnow
from memstate_sa.embedding.batches import Destination
from memstate_sa.errors import DeliveryError, MemstateError, NotFound
from memstate_sa.relay import Relay, refills, registration
from memstate_sa.relay.index_key import IndexKey, of_index
from memstate_sa.relay.plan import ParkedState
from memstate_sa.relay.progress import Progress
from memstate_sa.tracking import committed
from memstate_sa.tracking.tracked import Tracked

_refused = select(parked.c.entity, parked.c.key).where(of_index(parked), parked.c.state != ParkedState.AGAIN)


def fill_and_switch(
    engine: Engine,
    relay: Relay,
    tracked: Collection[Tracked],
    old: tuple[str, Destination],
    new: tuple[str, Destination],
    *,
    timeout: float,
    progress: Progress | None,
) -> None:
    """Fill the index *new* with *relay*, then let searches ask it instead of *old*."""
    total = 0
    if progress is not None:
        with engine.connect() as connection:
            total = sum(committed.count(connection, one) for one in tracked)
    relay.drain(timeout, progress=None if progress is None else lambda done: progress(min(done, total), total))
    keys = [IndexKey(name, destination.open()) for name, destination in (old, new)]
    with engine.begin() as connection:
        switch(connection, *keys)
    if progress is not None:
        progress(total, total)


def switch(connection: Connection, old: IndexKey, new: IndexKey) -> None:
    """Let searches of *old* ask *new*, from this transaction's COMMIT on.

    Raises DeliveryError when *new* lacks facts that *old* has, because searches would miss them. Either *new* refused
    them, or another Memory delivers their classes.
    """
    take_write_lock(connection)
    refused_keys = _refusals(connection, new) - _refusals(connection, old)
    if refused_keys:
        raise DeliveryError(
            f"Cannot switch searches to index {new.name!r}: it refused {len(refused_keys)} facts that index "
            f"{old.name!r} has. `memstate-sa dead list --index {new.name}` shows the reasons; `dead drop` gives the "
            "facts up."
        )
    unfilled = [
        entity
        for entity in connection.scalars(_entities, old.parameters()).all()
        if connection.scalar(_held, {**old.parameters(), "entity": entity})
        and not refills.is_filled(connection, new, [entity])
    ]
    if unfilled:
        raise DeliveryError(
            f"Cannot switch searches to index {new.name!r}: it is not filled with {', '.join(unfilled)}, which index "
            f"{old.name!r} has. Let a Memory that tracks them deliver to {new.name!r} too."
        )
    values = {"successor": new.name, "incarnation": new.incarnation, "switched_at": utcnow()}
    statement = database_of(connection).upsert(successor).values(index=old.name, **values)
    connection.execute(statement.on_conflict_do_update(index_elements=[successor.c.index], set_=values))


_entities = select(refill.c.entity).where(of_index(refill), refill.c.entity != refills.SCAN).distinct()
_held = select(
    select(ledger.c.key)
    .where(of_index(ledger), ledger.c.entity == bindparam("entity"), not_(ledger.c.deleted))
    .exists()
)


def _refusals(connection: Connection, index: IndexKey) -> set[FactKey]:
    return {(entity, key) for entity, key in connection.execute(_refused, index.parameters())}


def switch_back(connection: Connection, name: str) -> None:
    """Let searches of the index *name* ask this index itself again."""
    connection.execute(delete(successor).where(successor.c.index == name))


def delete_index_state(connection: Connection, name: str) -> None:
    """Delete the delivery state of the index *name*.

    Raises NotFound if no relay ever delivered to the index, and MemstateError while a relay has a claim on it.
    """
    take_write_lock(connection)
    incarnations = select(index_state.c.incarnation).where(index_state.c.index == name).with_for_update()
    keys = [IndexKey(name, incarnation) for incarnation in connection.scalars(incarnations)]
    if not keys:
        raise NotFound(f"Unknown index {name!r}: nothing was ever delivered to it from this database. Check the name.")
    now = leases.database_now(connection)
    live = select(holder.c.owner).where(holder.c.index == name, holder.c.lease_until > now)
    if not all(leases.is_gone(owner) or leases.is_dropped(owner) for owner in connection.scalars(live)):
        raise MemstateError(
            f"Cannot forget index {name!r}: a relay delivers to it. Remove the index from that application first."
        )
    for key in keys:
        registration.forget_index(connection, key)
    connection.execute(delete(successor).where(or_(successor.c.index == name, successor.c.successor == name)))
