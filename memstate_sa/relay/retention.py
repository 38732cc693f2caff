"""Retention: outbox entries are kept until every index has them, log and ledger for ever by default."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import timedelta
from functools import cache
from itertools import takewhile
from typing import Any

from sqlalchemy import (
    BigInteger,
    ColumnElement,
    and_,
    bindparam,
    delete,
    exists,
    false,
    func,
    not_,
    null,
    or_,
    select,
    text,
    tuple_,
    update,
)
from sqlalchemy.engine import Connection

from memstate_sa.capture.append_only import rewriting
from memstate_sa.db.codec import by_entity
from memstate_sa.db.dialects import Database, database_of
from memstate_sa.db.json_params import as_array, unnest_strings
from memstate_sa.db.statements import take_write_lock
from memstate_sa.db.tables import (
    cursor,
    holder,
    index_state,
    is_deleted,
    ledger,
    log,
    outbox,
    refill,
    transaction,
    utcnow,
)
from memstate_sa.log.changes import REDACTED
from memstate_sa.log.positions import Position
from memstate_sa.relay.index_key import IndexKey
from memstate_sa.relay.refills import SCAN
from memstate_sa.relay.registration import forget_index


@dataclass(frozen=True, slots=True)
class Retention:
    """The time to keep rows that delivery does not need; None is for ever.

    ``log``: older changes of a row become one baseline. History, undo and time travel end there. ``ledger``: the ledger
    of deleted rows. ``index``: the state of an index that no relay delivers to. After that the index delays neither the
    outbox nor vacuum. When it comes back, it is compared with the tables and brought up to date in full.
    """

    log: timedelta | None = None
    ledger: timedelta | None = None
    index: timedelta | None = timedelta(days=7)


def forget_delivered(connection: Connection, limit: int = 10_000) -> int:
    """Delete up to *limit* outbox entries that every index has, oldest first. Returns how many.

    An index that is being filled may be past an entry whose row it does not hold yet. Search reads that entry.
    """
    rows = connection.execute(select(cursor.c.snapshot, cursor.c.xid, cursor.c.position).distinct()).all()
    filling = set(connection.scalars(select(refill.c.entity).where(not_(refill.c.done)).distinct()))
    if not rows or SCAN in filling:
        return 0
    take_write_lock(connection)
    floor = min(Position.parse(*row).floor for row in rows)
    parameters = {"xid": floor[0], "id": floor[1], "filling": as_array(filling), "limit": limit}
    return connection.execute(_forget(database_of(connection)), parameters).rowcount


def forget_unneeded(connection: Connection, limit: int = 10_000) -> int:
    """Delete up to *limit* outbox entries if there is no index, oldest first. Returns how many.

    An index that comes later is filled from the tables.
    """
    take_write_lock(connection)
    if not database_of(connection).has_one_writer:
        # An index that began between the look and the DELETE would need the newest entries.
        connection.execute(_keep_indexes_out)
    if connection.execute(select(cursor.c.index).limit(1)).first() is not None:
        return 0
    oldest = select(outbox.c.id).order_by(outbox.c.id).limit(limit)
    return connection.execute(delete(outbox).where(outbox.c.id.in_(oldest))).rowcount


_keep_indexes_out = text(f"LOCK TABLE {cursor.name} IN SHARE MODE")


@cache
def _forget(database: Database) -> Any:
    up_to: ColumnElement[bool] = outbox.c.id <= bindparam("id", type_=BigInteger())
    order: tuple[ColumnElement[Any], ...] = (outbox.c.id,)
    if not database.has_one_writer:
        end = tuple_(bindparam("xid", type_=BigInteger()), bindparam("id", type_=BigInteger()))
        up_to, order = tuple_(outbox.c.xid, outbox.c.id) <= end, (outbox.c.xid, outbox.c.id)
    is_filling = outbox.c.entity.in_(select(unnest_strings("filling").c.value))
    ids = select(outbox.c.id).where(up_to, not_(is_filling)).order_by(*order).limit(bindparam("limit"))
    return delete(outbox).where(outbox.c.id.in_(ids))


def forget_idle_indexes(connection: Connection, keep: timedelta) -> int:
    """Delete the state of indexes that no relay has had a lease on for *keep*. Returns how many."""
    take_write_lock(connection)
    before = utcnow() - keep
    has_lease = exists().where(
        holder.c.index == index_state.c.index,
        holder.c.incarnation == index_state.c.incarnation,
        holder.c.lease_until > before,
    )
    # This row first, as a claim does: then either the claim or this waits.
    idle = delete(index_state).where(index_state.c.active_at < before, not_(has_lease))
    keys = connection.execute(idle.returning(index_state.c.index, index_state.c.incarnation)).all()
    for key in keys:
        forget_index(connection, IndexKey(*key))
    return len(keys)


def forget_ledger(connection: Connection, keep: timedelta, limit: int = 10_000) -> int:
    """Delete up to *limit* ledger rows of facts that were deleted more than *keep* ago. Returns how many."""
    take_write_lock(connection)
    key = tuple_(*ledger.primary_key.columns)
    old = select(*ledger.primary_key.columns).where(is_deleted, ledger.c.at < utcnow() - keep)
    return connection.execute(delete(ledger).where(key.in_(old.order_by(ledger.c.at).limit(limit)))).rowcount


def fold_log(connection: Connection, keep: timedelta, after: int, limit: int = 2_000) -> int:
    """Fold changes older than *keep* into one baseline a row, a page of the log after the id *after*.

    Returns the id at which the page ended, *after* when there is no more. A transaction is folded as a whole, or not
    yet: half of it could not be undone.
    """
    take_write_lock(connection)
    before = utcnow() - keep
    page = select(log.c.id, log.c.entity, log.c.key, log.c.tx).where(log.c.id > after).order_by(log.c.id).limit(limit)
    rows = connection.execute(page).all()
    ends = select(log.c.tx, func.max(log.c.id), func.max(log.c.at)).group_by(log.c.tx)
    ends = ends.where(log.c.tx.in_(select(unnest_strings("transactions").c.value)))
    ended = connection.execute(ends, {"transactions": as_array({row.tx for row in rows})}).all()
    old = {tx: last for tx, last, at in ended if at < before}
    # The longest beginning of the page in which every transaction is old, and ends.
    rows = list(takewhile(lambda row: row.tx in old, rows))
    while rows and (beyond := {row.tx for row in rows if old[row.tx] > rows[-1].id}):
        rows = list(takewhile(lambda row: row.tx not in beyond, rows))
    if not rows:
        largest = max((last - after for last in old.values()), default=0)
        return fold_log(connection, keep, after, 4 * limit) if largest > limit else after
    last: int = rows[-1].id
    forgotten: set[str] = set()
    newer = log.alias()
    with rewriting(connection):
        for entity, keys in by_entity({(row.entity, row.key) for row in rows}).items():
            mine = and_(log.c.entity == entity, log.c.key.in_(select(unnest_strings("keys").c.value)), log.c.id <= last)
            superseded = exists().where(
                newer.c.entity == log.c.entity, newer.c.key == log.c.key, newer.c.id > log.c.id, newer.c.id <= last
            )
            parameters = {"keys": as_array(keys)}
            for is_gone in (superseded, or_(log.c.op == "delete", log.c.version == REDACTED)):
                forgotten.update(connection.scalars(delete(log).where(mine, is_gone).returning(log.c.tx), parameters))
            folded = update(log).where(mine, log.c.op != "baseline").values(op="baseline", step=false(), reverts=null())
            connection.execute(folded, parameters)
    unused = not_(exists().where(log.c.tx == transaction.c.tx))
    named = transaction.c.tx.in_(select(unnest_strings("transactions").c.value))
    connection.execute(delete(transaction).where(named, unused), {"transactions": as_array(forgotten)})
    return last
