"""Erase a fact: delete its row and redact all its images in our tables.

The log still shows that the fact existed, and when it changed and was erased.
"""

from __future__ import annotations

import time
from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Any

from sqlalchemy import ForeignKeyConstraint, Table, delete, false, inspect, null, select, update
from sqlalchemy.engine import Connection, Engine
from sqlalchemy.exc import DataError, IntegrityError
from sqlalchemy.orm import Session

from memstate_sa.capture.append_only import rewriting
from memstate_sa.capture.listeners import SessionCapture
from memstate_sa.capture.recorder import Recorder
from memstate_sa.capture.transaction import OpenTransaction
from memstate_sa.db.codec import Image, decode_key
from memstate_sa.db.dialects import database_of
from memstate_sa.db.rows import columns_of, values_of
from memstate_sa.db.sessions import writing_connection
from memstate_sa.db.sqlite import is_in_memory
from memstate_sa.db.statements import batches, take_write_lock
from memstate_sa.db.tables import embedding, index_state, ledger, log, outbox, parked, unique
from memstate_sa.embedding import cache
from memstate_sa.embedding.batches import Destination
from memstate_sa.errors import ConflictError, NotFound
from memstate_sa.log.absent_keys import KeyInserted, keys_others_can_insert, lock_absent_keys, require_absent
from memstate_sa.log.changes import REDACTED, LogEntry, new_tx
from memstate_sa.log.history import loaded_image, stored_key
from memstate_sa.tracking import committed
from memstate_sa.tracking.registry import Registry
from memstate_sa.tracking.tracked import Tracked

ERASED = "erased"
_ATTEMPTS = 3
"""The number of attempts if other transactions insert the row again. Each attempt also erases the new row."""


class Eraser:
    """Erasure for one Memory."""

    def __init__(
        self,
        registry: Registry,
        capture: SessionCapture,
        recorder: Recorder,
        destinations: Mapping[str, Destination],
    ) -> None:
        self._registry = registry
        self._capture = capture
        self._recorder = recorder
        self._destinations = destinations

    # -- in the caller's transaction -----------------------------------------------------------------------------------

    def erase(self, session: Session, tracked: Tracked, key: Any, reason: str | None) -> int:
        """Erase a fact and return the number of redacted log entries."""
        session.flush()
        connection = writing_connection(session, tracked.mapper)
        transaction = self._capture.transaction(session)
        with transaction.writing():
            take_write_lock(connection)
            fact = stored_key(connection, tracked, key)
            for attempts_left in reversed(range(_ATTEMPTS)):
                before = transaction.log_state
                try:
                    with connection.begin_nested():
                        redacted = self._erase(connection, transaction, tracked, fact, reason)
                    break
                except KeyInserted:
                    transaction.back_to(before)
                    if not attempts_left:
                        raise
        self._mark_instances_deleted(session, connection, tracked, fact)
        return redacted

    def _erase(
        self, connection: Connection, transaction: OpenTransaction, tracked: Tracked, fact: str, reason: str | None
    ) -> int:
        tx = new_tx()
        row = _row(connection, tracked, fact)
        vacant = [] if row else keys_others_can_insert(connection, tracked, [fact], transaction.logged_under)
        if vacant:
            lock_absent_keys(connection, [(tracked.entity, fact)])
            row = _row(connection, tracked, fact)  # a transaction that had the key locked may have inserted the row
        of_fact = (log.c.entity == tracked.entity, log.c.key == fact)
        if not row and connection.execute(select(log.c.id).where(*of_fact).limit(1)).first() is None:
            identity = tracked.columns_for(connection.dialect).identity(fact)
            key = identity[0] if len(identity) == 1 else identity
            raise NotFound(
                f"Cannot erase {key!r}: neither {tracked.table.fullname} nor its history has a row with this key."
            )
        if row:
            _require_unreferred(connection, self._registry, tracked, fact)
            with self._capture.undoing(connection, tx, [(tracked.entity, fact)]):
                _delete(connection, tracked, fact)
        # An erasure is not a step, because it cannot be undone.
        self._recorder.write(
            connection, transaction, [LogEntry(tracked.entity, fact, "delete", None, step=False)], tx=tx
        )
        self._recorder.write_header(
            connection, tx, {**transaction.labels, "reason": reason or transaction.reason or ERASED}
        )
        if not row:
            require_absent(connection, tracked, vacant)
        # Redact only now, after the wait for locks, because other transactions may have logged more entries until now.
        older = (*of_fact, log.c.tx != tx)
        entries = connection.execute(select(log.c.image, log.c.version).where(*older)).all()
        images = [(image, tracked.version) for image in row.values()]
        images += [(image, version) for image, version in entries if image is not None]
        with rewriting(connection):
            connection.execute(update(log).where(*older).values(image=null(), version=REDACTED, step=false()))
        connection.execute(delete(unique).where(unique.c.entity == tracked.entity, unique.c.key == fact))
        parked_rows = (parked.c.entity == tracked.entity, parked.c.key == fact)
        connection.execute(update(parked).where(*parked_rows, parked.c.error.is_not(None)).values(error=ERASED))
        embedders = {destination.vectors.embedder.fingerprint for destination in self._destinations.values()}
        embedders.update(connection.scalars(select(index_state.c.embedder).distinct()))
        cache.forget(connection, set(_texts(connection, tracked, fact, images, embedders)))
        return len(entries)

    def _mark_instances_deleted(self, session: Session, connection: Connection, tracked: Tracked, key: str) -> None:
        """Make instances of the fact "deleted", like the ORM after a flush. A rollback makes them persistent again."""
        columns, erased = tracked.columns_for(connection.dialect), _normalized(decode_key(key))
        for instance in list(session.identity_map.values()):
            state: Any = inspect(instance)
            if self._registry.find(state.mapper) is tracked and _normalized(columns.raw_key(state.key[1])) == erased:
                session.expire(instance)
                session._remove_newly_deleted([state])  # noqa: SLF001  # expunge() cascades, and no rollback undoes it

    # -- afterwards ----------------------------------------------------------------------------------------------------

    def overwrite(self, engine: Engine, timeout: float) -> None:
        """Rewrite the database's files without the deleted rows."""
        with engine.begin() as connection:
            take_write_lock(connection)
            # A delivery that ran during the erasure may have cached a vector again: delete vectors that no index holds.
            used = select(ledger.c.text_fingerprint).where(ledger.c.text_fingerprint.is_not(None))
            connection.execute(delete(embedding).where(embedding.c.text_fingerprint.not_in(used)))
        if not is_in_memory(engine):
            database_of(engine).vacuum(engine, self._tables(engine), time.monotonic() + timeout)

    def _tables(self, engine: Engine) -> list[Table]:
        """The tables that erasures have deleted rows from."""
        with engine.connect() as connection:
            erased = set(connection.scalars(select(log.c.entity).where(log.c.version == REDACTED).distinct()))
        tracked = [self._registry.by_entity[entity] for entity in sorted(erased) if entity in self._registry.by_entity]
        return [log, ledger, outbox, parked, unique, embedding, *(table for one in tracked for table in one.tables)]


