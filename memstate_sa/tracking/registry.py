"""`Registry`: the tracked classes of a Memory, by mapper, by table and by a table's name."""

from __future__ import annotations

from typing import Any

from sqlalchemy import Table, inspect
from sqlalchemy.orm import Mapper
from sqlalchemy.sql.selectable import AliasedReturnsRows

from memstate_sa.errors import MemstateError
from memstate_sa.tracking.options import derive
from memstate_sa.tracking.tracked import Tracked


class Registry:
    """The tracked classes of one Memory."""

    def __init__(self) -> None:
        self._by_mapper: dict[Mapper[Any], Tracked | None] = {}
        # This dict is replaced as a whole, like `by_table`, because other threads may be iterating over it.
        self.by_entity: dict[str, Tracked] = {}
        self._published: dict[str, Tracked] = {}
        self.versions: dict[str, int] = {}  # the current shape of each entity's images
        self.by_table: dict[Table, Tracked] = {}
        self.by_table_name: dict[tuple[str | None, str], Tracked] = {}
        self.validates = False  # whether any class has values to check before a flush
        self.by_trigger = False  # whether triggers capture any class

    def add(self, tracked: Tracked) -> None:
        """Register *tracked*, and its concrete subclasses as entities of their own.

        Raises MemstateError, and registers none of them, if one cannot be tracked.
        """
        same = self._by_mapper.get(tracked.mapper)
        replaced = same if same is not None and same.derived else None  # it was tracked through its base class
        additions = [tracked]
        for mapper in tracked.mapper.self_and_descendants:
            if mapper.concrete and mapper is not tracked.mapper and self._by_mapper.get(mapper) is None:
                base = next(addition for addition in reversed(additions) if mapper.isa(addition.mapper))
                additions.append(derive(base, mapper))
        by_entity = {name: other for name, other in self.by_entity.items() if other is not replaced}
        by_table = {table: other for table, other in self.by_table.items() if other is not replaced}
        for addition in additions:
            other = by_entity.setdefault(addition.entity, addition)
            if other is not addition:
                raise MemstateError(
                    f"Cannot track {addition.model.__name__}: {other.model.__name__} has the entity "
                    f"{addition.entity!r} already. Give it another name with entity=."
                )
            by_table = _with_tables(by_table, addition)
        self.by_entity = by_entity
        self._set_tables(by_table)
        known = {mapper: other for mapper, other in self._by_mapper.items() if other is not None}
        self._by_mapper = {**known, **{addition.mapper: addition for addition in additions}}
        for addition in additions:
            addition.record_for_autogenerate()
            self.versions[addition.entity] = addition.version
            self.validates |= addition.validate is not None or addition.expires is not None
            self.by_trigger |= addition.by_trigger

    def extend(self, mapper: Mapper[Any]) -> None:
        """Track a new subclass with its tracked base class. A concrete subclass becomes an entity of its own."""
        if mapper in self._by_mapper or mapper.inherits is None:
            return
        base = self.find(mapper.inherits)
        if base is None:
            return
        if mapper.concrete:
            self.add(derive(base, mapper))
        else:
            base.clear_caches()
            base.check(mapper)
            self._set_tables(_with_tables(self.by_table, base))

    def _set_tables(self, by_table: dict[Table, Tracked]) -> None:
        self.by_table = by_table
        self.by_table_name.update({(table.schema, table.name): tracked for table, tracked in by_table.items()})

    def publish(self) -> None:
        """Let the threads of relays see the added classes. Call it when their changes are captured."""
        self._published = self.by_entity

    def published(self, index: str | None = None) -> dict[str, Tracked]:
        """The published classes by entity: all, or only those with this *index*."""
        return {name: tracked for name, tracked in self._published.items() if index is None or index in tracked.indexes}

    def delivered(self, index: str) -> dict[str, Tracked]:
        """The published classes by entity, for a relay to *index*. Classes without this index are `from_no_index`."""
        return {
            name: tracked if index in tracked.indexes else tracked.from_no_index
            for name, tracked in self._published.items()
        }

    def find(self, mapper: Mapper[Any]) -> Tracked | None:
        """The tracked class of *mapper* or of one of its base classes, or None."""
        if mapper not in self._by_mapper:
            bases = mapper.iterate_to_root()
            self._by_mapper[mapper] = next((t for base in bases if (t := self._by_mapper.get(base)) is not None), None)
        return self._by_mapper[mapper]

    def named(self, table: Any, default_schema: str | None) -> Tracked | None:
        """The class that tracks the table with this name and schema, or None.

        *table* may be another Table object, a reflected one or an alias. It may name the default schema or not.
        """
        table = unaliased(table)
        name, schema = getattr(table, "name", None), getattr(table, "schema", None)
        if not isinstance(name, str):
            return None
        tracked = self.by_table_name.get((schema, name))
        if tracked is None and schema in (None, default_schema):
            tracked = self.by_table_name.get((default_schema if schema is None else None, name))
        return tracked

    def of(self, model: type[Any]) -> Tracked:
        """The tracked class of *model*. Raises MemstateError when there is none."""
        mapper = inspect(model, raiseerr=False)
        tracked = self.find(mapper) if isinstance(mapper, Mapper) else None
        if tracked is None:
            name = getattr(model, "__name__", repr(model))
            raise MemstateError(f"{name} is not tracked by this Memory. Call memory.track({name}, text=…).")
        return tracked

    def of_whole(self, model: type[Any]) -> Tracked:
        """The tracked class of *model*. Raises MemstateError when it also has facts of other classes."""
        tracked = self.of(model)
        if tracked.model is not model:
            raise MemstateError(
                f"Cannot select {model.__name__} alone: it is tracked together with {tracked.model.__name__}, and the "
                f"log does not tell their changes apart. Pass model={tracked.model.__name__}."
            )
        return tracked

    def require_any(self) -> None:
        if not self.by_entity:
            raise MemstateError("This Memory tracks no class. Call memory.track(Model, text=…) first.")


def _with_tables(by_table: dict[Table, Tracked], tracked: Tracked) -> dict[Table, Tracked]:
    """*by_table* with the tables of *tracked*. Raises MemstateError when another class has one of them."""
    for table in tracked.tables:
        other = by_table.get(table)
        if other not in (None, tracked):
            raise MemstateError(
                f"Cannot track {tracked.model.__name__}: {other.model.__name__} tracks table {table.fullname} already. "
                "A base class is tracked together with its subclasses."
            )
    return {**by_table, **dict.fromkeys(tracked.tables, tracked)}


def unaliased(table: Any) -> Any:
    """The table behind an alias, or *table* itself."""
    while isinstance(table, AliasedReturnsRows):
        table = table.element
    return table
