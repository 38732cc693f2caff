"""Forgetting a fact for good: what it was, wherever our tables say it. That it was, and when it went, stays."""

from __future__ import annotations

import time
from collections.abc import Collection, Iterator, Sequence
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
from memstate_sa.embedders import Embedder
from memstate_sa.embedding import cache
from memstate_sa.errors import ConflictError, NotFound
from memstate_sa.log.absent_keys import KeyInserted, keys_others_can_insert, lock_absent_keys, require_absent
from memstate_sa.log.changes import REDACTED, LogEntry, new_tx
from memstate_sa.log.history import loaded_image, stored_key
from memstate_sa.tracking import committed
from memstate_sa.tracking.registry import Registry
from memstate_sa.tracking.tracked import Tracked

ERASED = "erased"
_ATTEMPTS = 3
"""At a fact whose row comes again while we look: then that row is erased as well."""


class Eraser:
    """Erasure for one Memory."""

    def __init__(
        self, registry: Registry, capture: SessionCapture, recorder: Recorder, embedders: Collection[Embedder]
    ) -> None:
        self._registry = registry
        self._capture = capture
        self._recorder = recorder
        self._embedders = embedders

    # -- in the caller's transaction -----------------------------------------------------------------------------------

    def erase(self, session: Session, tracked: Tracked, key: Any, reason: str | None) -> int:
        """Returns how many entries of the log are redacted."""
        session.flush()
        connection = writing_connection(session, tracked.mapper)
        transaction = self._capture.transaction(session)
        with transaction.writing():
            take_write_lock(connection)
            fact = stored_key(connection, tracked, key)
            for attempts_left in reversed(range(_ATTEMPTS)):
                before = transaction.mark
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
            row = _row(connection, tracked, fact)  # whoever held the key may have added it
        mine = (log.c.entity == tracked.entity, log.c.key == fact)
        if not row and connection.execute(select(log.c.id).where(*mine).limit(1)).first() is None:
            identity = tracked.columns_for(connection.dialect).identity(fact)
            key = identity[0] if len(identity) == 1 else identity
            raise NotFound(f"neither {tracked.table.fullname} nor its history has a row with the key {key!r}")
        if row:
            _require_unreferred(connection, self._registry, tracked, fact)
            with self._capture.undoing(connection, tx, [(tracked.entity, fact)]):
                _delete(connection, tracked, fact)
        # Nothing is left to undo: it is no step.
        self._recorder.write(
            connection, transaction, [LogEntry(tracked.entity, fact, "delete", None, step=False)], tx=tx
        )
        self._recorder.write_header(
            connection, tx, {**transaction.labels, "reason": reason or transaction.reason or ERASED}
        )
        if not row:
            require_absent(connection, tracked, vacant)
        # After the wait: what others have added and deleted meanwhile is redacted as well.
        older = (*mine, log.c.tx != tx)
        entries = connection.execute(select(log.c.image, log.c.version).where(*older)).all()
        images = [(image, tracked.version) for image in row.values()]
        images += [(image, version) for image, version in entries if image is not None]
        with rewriting(connection):
            connection.execute(update(log).where(*older).values(image=null(), version=REDACTED, step=false()))
        connection.execute(delete(unique).where(unique.c.entity == tracked.entity, unique.c.key == fact))
        known = (parked.c.entity == tracked.entity, parked.c.key == fact)
        connection.execute(update(parked).where(*known, parked.c.error.is_not(None)).values(error=ERASED))
        embedders = {embedder.fingerprint for embedder in self._embedders}
        embedders.update(connection.scalars(select(index_state.c.embedder).distinct()))
        cache.forget(connection, set(_texts(connection, tracked, fact, images, embedders)))
        return len(entries)

    def _mark_instances_deleted(self, session: Session, connection: Connection, tracked: Tracked, key: str) -> None:
        """As the ORM does after a DELETE of its own: deleted, and there again when the transaction rolls back."""
        columns, erased = tracked.columns_for(connection.dialect), _normalized(decode_key(key))
        for instance in list(session.identity_map.values()):
            state: Any = inspect(instance)
            if self._registry.find(state.mapper) is tracked and _normalized(columns.raw_key(state.key[1])) == erased:
                session.expire(instance)
                session._remove_newly_deleted([state])  # noqa: SLF001  # expunge() would not come back, and cascades

    # -- afterwards ----------------------------------------------------------------------------------------------------

    def overwrite(self, engine: Engine, timeout: float) -> None:
        """Rewrite the database's files without what was deleted from its tables."""
        with engine.begin() as connection:
            take_write_lock(connection)
            # A delivery that was under way may have kept a vector anew: what no index holds now, goes.
            used = select(ledger.c.text_fingerprint).where(ledger.c.text_fingerprint.is_not(None))
            connection.execute(delete(embedding).where(embedding.c.text_fingerprint.not_in(used)))
        if not is_in_memory(engine):
            database_of(engine).vacuum(engine, self._tables(engine), time.monotonic() + timeout)

    def _tables(self, engine: Engine) -> list[Table]:
        """Those that erasures have deleted from."""
        with engine.connect() as connection:
            erased = set(connection.scalars(select(log.c.entity).where(log.c.version == REDACTED).distinct()))
        tracked = [self._registry.by_entity[entity] for entity in sorted(erased) if entity in self._registry.by_entity]
        return [log, ledger, outbox, parked, unique, embedding, *(table for one in tracked for table in one.tables)]


