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
        self._drop_derived(tracked.mapper)
        other = self.by_entity.get(tracked.entity)
        if other is not None:
            raise MemstateError(f"entity {tracked.entity!r} is already tracked, by {other.model.__name__}")
        self._claim_tables(tracked)
        self.by_entity = {**self.by_entity, tracked.entity: tracked}
        tracked.record_for_autogenerate()
        self.versions[tracked.entity] = tracked.version
        self.validates |= tracked.validate is not None or tracked.expires is not None
        self.by_trigger |= tracked.by_trigger
        self._by_mapper = {**{m: t for m, t in self._by_mapper.items() if t is not None}, tracked.mapper: tracked}
        for mapper in list(tracked.mapper.self_and_descendants):
            if mapper.concrete and mapper is not tracked.mapper and mapper not in self._by_mapper:
                self.extend(mapper)

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
            self._claim_tables(base)

    def _claim_tables(self, tracked: Tracked) -> None:
        for table in tracked.tables:
            other = self.by_table.get(table)
            if other not in (None, tracked):
                raise MemstateError(
                    f"table {table.fullname} is already tracked, by {other.model.__name__}; tracking a base class "
                    "tracks its subclasses"
                )
        self.by_table = {**self.by_table, **dict.fromkeys(tracked.tables, tracked)}
        self.by_table_name.update({(table.schema, table.name): tracked for table in tracked.tables})

    def _drop_derived(self, mapper: Mapper[Any]) -> None:
        """Who tracks a concrete subclass by itself does not want it as its base class is tracked."""
        derived = self._by_mapper.get(mapper)
        if derived is not None and derived.derived:
            del self._by_mapper[mapper]
            self.by_entity = {name: tracked for name, tracked in self.by_entity.items() if tracked is not derived}
            self.by_table = {table: tracked for table, tracked in self.by_table.items() if tracked is not derived}

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


def unaliased(table: Any) -> Any:
    """The table of which *table* is an alias, or itself."""
    while isinstance(table, AliasedReturnsRows):
        table = table.element
    return table
