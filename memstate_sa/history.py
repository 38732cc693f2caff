"""Reading the log, and undoing what it says: new entries that compensate, in the caller's transaction."""

from __future__ import annotations

import json
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from graphlib import CycleError, TopologicalSorter
from typing import Any

from sqlalchemy import Column, ColumnElement, Table, and_, delete, insert, inspect, select, update
from sqlalchemy.engine import Connection, Row
from sqlalchemy.exc import IntegrityError
from sqlalchemy.orm import Session
from sqlalchemy.schema import sort_tables

from memstate_sa.arrays import as_array, each
from memstate_sa.capture import Capture, Unit
from memstate_sa.changes import Change, Entry, Image, Step, invert, new_tx
from memstate_sa.codec import decode_image, decode_key
from memstate_sa.columns import TableColumns
from memstate_sa.errors import ConflictError, HistoryMissing, MemstateError, NotFound, require_count
from memstate_sa.facts import Tracked
from memstate_sa.outbox import take_write_lock
from memstate_sa.registry import Registry
from memstate_sa.tables import log, transaction

_PAGE = 200

_earlier = log.alias("earlier")
_before = (
    select(_earlier.c.image)
    .where(_earlier.c.entity == log.c.entity, _earlier.c.key == log.c.key, _earlier.c.id < log.c.id)
    .order_by(_earlier.c.id.desc())
    .limit(1)
    .scalar_subquery()
    .label("before")
)
_changes = (
    select(log, _before, transaction.c.actor, transaction.c.reason, transaction.c.session_id)
    .outerjoin(transaction, transaction.c.tx == log.c.tx)
    .order_by(log.c.id)
)


def read_changes(connection: Connection, registry: Registry, *criteria: ColumnElement[bool]) -> list[Change]:
    """The log entries that satisfy *criteria*, oldest first."""
    return [_change(row, registry, connection) for row in connection.execute(_changes.where(*criteria))]


def of_entity(
    connection: Connection, registry: Registry, tracked: Tracked, key: str | None, limit: int | None
) -> list[Change]:
    criteria = [log.c.entity == tracked.entity]
    if key is not None:
        criteria.append(log.c.key == key)
    if limit is not None:
        last = select(log.c.id).where(*criteria).order_by(log.c.id.desc()).limit(limit)
        criteria.append(log.c.id.in_(last))
    return read_changes(connection, registry, *criteria)


def _change(row: Row[Any], registry: Registry, connection: Connection) -> Change:
    tracked = registry.by_entity.get(row.entity)
    columns = None if tracked is None else tracked.on(connection.dialect)

    def values(image: dict[str, Any] | None) -> Image | None:
        if image is None:
            return None
        return decode_image(image) if columns is None else columns.values(image)

    key = decode_key(row.key) if columns is None else columns.identity(row.key)
    return Change(
        id=row.id,
        tx=row.tx,
        entity=row.entity,
        key=key[0] if len(key) == 1 else key,
        op=row.op,
        before=values(row.before),
        after=values(row.image),
        at=row.at,
        actor=row.actor,
        reason=row.reason,
        session_id=row.session_id,
        reverts=row.reverts,
    )


# -- which transactions ------------------------------------------------------------------------------------------------


def undone(connection: Connection, txs: Collection[str]) -> set[str]:
    """Those of *txs* that a rollback has undone, and no rollback of that rollback has redone."""
    if not txs:
        return set()
    keys = each("keys")
    pairs = connection.execute(
        select(log.c.reverts, log.c.tx).distinct().where(log.c.reverts.in_(select(keys.c.value))),
        {"keys": as_array(txs)},
    ).all()
    redone = undone(connection, {tx for _, tx in pairs})
    return {reverted for reverted, tx in pairs if tx not in redone}


def effective(connection: Connection, own: Collection[str], *scope: ColumnElement[bool]) -> Iterator[str]:
    """Transactions that can be undone, the last one first. Reads the log backwards, page by page."""
    seen = set(own)
    below: int | None = None
    while True:
        page = select(log.c.id, log.c.tx).where(log.c.step, *scope)
        if below is not None:
            page = page.where(log.c.id < below)
        rows = connection.execute(page.order_by(log.c.id.desc()).limit(_PAGE)).all()
        if not rows:
            return
        below = rows[-1].id
        fresh = [tx for tx in dict.fromkeys(row.tx for row in rows) if tx not in seen]
        seen.update(fresh)
        gone = undone(connection, fresh)
        yield from (tx for tx in fresh if tx not in gone)


