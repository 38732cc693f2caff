"""Check the foreign keys and unique values that may block an undo, before it writes.

The database would only report that it refuses. For tracked tables, this check finds the fact that blocks, so that the
error can name its author. The values that constraints compare are read once. The rest is decided in memory.
"""

from __future__ import annotations

from collections.abc import Collection, Hashable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeAlias

from sqlalchemy import Column, ForeignKeyConstraint, Table, select
from sqlalchemy.engine import Connection

from memstate_sa.db.codec import FactKey, Image, by_entity, decode_key, encode_key
from memstate_sa.db.json_params import as_array, unnest_strings
from memstate_sa.db.rows import TableColumns, columns_of, values_of
from memstate_sa.db.tables import unique
from memstate_sa.tracking.registry import Registry
from memstate_sa.tracking.tracked import Tracked, unique_value
from memstate_sa.undo.restore import rows_by_table, unique_columns

BlockedFacts: TypeAlias = dict[FactKey, FactKey | None]
"""Facts that cannot be restored, each with the fact that blocks it; None if the blocking row has no known key."""

_Facts: TypeAlias = dict[FactKey, None]


# -- decisions (pure) --------------------------------------------------------------------------------------------------


class FactsByValue:
    """The facts by the value that they have now, and by the value that they have after all facts are restored."""

    def __init__(self) -> None:
        self.current: dict[Hashable, _Facts] = {}
        self.final: dict[Hashable, _Facts] = {}

    def add(self, fact: FactKey, current: Hashable | None, final: Hashable | None) -> None:
        for facts, value in ((self.current, current), (self.final, final)):
            if value is not None:  # NULL equals nothing, and refers to nothing
                facts.setdefault(value, {})[fact] = None

    def gaining(self, value: Hashable, left_out: Collection[FactKey] = ()) -> list[FactKey]:
        current = self.current.get(value, ())
        return [fact for fact in self.final.get(value, ()) if fact not in current and fact not in left_out]

    def losing(self, value: Hashable, left_out: Collection[FactKey] = ()) -> list[FactKey]:
        final = self.final.get(value, ())
        return [fact for fact in self.current.get(value, ()) if fact not in final and fact not in left_out]

    def having_in_the_end(self, value: Hashable, left_out: Collection[FactKey]) -> list[FactKey]:
        """The facts that have *value* after the undo, if it does not change the facts in *left_out*."""
        final = self.final.get(value, ())
        keeping = [fact for fact in self.current.get(value, ()) if fact in final or fact in left_out]
        return keeping + self.gaining(value, left_out)


@dataclass(eq=False)
class Uniqueness:
    """The constraint that at most one fact has a value."""

    facts: FactsByValue

    @property
    def sides(self) -> tuple[FactsByValue, ...]:
        return (self.facts,)

    def blocked_facts(self, value: Hashable, left_out: Collection[FactKey]) -> BlockedFacts:
        gaining = self.facts.gaining(value, left_out)
        first = next(iter(self.facts.having_in_the_end(value, left_out)), None) if gaining else None
        return {fact: first for fact in gaining if fact != first}


@dataclass(eq=False)
class Reference:
    """The constraint that a referred value exists.

    *entity*: the entity of the referred keys, or None if the referred values are no primary keys.
    """

    referring: FactsByValue
    referred: FactsByValue
    entity: str | None = None

    @property
    def sides(self) -> tuple[FactsByValue, ...]:
        return self.referring, self.referred

    def blocked_facts(self, value: Hashable, left_out: Collection[FactKey]) -> BlockedFacts:
        if self.referred.having_in_the_end(value, left_out):
            return {}
        referring = self.referring.having_in_the_end(value, left_out)
        if referring and (losing := self.referred.losing(value, left_out)):
            blocking = next((fact for fact in referring if fact not in left_out), referring[0])
            return dict.fromkeys(losing, blocking)
        return dict.fromkeys(self.referring.gaining(value, left_out), self._parent(value))

    def _parent(self, value: Any) -> FactKey | None:
        key = None if self.entity is None else (self.entity, encode_key(value))
        return next(iter(self.referred.final.get(value, ())), key)


