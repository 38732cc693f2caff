"""`BulkCapture`: logs the changes of a Session's bulk INSERT, UPDATE and DELETE, on a class or on its table."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from sqlalchemy import Select, inspect, select, type_coerce
from sqlalchemy.engine import Connection, Result
from sqlalchemy.exc import DBAPIError
from sqlalchemy.orm import Mapper, ORMExecuteState
from sqlalchemy.sql.lambdas import LambdaElement
from sqlalchemy.sql.selectable import AliasedReturnsRows
from sqlalchemy.sql.util import ClauseAdapter

from memstate_sa.capture.bulk_results import CapturedResult
from memstate_sa.capture.guard import Guard
from memstate_sa.capture.looks import Look, RawKey, with_others
from memstate_sa.capture.recorder import Recorder, require_supported, require_visible
from memstate_sa.capture.supported import require_no_translation
from memstate_sa.capture.transaction import OpenTransaction, OpenTransactions
from memstate_sa.db.dialects import POSTGRESQL, database_of
from memstate_sa.db.raw_values import RAW
from memstate_sa.db.rows import TableColumns
from memstate_sa.db.statements import take_write_lock
from memstate_sa.errors import ConflictError
from memstate_sa.tracking.inheritance import inheritance_criterion
from memstate_sa.tracking.registry import Registry, unaliased
from memstate_sa.tracking.tracked import Tracked

_ATTEMPTS = 5
_REPLACES = "A prefix such as OR REPLACE changes rows that capture cannot see. Use on_conflict_do_update()."
_RETURNS_STAR = (
    "An ORM statement with RETURNING * cannot return the keys of its rows too. Use returning(*Model.__table__.columns)."
)
_LEAVES_BASE = "It leaves the base class' row in place. Delete the objects instead."
_CHANGES_KEYS = "It changes primary keys. Change them on the objects instead."
_WHERE_OF_MANY = "It has a WHERE for several sets of parameters. Give each set its primary key instead."
_SHARES_TABLE = "Its table holds several classes. Pass the primary keys as sets of parameters, instead of a WHERE."
_VOLATILE = (
    "Its WHERE matches other rows each time it is evaluated. Select the primary keys first, and use them in the WHERE."
)
_REPLACED = (
    "Another do_orm_execute listener replaced the statement, so the rows that it changes are not known. Change it with "
    "state.statement.where(...) there, or listen before memory.attach()."
)
_NO_KEYS = "return_defaults() does not return the keys of all rows. Use returning()."
_NOT_SUPPORTED = "0A000"  # PostgreSQL's error for RETURNING on a table with an INSTEAD rule
_KEY_NAME = "memstate_key_{}"


class BulkCapture:
    """Runs the bulk statements of Sessions, and logs the rows that they change."""

    def __init__(self, registry: Registry, recorder: Recorder, transactions: OpenTransactions, guard: Guard) -> None:
        self._registry = registry
        self._recorder = recorder
        self._transactions = transactions
        self._guard = guard

    def execute(self, state: ORMExecuteState) -> Result[Any] | None:
        """Run a statement that changes tracked rows, and log its changes.

        Returns None for other statements. Then SQLAlchemy runs the statement, and the guard checks it.
        """
        if not (state.is_insert or state.is_update or state.is_delete):
            return None
        dml = _dml_of(state.statement)
        target = self._target(state, dml)
        if target is None or target[0].by_trigger:
            return None
        tracked, mapper = target
        require_no_translation(state.execution_options)
        if state.execution_options.get("autoflush", True):
            state.session._autoflush()  # the call does nothing in a flush or under no_autoflush
        connection = state.session.connection(bind_arguments={"mapper": mapper, **state.bind_arguments})
        transaction = self._transactions.of(state.session)
        require_supported(connection, transaction)
        with transaction.writing():
            take_write_lock(connection)
        kind = self._kind(state, dml, tracked, connection)
        statement = kind(self._recorder, self._guard, state, dml, mapper, tracked, connection, transaction)
        return statement.execute()

    def _target(self, state: ORMExecuteState, dml: Any) -> tuple[Tracked, Mapper[Any]] | None:
        """The tracked class whose rows *dml* changes, and its mapper. None when only the guard checks *dml*."""
        entity = dml.table._annotations.get("parententity")
        if entity is not None:  # the statement names a class; an ORM subquery does not count
            mapper = entity.mapper
            tracked = self._registry.find(mapper)
            return None if tracked is None else (tracked, mapper)
        tracked = self._registry.by_table.get(dml.table)
        # The guard refuses three kinds of statements on a table:
        # 1. The table holds several classes.
        # 2. A WHERE comes with several sets of parameters.
        # 3. An INSERT writes only a part of a fact.
        if tracked is None or tracked.criterion is not None or dml.table in tracked.tables[: tracked.base_table_count]:
            return None
        if state.is_insert:
            is_whole = len(tracked.tables) == 1 or dml.table is tracked.table
        else:
            is_whole = not isinstance(state.parameters, (list, tuple))
        return (tracked, tracked.mapper) if is_whole else None

    def _kind(self, state: ORMExecuteState, dml: Any, tracked: Tracked, connection: Connection) -> type[BulkStatement]:
        """The class of ours that runs *dml* and logs it. Refuses a statement that cannot be logged."""
        if dml._prefixes:
            self._guard.refuse(connection, dml, _REPLACES)
            return _Unseen
        if _returns_star(dml):
            self._guard.refuse(connection, dml, _RETURNS_STAR)
            return _Unseen
        if not state.is_insert:
            if state.is_delete and tracked.base_table_count:
                self._guard.refuse(connection, dml, _LEAVES_BASE)
            return _ChangeByKeys if isinstance(state.parameters, (list, tuple)) else _Change
        if dml._post_values_clause is None:
            return _Insert
        if _upserts_key(dml, tracked):
            self._guard.refuse(connection, dml, _CHANGES_KEYS)
            return _Unseen
        return _Upsert


@dataclass
class BulkStatement:
    """One statement on one tracked class."""

    recorder: Recorder
    guard: Guard
    state: ORMExecuteState
    dml: Any  # the INSERT, UPDATE or DELETE of the statement
    mapper: Mapper[Any]
    tracked: Tracked
    connection: Connection
    transaction: OpenTransaction

    def execute(self) -> Result[Any]:
        """Run the statement. Repeat it while it changes rows that have no entry in the log."""
        is_taken_back = True
        try:
            for number in range(_ATTEMPTS):
                result = self._attempt()
                if result is not None:
                    is_taken_back = number > 0
                    return result
            raise ConflictError(
                f"Cannot log this statement: after {_ATTEMPTS} attempts it still changes rows of "
                f"{self.tracked.entity} that have no entry. Others may keep committing rows that match: run the "
                f"transaction again. If this error comes again: {_VOLATILE}"
            )
        finally:
            if is_taken_back:
                self._expire_instances(modified=True)

    def _attempt(self) -> Result[Any] | None:
        """Run the statement in a SAVEPOINT. Roll it back when the statement fails or must run again."""
        savepoint = self.connection.begin_nested()
        result = None
        try:
            result = self.run()
        finally:
            if result is None:
                savepoint.rollback()
                self._expire_instances(modified=False)
        if result is not None:
            savepoint.commit()
        return result

    def run(self) -> Result[Any] | None:
        """Run the statement, and log its changes. Returns None to ask for a rollback and another attempt."""
        raise NotImplementedError

    @property
    def columns(self) -> TableColumns:
        return self.tracked.columns_for(self.connection.dialect)

    def invoke(self, keys: Sequence[Any] = ()) -> Result[Any]:
        """Run the statement as it is, or with *keys* as the last columns that it returns."""
        statement: Any = self.state.statement
        if keys:
            dml = self.dml.returning(*keys)
            statement = _from_statement(statement, dml, keys) if _is_from_statement(statement) else dml
        with self.transaction.writing():
            self.transaction.statement_on = self.connection
            try:
                return self.state.invoke_statement(statement=statement)
            finally:
                self.transaction.statement_on = None

    def run_returning_keys(self) -> tuple[Result[Any], list[RawKey]]:
        """Run an INSERT. Return the caller's result, and the keys of the rows that it inserted or changed."""
        if self.dml._return_defaults:  # the result has the keys, and RETURNING is impossible
            return self._run_returning_defaults()
        # SQLAlchemy inserts into this table last. A subclass' key may have a name of its own.
        table: Any = self.mapper.local_table
        names = [self.mapper.get_property_by_column(column).key for column in table.primary_key]
        keys = [getattr(self.mapper.class_, name) for name in names]
        if len(self.mapper.tables) == 1:  # SQLAlchemy takes no label() for several tables
            keys = [key.label(_KEY_NAME.format(n)) for n, key in enumerate(keys)]
        result, returned = self.captured(self.invoke(keys), [key.key for key in keys], names)
        return result, [self.columns.raw_key(key) for key in returned]

    def _run_returning_defaults(self) -> tuple[Result[Any], list[RawKey]]:
        result: Any = self.invoke()
        keys = [self.columns.raw_key(key) for key in result.inserted_primary_key_rows if None not in key]
        if len(keys) < len(result.inserted_primary_key_rows):
            self.guard.refuse(self.connection, self.dml, _NO_KEYS)
        return result, keys

    def captured(self, result: Any, names: Sequence[str], key_names: Sequence[str]) -> tuple[Result[Any], list[RawKey]]:
        """*result* without its last columns, which are named *names*, and the keys that were in these columns."""
        if getattr(result, "returns_rows", True):
            has_keys = list(result.keys())[-len(names) :] == list(names)
            result = CapturedResult(result, key_names if has_keys else ())
            if has_keys:
                return result, result.keys_returned
        self.guard.refuse(self.connection, self.dml, _REPLACED)
        return result, []

    def _expire_instances(self, *, modified: bool) -> None:
        """Expire the instances that SQLAlchemy synchronised with a statement that was rolled back.

        Instances with pending changes (*modified*) keep them, and are expired only after the last attempt. SQLAlchemy
        cannot tell whether an expired instance matches a statement, and would forget its changes.
        """
        for instance in list(self.state.session.identity_map.values()):
            state: Any = inspect(instance)
            if isinstance(instance, self.mapper.class_) and state.modified is modified:
                self.state.session.expire(instance, state.unmodified if modified else None)


