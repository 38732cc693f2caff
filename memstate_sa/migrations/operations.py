"""What a migration can do of ours: capture a table by triggers, protect the log, keep ids; or no longer.

Each is frozen: it says all that its SQL is made from, and neither a model nor a database is asked.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable
from typing import Any, ClassVar

from alembic.operations import MigrateOperation, Operations
from alembic.operations.ops import ModifyTableOps
from sqlalchemy import Column, MetaData, PrimaryKeyConstraint, Table

from memstate_sa.capture import append_only, triggers
from memstate_sa.capture.captured_tables import CapturedTable, Only
from memstate_sa.db.dialects import SQLITE, database_of
from memstate_sa.db.tables import log


class Ours(MigrateOperation):
    """An operation of memstate_sa, on the table ``captured.table``."""

    directive: ClassVar[str]

    def to_diff_tuple(self) -> tuple[Any, ...]:
        """As `alembic check` prints it."""
        return (self.directive, self.table.fullname)

    @property
    def table(self) -> Table:
        raise NotImplementedError


class _OfCapture(Ours):
    def __init__(self, captured: CapturedTable, only: Only | None = None) -> None:
        self.captured = captured
        self.only = only

    @property
    def table(self) -> Table:
        return self.captured.table

    @classmethod
    def invoke(
        cls,
        operations: Operations,
        table_name: str,
        *columns: Column[Any] | PrimaryKeyConstraint,
        entity: str,
        version: int = 1,
        only: Only | None = None,
        exclude: Collection[str] = (),
        schema: str | None = None,
    ) -> None:
        """*table_name*, of these *columns*, holds the facts of *entity*. *exclude* names others, which are not logged.

        *version* is the shape of its rows, as for `Memory.track`; *only* a column, and the values that it has in its
        rows, of a table shared by single-table inheritance.
        """
        table = Table(table_name, MetaData(), *columns, schema=schema)
        operations.invoke(cls(CapturedTable.restricted(table, entity, version, only, exclude), only))


class TrackOp(_OfCapture):
    """``op.memstate_track``: triggers log what anybody writes into the table, and have it delivered."""

    directive = "memstate_track"

    def reverse(self) -> UntrackOp:
        return UntrackOp(self.captured, self.only)


class UntrackOp(_OfCapture):
    """``op.memstate_untrack``: they do so no longer. What they have logged stays."""

    directive = "memstate_untrack"

    def reverse(self) -> TrackOp:
        return TrackOp(self.captured, self.only)


class _OfLog(Ours):
    @property
    def table(self) -> Table:
        return log

    @classmethod
    def invoke(cls, operations: Operations) -> None:
        operations.invoke(cls())


class ProtectLogOp(_OfLog):
    """``op.memstate_protect_log``: triggers refuse whoever changes or removes an entry of the log."""

    directive = "memstate_protect_log"

    def reverse(self) -> UnprotectLogOp:
        return UnprotectLogOp()


class UnprotectLogOp(_OfLog):
    """``op.memstate_unprotect_log``: they do so no longer."""

    directive = "memstate_unprotect_log"

    def reverse(self) -> ProtectLogOp:
        return ProtectLogOp()


class KeepIdsOp(_OfLog):
    """``op.memstate_keep_ids``: notes the highest ids that our tables have given out, of rows that are gone, too.

    SQLite's batch mode makes a table anew, which counts from the rows that are there: the next entries of an outbox
    whose entries are all delivered would come below the positions of relays, and never be seen.
    """

    directive = "memstate_keep_ids"

    def reverse(self) -> RestoreIdsOp:
        return RestoreIdsOp()


class RestoreIdsOp(_OfLog):
    """``op.memstate_restore_ids``: they count on from there."""

    directive = "memstate_restore_ids"

    def reverse(self) -> KeepIdsOp:
        return KeepIdsOp()


class CountingTableOps(ModifyTableOps):
    """Changes of a table of ours that SQLite is to give AUTOINCREMENT again, which is not reflected."""

    def reverse(self) -> CountingTableOps:
        return CountingTableOps(self.table_name, super().reverse().ops, schema=self.schema)


_SEQUENCES = "SELECT name, seq FROM sqlite_sequence WHERE name LIKE 'memstate\\_%' ESCAPE '\\'"
_KEEP = ("DROP TABLE IF EXISTS temp.memstate_ids", f"CREATE TEMP TABLE memstate_ids AS {_SEQUENCES}")
_RESTORE = (
    f"INSERT INTO temp.memstate_ids {_SEQUENCES}",
    "DELETE FROM sqlite_sequence WHERE name IN (SELECT name FROM temp.memstate_ids)",
    "INSERT INTO sqlite_sequence (name, seq) SELECT name, max(seq) FROM temp.memstate_ids GROUP BY name",
    "DROP TABLE temp.memstate_ids",
)


def _keep(operations: Operations, _: KeepIdsOp) -> None:
    if database_of(operations.get_context().dialect) is SQLITE:
        _run(operations, _KEEP)


def _restore(operations: Operations, _: RestoreIdsOp) -> None:
    if database_of(operations.get_context().dialect) is SQLITE:
        _run(operations, _RESTORE)


def _track(operations: Operations, operation: TrackOp) -> None:
    context = operations.get_context()
    if context.as_sql:
        _run(operations, triggers.creating(operation.captured, context.dialect))
    else:
        triggers.install(operations.get_bind(), operation.captured)


def _untrack(operations: Operations, operation: UntrackOp) -> None:
    _run(operations, triggers.dropping(operation.captured, operations.get_context().dialect))


def _protect(operations: Operations, _: ProtectLogOp) -> None:
    _run(operations, append_only.creating(database_of(operations.get_context().dialect)))


def _unprotect(operations: Operations, _: UnprotectLogOp) -> None:
    _run(operations, append_only.dropping(database_of(operations.get_context().dialect)))


def _run(operations: Operations, statements: Iterable[str]) -> None:
    """As it is written: ``op.execute`` would take colons for parameters, and double percent signs."""
    context = operations.get_context()
    if not context.as_sql:
        triggers.run(operations.get_bind(), statements)
        return
    for statement in statements:
        context.impl.static_output(statement + context.impl.command_terminator)


def register() -> None:
    """Add them to Alembic's ``op``."""
    implementations: dict[type[Ours], Any] = {
        TrackOp: _track,
        UntrackOp: _untrack,
        ProtectLogOp: _protect,
        UnprotectLogOp: _unprotect,
        KeepIdsOp: _keep,
        RestoreIdsOp: _restore,
    }
    for kind, implementation in implementations.items():
        Operations.register_operation(kind.directive, "invoke")(kind)
        Operations.implementation_for(kind)(implementation)
