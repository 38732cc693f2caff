"""Our operations as the code of a migration, and the columns of a table as such code can have them.

A column is rendered by what the database stores, never by a type of the application's, which a migration would have to
import and which may be another one when it runs.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from alembic.autogenerate import render
from sqlalchemy import Column, Computed, MetaData, PrimaryKeyConstraint, Table
from sqlalchemy import types as sqltypes
from sqlalchemy.dialects import postgresql, sqlite
from sqlalchemy.engine import Dialect
from sqlalchemy.types import SchemaType, TypeDecorator, TypeEngine

from memstate_sa.db.raw_values import undecorated
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

if TYPE_CHECKING:  # Alembic may be in the middle of importing it: its plugins are loaded then
    from alembic.autogenerate.api import AutogenContext

_DIALECTS: tuple[Dialect, Dialect] = (sqlite.dialect(), postgresql.dialect())  # type: ignore[no-untyped-call]


def stored(type_: TypeEngine[Any]) -> TypeEngine[Any]:
    """*type_* without what the application has wrapped it in, for both databases."""
    if isinstance(type_, sqltypes.ARRAY):
        items: sqltypes.ARRAY[Any] = copy.copy(type_)
        items.item_type = stored(type_.item_type)
        return items
    if isinstance(type_, TypeDecorator) and not type(type_).__module__.startswith("sqlalchemy."):
        on_sqlite, on_postgresql = (stored(undecorated(type_, dialect)) for dialect in _DIALECTS)
        same = repr(on_sqlite) == repr(on_postgresql)
        return on_sqlite if same else on_sqlite.with_variant(on_postgresql, "postgresql")
    public = next(cls for cls in type(type_).__mro__ if _is_public(cls))
    if public is not type(type_) and type(type_).__module__.startswith("sqlalchemy.dialects."):
        return type_.adapt(public)
    return type_.copy() if isinstance(type_, SchemaType) else type_  # it listens to the table that it is in


def _is_public(kind: type) -> bool:
    """Whether users can name the class: ``load_dialect_impl`` may return one that only the dialect knows."""
    return any(getattr(module, kind.__name__, None) is kind for module in (postgresql, sqlite, sqltypes))


def frozen(table: Table, columns: Iterable[Column[Any]]) -> Table:
    """*table* as a migration says it: its name, its key, and *columns* by what is stored."""
    parts: list[Any] = []
    for column in columns:
        generated = column.computed
        computed = [] if generated is None else [Computed(str(generated.sqltext), generated.persisted)]
        parts.append(Column(str(column.name), stored(column.type), *computed))
    key = PrimaryKeyConstraint(*(str(column.name) for column in table.primary_key.columns))
    return Table(str(table.name), MetaData(), *parts, key, schema=table.schema and str(table.schema))


def _render_columns(context: AutogenContext, operation: TrackOp | UntrackOp) -> str:
    sa = context.opts["sqlalchemy_module_prefix"] or ""
    table = operation.table
    arguments = [repr(str(table.name))]
    for column in table.columns:
        computed = column.computed
        arguments.append(
            f"{sa}Column({str(column.name)!r}, {render._repr_type(column.type, context)}"  # noqa: SLF001  # as its own
            + ("" if computed is None else f", {sa}Computed({str(computed.sqltext)!r}, persisted={computed.persisted})")
            + ")"
        )
    key = ", ".join(repr(str(column.name)) for column in table.primary_key.columns)
    arguments += [f"{sa}PrimaryKeyConstraint({key})", f"entity={operation.captured.entity!r}"]
    arguments.append(f"version={operation.captured.version}")
    if operation.only is not None:
        arguments.append(f"only=({operation.only[0]!r}, {list(operation.only[1])!r})")
    if table.schema is not None:
        arguments.append(f"schema={str(table.schema)!r}")
    return _render(context, operation, "\n" + "".join(f"    {argument},\n" for argument in arguments))


def _render(context: AutogenContext, operation: Ours, arguments: str = "") -> str:
    return f"{context.opts['alembic_module_prefix'] or ''}{operation.directive}({arguments})"


def _render_changes(context: AutogenContext, operation: CountingTableOps) -> list[str]:
    first, *others = render._render_modify_table(context, operation)  # noqa: SLF001  # as its own
    option = "table_kwargs={'sqlite_autoincrement': True}"
    return [first.replace(") as batch_op:", f", {option}) as batch_op:"), *others]


def register() -> None:
    """Have autogenerate write them."""
    for captures in (TrackOp, UntrackOp):
        render.renderers.dispatch_for(captures)(_render_columns)
    for of_log in (ProtectLogOp, UnprotectLogOp, KeepIdsOp, RestoreIdsOp):
        render.renderers.dispatch_for(of_log)(_render)
    render.renderers.dispatch_for(CountingTableOps)(_render_changes)
