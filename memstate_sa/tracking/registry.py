"""`Registry`: which classes are tracked, found by mapper, by table or by a table's name."""

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
        # Replaced, not changed, as other threads may be going through them: so is `by_table`.
        self.by_entity: dict[str, Tracked] = {}
        self._published: dict[str, Tracked] = {}
        self.versions: dict[str, int] = {}  # of the shape of each entity's images
        self.by_table: dict[Table, Tracked] = {}
        self.by_table_name: dict[tuple[str | None, str], Tracked] = {}
        self.validates = False
        self.by_trigger = False  # whether any class is

    def add(self, tracked: Tracked) -> None:
        """Register *tracked*, and its concrete subclasses as entities of their own: all of them, or none.

        Raises MemstateError when one of them cannot be tracked.
        """
        same = self._by_mapper.get(tracked.mapper)
        replaced = same if same is not None and same.derived else None  # now tracked by itself
        additions = [tracked]
        for mapper in tracked.mapper.self_and_descendants:
            if mapper.concrete and mapper is not tracked.mapper and self._by_mapper.get(mapper) is None:
                base = next(one for one in reversed(additions) if mapper.isa(one.mapper))
                additions.append(derive(base, mapper))
        by_entity = {name: other for name, other in self.by_entity.items() if other is not replaced}
        by_table = {table: other for table, other in self.by_table.items() if other is not replaced}
        for addition in additions:
            other = by_entity.setdefault(addition.entity, addition)
            if other is not addition:
                raise MemstateError(f"entity {addition.entity!r} is already tracked, by {other.model.__name__}")
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
        """A subclass of a tracked class was mapped: it is tracked along, a concrete one as an entity of its own."""
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
        """Let relays, in their threads, see what was added: not before its changes are captured."""
        self._published = self.by_entity

    def published(self, index: str | None = None) -> dict[str, Tracked]:
        """By entity, all or those that go to an *index*."""
        return {name: tracked for name, tracked in self._published.items() if index is None or index in tracked.indexes}

    def delivered(self, index: str) -> dict[str, Tracked]:
        """By entity, all that a relay to *index* has to know: those that go there, and those that do no longer."""
        return {
            name: tracked if index in tracked.indexes else tracked.from_no_index
            for name, tracked in self._published.items()
        }

    def find(self, mapper: Mapper[Any]) -> Tracked | None:
        """What tracks *mapper*, itself or through a base class."""
        if mapper not in self._by_mapper:
            bases = mapper.iterate_to_root()
            self._by_mapper[mapper] = next((t for base in bases if (t := self._by_mapper.get(base)) is not None), None)
        return self._by_mapper[mapper]

    def named(self, table: Any, default_schema: str | None) -> Tracked | None:
        """What tracks the table of this name: another Table object of it, a reflected one, an alias is the same table.

        The default schema may be named or not.
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
        """What tracks the class *model*. Raises MemstateError when nothing does."""
        mapper = inspect(model, raiseerr=False)
        tracked = self.find(mapper) if isinstance(mapper, Mapper) else None
        if tracked is None:
            name = getattr(model, "__name__", repr(model))
            raise MemstateError(f"{name} is not tracked by this Memory; memory.track({name}, text=…) does that")
        return tracked

    def of_whole(self, model: type[Any]) -> Tracked:
        """What tracks the class *model*. Raises MemstateError when that has facts of other classes, too."""
        tracked = self.of(model)
        if tracked.model is not model:
            raise MemstateError(
                f"{model.__name__} is tracked along with {tracked.model.__name__}, whose changes are not told apart: "
                f"model={tracked.model.__name__}"
            )
        return tracked

    def require_any(self) -> None:
        if not self.by_entity:
            raise MemstateError("no class is tracked")


def _with_tables(by_table: dict[Table, Tracked], tracked: Tracked) -> dict[Table, Tracked]:
    """*by_table* with the tables of *tracked*. Raises MemstateError when another class has one of them."""
    for table in tracked.tables:
        other = by_table.get(table)
        if other not in (None, tracked):
            raise MemstateError(
                f"table {table.fullname} is already tracked, by {other.model.__name__}; tracking a base class "
                "tracks its subclasses"
            )
    return {**by_table, **dict.fromkeys(tracked.tables, tracked)}


def unaliased(table: Any) -> Any:
    """The table of which *table* is an alias, or itself."""
    while isinstance(table, AliasedReturnsRows):
        table = table.element
    return table
