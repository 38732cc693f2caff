"""Our part of autogenerate: find the triggers that a revision must change, and keep our tables out of it.

It compares the database with the application's models. `Memory.track` describes them in the ``info`` of the MetaData,
and each trigger in the database begins with a description.

If a captured table changes, the revision drops its triggers first and creates them again afterwards. There are three
reasons:

1. A trigger must not name a dropped column.
2. SQLite's batch mode silently drops triggers.
3. A trigger must log the new columns.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

from alembic.operations import ops
from sqlalchemy import Identity, MetaData, Table, inspect
from sqlalchemy.engine import Connection

from memstate_sa.capture import append_only, triggers
from memstate_sa.capture.captured_tables import CapturedTable, captured_in, read_header, restriction
from memstate_sa.db.amendments import RENAMED
from memstate_sa.db.dialects import SQLITE, database_of
from memstate_sa.db.rows import logged_columns
from memstate_sa.db.tables import log, outbox, trigger_context
from memstate_sa.indexes.pgvector_statements import COLUMNS
from memstate_sa.migrations import is_ours
from memstate_sa.migrations.operations import (
    CountingTableOps,
    KeepIdsOp,
    Ours,
    ProtectLogOp,
    RestoreIdsOp,
    TrackOp,
    UnprotectLogOp,
    UntrackOp,
)
from memstate_sa.migrations.rendering import frozen

if TYPE_CHECKING:  # Alembic loads its plugins while it imports this module, so only types import it
    from alembic.autogenerate.api import AutogenContext

Name = tuple[str | None, str]
"""Schema and name of a table. The default schema is None."""

_NAMED = (log, outbox, trigger_context)
"""The tables that triggers refer to. SQLite's batch mode cannot recreate them while such a trigger exists."""


class _Changes(NamedTuple):
    """The changes that Alembic has found: changes within each table, created tables and dropped tables."""

    of: Mapping[Name, list[ops.MigrateOperation]]
    created: frozenset[Name]
    dropped: frozenset[Name]

    @classmethod
    def read(cls, operations: list[ops.MigrateOperation]) -> _Changes:
        of: dict[Name, list[ops.MigrateOperation]] = {}
        for op in operations:
            if isinstance(op, ops.ModifyTableOps) and (altering := _altering(op)):
                of[op.schema, op.table_name] = altering
        created = frozenset((op.schema, op.table_name) for op in operations if isinstance(op, ops.CreateTableOp))
        dropped = frozenset((op.schema, op.table_name) for op in operations if isinstance(op, ops.DropTableOp))
        return cls(of, created, dropped)

    def are_of(self, *tables: Table) -> bool:
        """Whether one of our *tables* changes, or replaces a table with an older name."""
        return self.rename(*tables) or any((table.schema, table.name) in self.of for table in tables)

    def rename(self, *tables: Table) -> bool:
        """Whether one of our *tables* replaces a table with an older name."""
        return any((table.schema, name) in self.dropped for name, table in RENAMED.items() if table in tables)


def compare(context: AutogenContext, upgrade_ops: ops.UpgradeOps, schemas: set[str | None]) -> None:
    """Correct *upgrade_ops*, and add our operations. Alembic runs this comparator after its own."""
    operations = upgrade_ops.ops
    connection = context.connection
    assert connection is not None
    comparison = _Comparison(context, connection, _tables_of_points(operations))
    operations[:] = [op for op in map(comparison.sifted, operations) if op is not None]
    before: list[ops.MigrateOperation] = []
    after: list[ops.MigrateOperation] = []
    for undo, redo in comparison.run(_Changes.read(operations), schemas):
        before += [] if undo is None else [undo]
        after += [] if redo is None else [redo]
    operations[:] = [*before, *operations, *after]


