"""`MaintenanceMethods`: the methods of `Memory` that keep indexes and log as they should be."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Sequence
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any, TextIO, Unpack

from sqlalchemy.engine import Engine

from memstate_sa.db.async_methods import AsyncMethod
from memstate_sa.db.sessions import AnySession, SyncSession, blocking_session, sync_session
from memstate_sa.db.sqlite import require_no_transaction
from memstate_sa.errors import MemstateError
from memstate_sa.indexes.base import PurgeableIndex
from memstate_sa.maintenance import export_import, reindex
from memstate_sa.maintenance.backfill import Backfill
from memstate_sa.maintenance.doctor import Diagnosis, Doctor
from memstate_sa.maintenance.erase import Eraser
from memstate_sa.maintenance.expiry import Sweeper
from memstate_sa.maintenance.progress import Progress
from memstate_sa.maintenance.verify import DriftReport, Verify, remake_if_broken
from memstate_sa.options import BackfillOptions, RelayOptions, require_options
from memstate_sa.relay import Relay
from memstate_sa.relay.backlog import Backlog
from memstate_sa.relay.memory_parts import MemoryParts
from memstate_sa.relay.waiting import wait_for
from memstate_sa.search.succession import Succession
from memstate_sa.tracking.validation import require_count, require_label

if TYPE_CHECKING:
    from sqlalchemy.ext.asyncio import AsyncEngine


class MaintenanceMethods(MemoryParts):
    """The methods of `Memory` that deliver, compare, fill, erase and move."""

    _succession: Succession
    _sweeper: Sweeper
    _eraser: Eraser

    def relay(self, engine: Engine | AsyncEngine, **options: Unpack[RelayOptions]) -> Relay:
        """The relay that brings the indexes up to date with the committed rows of *engine*'s database.

        ``with memory.relay(engine):`` runs it in the background. *options*: see `RelayOptions`.
        """
        require_options("relay", options, RelayOptions)
        self._open()
        sync = self.sync_engine(engine)
        self._capture.guard(sync)
        self._strict.watch(sync)
        return self._relays.add(sync, partial(self.sweep, sync), options)

    def token(self, session: AnySession) -> str | None:
        """Names the last transaction with tracked changes that *session* committed, for `wait`, in any process.

        It is the ``tx`` of the `Change` entries of that transaction.
        """
        txs, _ = self._capture.committed.get(sync_session(session), ((), None))
        return txs[-1] if txs else None

    def wait(
        self,
        session_or_token: AnySession | str | None,
        timeout: float = 30.0,
        *,
        engine: Engine | AsyncEngine | None = None,
    ) -> None:
        """Return when what a transaction changed is in every index, so that an "eventual" search finds it, too.

        *session_or_token*: a Session, for its last commit, or a `token`; None returns at once. *engine* says where a
        token's transaction is, when this Memory has seen several. Blocks: ``await asyncio.to_thread(memory.wait, …)``.

        Raises DeliveryError after *timeout* seconds (is a relay running?), or when an index refused a key for good.
        """
        txs: Sequence[str] = [session_or_token] if isinstance(session_or_token, str) else []
        if session_or_token is not None and not isinstance(session_or_token, str):
            txs, committed_on = self._capture.committed.get(sync_session(session_or_token), ((), None))
            engine = engine or committed_on
        if txs:
            sync = self._only_engine() if engine is None else self._engines.for_threads(engine)
            require_no_transaction(sync)
            wait_for(sync, txs, self._relays.by_index(), timeout)

    def _only_engine(self) -> Engine:
        known = [engine for engine in self._capture.engines if not engine.dialect.is_async]
        if len(known) != 1:
            raise MemstateError(f"this Memory knows {len(known)} engines: say where the transaction is, with engine=")
        return known[0]

    def verify(
        self, engine: Engine | AsyncEngine, *, repair: bool = False, progress: Progress | None = None
    ) -> DriftReport:
        """Compare every index with the tables by content, in pages.

        *repair* redelivers what differs, and returns when that is done; the report says what was found. An index whose
        files are damaged is made anew. Without *repair* it raises IndexBroken.
        """
        sync, report = self.sync_engine(engine), DriftReport()
        require_no_transaction(sync)
        self._strict.watch(sync)
        intended = partial(self._strict.intended, sync)
        for name, (destination, tracked) in self._relays.by_index().items():
            if repair:
                remake_if_broken(name, destination)
            verify = Verify(sync, name, destination, tracked, intended=intended)
            verify.run(report, repair=repair, progress=progress)
        if repair and not report.clean:
            self._deliver(sync)
        return report

    def _deliver(self, engine: Engine, timeout: float = 30.0) -> None:
        """Deliver what is due: here, or by the relay that holds the lease."""
        self._relays.deliver(engine, self.relay(engine), timeout)

    def doctor(
        self,
        engine: Engine | AsyncEngine,
        *,
        repair: bool = False,
        rows: bool = True,
        progress: Progress | None = None,
    ) -> Diagnosis:
        """Replay the log against the tables, in pages, and look for what would make them differ.

        Without *rows*, only the latter: what is not there, or not as it should be. *repair* logs rows that were changed
        past it, as transactions with the reason "reconciled", and has them delivered. `verify` compares the indexes
        with the tables.
        """
        sync = self.sync_engine(engine)
        require_no_transaction(sync)
        doctor = Doctor(sync, self._registry, self._capture, self._recorder, self._destinations)
        diagnosis = doctor.run(repair=repair, rows=rows, progress=progress)
        if repair:
            self._relays.wake()
        return diagnosis

    def backfill(
        self,
        engine: Engine | AsyncEngine,
        model: type[Any] | Collection[type[Any]] | None = None,
        **options: Unpack[BackfillOptions],
    ) -> int:
        """Log a baseline for each row of *model* that the log lacks, and mark it for delivery.

        It works in batches, alongside live writes, and resumes after an interruption. Calls in other threads and
        processes share the work. On SQLite it pauses after each batch for as long as the batch took, so that others can
        write. Returns the number of baselines that this call logged.

        *model*: a tracked class, or several (default: all).
        *options*: see `BackfillOptions`.
        """
        require_options("backfill", options, BackfillOptions)
        batch_size, rate = options.get("batch_size", 1000), options.get("rate")
        require_count("batch_size", batch_size, "at least 1")
        if rate is not None and not rate > 0:
            raise MemstateError(f"Cannot use rate={rate!r}. Give a number of rows a second, more than 0.")
        sync = self.sync_engine(engine)
        models = [model] if isinstance(model, type) else model
        registered = self._registry.by_entity.values()
        tracked = list(registered) if models is None else [self._registry.of(one) for one in models]
        require_no_transaction(sync)
        worker = Backfill(sync, self._recorder, tracked, batch_size=batch_size, rate=rate)
        worker.begin(restart=options.get("restart"))
        added = worker.run(limit=options.get("limit"), progress=options.get("progress"))
        self._relays.committed(sync)
        return added

    def sweep(self, engine: Engine | AsyncEngine) -> int:
        """Delete the facts that have expired, as ordinary transactions with the reason "expired"; returns how many.

        History keeps them, and rollback counts no sweep as a step; ``rollback(tx=…)`` brings them back. A fact that
        others refer to is left, with a warning in the log.
        """
        sync = self.sync_engine(engine)
        require_no_transaction(sync)
        return self._sweeper.sweep(sync, self._registry.published().values())

    def export_facts(
        self,
        engine: Engine | AsyncEngine,
        file: TextIO,
        models: Sequence[type[Any]] = (),
        *,
        progress: Progress | None = None,
    ) -> int:
        """Write the tracked classes' history (or that of *models*) as JSON lines, all of it as at one moment.

        *file* is a text stream in UTF-8. Rows that the log has not seen are written as baselines, what is tracked no
        more is left out. Returns how many entries of history there were.
        """
        sync = self.sync_engine(engine)
        require_no_transaction(sync)
        tracked = [self._registry.of(model) for model in models] or list(self._registry.by_entity.values())
        return export_import.export_facts(sync, list(dict.fromkeys(tracked)), file, progress)

    def import_facts(
        self, engine: Engine | AsyncEngine, file: Iterable[str], *, progress: Progress | None = None
    ) -> int:
        """Take in what `export_facts` wrote, of this database or another: history, labels and rows, in one transaction.

        The rows are those that the history ends with, in the shape of today, and relays deliver them. Memory is taken
        for a page of them at a time, or for all of a class whose rows refer to each other. Returns how many entries of
        history there were.

        Raises MemstateError, with the number of the line, for a file that is broken or cut off, of another format, or
        of classes that are not tracked; ConflictError when a fact or a transaction of it is there already, or was, or
        when the tables refuse a row. Nothing is written then.
        """
        sync = self.sync_engine(engine)
        require_no_transaction(sync)
        count = export_import.import_facts(sync, self._registry, self._capture, file, progress)
        self._relays.committed(sync)
        return count

    def status(self, engine: Engine | AsyncEngine) -> dict[str, Backlog]:
        """What each index has not been given yet."""
        sync = self.sync_engine(engine)
        require_no_transaction(sync)
        backlogs = {}
        with sync.connect() as connection:
            for name, pending in self._relays.backlogs(connection):
                current = self._succession.current(connection, name)
                backlogs[name] = replace(pending, replaced_by=None if current == name else current)
        return backlogs

    # -- another index or embedder -------------------------------------------------------------------------------------

    def reindex(
        self,
        engine: Engine | AsyncEngine,
        index: str | None = None,
        *,
        timeout: float = math.inf,
        progress: Progress | None = None,
    ) -> str:
        """Fill the successor of *index*, beside it, then have searches ask it, in every process at once.

        *index* may be left out when this Memory's `successors` name one only. Writes and searches go on meanwhile;
        when it is interrupted, run it again: it goes on where it was. The old index is delivered to until a Memory no
        longer has it, so that `reindex_back` is possible. Returns the successor's name.

        Every process that searches has to have a Memory with these *successors* before; one that has not goes on with
        the old index. Raises DeliveryError when the successor is not filled within *timeout* seconds, or refuses facts
        that the old index has; nothing has changed then.
        """
        sync, (name, new_name) = self.sync_engine(engine), self._succession.pair(index)
        tracked = self._registry.published(new_name).values()
        require_no_transaction(sync)
        self._capture.guard(sync)
        relay = self._relays.make(sync, [new_name])
        old, new = ((one, self._destinations[one]) for one in (name, new_name))
        reindex.fill_and_switch(sync, relay, tracked, old, new, timeout=timeout, progress=progress)
        return new_name

    def reindex_back(self, engine: Engine | AsyncEngine, index: str | None = None) -> str:
        """Have searches ask *index* again, which its successor had replaced. Returns its name."""
        sync, (name, _) = self.sync_engine(engine), self._succession.pair(index)
        with sync.begin() as connection:
            reindex.switch_back(connection, name)
        return name

    def forget_index(self, engine: Engine | AsyncEngine, name: str) -> None:
        """Forget what relays know of an index that no application has any more; the outbox no longer waits for it.

        What it holds, its own tools delete; given again, under that name, it is compared with the tables in full. (An
        index that no relay has delivered to for a week is forgotten in any case, see `Retention`.)
        """
        if name in self.indexes:
            raise MemstateError(f"this Memory has the index {name!r}: take it out first")
        with self.sync_engine(engine).begin() as connection:
            reindex.delete_index_state(connection, name)

    # -- erasure -------------------------------------------------------------------------------------------------------

    def erase(self, session: SyncSession, model: type[Any], key: Any, reason: str | None = None) -> int:
        """Forget a fact for good: its row, what the log says it was, its vectors; in the caller's transaction.

        That there was such a key, and when it changed and was erased, stays in the history, as does the key itself,
        and who did it with what *reason*. It cannot be undone; a fact that is added later under the same key is
        another; so is what the row was under an earlier primary key (a change of key is a delete and an insert), which
        is to be erased by that key. Nothing is committed on your behalf. The files hold the bytes until they are
        rewritten: see `purge`.

        Returns how many entries of the log were redacted. Raises NotFound for a key that neither the table nor the log
        has, and ConflictError when other rows refer to the row; those that triggers capture may go along with it, by
        ON DELETE.
        """
        require_label("reason", reason)
        tracked = self._registry.of(model)
        sync = blocking_session(session, "erase")
        self._transaction(sync)
        return self._eraser.erase(sync, tracked, key, reason)

    aerase = AsyncMethod(erase)
    """`erase` for an AsyncSession."""

    def purge(self, engine: Engine | AsyncEngine, timeout: float = 30.0) -> None:
        """After erasures that are committed: have them delivered, and rewrite the files that may still hold the bytes.

        The tables concerned are locked meanwhile (PostgreSQL: VACUUM FULL; SQLite: VACUUM), and an index that is
        replaced by a copy of itself is compared with them again; nothing is embedded anew. What lies elsewhere is not
        reached: backups, replicas, archived WAL, other programs' logs.

        Raises DeliveryError when the deletions are not delivered within *timeout* seconds, and MemstateError when a
        transaction is open for so long that may still read what was erased, or the files of an index are out of reach.
        """
        sync = self.sync_engine(engine)
        require_no_transaction(sync)
        self._deliver(sync, timeout)
        try:
            for index in self.indexes.values():
                if isinstance(index, PurgeableIndex):
                    index.purge()
            self._deliver(sync, timeout)
        finally:
            self._eraser.overwrite(sync, timeout)
