"""Render our operations, and the columns of their tables, as code of a migration.

A column is rendered with a standard type for its stored values, never with a type of the application. A migration would
have to import that type, and it may have changed when the migration runs.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from alembic.autogenerate import render
from sqlalchemy import Column, Computed, MetaData, PrimaryKeyConstraint, Table, types as sqltypes
from sqlalchemy.dialects import postgresql, sqlite
from sqlalchemy.engine import Dialect
from sqlalchemy.types import SchemaType, TypeEngine, UserDefinedType

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

if TYPE_CHECKING:  # Alembic loads its plugins while it imports this module, so only types import it
    from alembic.autogenerate.api import AutogenContext

_DIALECTS: tuple[Dialect, Dialect] = (sqlite.dialect(), postgresql.dialect())  # type: ignore[no-untyped-call]


def stored(type_: TypeEngine[Any]) -> TypeEngine[Any]:
    """A type of SQLAlchemy that both databases store in the same way as *type_*."""
    on_sqlite, on_postgresql = (_plain(undecorated(type_, dialect)) for dialect in _DIALECTS)
    same = repr(on_sqlite) == repr(on_postgresql)
    return on_sqlite if same else on_sqlite.with_variant(on_postgresql, "postgresql")


def _plain(type_: TypeEngine[Any]) -> TypeEngine[Any]:
    """*type_* as the nearest standard type, or NullType if there is none. PostgreSQL's triggers read both as text."""
    standard = next(filter(_is_standard, type(type_).__mro__), sqltypes.NullType)
    if standard is sqltypes.NullType:
        return sqltypes.NullType()
    # copy.copy is not enough for a SchemaType: it listens to events of its table.
    plain = type_.copy() if isinstance(type_, SchemaType) else copy.copy(type_)
    if standard is not type(type_):
        plain = plain.adapt(standard)
    vars(plain).pop("_variant_mapping", None)
    if isinstance(plain, sqltypes.ARRAY):
        plain.item_type = stored(plain.item_type)
        return sqltypes.NullType() if isinstance(plain.item_type, sqltypes.NullType) else plain
    return plain


def _is_standard(kind: type) -> bool:
    """Whether *kind* is a type of SQLAlchemy that determines how values are stored."""
    if kind in (TypeEngine, UserDefinedType):
        return False
    return kind is postgresql.INTERVAL or (issubclass(kind, TypeEngine) and vars(sqltypes).get(kind.__name__) is kind)


def _render_type(context: AutogenContext, type_: TypeEngine[Any]) -> str:
    """The code for *type_*, a result of `stored`. Alembic's own code lacks the module for the items of an array."""
    sa = context.opts["sqlalchemy_module_prefix"] or ""
    text = repr(type_)
    if isinstance(type_, sqltypes.ARRAY):
        text = text.replace(repr(type_.item_type), _render_type(context, type_.item_type), 1)
    if isinstance(type_, postgresql.INTERVAL):
        context.imports.add("from sqlalchemy.dialects import postgresql")
        text = f"postgresql.{text}"
    else:
        text = f"{sa}types.{text}" if isinstance(type_, sqltypes.NullType) else f"{sa}{text}"
    variants = type_._variant_mapping.items()  # noqa: SLF001  # SQLAlchemy has no public way
    return text + "".join(f".with_variant({_render_type(context, other)}, {name!r})" for name, other in variants)


def frozen(table: Table, columns: Iterable[Column[Any]]) -> Table:
    """*table* for a migration: its name, its key, and *columns* with their `stored` types."""
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
            f"{sa}Column({str(column.name)!r}, {_render_type(context, column.type)}"
            + ("" if computed is None else f", {sa}Computed({str(computed.sqltext)!r}, persisted={computed.persisted})")
            + ")"
        )
    key = ", ".join(repr(str(column.name)) for column in table.primary_key.columns)
    arguments += [f"{sa}PrimaryKeyConstraint({key})", f"entity={operation.captured.entity!r}"]
    arguments.append(f"version={operation.captured.version}")
    if operation.only is not None:
        arguments.append(f"only=({operation.only[0]!r}, {list(operation.only[1])!r})")
    if operation.captured.excluded:
        arguments.append(f"exclude={sorted(operation.captured.excluded)!r}")
    if table.schema is not None:
        arguments.append(f"schema={str(table.schema)!r}")
    return _render(context, operation, "\n" + "".join(f"    {argument},\n" for argument in arguments))


def _render(context: AutogenContext, operation: Ours, arguments: str = "") -> str:
    return f"{context.opts['alembic_module_prefix'] or ''}{operation.directive}({arguments})"


def _render_changes(context: AutogenContext, operation: CountingTableOps) -> list[str]:
    first, *others = render._render_modify_table(context, operation)  # noqa: SLF001  # as Alembic renders them
    option = "table_kwargs={'sqlite_autoincrement': True}"
    return [first.replace(") as batch_op:", f", {option}) as batch_op:"), *others]


def register() -> None:
    """Teach autogenerate to write our operations."""
    for captures in (TrackOp, UntrackOp):
        render.renderers.dispatch_for(captures)(_render_columns)
    for of_log in (ProtectLogOp, UnprotectLogOp, KeepIdsOp, RestoreIdsOp):
        render.renderers.dispatch_for(of_log)(_render)
    render.renderers.dispatch_for(CountingTableOps)(_render_changes)
