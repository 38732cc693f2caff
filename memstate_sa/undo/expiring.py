"""Expire the loaded attributes that an undo has changed. The Session loads them again at the next access.

A Session expires collections only when it flushes or refreshes objects itself. A Session does not see an undo, which
writes by Core. This module sends no statements.
"""

from __future__ import annotations

from collections.abc import Collection, Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeAlias

from sqlalchemy import Table, inspect
from sqlalchemy.engine import Dialect
from sqlalchemy.orm import Mapper, RelationshipProperty, Session
from sqlalchemy.orm.exc import UnmappedColumnError

from memstate_sa.db.codec import decode_key
from memstate_sa.db.raw_values import hashable
from memstate_sa.log.changes import Change
from memstate_sa.tracking.registry import Registry
from memstate_sa.tracking.tracked import Tracked

_Rows: TypeAlias = Sequence[Mapping[str, Any] | None]
"""The successive states of one row; None where the row did not exist."""


def expire(session: Session, dialect: Dialect, registry: Registry, changes: Sequence[Change]) -> None:
    """Expire the loaded objects that *changes* have written, and the relationships that may hold other objects now."""
    keys: dict[Tracked, set[tuple[Any, ...]]] = {}
    changes = [change for change in changes if change.entity in registry.by_entity]  # triggers may log other entities
    for change in changes:
        tracked = registry.by_entity[change.entity]
        keys.setdefault(tracked, set()).add(decode_key(tracked.columns_for(dialect).canonical(change.key)))
    relationships = _Relationships(_rows_by_table(dialect, registry, changes))
    for instance in list(session.identity_map.values()):
        state: Any = inspect(instance)
        tracked_class = registry.find(state.mapper)
        if tracked_class in keys and tracked_class.columns_for(dialect).raw_key(state.key[1]) in keys[tracked_class]:
            session.expire(instance)
        elif names := relationships.changed(state.mapper, state.dict):
            session.expire(instance, names)


def _rows_by_table(dialect: Dialect, registry: Registry, changes: Iterable[Change]) -> dict[Table, list[_Rows]]:
    """The states of each table's rows before, between and after *changes*, in the values that the ORM loads."""
    facts: dict[tuple[str, Hashable], list[Mapping[str, Any] | None]] = {}
    for change in changes:
        facts.setdefault((change.entity, hashable(change.key)), [change.before]).append(change.after)
    rows: dict[Table, list[_Rows]] = {}
    for (entity, _), images in facts.items():
        columns = registry.by_entity[entity].columns_for(dialect)
        parts = [columns.parts(image) for image in images]
        for table in columns.of_table:
            rows.setdefault(table, []).append([part[table] for part in parts])
    return rows


@dataclass
class _Relationships:
    """The relationships to rows that an undo has written."""

    rows: Mapping[Table, Sequence[_Rows]]
    _of_mapper: dict[Mapper[Any], list[_Relationship]] = field(default_factory=dict)

    def changed(self, mapper: Mapper[Any], values: Mapping[str, Any]) -> list[str]:
        """The loaded relationships of an object with these attribute *values* that may hold other objects now."""
        if mapper not in self._of_mapper:
            self._of_mapper[mapper] = list(self._to_written_rows(mapper))
        return [one.name for one in self._of_mapper[mapper] if one.name in values and one.may_differ(values)]

    def _to_written_rows(self, mapper: Mapper[Any]) -> Iterable[_Relationship]:
        for relationship in mapper.relationships:
            tables = {*relationship.mapper.tables, relationship.secondary}
            if not tables.isdisjoint(self.rows):
                yield self._relationship(mapper, relationship)

    def _relationship(self, mapper: Mapper[Any], relationship: RelationshipProperty[Any]) -> _Relationship:
        pairs = relationship.local_remote_pairs or ()
        tables = {remote.table for _, remote in pairs}
        is_plain = relationship.secondary is None and not relationship.viewonly
        if not is_plain or len(tables) != 1 or tables.isdisjoint(self.rows):
            return _Relationship(relationship.key)
        try:
            attributes = [mapper.get_property_by_column(local).key for local, _ in pairs]
        except UnmappedColumnError:
            return _Relationship(relationship.key)
        values = _changed_values(self.rows[tables.pop()], [remote for _, remote in pairs])
        return _Relationship(relationship.key, attributes, values)


def _changed_values(rows: Iterable[_Rows], columns: Sequence[Any]) -> set[Hashable]:
    """The values of *columns* that some row has gained or lost."""
    changed: set[Hashable] = set()
    for row in rows:
        values = {None if image is None else hashable([image.get(column.name) for column in columns]) for image in row}
        if len(values) > 1:
            changed |= values
    return changed


@dataclass(frozen=True)
class _Relationship:
    """A relationship, with the *attributes* that hold the object's reference. They are empty if they are unknown."""

    name: str
    attributes: Sequence[str] = ()
    changed_values: Collection[Hashable] = ()

    def may_differ(self, values: Mapping[str, Any]) -> bool:
        if not self.attributes or not all(attribute in values for attribute in self.attributes):
            return True
        return hashable([values[attribute] for attribute in self.attributes]) in self.changed_values
