"""`MaintenanceMethods`: the methods of `MemoryStore` that undo, erase, compare, deliver and move facts."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import TextIO, Unpack

from memstate_sa.fact import Fact
from memstate_sa.log.changes import Changes
from memstate_sa.maintenance.doctor import Diagnosis
from memstate_sa.maintenance.verify import DriftReport
from memstate_sa.options import BackfillOptions, RevokeOptions, RollbackOptions
from memstate_sa.relay.backlog import Backlog
from memstate_sa.relay.progress import ProgressOption
from memstate_sa.store.parts import StoreParts
from memstate_sa.tracking.fact_types import check_id
from memstate_sa.undo.undo import Revocation


class MaintenanceMethods(StoreParts):
    """The methods of `MemoryStore` for undo and upkeep. Each calls the method of `Memory` with the same name."""

    def rollback(self, steps: int = 1, session_id: str | None = None, **options: Unpack[RollbackOptions]) -> Changes:
        """Undo the last *steps* transactions, of all or of one session, and return the new entries.

        See `Memory.rollback`, and `RollbackOptions` for the *options*.

        ::

            store.rollback()  # undoes the last transaction
            store.rollback(tx=store.token(id), on_conflict="skip")
        """
        with self.transaction() as session:
            return self.memory.rollback(session, steps, session_id=session_id, **options)

    def revoke(self, **options: Unpack[RevokeOptions]) -> Revocation:
        """Undo all changes of one actor, of one session, or of some transactions.

        By default, facts that others have changed since stay as they are. The result lists them. See `Memory.revoke`,
        and `RevokeOptions` for the *options*.
        """
        with self.transaction() as session:
            return self.memory.revoke(session, **options)

    # -- erasure ---------------------------------------------------------------------------------------------------

    def erase(self, id: str, *, reason: str | None = None) -> int:
        """Erase fact *id*, its images in the history and its vectors. No undo brings it back; see `Memory.erase`.

        Returns the number of redacted entries of the log. Raises NotFound if there never was such a fact. Call `purge`
        to rewrite the files too.
        """
        check_id(id)
        with self.transaction() as session:
            return self.memory.erase(session, Fact, id, reason=reason)

    def purge(self, timeout: float = 30.0) -> None:
        """Rewrite the files that may still hold bytes of erased facts; see `Memory.purge`."""
        with self._using_engine() as engine:
            self.memory.purge(engine, timeout)

    def sweep(self) -> int:
        """Delete the expired facts, and return their number; see `Memory.sweep`. A running relay does it too."""
        with self._changing_by_engine() as engine:
            return self.memory.sweep(engine)

    # -- the index -------------------------------------------------------------------------------------------------

    def wait(self, token: str | None, timeout: float = 30.0) -> None:
        """Wait until every index has the changes of a transaction, so that an "eventual" search finds them.

        *token* is the result of `token`, or a ``Change.tx``. None returns at once. Raises DeliveryError after *timeout*
        seconds, or when an index refused a key too often.

        ::

            store.wait(store.token(id))
        """
        with self._using_engine() as engine:
            if self._drains and token is not None:  # no relay runs, and a commit may have failed to deliver
                self.relay.drain(timeout)
            self.memory.wait(token, timeout, engine=engine)

    def status(self) -> dict[str, Backlog]:
        """The undelivered changes of each index, by its name."""
        with self._using_engine() as engine:
            return self.memory.status(engine)

    def verify(self, *, repair: bool = False, progress: ProgressOption = None) -> DriftReport:
        """Compare every index with the facts, by content; see `Memory.verify`. *repair* mends the indexes."""
        with self._using_engine() as engine:
            return self.memory.verify(engine, repair=repair, progress=progress)

    def doctor(self, *, repair: bool = False, rows: bool = True, progress: ProgressOption = None) -> Diagnosis:
        """Compare the log with the facts, and find missing tables and triggers; see `Memory.doctor`."""
        with self._changing_by_engine() as engine:
            return self.memory.doctor(engine, repair=repair, rows=rows, progress=progress)

    def backfill(self, **options: Unpack[BackfillOptions]) -> int:
        """Log the facts that the log does not have, and record the ``unique_by`` values of older facts.

        Call it when `register_schema` got a new ``unique_by``. *options*: see `BackfillOptions`. Returns the number of
        facts that the log did not have; see `Memory.backfill`.
        """
        with self._changing_by_engine() as engine:
            return self.memory.backfill(engine, Fact, **options)

    def reindex(self, index: str | None = None, *, timeout: float = math.inf, progress: ProgressOption = None) -> str:
        """Fill the successor of *index*, then have all searches use it. Returns the successor's name.

        Give the store ``successors=``. *index* can be left out if only one index has a successor. See `Memory.reindex`.
        """
        with self._using_engine() as engine:
            return self.memory.reindex(engine, index, timeout=timeout, progress=progress)

    def reindex_back(self, index: str | None = None) -> str:
        """Have all searches use *index* again, and not its successor. Returns the name of *index*."""
        with self._using_engine() as engine:
            return self.memory.reindex_back(engine, index)

    # -- other databases -------------------------------------------------------------------------------------------

    def export_facts(self, file: TextIO, *, progress: ProgressOption = None) -> int:
        """Write the history of all facts to *file* as JSON lines, and return the number of entries.

        See `Memory.export_facts`.
        """
        with self._using_engine() as engine:
            return self.memory.export_facts(engine, file, progress=progress)

    def import_facts(self, file: Iterable[str], *, progress: ProgressOption = None) -> int:
        """Add the facts of an export, with their history, and return the number of entries.

        See `Memory.import_facts`.
        """
        with self._changing_by_engine() as engine:
            return self.memory.import_facts(engine, file, progress=progress)
