"""The tables of a mapped class, and checks that each of its rows has one key in them."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise
from typing import Any

from sqlalchemy import (
    BinaryExpression,
    Column,
    ColumnElement,
    Table,
)
from sqlalchemy.ext.declarative import ConcreteBase
from sqlalchemy.orm import (
    Mapper,
)
from sqlalchemy.sql import operators, visitors

from memstate_sa.errors import MemstateError


def inheritance_criterion(mapper: Mapper[Any]) -> ColumnElement[bool] | None:
    """The condition for rows of this class in a table of single-table inheritance. None if all rows are."""
    if mapper.polymorphic_on is None or not mapper.single:
        return None
    return mapper.polymorphic_on.in_([subclass.polymorphic_identity for subclass in mapper.self_and_descendants])


def tables_of(mapper: Mapper[Any]) -> tuple[Table, ...]:
    """The tables of a row of exactly this class. The base class' table comes first."""
    above = tables_of(mapper.inherits) if mapper.inherits is not None and not mapper.concrete else ()
    table: Any = mapper.local_table  # check_tables() makes sure that it is a Table
    return above if table in above else (*above, table)


def image_name(column: Column[Any], root: Table) -> str:
    """The name of *column* in an image. *root* is the first table of the class."""
    table = column.table
    return str(column.name if table is root else f"{table.fullname}.{column.name}")  # it may be a quoted_name


def is_concrete_below(mapper: Mapper[Any], base: Mapper[Any]) -> bool:
    """Whether *mapper* inherits from *base*, but has its rows in other tables."""
    while mapper is not base and mapper.inherits is not None:
        if mapper.concrete:
            return True
        mapper = mapper.inherits
    return False


def check_tables(mapper: Mapper[Any]) -> Table:
    """The table with the keys of the class. Raises MemstateError when a row has no single key."""
    name = mapper.class_.__name__
    tables = tables_of(mapper)
    if not all(isinstance(table, Table) and table.primary_key.columns for table in tables):
        raise MemstateError(
            f"Cannot track {name}: it is not mapped to a table with a primary key. Map it to such a table."
        )
    if issubclass(mapper.class_, ConcreteBase) and not mapper.concrete:
        raise MemstateError(
            f"Cannot track {name}: it is a union of tables (ConcreteBase). Track its subclasses, or use another base."
        )
    if tuple(mapper.primary_key) != tuple(tables[0].primary_key.columns):
        own, its = (", ".join(column.name for column in key) for key in (mapper.primary_key, tables[0].primary_key))
        raise MemstateError(
            f"Cannot track {name}: its mapper has the primary key ({own}), but table {tables[0].fullname} has ({its}). "
            "Map the class by the table's primary key."
        )
    if mapper.single or len(tables) == 1:
        return tables[0]
    keys = [tuple(table.primary_key.columns) for table in tables]
    same = {frozenset((one, other)) for base in mapper.iterate_to_root() for one, other in _equated(base)}
    for above, below in pairwise(keys):
        if len(above) != len(below) or any(frozenset(pair) not in same for pair in zip(above, below, strict=True)):
            raise MemstateError(
                f"Cannot track {name}: its tables are not joined by their primary keys, in the same order. Join them "
                "by their whole primary keys."
            )
    return tables[0]


def _equated(mapper: Mapper[Any]) -> Iterator[tuple[Any, Any]]:
    """The pairs of columns that join the table of a subclass to that of its base class."""
    if mapper.inherit_condition is not None:
        for part in visitors.iterate(mapper.inherit_condition):
            if isinstance(part, BinaryExpression) and part.operator is operators.eq:
                yield part.left, part.right


def check_all_tables(mapper: Mapper[Any], *, by_trigger: bool) -> Table:
    """The table with the keys of *mapper*. Raises MemstateError when it or a subclass cannot be tracked."""
    table = check_tables(mapper)
    for subclass in mapper.self_and_descendants:
        if not is_concrete_below(subclass, mapper):
            check_tables(subclass)
            if by_trigger:
                check_trigger_table(subclass, table)
    return table


def check_trigger_table(mapper: Mapper[Any], table: Table) -> None:
    """Raise MemstateError when a trigger on *table* would not see all parts of a row."""
    if tables_of(mapper) != (table,):
        raise MemstateError(
            f"Cannot capture {mapper.class_.__name__} by triggers: it is in several tables (joined inheritance), and a "
            "trigger sees only one. Track it with capture='session'."
        )