class _Unseen(BulkStatement):
    """A write that cannot be logged. The application asked only for a warning (``on_untracked="warn"``)."""

    def run(self) -> Result[Any]:
        return self.invoke()


class _Insert(BulkStatement):
    """INSERT without ON CONFLICT: each row is new."""

    def run(self) -> Result[Any]:
        result, keys = self.run_returning_keys()
        self.recorder.log(self.connection, self.transaction, self.tracked, (), keys)
        return result


@dataclass
class _Upsert(BulkStatement):
    """INSERT … ON CONFLICT. We know its rows only after it has run, but must read their old images before.

    So the statement runs twice if its first run may have changed rows without an entry, the ``suspects``.
    """

    suspects: list[RawKey] = field(default_factory=list)

    def run(self) -> Result[Any] | None:
        recorder, connection, transaction, tracked = self.recorder, self.connection, self.transaction, self.tracked
        suspects = self.suspects
        looks = recorder.look(connection, transaction, tracked, suspects, remembered=False) if suspects else []
        result, raw_keys = self.run_returning_keys()
        if not suspects and _may_update(self.dml):
            by_key = {self.columns.canonical_raw(raw): raw for raw in raw_keys}
            if unknown := recorder.unknown(connection, tracked, by_key):
                self.suspects = [by_key[key] for key in unknown]
                return None
        # If only the second run has a key, the key comes from a random default, and its row is new.
        recorder.log(connection, transaction, tracked, with_others(looks, raw_keys))
        return result