def in_scope(session_id: str | None, actor: str | None) -> list[ColumnElement[bool]]:
    labels = [transaction.c.session_id == session_id] if session_id is not None else []
    labels += [transaction.c.actor == actor] if actor is not None else []
    return [log.c.tx.in_(select(transaction.c.tx).where(*labels))] if labels else []


# -- rollback ----------------------------------------------------------------------------------------------------------


class Rollback:
    """Undo for one Memory."""

    def __init__(self, registry: Registry, capture: Capture) -> None:
        self._registry = registry
        self._capture = capture

    def steps(self, session: Session, steps: int, session_id: str | None, actor: str | None) -> list[Change]:
        require_count("steps", steps, "how many transactions to undo, at least 1")
        unit, connection = self._prepare(session)
        if session_id is None and actor is None:
            session_id, actor = unit.session_id, unit.actor
        targets = []
        for tx in effective(connection, {unit.tx}, *in_scope(session_id, actor)):
            targets.append(tx)
            if len(targets) == steps:
                break
        return self._undo(session, connection, unit, targets)

    def transaction(self, session: Session, tx: str) -> list[Change]:
        unit, connection = self._prepare(session)
        if connection.execute(select(log.c.id).where(log.c.tx == tx).limit(1)).first() is None:
            raise NotFound(f"the log has no transaction {tx!r}")
        if tx == unit.tx:
            raise MemstateError("this transaction is still open; session.rollback() undoes it")
        if undone(connection, {tx}):
            raise ConflictError(f"transaction {tx} is already undone")
        return self._undo(session, connection, unit, [tx])

    def _prepare(self, session: Session) -> tuple[Unit, Connection]:
        session.flush()
        any_tracked = next(iter(self._registry.by_entity.values()))
        connection = session.connection(bind_arguments={"mapper": any_tracked.mapper})
        unit = self._capture.unit(session)
        with unit.writing():
            take_write_lock(connection)
        return unit, connection

    def _undo(self, session: Session, connection: Connection, unit: Unit, targets: Sequence[str]) -> list[Change]:
        if not targets:
            return []
        keys = each("keys")
        rows = connection.execute(
            select(log.c.id, log.c.tx, log.c.entity, log.c.key, _before, log.c.image).where(
                log.c.tx.in_(select(keys.c.value)), log.c.op != "baseline"
            ),
            {"keys": as_array(targets)},
        )
        order = {tx: position for position, tx in enumerate(targets)}
        steps = sorted((Step(*row) for row in rows), key=lambda step: (order[step.tx], -step.id))
        untracked = {step.entity for step in steps} - set(self._registry.by_entity)
        if untracked:
            raise HistoryMissing(f"{', '.join(sorted(untracked))}: no longer tracked, so it cannot be written back")
        self._check_conflicts(connection, steps, set(targets))
        entries, final = invert(steps)
        tx = new_tx()
        with connection.begin_nested(), unit.writing():
            with self._capture.undoing(connection, tx, final):
                now = self._apply(connection, final)
            self._capture.write(connection, unit, list(_with_last_images(entries, now)), tx=tx)
            labels = unit.labels
            self._capture.write_header(connection, tx, {**labels, "reason": labels["reason"] or "rollback"})
        self._expire(session, final)
        return read_changes(connection, self._registry, log.c.tx == tx)

    def _check_conflicts(self, connection: Connection, steps: Sequence[Step], targets: set[str]) -> None:
        """Refuse when a fact was changed later by a transaction that stays. Nothing has been written yet."""
        first: dict[tuple[str, str], int] = {}
        for step in steps:
            fact = (step.entity, step.key)
            first[fact] = min(step.id, first.get(fact, step.id))
        later: dict[int, str] = {}
        keys = each("keys")
        for entity in {entity for entity, _ in first}:
            group = [key for other, key in first if other == entity]
            rows = connection.execute(
                select(log.c.id, log.c.key, log.c.tx, log.c.reverts).where(
                    log.c.entity == entity,
                    log.c.key.in_(select(keys.c.value)),
                    log.c.id > min(first[entity, key] for key in group),
                    log.c.op != "baseline",
                ),
                {"keys": as_array(group)},
            )
            since = [row for row in rows if row.id > first[entity, row.key] and row.tx not in targets]
            # An undo of what came later too leaves nothing behind; an undo of something older is a change like any.
            undone_since = {(row.key, row.tx) for row in since} | {(key, tx) for key in group for tx in targets}
            later.update({row.id: row.tx for row in since if (row.key, row.reverts) not in undone_since})
        staying = set(later.values()) - undone(connection, set(later.values()))
        blocking = [id_ for id_, tx in later.items() if tx in staying]
        if blocking:
            changes = read_changes(connection, self._registry, log.c.id.in_(blocking[:100]))
            what = "; ".join(f"{c.entity} {c.key!r} ({c.op} by {c.actor or 'unknown'} in {c.tx})" for c in changes[:5])
            raise ConflictError(f"changed later, outside of what is to be undone: {what}", changes=changes)

    # -- writing rows back -------------------------------------------------------------------------------------------

    def _apply(
        self, connection: Connection, final: Mapping[tuple[str, str], Image | None]
    ) -> dict[tuple[str, str], Image | None]:
        """Write the rows that *final* demands; returns them as the database has them."""
        wanted = self._by_table(connection, final)
        tables = sort_tables(wanted)
        there = {table: self._read(connection, table, wanted[table]) for table in tables}

        def bring_back() -> None:
            for table in tables:
                gone = {k: image for k, image in wanted[table].items() if image is not None and k not in there[table]}
                for key in _parents_first(table, gone):
                    self._insert(connection, table, gone[key])

        def restore() -> None:
            for table in tables:
                for key, image in wanted[table].items():
                    if image is not None and key in there[table]:
                        self._update(connection, table, key, image, there[table][key])

        def remove() -> None:
            for table in reversed(tables):
                rows = {k: there[table][k] for k, image in wanted[table].items() if image is None and k in there[table]}
                for key in reversed(_parents_first(table, rows)):
                    connection.execute(delete(table).where(self._is(connection, table, key)))

        # Foreign keys want new rows first; a unique value that moves on wants old rows gone first.
        _first_that_holds(connection, (bring_back, restore, remove), (remove, restore, bring_back))
        return self._present(connection, final)

    def _by_table(
        self, connection: Connection, final: Mapping[tuple[str, str], Image | None]
    ) -> dict[Table, dict[str, Image | None]]:
        wanted: dict[Table, dict[str, Image | None]] = {}
        for (entity, key), image in final.items():
            for table, part in self._registry.by_entity[entity].on(connection.dialect).parts(image).items():
                wanted.setdefault(table, {})[key] = part
        return wanted

    def _present(self, connection: Connection, facts: Iterable[tuple[str, str]]) -> dict[tuple[str, str], Image | None]:
        present: dict[tuple[str, str], Image | None] = dict.fromkeys(facts)
        keys: dict[str, list[tuple[Any, ...]]] = {}
        for entity, key in present:
            keys.setdefault(entity, []).append(decode_key(key))
        for entity, raw in keys.items():
            images = self._registry.by_entity[entity].on(connection.dialect).read(connection, raw)
            present.update({(entity, key): image for key, image in images.items()})
        return present

    def _read(self, connection: Connection, table: Table, keys: Iterable[str]) -> dict[str, dict[str, Any]]:
        return self._columns(connection, table).read(connection, [decode_key(key) for key in keys], for_update=True)

    def _columns(self, connection: Connection, table: Table) -> TableColumns:
        return self._registry.by_table[table].on(connection.dialect).of_table[table]

    def _is(self, connection: Connection, table: Table, key: str) -> ColumnElement[bool]:
        columns = self._columns(connection, table)
        return and_(
            *(
                column == columns.raw_bind(column, value)
                for column, value in zip(table.primary_key.columns, decode_key(key), strict=True)
            )
        )

    def _values(self, connection: Connection, table: Table, image: Mapping[str, Any]) -> dict[str, Any]:
        """What of *image* can be written: columns that are still there and that the database does not compute."""
        columns = self._columns(connection, table)
        writable = {name: column for name, column in columns.by_name.items() if column.computed is None}
        return {
            writable[name].key: columns.raw_bind(writable[name], value)
            for name, value in decode_image(image).items()
            if name in writable
        }

    def _insert(self, connection: Connection, table: Table, image: Image) -> None:
        values = self._values(connection, table, image)
        always = [column.name for column in _generated_always(connection, table)]
        if always:
            raise ConflictError(f"{table.name}.{always[0]} is GENERATED ALWAYS: a deleted row cannot be brought back")
        connection.execute(insert(table).values(values))

    def _update(self, connection: Connection, table: Table, key: str, image: Image, current: Image) -> None:
        values = self._values(connection, table, image)
        for column in (*table.primary_key.columns, *_generated_always(connection, table)):
            values.pop(column.key, None)
        version = self._registry.by_table[table].mapper.version_id_col
        if version is not None and version.table is table and version.key in values:
            newest = decode_image(current).get(version.name)
            # A stale copy somewhere must still notice that the row moved on.
            values.pop(version.key)
            if isinstance(newest, int):
                values[version.key] = newest + 1
        # A column added since keeps its value; onupdate would overwrite what is being restored.
        for column in table.columns:
            if column.onupdate is not None and column.key not in values and not column.primary_key:
                values[column.key] = column
        if values:
            connection.execute(update(table).where(self._is(connection, table, key)).values(values))

    def _expire(self, session: Session, facts: Collection[tuple[str, str]]) -> None:
        """Loaded copies of what was written are read anew."""
        if not facts:
            return
        keys: dict[Tracked, set[tuple[Any, ...]]] = {}
        for entity, key in facts:
            tracked = self._registry.by_entity[entity]
            keys.setdefault(tracked, set()).add(decode_key(key))
        dialect = session.connection(bind_arguments={"mapper": next(iter(keys)).mapper}).dialect
        for instance in list(session.identity_map.values()):
            state: Any = inspect(instance)
            found = self._registry.find(state.mapper)
            if found in keys and found.on(dialect).raw_key(state.key[1]) in keys[found]:
                session.expire(instance)


