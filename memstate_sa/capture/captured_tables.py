"""The tables that triggers capture, as described by a tracked class, a migration or the trigger itself."""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping, Sequence
from typing import Any, NamedTuple, Protocol

from sqlalchemy import Column, ColumnElement, Table, inspect
from sqlalchemy.engine import Dialect

from memstate_sa.errors import MemstateError
from memstate_sa.tracking.inheritance import inheritance_criterion
from memstate_sa.tracking.tracked import TRACKED

_HEADER = "-- memstate_sa "


class Capturable(Protocol):
    """The source of a table's triggers: a tracked class, or a table that a migration names."""

    @property
    def table(self) -> Table: ...
    @property
    def entity(self) -> str: ...
    @property
    def version(self) -> int: ...
    @property
    def criterion(self) -> ColumnElement[bool] | None: ...
    @property
    def excluded(self) -> Collection[str]: ...


Only = tuple[str, Sequence[Any]]
"""A discriminator column, and its driver-level values for one class of single-table inheritance."""


class CapturedTable(NamedTuple):
    """A table that triggers capture."""

    table: Table
    entity: str
    version: int = 1
    criterion: ColumnElement[bool] | None = None
    excluded: Collection[str] = ()

    @classmethod
    def restricted(
        cls, table: Table, entity: str, version: int, only: Only | None, excluded: Collection[str] = ()
    ) -> CapturedTable:
        criterion = None if only is None else table.columns[only[0]].in_(only[1])
        return cls(table, entity, version, criterion, excluded)


def captured_in(table: Table) -> dict[str, CapturedTable]:
    """The classes that triggers on *table* capture, by entity, as `Memory.track` recorded them."""
    return {
        entity: CapturedTable(table, entity, version, inheritance_criterion(inspect(model)), excluded)
        for entity, (model, version, excluded) in table.metadata.info.get(TRACKED, {}).get(table.fullname, {}).items()
    }


def restriction(captured: Capturable, dialect: Dialect) -> Only | None:
    """The criterion of *captured* as data, or None if triggers capture the whole table."""
    if captured.criterion is None:
        return None
    column, values = captured.criterion.left, captured.criterion.right.value
    if not isinstance(column, Column):
        raise MemstateError(
            f"Cannot capture {captured.entity} by triggers: its polymorphic_on is an expression, and triggers need a "
            f"column of {captured.table.fullname}. Map polymorphic_on to a column."
        )
    bind = column.type.dialect_impl(dialect).bind_processor(dialect)
    return str(column.name), list(values if bind is None else map(bind, values))


def header(captured: Capturable, dialect: Dialect) -> str:
    """The first line of a trigger. This comment describes the trigger, so that a downgrade can create it again."""
    parts: dict[str, Any] = {"entity": captured.entity, "version": captured.version}
    parts["only"] = restriction(captured, dialect)
    if captured.excluded:
        parts["exclude"] = sorted(captured.excluded)
    return f"{_HEADER}{json.dumps(parts)}"


def read_header(source: str) -> Mapping[str, Any] | None:
    """The description in a trigger's *source*, as `header` wrote it. None when the trigger has none, or is not ours."""
    line = next((line for line in source.splitlines() if line.startswith(_HEADER)), None)
    return None if line is None else json.loads(line.removeprefix(_HEADER))


class Trigger(NamedTuple):
    """A trigger on a table. ``source`` is its text in the database's catalog, which shows whether it is up to date."""

    name: str
    source: str
    statements: tuple[str, ...]
