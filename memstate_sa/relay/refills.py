"""Refills: the progress of delivering all rows of an entity, and of scanning the index itself."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from functools import cache
from typing import Any

from sqlalchemy import Select, Update, bindparam, not_, select, update
from sqlalchemy.engine import Connection

from memstate_sa.db.dialects import Database, database_of
from memstate_sa.db.json_params import as_array, as_json, unnest_strings
from memstate_sa.db.tables import cursor, index_state, ledger, refill
from memstate_sa.log.outbox import in_slots, slot_array, slots
from memstate_sa.relay.index_key import IndexKey, insert_rows, of_index
from memstate_sa.relay.requests import Refill

SCAN = ""
"""The entity of the refill rows for the scan of the index itself."""


def restart_scan(connection: Connection, index: IndexKey, taken: Collection[int]) -> None:
    """Scan the index again for *taken* slots whose refill was not finished.

    The last owner may have written points of rows that were deleted since, so that no refill lists them.
    """
    unfinished = select(refill.c.slot).where(of_index(refill), not_(refill.c.done), refill.c.slot.in_(taken))
    slots = set(connection.scalars(unfinished.distinct(), index.parameters())) if taken else set()
    if slots:
        restart = update(refill).where(of_index(refill), refill.c.entity == SCAN, refill.c.slot.in_(slots))
        connection.execute(restart.values(done=False, position=None), index.parameters())


def read_entities(connection: Connection, index: IndexKey) -> set[str]:
    """The entities that were delivered to the index, and `SCAN`."""
    return set(connection.scalars(select(refill.c.entity).where(of_index(refill)).distinct(), index.parameters()))


def require_refills(
    connection: Connection,
    index: IndexKey,
    delivered: Collection[str],
    entities: Collection[str],
    changed: Collection[str],
) -> bool:
    """Start the refill of *entities* that are new or *changed*. Return whether points carry their entity.

    Points carry it only after the index gets a second entity, because the field makes writing to Chroma a tenth slower.
    All points are then written again, but not embedded again.
    """
    database = database_of(connection)
    if changed:
        restart = update(refill).where(of_index(refill), refill.c.entity.in_(changed))
        connection.execute(restart.values(done=False, position=None), index.parameters())
    missing_names = [name for name in (SCAN, *entities) if name not in delivered]
    if missing_names:
        rows = as_json([[name, slot, None, False] for name in missing_names for slot in slots(database)])
        new = insert_rows(database, refill, ["entity", "slot", "position", "done"]).on_conflict_do_nothing()
        connection.execute(new, {**index.parameters(), "rows": rows})
        if delivered:  # earlier scans skipped the points of these entities, because they were unknown
            scan = update(refill).where(of_index(refill), refill.c.entity == SCAN).values(done=False, position=None)
            connection.execute(scan, index.parameters())
    is_marked = select(index_state.c.marked).where(of_index(index_state))
    marked: bool = connection.execute(is_marked, index.parameters()).scalar_one()
    several = len({SCAN, *delivered, *entities}) > 2
    if several and not marked:
        marking = update(index_state).where(of_index(index_state)).values(marked=True)
        refilling = update(refill).where(of_index(refill), refill.c.entity != SCAN).values(done=False, position=None)
        doubting = update(ledger).where(of_index(ledger), not_(ledger.c.deleted)).values(fingerprint=None)
        # New epochs: running writes without the entity cannot be recorded any more.
        revoking = update(cursor).where(of_index(cursor)).values(epoch=cursor.c.epoch + 1)
        for statement in (marking, refilling, doubting, revoking) if delivered else (marking,):
            connection.execute(statement, index.parameters())
    return marked or several


def next_refill(
    connection: Connection, index: IndexKey, slots: Collection[int], entities: Collection[str]
) -> Refill | None:
    """The next part of a refill: the scan of the index first, then one entity after another.

    Slots at the same position are refilled together, beginning with the slots that are furthest behind.
    """
    if not slots:
        return None
    parameters = {"entities": as_array([SCAN, *entities]), "slots": slot_array(slots)}
    rows = connection.execute(_unfinished(database_of(connection)), {**index.parameters(), **parameters}).all()
    if not rows:
        return None
    entity, position, _ = rows[0]
    return Refill(entity, position, frozenset(row[2] for row in rows if row[:2] == (entity, position)))


@cache
def _unfinished(database: Database) -> Select[Any]:
    return (
        select(refill.c.entity, refill.c.position, refill.c.slot)
        .where(of_index(refill), not_(refill.c.done), in_slots(database, refill.c.slot))
        .where(refill.c.entity.in_(select(unnest_strings("entities").c.value)))
        .order_by(refill.c.entity, refill.c.position.is_not(None), refill.c.position, refill.c.slot)
    )


def save_refill(connection: Connection, index: IndexKey, progress: Refill, own_slots: Collection[int]) -> None:
    slots = progress.slots & set(own_slots)
    if slots:
        new = {"new_position": progress.position, "new_done": progress.done, "the_entity": progress.entity}
        connection.execute(_saving(database_of(connection)), {**index.parameters(), **new, "slots": slot_array(slots)})


@cache
def _saving(database: Database) -> Update:
    return (
        update(refill)
        .where(of_index(refill), refill.c.entity == bindparam("the_entity"), in_slots(database, refill.c.slot))
        .values(position=bindparam("new_position"), done=bindparam("new_done"))
    )


def is_filled(connection: Connection, index: IndexKey, entities: Sequence[str]) -> bool:
    """Whether the refill of each of *entities*, and the scan of the index itself, are done."""
    statement = select(refill.c.entity, refill.c.done).where(of_index(refill)).distinct()
    rows = connection.execute(statement, index.parameters()).all()
    unfinished = {entity for entity, done in rows if not done}
    return {entity for entity, _ in rows}.difference(unfinished).issuperset((SCAN, *entities))
