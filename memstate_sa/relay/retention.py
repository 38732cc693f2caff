"""Retention: outbox entries are kept until every index has them. By default, log and ledger are kept for ever."""

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
    """The time for which rows are kept that delivery does not need. None means for ever.

    - ``log``: older changes of a row are folded into one baseline. History, undo and time travel end there.
    - ``ledger``: the ledger rows of deleted facts.
    - ``index``: the state of an index that no relay delivers to. After that, no outbox entries are kept for the index,
      so that they no longer grow and delay VACUUM. If a relay delivers to the index again, the relay compares all
      points with the tables.
    """

    log: timedelta | None = None
    ledger: timedelta | None = None
    index: timedelta | None = timedelta(days=7)


def forget_delivered(connection: Connection, limit: int = 10_000) -> int:
    """Delete up to *limit* outbox entries that every index has, oldest first. Return their number.

    Entries of entities that are being refilled are kept. An index may have passed such an entry and still lack its row,
    so a search needs the entry.
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
    """Delete up to *limit* outbox entries if there is no index, oldest first. Return their number.

    An index that is added later is filled from the tables.
    """
    if _has_index(connection):
        return 0
    take_write_lock(connection)
    if not database_of(connection).has_one_writer:
        # Lock out new indexes. An index that began between the check and the DELETE would need the newest entries.
        connection.execute(_keep_indexes_out)
    if _has_index(connection):
        return 0
    oldest = select(outbox.c.id).order_by(outbox.c.id).limit(limit)
    return connection.execute(delete(outbox).where(outbox.c.id.in_(oldest))).rowcount


def _has_index(connection: Connection) -> bool:
    return connection.execute(select(cursor.c.index).limit(1)).first() is not None


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
    """Delete the state of indexes that had no lease for the time *keep*. Return their number."""
    take_write_lock(connection)
    before = utcnow() - keep
    has_lease = exists().where(
        holder.c.index == index_state.c.index,
        holder.c.incarnation == index_state.c.incarnation,
        holder.c.lease_until > before,
    )
    # Delete the row of the index first. A claim begins with that row too, so the two run one after the other.
    idle = delete(index_state).where(index_state.c.active_at < before, not_(has_lease))
    keys = connection.execute(idle.returning(index_state.c.index, index_state.c.incarnation)).all()
    for key in keys:
        forget_index(connection, IndexKey(*key))
    return len(keys)


def forget_ledger(connection: Connection, keep: timedelta, limit: int = 10_000) -> int:
    """Delete up to *limit* ledger rows of facts that were deleted more than *keep* ago. Return their number."""
    take_write_lock(connection)
    key = tuple_(*ledger.primary_key.columns)
    old = select(*ledger.primary_key.columns).where(is_deleted, ledger.c.at < utcnow() - keep)
    return connection.execute(delete(ledger).where(key.in_(old.order_by(ledger.c.at).limit(limit)))).rowcount


def fold_log(connection: Connection, keep: timedelta, after: int, limit: int = 2_000) -> int:
    """Fold changes older than *keep* into one baseline per row, in a page of the log after the id *after*.

    Return the last id of the page, or *after* if there is nothing more to fold. A transaction is folded as a whole,
    because a half could not be undone.
    """
    take_write_lock(connection)
    before = utcnow() - keep
    page = select(log.c.id, log.c.entity, log.c.key, log.c.tx).where(log.c.id > after).order_by(log.c.id).limit(limit)
    rows = connection.execute(page).all()
    ends = select(log.c.tx, func.max(log.c.id), func.max(log.c.at)).group_by(log.c.tx)
    ends = ends.where(log.c.tx.in_(select(unnest_strings("transactions").c.value)))
    end_rows = connection.execute(ends, {"transactions": as_array({row.tx for row in rows})}).all()
    last_ids = {tx: last_id for tx, last_id, at in end_rows if at < before}
    # Take as many entries from the start of the page as possible. All of their transactions must be old, and must have
    # no entries after the last entry that is taken.
    rows = list(takewhile(lambda row: row.tx in last_ids, rows))
    while rows and (incomplete := {row.tx for row in rows if last_ids[row.tx] > rows[-1].id}):
        rows = list(takewhile(lambda row: row.tx not in incomplete, rows))
    if not rows:
        largest = max((last_id - after for last_id in last_ids.values()), default=0)
        return fold_log(connection, keep, after, 4 * limit) if largest > limit else after
    last: int = rows[-1].id
    deleted_txs: set[str] = set()
    newer = log.alias()
    with rewriting(connection):
        for entity, keys in by_entity({(row.entity, row.key) for row in rows}).items():
            of_keys = log.c.key.in_(select(unnest_strings("keys").c.value))
            page_entries = and_(log.c.entity == entity, of_keys, log.c.id <= last)
            superseded = exists().where(
                newer.c.entity == log.c.entity, newer.c.key == log.c.key, newer.c.id > log.c.id, newer.c.id <= last
            )
            parameters = {"keys": as_array(keys)}
            for is_unneeded in (superseded, or_(log.c.op == "delete", log.c.version == REDACTED)):
                deleting = delete(log).where(page_entries, is_unneeded).returning(log.c.tx)
                deleted_txs.update(connection.scalars(deleting, parameters))
            folding = update(log).where(page_entries, log.c.op != "baseline")
            connection.execute(folding.values(op="baseline", step=false(), reverts=null()), parameters)
    unused = not_(exists().where(log.c.tx == transaction.c.tx))
    candidates = transaction.c.tx.in_(select(unnest_strings("transactions").c.value))
    connection.execute(delete(transaction).where(candidates, unused), {"transactions": as_array(deleted_txs)})
    return last
