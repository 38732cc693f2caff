"""What the database knows of one index: lease and cursor, ledger, parked keys, refill. One short transaction a call."""

from __future__ import annotations

import os
import socket
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime, timedelta
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple
from uuid import uuid4

from sqlalchemy import (
    BindParameter,
    ColumnElement,
    Table,
    and_,
    bindparam,
    delete,
    exists,
    func,
    literal,
    not_,
    or_,
    select,
    true,
    update,
)
from sqlalchemy.dialects import postgresql, sqlite
from sqlalchemy.engine import Connection

from memstate_sa.arrays import as_array, each, item, payloads
from memstate_sa.errors import IndexMismatch
from memstate_sa.outbox import Position, here, take_write_lock, undelivered, window
from memstate_sa.relay.plan import Delivered, FactKey, Parked
from memstate_sa.tables import cursor, index_state, ledger, outbox, parked, refill, utcnow

SLOT = 0
"""One holder serves all slots of an index; the column lets several share them."""

SCAN = ""
"""The refill row that stands for the scan of the index itself."""


class IndexKey(NamedTuple):
    """One lifetime of one index; every table of relay state is keyed by it."""

    name: str
    incarnation: str

    def values(self) -> dict[str, str]:
        """For an INSERT."""
        return {"index": self.name, "incarnation": self.incarnation}

    def parameters(self) -> dict[str, str]:
        """For what `_of_index` selects."""
        return {"the_index": self.name, "the_incarnation": self.incarnation}


def _of_index(table: Table) -> ColumnElement[bool]:
    return and_(table.c.index == bindparam("the_index"), table.c.incarnation == bindparam("the_incarnation"))


def owner_id() -> str:
    """Names this holder so that another process of this machine can tell whether it is still alive."""
    return f"{_machine()} {os.getpid()} {uuid4().hex}"


def _machine() -> str:
    try:
        namespace = Path("/proc/self/ns/pid").stat().st_ino
    except OSError:
        namespace = 0
    return f"{socket.gethostname()}/{namespace}"


def is_gone(owner: str) -> bool:
    """Whether *owner* certainly runs no more: a process of this machine that has ended. Its lease is not waited for."""
    machine, _, rest = owner.partition(" ")
    pid = rest.partition(" ")[0]
    if machine != _machine() or not pid.isdigit():
        return False
    try:
        os.kill(int(pid), 0)
    except ProcessLookupError:
        return True
    except OSError:
        return False
    return False


def upsert(dialect_name: str, table: Table) -> Any:
    return {"sqlite": sqlite, "postgresql": postgresql}[dialect_name].insert(table)


def database_now(connection: Connection) -> datetime:
    """Leases live on one clock: the server's. On SQLite every user is on this machine."""
    if connection.dialect.name != "postgresql":
        return utcnow()
    now: datetime = connection.execute(select(func.clock_timestamp())).scalar_one()
    return now.astimezone(UTC)


@dataclass(frozen=True, slots=True)
class Claim:
    """The right to deliver to an index, for the time of the lease.

    ``marked``: points carry their entity. ``new``: it was not this holder's before. ``settle``: the holder before may
    have written what it did not record.
    """

    epoch: int
    at: Position
    new: bool = False
    settle: bool = False
    marked: bool = False


