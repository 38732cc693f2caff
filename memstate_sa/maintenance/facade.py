"""`MaintenanceMethods`: the methods of `Memory` that deliver, compare, repair, erase and move."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any, TextIO, Unpack

from sqlalchemy.engine import Engine

from memstate_sa.db.async_methods import AsyncMethod
from memstate_sa.db.sessions import AnySession, SyncSession, blocking_session, sync_session
from memstate_sa.db.sqlite import require_no_transaction
from memstate_sa.errors import DeliveryError, MemstateError
from memstate_sa.indexes.base import PurgeableIndex
from memstate_sa.maintenance import reindex
from memstate_sa.maintenance.backfill import Backfill
from memstate_sa.maintenance.doctor import Diagnosis, Doctor
from memstate_sa.maintenance.erase import Eraser
from memstate_sa.maintenance.expiry import Sweeper
from memstate_sa.maintenance.verify import DriftReport, Verify, remake_if_broken
from memstate_sa.options import BackfillOptions, RelayOptions, require_options
from memstate_sa.relay import Relay
from memstate_sa.relay.backlog import Backlog
from memstate_sa.relay.memory_parts import MemoryParts
from memstate_sa.relay.progress import ProgressOption, reporting
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
        require_options(MaintenanceMethods.relay, options, RelayOptions)
        self._open()
        sync = self.sync_engine(engine)
        self._capture.guard(sync)
        self._strict.watch(sync)
        return self._relays.add(sync, partial(self.sweep, sync), options)

    def _idle_engine(self, engine: Engine | AsyncEngine) -> Engine:
        """The sync engine of *engine*. Raises MemstateError while its only connection has a transaction."""
        sync = self.sync_engine(engine)
        require_no_transaction(sync)
        return sync

    def token(self, session: AnySession) -> str | None:
        """The ``Change.tx`` of the last transaction with tracked changes that *session* committed, or None.

        `wait` takes it, in any process.
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
        """Wait until every index has the changes of a transaction, so that an "eventual" search finds them too.

        This call blocks. In asyncio, use ``await asyncio.to_thread(memory.wait, …)``.

        *session_or_token*: a Session, for its last commit, or a `token`. None returns at once.
        *engine*: the database of the token's transaction, when this Memory has seen several.

        Raises DeliveryError after *timeout* seconds, for example if no relay runs, or if an index refused a key too
        often.
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
            raise MemstateError(f"Cannot tell the database: this Memory knows {len(known)} engines. Give engine=.")
        return known[0]

    def verify(
        self, engine: Engine | AsyncEngine, *, repair: bool = False, progress: ProgressOption = None
    ) -> DriftReport:
        """Compare every index with the tables, by content, and return the differences.

        *repair*: deliver the differing facts again, and wait until that is done. The report lists the differences from
        before. An index with damaged files is emptied and filled. Without *repair*, such an index raises IndexBroken.
        *progress*: a function of the number of compared rows. True shows a progress bar.
        """
        sync, report = self._idle_engine(engine), DriftReport()
        self._strict.watch(sync)
        intended = partial(self._strict.intended, sync)
        for name, (destination, tracked) in self._relays.by_index().items():
            if repair:
                remake_if_broken(name, destination)
            verify = Verify(sync, name, destination, tracked, intended=intended)
            with reporting(progress, f"comparing {name}") as report_progress:
                verify.run(report, repair=repair, progress=report_progress)
        if repair and not report.clean:
            self._deliver(sync)
        return report

    def _deliver(self, engine: Engine, timeout: float = 30.0) -> None:
        """Have the due keys delivered: here, or by the relay that holds the lease."""
        self._relays.deliver(engine, self.relay(engine), timeout)

    def doctor(
        self,
        engine: Engine | AsyncEngine,
        *,
        repair: bool = False,
        rows: bool = True,
        progress: ProgressOption = None,
    ) -> Diagnosis:
        """Compare the log with the tables, and find causes of differences, such as missing tables or triggers.

        `verify` compares the indexes with the tables.

        *repair*: log the rows that other programs changed, as transactions with the reason "reconciled", and have them
        delivered.
        *rows*: False compares no rows, opens no index, and finds only causes. With True, an index with a server is
        opened too. A failure is a problem.
        *progress*: a function of the number of compared rows. True shows a progress bar.
        """
        sync = self._idle_engine(engine)
        doctor = Doctor(sync, self._registry, self._capture, self._recorder, self._destinations)
        with reporting(progress, "comparing") as report:
            diagnosis = doctor.run(repair=repair, rows=rows, progress=report)
        if repair:
            self._relays.wake()
        return diagnosis

    def backfill(
        self,
        engine: Engine | AsyncEngine,
        model: type[Any] | Collection[type[Any]] | None = None,
        **options: Unpack[BackfillOptions],
    ) -> int:
        """Log a baseline for each row of *model* that the log lacks, so that relays deliver it.

        The work is done in batches, alongside live writes, and resumes after an interruption. Calls in other threads
        and processes share it. On SQLite, the call pauses after each batch for as long as the batch took, so that
        others can write. Returns the number of baselines that this call logged.

        *model*: a tracked class, or several (default: all).
        *options*: see `BackfillOptions`.
        """
        require_options(MaintenanceMethods.backfill, options, BackfillOptions)
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
        with reporting(options.get("progress"), "logging baselines") as report:
            added = worker.run(limit=options.get("limit"), progress=report)
        self._relays.committed(sync)
        return added

    def sweep(self, engine: Engine | AsyncEngine) -> int:
        """Delete the expired facts, as ordinary transactions with the reason "expired". Returns their number.

        History keeps them, and ``rollback(tx=…)`` brings them back. Rollback counts no sweep as a step. A fact that
        other rows refer to stays, and a warning is logged.
        """
        sync = self._idle_engine(engine)
        return self._sweeper.sweep(sync, self._registry.published().values())

    def export_facts(
        self,
        engine: Engine | AsyncEngine,
        file: TextIO,
        models: Sequence[type[Any]] = (),
        *,
        progress: ProgressOption = None,
    ) -> int:
        """Write the history of the tracked classes (or of *models*) as JSON lines, all as of one moment.

        A row without a history is written as a baseline. Classes that are no longer tracked are left out. Returns the
        number of entries.

        *file*: a text stream in UTF-8.
        *progress*: a function of the written entries, and of their total. True shows a progress bar.
        """
        from memstate_sa.maintenance import export_import

        sync = self._idle_engine(engine)
        tracked = [self._registry.of(model) for model in models] or list(self._registry.by_entity.values())
        with reporting(progress, "exporting") as report:
            return export_import.export_facts(sync, list(dict.fromkeys(tracked)), file, report)

    def import_facts(
        self, engine: Engine | AsyncEngine, file: Iterable[str], *, progress: ProgressOption = None
    ) -> int:
        """Import a file of `export_facts`, from this or another database: history, labels and rows, in one transaction.

        The rows are the last images of the history, in today's shape, and relays deliver them. Returns the number of
        entries. If rows of a class refer to each other, all its rows are in memory at once.

        *progress*: a function of the read entries, and of their total. True shows a progress bar.

        An error writes nothing. Raises MemstateError, with the number of the line, if the file is broken, incomplete or
        in another format. Raises MemstateError too if a class of the file is not tracked. Raises ConflictError if the
        database has or had one of the facts or transactions, or if a table refuses a row.
        """
        from memstate_sa.maintenance import export_import

        sync = self._idle_engine(engine)
        with reporting(progress, "importing") as report:
            count = export_import.import_facts(sync, self._registry, self._capture, file, report)
        self._relays.committed(sync)
        return count

    def status(self, engine: Engine | AsyncEngine) -> dict[str, Backlog]:
        """The backlog of each index: its undelivered, parked and dead keys."""
        sync = self._idle_engine(engine)
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
        progress: ProgressOption = None,
    ) -> str:
        """Fill the successor of *index* beside it. Then searches in every process ask the successor.

        Writes and searches go on. After an interruption, run it again: it resumes. Relays still deliver to the old
        index, so that `reindex_back` is possible, until no Memory has that index. Returns the successor's name.

        First give every process that searches a Memory with the same ``successors``. A process without them stays with
        the old index.

        *index*: may be left out when only one index has a successor.
        *progress*: a function of the delivered keys, and of the number of rows. True shows a progress bar.

        Raises DeliveryError, and changes nothing, when the successor is not filled within *timeout* seconds, or refuses
        facts that the old index has.
        """
        sync, (name, new_name) = self._idle_engine(engine), self._succession.pair(index)
        tracked = self._registry.published(new_name).values()
        self._capture.guard(sync)
        relay = self._relays.make(sync, [new_name])
        old, new = ((one, self._destinations[one]) for one in (name, new_name))
        with reporting(progress, f"filling {new_name}") as report:
            reindex.fill_and_switch(sync, relay, tracked, old, new, timeout=timeout, progress=report)
        return new_name

    def reindex_back(self, engine: Engine | AsyncEngine, index: str | None = None) -> str:
        """Have searches ask *index* again instead of its successor. Returns the name of *index*."""
        sync, (name, _) = self.sync_engine(engine), self._succession.pair(index)
        with sync.begin() as connection:
            reindex.switch_back(connection, name)
        return name

    def forget_index(self, engine: Engine | AsyncEngine, name: str) -> None:
        """Forget the delivery state of an index that no application has any more. The outbox no longer waits for it.

        The index keeps its points: delete them with its own tools. If a Memory gets it again under that name, it is
        compared with the tables in full. After a week without delivery, relays forget an index by themselves: see
        `Retention`.
        """
        if name in self.indexes:
            raise MemstateError(f"Cannot forget index {name!r}: this Memory has the index {name!r}. Take it out first.")
        with self.sync_engine(engine).begin() as connection:
            reindex.delete_index_state(connection, name)

    # -- erasure -------------------------------------------------------------------------------------------------------

    def erase(self, session: SyncSession, model: type[Any], key: Any, reason: str | None = None) -> int:
        """Erase a fact: its row, its images in the log, and its vectors, in the caller's transaction.

        Commit the session afterwards. An erasure cannot be undone. The history keeps the key, the times of its changes,
        and the erasure with its actor and *reason*. A fact that is added later under the same key is another fact. If
        the row once had another primary key, erase that key too: a change of key is a delete and an insert. The files
        of the database hold the bytes until they are rewritten: see `purge`.

        Returns the number of redacted entries of the log. Raises NotFound for a key that neither the table nor the log
        has. Raises ConflictError when other rows refer to the row, unless ON DELETE deletes them and triggers capture
        that.
        """
        require_label("reason", reason)
        tracked = self._registry.of(model)
        sync = blocking_session(session, "erase")
        self._transaction(sync)
        return self._eraser.erase(sync, tracked, key, reason)

    aerase = AsyncMethod(erase)
    """`erase` for an AsyncSession."""

    def purge(self, engine: Engine | AsyncEngine, timeout: float = 30.0) -> None:
        """Deliver the committed erasures, and rewrite the files that may still hold the erased bytes.

        This call locks the tables while it works (PostgreSQL: VACUUM FULL; SQLite: VACUUM). An index that replaces its
        files by a copy is compared with the tables again, without embedding. Backups, replicas, archived WAL and the
        logs of other programs are out of reach.

        Raises DeliveryError when the deletions are not delivered within *timeout* seconds. Raises MemstateError when an
        open transaction may still read the erased rows after *timeout* seconds. Raises MemstateError, after all other
        work is done, when the files of an index are out of reach: those of a server.
        """
        sync = self._idle_engine(engine)
        self._deliver(sync, timeout)
        try:
            refusals = list(self._purge_indexes())
            self._deliver(sync, timeout)
        finally:
            self._eraser.overwrite(sync, timeout)
        if refusals:
            reasons = " ".join(map(str, refusals))
            raise MemstateError(f"{reasons} The tables, and all other indexes, are purged.") from refusals[0]

    def _purge_indexes(self) -> Iterator[MemstateError]:
        """Rewrite the files of the indexes. Returns an error for each index whose files are out of reach."""
        for index in self.indexes.values():
            try:
                if isinstance(index, PurgeableIndex):
                    index.purge()
            except DeliveryError:
                raise
            except MemstateError as error:
                yield error