@dataclass
class _Change(BulkStatement):
    """UPDATE or DELETE with a WHERE.

    A look reads the matching rows before the statement runs, for their baselines. RETURNING shows the changed rows.
    """

    suspects: dict[RawKey, None] = field(default_factory=dict)  # rows that an attempt changed without a look
    returns_keys: bool = True

    def run(self) -> Result[Any] | None:
        """Run the statement, and log its changes. Returns None when it changed rows that had no look.

        There are three causes: others have just committed such rows, another listener changed the statement, or its
        WHERE is random. The next attempt looks at these rows too.
        """
        self.refuse_changed_keys()
        matching_keys = self._matching_keys()
        if matching_keys is None:
            return None
        keys = list(dict.fromkeys([*matching_keys, *self.suspects]))
        before = self.recorder.look(self.connection, self.transaction, self.tracked, keys)
        if not self._can_return_keys:
            return self._run_counting(keys, before)
        names = [key.name for key in self._returned_keys]
        try:
            result, returned = self.captured(self.invoke(self._returned_keys), names, names)
        except DBAPIError as error:
            if getattr(error.orig, "sqlstate", None) != _NOT_SUPPORTED:
                raise
            self.returns_keys = False
            return None
        others = dict.fromkeys(returned)
        for key in keys:
            others.pop(key, None)
        if others and self._may_look_again(others):
            return None
        return self.log_changed(result, [*keys, *others], before)

    def log_changed(self, result: Result[Any], keys: Sequence[RawKey], before: Sequence[Look]) -> Result[Any]:
        """Log the changes of the rows with these keys. A row that did not change gets no entry."""
        looks = with_others(before, keys)
        count = self.recorder.log(self.connection, self.transaction, self.tracked, looks)
        is_doubtful = self.state.is_update and count < len(keys)
        if is_doubtful and self.recorder.count_lost(self.connection, self.transaction, self.tracked, keys):
            require_visible(self.connection, self.tracked)
        return result

    def refuse_changed_keys(self) -> None:
        if self.state.is_update and _sets_any(self.dml, self.key_columns):
            self.guard.refuse(self.connection, self.dml, _CHANGES_KEYS)

    @property
    def key_columns(self) -> list[Any]:
        return list(self.dml.table.primary_key)  # the table may be an alias

    def lock_first_rows(self, keys: Sequence[RawKey]) -> None:
        self.columns.of_table[self.tracked.table].lock(self.connection, keys)

    @property
    def _can_return_keys(self) -> bool:
        dialect, database = self.connection.dialect, database_of(self.connection)
        is_able = dialect.update_returning if self.state.is_update else dialect.delete_returning
        # With RETURNING, synchronize_session='fetch' adds key columns that are qualified by the first table's name. All
        # databases refuse that name in a DELETE from another table. PostgreSQL also refuses it when an alias hides it.
        is_able &= self.state.is_update or unaliased(self.dml.table) == self.tracked.table
        is_able &= database is not POSTGRESQL or not isinstance(self.dml.table, AliasedReturnsRows)
        return self.returns_keys and is_able and not self.dml._return_defaults

    @property
    def _returned_keys(self) -> list[Any]:
        raw = [type_coerce(column, RAW) for column in self.key_columns]
        return [column.label(_KEY_NAME.format(n)) for n, column in enumerate(raw)]

    def _may_look_again(self, others: dict[RawKey, None]) -> bool:
        """Whether to try again, now that this attempt changed *others* without a look. Refuses a random WHERE."""
        if self.suspects and database_of(self.connection).has_one_writer:  # no other writer can have added these rows
            self.guard.refuse(self.connection, self.dml, _VOLATILE)
            return False
        self.suspects |= others
        return True

    def _invoke_as_given(self) -> Any:
        """Run the statement without adding our keys to its result."""
        result = self.invoke()
        return CapturedResult(result) if self.dml._returning else result

    def _run_counting(self, keys: Sequence[RawKey], before: Sequence[Look]) -> Result[Any] | None:
        """Run the statement without our RETURNING. Returns None when it changed more rows than *keys* has."""
        result = self._invoke_as_given()
        if not database_of(self.connection).has_one_writer and result.rowcount > len(keys):
            return None
        return self.log_changed(result, keys, before)

    def _matching_keys(self) -> list[RawKey] | None:
        """The keys of the rows that match. None when a row matches now whose first row is not locked yet.

        The rows are locked, unless the statement is a DELETE that can return their keys. PostgreSQL lets a role lock
        rows only if it may update them, and a role may have only the right to delete.
        """
        table, criteria = self.dml.table, self.dml._where_criteria
        is_part = unaliased(table) != self.tracked.table  # "is" fails for an annotated table
        if (criterion := inheritance_criterion(self.mapper)) is not None:
            if is_part:
                self.guard.refuse(self.connection, self.dml, _SHARES_TABLE)
            criteria = (*criteria, ClauseAdapter(table).traverse(criterion))
        matching = select(*(type_coerce(column, RAW) for column in self.key_columns)).where(*criteria)
        first_keys: list[RawKey] = []
        if is_part:  # lock the first row of a fact before its other parts
            first_keys = self._read_keys(matching)
            self.lock_first_rows([*first_keys, *self.suspects])
        if self.state.is_update or not self._can_return_keys:
            # Take the lock of the statement itself. Two transactions with weaker locks would wait for each other.
            matching = matching.with_for_update(of=table, key_share=not self.state.is_delete)
        keys = self._read_keys(matching)
        return None if is_part and not set(keys).issubset(first_keys) else keys

    def _read_keys(self, statement: Select[Any]) -> list[RawKey]:
        return [tuple(row) for row in self.connection.execute(statement, self.state.parameters or {}).all()]


