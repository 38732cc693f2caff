"""Session events -> log and outbox, on the caller's connection, in the caller's transaction.

Mapper events note which keys a flush touches; after the flush the rows themselves are read back, and their images are
logged. What the database computed, rounded or defaulted is thereby in the image, and a SAVEPOINT that rolls back takes
exactly its own entries with it: the database is the buffer. (Reading attributes, or collecting until commit, is wrong
in most random histories.)
"""

from __future__ import annotations

import itertools
import threading
import weakref
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from datetime import datetime
from functools import partial
from typing import Any, Protocol
from weakref import WeakKeyDictionary, WeakSet

from pydantic import ValidationError
from sqlalchemy import Select, inspect, select, type_coerce
from sqlalchemy.engine import Connection, Engine, IteratorResult, Result
from sqlalchemy.engine.result import SimpleResultMetaData
from sqlalchemy.exc import UnboundExecutionError
from sqlalchemy.orm import Mapper, ORMExecuteState, Session, SessionTransaction, scoped_session, sessionmaker
from sqlalchemy.orm.attributes import set_attribute
from sqlalchemy.orm.base import NO_VALUE
from sqlalchemy.sql import ClauseElement
from sqlalchemy.sql.dml import UpdateBase

from memstate_sa.capture import cascades, triggers
from memstate_sa.capture.recorder import TWO_DATABASES, Recorder, require_no_translation, require_supported
from memstate_sa.capture.transaction import Flush, OpenTransaction
from memstate_sa.db import missing_tables, sqlite
from memstate_sa.db.raw_values import RAW
from memstate_sa.db.statements import take_write_lock
from memstate_sa.db.tables import in_utc
from memstate_sa.errors import ConflictError, MemstateError, UntrackedWrite
from memstate_sa.runtime import listening
from memstate_sa.runtime.printable import printable_logger
from memstate_sa.runtime.warn import warn
from memstate_sa.tracking.inheritance import inheritance_criterion
from memstate_sa.tracking.registry import Registry, unaliased
from memstate_sa.tracking.tracked import Tracked
from memstate_sa.tracking.validation import to_validation_failed

logger = printable_logger("memstate_sa.capture.listeners")


class UntrackedWriteWarning(UserWarning):
    """A write to a tracked table bypassed the log (``on_untracked="warn"``)."""


class Veto(Protocol):
    """What brings the indexes up to date before a commit, which it vetoes by raising."""

    def write(self, session: Session, unit: OpenTransaction) -> None: ...

    def committed(self, unit: OpenTransaction) -> None: ...

    def ended(self, unit: OpenTransaction) -> None: ...


