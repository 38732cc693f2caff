"""The undelivered changes of an index, for searches and for operators."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from functools import cache
from typing import Any, NamedTuple

from sqlalchemy import and_, bindparam, exists, func, literal, not_, select
from sqlalchemy.engine import Connection

from memstate_sa.db.dialects import Database, database_of
from memstate_sa.db.json_params import as_array, unnest_strings
from memstate_sa.db.tables import cursor, index_state, outbox, parked, past, projection, refill, utcnow
from memstate_sa.log.outbox import ALL, in_slots, position_parameters, slot_array, slots, undelivered
from memstate_sa.log.positions import Position, Snapshot, meet
from memstate_sa.relay import ledger, marks, refills
from memstate_sa.relay.index_key import IndexKey, of_index
from memstate_sa.relay.marks import Past
from memstate_sa.relay.plan import ParkedState
from memstate_sa.relay.projections import HELD_BY_INDEX
from memstate_sa.relay.refills import SCAN
from memstate_sa.runtime.display import html_table, summary

_positions = select(cursor.c.snapshot, cursor.c.xid, cursor.c.position, cursor.c.slot).where(of_index(cursor))


def read_positions(connection: Connection, index: IndexKey) -> dict[Position, list[int]]:
    """The slots of *index* by position; empty if the index was never delivered to."""
    positions: dict[Position, list[int]] = {}
    for snapshot, xid, id_, slot in connection.execute(_positions, index.parameters()).all():
        positions.setdefault(Position.parse(snapshot, xid, id_), []).append(slot)
    return positions


# -- for a search -----------------------------------------------------------------------------------------------------


class EntityCoverage(NamedTuple):
    """How far an index covers one entity.

    - ``position``: the position of the index, or None if it was never delivered to.
    - ``filled``: all rows of the entity were delivered once.
    - ``has_refused_keys``: the index has refused keys of the entity.
    - ``newest_id``: the newest id of the outbox.
    - ``marked``: the points carry their entity.
    - ``past``: the past that the index should share.
    - ``projection``: the projection of the rows that the index holds.
    """

    position: Position | None
    filled: bool
    has_refused_keys: bool
    newest_id: int
    marked: bool
    past: Past | None = None
    projection: str | None = None


_unfilled = exists().where(
    of_index(refill), refill.c.entity.in_((literal(SCAN), bindparam("entity"))), not_(refill.c.done)
)
_known = exists().where(of_index(refill), refill.c.entity == bindparam("entity"))
_has_refused_keys = exists().where(of_index(parked), parked.c.entity == bindparam("entity"))
_newest = select(func.coalesce(func.max(outbox.c.id), 0)).scalar_subquery()
_marked = select(index_state.c.marked).where(of_index(index_state)).scalar_subquery()
_projection = (
    select(projection.c.projection)
    .where(of_index(projection), projection.c.entity == bindparam("entity"), projection.c.owner == HELD_BY_INDEX)
    .scalar_subquery()
)
# This returns one row, except shortly after slots have changed hands.
_coverage = (
    select(cursor.c.snapshot, cursor.c.xid, cursor.c.position, and_(_known, not_(_unfilled)), _has_refused_keys)
    .add_columns(_newest, _marked, _projection, *marks.columns)
    .select_from(
        cursor.outerjoin(past, and_(past.c.index == cursor.c.index, past.c.incarnation == cursor.c.incarnation))
    )
    .where(of_index(cursor))
    .distinct()
)
_refused = (
    select(parked.c.key).where(of_index(parked), parked.c.entity == bindparam("entity")).limit(bindparam("limit"))
)


def read_entity_coverage(connection: Connection, index: IndexKey, entity: str) -> EntityCoverage:
    rows = connection.execute(_coverage, {**index.parameters(), "entity": entity}).all()
    if not rows:
        return EntityCoverage(None, False, False, 0, False)
    filled, has_refused_keys, newest_id, marked, projected, *past_row = rows[0][3:]
    position = meet(Position.parse(*row[:3]) for row in rows)
    return EntityCoverage(position, filled, has_refused_keys, newest_id, marked, marks.as_past(past_row), projected)


def refused_keys(connection: Connection, index: IndexKey, entity: str, limit: int) -> Sequence[str]:
    """The parked and dead keys of *entity*, which *index* refused."""
    return connection.scalars(_refused, {**index.parameters(), "entity": entity, "limit": limit}).all()


# -- for people -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, repr=False)
class Backlog:
    """The undelivered changes of an index.

    - ``parked``: keys that were refused and wait for another attempt.
    - ``dead``: keys that were refused too often. They wait for their next change.
    - ``due``: keys that must be tried again now.
    - ``refilling``: the index is new, and all rows are being delivered to it.
    - ``replaced_by``: the index that searches ask instead, see `Memory.reindex`.
    - ``problem``: why the last delivery of a relay in this process failed, or why a key was refused.
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

    def __repr__(self) -> str:
        age = "" if self.oldest_s is None else f", the oldest for {self.oldest_s:.0f} s"
        flags = [name for name in ("refilling", "paused") if getattr(self, name)]
        if self.replaced_by is not None:
            flags.append(f"replaced by {self.replaced_by}")
        counts = f"{self.parked} parked, {self.due} due, {self.dead} dead"
        return summary(self, f"{self.pending} pending{age}", counts, ", ".join(flags), self.problem or "")

    def _repr_html_(self) -> str:
        return html_table("Backlog", ("", "value"), ((each.name, getattr(self, each.name)) for each in fields(self)))


@cache
def _pending(database: Database) -> Any:
    entities = outbox.c.entity.in_(select(unnest_strings("entities").c.value))
    columns = (outbox.c.entity, outbox.c.key, outbox.c.created_at)
    entries = undelivered(database, *columns, where=and_(entities, in_slots(database, outbox.c.slot))).c
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
    database, pending, oldest = database_of(connection), 0, None
    names = as_array(entities)
    positions = read_positions(connection, index) or {BEGINNING: list(slots(database))}
    for position, group in positions.items():
        parameters = {**position_parameters(position), "entities": names, "slots": slot_array(group), "limit": ALL}
        count, since = connection.execute(_pending(database), parameters).one()
        pending += count
        oldest = min(filter(None, (oldest, since)), default=None)
    rows = connection.execute(_by_state, {**index.parameters(), "entities": names}).all()
    counts = {state: count for state, count, _ in rows}
    refusals = {state: error for state, _, error in rows}
    return Backlog(
        pending=pending,
        oldest_s=None if oldest is None else max(0.0, (utcnow() - oldest).total_seconds()),
        parked=counts.get(ParkedState.PARKED, 0),
        due=len(ledger.due(connection, index, names, slots(database), 1000)),
        dead=counts.get(ParkedState.DEAD, 0),
        refilling=not refills.is_filled(connection, index, entities),
        paused=bool(connection.execute(_paused, index.parameters()).scalar()),
        problem=refusals.get(ParkedState.DEAD) or refusals.get(ParkedState.PARKED),
    )


BEGINNING = Position(Snapshot(0))


def is_delivered(connection: Connection, index: IndexKey, entities: Sequence[str], present: Position) -> bool:
    """Whether *index* has all changes up to *present*, except refused keys that are not due."""
    positions = read_positions(connection, index)
    return (
        bool(positions)
        and all(position.covers(present) for position in positions)
        and refills.is_filled(connection, index, entities)
        and not ledger.due(connection, index, as_array(entities), slots(database_of(connection)), 1)
    )