Constraint: TypeAlias = Uniqueness | Reference


class Constraints:
    """All constraints that an undo must keep."""

    def __init__(self, constraints: Iterable[Constraint]) -> None:
        self._of_fact: dict[FactKey, list[tuple[Constraint, Hashable]]] = {}
        """The constraints of each fact, with the value that the constraint compares."""
        for constraint in constraints:
            for side in constraint.sides:
                for facts_of in (side.current, side.final):
                    for value, facts in facts_of.items():
                        for fact in facts:
                            self._of_fact.setdefault(fact, []).append((constraint, value))

    def blocked_facts(self, left_out: Collection[FactKey]) -> BlockedFacts:
        """The other facts that cannot be restored if the facts *left_out* stay as they are."""
        blocked: BlockedFacts = {}
        staying = set(left_out)
        unchecked = dict.fromkeys(pair for pairs in self._of_fact.values() for pair in pairs)
        while unchecked:
            (constraint, value), _ = unchecked.popitem()
            for fact, blocking in constraint.blocked_facts(value, staying).items():
                blocked[fact] = blocking
                staying.add(fact)
                unchecked.update(dict.fromkeys(self._of_fact[fact]))  # other facts may need this one: check again
        return blocked


# -- reading the database ----------------------------------------------------------------------------------------------


def read_constraints(connection: Connection, registry: Registry, final: Mapping[FactKey, Image | None]) -> Constraints:
    """The foreign keys and unique values of tracked tables that *final* must satisfy."""
    reader = _ConstraintReader(connection, registry, final)
    return Constraints([*reader.references(), *reader.unique_constraints(), *reader.declared_unique_values()])


_keys = unnest_strings("keys")
_unique_values = select(unique.c.key, unique.c.value)