class Capture:
    """The listeners of one Memory. It holds no Session alive, and touches none it was not attached to."""

    def __init__(
        self,
        registry: Registry,
        recorder: Recorder,
        committed: Callable[[Engine], None],
        veto: Veto | None = None,
    ) -> None:
        self._registry = registry
        self._recorder = recorder
        self._committed = committed
        self._veto = veto
        self._units: WeakKeyDictionary[Session, OpenTransaction] = WeakKeyDictionary()
        # Of each Session's last commit: its transactions (an undo is one of its own), and where.
        self.committed: WeakKeyDictionary[Session, tuple[Sequence[str], Engine]] = WeakKeyDictionary()
        self._flushes: dict[int, Flush] = {}  # by Session.hash_key, which every InstanceState knows
        self._guarded: WeakSet[Engine] = WeakSet()
        self._telling: WeakSet[Engine] = WeakSet()
        self._told: WeakKeyDictionary[Connection, str] = WeakKeyDictionary()  # the transaction that triggers know of
        self._seen: WeakSet[Engine] = WeakSet()  # with a connection
        # By reference: a unit has its connections, and would keep the key of its own entry alive.
        self._active: WeakKeyDictionary[Connection, list[weakref.ref[OpenTransaction]]] = WeakKeyDictionary()
        self._attached: weakref.WeakSet[Any] = weakref.WeakSet()
        self._is_listening = True
        self._wakers: list[_Waker] = []
        self._turn = 0  # the order in which Captures were attached
        _remember(self)
        self._checked: Any = None  # the entities of which the cascades are known
        self._cascades: set[cascades.ForeignKey] = set()  # those that were warned of
        self.mapper_listeners: dict[str, Callable[..., None]] = {
            "after_insert": self._after_insert,
            "before_update": self._before_update,
            "after_update": self._after_update,
            "before_delete": self._before_delete,
        }
        self.engine_listeners: dict[str, Callable[..., None]] = {"before_cursor_execute": self._before_statement}
        self._telling_listeners: dict[str, Callable[..., None]] = {
            "commit": self._before_connection_commits,
            "rollback_savepoint": self._doubt_told,
            **dict.fromkeys(("rollback", "commit_twophase", "rollback_twophase"), self._forget_told),
        }
        self.session_listeners: dict[str, Callable[..., Any]] = {
            "after_begin": self._after_begin,
            "before_flush": self._before_flush,
            "after_flush": self._after_flush,
            "do_orm_execute": self._do_orm_execute,
            "before_commit": self._before_commit,
            "after_commit": self._after_commit,
            "after_rollback": self._after_rollback,
            "after_transaction_end": self._after_transaction_end,
        }

    # -- wiring ----------------------------------------------------------------------------------------------------

    def track(self, tracked: Tracked) -> None:
        self._registry.add(tracked)
        self._listen_to_model(tracked)
        self._registry.publish()

    def _listen_to_model(self, tracked: Tracked) -> None:
        for name, listener in () if tracked.by_trigger else self.mapper_listeners.items():
            listening.listen(tracked.model, name, listener, raw=True, propagate=True)
        constructed = "after_mapper_constructed"
        listening.listen(tracked.model, constructed, self._after_mapper_constructed, propagate=True)

    def stop(self) -> None:
        """Hold on to no class, Session or engine, until an attached Session is used again."""
        if not self._is_listening:
            return
        self._is_listening = False
        for tracked in self._registry.by_entity.values():
            for name, listener in self.mapper_listeners.items():
                listening.stop(tracked.model, name, listener)
            listening.stop(tracked.model, "after_mapper_constructed", self._after_mapper_constructed)
        for target in list(self._attached):
            for name, listener in self.session_listeners.items():
                listening.stop(target, name, listener)
            self._wakers += [_Waker(target, name, self) for name in _BEGINNINGS]
        for engine in list(self._guarded):
            for name, listener in {**self.engine_listeners, **self._telling_listeners}.items():
                listening.stop(engine, name, listener)
        self._guarded.clear()
        self._telling.clear()

    def resume(self) -> None:
        """Listen again to what was tracked and attached before `stop`."""
        if not self._is_listening:
            self._is_listening = True
            while self._wakers:
                self._wakers.pop().stop()
            for tracked in self._registry.by_entity.values():
                self._listen_to_model(tracked)
            for target in list(self._attached):
                self._listen_to_sessions(target)

    def is_superseded(self, session: Session) -> bool:
        """Whether a Memory that was attached later captures the same tables of *session*: one entry is enough."""
        others = (other for reference in _captures if (other := reference()) is not None)
        return any(
            other._turn > self._turn
            and other.is_attached(session)
            and not self._registry.by_table.keys().isdisjoint(other._registry.by_table)
            for other in others
        )

    def _after_mapper_constructed(self, mapper: Mapper[Any], model: type[Any]) -> None:
        """A subclass of a tracked class."""
        self._registry.extend(mapper)
        self._registry.publish()

    def attach(self, target: Any) -> None:
        """Listen to the Sessions of *target*. Idempotent."""
        factory = getattr(target, "session_factory", target)  # a scoped_session's attributes make a Session
        bind = factory.kw.get("bind") if hasattr(factory, "kw") else getattr(factory, "bind", None)
        bind = getattr(bind, "sync_engine", bind)
        if isinstance(bind, Engine):
            self.guard(bind)
        target = self._sync_target(target)
        if target in self._attached or (isinstance(target, type) and self._attached.intersection(target.__mro__)):
            return
        self._listen_to_sessions(target)
        self._attached.add(target)
        self._turn = next(_turns)

    def _listen_to_sessions(self, target: Any) -> None:
        for name, listener in self.session_listeners.items():
            listening.listen(target, name, listener)

    def _sync_target(self, target: Any) -> Any:
        if isinstance(target, type) and issubclass(target, Session):
            return target
        if isinstance(target, (sessionmaker, Session)):
            return target.class_ if isinstance(target, sessionmaker) else target
        if isinstance(target, scoped_session):
            return self._sync_target(target.session_factory)
        if type(target).__module__.startswith("sqlalchemy.ext.asyncio"):
            return self._async_target(target)
        raise TypeError(
            f"cannot attach to {target!r}; give a sessionmaker, a Session class, a scoped_session or an "
            "async_sessionmaker"
        )

    def _async_target(self, target: Any) -> Any:
        from sqlalchemy.ext.asyncio import AsyncSession, async_scoped_session, async_sessionmaker

        if isinstance(target, AsyncSession):
            return target.sync_session
        if isinstance(target, async_scoped_session):
            return self._async_target(target.session_factory)
        if not isinstance(target, async_sessionmaker):
            raise TypeError(f"cannot attach to {target!r}; give the async_sessionmaker")
        current = target.kw.get("sync_session_class") or target.class_.sync_session_class
        if current in self._attached:
            return current
        # By default the class is SQLAlchemy's own Session: listening on it would attach every Session of the process.
        own = type("MemstateSession", (current,), {})
        target.configure(sync_session_class=own)
        return own

    @property
    def is_any_attached(self) -> bool:
        return bool(self._attached)

    def is_attached(self, session: Session) -> bool:
        return session in self._attached or any(base in self._attached for base in type(session).__mro__)

    # -- the open transaction ----------------------------------------------------------------------------------------

    def unit(self, session: Session) -> OpenTransaction:
        unit = self._units.get(session)
        if unit is None:
            unit = self._units[session] = OpenTransaction()
        return unit

    def open_unit(self, session: Session) -> OpenTransaction | None:
        """What is known of the transaction *session* has open, or None."""
        return self._units.get(session)

    def _after_begin(self, session: Session, transaction: SessionTransaction, connection: Connection) -> None:
        unit = self.unit(session)
        if connection not in unit.connections:
            unit.connections.add(connection)
            # Several Sessions may share a connection.
            self._active.setdefault(connection, []).append(weakref.ref(unit))
            if self._registry.by_trigger and self._has_triggers(session, connection):
                unit.telling.add(connection)
        engine = connection.engine
        self.guard(engine)
        self.warn_of_cascades()
        if engine not in self._seen:
            self._seen.add(engine)
            if engine.dialect.name == "sqlite":
                sqlite.warn_of_savepoints(connection)

    def warn_of_cascades(self) -> None:
        """UntrackedWriteWarning, once for each foreign key by which the database changes rows past the log.

        Without configured mappers, only of those to classes that are not tracked.
        """
        entities = self._registry.by_entity
        if entities is self._checked:
            return
        known = cascades.are_known(entities)
        for tracked in entities.values():
            keys = [key for table in tracked.tables for key in cascades.mapped(table) if key not in self._cascades]
            if not known:
                keys = [key for key in keys if key.parent not in self._registry.by_table_name]
            for key, message in cascades.unseen(self._registry, tracked, keys):
                self._cascades.add(key)
                warn(message, UntrackedWriteWarning)
        if known:
            self._checked = entities

    def _has_triggers(self, session: Session, connection: Connection) -> bool:
        """Whether *connection* is where *session* has a class that is captured by triggers."""
        for tracked in self._registry.by_entity.values():
            if tracked.by_trigger:
                with suppress(UnboundExecutionError):
                    if session.get_bind(tracked.mapper).engine is connection.engine:
                        return True
        return False

    @property
    def engines(self) -> Collection[Engine]:
        """Those that are listened to."""
        return list(self._guarded)

    def guard(self, engine: Engine) -> None:
        """Listen to the statements of *engine*; better early: one that another thread runs meanwhile would fail."""
        # Noted last, as what is noted is believed; what two threads ask to be listened to is listened to once.
        if engine not in self._guarded:
            missing_tables.explain(engine)
            self._listen_to_engine(engine, self.engine_listeners)
            self._guarded.add(engine)
        if self._registry.by_trigger and engine not in self._telling:
            self._listen_to_engine(engine, self._telling_listeners)
            self._telling.add(engine)

    def _listen_to_engine(self, engine: Engine, listeners: Mapping[str, Callable[..., None]]) -> None:
        for name, listener in listeners.items():
            listening.listen(engine, name, listener)

    def _before_commit(self, session: Session) -> None:
        if session.in_nested_transaction():  # fires at every SAVEPOINT release too
            return
        session.flush()  # the commit's own flush comes after this event
        unit = self._units.get(session)
        if unit is None:
            return
        if unit.told_on is not None and not unit.logged:
            unit.logged = triggers.have_logged(unit.told_on, unit.tx)
            unit.written_on = unit.told_on
        if not unit.logged:
            return
        if not unit.sealed and any(unit.labels.values()) and unit.tx in unit.logged_under:
            assert unit.written_on is not None
            self._recorder.write_header(unit.written_on, unit.tx, unit.labels)
            unit.sealed = True
        if self._veto is not None:
            self._veto.write(session, unit)
        unit.armed = True

    def _after_commit(self, session: Session) -> None:
        unit = self._units.get(session)
        if unit is not None and unit.armed and not session.in_nested_transaction():
            assert unit.written_on is not None
            self.committed[session] = (unit.logged_under, unit.written_on.engine)
            if self._veto is not None:
                self._veto.committed(unit)
            self._committed(unit.written_on.engine)

    def _after_rollback(self, session: Session) -> None:
        """A transaction, a SAVEPOINT, or a flush that failed: what it had under way will not happen."""
        self._end_flush(session)
        unit = self._units.get(session)
        if unit is not None:
            unit.armed = False

    def _after_transaction_end(self, session: Session, transaction: SessionTransaction) -> None:
        """The only event that close() and cancellation fire."""
        if transaction.parent is not None:
            return
        self._end_flush(session)
        unit = self._units.pop(session, None)
        if unit is not None:
            for connection in unit.connections:
                others = self._units_of(connection)
                self._active[connection] = [weakref.ref(other) for other in others if other is not unit]
            if self._veto is not None:
                self._veto.ended(unit)

    def _units_of(self, connection: Connection) -> list[OpenTransaction]:
        """The units that *connection* serves now. A Session that was dropped has none any more."""
        return [unit for each in self._active.get(connection, ()) if (unit := each()) is not None]

    # -- triggers ----------------------------------------------------------------------------------------------------

    def _tell(self, connection: Connection, units: Sequence[OpenTransaction]) -> None:
        """Before a statement that may write: triggers learn of which transaction of ours it is."""
        if not units:
            return
        unit = next((unit for unit in units if unit.flush is not None), units[-1])
        if unit.own_writes or self._told.get(connection) == unit.tx or connection._is_autocommit_isolation():
            return
        with unit.writing():
            triggers.set_trigger_context(connection, unit.tx, counts=unit.step)
        self._told[connection] = unit.tx
        unit.told_on = connection

    def _before_connection_commits(self, connection: Connection) -> None:
        """Whoever commits it: on SQLite, others would find what triggers were told."""
        if self._told.pop(connection, None) is not None and connection.dialect.name == "sqlite":
            triggers.clear_trigger_context(connection)

    def _doubt_told(self, connection: Connection, *_: Any) -> None:
        """A SAVEPOINT that rolls back takes with it what was told since."""
        if connection in self._told:
            self._told[connection] = ""

    def _forget_told(self, connection: Connection, *_: Any) -> None:
        self._told.pop(connection, None)

    @contextmanager
    def undoing(self, connection: Connection, tx: str, facts: Collection[tuple[str, str]]) -> Iterator[None]:
        """Triggers leave *facts* to the undo *tx*, which logs them; what follows from them they log as part of it.

        It is ended by a SAVEPOINT that rolls back.
        """
        if not self._registry.by_trigger:
            yield
            return
        self._told[connection] = tx
        triggers.set_undo_context(connection, tx, facts)
        yield
        triggers.clear_trigger_context(connection)
        self._told[connection] = ""

    # -- flush -------------------------------------------------------------------------------------------------------

    def _before_flush(self, session: Session, context: Any, instances: Any) -> None:
        if self._registry.validates:
            for instance in (*session.new, *session.dirty):
                state: Any = inspect(instance)
                tracked = self._registry.find(state.mapper)
                if tracked is not None and tracked.validate is not None:
                    _validate_instance(tracked, state)
                if tracked is not None and tracked.expires is not None:
                    _check_expiry(tracked.expires, state)
        # Last: when this event raises, no other says that there will be no flush.
        unit = self.unit(session)
        unit.flush = self._flushes[session.hash_key] = Flush(unit, context)

    def _end_flush(self, session: Session) -> Flush | None:
        unit = self._units.get(session)
        if unit is not None:
            unit.flush = None
        return self._flushes.pop(session.hash_key, None)

    # The listeners below run once for every object: they note it, and leave the work to the end of the flush.

    def _after_insert(self, mapper: Mapper[Any], connection: Connection, state: Any) -> None:
        flush = self._flushes.get(state.session_id)
        if flush is not None:
            flush.touched.append((state, "insert", True))

    def _before_update(self, mapper: Mapper[Any], connection: Connection, state: Any) -> None:
        flush = self._flushes.get(state.session_id)
        if flush is not None:
            self._before_change(mapper, connection, flush, going=False)
            # Asked now: what an expression sets is expired by the UPDATE, and the change forgotten.
            flush.touched.append((state, "update", _has_changes(state)))

    def _after_update(self, mapper: Mapper[Any], connection: Connection, state: Any) -> None:
        """A row switch, an insert that takes over a deleted row, fires before_insert and this."""
        if state.key is None:
            flush = self._flushes.get(state.session_id)
            if flush is not None:
                self._before_change(mapper, connection, flush, going=True)
                flush.touched.append((state, "update", None))

    def _before_delete(self, mapper: Mapper[Any], connection: Connection, state: Any) -> None:
        flush = self._flushes.get(state.session_id)
        if flush is not None:
            self._before_change(mapper, connection, flush, going=True)
            flush.touched.append((state, "delete", True))

    def _before_change(self, mapper: Mapper[Any], connection: Connection, flush: Flush, *, going: bool) -> None:
        """Find baselines and lock first rows before the unit of work changes, or deletes, a row of *mapper*."""
        if not flush.checked:
            self._before_first_change(connection, flush)
        if flush.parts:
            self._lock_first_rows(mapper, connection, flush, going=going)

    def _before_first_change(self, connection: Connection, flush: Flush) -> None:
        """Before the first UPDATE or DELETE: baselines of all rows that this flush will change.

        Not in before_flush, which knows neither orphans nor children whose foreign key a deleted parent nulls.
        """
        flush.checked = True
        identities: dict[tuple[Mapper[Any], bool], list[Any]] = {}
        for state, (is_delete, listed_only) in flush.context.states.items():
            if state.key is not None and not listed_only:
                identities.setdefault((state.mapper, is_delete), []).append(state.key[1])
        found = {
            mapper: tracked
            for mapper, _ in identities
            if (tracked := self._registry.find(mapper)) is not None and not tracked.by_trigger
        }
        _require_one_database(flush.context.session, found)
        changing: dict[Tracked, list[tuple[Any, ...]]] = {}
        for (mapper, is_delete), of_mapper in identities.items():
            if mapper not in found:
                continue
            tracked = found[mapper]
            raw_keys = list(map(tracked.columns_for(connection.dialect).raw_key, of_mapper))
            changing.setdefault(tracked, []).extend(raw_keys)
            if len(tracked.tables) > 1:
                flush.parts.setdefault((tracked, is_delete), []).extend(raw_keys)
        for tracked, keys in changing.items():
            canonical = flush.canonical.setdefault(tracked, {})
            flush.baselines += self._recorder.baselines(connection, flush.unit, tracked, keys, canonical)

    def _lock_first_rows(self, mapper: Mapper[Any], connection: Connection, flush: Flush, *, going: bool) -> None:
        """Lock the first row of each fact of *mapper* that this flush changes, or deletes, in several tables.

        Others may change another part of such a fact, and neither image would show both changes. The unit of work calls
        this just before its statements for the class, whose first table it updates first. So no lock is out of order.
        """
        tracked = self._registry.find(mapper)
        keys = None if tracked is None else flush.parts.pop((tracked, going), None)
        if tracked is not None and keys:
            tracked.columns_for(connection.dialect).of_table[tracked.table].lock(connection, keys, leaving=going)

    def _after_flush(self, session: Session, context: Any) -> None:
        flush = self._end_flush(session)
        if flush is None or not flush.touched:
            return
        _require_one_database(session, {state.mapper for state, _, _ in flush.touched})
        connection = session.connection(bind_arguments={"mapper": flush.touched[0][0].mapper})
        self._recorder.log_touched(connection, flush.unit, self._touched(flush, connection), flush.baselines, flush)

    def _touched(self, flush: Flush, connection: Connection) -> dict[Tracked, dict[tuple[Any, ...], bool]]:
        """The keys that *flush* touched (driver-level), and whether they existed before it; notes those it wrote."""
        touched: dict[Tracked, dict[tuple[Any, ...], bool]] = {}
        mapper: Mapper[Any] | None = None
        for state, op, changed in flush.touched:
            if state.mapper is not mapper:
                mapper = state.mapper
                tracked = self._registry.of(mapper.class_)
                raw_key = tracked.columns_for(connection.dialect).raw_key
                existed, written = touched.setdefault(tracked, {}), flush.written.setdefault(tracked, [])
                certain = flush.certain.setdefault(tracked, set())
            if op == "delete":
                existed[raw_key(state.key[1])] = True
            # before_update also fires when no UPDATE is sent. Asked again, because post_update comes after the events.
            elif changed is not False or _has_changes(state) is not False:
                now = raw_key(_primary_key(tracked, state))
                if changed:
                    certain.add(now)
                if op == "update":
                    existed[raw_key(state.key[1]) if state.key else now] = True
                existed.setdefault(now, False)
                written.append(now)
        return touched

    # -- bulk DML ----------------------------------------------------------------------------------------------------

    def _do_orm_execute(self, state: ORMExecuteState) -> Result[Any] | None:
        """INSERT, UPDATE and DELETE through the Session: of a class, or of its table."""
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
        unit = self.unit(state.session)
        require_supported(connection, unit)
        with unit.writing():
            take_write_lock(connection)
        capture = self._capture_of(state, mapper, tracked, connection)
        for _attempt in range(_BULK_ATTEMPTS):
            savepoint = connection.begin_nested()
            result = None
            try:
                result = capture()
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

    def _capture_of(
        self, state: ORMExecuteState, mapper: Mapper[Any], tracked: Tracked, connection: Connection
    ) -> Callable[[], Result[Any] | None]:
        """What runs the statement and logs it; refuses what cannot be logged."""
        statement: Any = state.statement
        if statement._prefixes:
            self._refuse(connection, statement, "OR REPLACE and the like change rows unseen; on_conflict_do_update()")
            return self._invoke_unseen(state)
        if state.is_delete and tracked.base_table_count:
            self._refuse(connection, statement, "it leaves the base class' row; delete the objects")
        if not state.is_insert:
            return partial(self._bulk_change, state, mapper, tracked, connection)
        if statement._post_values_clause is None:
            return partial(self._bulk_insert, state, mapper, tracked, connection)
        if _upserts_key(statement, tracked):
            self._refuse(connection, statement, "it changes primary keys; do that on the objects")
            return self._invoke_unseen(state)
        return partial(self._upsert, state, mapper, tracked, connection, {})

    def _invoke_unseen(self, state: ORMExecuteState) -> Callable[[], Result[Any]]:
        """For who is only warned (``on_untracked="warn"``)."""

        def invoke() -> Result[Any]:
            with self.unit(state.session).writing():
                return state.invoke_statement()

        return invoke

    def _target(self, state: ORMExecuteState) -> Tracked | None:
        """What tracks the rows that the statement changes, if they can be told from the statement."""
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

    def _bulk_insert(
        self, state: ORMExecuteState, mapper: Mapper[Any], tracked: Tracked, connection: Connection
    ) -> Result[Any]:
        unit = self.unit(state.session)
        result, keys = self._returning_keys(state, mapper, tracked, connection)
        self._recorder.log_touched(connection, unit, {tracked: dict.fromkeys(keys, False)}, ())
        return result

    def _returning_keys(
        self, state: ORMExecuteState, mapper: Mapper[Any], tracked: Tracked, connection: Connection
    ) -> tuple[Result[Any], list[tuple[Any, ...]]]:
        """Run an INSERT; its result as the caller wants it, and the keys of the rows that it inserted or changed."""
        statement: Any = state.statement
        columns = tracked.columns_for(connection.dialect)
        keys = [getattr(mapper.class_, name) for name in tracked.key_attributes]
        with self.unit(state.session).writing():
            result: Any = state.invoke_statement(statement=statement.returning(*keys))
            names = list(result.keys())[: -len(keys)]
            rows = [tuple(row) for row in result.all()]
        returned: Any = _fetched(names, [row[: -len(keys)] for row in rows])
        returned.inserted_primary_key_rows = [row[-len(keys) :] for row in rows]
        if len(rows) == 1:
            returned.inserted_primary_key = rows[0][-len(keys) :]
        return returned, [columns.raw_key(row[-len(keys) :]) for row in rows]

    def _upsert(
        self,
        state: ORMExecuteState,
        mapper: Mapper[Any],
        tracked: Tracked,
        connection: Connection,
        suspects: dict[str, tuple[Any, ...]],
    ) -> Result[Any] | None:
        """None to be run once more, when it may have changed rows that the log has not seen: the *suspects*.

        Which rows it changes is known when it has run; what they were, only before.
        """
        unit, columns = self.unit(state.session), tracked.columns_for(connection.dialect)
        baselines = self._recorder.baselines(connection, unit, tracked, list(suspects.values())) if suspects else []
        result, raw_keys = self._returning_keys(state, mapper, tracked, connection)
        by_key = {columns.encode_key(raw): raw for raw in raw_keys}
        unknown = self._recorder.unknown(connection, tracked, by_key)
        if unknown and not suspects and _may_update(state.statement):
            suspects.update((key, by_key[key]) for key in unknown)
            return None
        # A key that the first run did not have comes of a default that is another each time: a row that is new.
        new = {*unknown, *self._recorder.deleted_before(connection, tracked, list(by_key))} - {
            each.key for each in baselines
        }
        touched = {raw: key not in new for key, raw in by_key.items()}
        self._recorder.log_touched(connection, unit, {tracked: touched}, baselines)
        return result

    def _bulk_change(
        self, state: ORMExecuteState, mapper: Mapper[Any], tracked: Tracked, connection: Connection
    ) -> Result[Any] | None:
        """None when others committed matching rows between our look and the statement: look again."""
        unit = self.unit(state.session)
        statement: Any = state.statement
        columns = tracked.columns_for(connection.dialect)
        table: Any = mapper.local_table if state.is_orm_statement else statement.table
        key_columns = list(table.primary_key.columns)
        if state.is_update and _sets_any(statement, key_columns):
            self._refuse(connection, statement, "it changes primary keys; do that on the objects")
        keys: list[tuple[Any, ...]]
        if isinstance(state.parameters, (list, tuple)):
            if statement._where_criteria:
                self._refuse(connection, statement, "give executemany rows their primary keys instead of a WHERE")
            keys = [
                columns.raw_key([row[mapper.get_property_by_column(column).key] for column in key_columns])
                for row in state.parameters
            ]
            if len(tracked.tables) > 1:
                columns.of_table[tracked.table].lock(connection, keys)
        else:
            matching: Select[Any] = select(*(type_coerce(column, RAW) for column in key_columns))
            criterion = inheritance_criterion(mapper)
            if criterion is not None and table is not tracked.table:
                self._refuse(connection, statement, "it is one of several classes in this table; give it their keys")
            criteria = statement._where_criteria if criterion is None else (*statement._where_criteria, criterion)
            matching = matching.where(*criteria)

            def match(statement: Select[Any]) -> list[tuple[Any, ...]]:
                return [tuple(row) for row in connection.execute(statement, state.parameters or {}).all()]

            if table is not tracked.table:  # the first row of a fact is locked before its other parts
                firsts = match(matching)
                columns.of_table[tracked.table].lock(connection, firsts)
            # As the statement itself locks them: one lock that has to grow may wait for another that has to.
            keys = match(matching.with_for_update(of=table, key_share=not state.is_delete))
            if table is not tracked.table and not set(keys).issubset(firsts):
                return None
        keys = list(dict.fromkeys(keys))
        baselines = self._recorder.baselines(connection, unit, tracked, keys)
        with unit.writing():
            result = state.invoke_statement()
            if statement._returning:  # read to the end: SQLite releases no SAVEPOINT below an open cursor
                result = _fetched(list(result.keys()), [tuple(row) for row in result.all()])
        matched: int = getattr(result, "rowcount", -1)
        if connection.dialect.name != "sqlite" and matched not in (-1, len(keys)) and not state.is_executemany:
            return None
        if state.is_update and isinstance(state.parameters, (list, tuple)):
            there = columns.read(connection, keys)
            keys = [key for key in keys if columns.encode_key(key) in there]
        touched = {tracked: dict.fromkeys(keys, True)}
        self._recorder.log_touched(connection, unit, touched, baselines, updated=state.is_update)
        return result

    # -- what cannot be captured ---------------------------------------------------------------------------------------

    def _before_statement(
        self, connection: Connection, cursor: Any, statement: str, parameters: Any, context: Any, executemany: bool
    ) -> None:
        """Sees all that is sent on a Session's connection, bulk_*(), Table.insert(), session.connection() among it.

        A SELECT, too, may write: WITH gone AS (DELETE … RETURNING …). Only the compiled statement knows its CTEs. Reads
        are most of what there is, and are out of here first.
        """
        ctes = getattr(context.compiled, "ctes", None)
        writes = context.isinsert or context.isupdate or context.isdelete
        if not (writes or ctes or self._registry.by_trigger) or getattr(context, _SEEN, None) is self:
            return
        setattr(context, _SEEN, self)  # an INSERT of many rows may be sent in many batches
        units = self._units_of(connection)
        if not units:
            return
        if writes and connection._is_autocommit_isolation() and not all(unit.own_writes for unit in units):
            self._refuse(connection, context.compiled.statement, _AUTOCOMMIT)
        if writes and not any(_is_known(unit, context) for unit in units):
            way_out = (
                "use the Session's objects, or session.execute(insert/update/delete(Model)); what a relationship "
                "writes into its secondary table takes capture='trigger', or an association object in its place"
            )
            self._refuse(connection, context.compiled.statement, way_out)
        for cte in ctes or ():
            if isinstance(cte.element, UpdateBase):
                self._refuse(connection, cte.element, "a CTE that writes cannot be captured; execute it by itself")
        if self._registry.by_trigger and triggers.may_write(statement):
            self._tell(connection, [unit for unit in units if connection in unit.telling])

    def _refuse(self, connection: Connection, statement: Any, way_out: str) -> None:
        """Raise, or warn, if *statement* is on a tracked table, and no trigger sees it."""
        table = unaliased(getattr(statement, "table", None))
        tracked = self._registry.named(table, connection.dialect.default_schema_name)
        if tracked is None or tracked.by_trigger:
            return
        kind = statement.__visit_name__.upper()  # the class may be an annotated one
        message = f"{kind} on {table.name} would bypass the log of {tracked.model.__name__}: {way_out}"
        if tracked.on_untracked == "raise":
            raise UntrackedWrite(message)
        warn(message, UntrackedWriteWarning)


