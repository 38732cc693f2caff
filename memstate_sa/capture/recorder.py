"""Entries -> log, outbox and the table of unique values, on the caller's connection."""

from __future__ import annotations

import json
from collections.abc import Collection, Iterable, Mapping, Sequence
from operator import itemgetter
from weakref import WeakKeyDictionary

from pydantic import ValidationError
from sqlalchemy import delete, func, insert, select
from sqlalchemy.engine import Connection
from sqlalchemy.exc import DBAPIError, IntegrityError
from sqlalchemy.pool import Pool

from memstate_sa.capture import hazards, unique_values
from memstate_sa.capture.known_keys import KnownKeys
from memstate_sa.capture.looks import ClassLog, Header, Logged, Look, NoEntry, RawKey
from memstate_sa.capture.supported import require_no_translation
from memstate_sa.capture.table_log import class_log
from memstate_sa.capture.transaction import OpenTransaction
from memstate_sa.db import sqlite, tables
from memstate_sa.db.codec import Image, decode_key
from memstate_sa.db.dialects import database_of
from memstate_sa.db.json_params import as_array
from memstate_sa.db.rows import TableColumns
from memstate_sa.db.statements import READ_CHUNK, batches, take_write_lock
from memstate_sa.db.tables import utcnow
from memstate_sa.errors import ConflictError, MemstateError, UntrackedWrite, ValidationFailed
from memstate_sa.log import outbox
from memstate_sa.log.changes import LogEntry
from memstate_sa.log.outbox import unknown_keys
from memstate_sa.runtime.printable import printable_logger
from memstate_sa.tracking.registry import Registry
from memstate_sa.tracking.tracked import Tracked
from memstate_sa.tracking.validation import to_validation_failed

logger = printable_logger("memstate_sa.recorder")

TWO_DATABASES = "the tracked models of one Session must live in one database: this one writes to two"
# PostgreSQL looks for a deadlock after a second (deadlock_timeout), and then cancels one of the transactions.
_hurry = select(func.set_config("lock_timeout", "100ms", True))
_LOCK_NOT_AVAILABLE = "55P03"
_SHOWN = 20
_NO_ENTRY = (
    "the log has lost entries of {}: it was emptied or restored while this process ran. Run the transaction again; "
    "`memstate-sa doctor` tells whether more is missing"
)
_NOT_UNIQUE = (
    "%s: %d rows that are older than tracking or than unique_by, or were changed past it, have the same value of what "
    "must be unique as another, and can be changed only so that they have it no longer, or deleted. The first of them "
    "by key: %s"
)


