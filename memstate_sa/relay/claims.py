"""The owners and positions of an index in the database: leases, slots, cursors. Each call is a short transaction.

Safety depends only on the epoch of a slot, which grows whenever the slot changes hands. The lease only tells when a
slot may change hands.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from functools import cache
from itertools import groupby
from typing import Any, NamedTuple

from sqlalchemy import (
    ColumnElement,
    Row,
    Select,
    Update,
    and_,
    bindparam,
    delete,
    exists,
    func,
    literal,
    not_,
    select,
    update,
)
from sqlalchemy.engine import Connection

from memstate_sa.db.dialects import Database, database_of
from memstate_sa.db.json_params import unnest_strings
from memstate_sa.db.leases import database_now, is_dropped, is_gone
from memstate_sa.db.statements import take_write_lock
from memstate_sa.db.tables import cursor, holder, index_state, ledger, parked, past, refill, utcnow
from memstate_sa.log.outbox import in_slots, present_column, read_present, slot_array, slots, to_position
from memstate_sa.log.positions import Position
from memstate_sa.relay import marks, projections
from memstate_sa.relay.index_key import IndexKey, of_index
from memstate_sa.relay.marks import Past
from memstate_sa.relay.plan import ParkedState
from memstate_sa.relay.projections import Projected
from memstate_sa.relay.refills import read_entities, require_refills, restart_scan
from memstate_sa.relay.registration import has_moved, position_columns, touch
from memstate_sa.relay.requests import Claimed, DatabaseState, HeldSlot
from memstate_sa.runtime.printable import printable_logger

logger = printable_logger("memstate_sa.relay")

_owned = select(func.count()).where(of_index(cursor), cursor.c.owner == bindparam("me"))
_one = select(literal(1).label("one")).subquery()


@cache
def _look(database: Database) -> Select[Any]:
    now = database.clock()
    live = select(func.count()).where(of_index(holder), holder.c.lease_until > now)
    slot_owner = exists().where(of_index(holder), holder.c.owner == cursor.c.owner)
    free = exists().where(of_index(cursor), not_(slot_owner))
    due = exists().where(due_parking(database))
    paused = select(index_state.c.paused).where(of_index(index_state))
    counts = (query.scalar_subquery() for query in (live, _owned))
    state = (present_column(database), *counts, free, due, paused.scalar_subquery())
    return select(*state, *marks.columns).select_from(_one.outerjoin(past, of_index(past)))


def due_parking(database: Database) -> ColumnElement[bool]:
    """The criterion of the parked keys of ``slots`` and ``entities`` that are due."""
    return and_(
        of_index(parked),
        parked.c.state.in_((ParkedState.AGAIN, ParkedState.PARKED)),
        parked.c.next_at <= database.clock(),
        parked.c.entity.in_(select(unnest_strings("entities").c.value)),
        in_slots(database, parked.c.slot),
    )


def look(
    connection: Connection, index: IndexKey, owner: str, entities: str, slots: Iterable[int]
) -> tuple[DatabaseState, Past | None]:
    """The state of *index* and its past. *entities* is an array parameter."""
    parameters = {"me": owner, "now": utcnow(), "entities": entities, "slots": slot_array(slots)}
    row = connection.execute(_look(database_of(connection)), {**index.parameters(), **parameters}).one()
    return DatabaseState(to_position(row[0]), row[1], row[2], row[3], row[4], bool(row[5])), marks.as_past(row[6:])


# -- claiming ---------------------------------------------------------------------------------------------------------

_cursors = select(cursor).where(of_index(cursor)).order_by(cursor.c.slot)
_leases = select(holder.c.owner, holder.c.lease_until).where(of_index(holder))
_me = and_(of_index(holder), holder.c.owner == bindparam("me"))
_renew = update(holder).where(_me).values(lease_until=bindparam("until"))


def renew(connection: Connection, index: IndexKey, owner: str, lease_s: float) -> int:
    """Renew the lease. Return the number of slots that *owner* still has: 0 if other owners have taken over."""
    take_write_lock(connection)
    until = database_now(connection) + timedelta(seconds=lease_s)
    renewed_leases = connection.execute(_renew, {**index.parameters(), "me": owner, "until": until}).rowcount
    count: int = connection.execute(_owned, {**index.parameters(), "me": owner}).scalar_one()
    return count if renewed_leases == 1 else 0


@dataclass(frozen=True, slots=True)
class Claimant:
    """An owner that claims slots of a registered index.

    - ``in_process``: the index runs in the owner's process. No write can land after that process has ended, so its
      slots are free at once. A server may still carry out a waiting request, so there the lease must end first.
    - ``epochs``: the slots that the owner believes it holds, with their epochs.
    - ``kept_mark``: the mark that the index had before this transaction.
    - ``went_back``: the database was restored (see `marks`).
    - ``now``: the database's time.
    """

    owner: str
    lease_s: float
    in_process: bool
    classes: Mapping[str, Projected]
    epochs: Mapping[int, int]
    kept_mark: str | None
    went_back: bool
    now: datetime


def claim(connection: Connection, index: IndexKey, claimant: Claimant) -> tuple[Claimed, Past]:
    """Renew the lease, and take free slots until the claimant has its share. Also return the past of the index."""
    owner, now = claimant.owner, claimant.now
    # All relays lock the cursors in this order. The statement waits for relays that are recording a page.
    connection.execute(_cursors.with_for_update(), index.parameters()).all()
    live = _live(connection, index, claimant)
    delivered = read_entities(connection, index)
    settled = projections.settle(connection, index, owner, live, delivered, claimant.classes, now)
    marked = require_refills(connection, index, delivered, settled.delivered, settled.changed)
    present = read_present(connection)
    rows, index_past = _compared(connection, index, claimant, present, alone=len(live) == 1, is_filled=bool(delivered))
    quota = -(-len(slots(database_of(connection))) // len(live))  # this rounds up, so that no slot stays unclaimed
    own_slots = {
        row.slot: HeldSlot(row.epoch, _position(row), fresh=False, settle=False)
        for row in rows
        if row.owner == owner and claimant.epochs.get(row.slot) == row.epoch
    }
    # The database says that these slots are ours, but this process does not know its writes to them. Take them again.
    strays = [row for row in rows if row.owner == owner and row.slot not in own_slots]
    # Take the slots that are furthest behind first.
    free = sorted((row for row in rows if row.owner not in live), key=lambda row: _position(row).floor)
    new_rows = strays + free[: max(0, quota - len(own_slots) - len(strays))]
    fresh_slots = _take(connection, index, owner, new_rows, now)
    return Claimed({**own_slots, **fresh_slots}, present, len(live), quota, marked, settled.delivered), index_past


def _compared(
    connection: Connection, index: IndexKey, claimant: Claimant, present: Position, *, alone: bool, is_filled: bool
) -> tuple[Sequence[Row[Any]], Past]:
    """The cursors of *index*, and its past. The past is a new one if the index or the database was restored."""
    index_past, is_new = marks.compare(connection, index, claimant.kept_mark, alone=alone, went_back=claimant.went_back)
    if is_new and is_filled:
        logger.warning(
            "Index %r was filled from another past of this database. The index or the database was restored from a "
            "backup, or two databases share the index. It is now compared with the tables in full.",
            index.name,
        )
    rows = connection.execute(_cursors, index.parameters()).all()
    is_ahead = any(_position(row).snapshot.xmax > present.snapshot.xmax for row in rows)
    if has_moved(connection, index) or is_new or is_ahead:
        _rebase(connection, index, present)
        rows = connection.execute(_cursors, index.parameters()).all()
    return rows, index_past


def _take(
    connection: Connection, index: IndexKey, owner: str, rows: Sequence[Row[Any]], now: datetime
) -> dict[int, HeldSlot]:
    """Make *owner* the owner of the slots of *rows*, under a new epoch."""
    if not rows:
        return {}
    # Use the clock, not only a counter: an index remembers epochs even if the database is restored or created again.
    epoch = max(int(now.timestamp() * 1000), *(row.epoch + 1 for row in rows))
    _change(connection, index, [row.slot for row in rows], {"owner": owner, "epoch": epoch})
    restart_scan(connection, index, [row.slot for row in rows if row.owner is not None])
    return {row.slot: HeldSlot(epoch, _position(row), True, settle=row.owner is not None) for row in rows}


def _position(row: Row[Any]) -> Position:
    return Position.parse(row.snapshot, row.xid, row.position)


def _live(connection: Connection, index: IndexKey, claimant: Claimant) -> set[str]:
    """Renew the claimant's lease, and delete leases that have ended. Return the owners whose leases run."""
    owner, now = claimant.owner, claimant.now
    until = now + timedelta(seconds=claimant.lease_s)
    statement = (
        database_of(connection)
        .upsert(holder)
        .on_conflict_do_update(index_elements=list(holder.primary_key.columns), set_={"lease_until": until})
    )
    connection.execute(statement, {**index.values(), "owner": owner, "lease_until": until})
    lease_rows = connection.execute(_leases, index.parameters()).all()
    others = [(name, lease_until) for name, lease_until in lease_rows if name != owner]
    ended = [
        name
        for name, lease_until in others
        if lease_until <= now or is_dropped(name) or (claimant.in_process and is_gone(name))
    ]
    if ended:
        connection.execute(delete(holder).where(of_index(holder), holder.c.owner.in_(ended)), index.parameters())
    return {name for name, _ in lease_rows}.difference(ended)


