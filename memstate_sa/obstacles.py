"""What stands in the way of an undo, told before it is tried: rows that refer, that are missing, or that hold a value.

The database would only say that it refuses. For tracked tables this says which fact refuses, so that whoever changed it
can be named.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, TypeAlias

from sqlalchemy import Column, ForeignKeyConstraint, Table
from sqlalchemy.engine import Connection

from memstate_sa.changes import FactKey, Image
from memstate_sa.codec import decode, decode_key, encode_key
from memstate_sa.registry import Registry
from memstate_sa.restore import unique_columns, wanted_rows

Obstacles: TypeAlias = dict[FactKey, FactKey | None]
"""Facts that cannot be as they are wanted, each with a fact because of which; None: of a row that no key tells."""


def find_obstacles(connection: Connection, registry: Registry, final: Mapping[FactKey, Image | None]) -> Obstacles:
    """Those that foreign keys and unique values put in the way of *final*."""
    search = _Search(connection, registry, final)
    for table in search.wanted:
        search.look_for_references(table)
        search.look_for_parents(table)
        search.look_for_values(table)
    return search.found


class _Search:
    def __init__(self, connection: Connection, registry: Registry, final: Mapping[FactKey, Image | None]) -> None:
        self._connection = connection
        self._registry = registry
        self.wanted = wanted_rows(connection, registry, final)
        self._there: dict[Table, Mapping[str, Image]] = {}
        self.found: Obstacles = {}

    def _columns(self, table: Table) -> Any:
        return self._registry.by_table[table].on(self._connection.dialect).of_table[table]

    def _now(self, table: Table) -> Mapping[str, Image]:
        """The rows as they are, read when they are first asked for: of most tables nothing has to be known."""
        if table not in self._there:
            keys = [decode_key(key) for key in self.wanted[table]]
            self._there[table] = self._columns(table).read(self._connection, keys)
        return self._there[table]

    def _fact(self, table: Table, key: str) -> FactKey:
        return self._registry.by_table[table].entity, key

    def look_for_references(self, table: Table) -> None:
        """Rows of others that refer to one that is to go, or whose value they refer to is to change."""
        leaving = [
            (other, fk, values)
            for other in list(self._registry.by_table)
            for fk in other.foreign_key_constraints
            if fk.referred_table is table and (values := self._leaving_values(table, fk))
        ]
        if leaving:
            keys = sorted({key for _, _, values in leaving for key in values.values()})
            self._columns(table).lock(self._connection, [decode_key(key) for key in keys], leaving=True)
        for other, fk, values in leaving:
            local, _ = _columns_of(fk)
            for key, value in self._columns(other).find(self._connection, local, list(values)):
                after = self.wanted.get(other, {}).get(key, self)
                refers = after is self or (isinstance(after, Mapping) and _values(after, local) == value)
                if refers and value in values:
                    self.found.setdefault(self._fact(table, values[value]), self._fact(other, key))

    def _leaving_values(self, table: Table, fk: ForeignKeyConstraint) -> dict[tuple[Any, ...], str]:
        """What can be referred to by *fk* now, and cannot then; and the rows that have it."""
        _, remote = _columns_of(fk)
        staying = {_values(image, remote) for image in self.wanted[table].values() if image is not None}
        return {
            value: key
            for key, image in self._now(table).items()
            if (value := _values(image, remote)) is not None and value not in staying
        }

    def look_for_parents(self, table: Table) -> None:
        """Rows that those of *table* are to refer to, and that are not there."""
        for fk in table.foreign_key_constraints:
            parent = fk.referred_table
            if parent not in self._registry.by_table:
                continue
            local, remote = _columns_of(fk)
            needed = self._new_values(table, local)
            if not needed:
                continue
            after = self.wanted.get(parent, {})
            provided = {_values(image, remote) for image in after.values() if image is not None}
            there = self._columns(parent).find(self._connection, remote, list(needed))
            provided |= {value for key, value in there if key not in after}
            is_key = [column.name for column in remote] == [c.name for c in parent.primary_key.columns]
            for value, keys in needed.items():
                # Asked by itself: a collation may find it in another form.
                if value not in provided and all(
                    key in after for key, _ in self._columns(parent).find(self._connection, remote, [value])
                ):
                    by = self._fact(parent, encode_key(value)) if is_key else None
                    self.found.update({self._fact(table, key): by for key in keys})

    def look_for_values(self, table: Table) -> None:
        """Rows that have a unique value which one of *table* is to get."""
        for columns in unique_columns(table, partial=False):
            needed = self._new_values(table, columns)
            for other, value in self._columns(table).find(self._connection, columns, list(needed)) if needed else ():
                after = self.wanted[table].get(other, self)
                keeps = after is self or (isinstance(after, Mapping) and _values(after, columns) == value)
                for key in needed.get(value, ()):
                    if keeps and key != other:
                        self.found[self._fact(table, key)] = self._fact(table, other)

    def _new_values(self, table: Table, columns: Sequence[Column[Any]]) -> dict[tuple[Any, ...], list[str]]:
        """The values, without NULL, that rows are to get in *columns* and do not have, and which rows."""
        found: dict[tuple[Any, ...], list[str]] = {}
        there = self._now(table)
        for key, image in self.wanted[table].items():
            value = None if image is None else _values(image, columns)
            now = there.get(key)
            if value is not None and (now is None or _values(now, columns) != value):
                found.setdefault(value, []).append(key)
        return found


def _columns_of(fk: ForeignKeyConstraint) -> tuple[list[Column[Any]], list[Column[Any]]]:
    return [element.parent for element in fk.elements], [element.column for element in fk.elements]


def _values(image: Image, columns: Sequence[Column[Any]]) -> tuple[Any, ...] | None:
    values = tuple(decode(image.get(column.name)) for column in columns)
    return None if None in values else values
