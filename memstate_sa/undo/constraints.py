"""What stands in the way of an undo, told before it is tried: rows that refer, that are missing, or that hold a value.

The database would only say that it refuses. For tracked tables this says which fact refuses, so that whoever changed it
can be named. What constraints will compare is read once; what follows from leaving a fact out is decided in memory.
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
"""Facts that cannot be as they are wanted, each with a fact because of which; None: of a row that no key tells."""

_Facts: TypeAlias = dict[FactKey, None]


# -- what follows from what (pure) -------------------------------------------------------------------------------------


class FactsByValue:
    """Which facts have which value: now, and as they are wanted, which for most facts is the same."""

    def __init__(self) -> None:
        self.now: dict[Hashable, _Facts] = {}
        self.then: dict[Hashable, _Facts] = {}

    def add(self, fact: FactKey, now: Hashable | None, then: Hashable | None) -> None:
        for facts, value in ((self.now, now), (self.then, then)):
            if value is not None:  # NULL equals nothing, and refers to nothing
                facts.setdefault(value, {})[fact] = None

    def arriving(self, value: Hashable, left_out: Collection[FactKey] = ()) -> list[FactKey]:
        now = self.now.get(value, ())
        return [fact for fact in self.then.get(value, ()) if fact not in now and fact not in left_out]

    def departing(self, value: Hashable, left_out: Collection[FactKey] = ()) -> list[FactKey]:
        then = self.then.get(value, ())
        return [fact for fact in self.now.get(value, ()) if fact not in then and fact not in left_out]

    def after(self, value: Hashable, left_out: Collection[FactKey]) -> list[FactKey]:
        """Those that have it in the end, when the facts that are *left_out* stay as they are."""
        then = self.then.get(value, ())
        staying = [fact for fact in self.now.get(value, ()) if fact in then or fact in left_out]
        return staying + self.arriving(value, left_out)


@dataclass(eq=False)
class Uniqueness:
    """At most one fact has a value."""

    having: FactsByValue

    @property
    def sides(self) -> tuple[FactsByValue, ...]:
        return (self.having,)

    def obstacles(self, value: Hashable, left_out: Collection[FactKey]) -> BlockedFacts:
        arriving = self.having.arriving(value, left_out)
        first = next(iter(self.having.after(value, left_out)), None) if arriving else None
        return {fact: first for fact in arriving if fact != first}


@dataclass(eq=False)
class Reference:
    """What somebody refers to is there. *entity*: whose keys the values are; None: they are no keys."""

    referring: FactsByValue
    referred: FactsByValue
    entity: str | None = None

    @property
    def sides(self) -> tuple[FactsByValue, ...]:
        return self.referring, self.referred

    def obstacles(self, value: Hashable, left_out: Collection[FactKey]) -> BlockedFacts:
        if self.referred.after(value, left_out):
            return {}
        referring = self.referring.after(value, left_out)
        if referring and (departing := self.referred.departing(value, left_out)):
            because_of = next((fact for fact in referring if fact not in left_out), referring[0])
            return dict.fromkeys(departing, because_of)
        return dict.fromkeys(self.referring.arriving(value, left_out), self._parent(value))

    def _parent(self, value: Any) -> FactKey | None:
        key = None if self.entity is None else (self.entity, encode_key(value))
        return next(iter(self.referred.then.get(value, ())), key)


Constraint: TypeAlias = Uniqueness | Reference


class Constraints:
    """All that an undo must keep."""

    def __init__(self, rules: Iterable[Constraint]) -> None:
        self._of: dict[FactKey, list[tuple[Constraint, Hashable]]] = {}
        """Where a fact has a say."""
        for rule in rules:
            for side in rule.sides:
                for facts_of in (side.now, side.then):
                    for value, facts in facts_of.items():
                        for fact in facts:
                            self._of.setdefault(fact, []).append((rule, value))

    def obstacles(self, left_out: Collection[FactKey]) -> BlockedFacts:
        """What must be left out, too, when the facts *left_out* stay as they are."""
        found: BlockedFacts = {}
        out = set(left_out)
        waiting = dict.fromkeys(place for places in self._of.values() for place in places)
        while waiting:
            (rule, value), _ = waiting.popitem()
            for fact, because_of in rule.obstacles(value, out).items():
                found[fact] = because_of
                out.add(fact)
                waiting.update(dict.fromkeys(self._of[fact]))  # it may be what others need
        return found


# -- what is there -----------------------------------------------------------------------------------------------------


def read_constraints(connection: Connection, registry: Registry, final: Mapping[FactKey, Image | None]) -> Constraints:
    """What foreign keys and unique values of tracked tables ask of *final*."""
    reader = _ConstraintReader(connection, registry, final)
    return Constraints([*reader.references(), *reader.constraints(), *reader.declared()])


_keys = unnest_strings("keys")
_kept = select(unique.c.key, unique.c.value)


@dataclass
class _ConstraintReader:
    connection: Connection
    registry: Registry
    final: Mapping[FactKey, Image | None]
    _there: dict[Table, Mapping[str, Image]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self._wanted = rows_by_table(self.connection, self.registry, self.final)

    def references(self) -> list[Reference]:
        """Rows that refer to one that is to go, or to have another value; and what those that come are to refer to."""
        tracked = self.registry.by_table
        found = [
            (fk, self._reference(fk))
            for table in list(tracked)
            for fk in table.foreign_key_constraints
            if fk.referred_table in tracked and (table in self._wanted or fk.referred_table in self._wanted)
        ]
        departing: dict[Table, set[str]] = {}
        for fk, rule in found:
            keys = {key for value in rule.referred.now for _, key in rule.referred.departing(value)}
            departing.setdefault(fk.referred_table, set()).update(keys)
        for table, keys in departing.items():
            if keys:
                self._columns(table).lock(self.connection, [decode_key(key) for key in keys], leaving=True)
        for fk, rule in found:
            local, remote = columns_of(fk)
            self._look_for(rule.referring, fk.table, local, filter(rule.referred.departing, rule.referred.now))
            arriving = list(filter(rule.referring.arriving, rule.referring.then))
            self._look_for(rule.referred, fk.referred_table, remote, arriving)
        return [rule for _, rule in found]

    def _reference(self, fk: ForeignKeyConstraint) -> Reference:
        parent = fk.referred_table
        local, remote = columns_of(fk)
        is_key = [column.name for column in remote] == [column.name for column in parent.primary_key.columns]
        entity = self.registry.by_table[parent].entity if is_key else None
        return Reference(self._having(fk.table, local), self._having(parent, remote), entity)

    def constraints(self) -> Iterator[Uniqueness]:
        """Rows that have a unique value which one of the table is to get."""
        for table in self._wanted:
            for columns in unique_columns(table, partial=False):
                rule = Uniqueness(self._having(table, columns))
                self._look_for(rule.having, table, columns, filter(rule.having.arriving, rule.having.then))
                yield rule

    def declared(self) -> Iterator[Uniqueness]:
        """The same of values that `track` was told to be unique."""
        for entity, keys in by_entity(self.final).items():
            tracked = self.registry.by_entity[entity]
            if tracked.unique_values is not None:
                yield self._declared(tracked, keys)

    def _declared(self, tracked: Tracked, keys: Sequence[str]) -> Uniqueness:
        rule = Uniqueness(FactsByValue())
        kept, columns = _kept.where(unique.c.entity == tracked.entity), tracked.on(self.connection.dialect)
        of_these = kept.where(unique.c.key.in_(select(_keys.c.value)))
        now = {row.key: row.value for row in self.connection.execute(of_these, {"keys": as_array(keys)})}
        for key in keys:
            image = self.final[tracked.entity, key]
            then = None if image is None else unique_value(tracked, columns.values(dict(image)))
            rule.having.add((tracked.entity, key), now.get(key), then)
        if arriving := [str(value) for value in rule.having.then if rule.having.arriving(value)]:
            having = kept.where(unique.c.value.in_(select(_keys.c.value)))
            for key, value in self.connection.execute(having, {"keys": as_array(arriving)}):
                if key not in now:
                    rule.having.add((tracked.entity, key), value, value)
        return rule

    def _having(self, table: Table, columns: Sequence[Column[Any]]) -> FactsByValue:
        """What those of the facts have that are rows of *table*."""
        having, there = FactsByValue(), self._now(table)
        for key, image in self._wanted.get(table, {}).items():
            having.add(self._fact(table, key), values_of(there.get(key), columns), values_of(image, columns))
        return having

    def _look_for(
        self, having: FactsByValue, table: Table, columns: Sequence[Column[Any]], values: Iterable[Hashable]
    ) -> None:
        """Add whoever else has *values* now."""
        there, wanted = self._now(table), self._wanted.get(table, {})
        for value, key in self._find(table, columns, list(values)):
            moves = key in wanted and values_of(wanted[key], columns) != values_of(there.get(key), columns)
            having.add(self._fact(table, key), value, None if moves else value)

    def _find(self, table: Table, columns: Sequence[Column[Any]], values: Sequence[Any]) -> Iterator[tuple[Any, str]]:
        if not values:
            return
        find = self._columns(table).find
        found = find(self.connection, columns, values)
        if {value for _, value in found} <= set(values):
            yield from ((value, key) for key, value in found)
        else:  # a collation finds a value in another form, too: of which, each of them says when asked by itself
            for value in values:
                yield from ((value, key) for key, _ in find(self.connection, columns, [value]))

    def _columns(self, table: Table) -> TableColumns:
        return self.registry.by_table[table].on(self.connection.dialect).of_table[table]

    def _now(self, table: Table) -> Mapping[str, Image]:
        """The rows as they are, read when they are first asked for: of many tables nothing has to be known."""
        if table not in self._wanted:
            return {}
        if table not in self._there:
            keys = [decode_key(key) for key in self._wanted[table]]
            there = self._there[table] = self._columns(table).read(self.connection, keys)
            for key, image in self._wanted[table].items():
                if image is not None:  # columns that it does not know stay as they are
                    self._wanted[table][key] = {**there.get(key, {}), **image}
        return self._there[table]

    def _fact(self, table: Table, key: str) -> FactKey:
        return self.registry.by_table[table].entity, key