@dataclass
class _ConstraintReader:
    connection: Connection
    registry: Registry
    final: Mapping[FactKey, Image | None]
    _current_rows: dict[Table, Mapping[str, Image]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self._final_rows = rows_by_table(self.connection, self.registry, self.final)

    def references(self) -> list[Reference]:
        """The foreign keys between tracked tables, with the restored rows and the other rows that they concern.

        Other rows either refer to a value that the undo removes, or have a value that a restored row refers to. Rows
        that lose a referred value, also by a delete, are locked first.
        """
        tracked = self.registry.by_table
        references = [
            (fk, self._reference(fk))
            for table in list(tracked)
            for fk in table.foreign_key_constraints
            if fk.referred_table in tracked and (table in self._final_rows or fk.referred_table in self._final_rows)
        ]
        losing_keys: dict[Table, set[str]] = {}
        for fk, reference in references:
            keys = {key for value in reference.referred.current for _, key in reference.referred.losing(value)}
            losing_keys.setdefault(fk.referred_table, set()).update(keys)
        for table, keys in losing_keys.items():
            if keys:
                self._columns(table).lock(self.connection, [decode_key(key) for key in keys], leaving=True)
        for fk, reference in references:
            local, remote = columns_of(fk)
            lost_values = list(filter(reference.referred.losing, reference.referred.current))
            self._add_others(reference.referring, fk.table, local, lost_values)
            gained_values = list(filter(reference.referring.gaining, reference.referring.final))
            self._add_others(reference.referred, fk.referred_table, remote, gained_values)
        return [reference for _, reference in references]

    def _reference(self, fk: ForeignKeyConstraint) -> Reference:
        parent = fk.referred_table
        local, remote = columns_of(fk)
        is_key = [column.name for column in remote] == [column.name for column in parent.primary_key.columns]
        entity = self.registry.by_table[parent].entity if is_key else None
        return Reference(self._facts_by_value(fk.table, local), self._facts_by_value(parent, remote), entity)

    def unique_constraints(self) -> Iterator[Uniqueness]:
        """The unique constraints of tables, with the restored rows and the other rows that have their values now."""
        for table in self._final_rows:
            for columns in unique_columns(table, partial=False):
                facts = self._facts_by_value(table, columns)
                self._add_others(facts, table, columns, list(filter(facts.gaining, facts.final)))
                yield Uniqueness(facts)

    def declared_unique_values(self) -> Iterator[Uniqueness]:
        """The unique values of ``unique_by``, with the restored facts and other facts that have these values now."""
        for entity, keys in by_entity(self.final).items():
            tracked = self.registry.by_entity[entity]
            if tracked.unique_values is not None:
                yield self._declared(tracked, keys)

    def _declared(self, tracked: Tracked, keys: Sequence[str]) -> Uniqueness:
        facts, columns = FactsByValue(), tracked.columns_for(self.connection.dialect)
        of_class = _unique_values.where(unique.c.entity == tracked.entity)
        of_keys = of_class.where(unique.c.key.in_(select(_keys.c.value)))
        current = {row.key: row.value for row in self.connection.execute(of_keys, {"keys": as_array(keys)})}
        for key in keys:
            image = self.final[tracked.entity, key]
            final = None if image is None else unique_value(tracked, columns.past_values(dict(image)))
            facts.add((tracked.entity, key), current.get(key), final)
        if gained_values := [str(value) for value in facts.final if facts.gaining(value)]:
            holders = of_class.where(unique.c.value.in_(select(_keys.c.value)))
            for key, value in self.connection.execute(holders, {"keys": as_array(gained_values)}):
                if key not in current:
                    facts.add((tracked.entity, key), value, value)
        return Uniqueness(facts)

    def _facts_by_value(self, table: Table, columns: Sequence[Column[Any]]) -> FactsByValue:
        """The restored facts that have rows in *table*, by their values of *columns*."""
        facts, current = FactsByValue(), self._rows_now(table)
        for key, image in self._final_rows.get(table, {}).items():
            facts.add(self._fact(table, key), values_of(current.get(key), columns), values_of(image, columns))
        return facts

    def _add_others(
        self, facts: FactsByValue, table: Table, columns: Sequence[Column[Any]], values: Sequence[Hashable]
    ) -> None:
        """Add to *facts* the other facts that have one of *values* now."""
        current, final = self._rows_now(table), self._final_rows.get(table, {})
        for value, key in self._find(table, columns, values):
            moves = key in final and values_of(final[key], columns) != values_of(current.get(key), columns)
            facts.add(self._fact(table, key), value, None if moves else value)

    def _find(self, table: Table, columns: Sequence[Column[Any]], values: Sequence[Any]) -> Iterator[tuple[Any, str]]:
        if not values:
            return
        find = self._columns(table).find
        keys = find(self.connection, columns, values)
        if {value for _, value in keys} <= set(values):
            yield from ((value, key) for key, value in keys)
        else:  # other spellings are equal in the collation, so query each value alone to know its rows
            for value in values:
                yield from ((value, key) for key, _ in find(self.connection, columns, [value]))

    def _columns(self, table: Table) -> TableColumns:
        return self.registry.by_table[table].columns_for(self.connection.dialect).of_table[table]

    def _rows_now(self, table: Table) -> Mapping[str, Image]:
        """The current rows of *table*. They are read at the first call, because many tables are never needed."""
        if table not in self._final_rows:
            return {}
        if table not in self._current_rows:
            keys = [decode_key(key) for key in self._final_rows[table]]
            current = self._current_rows[table] = self._columns(table).read(self.connection, keys)
            for key, image in self._final_rows[table].items():
                if image is not None:  # columns that the image lacks keep their values
                    self._final_rows[table][key] = {**current.get(key, {}), **image}
        return self._current_rows[table]

    def _fact(self, table: Table, key: str) -> FactKey:
        return self.registry.by_table[table].entity, key