class _ChangeByKeys(_Change):
    """UPDATE or DELETE by primary key, with several sets of parameters."""

    def run(self) -> Result[Any]:
        self.refuse_changed_keys()
        if self.dml._where_criteria:
            self.guard.refuse(self.connection, self.dml, _WHERE_OF_MANY)
        names = [self.mapper.get_property_by_column(column).key for column in self.mapper.local_table.primary_key]
        parameter_sets: Any = self.state.parameters
        if not all(name in parameters for parameters in parameter_sets for name in names):
            return self.state.invoke_statement()  # SQLAlchemy's error names the missing key
        keys = list(dict.fromkeys(self.columns.raw_key([params[name] for name in names]) for params in parameter_sets))
        if len(self.tracked.tables) > 1:
            self.lock_first_rows(keys)
        before = self.recorder.look(self.connection, self.transaction, self.tracked, keys)
        result: Result[Any] = self._invoke_as_given()
        self.recorder.log(self.connection, self.transaction, self.tracked, before)
        return result


def _dml_of(statement: Any) -> Any:
    """The INSERT, UPDATE or DELETE of a statement, which may be wrapped in a lambda or in `from_statement`."""
    if isinstance(statement, LambdaElement):
        statement = statement._resolved
    return statement.element if _is_from_statement(statement) else statement