def _row(connection: Connection, tracked: Tracked, key: str) -> dict[str, dict[str, Any]]:
    """The image of the fact's row, locked, by the key that it has in the log; empty when there is none."""
    try:
        images = tracked.columns_for(connection.dialect).find_rows(connection, [key], for_update=True)
        if tracked.criterion is not None:  # the table has rows of other classes, too
            ours = committed.read(connection, tracked, list(images))
            return {key: image for key, image in images.items() if key in ours}
        return images
    except DataError as error:
        raise NotFound(f"{key} cannot be a key of {tracked.table.fullname}") from error


def _require_unreferred(connection: Connection, registry: Registry, tracked: Tracked, key: str) -> None:
    """Raise ConflictError for a row that refers to the fact, or to what goes along with it, and has no trigger of ours.

    The database would delete such a row along, or set its foreign key to NULL, and nobody would log that.
    """
    going = {table: {key} for table in tracked.tables}
    queue = list(going.items())
    referring = [fk for other in registry.by_table for fk in other.foreign_key_constraints]
    for table, keys in queue:
        for fk in (fk for fk in referring if fk.referred_table is table):
            owner = registry.by_table[fk.table]
            referring_keys = _referring(connection, registry, fk, list(keys)) - going.get(fk.table, set())
            if referring_keys and not owner.by_trigger:
                raise ConflictError(_REFERRED.format(tracked.entity, key, f" ({owner.entity} {min(referring_keys)})"))
            if referring_keys and (fk.ondelete or "").upper() == "CASCADE":
                going.setdefault(fk.table, set()).update(referring_keys)
                queue.append((fk.table, referring_keys))


def _referring(connection: Connection, registry: Registry, fk: ForeignKeyConstraint, keys: Sequence[str]) -> set[str]:
    """The keys of the rows that refer to those of *keys*, to which nobody can add one until the transaction ends."""
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


_REFERRED = "{} {} cannot be erased: other rows refer to it{}; delete or erase those first"


def _texts(
    connection: Connection,
    tracked: Tracked,
    key: str,
    images: Sequence[tuple[Image, int]],
    embedders: Collection[str],
) -> Iterator[str]:
    """The text fingerprints that the fact has had, as far as they can be told; see `Eraser.overwrite` for the rest."""
    for image, version in images:
        for shape in {version, tracked.version}:  # in today's shape, and in the one that it had
            try:
                row = _projectable(tracked, loaded_image(connection, tracked, image, shape) or {})
                fingerprints = [tracked.project(key, row, embedder).text_fingerprint for embedder in embedders]
            except Exception:  # noqa: BLE001, S112  # the application's own callables, which need not know such rows
                continue
            yield from filter(None, fingerprints)


def _projectable(tracked: Tracked, values: Image) -> list[Any]:
    """Column *values* of a row as `Tracked.project` takes them."""
    attributes: dict[str, Any] = {}
    for name, value in values.items():
        attribute = tracked.attributes.get(name, name)
        if attributes.get(attribute) is None:  # of the same name in several subclasses
            attributes[attribute] = value
    return [attributes.get(name) for name in tracked.projected_attributes]


def _normalized(key: Sequence[Any]) -> tuple[Any, ...]:
    """A key in a form that all ways of writing it share."""
    return tuple(value.rstrip() if isinstance(value, str) else value for value in key)
