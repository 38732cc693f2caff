"""The ledger (the last delivery of each key to each index) and parked keys. The owner of a slot records its keys."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from functools import cache
from typing import Any
from uuid import uuid4

from sqlalchemy import BindParameter, and_, bindparam, delete, or_, select
from sqlalchemy.engine import Connection

from memstate_sa.db.codec import FactKey, by_entity
from memstate_sa.db.dialects import Database, database_of
from memstate_sa.db.json_params import as_array, as_json, unnest_strings
from memstate_sa.db.leases import database_now
from memstate_sa.db.statements import batches, take_write_lock
from memstate_sa.db.tables import ledger, parked, utcnow
from memstate_sa.log.outbox import slot_array, slots
from memstate_sa.log.positions import slot_of
from memstate_sa.relay import claims, refills
from memstate_sa.relay.index_key import IndexKey, insert_rows, of_index
from memstate_sa.relay.plan import Delivered, Parked, ParkedRow, ParkedState, merge
from memstate_sa.relay.requests import Acknowledge, ParkedKey

# Statements are built once. Building one takes longer than running it, and blocks the application's threads.
_keys, _versions = unnest_strings("keys"), unnest_strings("versions")
_entity: BindParameter[str] = bindparam("entity")
# Use IN instead of a join. For a join, SQLite would read the whole ledger for each key.
_delivered = select(ledger.c.key, ledger.c.fingerprint, ledger.c.text_fingerprint, ledger.c.deleted).where(
    of_index(ledger), ledger.c.entity == _entity, ledger.c.key.in_(select(_keys.c.value))
)
_unpark = delete(parked).where(
    of_index(parked),
    parked.c.entity == bindparam("the_entity"),
    parked.c.key.in_(select(_keys.c.value)),
    parked.c.mark.in_(select(_versions.c.value)),
)


@cache
def _parked(database: Database) -> Any:
    """Select the parked rows of keys, except keys that must only be delivered again at a later time."""
    is_relevant = or_(parked.c.state != ParkedState.AGAIN, parked.c.next_at <= database.clock())
    of_keys = and_(of_index(parked), parked.c.entity == _entity, parked.c.key.in_(select(_keys.c.value)))
    return select(parked.c.key, parked.c.attempts, parked.c.mark, parked.c.repeat).where(of_keys, is_relevant)


def _of_facts(connection: Connection, statement: Any, index: IndexKey, facts: Collection[FactKey]) -> Any:
    for entity, keys in by_entity(facts).items():
        parameters = {**index.parameters(), "entity": entity, "keys": as_array(keys), "now": utcnow()}
        for row in connection.execute(statement, parameters).all():
            yield (entity, row[0]), row[1:]


def read_ledger(connection: Connection, index: IndexKey, facts: Collection[FactKey]) -> dict[FactKey, Delivered]:
    return {fact: Delivered(*row) for fact, row in _of_facts(connection, _delivered, index, facts)}


def read_parked(connection: Connection, index: IndexKey, facts: Collection[FactKey]) -> dict[FactKey, ParkedKey]:
    return {
        fact: ParkedKey(*row) for fact, row in _of_facts(connection, _parked(database_of(connection)), index, facts)
    }


@cache
def _due(database: Database) -> Any:
    due = select(parked.c.entity, parked.c.key).where(claims.due_parking(database))
    return due.order_by(parked.c.next_at).limit(bindparam("limit"))


def due(connection: Connection, index: IndexKey, entities: str, slots: Iterable[int], limit: int) -> Sequence[FactKey]:
    """The parked keys of *slots* and *entities* (an array parameter) that are due, the longest due first."""
    parameters = {"entities": entities, "slots": slot_array(slots), "now": utcnow(), "limit": limit}
    rows = connection.execute(_due(database_of(connection)), {**index.parameters(), **parameters}).all()
    return [(entity, key) for entity, key in rows]


def acknowledge(connection: Connection, index: IndexKey, owner: str, record: Acknowledge) -> frozenset[int]:
    """Record a page for the slots that *owner* still has. Return the lost slots."""
    own_slots = claims.still_held(connection, index, owner, record.epochs)
    slot_count = len(slots(database_of(connection)))

    def is_ours(fact: FactKey) -> bool:
        return slot_of(*fact) % slot_count in own_slots

    statement = _record(database_of(connection))
    common = {**index.parameters(), "at": utcnow()}
    written = [
        (*fact, record.epochs[slot], *delivered)
        for fact, delivered in record.written.items()
        if (slot := slot_of(*fact) % slot_count) in own_slots
    ]
    for rows in batches(written, _ROWS):
        connection.execute(statement, {**common, "rows": as_json(rows)})
    _resolve(connection, index, {fact: version for fact, version in record.resolved.items() if is_ours(fact)})
    park_all(connection, index, {fact: parking for fact, parking in record.parking.items() if is_ours(fact)})
    if record.foreign:
        # These keys (deleted keys too) belong to another Memory that shares this index. They wait for its relay.
        index_entities = refills.read_entities(connection, index)
        waiting = Parked(0, 0.0, ParkedState.AGAIN, "passed by")
        park_all(connection, index, {fact: waiting for fact in record.foreign if fact[0] in index_entities})
    claims.save_positions(
        connection, index, {slot: position for slot, position in record.positions.items() if slot in own_slots}
    )
    if record.refill is not None:
        refills.save_refill(connection, index, record.refill, own_slots)
    return frozenset(record.epochs.keys() - own_slots)


_ROWS = 10_000
"""The number of ledger rows in one statement. They take a few MB at most."""

_RECORDED = ("entity", "key", "epoch", "fingerprint", "text_fingerprint", "deleted")


@cache
def _record(database: Database) -> Any:
    """The statement that records deliveries. It skips keys that a later owner has delivered since."""
    statement = insert_rows(database, ledger, _RECORDED, bindparam("at", type_=ledger.c.at.type))
    return statement.on_conflict_do_update(
        index_elements=list(ledger.primary_key.columns),
        set_={name: statement.excluded[name] for name in ("at", *_RECORDED[2:])},
        where=ledger.c.epoch <= statement.excluded.epoch,
    )


def _resolve(connection: Connection, index: IndexKey, resolved: Mapping[FactKey, str]) -> None:
    for entity, keys in by_entity(resolved).items():
        versions = {resolved[entity, key] for key in keys}
        parameters = {"the_entity": entity, "keys": as_array(keys), "versions": as_array(versions)}
        connection.execute(_unpark, {**index.parameters(), **parameters})


def redirty(connection: Connection, index: IndexKey, facts: Mapping[FactKey, Parked]) -> None:
    """Park *facts*, so that they are delivered again even if the ledger has their present fingerprint."""
    take_write_lock(connection)
    park_all(connection, index, facts)


_columns = {name: parked.c[name] for name in ("attempts", "next_at", "state", "error", "mark", "repeat")}
_locked = (
    select(parked.c.key, *_columns.values())
    .where(of_index(parked), parked.c.entity == _entity, parked.c.key.in_(select(_keys.c.value)))
    .order_by(parked.c.key)
    .with_for_update()
)


@cache
def _park(database: Database) -> tuple[Any, Any]:
    """The statements for keys whose rows are locked, and for keys without a row. The second one returns its keys."""
    statement = database.upsert(parked)
    new_values = {name: statement.excluded[name] for name in _columns}
    replacing = statement.on_conflict_do_update(index_elements=list(parked.primary_key.columns), set_=new_values)
    return replacing, statement.on_conflict_do_nothing().returning(parked.c.entity, parked.c.key)


def park_all(connection: Connection, index: IndexKey, parking: Mapping[FactKey, Parked]) -> None:
    """Park keys, and merge them with the rows of keys that are parked already (`merge`).

    Other relays may park the same keys at the same time.
    """
    replace, insert = _park(database_of(connection))
    version = uuid4().hex
    facts: Collection[FactKey] = sorted(parking)  # the order prevents deadlocks of relays that lock the same keys
    while facts:
        old_rows = {fact: ParkedRow(*row) for fact, row in _of_facts(connection, _locked, index, facts)}
        now = database_now(connection)
        merged = {fact: merge(old_rows.get(fact), parking[fact], now, version) for fact in facts}
        values = {fact: _values(index, fact, row) for fact, row in merged.items() if row is not None}
        if replaced := [row for fact, row in values.items() if fact in old_rows]:
            connection.execute(replace, replaced)
        new = {fact: row for fact, row in values.items() if fact not in old_rows}
        inserted = connection.execute(insert, list(new.values())).all() if new else ()
        facts = sorted(new.keys() - {(entity, key) for entity, key in inserted})  # another relay has just parked these


def _values(index: IndexKey, fact: FactKey, row: ParkedRow) -> dict[str, Any]:
    entity, key = fact
    columns = dict(zip(_columns, row, strict=True))
    return {**index.values(), "entity": entity, "key": key, "slot": slot_of(entity, key), **columns}
