"""Entries -> log, outbox and the table of unique values, on the caller's connection."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from itertools import groupby
from operator import itemgetter
from typing import Any, NamedTuple, NoReturn
from weakref import WeakKeyDictionary

from pydantic import ValidationError
from sqlalchemy import delete, func, insert, select
from sqlalchemy.engine import Connection
from sqlalchemy.exc import DBAPIError, IntegrityError
from sqlalchemy.pool import Pool

from memstate_sa.capture import hazards, unique_values
from memstate_sa.capture.supported import require_no_translation
from memstate_sa.capture.table_log import Header, Look, RawKey, TableLog, with_others
from memstate_sa.capture.transaction import Flush, OpenTransaction
from memstate_sa.db import sqlite, tables
from memstate_sa.db.codec import Image, decode_key
from memstate_sa.db.json_params import as_array, as_json
from memstate_sa.db.rows import MAX_KEY_CHARS, TableColumns
from memstate_sa.db.statements import READ_CHUNK, batches, take_write_lock
from memstate_sa.db.tables import utcnow
from memstate_sa.errors import ConflictError, MemstateError, UntrackedWrite, ValidationFailed
from memstate_sa.log import outbox
from memstate_sa.log.changes import LogEntry, fold
from memstate_sa.log.history import last_entries
from memstate_sa.log.outbox import deleted_keys, unknown_keys
from memstate_sa.runtime.printable import printable_logger
from memstate_sa.tracking.registry import Registry
from memstate_sa.tracking.tracked import Tracked
from memstate_sa.tracking.validation import to_validation_failed

logger = printable_logger("memstate_sa.recorder")

TWO_DATABASES = "the tracked models of one Session must live in one database: this one writes to two"
# Shorter than it takes PostgreSQL to look for a deadlock, and to choose a victim: a second, as it comes.
_hurry = select(func.set_config("lock_timeout", "100ms", True))
_LOCK_NOT_AVAILABLE = "55P03"
_SHOWN = 20
_CHARS = MAX_KEY_CHARS // 6  # of which JSON makes no more than that
_NOT_UNIQUE = (
    "%s: %d rows that are older than tracking or than unique_by, or were changed past it, have the same value of what "
    "must be unique as another, and can be changed only so that they have it no longer, or deleted. The first of them "
    "by key: %s"
)


class Before(NamedTuple):
    """The rows that a statement may change: as the database saw them, or as Python read those that the log has not."""

    looks: Sequence[Look] = ()
    baselines: Sequence[LogEntry] = ()


class Recorder:
    """Logs what became of rows, by as many statements for one as for many."""

    def __init__(self, registry: Registry) -> None:
        self._registry = registry
        # By the pool of connections to a database, which may have other types than the model says.
        self._table_logs: WeakKeyDictionary[Pool, dict[str, tuple[TableColumns, TableLog | None]]] = WeakKeyDictionary()

    def table_log(self, tracked: Tracked, connection: Connection) -> TableLog | None:
        """The statements by which the database logs rows of *tracked*; None where they have to be read."""
        columns = tracked.columns_for(connection.dialect)
        table_logs = self._table_logs.setdefault(connection.engine.pool, {})
        known = table_logs.get(tracked.entity)
        if known is None or known[0] is not columns:  # another subclass was mapped
            known = table_logs[tracked.entity] = (columns, TableLog.of(tracked, connection))
        return known[1]

    def write_header(self, connection: Connection, tx: str, labels: Mapping[str, str | None]) -> None:
        connection.execute(insert(tables.transaction), {"tx": tx, "at": utcnow(), **labels})

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

    def baselines(
        self,
        connection: Connection,
        transaction: OpenTransaction,
        tracked: Tracked,
        raw_keys: Sequence[tuple[Any, ...]],
        canonical: dict[tuple[Any, ...], str] | None = None,
    ) -> list[LogEntry]:
        """A baseline entry for each of the rows that the log has not seen, as it is before we change it.

        It locks no row: the caller's statement does that, in its own order. Others may change a row before that
        statement has it. They log its baseline then, and `log_touched` drops ours.

        *canonical* gets each raw key as the text it has in the log, also of those that an object holds in another form
        than is stored: Decimal("1.5") for 1.50, "a" for a padded CHAR. Such a key is unknown to the log, and read here.
        """
        require_supported(connection, transaction)
        columns = tracked.columns_for(connection.dialect)
        with transaction.writing():
            take_write_lock(connection)
        by_key = {columns.encode_key(raw): raw for raw in raw_keys}
        if canonical is not None:
            canonical.update((raw, key) for key, raw in by_key.items())
        unknown = self.unknown(connection, tracked, by_key)
        if not unknown:
            return []
        images = columns.read(connection, [by_key[key] for key in unknown])
        if canonical is not None:
            forms = {normalized_key(decode_key(key)): key for key in images if key not in by_key}
            for key in unknown:
                if key not in images and normalized_key(by_key[key]) in forms:
                    canonical[by_key[key]] = forms[normalized_key(by_key[key])]
        return [LogEntry(tracked.entity, key, "baseline", image) for key, image in images.items()]

    def _still_unknown(self, connection: Connection, baselines: Sequence[LogEntry]) -> list[LogEntry]:
        """Those of *baselines* whose rows the log has not seen. Nobody else changes the rows now: we hold them."""
        unseen: list[LogEntry] = []
        for entity, entries in groupby(baselines, key=lambda entry: entry.entity):
            images = {entry.key: entry for entry in entries}
            unseen += [images[key] for key in self.unknown(connection, self._registry.by_entity[entity], images)]
        return unseen

    def log_baselines(self, connection: Connection, tracked: Tracked, keys: Sequence[str]) -> tuple[int, int]:
        """Log, and mark dirty, those rows of *keys* that the log has not seen, outside of any Session.

        Returns how many they were, and how many of *keys*, in their order, are done with. It waits for the first row
        alone, and passes by others that are locked: who has locked one may wait for another that is locked here. Nor
        does it hold them for long while it waits for a value that must be unique: then fewer are done with, or none.
        """
        if tracked.unique_values is None or connection.dialect.name != "postgresql":
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
        transaction, columns = OpenTransaction(), tracked.columns_for(connection.dialect)
        take_write_lock(connection)
        unknown = set(self.unknown(connection, tracked, keys))
        first, others = ([decode_key(key) for key in part if key in unknown] for part in (keys[:1], keys[1:]))
        images = columns.read(connection, first, for_update=True)
        images |= columns.read(connection, others, for_update=True, skip_locked=True)
        # Others that held these rows while we waited for them may have logged them.
        read = [LogEntry(tracked.entity, key, "baseline", image) for key, image in images.items()]
        entries = self._still_unknown(connection, read)
        if hurry:
            connection.execute(_hurry)
        self.write(connection, transaction, entries, deliver_baselines=True, refuse=False)
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
        self, connection: Connection, transaction: OpenTransaction, tracked: Tracked, keys: Sequence[RawKey]
    ) -> list[Look]:
        """The rows of *keys* before they change, for `log_looks`.

        It locks no row, as the statement that follows does. Others may change a row before that has it; then they log
        its baseline.
        """
        require_supported(connection, transaction)
        table_log = self.table_log(tracked, connection)
        assert table_log is not None
        with transaction.writing():
            if not sqlite.may_write(connection):
                take_write_lock(connection)
            return table_log.look(connection, keys)

    def log_looks(
        self,
        connection: Connection,
        transaction: OpenTransaction,
        tracked: Tracked,
        looks: Sequence[Look],
        written: Collection[RawKey],
        *,
        new: bool,
    ) -> None:
        """Have the database log what became of the rows of *looks*. *new*: there was none before.

        *written* are keys of rows that are certain to be there now.
        """
        require_supported(connection, transaction)
        table_log = self.table_log(tracked, connection)
        assert table_log is not None
        columns = tracked.columns_for(connection.dialect)
        for key in written:
            if sum(len(part) for part in key if isinstance(part, (str, bytes))) > _CHARS:
                columns.encode_key(key)
        header = Header(transaction.tx, utcnow(), self._registry.versions[tracked.entity], transaction.step)
        with transaction.writing():
            count = sum(table_log.log(connection, header, look, new=new) for look in looks)
            if count:
                transaction.note_entries(connection, transaction.tx)
            if written and count < sum(len(look.keys) for look in looks):
                lost = len(written) - table_log.count(connection, list(written))
                if lost > 0:
                    _raise_lost(connection, tracked, lost)

    def log_touched(
        self,
        connection: Connection,
        transaction: OpenTransaction,
        touched: Mapping[Tracked, Mapping[tuple[Any, ...], bool]],
        baselines: Sequence[LogEntry],
        flush: Flush | None = None,
        *,
        updated: bool = False,
    ) -> None:
        """Read the rows that were *touched* (by driver-level key: was it there before?) and log what became of them.

        *updated*: by an UPDATE, after which they are still there.
        """
        baselines = self._still_unknown(connection, baselines)
        entries = list(baselines)
        for tracked, existed in touched.items():
            if self.table_log(tracked, connection) is not None:
                first = {entry.key: entry.image for entry in baselines if entry.entity == tracked.entity}
                entries = [entry for entry in entries if entry.entity != tracked.entity]
                self._log_inserted(connection, transaction, tracked, existed, first)
                continue
            columns = tracked.columns_for(connection.dialect)
            images = columns.read(connection, list(existed))
            canonical = {} if flush is None else dict(flush.canonical.get(tracked, {}))
            canonical |= {raw: columns.encode_key(raw) for raw in existed if raw not in canonical}
            keys = {canonical[raw]: before for raw, before in existed.items()}
            others = [key for key in images if key not in keys]  # stored in another form than given: CHAR is padded
            keys |= dict.fromkeys(others, False)
            lost = 0 if flush is None else sum(canonical[raw] not in images for raw in flush.written.get(tracked, ()))
            if lost > len(others):
                _raise_lost(connection, tracked, lost)
            gone = [key for key, before in keys.items() if before and key not in images]
            if updated and gone:
                _require_visible(connection, tracked)
            for key in self.deleted_before(connection, tracked, gone):
                del keys[key]  # the DELETE found nothing: somebody else's came first
            changes = [LogEntry(tracked.entity, key, op, image) for key, op, image in fold(keys, images)]
            certain = set() if flush is None else {canonical[raw] for raw in flush.certain.get(tracked, ())}
            doubtful = [change for change in changes if change.op == "update" and change.key not in certain]
            if same := self._unchanged(connection, tracked, doubtful, baselines):
                changes = [change for change in changes if change.key not in same]
                entries = [entry for entry in entries if entry.entity != tracked.entity or entry.key not in same]
            if tracked.validate is not None or tracked.immutable is not None:
                for change in changes:
                    self._check(tracked, columns, change)
            entries += changes
        self.write(connection, transaction, entries)

    def before_bulk(
        self, connection: Connection, transaction: OpenTransaction, tracked: Tracked, keys: Sequence[RawKey]
    ) -> Before:
        """The rows of *keys*, which a statement may change."""
        if self.table_log(tracked, connection) is not None:
            return Before(looks=self.look(connection, transaction, tracked, keys))
        return Before(baselines=self.baselines(connection, transaction, tracked, keys))

    def log_bulk(
        self,
        connection: Connection,
        transaction: OpenTransaction,
        tracked: Tracked,
        keys: Sequence[RawKey],
        before: Before,
        *,
        updated: bool,
    ) -> None:
        """Log what became of the rows of *keys*: those that were there *before*, and others.

        *updated*: by an UPDATE, after which they are still there.
        """
        table_log = self.table_log(tracked, connection)
        if table_log is None:
            touched = {tracked: dict.fromkeys(keys, True)}
            self.log_touched(connection, transaction, touched, before.baselines, updated=updated)
            return
        if updated and table_log.count(connection, keys) < len(keys):
            _require_visible(connection, tracked)
        self.log_looks(connection, transaction, tracked, with_others(before.looks, keys), (), new=False)

    def _log_inserted(
        self,
        connection: Connection,
        transaction: OpenTransaction,
        tracked: Tracked,
        existed: Mapping[RawKey, bool],
        baselines: Mapping[str, Image | None],
    ) -> None:
        """The same by the database, of one class: of an INSERT, and of an upsert. Others go by `log_bulk`."""
        columns = tracked.columns_for(connection.dialect)
        keys = {columns.encode_key(raw): raw for raw in existed}
        seen = {key: baselines.get(key) for key, raw in keys.items() if existed[raw]}
        looks = [
            Look(
                [keys[key] for key in batch],
                {key: None if seen[key] is None else as_json(seen[key]) for key in batch if key in seen},
            )
            for batch in batches(list(keys))
        ]
        self.log_looks(connection, transaction, tracked, looks, (), new=False)

    @staticmethod
    def _unchanged(
        connection: Connection, tracked: Tracked, updates: Sequence[LogEntry], baselines: Sequence[LogEntry]
    ) -> set[str]:
        """The keys of those *updates* that left the row as it was: no step of anybody's, and nothing to deliver."""
        if not updates:
            return set()
        before = {entry.key: entry.image for entry in baselines if entry.entity == tracked.entity}
        keys = [entry.key for entry in updates if entry.key not in before]
        before.update({key: last.image for key, last in last_entries(connection, tracked, keys).items()})
        return {entry.key for entry in updates if before.get(entry.key) == entry.image}

    def deleted_before(self, connection: Connection, tracked: Tracked, keys: Sequence[str]) -> Sequence[str]:
        """Those of *keys* whose last entry says that the row was deleted."""
        if not keys:
            return ()
        return connection.scalars(deleted_keys, {"entity": tracked.entity, "keys": as_array(keys)}).all()

    def _check(self, tracked: Tracked, columns: TableColumns, entry: LogEntry) -> None:
        """What the schema says of the row as the database has it, its own defaults and expressions included."""
        if entry.image is None:
            return
        values = tracked.by_attribute(columns.values(dict(entry.image)))
        if entry.op == "update" and tracked.immutable is not None and tracked.immutable(values):
            raise ConflictError(f"a fact of {tracked.entity} is immutable: delete it and add another")
        if tracked.validate is not None:
            try:
                tracked.validate(values)
            except ValidationError as error:
                raise to_validation_failed(tracked.model.__name__, error) or ValidationFailed() from error


def _raise_lost(connection: Connection, tracked: Tracked, count: int) -> NoReturn:
    _require_visible(connection, tracked)
    raise UntrackedWrite(
        f"{count} row(s) of {tracked.entity} were written, but are not found under the keys they were given: give "
        "primary keys in the form in which the database stores them"
    )


def _require_visible(connection: Connection, tracked: Tracked) -> None:
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


def normalized_key(key: Sequence[Any]) -> tuple[Any, ...]:
    """A key in a form that all ways of writing it share."""
    return tuple(value.rstrip() if isinstance(value, str) else value for value in key)