def _returns_star(dml: Any) -> bool:
    """Whether a RETURNING * keeps the statement from returning keys. This is so on a class, but not on a table."""
    return "parententity" in dml.table._annotations and any(column._is_star for column in dml._returning)


def _is_from_statement(statement: Any) -> bool:
    return bool(getattr(statement, "is_from_statement", False))


def _from_statement(statement: Any, dml: Any, keys: Sequence[Any]) -> Any:
    """A ``select(...).from_statement(...)`` that also selects *keys* from *dml*."""
    changed: Any = select(*statement._raw_columns, *keys).from_statement(dml)
    return changed.options(*statement._with_options).execution_options(**statement._execution_options)


def _may_update(statement: Any) -> bool:
    """Whether an INSERT with ON CONFLICT may update rows. It looks at the name, as each dialect has a class."""
    return not type(statement._post_values_clause).__name__.endswith("DoNothing")


def _upserts_key(statement: Any, tracked: Tracked) -> bool:
    """Whether ON CONFLICT DO UPDATE sets a primary key."""
    sets = getattr(statement._post_values_clause, "update_values_to_set", None) or ()
    return _names_any(sets.keys() if isinstance(sets, Mapping) else [column for column, _ in sets], tracked.key_columns)


def _sets_any(statement: Any, columns: Sequence[Any]) -> bool:
    """Whether an UPDATE sets one of *columns*."""
    ordered = getattr(statement, "_ordered_values", None) or ()  # SQLAlchemy 2.1 has all of them in _values
    return _names_any([*(statement._values or ()), *(column for column, _ in ordered)], columns)


def _names_any(targets: Iterable[Any], columns: Sequence[Any]) -> bool:
    """Whether any of *targets*, columns or names, is one of *columns*."""
    names = {column.name for column in columns} | {column.key for column in columns}
    return any(getattr(column, "key", column) in names for column in targets)