_captures: tuple[weakref.ref[Capture], ...] = ()
_turns = itertools.count(1)
_remembering = threading.Lock()


def _remember(capture: Capture) -> None:
    global _captures  # noqa: PLW0603  # replaced as a whole: it is read without the lock
    with _remembering:
        _captures = (*(each for each in _captures if each() is not None), weakref.ref(capture))


_BEGINNINGS = ("after_begin", "before_flush", "do_orm_execute", "before_commit")
"""The events of a Session with which something may begin that is to be captured."""


class _Waker:
    """Listens in place of a Capture that was stopped, and has it resume. It keeps nothing alive."""

    def __init__(self, target: Any, name: str, capture: Capture) -> None:
        self._target, self._name = weakref.ref(target), name
        self._capture = weakref.ref(capture)
        listening.listen(target, name, self)

    def __call__(self, *arguments: Any) -> Any:
        capture = self._capture()
        session: Session = getattr(arguments[0], "session", arguments[0])  # of an ORMExecuteState
        if capture is None or capture.is_superseded(session):
            return None
        capture.resume()
        return capture.session_listeners[self._name](*arguments)

    @property
    def is_over(self) -> bool:
        return self._capture() is None

    def stop(self) -> None:
        if (target := self._target()) is not None:
            listening.stop(target, self._name, self)


