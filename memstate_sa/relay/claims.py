"""The owners of an index and its positions: leases, slots, cursors, refills. One short transaction a call.

Safety hangs on a slot's epoch alone, which grows whenever the slot changes hands; a lease only tells when it may.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from datetime import datetime, timedelta
from functools import cache
from itertools import groupby
from typing import Any, NamedTuple

from sqlalchemy import (
    ColumnElement,
    Row,
    Select,
    and_,
    bindparam,
    delete,
    exists,
    func,
    literal,
    not_,
    select,
    text,
    update,
)
from sqlalchemy.engine import Connection

from memstate_sa.db.json_params import unnest_strings
from memstate_sa.db.leases import clock, database_now, is_dropped, is_gone
from memstate_sa.db.statements import take_write_lock, upsert
from memstate_sa.db.tables import (
    cursor,
    holder,
    index_state,
    ledger,
    parked,
    past,
    projection,
    refill,
    utcnow,
)
from memstate_sa.errors import IndexMismatch
from memstate_sa.log.outbox import in_slots, present_column, read_present, slot_array, slots, to_position
from memstate_sa.log.positions import Position
from memstate_sa.relay import marks, projections
from memstate_sa.relay.index_key import IndexKey, of_index
from memstate_sa.relay.marks import Past
from memstate_sa.relay.plan import ParkedState
from memstate_sa.relay.projections import Projected
from memstate_sa.relay.requests import Claimed, DatabaseState, HeldSlot, Refill
from memstate_sa.runtime.printable import printable_logger

logger = printable_logger("memstate_sa.relay")

SCAN = ""
"""The refill rows that stand for the scan of the index itself."""

_limit = select(
    func.set_config("lock_timeout", bindparam("limit"), True),
    func.set_config("idle_in_transaction_session_timeout", bindparam("limit"), True),
)


def limit_transaction(connection: Connection, seconds: float) -> None:
    """Have PostgreSQL end this transaction if its process stops in it, and limit its waits for locks.

    The settings are local to this transaction, as a pooler in transaction mode needs.
    """
    if connection.dialect.name == "postgresql":
        connection.execute(_limit, {"limit": f"{seconds * 1000:.0f}ms"})


_owned = select(func.count()).where(of_index(cursor), cursor.c.owner == bindparam("me"))
_one = select(literal(1).label("one")).subquery()


@cache
def _look(dialect_name: str) -> Select[Any]:
    now = clock(dialect_name)
    live = select(func.count()).where(of_index(holder), holder.c.lease_until > now)
    its_owner = exists().where(of_index(holder), holder.c.owner == cursor.c.owner)
    free = exists().where(of_index(cursor), not_(its_owner))
    due = exists().where(due_parking(dialect_name))
    paused = select(index_state.c.paused).where(of_index(index_state))
    counts = (query.scalar_subquery() for query in (live, _owned))
    state = (present_column(dialect_name), *counts, free, due, paused.scalar_subquery())
    return select(*state, *marks.columns).select_from(_one.outerjoin(past, of_index(past)))


def due_parking(dialect_name: str) -> ColumnElement[bool]:
    """Parked keys of ``slots`` and ``entities`` whose time has come."""
    return and_(
        of_index(parked),
        parked.c.state.in_((ParkedState.AGAIN, ParkedState.PARKED)),
        parked.c.next_at <= clock(dialect_name),
        parked.c.entity.in_(select(unnest_strings("entities").c.value)),
        in_slots(dialect_name, parked.c.slot),
    )


def look(
    connection: Connection, index: IndexKey, owner: str, entities: str, slots: Iterable[int]
) -> tuple[DatabaseState, Past | None]:
    """Read the state of *index*, and its past. *entities* is an array parameter."""
    parameters = {"me": owner, "now": utcnow(), "entities": entities, "slots": slot_array(slots)}
    row = connection.execute(_look(connection.dialect.name), {**index.parameters(), **parameters}).one()
    return DatabaseState(to_position(row[0]), row[1], row[2], row[3], row[4], bool(row[5])), marks.as_past(row[6:])


# -- claiming ---------------------------------------------------------------------------------------------------------

_cursors = select(cursor).where(of_index(cursor)).order_by(cursor.c.slot)
_leases = select(holder.c.owner, holder.c.lease_until).where(of_index(holder))
_me = and_(of_index(holder), holder.c.owner == bindparam("me"))
_renew = update(holder).where(_me).values(lease_until=bindparam("until"))


def renew(connection: Connection, index: IndexKey, owner: str, lease_s: float) -> int:
    """Prolong the lease. Returns how many slots *owner* still has, 0 when others took it for dead."""
    take_write_lock(connection)
    until = database_now(connection) + timedelta(seconds=lease_s)
    known = connection.execute(_renew, {**index.parameters(), "me": owner, "until": until}).rowcount
    count: int = connection.execute(_owned, {**index.parameters(), "me": owner}).scalar_one()
    return count if known == 1 else 0


def claim(
    connection: Connection,
    index: IndexKey,
    owner: str,
    lease_s: float,
    *,
    epochs: Mapping[int, int],
    in_process: bool,
    embedder: str,
    dimension: int,
    classes: Mapping[str, Projected],
    kept: str | None = None,
    went_back: bool = False,
) -> tuple[Claimed, Past]:
    """Prolong the lease, and take free slots until *owner* has its share.

    *epochs* are those of the slots that *owner* knows to be its own. Nothing lands in an index that is *in_process*
    once its process has ended, so its lease is not waited for. Elsewhere a request may be waiting at a server. *kept*
    is the mark that the index had before this transaction. *went_back* says that the database was restored (see
    `marks`). Also returns the past of the index.

    Raises IndexMismatch when another embedder filled the index, also for an index that does not keep this itself.
    """
    take_write_lock(connection)
    dialect, now = connection.dialect.name, database_now(connection)
    _require_registered(connection, index, now, embedder, dimension)
    while not _touch(connection, index, now):  # another process has just forgotten it
        _require_registered(connection, index, now, embedder, dimension)
    # All relays lock them in this order. This waits for those that acknowledge meanwhile.
    connection.execute(_cursors.with_for_update(), index.parameters()).all()
    live = _live(connection, index, owner, now, now + timedelta(seconds=lease_s), look_for_gone=in_process)
    delivered = known(connection, index)
    settled = projections.settle(connection, index, owner, live, delivered, classes, now)
    marked = _refill_rows(connection, index, delivered, settled.delivered, settled.changed)
    rows = connection.execute(_cursors, index.parameters()).all()
    present = read_present(connection)
    in_future = any(_position(row).snapshot.xmax > present.snapshot.xmax for row in rows)
    now_past, is_another = marks.compare(connection, index, kept, alone=len(live) == 1, went_back=went_back)
    if is_another and delivered:
        logger.warning(
            "index %r was filled from another past of this database: one of the two was restored, or two databases "
            "share the index. It is compared with the tables in full",
            index.name,
        )
    if is_another or _is_elsewhere(connection, index) or in_future:
        _rebase(connection, index, present)
        rows = connection.execute(_cursors, index.parameters()).all()
    quota = -(-len(slots(dialect)) // len(live))  # rounded up: no slot is left over
    own_slots = {
        row.slot: HeldSlot(row.epoch, _position(row), fresh=False, settle=False)
        for row in rows
        if row.owner == owner and epochs.get(row.slot) == row.epoch
    }
    # Slots that are ours in the database, but unknown to us: our writes to them are unknown, too.
    strays = [row for row in rows if row.owner == owner and row.slot not in own_slots]
    # The slots that are furthest behind come first: no relay has had time for them.
    free = sorted((row for row in rows if row.owner not in live), key=lambda row: _position(row).floor)
    taken = strays + free[: max(0, quota - len(own_slots) - len(strays))]
    epoch = 0
    if taken:
        # By the clock, not only by counting: an index outlives a database that is restored or made anew.
        epoch = max(int(now.timestamp() * 1000), *(row.epoch + 1 for row in taken))
        taking = update(cursor).where(of_index(cursor), cursor.c.slot.in_([row.slot for row in taken]))
        connection.execute(taking.values(owner=owner, epoch=epoch), index.parameters())
        _scan_again(connection, index, [row.slot for row in taken if row.owner is not None])
    fresh = {row.slot: HeldSlot(epoch, _position(row), True, settle=row.owner is not None) for row in taken}
    return Claimed({**own_slots, **fresh}, present, len(live), quota, marked, settled.delivered), now_past


def _touch(connection: Connection, index: IndexKey, now: datetime) -> bool:
    touching = update(index_state).where(of_index(index_state)).values(active_at=now)
    return connection.execute(touching, index.parameters()).rowcount > 0


def _scan_again(connection: Connection, index: IndexKey, taken: Collection[int]) -> None:
    """Scan the index again for *taken* slots that were being filled.

    Their last owner may have written points whose rows are no longer listed.
    """
    undone = select(refill.c.slot).where(of_index(refill), not_(refill.c.done), refill.c.slot.in_(taken))
    slots = set(connection.scalars(undone.distinct(), index.parameters())) if taken else set()
    if slots:
        again = update(refill).where(of_index(refill), refill.c.entity == SCAN, refill.c.slot.in_(slots))
        connection.execute(again.values(done=False, position=None), index.parameters())


def _position(row: Row[Any]) -> Position:
    return Position.parse(row.snapshot, row.xid, row.position)


def _live(
    connection: Connection,
    index: IndexKey,
    owner: str,
    now: datetime,
    until: datetime,
    *,
    look_for_gone: bool,
) -> set[str]:
    """The owners whose lease runs, *owner* among them. The others are deleted."""
    statement = upsert(connection.dialect.name, holder).on_conflict_do_update(
        index_elements=list(holder.primary_key.columns), set_={"lease_until": until}
    )
    connection.execute(statement, {**index.values(), "owner": owner, "lease_until": until})
    lease_rows = connection.execute(_leases, index.parameters()).all()
    others = [(name, lease_until) for name, lease_until in lease_rows if name != owner]
    gone = [
        name
        for name, lease_until in others
        if lease_until <= now or is_dropped(name) or (look_for_gone and is_gone(name))
    ]
    if gone:
        connection.execute(delete(holder).where(of_index(holder), holder.c.owner.in_(gone)), index.parameters())
    return {name for name, _ in lease_rows}.difference(gone)


_OF_INDEX = (index_state, refill, parked, cursor, ledger, holder, past, projection)


def _require_registered(connection: Connection, index: IndexKey, now: datetime, embedder: str, dimension: int) -> None:
    """Register a new lifetime of an index. Its cursors start now; the refill brings everything older."""
    if _is_registered(connection, index, embedder, dimension):
        return
    live = select(holder.c.incarnation).where(holder.c.index == index.name, holder.c.lease_until > now)
    was_paused = exists().where(index_state.c.index == index.name, index_state.c.paused)
    paused = connection.execute(select(was_paused)).scalar_one()
    for table in _OF_INDEX:
        connection.execute(
            delete(table).where(table.c.index == index.name, table.c.incarnation.not_in(live.scalar_subquery()))
        )
    dialect = connection.dialect.name
    # Two relays may find it new: the second one leaves the rows of the first.
    state = {"embedder": embedder, "dimension": dimension, "marked": False, "paused": paused}
    state |= {"created_at": now, "active_at": now, "cluster": _read_cluster(connection)}
    connection.execute(upsert(dialect, index_state).on_conflict_do_nothing(), {**index.values(), **state})
    values = {**index.values(), **_columns(read_present(connection)), "owner": None, "epoch": 0}
    connection.execute(
        upsert(dialect, cursor).on_conflict_do_nothing(), [{**values, "slot": slot} for slot in slots(dialect)]
    )
    assert _is_registered(connection, index, embedder, dimension)


def _is_registered(connection: Connection, index: IndexKey, embedder: str, dimension: int) -> bool:
    filled_by = select(index_state.c.embedder, index_state.c.dimension).where(of_index(index_state))
    row = connection.execute(filled_by, index.parameters()).one_or_none()
    if row is not None and tuple(row) != (embedder, dimension):
        raise IndexMismatch(
            f"index {index.name!r} was filled by embedder {row.embedder!r} ({row.dimension} dimensions), not by "
            f"{embedder!r} ({dimension}): give it another name, or delete it to have it filled anew"
        )
    return row is not None


def forget_index(connection: Connection, index: IndexKey) -> None:
    """Delete all state of *index*, as if it had never been delivered to."""
    for table in _OF_INDEX:
        connection.execute(delete(table).where(of_index(table)), index.parameters())


def _columns(position: Position) -> dict[str, Any]:
    return {"snapshot": str(position.snapshot), "xid": position.xid, "position": position.id}


def known(connection: Connection, index: IndexKey) -> set[str]:
    """The entities that the index has been delivered, and `SCAN`."""
    return set(connection.scalars(select(refill.c.entity).where(of_index(refill)).distinct(), index.parameters()))


def _refill_rows(
    connection: Connection,
    index: IndexKey,
    delivered: Collection[str],
    entities: Collection[str],
    changed: Collection[str],
) -> bool:
    """Refill *entities* that are new or *changed*. Returns whether points carry their entity.

    They do when the index gets a second entity, and not before: in Chroma a field costs a tenth of the writing rate.
    All points are then written again, without a new embedding.
    """
    dialect = connection.dialect.name
    if changed:
        restart = update(refill).where(of_index(refill), refill.c.entity.in_(changed))
        connection.execute(restart.values(done=False, position=None), index.parameters())
    missing_names = [name for name in (SCAN, *entities) if name not in delivered]
    if missing_names:
        rows = [
            {**index.values(), "entity": name, "slot": slot, "position": None, "done": False}
            for name in missing_names
            for slot in slots(dialect)
        ]
        connection.execute(upsert(dialect, refill).on_conflict_do_nothing(), rows)
        # The scan passed by the points of an entity that was unknown.
        scan = update(refill).where(of_index(refill), refill.c.entity == SCAN).values(done=False, position=None)
        connection.execute(scan, index.parameters())
    is_marked = select(index_state.c.marked).where(of_index(index_state))
    marked: bool = connection.execute(is_marked, index.parameters()).scalar_one()
    several = len({SCAN, *delivered, *entities}) > 2
    if several and not marked:
        marking = update(index_state).where(of_index(index_state)).values(marked=True)
        refilling = update(refill).where(of_index(refill), refill.c.entity != SCAN).values(done=False, position=None)
        doubting = update(ledger).where(of_index(ledger), not_(ledger.c.deleted)).values(fingerprint=None)
        # Writes under way without the entity are not acknowledged any more.
        revoking = update(cursor).where(of_index(cursor)).values(epoch=cursor.c.epoch + 1)
        for statement in (marking, refilling, doubting, revoking):
            connection.execute(statement, index.parameters())
    return marked or several


_may_ask = select(func.has_function_privilege("pg_control_system()", "execute"))

# The insertion point's timeline: it changes at once when a standby is promoted or a backup recovered.
_cluster = text(
    "SELECT concat(system_identifier, '/', left(pg_walfile_name(pg_current_wal_insert_lsn()), 8)) "
    "FROM pg_control_system()"
)


def _read_cluster(connection: Connection) -> str | None:
    """The cluster and timeline of transaction ids; None where the server does not tell them."""
    if connection.dialect.name != "postgresql" or not connection.execute(_may_ask).scalar_one():
        return None
    cluster: str = connection.execute(_cluster).scalar_one()
    return cluster


def _is_elsewhere(connection: Connection, index: IndexKey) -> bool:
    """Whether the database has moved to another cluster since the positions were recorded. Records the new one."""
    known = connection.execute(select(index_state.c.cluster).where(of_index(index_state)), index.parameters()).scalar()
    cluster = _read_cluster(connection)
    if cluster is not None and cluster != known:
        recording = update(index_state).where(of_index(index_state)).values(cluster=cluster)
        connection.execute(recording, index.parameters())
    return None not in (known, cluster) and known != cluster


def _rebase(connection: Connection, index: IndexKey, present: Position) -> None:
    """Have the index compared in full: the database was restored, or a standby promoted.

    Another cluster's snapshots mean nothing here. Snapshots of the future would hide every entry. The last deliveries
    may never have been committed.
    """
    statements = (
        update(cursor).where(of_index(cursor)).values(**_columns(present), owner=None, epoch=cursor.c.epoch + 1),
        update(refill).where(of_index(refill)).values(done=False, position=None),
        delete(ledger).where(of_index(ledger)),
    )
    for statement in statements:
        connection.execute(statement, index.parameters())


# -- positions --------------------------------------------------------------------------------------------------------

_mine = (
    select(cursor.c.slot, cursor.c.epoch)
    .where(of_index(cursor), cursor.c.owner == bindparam("me"), cursor.c.slot.in_(bindparam("slots", expanding=True)))
    .order_by(cursor.c.slot)
    .with_for_update(key_share=True)
)

_moving = (
    update(cursor)
    .where(of_index(cursor), cursor.c.slot.in_(bindparam("slots", expanding=True)))
    .values({name: bindparam(f"new_{name}") for name in ("snapshot", "xid", "position")})
)


def still_held(connection: Connection, index: IndexKey, owner: str, epochs: Mapping[int, int]) -> set[int]:
    """The slots of *epochs* that have not changed owners. They cannot, until this transaction ends."""
    take_write_lock(connection)
    rows = connection.execute(_mine, {**index.parameters(), "me": owner, "slots": list(epochs)}).all()
    return {slot for slot, epoch in rows if epochs[slot] == epoch}


def move(connection: Connection, index: IndexKey, positions: Mapping[int, Position]) -> None:
    """Record the positions of slots that are `still_held`."""
    by_position = sorted(positions.items(), key=lambda item: (str(item[1]), item[0]))
    for position, group in groupby(by_position, key=lambda item: item[1]):
        new = {f"new_{name}": value for name, value in _columns(position).items()}
        connection.execute(_moving, {**index.parameters(), **new, "slots": [slot for slot, _ in group]})


_index_is_marked = select(index_state.c.marked).where(of_index(index_state)).scalar_subquery()
_slot_epochs = select(cursor.c.slot, cursor.c.epoch, _index_is_marked).where(of_index(cursor))


class SlotEpochs(NamedTuple):
    """The epoch of each slot's claim, and whether points carry their entity."""

    epochs: Mapping[int, int]
    marked: bool