# Statements are built once: building one takes longer than running it, and the relay shares the interpreter with the
# application.
_keys = each("keys")
_entity: BindParameter[str] = bindparam("entity")
_limit: BindParameter[int] = bindparam("limit")
_of_cursor = and_(_of_index(cursor), cursor.c.slot == SLOT)
_held = and_(_of_cursor, cursor.c.owner == bindparam("holder"), cursor.c.epoch == bindparam("held_epoch"))
_position = select(cursor.c.snapshot, cursor.c.target, cursor.c.position).where(_of_cursor)
_filled = select(refill.c.entity).where(_of_index(refill), refill.c.done)
_filled_for = (
    select(func.count())
    .where(_of_index(refill), refill.c.done, refill.c.entity.in_((literal(SCAN), _entity)))
    .scalar_subquery()
)
_any_stuck = exists().where(_of_index(parked), parked.c.entity == _entity)
_newest = select(func.coalesce(func.max(outbox.c.id), 0)).scalar_subquery()
_marked = select(index_state.c.marked).where(_of_index(index_state)).scalar_subquery()
_standing = _position.add_columns(_filled_for == 2, _any_stuck, _newest, _marked)
_stuck = select(parked.c.key).where(_of_index(parked), parked.c.entity == _entity).limit(_limit)
_due = (
    select(parked.c.entity, parked.c.key, parked.c.attempts)
    .where(
        _of_index(parked),
        parked.c.state == "parked",
        parked.c.next_at <= bindparam("now"),
        parked.c.entity.in_(bindparam("entities", expanding=True)),
    )
    .order_by(parked.c.next_at)
    .limit(_limit)
)
# IN, not a join: SQLite would read the whole ledger for each key.
_given = select(ledger.c.key, ledger.c.fingerprint, ledger.c.text_fingerprint, ledger.c.deleted).where(
    _of_index(ledger), ledger.c.entity == _entity, ledger.c.key.in_(select(_keys.c.value))
)
_attempts = select(parked.c.key, parked.c.attempts).where(
    _of_index(parked), parked.c.entity == _entity, parked.c.key.in_(select(_keys.c.value))
)
_unpark = delete(parked).where(
    _of_index(parked), parked.c.entity == bindparam("the_entity"), parked.c.key.in_(select(_keys.c.value))
)
_move = (
    update(cursor)
    .where(_held)
    .values({name: bindparam(f"new_{name}") for name in ("snapshot", "target", "position", "owner", "lease_until")})
)


def _holding(index: IndexKey, claimed: Claim, owner: str) -> dict[str, Any]:
    return {**index.parameters(), "holder": owner, "held_epoch": claimed.epoch}


def _moving(at: Position, owner: str | None, lease_until: datetime | None) -> dict[str, Any]:
    return {
        "new_snapshot": at.snapshot,
        "new_target": at.target,
        "new_position": at.position,
        "new_owner": owner,
        "new_lease_until": lease_until,
    }


def read_position(connection: Connection, index: IndexKey) -> Position | None:
    """How far *index* has come, as the reader's transaction sees it; None when it was never delivered to."""
    row = connection.execute(_position, index.parameters()).one_or_none()
    return None if row is None else Position(*row)


class Standing(NamedTuple):
    """How an index stands to one entity; ``at`` is None when it was never delivered to.

    ``filled``: it was once delivered in full. ``stuck``: it refused keys. ``newest``: the newest outbox id there is.
    ``marked``: points carry their entity.
    """

    at: Position | None
    filled: bool
    stuck: bool
    newest: int
    marked: bool


def read_standing(connection: Connection, index: IndexKey, entity: str) -> Standing:
    row = connection.execute(_standing, {**index.parameters(), "entity": entity}).one_or_none()
    return Standing(None, False, False, 0, False) if row is None else Standing(Position(*row[:3]), *row[3:])


def stuck(connection: Connection, index: IndexKey, entity: str, limit: int) -> Sequence[str]:
    """Keys of *entity* that *index* refused, parked or dead."""
    return connection.scalars(_stuck, {**index.parameters(), "entity": entity, "limit": limit}).all()


def claim(
    connection: Connection,
    index: IndexKey,
    owner: str,
    lease_s: float,
    *,
    embedder: str,
    dimension: int,
    entities: Sequence[str],
) -> Claim | None:
    """Become, or stay, the holder of *index*. None while another holds it.

    Raises IndexMismatch when another embedder filled it, also for an index that does not keep this itself.
    """
    take_write_lock(connection)
    row = connection.execute(select(cursor).where(_of_cursor).with_for_update(), index.parameters()).one_or_none()
    now = database_now(connection)
    until = now + timedelta(seconds=lease_s)
    present = connection.execute(here(connection.dialect.name)).scalar_one()
    claimed: Claim | None
    if row is None:
        claimed = _register(connection, index, owner, until, present, now, embedder, dimension)
        if claimed is None:
            return None
    else:
        _check_embedder(connection, index, embedder, dimension)
        held = row.owner is not None and row.lease_until is not None and row.lease_until > now
        mine = held and row.owner == owner
        if held and not mine and not is_gone(row.owner):
            return None
        at = Position(row.snapshot, row.target, row.position)
        settle = not mine and row.owner is not None  # a clean release leaves no owner
        if settle:
            # The window that the last holder may have had in work ends here; all of it is settled.
            at = replace(at, target=present, position=at.position if at.snapshot is None else 0)
        claimed = Claim(row.epoch + (not mine), at, new=not mine, settle=settle)
        connection.execute(
            update(cursor)
            .where(_of_cursor)
            .values(owner=owner, lease_until=until, epoch=claimed.epoch, target=at.target, position=at.position),
            index.parameters(),
        )
    known = set(connection.scalars(select(refill.c.entity).where(_of_index(refill)), index.parameters()))
    missing = [name for name in (SCAN, *entities) if name not in known]
    if missing:
        connection.execute(
            upsert(connection.dialect.name, refill).on_conflict_do_nothing(),
            [{**index.values(), "entity": name, "done": False} for name in missing],
        )
    return replace(claimed, marked=_mark(connection, index, several=len({SCAN, *known, *entities}) > 2))