class _Comparison:
    """The comparison of a database with the metadata of an application."""

    def __init__(self, context: AutogenContext, connection: Connection, points: frozenset[Name]) -> None:
        """*points* are the names of the tables that hold the points of a PgVectorIndex."""
        self._context = context
        self._connection = connection
        self._points = points
        self._default_schema = connection.dialect.default_schema_name
        self._tables = {self._name(table): table for table in context.sorted_tables}

    def _name(self, table: Table) -> Name:
        return (None if table.schema == self._default_schema else table.schema, table.name)

    def sifted(self, op: ops.MigrateOperation) -> ops.MigrateOperation | None:
        """*op* without changes that would damage our tables, or None if no change is left.

        An application must not drop our tables, in any schema. If its metadata lacks them, our own migrations create
        them. On SQLite, changes to IDENTITY are left out: SQLite has none, so ``compare_server_default`` would report
        one each time.
        """
        if not isinstance(op, (ops.DropTableOp, ops.ModifyTableOps)):
            return op
        if (op.schema, op.table_name) in self._points:
            return None
        if not is_ours(op.table_name):
            return op
        table = self._tables.get((op.schema, op.table_name))
        if table is None:
            return op if self._is_replaced(op) else None
        if isinstance(op, ops.ModifyTableOps):
            if database_of(self._connection) is SQLITE:
                op.ops = [part for part in op.ops if not _is_identity(part)]
            if table.dialect_options["sqlite"]["autoincrement"] and _altering(op):
                return CountingTableOps(op.table_name, op.ops, schema=op.schema)
            return op if op.ops else None
        return op

    def _is_replaced(self, op: ops.MigrateOperation) -> bool:
        """Whether *op* drops one of our tables that has another name in the metadata of the application."""
        if not isinstance(op, ops.DropTableOp) or op.table_name not in RENAMED:
            return False
        return (op.schema, str(RENAMED[op.table_name].name)) in self._tables

    def run(self, changes: _Changes, schemas: set[str | None]) -> Iterator[tuple[Ours | None, Ours | None]]:
        """Pairs of operations: the first runs before the changes, the second after them."""
        if changes.are_of(log, outbox):
            yield KeepIdsOp(), RestoreIdsOp()
        yield self._log(changes)
        everywhere = triggers.everywhere(self._connection)
        everywhere.pop(self._name(log), None)
        installed = {
            name: triggers_
            for name, triggers_ in everywhere.items()
            if name[0] in schemas and (name in self._tables or name in changes.dropped) and self._is_included(name)
        }
        captured = {
            name: entities
            for name, table in self._tables.items()
            if (entities := captured_in(table)) and self._is_included(name)
        }
        for name in sorted({*installed, *captured}, key=lambda name: (name[0] or "", name[1])):
            yield from self._table(name, installed.get(name, {}), captured.get(name, {}), changes)
        is_sqlite = database_of(self._connection) is SQLITE
        if changes.rename(*_NAMED) or (is_sqlite and changes.are_of(*_NAMED)):
            for name in sorted(everywhere.keys() - installed.keys() - captured.keys()):  # env.py excludes these tables
                for header in _headers(everywhere[name]).values():
                    untrack = UntrackOp(*self._old(name, header, changes))
                    yield untrack, untrack.reverse()

    def _is_included(self, name: Name) -> bool:
        """Whether env.py's filters include the table."""
        table = self._tables.get(name)
        in_database = self._context.run_name_filters(name[1], "table", {"schema_name": name[0]})
        return in_database and (
            table is None or self._context.run_object_filters(table, table.name, "table", False, None)
        )

    def _log(self, changes: _Changes) -> tuple[Ours | None, Ours | None]:
        if changes.are_of(log, trigger_context):
            return UnprotectLogOp() if triggers.installed(self._connection, log) else None, ProtectLogOp()
        name = self._name(log)
        is_there = inspect(self._connection).has_table(log.name) and self._is_included(name)
        is_missed = (is_there or name in changes.created) and append_only.missing(self._connection)
        return None, ProtectLogOp() if is_missed else None

    def _table(
        self, name: Name, sources: Mapping[str, str], captured: Mapping[str, CapturedTable], changes: _Changes
    ) -> Iterator[tuple[Ours | None, Ours | None]]:
        old = _headers(sources)
        for entity in sorted({*old, *captured}):
            new = captured.get(entity)
            if new is not None:
                # This raises an error if triggers cannot log a part of the model.
                triggers.creating(new, self._connection.dialect)
                only = restriction(new, self._connection.dialect)
                columns = frozen(new.table, logged_columns(new.table, new.excluded))
                new = CapturedTable.restricted(columns, new.entity, new.version, only, new.excluded)
                is_same = bool(sources) and _is_installed(self._connection, sources, new)
                if is_same and name not in changes.of and not changes.are_of(*_NAMED):
                    continue
            undo = UntrackOp(*self._old(name, old[entity], changes)) if entity in old else None
            yield undo, None if new is None else TrackOp(new, only)

    def _old(self, name: Name, header: Mapping[str, Any], changes: _Changes) -> tuple[CapturedTable, Any]:
        """The captured table for which the installed triggers were made.

        The type of a column comes from the mapping unless it changes now, because the database knows less about it.
        """
        reflected = Table(name[1], MetaData(), schema=name[0], autoload_with=self._connection, resolve_fks=False)
        altered = {
            op.column_name
            for op in changes.of.get(name, ())
            if isinstance(op, ops.AlterColumnOp) and op.modify_type is not None
        }
        mapped = {} if name not in self._tables else {c.name: c for c in self._tables[name].columns}
        excluded = header.get("exclude", ())
        logged = [c for c in reflected.columns if c.name not in excluded]
        columns = [c if c.name in altered else mapped.get(c.name, c) for c in logged]
        only = None if header["only"] is None else (header["only"][0], header["only"][1])
        table = frozen(reflected, columns)
        return CapturedTable.restricted(table, header["entity"], header["version"], only, excluded), only


def _tables_of_points(operations: list[ops.MigrateOperation]) -> frozenset[Name]:
    """The dropped tables that have the columns of a PgVectorIndex, in any schema and under any name."""
    dropped = (op for op in operations if isinstance(op, ops.DropTableOp))
    return frozenset(
        (op.schema, op.table_name) for op in dropped if {column.name for column in op.to_table().columns} == COLUMNS
    )


def _altering(changes: ops.ModifyTableOps) -> list[ops.MigrateOperation]:
    """The operations for which SQLite may have to recreate the table."""
    return [op for op in changes.ops if not isinstance(op, (ops.CreateIndexOp, ops.DropIndexOp))]


def _headers(sources: Mapping[str, str]) -> dict[str, Mapping[str, Any]]:
    """The descriptions at the beginning of a table's triggers, by entity."""
    headers = filter(None, map(read_header, sources.values()))
    return {header["entity"]: header for header in headers}


def _is_identity(op: ops.MigrateOperation) -> bool:
    return isinstance(op, ops.AlterColumnOp) and isinstance(op.modify_server_default, Identity)


def _is_installed(connection: Connection, sources: Mapping[str, str], captured: CapturedTable) -> bool:
    """Whether *sources* (by name) contain every trigger of *captured*, unchanged."""
    return all(sources.get(trigger.name) == trigger.source for trigger in triggers.triggers(connection, captured))
