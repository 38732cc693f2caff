"""The tables of a mapped class, and the checks that its rows can be told apart by them."""

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
    """Which rows of a table shared by single-table inheritance are of this class; None for all of them."""
    if mapper.polymorphic_on is None or not mapper.single:
        return None
    return mapper.polymorphic_on.in_([subclass.polymorphic_identity for subclass in mapper.self_and_descendants])


def tables_of(mapper: Mapper[Any]) -> tuple[Table, ...]:
    """The tables of which a row of exactly this class is made, that of the base class first."""
    above = tables_of(mapper.inherits) if mapper.inherits is not None and not mapper.concrete else ()
    table: Any = mapper.local_table  # check_tables() sees to it that it is one
    return above if table in above else (*above, table)


def image_name(column: Column[Any], root: Table) -> str:
    """What an image calls *column* of a class whose keys are those of *root*."""
    table = column.table
    return str(column.name if table is root else f"{table.fullname}.{column.name}")  # not a quoted_name


def is_concrete_below(mapper: Mapper[Any], base: Mapper[Any]) -> bool:
    """Whether *mapper* has its rows elsewhere than *base*, from which it inherits."""
    while mapper is not base and mapper.inherits is not None:
        if mapper.concrete:
            return True
        mapper = mapper.inherits
    return False


def check_tables(mapper: Mapper[Any]) -> Table:
    """The table that the class has its keys from. Raises MemstateError when its rows cannot be told by them."""
    name = mapper.class_.__name__
    tables = tables_of(mapper)
    if not all(isinstance(table, Table) and table.primary_key.columns for table in tables):
        raise MemstateError(f"{name} is not mapped to a table with a primary key")
    if issubclass(mapper.class_, ConcreteBase) and not mapper.concrete:
        raise MemstateError(f"{name} is a union of tables (ConcreteBase): track its subclasses, or do without it")
    if tuple(mapper.primary_key) != tuple(tables[0].primary_key.columns):
        own, its = (", ".join(column.name for column in key) for key in (mapper.primary_key, tables[0].primary_key))
        raise MemstateError(
            f"{name} is mapped by ({own}), but the primary key of table {tables[0].fullname} is ({its}): a fact has "
            "the key of its row. Map the class by the table's primary key."
        )
    if mapper.single or len(tables) == 1:
        return tables[0]
    keys = [tuple(table.primary_key.columns) for table in tables]
    same = {frozenset((one, other)) for base in mapper.iterate_to_root() for one, other in _equated(base)}
    for above, below in pairwise(keys):
        if len(above) != len(below) or any(frozenset(pair) not in same for pair in zip(above, below, strict=True)):
            raise MemstateError(
                f"the tables of {name} are not joined by their primary keys, in the same order: it cannot be tracked"
            )
    return tables[0]


def _equated(mapper: Mapper[Any]) -> Iterator[tuple[Any, Any]]:
    """The pairs of columns by which a joined subclass' table is joined to that of its base class."""
    if mapper.inherit_condition is not None:
        for part in visitors.iterate(mapper.inherit_condition):
            if isinstance(part, BinaryExpression) and part.operator is operators.eq:
                yield part.left, part.right


def check_all_tables(mapper: Mapper[Any], *, by_trigger: bool) -> Table:
    """The table of the keys of *mapper*, whose subclasses can be tracked along. Raises MemstateError otherwise."""
    table = check_tables(mapper)
    for subclass in mapper.self_and_descendants:
        if not is_concrete_below(subclass, mapper):
            check_tables(subclass)
            if by_trigger:
                check_trigger_table(subclass, table)
    return table


def check_trigger_table(mapper: Mapper[Any], table: Table) -> None:
    """Raise MemstateError when a trigger on *table* would not see all of a row."""
    if tables_of(mapper) != (table,):
        raise MemstateError(
            f"{mapper.class_.__name__} is in several tables (joined inheritance), of which a trigger sees one: track "
            "it with capture='session'"
        )