_AUTOCOMMIT = (
    "in AUTOCOMMIT each statement is a transaction of its own, so the log cannot be in it: use an engine that begins "
    "one, or capture='trigger'"
)


_SEEN = "memstate_seen"


def _is_known(unit: OpenTransaction, context: Any) -> bool:
    """Whether a statement is our own, or the unit of work's: a flush passes its mapper's cache, nobody else does."""
    return bool(unit.own_writes) or (unit.flush is not None and "compiled_cache" in context.execution_options)


_BULK_ATTEMPTS = 5


def _require_one_database(session: Session, mappers: Collection[Mapper[Any]]) -> None:
    """Raise where *session* reaches the tables of *mappers* through several connections."""
    if len(mappers) > 1 and len({session.connection(bind_arguments={"mapper": mapper}) for mapper in mappers}) > 1:
        raise MemstateError(TWO_DATABASES)


def _fetched(names: Sequence[str], rows: Sequence[tuple[Any, ...]]) -> Result[Any]:
    """A result of rows that were fetched already, with the ``rowcount`` that callers of DML ask for."""
    result: Any = IteratorResult(SimpleResultMetaData(names), iter(rows))
    result.rowcount = len(rows)
    return result  # type: ignore[no-any-return]


def _primary_key(tracked: Tracked, state: Any) -> Sequence[Any]:
    """As the flush left it; the identity of *state* is still the one before."""
    values = state.dict
    try:
        return [values[name] for name in tracked.key_attributes]
    except KeyError:  # expired
        key: Sequence[Any] = state.mapper.primary_key_from_instance(state.obj())
        return key