def _mark(connection: Connection, index: IndexKey, *, several: bool) -> bool:
    """Whether points of *index* carry their entity. They do from the day on which it gets a second one.

    Not before: in Chroma a field costs a tenth of the writing rate. What is there is then written again, without
    embedding it again.
    """
    is_marked = select(index_state.c.marked).where(_of_index(index_state))
    marked: bool = connection.execute(is_marked, index.parameters()).scalar_one()
    if several and not marked:
        marking = update(index_state).where(_of_index(index_state)).values(marked=True)
        again = update(refill).where(_of_index(refill), refill.c.entity != SCAN).values(done=False, position=None)
        other = update(ledger).where(_of_index(ledger), not_(ledger.c.deleted)).values(fingerprint=None)
        for statement in (marking, again, other):
            connection.execute(statement, index.parameters())
    return marked or several


def _register(
    connection: Connection,
    index: IndexKey,
    owner: str,
    until: datetime,
    present: str,
    now: datetime,
    embedder: str,
    dimension: int,
) -> Claim | None:
    """A new lifetime of an index: the cursor starts now, everything older comes by the refill.

    None when another was faster.
    """
    live = select(cursor.c.incarnation).where(cursor.c.index == index.name, cursor.c.lease_until > now)
    for table in (index_state, ledger, parked, refill, cursor):
        connection.execute(
            delete(table).where(table.c.index == index.name, table.c.incarnation.not_in(live.scalar_subquery()))
        )
    connection.execute(
        upsert(connection.dialect.name, index_state).on_conflict_do_nothing(),
        {**index.values(), "embedder": embedder, "dimension": dimension, "marked": False, "created_at": now},
    )
    snapshot, position = (present, 0) if connection.dialect.name == "postgresql" else (None, int(present))
    connection.execute(
        upsert(connection.dialect.name, cursor).on_conflict_do_nothing(),
        {
            **index.values(),
            "slot": SLOT,
            "snapshot": snapshot,
            "target": None,
            "position": position,
            "owner": owner,
            "lease_until": until,
            "epoch": 1,
        },
    )
    registered = connection.execute(select(cursor.c.owner).where(_of_cursor), index.parameters()).scalar_one()
    if registered != owner:  # an INSERT's rowcount is not to be relied on
        return None
    return Claim(1, Position(snapshot, None, position), new=True)


def _check_embedder(connection: Connection, index: IndexKey, embedder: str, dimension: int) -> None:
    filled_by = select(index_state.c.embedder, index_state.c.dimension).where(_of_index(index_state))
    row = connection.execute(filled_by, index.parameters()).one_or_none()
    if row is not None and tuple(row) != (embedder, dimension):
        raise IndexMismatch(
            f"index {index.name!r} was filled by embedder {row.embedder!r} ({row.dimension} dimensions), not by "
            f"{embedder!r} ({dimension}): give it another name, or delete it to have it filled anew"
        )


def release(connection: Connection, index: IndexKey, claimed: Claim, owner: str, *, clean: bool) -> None:
    """Let others claim *index* at once. Unless *clean*, the next holder settles what this one may have written."""
    leaving = _moving(claimed.at, None if clean else owner, None)
    connection.execute(_move, {**_holding(index, claimed, owner), **leaving})