def read_slot_epochs(connection: Connection, index: IndexKey) -> SlotEpochs:
    rows = connection.execute(_slot_epochs, index.parameters()).all()
    return SlotEpochs({slot: epoch for slot, epoch, _ in rows}, any(marked for _, _, marked in rows))


def free_slots(connection: Connection, index: IndexKey, held_slots: Collection[int]) -> None:
    """Take the owner from slots that are `still_held`."""
    statement = update(cursor).where(of_index(cursor), cursor.c.slot.in_(held_slots)).values(owner=None)
    connection.execute(statement, index.parameters())


def leave(connection: Connection, index: IndexKey, owner: str) -> None:
    _touch(connection, index, database_now(connection))
    connection.execute(delete(holder).where(_me), {**index.parameters(), "me": owner})


def next_refill(
    connection: Connection, index: IndexKey, slots: Collection[int], entities: Collection[str]
) -> Refill | None:
    """The next part of a refill: the index's own scan first, then entity by entity.

    Slots at the same row go together. The slots that are furthest behind go first.
    """
    statement = (
        select(refill.c.entity, refill.c.position, refill.c.slot)
        .where(of_index(refill), not_(refill.c.done))
        .where(refill.c.entity.in_([SCAN, *entities]), refill.c.slot.in_(slots))
        .order_by(refill.c.entity, refill.c.position.is_not(None), refill.c.position, refill.c.slot)
    )
    rows = connection.execute(statement, index.parameters()).all()
    if not rows:
        return None
    entity, position, _ = rows[0]
    return Refill(entity, position, frozenset(row[2] for row in rows if row[:2] == (entity, position)))


def save_refill(connection: Connection, index: IndexKey, progress: Refill, held_slots: Collection[int]) -> None:
    connection.execute(
        update(refill)
        .where(
            of_index(refill), refill.c.entity == progress.entity, refill.c.slot.in_(progress.slots & set(held_slots))
        )
        .values(position=progress.position, done=progress.done),
        index.parameters(),
    )


def is_filled(connection: Connection, index: IndexKey, entities: Sequence[str]) -> bool:
    """Whether the refill of each of *entities*, and the scan of the index itself, are done."""
    statement = select(refill.c.entity, refill.c.done).where(of_index(refill)).distinct()
    rows = connection.execute(statement, index.parameters()).all()
    undone = {entity for entity, done in rows if not done}
    return {entity for entity, _ in rows}.difference(undone).issuperset((SCAN, *entities))
