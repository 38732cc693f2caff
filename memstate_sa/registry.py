"""`Registry`: which classes are tracked, found by mapper, by table or by a table's name."""

from __future__ import annotations

from typing import Any

from sqlalchemy import Table, inspect
from sqlalchemy.orm import Mapper
from sqlalchemy.sql.selectable import AliasedReturnsRows

from memstate_sa.errors import MemstateError, UntrackedWrite
from memstate_sa.facts import Tracked, check_single_table


class Registry:
    """The tracked classes of one Memory."""

    def __init__(self) -> None:
        self._by_mapper: dict[Mapper[Any], Tracked | None] = {}
        self.by_entity: dict[str, Tracked] = {}
        self.by_table: dict[Table, Tracked] = {}
        self.by_table_name: dict[tuple[str | None, str], Tracked] = {}
        self.validates = False
        self.by_trigger = False  # whether any class is

    def add(self, tracked: Tracked) -> None:
        other = self.by_entity.get(tracked.entity)
        if other is not None:
            raise MemstateError(f"entity {tracked.entity!r} is already tracked, by {other.model.__name__}")
        if tracked.table in self.by_table:
            raise MemstateError(
                f"table {tracked.table.fullname} is already tracked, by {self.by_table[tracked.table].model.__name__}; "
                "tracking a base class tracks its subclasses"
            )
        self.by_entity[tracked.entity] = tracked
        self.by_table[tracked.table] = self.by_table_name[tracked.table.schema, tracked.table.name] = tracked
        self.validates |= tracked.validate is not None
        self.by_trigger |= tracked.by_trigger
        self._by_mapper = {**{m: t for m, t in self._by_mapper.items() if t is not None}, tracked.mapper: tracked}

    def find(self, mapper: Mapper[Any]) -> Tracked | None:
        """What tracks *mapper*, itself or through a base class."""
        if mapper not in self._by_mapper:
            bases = mapper.iterate_to_root()
            found = next((self._by_mapper[base] for base in bases if self._by_mapper.get(base) is not None), None)
            if found is not None and mapper.persist_selectable is not found.table:
                check_single_table(mapper, found.table)
                raise UntrackedWrite(f"{mapper.class_.__name__} has a table of its own, which is not tracked")
            self._by_mapper[mapper] = found
        return self._by_mapper[mapper]

    def named(self, table: Any, default_schema: str | None) -> Tracked | None:
        """What tracks the table of this name: another Table object of it, a reflected one, an alias is the same table.

        The default schema may be named or not.
        """
        while isinstance(table, AliasedReturnsRows):
            table = table.element
        name, schema = getattr(table, "name", None), getattr(table, "schema", None)
        if not isinstance(name, str):
            return None
        found = self.by_table_name.get((schema, name))
        if found is None and schema in (None, default_schema):
            found = self.by_table_name.get((default_schema if schema is None else None, name))
        return found

    def of(self, model: type[Any]) -> Tracked:
        """What tracks the class *model*. Raises MemstateError when nothing does."""
        mapper = inspect(model, raiseerr=False)
        found = self.find(mapper) if isinstance(mapper, Mapper) else None
        if found is None:
            name = getattr(model, "__name__", repr(model))
            raise MemstateError(f"{name} is not tracked by this Memory; memory.track({name}, text=…) does that")
        return found
