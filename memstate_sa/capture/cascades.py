"""Cascades that no Session sees: the database itself changes rows of tracked tables by their foreign keys."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import suppress
from typing import Any, NamedTuple

from sqlalchemy import Table, inspect, text
from sqlalchemy.engine import Connection
from sqlalchemy.exc import NoReferenceError
from sqlalchemy.orm import Mapper, RelationshipDirection, RelationshipProperty

from memstate_sa.db.dialects import SQLITE, database_of
from memstate_sa.tracking.registry import Registry
from memstate_sa.tracking.tracked import Tracked

_ACTIONS = ("CASCADE", "SET")
_MESSAGE = (
    "The log misses some changes of {table}. The database itself makes them, by {actions} of the foreign key "
    "({columns}) to {parent}, and no Session sees that. {ways}"
)


class ForeignKey(NamedTuple):
    """A foreign key of *table*, from the mapping or from the database."""

    table: Table
    columns: tuple[str, ...]
    parent: tuple[str | None, str]
    on_delete: str | None
    on_update: str | None

    @property
    def parent_name(self) -> str:
        return ".".join(filter(None, self.parent))


def mapped(table: Table) -> Iterator[ForeignKey]:
    """The foreign keys of *table* in its mapping."""
    for constraint in sorted(
        table.foreign_key_constraints, key=lambda constraint: list(map(str, constraint.column_keys))
    ):
        with suppress(NoReferenceError):  # the other table is not known yet
            parent = constraint.referred_table
            names = tuple(str(column.name) for column in constraint.columns)
            actions = (constraint.ondelete, constraint.onupdate)
            yield ForeignKey(table, names, (parent.schema, str(parent.name)), *map(_action, actions))


_of_sqlite = text(
    'SELECT id, "table", group_concat("from"), min(on_delete), min(on_update) '
    "FROM (SELECT * FROM pragma_foreign_key_list(:table) ORDER BY id, seq) GROUP BY id ORDER BY id"
)


def reflected(connection: Connection, table: Table) -> Iterator[ForeignKey]:
    """The foreign keys of *table* in the database. They may differ from those of the mapping."""
    if database_of(connection) is SQLITE:  # SQLAlchemy misses the actions of keys declared in a column
        for _, parent, columns, *actions in connection.execute(_of_sqlite, {"table": table.name}):
            yield ForeignKey(table, tuple(columns.split(",")), (table.schema, parent), *map(_action, actions))
        return
    for reflected_key in inspect(connection).get_foreign_keys(str(table.name), schema=table.schema):
        options = reflected_key.get("options", {})
        parent = (reflected_key["referred_schema"], reflected_key["referred_table"])
        on_delete, on_update = (_action(options.get(name)) for name in ("ondelete", "onupdate"))
        yield ForeignKey(table, tuple(reflected_key["constrained_columns"]), parent, on_delete, on_update)


def _action(action: str | None) -> str | None:
    """The *action* in capitals, or None when it leaves the child rows as they are."""
    return action.upper() if action is not None and action.upper().startswith(_ACTIONS) else None


def unseen(registry: Registry, tracked: Tracked, keys: Iterable[ForeignKey]) -> Iterator[tuple[ForeignKey, str]]:
    """The foreign *keys* of *tracked* whose actions the log misses, each with its warning.

    A tracked parent needs configured mappers, because its relationships decide whether the unit of work acts instead.
    """
    if tracked.by_trigger:
        return
    for key in keys:
        if not (key.on_delete or key.on_update) or _is_inheritance(tracked, key):
            continue
        missed = list(_missed(tracked, registry.by_table_name.get(key.parent), key))
        if missed:
            above = _above(key)
            ways = [f"Rows of {key.parent_name} are deleted with those of {', '.join(above)}."] if above else []
            ways.append(f"Track {tracked.model.__name__} with capture='trigger'.")
            ways += [way for _, way in missed if way]
            actions = " and ".join(action for action, _ in missed)
            names = {"table": key.table.fullname, "parent": key.parent_name, "columns": ", ".join(key.columns)}
            yield key, _MESSAGE.format(actions=actions, ways=" ".join(ways), **names)


def _missed(tracked: Tracked, parent: Tracked | None, key: ForeignKey) -> Iterator[tuple[str, str]]:
    """The actions of *key* that the database takes instead of the unit of work, each with advice (or '')."""
    relationships = [] if parent is None else list(_relationships(parent.mapper, key))
    for event, action, by_the_database, without in (
        ("DELETE", key.on_delete, "passive_deletes", "without passive_deletes"),
        ("UPDATE", key.on_update, "passive_updates", "with passive_updates=False"),
    ):
        passive = [relationship for relationship in relationships if getattr(relationship, by_the_database)]
        is_done = parent is not None and not parent.by_trigger and len(passive) < len(relationships)
        if action is None or is_done:
            continue
        if passive:
            way = f"Or define {', '.join(map(str, passive))} {without}."
        elif parent is None:
            way = f"Or track {key.parent_name}, with a relationship to {tracked.model.__name__} {without}."
        else:
            way = f"Or give {parent.model.__name__} a relationship to {tracked.model.__name__} {without}."
        yield f"ON {event} {action}", "" if parent is not None and parent.by_trigger and not passive else way


def _is_inheritance(tracked: Tracked, key: ForeignKey) -> bool:
    """Whether the key joins the parts of one fact. The unit of work deletes these itself."""
    key_names = {str(column.name) for column in key.table.primary_key.columns}
    return set(key.columns) == key_names and any((t.schema, t.name) == key.parent for t in tracked.tables[:-1])


def _relationships(parent: Mapper[Any], key: ForeignKey) -> Iterator[RelationshipProperty[Any]]:
    """The relationships through which the unit of work changes the rows that refer to a row of *parent*."""
    for mapper in parent.self_and_descendants:
        for relationship in mapper.relationships:
            remote = [column for _, column in relationship.local_remote_pairs or ()]
            if (
                relationship.direction is RelationshipDirection.ONETOMANY
                and not relationship.viewonly
                and {str(column.name) for column in remote} == set(key.columns)
                and all(column.table is key.table for column in remote)
            ):
                yield relationship


def _above(key: ForeignKey) -> list[str]:
    """The tables whose deletes cascade to the parent of *key*, directly or through others."""
    by_child: dict[tuple[str | None, str], list[ForeignKey]] = {}
    for table in key.table.metadata.tables.values():
        for foreign_key in mapped(table):
            if foreign_key.on_delete == "CASCADE":
                by_child.setdefault((table.schema, str(table.name)), []).append(foreign_key)
    parent_names: dict[tuple[str | None, str], str] = {}
    todo = [key.parent]
    while todo:
        for foreign_key in by_child.get(todo.pop(), ()):
            parent = foreign_key.parent
            if parent not in parent_names and parent != key.parent:
                parent_names[parent] = foreign_key.parent_name
                todo.append(parent)
    return sorted(parent_names.values())


def are_known(entities: Mapping[str, Tracked]) -> bool:
    """Whether the mappers of tracked classes are configured. Reading relationships earlier would break the mappers."""
    mappers = (mapper for tracked in entities.values() for mapper in tracked.mapper.self_and_descendants)
    return all(mapper.configured for mapper in mappers)