def _has_changes(state: Any) -> bool | None:
    """Whether a column attribute of *state* differs from what was loaded; None when what was loaded is not known."""
    columns, values = state.mapper.columns, state.dict
    found: bool | None = False
    for name, before in state.committed_state.items():
        if name not in columns:
            continue
        if before is NO_VALUE or name not in values or before is values[name]:
            # Expired, set by an expression, or edited in place: the old value is gone.
            if before is not values.get(name, NO_VALUE) or isinstance(before, (dict, list, set)):
                found = None
        elif _differs(before, values[name]):
            return True
    return found


def _differs(before: Any, after: Any) -> bool:
    try:
        return bool(before != after)  # an expression has no truth value: it differs
    except Exception:  # noqa: BLE001  # a user type's own comparison may raise anything
        return True


def _may_update(statement: Any) -> bool:
    """Whether an INSERT with ON CONFLICT does more than nothing. By name: there is a class for each dialect."""
    return not type(statement._post_values_clause).__name__.endswith("DoNothing")


def _upserts_key(statement: Any, tracked: Tracked) -> bool:
    """Whether ON CONFLICT DO UPDATE sets a primary key."""
    sets = getattr(statement._post_values_clause, "update_values_to_set", None) or ()
    return _names_any(sets.keys() if isinstance(sets, Mapping) else [column for column, _ in sets], tracked.key_columns)