def next_window(connection: Connection, at: Position, limit: int) -> tuple[Position, list[tuple[int, str, str]]]:
    """The next page of dirty keys; opens a window up to now when none is in work."""
    if at.target is None:
        at = replace(at, target=connection.execute(here(connection.dialect.name)).scalar_one())
    statement, parameters = window(at)
    rows = connection.execute(statement, {**parameters, "limit": limit}).all()
    return at, [(id_, entity, key) for id_, entity, key in rows]


def read_ledger(connection: Connection, index: IndexKey, facts: Collection[FactKey]) -> dict[FactKey, Delivered]:
    found = {}
    for entity, group in by_entity(facts).items():
        rows = connection.execute(_given, {**index.parameters(), "entity": entity, "keys": as_array(group)}).all()
        found.update({(entity, row[0]): Delivered(row[1], row[2], row[3]) for row in rows})
    return found


def by_entity(facts: Iterable[FactKey]) -> dict[str, list[str]]:
    groups: dict[str, list[str]] = {}
    for entity, key in facts:
        groups.setdefault(entity, []).append(key)
    return groups


def due(connection: Connection, index: IndexKey, entities: Collection[str], limit: int) -> dict[FactKey, int]:
    """Parked keys of *entities* whose time has come, with the attempts made."""
    given = {"entities": list(entities), "now": utcnow(), "limit": limit}
    rows = connection.execute(_due, {**index.parameters(), **given}).all()
    return {(row[0], row[1]): row[2] for row in rows}


def attempts(connection: Connection, index: IndexKey, facts: Collection[FactKey]) -> dict[FactKey, int]:
    found = {}
    for entity, group in by_entity(facts).items():
        rows = connection.execute(_attempts, {**index.parameters(), "entity": entity, "keys": as_array(group)}).all()
        found.update({(entity, row[0]): row[1] for row in rows})
    return found


def acknowledge(
    connection: Connection,
    index: IndexKey,
    claimed: Claim,
    owner: str,
    *,
    at: Position,
    lease_s: float,
    written: Mapping[FactKey, Delivered],
    done: Collection[FactKey],
    parking: Mapping[FactKey, Parked],
    foreign: Collection[FactKey] = (),
) -> bool:
    """Record a delivered page and move the cursor to *at*. False, and nothing recorded, when the claim is lost."""
    take_write_lock(connection)
    until = database_now(connection) + timedelta(seconds=lease_s)
    moved = connection.execute(_move, {**_holding(index, claimed, owner), **_moving(at, owner, until)})
    if moved.rowcount != 1:
        return False
    record = _record(connection.dialect.name)
    now = {**index.parameters(), "held_epoch": claimed.epoch, "now": utcnow()}
    for payload in payloads((*fact, *delivered) for fact, delivered in written.items()):
        connection.execute(record, {**now, "rows": payload})
    unpark(connection, index, done)
    park_all(connection, index, parking)
    if foreign:
        # Keys of another Memory that shares this index: passed by here, so they wait for its relay, deleted ones too.
        known = set(connection.scalars(select(refill.c.entity).where(_of_index(refill)), index.parameters()))
        again = Parked(0, utcnow(), "parked", "passed by")
        park_all(connection, index, {fact: again for fact in foreign if fact[0] in known})
    return True


_RECORDED = ("entity", "key", "fingerprint", "text_fingerprint", "deleted")


@cache
def _record(dialect_name: str) -> Any:
    """What was delivered, unless a later holder has delivered since."""
    common = {
        "index": bindparam("the_index", type_=ledger.c.index.type),
        "incarnation": bindparam("the_incarnation", type_=ledger.c.incarnation.type),
        "epoch": bindparam("held_epoch", type_=ledger.c.epoch.type),
        "at": bindparam("now", type_=ledger.c.at.type),
    }
    rows = select(*common.values(), *(item(n, ledger.c[name].type) for n, name in enumerate(_RECORDED)))
    # Without a WHERE, SQLite takes ON CONFLICT for a join's ON.
    statement = upsert(dialect_name, ledger).from_select([*common, *_RECORDED], rows.where(true()))
    return statement.on_conflict_do_update(
        index_elements=list(ledger.primary_key.columns),
        set_={name: statement.excluded[name] for name in ("epoch", "at", *_RECORDED[2:])},
        where=ledger.c.epoch <= statement.excluded.epoch,
    )