def _generated_always(connection: Connection, table: Table) -> list[Column[Any]]:
    """Columns that only PostgreSQL may write; SQLite has no such thing, and ignores that they were declared so."""
    if connection.dialect.name != "postgresql":
        return []
    return [column for column in table.columns if column.identity is not None and column.identity.always]


def _first_that_holds(connection: Connection, *orders: Sequence[Callable[[], None]]) -> None:
    """Act in the first of these orders that no constraint refuses."""
    for order in orders:
        try:
            with connection.begin_nested():
                for act in order:
                    act()
        except IntegrityError as error:
            refused = error
        else:
            return
    raise ConflictError("the rows that are there now stand in the way of undoing this") from refused


def _with_last_images(entries: Sequence[Entry], now: Mapping[tuple[str, str], Image | None]) -> Iterator[Entry]:
    """*entries*, the last one of each key showing the row as it is: version counters and generated columns moved."""
    last = {(entry.entity, entry.key): position for position, entry in enumerate(entries)}
    for position, entry in enumerate(entries):
        fact = (entry.entity, entry.key)
        yield entry._replace(image=now[fact]) if last[fact] == position else entry


def _parents_first(table: Table, images: Mapping[str, Image]) -> list[str]:
    """Keys ordered so that a row comes after the row of the same table that it refers to."""
    references = [
        (
            [element.parent.name for element in constraint.elements],
            [element.column.name for element in constraint.elements],
        )
        for constraint in table.foreign_key_constraints
        if constraint.referred_table is table
    ]
    if not references:
        return list(images)
    sorter: TopologicalSorter[str] = TopologicalSorter(dict.fromkeys(images, ()))
    for local, remote in references:
        owners = {tuple(_encoded(image, remote)): key for key, image in images.items()}
        for key, image in images.items():
            parent = owners.get(tuple(_encoded(image, local)))
            if parent is not None and parent != key:
                sorter.add(key, parent)
    try:
        return list(sorter.static_order())
    except CycleError as error:
        raise ConflictError(f"rows of {table.name} refer to each other in a circle") from error


def _encoded(image: Image, names: Iterable[str]) -> list[str]:
    return [json.dumps(image.get(name)) for name in names]