def _rebase(connection: Connection, index: IndexKey, present: Position) -> None:
    """Reset the positions after a restore or a change of cluster, so that the index is compared in full.

    The snapshots of another cluster mean nothing here, and snapshots of the future would hide every entry. Also, the
    transactions that were delivered last may not be in this database.
    """
    statements = (
        update(cursor)
        .where(of_index(cursor))
        .values(**position_columns(present), owner=None, epoch=cursor.c.epoch + 1),
        update(refill).where(of_index(refill)).values(done=False, position=None),
        delete(ledger).where(of_index(ledger)),
    )
    for statement in statements:
        connection.execute(statement, index.parameters())


# -- positions --------------------------------------------------------------------------------------------------------


@cache
def _own_slots(database: Database) -> Select[Any]:
    return (
        select(cursor.c.slot, cursor.c.epoch)
        .where(of_index(cursor), cursor.c.owner == bindparam("me"), in_slots(database, cursor.c.slot))
        .order_by(cursor.c.slot)
        .with_for_update(key_share=True)
    )


@cache
def _changing(database: Database, *names: str) -> Update:
    """Set the columns *names* of ``slots``. An empty ``slots`` would change all rows on SQLite, which has one slot."""
    statement = update(cursor).where(of_index(cursor), in_slots(database, cursor.c.slot))
    return statement.values({name: bindparam(f"new_{name}") for name in names})