def _sets_any(statement: Any, columns: Sequence[Any]) -> bool:
    ordered = getattr(statement, "_ordered_values", None) or ()  # SQLAlchemy 2.0; in 2.1 they are among the others
    return _names_any([*(statement._values or ()), *(column for column, _ in ordered)], columns)


def _names_any(given: Iterable[Any], columns: Sequence[Any]) -> bool:
    """Whether any of *given*, columns or names, is one of *columns*."""
    names = {column.name for column in columns} | {column.key for column in columns}
    return any(getattr(column, "key", column) in names for column in given)


def _check_expiry(name: str, state: Any) -> None:
    """Refuse a naive time that was set. One that SQLite gives back is naive, so what was loaded is left alone.

    A column without a time zone holds UTC, so there a naive time is right.
    """
    value = state.dict.get(name)
    is_zoned = getattr(state.mapper.columns[name].type, "timezone", True)
    is_set = state.key is None or name in state.committed_state
    if value is None or not is_set or isinstance(value, ClauseElement) or hasattr(value, "__clause_element__"):
        return
    if not is_zoned and isinstance(value, datetime) and value.tzinfo is None:
        return
    time = in_utc(value, name)
    if not is_zoned:
        set_attribute(state.obj(), name, time.replace(tzinfo=None))
    elif value.utcoffset():  # which SQLite does not keep
        set_attribute(state.obj(), name, time)


def _validate_instance(tracked: Tracked, state: Any) -> None:
    """Check what is known before SQL is sent; the rest is checked on the row, before the flush is over."""
    assert tracked.validate is not None
    values: dict[str, Any] = {}
    unknown: set[str] = set()
    for name, column in state.mapper.columns.items():
        value = state.dict.get(name, NO_VALUE)
        if isinstance(value, ClauseElement) or hasattr(value, "__clause_element__"):
            unknown.add(name)
        elif value is not NO_VALUE:
            values[name] = value
        elif (
            state.key is not None
            or column.primary_key
            or column.default is not None
            or column.server_default is not None
        ):
            unknown.add(name)
        else:
            values[name] = None
    try:
        tracked.validate(values)
    except ValidationError as error:
        failed = to_validation_failed(tracked.model.__name__, error, ignoring=frozenset(unknown))
        if failed is not None:
            raise failed from error
