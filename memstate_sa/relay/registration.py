"""The registration of an index in the database, its deletion, and the cluster that its positions belong to."""

from __future__ import annotations

from datetime import datetime
from typing import Any

from sqlalchemy import delete, select, update
from sqlalchemy.engine import Connection

from memstate_sa.db.dialects import database_of
from memstate_sa.db.json_params import as_json
from memstate_sa.db.leases import database_now
from memstate_sa.db.statements import take_write_lock
from memstate_sa.db.tables import cursor, holder, index_state, ledger, parked, past, projection, refill
from memstate_sa.embedders import Embedder
from memstate_sa.errors import IndexMismatch
from memstate_sa.log.outbox import read_present, slots
from memstate_sa.log.positions import Position
from memstate_sa.relay.index_key import IndexKey, insert_rows, of_index


def touch(connection: Connection, index: IndexKey, now: datetime) -> bool:
    """Record that a relay uses the index at *now*. Return False if the index is not registered."""
    touching = update(index_state).where(of_index(index_state)).values(active_at=now)
    return connection.execute(touching, index.parameters()).rowcount > 0


_STATE_TABLES = (index_state, refill, parked, cursor, ledger, holder, past, projection)


def register(connection: Connection, index: IndexKey, embedder: Embedder) -> datetime:
    """Register an incarnation of an index, if it is new. Return the database's time.

    Until this transaction ends, no other transaction can delete it. Raises IndexMismatch if another embedder has filled
    the index. This is checked even for an index that does not know its embedder.
    """
    take_write_lock(connection)
    now = database_now(connection)
    while not (_is_registered(connection, index, embedder) and touch(connection, index, now)):
        _insert(connection, index, embedder, now)
    return now


def _insert(connection: Connection, index: IndexKey, embedder: Embedder, now: datetime) -> None:
    """Insert the state of the index. Its cursors start at the present; the refill delivers older rows."""
    live = select(holder.c.incarnation).where(holder.c.index == index.name, holder.c.lease_until > now)
    incarnations = select(index_state.c.incarnation, index_state.c.paused).where(index_state.c.index == index.name)
    earlier_rows = connection.execute(incarnations).all()
    paused = any(row.paused for row in earlier_rows)
    for table in _STATE_TABLES if earlier_rows else ():
        connection.execute(
            delete(table).where(table.c.index == index.name, table.c.incarnation.not_in(live.scalar_subquery()))
        )
    database = database_of(connection)
    # Two relays may insert the index at the same time: the second one keeps the rows of the first.
    state = {"embedder": embedder.fingerprint, "dimension": embedder.dimension, "marked": False, "paused": paused}
    state |= {"created_at": now, "active_at": now, "cluster": database.cluster(connection)}
    connection.execute(database.upsert(index_state).on_conflict_do_nothing(), {**index.values(), **state})
    present = position_columns(read_present(connection))
    rows = as_json([[slot, *present.values(), None, 0] for slot in slots(database)])
    new_cursors = insert_rows(database, cursor, ["slot", *present, "owner", "epoch"]).on_conflict_do_nothing()
    connection.execute(new_cursors, {**index.parameters(), "rows": rows})


def _is_registered(connection: Connection, index: IndexKey, embedder: Embedder) -> bool:
    filled_by = select(index_state.c.embedder, index_state.c.dimension).where(of_index(index_state))
    row = connection.execute(filled_by, index.parameters()).one_or_none()
    if row is not None and tuple(row) != (embedder.fingerprint, embedder.dimension):
        raise IndexMismatch(
            f"Cannot use index {index.name!r}: it was filled by embedder {row.embedder!r} ({row.dimension} "
            f"dimensions), not by {embedder.fingerprint!r} ({embedder.dimension}). Give the index another name, or "
            "delete it, so that it is filled again."
        )
    return row is not None


def forget_index(connection: Connection, index: IndexKey) -> None:
    """Delete all state of *index*, as if it had never been delivered to."""
    for table in _STATE_TABLES:
        connection.execute(delete(table).where(of_index(table)), index.parameters())


def position_columns(position: Position) -> dict[str, Any]:
    return {"snapshot": str(position.snapshot), "xid": position.xid, "position": position.id}


def has_moved(connection: Connection, index: IndexKey) -> bool:
    """Whether the database is in another cluster than the recorded positions. The new cluster is then recorded."""
    recorded = select(index_state.c.cluster).where(of_index(index_state))
    old_cluster = connection.execute(recorded, index.parameters()).scalar()
    cluster = database_of(connection).cluster(connection)
    if cluster is not None and cluster != old_cluster:
        recording = update(index_state).where(of_index(index_state)).values(cluster=cluster)
        connection.execute(recording, index.parameters())
    return None not in (old_cluster, cluster) and old_cluster != cluster
