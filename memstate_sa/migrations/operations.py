"""Our operations for migrations: capture a table by triggers, protect the log, keep ids, and the reverse of each.

An operation is complete in itself: its SQL depends on its arguments only, never on a model or the database.
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
        """The form in which `alembic check` prints the operation."""
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
        """Run the operation for *table_name*, whose *columns* hold the facts of *entity*.

        *exclude* names further columns, which are not logged. *version* is the shape of the rows, as in `Memory.track`.
        If single-table inheritance shares the table, *only* is the discriminator column and its values for *entity*.
        """
        table = Table(table_name, MetaData(), *columns, schema=schema)
        operations.invoke(cls(CapturedTable.restricted(table, entity, version, only, exclude), only))


class TrackOp(_OfCapture):
    """``op.memstate_track``: create triggers that log every write to the table, and put its key into the outbox."""

    directive = "memstate_track"

    def reverse(self) -> UntrackOp:
        return UntrackOp(self.captured, self.only)


class UntrackOp(_OfCapture):
    """``op.memstate_untrack``: drop the triggers of ``op.memstate_track``. The log keeps its entries."""

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
    """``op.memstate_protect_log``: create triggers that refuse to change or remove an entry of the log."""

    directive = "memstate_protect_log"

    def reverse(self) -> UnprotectLogOp:
        return UnprotectLogOp()


class UnprotectLogOp(_OfLog):
    """``op.memstate_unprotect_log``: drop the triggers of ``op.memstate_protect_log``."""

    directive = "memstate_unprotect_log"

    def reverse(self) -> ProtectLogOp:
        return ProtectLogOp()


class KeepIdsOp(_OfLog):
    """``op.memstate_keep_ids``: save the highest ids that our tables have used, including those of deleted rows.

    SQLite's batch mode recreates a table, and the new table counts from the ids of the present rows. The outbox may
    have no rows left. Its next ids would then be below the positions of relays, which would never see them.
    """

    directive = "memstate_keep_ids"

    def reverse(self) -> RestoreIdsOp:
        return RestoreIdsOp()


class RestoreIdsOp(_OfLog):
    """``op.memstate_restore_ids``: continue with the ids that ``op.memstate_keep_ids`` has saved."""

    directive = "memstate_restore_ids"

    def reverse(self) -> KeepIdsOp:
        return KeepIdsOp()


class CountingTableOps(ModifyTableOps):
    """Changes of one of our tables with AUTOINCREMENT. Reflection does not see AUTOINCREMENT, so it is set again."""

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
    """Run *statements* unchanged. ``op.execute`` would read colons as parameters, and would double percent signs."""
    context = operations.get_context()
    if not context.as_sql:
        triggers.run(operations.get_bind(), statements)
        return
    for statement in statements:
        context.impl.static_output(statement + context.impl.command_terminator)


def register() -> None:
    """Add our operations to Alembic's ``op``."""
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