def unpark(connection: Connection, index: IndexKey, facts: Collection[FactKey]) -> None:
    for entity, group in by_entity(facts).items():
        connection.execute(_unpark, {**index.parameters(), "the_entity": entity, "keys": as_array(group)})


def park_all(connection: Connection, index: IndexKey, parking: Mapping[FactKey, Parked]) -> None:
    if not parking:
        return
    statement = upsert(connection.dialect.name, parked)
    connection.execute(
        statement.on_conflict_do_update(
            index_elements=list(parked.primary_key.columns),
            set_={name: statement.excluded[name] for name in Parked._fields},
        ),
        [
            {**index.values(), "entity": entity, "key": key, **record._asdict()}
            for (entity, key), record in parking.items()
        ],
    )


class RefillStep(NamedTuple):
    entity: str
    position: str | None


def next_refill(connection: Connection, index: IndexKey, entities: Sequence[str]) -> RefillStep | None:
    """What of delivering in full comes next: the index's own scan first, then entity by entity."""
    row = connection.execute(
        select(refill.c.entity, refill.c.position)
        .where(_of_index(refill), not_(refill.c.done), refill.c.entity.in_((SCAN, *entities)))
        .order_by(refill.c.entity)
        .limit(1),
        index.parameters(),
    ).one_or_none()
    return None if row is None else RefillStep(*row)


def save_refill(connection: Connection, index: IndexKey, step: RefillStep, *, done: bool) -> None:
    connection.execute(
        update(refill)
        .where(_of_index(refill), refill.c.entity == step.entity)
        .values(position=step.position, done=done),
        index.parameters(),
    )


@dataclass(frozen=True, slots=True)
class Backlog:
    """What an index has not been given yet.

    ``parked`` keys were refused and wait for another attempt, those ``due`` now; ``dead`` ones wait for their next
    change. ``refilling``: the index is new, and is being delivered in full.
    """

    pending: int
    oldest_s: float | None
    parked: int
    due: int
    dead: int
    refilling: bool


def backlog(connection: Connection, index: IndexKey, entities: Sequence[str], up_to: int | None = None) -> Backlog:
    """Of the entries up to the outbox id *up_to*, if given."""
    at = read_position(connection, index)
    behind = and_(undelivered(at), outbox.c.entity.in_(entities))
    if up_to is not None:
        behind = and_(behind, outbox.c.id <= up_to)
    distinct = select(outbox.c.entity, outbox.c.key).where(behind).distinct().subquery()
    pending = connection.execute(select(func.count()).select_from(distinct)).scalar_one()
    oldest = connection.execute(select(outbox.c.created_at).where(behind).order_by(outbox.c.id).limit(1)).scalar()
    mine = and_(_of_index(parked), parked.c.entity.in_(entities))
    counts = select(parked.c.state, func.count()).where(mine).group_by(parked.c.state)
    states: dict[str, int] = {name: count for name, count in connection.execute(counts, index.parameters())}  # noqa: C416  # rows, not pairs
    return Backlog(
        pending=pending,
        oldest_s=None if oldest is None else max(0.0, (utcnow() - oldest).total_seconds()),
        parked=states.get("parked", 0),
        due=len(due(connection, index, entities, 1000)),
        dead=states.get("dead", 0),
        refilling=not is_filled(connection, index, entities),
    )


def is_filled(connection: Connection, index: IndexKey, entities: Sequence[str]) -> bool:
    done: set[Any] = set(connection.scalars(_filled, index.parameters()))
    return done.issuperset((SCAN, *entities))


def forget_delivered(connection: Connection) -> int:
    """Delete outbox entries that every index has; returns how many.

    An index that is being filled may be past an entry whose row it does not hold yet: search reads it here meanwhile.
    """
    positions = [
        Position(*row) for row in connection.execute(select(cursor.c.snapshot, cursor.c.target, cursor.c.position))
    ]
    if not positions:
        return 0
    take_write_lock(connection)
    filling = exists().where(not_(refill.c.done), refill.c.entity.in_((literal(SCAN), outbox.c.entity)))
    still_needed = or_(filling, *(undelivered(replace(at, target=None)) for at in positions))
    return connection.execute(delete(outbox).where(not_(still_needed))).rowcount
