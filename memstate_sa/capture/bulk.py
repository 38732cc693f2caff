"""INSERT, UPDATE and DELETE through a Session -> log and outbox: of a class, or of its table."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from sqlalchemy import Select, select, type_coerce
from sqlalchemy.engine import Connection, IteratorResult, Result
from sqlalchemy.engine.result import SimpleResultMetaData
from sqlalchemy.orm import Mapper, ORMExecuteState

from memstate_sa.capture.guard import Guard
from memstate_sa.capture.recorder import Recorder, require_no_translation, require_supported
from memstate_sa.capture.transaction import OpenTransaction, OpenTransactions
from memstate_sa.db.raw_values import RAW
from memstate_sa.db.rows import TableColumns
from memstate_sa.db.statements import take_write_lock
from memstate_sa.errors import ConflictError
from memstate_sa.tracking.inheritance import inheritance_criterion
from memstate_sa.tracking.registry import Registry
from memstate_sa.tracking.tracked import Tracked

RawKey = tuple[Any, ...]
"""A primary key as the driver has it."""

_ATTEMPTS = 5
_REPLACES = "OR REPLACE and the like change rows unseen; on_conflict_do_update()"
_LEAVES_BASE = "it leaves the base class' row; delete the objects"
_CHANGES_KEYS = "it changes primary keys; do that on the objects"
_WHERE_OF_MANY = "give executemany rows their primary keys instead of a WHERE"
_SHARES_TABLE = "it is one of several classes in this table; give it their keys"


class BulkCapture:
    """Runs the bulk statements of Sessions, and logs what they change."""

    def __init__(self, registry: Registry, recorder: Recorder, transactions: OpenTransactions, guard: Guard) -> None:
        self._registry = registry
        self._recorder = recorder
        self._transactions = transactions
        self._guard = guard

    def execute(self, state: ORMExecuteState) -> Result[Any] | None:
        """Run a statement that changes tracked rows, and log it. None leaves it to SQLAlchemy, and to the guard.

        A SAVEPOINT takes back an attempt that met rows which others had just committed.
        """
        if not (state.is_insert or state.is_update or state.is_delete):
            return None
        tracked = self._target(state)
        if tracked is None or tracked.by_trigger:
            return None
        require_no_translation(state.execution_options)
        mapper = state.bind_mapper or tracked.mapper
        if state.session.autoflush:
            state.session.flush()
        connection = state.session.connection(bind_arguments={"mapper": mapper, **state.bind_arguments})
        transaction = self._transactions.of(state.session)
        require_supported(connection, transaction)
        with transaction.writing():
            take_write_lock(connection)
        statement = self._statement(state, mapper, tracked, connection, transaction)
        for _attempt in range(_ATTEMPTS):
            savepoint = connection.begin_nested()
            result = None
            try:
                result = statement.run()
            finally:
                if result is None:
                    savepoint.rollback()
                    for instance in list(state.session.identity_map.values()):  # synchronised with what is undone
                        if isinstance(instance, mapper.class_):
                            state.session.expire(instance)
            if result is not None:
                savepoint.commit()
                return result
        raise ConflictError(
            f"others keep committing rows of {tracked.entity} that match this statement; run the transaction again"
        )

    def _target(self, state: ORMExecuteState) -> Tracked | None:
        """The tracked class whose rows the statement changes, if they can be told from the statement."""
        if state.is_orm_statement:
            return None if state.bind_mapper is None else self._registry.find(state.bind_mapper)
        statement: Any = state.statement
        tracked = self._registry.by_table.get(statement.table)
        # Of one class among several in a table, or with a WHERE for each set of parameters: left to the guard. So is
        # an INSERT of a part of a row.
        if (
            tracked is None
            or tracked.criterion is not None
            or statement.table in tracked.tables[: tracked.base_table_count]
        ):
            return None
        if state.is_insert:
            return tracked if len(tracked.tables) == 1 or statement.table is tracked.table else None
        return None if isinstance(state.parameters, (list, tuple)) else tracked

    def _statement(
        self,
        state: ORMExecuteState,
        mapper: Mapper[Any],
        tracked: Tracked,
        connection: Connection,
        transaction: OpenTransaction,
    ) -> BulkStatement:
        """The statement by its kind. Refuses what cannot be logged."""
        statement: Any = state.statement
        kind: type[BulkStatement]
        if statement._prefixes:
            self._guard.refuse(connection, statement, _REPLACES)
            kind = _Unseen
        elif not state.is_insert:
            if state.is_delete and tracked.base_table_count:
                self._guard.refuse(connection, statement, _LEAVES_BASE)
            kind = _Change
        elif statement._post_values_clause is None:
            kind = _Insert
        elif _upserts_key(statement, tracked):
            self._guard.refuse(connection, statement, _CHANGES_KEYS)
            kind = _Unseen
        else:
            kind = _Upsert
        return kind(self._recorder, self._guard, state, mapper, tracked, connection, transaction)


@dataclass
class BulkStatement:
    """One statement on one tracked class."""

    recorder: Recorder
    guard: Guard
    state: ORMExecuteState
    mapper: Mapper[Any]
    tracked: Tracked
    connection: Connection
    transaction: OpenTransaction

    def run(self) -> Result[Any] | None:
        """Run the statement, and log what it changed. None asks for another attempt, after a rollback of this one."""
        raise NotImplementedError

    @property
    def statement(self) -> Any:
        return self.state.statement

    @property
    def columns(self) -> TableColumns:
        return self.tracked.columns_for(self.connection.dialect)

    def run_returning_keys(self) -> tuple[Result[Any], list[RawKey]]:
        """Run an INSERT; its result as the caller wants it, and the keys of the rows that it inserted or changed."""
        keys = [getattr(self.mapper.class_, name) for name in self.tracked.key_attributes]
        with self.transaction.writing():
            result: Any = self.state.invoke_statement(statement=self.statement.returning(*keys))
            names = list(result.keys())[: -len(keys)]
            rows = [tuple(row) for row in result.all()]
        returned: Any = _fetched(names, [row[: -len(keys)] for row in rows])
        returned.inserted_primary_key_rows = [row[-len(keys) :] for row in rows]
        if len(rows) == 1:
            returned.inserted_primary_key = rows[0][-len(keys) :]
        return returned, [self.columns.raw_key(row[-len(keys) :]) for row in rows]


class _Unseen(BulkStatement):
    """A write that cannot be logged, where the application is only warned (``on_untracked="warn"``)."""

    def run(self) -> Result[Any]:
        with self.transaction.writing():
            return self.state.invoke_statement()


class _Insert(BulkStatement):
    """INSERT without ON CONFLICT: each row is new."""

    def run(self) -> Result[Any]:
        result, keys = self.run_returning_keys()
        touched = {self.tracked: dict.fromkeys(keys, False)}
        self.recorder.log_touched(self.connection, self.transaction, touched, ())
        return result


@dataclass
class _Upsert(BulkStatement):
    """INSERT … ON CONFLICT. Only when it has run is it known which rows it changes; what they were, only before.

    So it runs a second time, when it may have changed rows that the log has not seen: the suspects.
    """

    suspects: dict[str, RawKey] = field(default_factory=dict)

    def run(self) -> Result[Any] | None:
        recorder, connection, transaction, tracked = self.recorder, self.connection, self.transaction, self.tracked
        suspects = list(self.suspects.values())
        baselines = recorder.baselines(connection, transaction, tracked, suspects) if suspects else []
        result, raw_keys = self.run_returning_keys()
        by_key = {self.columns.encode_key(raw): raw for raw in raw_keys}
        unknown = recorder.unknown(connection, tracked, by_key)
        if unknown and not suspects and _may_update(self.statement):
            self.suspects = {key: by_key[key] for key in unknown}
            return None
        # A key that the first run did not have comes of a default that is another each time: a row that is new.
        new = {*unknown, *recorder.deleted_before(connection, tracked, list(by_key))}
        new -= {baseline.key for baseline in baselines}
        touched = {raw: key not in new for key, raw in by_key.items()}
        recorder.log_touched(connection, transaction, {tracked: touched}, baselines)
        return result


class _Change(BulkStatement):
    """UPDATE and DELETE: by a WHERE, or by the primary keys of several sets of parameters."""

    def run(self) -> Result[Any] | None:
        """None when others committed matching rows between our look and the statement: look again."""
        if self.state.is_update and _sets_any(self.statement, self._key_columns):
            self.guard.refuse(self.connection, self.statement, _CHANGES_KEYS)
        keys = self._keys_of_parameters() if self._has_parameter_sets else self._matching_keys()
        if keys is None:
            return None
        keys = list(dict.fromkeys(keys))
        baselines = self.recorder.baselines(self.connection, self.transaction, self.tracked, keys)
        with self.transaction.writing():
            result = self.state.invoke_statement()
            if self.statement._returning:  # read to the end: SQLite releases no SAVEPOINT below an open cursor
                result = _fetched(list(result.keys()), [tuple(row) for row in result.all()])
        if self._met_other_rows(result, keys):
            return None
        if self.state.is_update and self._has_parameter_sets:
            images = self.columns.read(self.connection, keys)
            keys = [key for key in keys if self.columns.encode_key(key) in images]
        touched = {self.tracked: dict.fromkeys(keys, True)}
        self.recorder.log_touched(self.connection, self.transaction, touched, baselines, updated=self.state.is_update)
        return result

    @property
    def _table(self) -> Any:
        return self.mapper.local_table if self.state.is_orm_statement else self.statement.table

    @property
    def _key_columns(self) -> list[Any]:
        return list(self._table.primary_key.columns)

    @property
    def _has_parameter_sets(self) -> bool:
        return isinstance(self.state.parameters, (list, tuple))

    def _keys_of_parameters(self) -> list[RawKey]:
        """The keys that sets of parameters name. Locks the first rows of facts in several tables."""
        if self.statement._where_criteria:
            self.guard.refuse(self.connection, self.statement, _WHERE_OF_MANY)
        names = [self.mapper.get_property_by_column(column).key for column in self._key_columns]
        parameter_sets: Any = self.state.parameters
        keys = [self.columns.raw_key([parameters[name] for name in names]) for parameters in parameter_sets]
        if len(self.tracked.tables) > 1:
            self._lock_first_rows(keys)
        return keys

    def _matching_keys(self) -> list[RawKey] | None:
        """The keys of the rows that match, which it locks. None when another fact matches than a moment before."""
        table, criteria = self._table, self.statement._where_criteria
        is_part = table is not self.tracked.table
        if (criterion := inheritance_criterion(self.mapper)) is not None:
            if is_part:
                self.guard.refuse(self.connection, self.statement, _SHARES_TABLE)
            criteria = (*criteria, criterion)
        matching = select(*(type_coerce(column, RAW) for column in self._key_columns)).where(*criteria)
        first_keys: list[RawKey] = []
        if is_part:  # the first row of a fact is locked before its other parts
            first_keys = self._read_keys(matching)
            self._lock_first_rows(first_keys)
        # As the statement itself locks them: one lock that has to grow may wait for another that has to.
        keys = self._read_keys(matching.with_for_update(of=table, key_share=not self.state.is_delete))
        return None if is_part and not set(keys).issubset(first_keys) else keys

    def _read_keys(self, statement: Select[Any]) -> list[RawKey]:
        return [tuple(row) for row in self.connection.execute(statement, self.state.parameters or {}).all()]

    def _lock_first_rows(self, keys: Sequence[RawKey]) -> None:
        self.columns.of_table[self.tracked.table].lock(self.connection, keys)

    def _met_other_rows(self, result: Any, keys: Sequence[RawKey]) -> bool:
        """Whether the statement changed more rows than those of *keys*, or fewer. On SQLite we are the only writer."""
        count: int = getattr(result, "rowcount", -1)
        if self.connection.dialect.name == "sqlite" or self.state.is_executemany:
            return False
        return count not in (-1, len(keys))


def _fetched(names: Sequence[str], rows: Sequence[tuple[Any, ...]]) -> Result[Any]:
    """A result of rows that were fetched already, with the ``rowcount`` that callers of DML ask for."""
    result: Any = IteratorResult(SimpleResultMetaData(names), iter(rows))
    result.rowcount = len(rows)
    return result  # type: ignore[no-any-return]


def _may_update(statement: Any) -> bool:
    """Whether an INSERT with ON CONFLICT does more than nothing. By name: there is a class for each dialect."""
    return not type(statement._post_values_clause).__name__.endswith("DoNothing")


def _upserts_key(statement: Any, tracked: Tracked) -> bool:
    """Whether ON CONFLICT DO UPDATE sets a primary key."""
    sets = getattr(statement._post_values_clause, "update_values_to_set", None) or ()
    return _names_any(sets.keys() if isinstance(sets, Mapping) else [column for column, _ in sets], tracked.key_columns)


def _sets_any(statement: Any, columns: Sequence[Any]) -> bool:
    """Whether an UPDATE sets one of *columns*."""
    ordered = getattr(statement, "_ordered_values", None) or ()  # SQLAlchemy 2.0; in 2.1 they are among the others
    return _names_any([*(statement._values or ()), *(column for column, _ in ordered)], columns)


def _names_any(targets: Iterable[Any], columns: Sequence[Any]) -> bool:
    """Whether any of *targets*, columns or names, is one of *columns*."""
    names = {column.name for column in columns} | {column.key for column in columns}
    return any(getattr(column, "key", column) in names for column in targets)
