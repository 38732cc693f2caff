"""Refills: progress of delivering the rows of an entity in full, and of scanning the index itself."""

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
"""The refill rows that stand for the scan of the index itself."""


def restart_scan(connection: Connection, index: IndexKey, taken: Collection[int]) -> None:
    """Scan the index again for *taken* slots that were being filled.

    Their last owner may have written points whose rows are no longer listed.
    """
    undone = select(refill.c.slot).where(of_index(refill), not_(refill.c.done), refill.c.slot.in_(taken))
    slots = set(connection.scalars(undone.distinct(), index.parameters())) if taken else set()
    if slots:
        again = update(refill).where(of_index(refill), refill.c.entity == SCAN, refill.c.slot.in_(slots))
        connection.execute(again.values(done=False, position=None), index.parameters())


def read_entities(connection: Connection, index: IndexKey) -> set[str]:
    """The entities that the index has been delivered, and `SCAN`."""
    return set(connection.scalars(select(refill.c.entity).where(of_index(refill)).distinct(), index.parameters()))


def require_refills(
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
    database = database_of(connection)
    if changed:
        restart = update(refill).where(of_index(refill), refill.c.entity.in_(changed))
        connection.execute(restart.values(done=False, position=None), index.parameters())
    missing_names = [name for name in (SCAN, *entities) if name not in delivered]
    if missing_names:
        rows = as_json([[name, slot, None, False] for name in missing_names for slot in slots(database)])
        new = insert_rows(database, refill, ["entity", "slot", "position", "done"]).on_conflict_do_nothing()
        connection.execute(new, {**index.parameters(), "rows": rows})
        if delivered:  # the scan passed by the points of an entity that was unknown
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
        for statement in (marking, refilling, doubting, revoking) if delivered else (marking,):
            connection.execute(statement, index.parameters())
    return marked or several


def next_refill(
    connection: Connection, index: IndexKey, slots: Collection[int], entities: Collection[str]
) -> Refill | None:
    """The next part of a refill: the index's own scan first, then entity by entity.

    Slots at the same row go together. The slots that are furthest behind go first.
    """
    if not slots:
        return None
    parameters = {"entities": as_array([SCAN, *entities]), "slots": slot_array(slots)}
    rows = connection.execute(_undone(database_of(connection)), {**index.parameters(), **parameters}).all()
    if not rows:
        return None
    entity, position, _ = rows[0]
    return Refill(entity, position, frozenset(row[2] for row in rows if row[:2] == (entity, position)))


@cache
def _undone(database: Database) -> Select[Any]:
    return (
        select(refill.c.entity, refill.c.position, refill.c.slot)
        .where(of_index(refill), not_(refill.c.done), in_slots(database, refill.c.slot))
        .where(refill.c.entity.in_(select(unnest_strings("entities").c.value)))
        .order_by(refill.c.entity, refill.c.position.is_not(None), refill.c.position, refill.c.slot)
    )


def save_refill(connection: Connection, index: IndexKey, progress: Refill, held_slots: Collection[int]) -> None:
    slots = progress.slots & set(held_slots)
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
    undone = {entity for entity, done in rows if not done}
    return {entity for entity, _ in rows}.difference(undone).issuperset((SCAN, *entities))