class Recorder:
    """Logs what became of rows, by as many statements for one as for many."""

    def __init__(self, registry: Registry) -> None:
        self._registry = registry
        # By the pool of connections to a database, which may have other types than the model says.
        self._logs: WeakKeyDictionary[Pool, dict[str, tuple[Tracked, TableColumns, ClassLog]]] = WeakKeyDictionary()
        self._known: WeakKeyDictionary[Pool, KnownKeys] = WeakKeyDictionary()

    def _log_of(self, tracked: Tracked, connection: Connection) -> ClassLog:
        columns = tracked.columns_for(connection.dialect)
        logs = self._logs.setdefault(connection.engine.pool, {})
        known = logs.get(tracked.entity)
        if known is None or known[0] is not tracked or known[1] is not columns:  # another subclass was mapped
            known = logs[tracked.entity] = (tracked, columns, class_log(tracked, connection))
        return known[2]

    def known_keys(self, connection: Connection) -> KnownKeys:
        """Those of the database of *connection*, for all of its connections."""
        pool = connection.engine.pool
        known = self._known.get(pool)
        return self._known.setdefault(pool, KnownKeys()) if known is None else known

    def forget_keys(self) -> None:
        """Whoever empties the log from now on is not seen."""
        self._known.clear()

    def write_header(self, connection: Connection, tx: str, labels: Mapping[str, str | None]) -> None:
        """Write the labels of *tx*, unless they are there: what a SAVEPOINT may have rolled back is written again."""
        new = database_of(connection).upsert(tables.transaction).values(tx=tx, at=utcnow(), **labels)
        connection.execute(new.on_conflict_do_nothing())

    def write(
        self,
        connection: Connection,
        transaction: OpenTransaction,
        entries: Sequence[LogEntry],
        *,
        tx: str | None = None,
        deliver_baselines: bool = False,
        refuse: bool = True,
    ) -> None:
        """Log *entries* and mark their keys dirty: two INSERTs at most, whatever their number.

        Without *refuse*, for rows that were written past us, values that must be unique and are not are warned of.
        """
        if not entries:
            return
        require_supported(connection, transaction)
        at, tx = utcnow(), tx or transaction.tx
        if not transaction.step:
            entries = [entry._replace(step=False) for entry in entries]
        transaction.note_entries(connection, tx)
        with transaction.writing():
            dirty = dict.fromkeys(
                (entry.entity, entry.key) for entry in entries if deliver_baselines or entry.op != "baseline"
            )
            outbox.add(connection, entries, dirty, tx, at, self._registry.versions)
            for entity in sorted({entity for entity, _ in dirty}):  # in one order, as these wait for each other
                tracked = self._registry.by_entity[entity]
                if tracked.unique_values is not None:
                    self._write_unique(connection, tracked, entries, refuse=refuse)

    def _write_unique(
        self, connection: Connection, tracked: Tracked, entries: Sequence[LogEntry], *, refuse: bool
    ) -> None:
        """Keep the table of unique values in step. Its primary key is what decides between concurrent writers.

        Where none is *refused*, the first row has the value, and others have none.
        """
        unique = tables.unique
        ours = [entry for entry in entries if entry.entity == tracked.entity]
        images = {entry.key: entry.image for entry in ours}
        # An undo inserts into the log also what is there again, and has a value.
        keys = list({entry.key for entry in ours if entry.op != "insert" or entry.reverts})
        for batch in batches(keys, READ_CHUNK):
            connection.execute(delete(unique).where(unique.c.entity == tracked.entity, unique.c.key.in_(batch)))
        living = {key: image for key, image in images.items() if image is not None}
        values = unique_values.values_of(connection, tracked, living)
        if values and refuse:
            rows = [{"entity": tracked.entity, "value": value, "key": key} for key, value in values.items()]
            rows.sort(key=itemgetter("value"))
            try:
                connection.execute(insert(unique), rows)
            except IntegrityError as error:
                raise ConflictError(
                    f"{tracked.entity}: another fact has the same value of what must be unique"
                ) from error
        else:
            _warn_of(tracked, unique_values.give(connection, tracked, values))

    def log_baselines(self, connection: Connection, tracked: Tracked, keys: Sequence[str]) -> tuple[int, int]:
        """Log, and mark dirty, those rows of *keys* that the log has not seen, outside of any Session.

        Returns how many they were, and how many of *keys*, in their order, are done with. It waits for the first row
        alone, and passes by others that are locked: who has locked one may wait for another that is locked here. Nor
        does it hold them for long while it waits for a value that must be unique: then fewer are done with, or none.
        """
        if tracked.unique_values is None or database_of(connection).has_one_writer:
            return self._log_baselines(connection, tracked, keys)
        while keys:
            try:
                with connection.begin_nested():  # rolled back, it lets go of the rows
                    return self._log_baselines(connection, tracked, keys, hurry=True)
            except DBAPIError as error:
                if getattr(error.orig, "sqlstate", None) != _LOCK_NOT_AVAILABLE:
                    raise
            keys = keys[: len(keys) // 2]
        return 0, 0

    def _log_baselines(
        self, connection: Connection, tracked: Tracked, keys: Sequence[str], *, hurry: bool = False
    ) -> tuple[int, int]:
        take_write_lock(connection)
        unknown = set(self.unknown(connection, tracked, keys))
        columns = tracked.columns_for(connection.dialect)
        first, others = ([decode_key(key) for key in part if key in unknown] for part in (keys[:1], keys[1:]))
        held = columns.lock(connection, first) | columns.lock(connection, others, skip_locked=True)
        looks = self._log_of(tracked, connection).look(connection, list(map(decode_key, held)))
        # Others that held these rows while we waited for them may have logged them.
        images = {key: image for look in looks for key, image in look.rows.items()}
        unseen = {key: json.loads(image) for key, image in images.items() if image is not None}
        entries = [LogEntry(tracked.entity, key, "baseline", image) for key, image in unseen.items()]
        if hurry:
            connection.execute(_hurry)
        self.write(connection, OpenTransaction(), entries, deliver_baselines=True, refuse=False)
        passed_by = {key for key in keys if key in unknown and key not in images}
        if tracked.unique_values is not None:
            passed_by |= self._take_in_values(connection, tracked, [key for key in keys if key not in unknown])
        not_done = (n for n, key in enumerate(keys) if n and key in passed_by)
        return len(entries), next(not_done, len(keys))

    def _take_in_values(self, connection: Connection, tracked: Tracked, keys: Sequence[str]) -> set[str]:
        """Give rows their unique values whose history is older than these. Returns the keys of rows that are locked."""
        columns = tracked.columns_for(connection.dialect)
        seen = unique_values.differences(
            connection, tracked, columns.read(connection, [decode_key(key) for key in keys])
        )
        _warn_of(tracked, seen.shared)
        wrong = sorted(seen.keys)
        if not wrong:
            return set()
        # As of rows that the log has not seen: it waits for the first one alone.
        first, others = ([decode_key(key) for key in part] for part in (wrong[:1], wrong[1:]))
        images = columns.read(connection, first, for_update=True)
        images |= columns.read(connection, others, for_update=True, skip_locked=True)
        differences = unique_values.differences(connection, tracked, images)
        unique_values.take(connection, tracked, differences.stale)
        _warn_of(tracked, unique_values.give(connection, tracked, differences.missing))
        return set(wrong[1:]) & set(keys) - images.keys()

    def unknown(self, connection: Connection, tracked: Tracked, keys: Collection[str]) -> Sequence[str]:
        """Those of *keys* that the log has no entry of."""
        return connection.scalars(unknown_keys, {"entity": tracked.entity, "keys": as_array(keys)}).all()

    def look(
        self,
        connection: Connection,
        transaction: OpenTransaction,
        tracked: Tracked,
        keys: Sequence[RawKey],
        *,
        remembered: bool = True,
    ) -> list[Look]:
        """The rows of *keys* before they change, for `log`. Not *remembered*: whatever the log is known to have.

        It locks no row, as the statement that follows does. Others may change a row before that has it; then they log
        its baseline.
        """
        require_supported(connection, transaction)
        if remembered and (known := self.known_keys(connection).find(tracked.entity, keys)):
            return [Look(batch, {known[key]: None for key in batch}, remembered=True) for batch in batches(keys)]
        with transaction.writing():
            if not sqlite.may_write(connection):
                take_write_lock(connection)
            return self._log_of(tracked, connection).look(connection, keys)

    def log(
        self,
        connection: Connection,
        transaction: OpenTransaction,
        tracked: Tracked,
        looks: Sequence[Look],
        new: Sequence[RawKey] = (),
    ) -> int:
        """Log what became of the rows of *looks*, and *new* rows; returns how many have changed.

        A row that the transaction has made is not compared with the log: its snapshot may not show what others have
        logged of that key.
        """
        require_supported(connection, transaction)
        log = self._log_of(tracked, connection)
        header = Header(transaction.tx, utcnow(), self._registry.versions[tracked.entity], transaction.step)
        with transaction.writing():
            try:
                logged = [log.log(connection, header, look, new=False) for look in looks]
            except NoEntry as error:
                self.known_keys(connection).clear()
                raise ConflictError(_NO_ENTRY.format(tracked.entity)) from error
            self._note(connection, transaction, tracked, zip(looks, logged, strict=True))
            logged += [log.log(connection, header, Look(batch, {}), new=True) for batch in batches(new)]
            count = sum(each.changed for each in logged)
            if count:
                transaction.note_entries(connection, transaction.tx)
            entries = [entry for each in logged for entry in each.entries]
            self._check(connection, tracked, entries)
            if entries and tracked.unique_values is not None:
                self._write_unique(connection, tracked, entries, refuse=True)
        return count

    def _note(
        self,
        connection: Connection,
        transaction: OpenTransaction,
        tracked: Tracked,
        logged: Iterable[tuple[Look, Logged]],
    ) -> None:
        """Note the keys that the log has now, to be remembered: of rows that were changed.

        Of others, a transaction with an older snapshot may not see the entry.
        """
        if len(transaction.seen) >= self.known_keys(connection).limit:
            return
        columns = tracked.columns_for(connection.dialect)
        for look, its in logged:
            if its.changed == len(look.keys) and not look.remembered:
                canonical = ((raw, columns.canonical_raw(raw)) for raw in look.keys)
                transaction.seen.update(((tracked.entity, raw), key) for raw, key in canonical if key in look.rows)

    def remember(self, connection: Connection, transaction: OpenTransaction) -> None:
        """Remember the keys that *transaction*, which has committed, has changed."""
        if not connection.in_transaction():  # else it was a part of one
            self.known_keys(connection).add(transaction.seen)

    def images(self, connection: Connection, tracked: Tracked, keys: Collection[str]) -> dict[str, Image]:
        """The rows of canonical *keys*, in the form that the log has of a flush."""
        return self._log_of(tracked, connection).images(connection, list(map(decode_key, keys)))

    def count_lost(
        self, connection: Connection, transaction: OpenTransaction, tracked: Tracked, keys: Sequence[RawKey]
    ) -> int:
        """How many rows of *keys*, which were written, are not there."""
        if not keys:
            return 0
        with transaction.writing():
            return len(keys) - self._log_of(tracked, connection).count(connection, keys)

    def _check(self, connection: Connection, tracked: Tracked, entries: Sequence[LogEntry]) -> None:
        """What the schema says of rows as the database has them, its own defaults and expressions included."""
        if tracked.validate is None and tracked.immutable is None:
            return
        columns = tracked.columns_for(connection.dialect)
        for entry in entries:
            if entry.image is None:
                continue
            values = tracked.by_attribute(columns.values(dict(entry.image)))
            if entry.op == "update" and tracked.immutable is not None and tracked.immutable(values):
                raise ConflictError(f"a fact of {tracked.entity} is immutable: delete it and add another")
            if tracked.validate is None:
                continue
            try:
                tracked.validate(values)
            except ValidationError as error:
                raise to_validation_failed(tracked.model.__name__, error) or ValidationFailed() from error


def require_visible(connection: Connection, tracked: Tracked) -> None:
    """Raise where a policy may be the reason why a row is not found."""
    if hidden := hazards.hidden(connection, tracked.tables):
        raise UntrackedWrite(
            f"Cannot log rows of {tracked.entity}: row-level security hides them after they are written. "
            f"Give {', '.join(hidden.values())} a policy FOR SELECT that shows them, or use capture='trigger'."
        )


def _warn_of(tracked: Tracked, without: Sequence[str]) -> None:
    """Say which rows were given no unique value, as others have it."""
    if without:
        logger.warning(_NOT_UNIQUE, tracked.entity, len(without), ", ".join(without[:_SHOWN]))


def require_supported(connection: Connection, transaction: OpenTransaction) -> None:
    require_no_translation(connection.get_execution_options())
    if transaction.written_on not in (None, connection):
        raise MemstateError(TWO_DATABASES)