def _row(connection: Connection, tracked: Tracked, key: str) -> dict[str, dict[str, Any]]:
    """Lock the fact's row, and return its image by its key in the log; empty if the row does not exist."""
    try:
        images = tracked.columns_for(connection.dialect).find_rows(connection, [key], for_update=True)
        if tracked.criterion is not None:  # the table also has rows of other classes
            own_keys = committed.read(connection, tracked, list(images))
            return {key: image for key, image in images.items() if key in own_keys}
        return images
    except DataError as error:
        raise NotFound(f"Cannot erase {key}: it cannot be a key of {tracked.table.fullname}.") from error


def _require_unreferred(connection: Connection, registry: Registry, tracked: Tracked, key: str) -> None:
    """Raise ConflictError if a row without our triggers refers to the fact, or to a row that is deleted with it.

    The database would delete such a row too, or set its foreign key to NULL, and the log would not have the change.
    """
    deleted_keys = {table: {key} for table in tracked.tables}
    queue = list(deleted_keys.items())
    referring = [fk for other in registry.by_table for fk in other.foreign_key_constraints]
    for table, keys in queue:
        for fk in (fk for fk in referring if fk.referred_table is table):
            owner = registry.by_table[fk.table]
            referring_keys = _referring(connection, registry, fk, list(keys)) - deleted_keys.get(fk.table, set())
            if referring_keys and not owner.by_trigger:
                raise ConflictError(_REFERRED.format(tracked.entity, key, f" ({owner.entity} {min(referring_keys)})"))
            if referring_keys and (fk.ondelete or "").upper() == "CASCADE":
                deleted_keys.setdefault(fk.table, set()).update(referring_keys)
                queue.append((fk.table, referring_keys))


def _referring(connection: Connection, registry: Registry, fk: ForeignKeyConstraint, keys: Sequence[str]) -> set[str]:
    """Lock the rows of *keys*, and return the keys of the rows that refer to them.

    Because of the locks, other transactions can add no such row until this transaction ends.
    """
    tables = (fk.referred_table, fk.table)
    referred, other = (registry.by_table[table].columns_for(connection.dialect).of_table[table] for table in tables)
    local, remote = columns_of(fk)
    values = []
    for batch in batches([decode_key(key) for key in keys]):
        referred.lock(connection, batch, leaving=True)
        images = referred.read(connection, batch).values()
        values += [value for image in images if (value := values_of(image, remote)) is not None]
    return {key for key, _ in other.find(connection, local, values)}


def _delete(connection: Connection, tracked: Tracked, key: str) -> None:
    columns = tracked.columns_for(connection.dialect).of_table
    try:
        for table in reversed(tracked.tables):
            statement = delete(table).where(columns[table].key_in)
            connection.execute(statement, columns[table].key_parameters([decode_key(key)]))
    except IntegrityError as error:
        raise ConflictError(_REFERRED.format(tracked.entity, key, "")) from error


_REFERRED = "Cannot erase {} {}: other rows refer to it{}. Delete or erase these rows first."


def _texts(
    connection: Connection,
    tracked: Tracked,
    key: str,
    images: Sequence[tuple[Image, int]],
    embedders: Collection[str],
) -> Iterator[str]:
    """The fact's text fingerprints, if they can still be computed. `Eraser.overwrite` deletes the vectors of others."""
    for image, version in images:
        for assumed_version in {version, tracked.version}:  # try with and without upgrades
            try:
                row = _projectable(tracked, loaded_image(connection, tracked, image, assumed_version) or {})
                fingerprints = [tracked.project(key, row, embedder).text_fingerprint for embedder in embedders]
            except Exception:  # noqa: BLE001, S112  # the application's functions may not know rows of older versions
                continue
            yield from filter(None, fingerprints)


def _projectable(tracked: Tracked, values: Image) -> list[Any]:
    """Column *values* in the form that `Tracked.project` takes."""
    attributes: dict[str, Any] = {}
    for name, value in values.items():
        attribute = tracked.attributes.get(name, name)
        if attributes.get(attribute) is None:  # several subclasses may have a column of this name
            attributes[attribute] = value
    return [attributes.get(name) for name in tracked.projected_attributes]


def _normalized(key: Sequence[Any]) -> tuple[Any, ...]:
    """The key without trailing blanks, because a CHAR column pads its values."""
    return tuple(value.rstrip() if isinstance(value, str) else value for value in key)