def _change(connection: Connection, index: IndexKey, slots: Collection[int], values: Mapping[str, Any]) -> None:
    if slots:
        new = {f"new_{name}": value for name, value in values.items()}
        statement = _changing(database_of(connection), *values)
        connection.execute(statement, {**index.parameters(), **new, "slots": slot_array(slots)})


def still_held(connection: Connection, index: IndexKey, owner: str, epochs: Mapping[int, int]) -> set[int]:
    """Lock the slots in *epochs*, and return the slots that still have this epoch and *owner*.

    The returned slots cannot change hands until this transaction ends.
    """
    take_write_lock(connection)
    parameters = {**index.parameters(), "me": owner, "slots": slot_array(epochs)}
    rows = connection.execute(_own_slots(database_of(connection)), parameters).all() if epochs else ()
    return {slot for slot, epoch in rows if epochs[slot] == epoch}


def save_positions(connection: Connection, index: IndexKey, positions: Mapping[int, Position]) -> None:
    """Record the positions of slots that `still_held` has returned."""
    by_position = sorted(positions.items(), key=lambda item: (str(item[1]), item[0]))
    for position, group in groupby(by_position, key=lambda item: item[1]):
        _change(connection, index, [slot for slot, _ in group], position_columns(position))


_index_is_marked = select(index_state.c.marked).where(of_index(index_state)).scalar_subquery()
_slot_epochs = select(cursor.c.slot, cursor.c.epoch, _index_is_marked).where(of_index(cursor))


class SlotEpochs(NamedTuple):
    """The epoch of each slot, and whether points carry their entity."""

    epochs: Mapping[int, int]
    marked: bool


def read_slot_epochs(connection: Connection, index: IndexKey) -> SlotEpochs:
    rows = connection.execute(_slot_epochs, index.parameters()).all()
    return SlotEpochs({slot: epoch for slot, epoch, _ in rows}, any(marked for _, _, marked in rows))


def free_slots(connection: Connection, index: IndexKey, own_slots: Collection[int]) -> None:
    """Remove the owner of slots that `still_held` has returned."""
    _change(connection, index, own_slots, {"owner": None})


def leave(connection: Connection, index: IndexKey, owner: str) -> None:
    """Delete the lease of *owner*."""
    touch(connection, index, database_now(connection))
    connection.execute(delete(holder).where(_me), {**index.parameters(), "me": owner})
