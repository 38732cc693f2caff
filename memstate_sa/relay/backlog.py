"""What an index has not been given yet: for searches, and for people."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any, NamedTuple

from sqlalchemy import and_, bindparam, exists, func, literal, not_, select
from sqlalchemy.engine import Connection

from memstate_sa.db.json_params import as_array, unnest_strings
from memstate_sa.db.tables import cursor, index_state, outbox, parked, past, projection, refill, utcnow
from memstate_sa.log.outbox import ALL, in_slots, position_parameters, slot_array, slots, undelivered
from memstate_sa.log.positions import Position, Snapshot, meet
from memstate_sa.relay import claims, ledger, marks
from memstate_sa.relay.claims import SCAN
from memstate_sa.relay.index_key import IndexKey, of_index
from memstate_sa.relay.marks import Past
from memstate_sa.relay.plan import DEAD, PARKED
from memstate_sa.relay.projections import HELD

_positions = select(cursor.c.snapshot, cursor.c.xid, cursor.c.position, cursor.c.slot).where(of_index(cursor))


def read_positions(connection: Connection, index: IndexKey) -> dict[Position, list[int]]:
    """Which slots of *index* are where; empty when it was never delivered to."""
    places: dict[Position, list[int]] = {}
    for snapshot, xid, id_, slot in connection.execute(_positions, index.parameters()).all():
        places.setdefault(Position.parse(snapshot, xid, id_), []).append(slot)
    return places


# -- for a search -----------------------------------------------------------------------------------------------------


class Standing(NamedTuple):
    """How an index stands to one entity; ``at`` is None when it was never delivered to.

    ``filled``: it was once delivered in full. ``stuck``: it refused keys. ``newest``: the newest outbox id there is.
    ``marked``: points carry their entity. ``past``: the mark that the index should have. ``projection``: what of each
    row it holds.
    """

    at: Position | None
    filled: bool
    stuck: bool
    newest: int
    marked: bool
    past: Past | None = None
    projection: str | None = None


_unfilled = exists().where(
    of_index(refill), refill.c.entity.in_((literal(SCAN), bindparam("entity"))), not_(refill.c.done)
)
_known = exists().where(of_index(refill), refill.c.entity == bindparam("entity"))
_any_stuck = exists().where(of_index(parked), parked.c.entity == bindparam("entity"))
_newest = select(func.coalesce(func.max(outbox.c.id), 0)).scalar_subquery()
_marked = select(index_state.c.marked).where(of_index(index_state)).scalar_subquery()
_projection = (
    select(projection.c.projection)
    .where(of_index(projection), projection.c.entity == bindparam("entity"), projection.c.owner == HELD)
    .scalar_subquery()
)
# One row, unless slots have changed hands a moment ago.
_standing = (
    select(cursor.c.snapshot, cursor.c.xid, cursor.c.position, and_(_known, not_(_unfilled)), _any_stuck)
    .add_columns(_newest, _marked, _projection, *marks.columns)
    .select_from(
        cursor.outerjoin(past, and_(past.c.index == cursor.c.index, past.c.incarnation == cursor.c.incarnation))
    )
    .where(of_index(cursor))
    .distinct()
)
_stuck = select(parked.c.key).where(of_index(parked), parked.c.entity == bindparam("entity")).limit(bindparam("limit"))


def read_standing(connection: Connection, index: IndexKey, entity: str) -> Standing:
    rows = connection.execute(_standing, {**index.parameters(), "entity": entity}).all()
    if not rows:
        return Standing(None, False, False, 0, False)
    filled, stuck, newest, marked, held, *at = rows[0][3:]
    places = meet(Position.parse(*row[:3]) for row in rows)
    return Standing(places, filled, stuck, newest, marked, marks.as_past(at), held)


def stuck(connection: Connection, index: IndexKey, entity: str, limit: int) -> Sequence[str]:
    """Keys of *entity* that *index* refused, parked or dead."""
    return connection.scalars(_stuck, {**index.parameters(), "entity": entity, "limit": limit}).all()


# -- for people -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Backlog:
    """What an index has not been given yet.

    ``parked`` keys were refused and wait for another attempt; ``dead`` ones wait for their next change. ``due`` are
    those to be tried again now, for whatever reason. ``refilling``: the index is new, and is being delivered in full.
    ``replaced_by``: the index that searches ask instead, see `Memory.reindex`. ``problem``: why the last delivery of a
    relay in this process failed, or else why one of the refused keys was refused.
    """

    pending: int
    oldest_s: float | None
    parked: int
    due: int
    dead: int
    refilling: bool
    paused: bool = False
    replaced_by: str | None = None
    problem: str | None = None


@cache
def _pending(dialect_name: str) -> Any:
    entities = outbox.c.entity.in_(select(unnest_strings("entities").c.value))
    columns = (outbox.c.entity, outbox.c.key, outbox.c.created_at)
    entries = undelivered(dialect_name, *columns, where=and_(entities, in_slots(dialect_name, outbox.c.slot))).c
    keys = select(entries.entity, entries.key, func.min(entries.created_at).label("at"))
    grouped = keys.group_by(entries.entity, entries.key).subquery()
    return select(func.count(), func.min(grouped.c.at))


_by_state = (
    select(parked.c.state, func.count(), func.max(parked.c.error))
    .where(of_index(parked), parked.c.entity.in_(select(unnest_strings("entities").c.value)))
    .group_by(parked.c.state)
)
_paused = select(index_state.c.paused).where(of_index(index_state))


def backlog(connection: Connection, index: IndexKey, entities: Sequence[str]) -> Backlog:
    dialect, pending, oldest = connection.dialect.name, 0, None
    names = as_array(entities)
    places = read_positions(connection, index) or {BEGINNING: list(slots(dialect))}
    for at, group in places.items():
        given = {"entities": names, "slots": slot_array(group), "limit": ALL}
        count, since = connection.execute(_pending(dialect), {**position_parameters(at), **given}).one()
        pending += count
        oldest = min(filter(None, (oldest, since)), default=None)
    rows = connection.execute(_by_state, {**index.parameters(), "entities": names}).all()
    states = {state: count for state, count, _ in rows}
    refusals = {state: error for state, _, error in rows}
    return Backlog(
        pending=pending,
        oldest_s=None if oldest is None else max(0.0, (utcnow() - oldest).total_seconds()),
        parked=states.get(PARKED, 0),
        due=len(ledger.due(connection, index, names, slots(dialect), 1000)),
        dead=states.get(DEAD, 0),
        refilling=not claims.is_filled(connection, index, entities),
        paused=bool(connection.execute(_paused, index.parameters()).scalar()),
        problem=refusals.get(DEAD) or refusals.get(PARKED),
    )


BEGINNING = Position(Snapshot(0))


def has(connection: Connection, index: IndexKey, entities: Sequence[str], present: Position) -> bool:
    """Whether *index* has everything that *present* has, but for keys that it refused and that are not due."""
    places = read_positions(connection, index)
    return (
        bool(places)
        and all(at.covers(present) for at in places)
        and claims.is_filled(connection, index, entities)
        and not ledger.due(connection, index, as_array(entities), slots(connection.dialect.name), 1)
    )
