"""`Recorder`: writes entries to the log, the outbox and the table of unique values, on the caller's connection."""

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

TWO_DATABASES = (
    "Cannot log this write: the Session writes to two databases. Keep its tracked models in one database, or use a "
    "Session for each."
)
# Shorter than PostgreSQL's default deadlock_timeout (1 s), so that we give up before it cancels a transaction.
_hurry = select(func.set_config("lock_timeout", "100ms", True))
_LOCK_NOT_AVAILABLE = "55P03"
_SHOWN = 20
_NO_ENTRY = (
    "The log has lost entries of {}. It was emptied or restored while this process ran. Run the transaction again. "
    "Then run `memstate-sa doctor` to see if more is missing."
)
_NOT_UNIQUE = (
    "%s: the unique_by value of %d rows already belongs to another row. They are older than tracking or unique_by, or "
    "were changed without memstate_sa. A change is accepted only if it gives them another value. Their keys (first "
    "ones): %s"
)


class Recorder:
    """Logs the changes of rows. The number of statements does not grow with the number of rows in a batch."""

    def __init__(self, registry: Registry) -> None:
        self._registry = registry
        # Each connection pool has its own, because the column types of a database may differ from those of the model.
        self._logs: WeakKeyDictionary[Pool, dict[str, tuple[Tracked, TableColumns, ClassLog]]] = WeakKeyDictionary()
        self._known: WeakKeyDictionary[Pool, KnownKeys] = WeakKeyDictionary()

    def _log_of(self, tracked: Tracked, connection: Connection) -> ClassLog:
        columns = tracked.columns_for(connection.dialect)
        logs = self._logs.setdefault(connection.engine.pool, {})
        known = logs.get(tracked.entity)
        if known is None or known[0] is not tracked or known[1] is not columns:  # a subclass was mapped since
            known = logs[tracked.entity] = (tracked, columns, class_log(tracked, connection))
        return known[2]

    def known_keys(self, connection: Connection) -> KnownKeys:
        """The known keys of the database of *connection*. All of its connections share them."""
        pool = connection.engine.pool
        known = self._known.get(pool)
        return self._known.setdefault(pool, KnownKeys()) if known is None else known

    def forget_keys(self) -> None:
        """Forget the known keys of all databases, because nothing will tell us when a log is emptied."""
        self._known.clear()

    def write_header(self, connection: Connection, tx: str, labels: Mapping[str, str | None]) -> None:
        """Write the labels of *tx*, unless they are there. A SAVEPOINT may have rolled them back."""
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
        """Log *entries* and mark their keys dirty, with at most two INSERTs.

        ``refuse=False`` is for rows that others wrote without us. Then a duplicate unique value only causes a warning.
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
            for entity in sorted({entity for entity, _ in dirty}):  # the order is fixed, because writers wait here
                tracked = self._registry.by_entity[entity]
                if tracked.unique_values is not None:
                    self._write_unique(connection, tracked, entries, refuse=refuse)

    def _write_unique(
        self, connection: Connection, tracked: Tracked, entries: Sequence[LogEntry], *, refuse: bool
    ) -> None:
        """Keep the table of unique values in step. Its primary key decides between concurrent writers.

        Without *refuse*, the first row gets the value, and the other rows get none.
        """
        unique = tables.unique
        class_entries = [entry for entry in entries if entry.entity == tracked.entity]
        images = {entry.key: entry.image for entry in class_entries}
        # An "insert" of an undo may restore a fact that still has its value here.
        keys = list({entry.key for entry in class_entries if entry.op != "insert" or entry.reverts})
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
                    f"Cannot write these facts of {tracked.entity}: another fact has the same value of unique_by. "
                    "Change that fact, or write another value."
                ) from error
        else:
            _warn_of(tracked, unique_values.give(connection, tracked, values))

    def log_baselines(self, connection: Connection, tracked: Tracked, keys: Sequence[str]) -> tuple[int, int]:
        """Log baselines of the rows of *keys* that have no entry, and mark them dirty. This needs no Session.

        Returns the number of baselines, and the number of leading *keys* that are done. To avoid deadlocks, it waits
        only for the first row, and skips other locked rows. While it holds rows it waits only briefly for a unique
        value. After that it tries again with half of the keys, or gives up.
        """
        if tracked.unique_values is None or database_of(connection).has_one_writer:
            return self._log_baselines(connection, tracked, keys)
        while keys:
            try:
                with connection.begin_nested():  # a rollback of this SAVEPOINT releases the rows
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
        locked_keys = columns.lock(connection, first) | columns.lock(connection, others, skip_locked=True)
        looks = self._log_of(tracked, connection).look(connection, list(map(decode_key, locked_keys)))
        # While we waited for a lock, its holder may have logged the row.
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
        """Give unique values to rows whose history is older than unique_by. Returns the keys of locked rows."""
        columns = tracked.columns_for(connection.dialect)
        seen = unique_values.differences(
            connection, tracked, columns.read(connection, [decode_key(key) for key in keys])
        )
        _warn_of(tracked, seen.shared)
        wrong = sorted(seen.keys)
        if not wrong:
            return set()
        # Like `log_baselines`, wait only for the first row.
        first, others = ([decode_key(key) for key in part] for part in (wrong[:1], wrong[1:]))
        images = columns.read(connection, first, for_update=True)
        images |= columns.read(connection, others, for_update=True, skip_locked=True)
        differences = unique_values.differences(connection, tracked, images)
        unique_values.take(connection, tracked, differences.stale)
        _warn_of(tracked, unique_values.give(connection, tracked, differences.missing))
        return set(wrong[1:]) & set(keys) - images.keys()

    def unknown(self, connection: Connection, tracked: Tracked, keys: Collection[str]) -> Sequence[str]:
        """The *keys* that have no entry in the log."""
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
        """The rows of *keys* before they change, for `log`. With *remembered*, known keys need no look.

        It locks no row: the statement that follows does. If others change a row before that, they log its baseline.
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
        """Log the changes of the rows of *looks*, and *new* rows. Returns the number of changed rows.

        A new row is not compared with the log, because the transaction's snapshot may hide others' entries of its key.
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
            count = sum(batch.changed for batch in logged)
            if count:
                transaction.note_entries(connection, transaction.tx)
            entries = [entry for batch in logged for entry in batch.entries]
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
        """Note the keys of changed rows, to remember after the commit that the log has their entries.

        Unchanged rows are left out, because a transaction with an older snapshot may not see their entries.
        """
        if len(transaction.seen) >= self.known_keys(connection).limit:
            return
        columns = tracked.columns_for(connection.dialect)
        for look, batch in logged:
            if batch.changed == len(look.keys) and not look.remembered:
                canonical = ((raw, columns.canonical_raw(raw)) for raw in look.keys)
                transaction.seen.update(((tracked.entity, raw), key) for raw, key in canonical if key in look.rows)

    def remember(self, connection: Connection, transaction: OpenTransaction) -> None:
        """Remember the keys that the committed *transaction* has changed."""
        if not connection.in_transaction():  # otherwise a larger transaction around it is still open
            self.known_keys(connection).add(transaction.seen)

    def images(self, connection: Connection, tracked: Tracked, keys: Collection[str]) -> dict[str, Image]:
        """The images of the rows of canonical *keys*, in the form that a flush logs them."""
        return self._log_of(tracked, connection).images(connection, list(map(decode_key, keys)))

    def count_lost(
        self, connection: Connection, transaction: OpenTransaction, tracked: Tracked, keys: Sequence[RawKey]
    ) -> int:
        """The number of *keys* that were written, but have no row."""
        if not keys:
            return 0
        with transaction.writing():
            return len(keys) - self._log_of(tracked, connection).count(connection, keys)

    def _check(self, connection: Connection, tracked: Tracked, entries: Sequence[LogEntry]) -> None:
        """Validate the rows as the database stores them, its defaults and expressions included."""
        if tracked.validate is None and tracked.immutable is None:
            return
        columns = tracked.columns_for(connection.dialect)
        for entry in entries:
            if entry.image is None:
                continue
            values = tracked.by_attribute(columns.values(dict(entry.image)))
            if entry.op == "update" and tracked.immutable is not None and tracked.immutable(values):
                raise ConflictError(
                    f"Cannot change this fact of {tracked.entity}: it is immutable. Delete it and add another."
                )
            if tracked.validate is None:
                continue
            try:
                tracked.validate(values)
            except ValidationError as error:
                raise to_validation_failed(tracked.model.__name__, error) or ValidationFailed() from error


def require_visible(connection: Connection, tracked: Tracked) -> None:
    """Raise UntrackedWrite if row-level security may hide the rows that were not found."""
    if hidden := hazards.hidden(connection, tracked.tables):
        raise UntrackedWrite(
            f"Cannot log rows of {tracked.entity}: row-level security hides them after they are written. "
            f"Give {', '.join(hidden.values())} a policy FOR SELECT that shows them, or use capture='trigger'."
        )


def _warn_of(tracked: Tracked, without: Sequence[str]) -> None:
    """Warn about rows that got no unique value, because other rows have it."""
    if without:
        logger.warning(_NOT_UNIQUE, tracked.entity, len(without), ", ".join(without[:_SHOWN]))


def require_supported(connection: Connection, transaction: OpenTransaction) -> None:
    require_no_translation(connection.get_execution_options())
    if transaction.written_on not in (None, connection):
        raise MemstateError(TWO_DATABASES)
