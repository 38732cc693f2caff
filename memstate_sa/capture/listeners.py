"""The listeners of a Memory. They are called for the events of its Sessions and of the engines below them."""

from __future__ import annotations

import itertools
import threading
import weakref
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import Any, Protocol
from weakref import WeakKeyDictionary, WeakSet

from sqlalchemy.engine import Connection, Dialect, Engine
from sqlalchemy.exc import UnboundExecutionError
from sqlalchemy.orm import Mapper, Session, SessionTransaction, scoped_session, sessionmaker

from memstate_sa.capture import cascades
from memstate_sa.capture.bulk import BulkCapture
from memstate_sa.capture.flush import FlushCapture
from memstate_sa.capture.guard import Guard, UntrackedWriteWarning
from memstate_sa.capture.recorder import Recorder
from memstate_sa.capture.transaction import OpenTransaction, OpenTransactions, Status
from memstate_sa.capture.trigger_context import TriggerContexts, have_logged
from memstate_sa.db import missing_tables, sqlite
from memstate_sa.db.dialects import SQLITE, find_database
from memstate_sa.runtime import listening, watching
from memstate_sa.runtime.warn import warn
from memstate_sa.tracking.registry import Registry
from memstate_sa.tracking.tracked import Tracked


class Veto(Protocol):
    """The writer of the indexes before a commit. It refuses the commit by raising."""

    def write(self, session: Session, transaction: OpenTransaction) -> None: ...

    def committed(self, transaction: OpenTransaction) -> None: ...

    def ended(self, transaction: OpenTransaction) -> None: ...


class SessionCapture:
    """The listeners of one Memory. They keep no Session alive, and listen only to attached Sessions."""

    def __init__(
        self,
        registry: Registry,
        recorder: Recorder,
        on_commit: Callable[[Engine], None],
        veto: Veto | None = None,
    ) -> None:
        self._registry = registry
        self._recorder = recorder
        self._on_commit = on_commit
        self._veto = veto
        self._transactions = OpenTransactions()
        self._contexts = TriggerContexts()
        self._guard = Guard(registry, recorder, self._transactions, self._contexts)
        self._flushes = FlushCapture(registry, recorder, self._transactions)
        self._bulk = BulkCapture(registry, recorder, self._transactions, self._guard)
        # The transactions and the engine of each Session's last commit. Each undo in it counts as a transaction.
        self.committed: WeakKeyDictionary[Session, tuple[Sequence[str], Engine]] = WeakKeyDictionary()
        self._guarded: WeakSet[Engine] = WeakSet()
        self._stopped: WeakSet[Engine] = WeakSet()  # the engines to which `stop` stopped listening
        self._watched: WeakSet[Dialect] = WeakSet()  # execution_options() makes engines that share one dialect
        self._with_contexts: WeakSet[Engine] = WeakSet()  # engines whose commits and rollbacks end trigger contexts
        self._connected: WeakSet[Engine] = WeakSet()
        self._attached: weakref.WeakSet[Any] = weakref.WeakSet()
        self._is_listening = True
        self._wakers: list[_Waker] = []
        self._turn = 0  # the order in which SessionCaptures were attached
        _remember(self)
        self._checked: Any = None  # the entities whose cascades were checked
        self._cascades: set[cascades.ForeignKey] = set()  # the foreign keys that we have warned about
        self.mapper_listeners = self._flushes.mapper_listeners
        self.session_listeners: dict[str, Callable[..., Any]] = {
            "after_begin": self._after_begin,
            **self._flushes.session_listeners,
            "do_orm_execute": self._bulk.execute,
            "before_commit": self._before_commit,
            "after_commit": self._after_commit,
            "after_rollback": self._after_rollback,
            "after_soft_rollback": self._after_soft_rollback,
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
        """Stop listening to classes, Sessions and engines, until an attached Session is used again."""
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
            for name, listener in self._contexts.engine_listeners.items():
                listening.stop(engine, name, listener)
        for dialect in list(self._watched):
            watching.unwatch(dialect, self._guard.before_statement)
        self._watched.clear()
        self._stopped.update(self._guarded)
        self._guarded.clear()
        self._with_contexts.clear()
        self._recorder.forget_keys()

    def resume(self) -> None:
        """Listen again to the classes and Sessions from before `stop`."""
        if not self._is_listening:
            self._is_listening = True
            while self._wakers:
                self._wakers.pop().stop()
            for tracked in self._registry.by_entity.values():
                self._listen_to_model(tracked)
            for target in list(self._attached):
                self._listen_to_sessions(target)
            for engine in list(self._stopped):  # an engine may have a transaction from before `stop`
                self.guard(engine)
            self._stopped.clear()

    def is_superseded(self, session: Session) -> bool:
        """Whether a Memory that was attached later captures the same tables of *session*. Then only that one logs."""
        others = (other for reference in _captures if (other := reference()) is not None)
        return any(
            other._turn > self._turn
            and other.is_attached(session)
            and not self._registry.by_table.keys().isdisjoint(other._registry.by_table)
            for other in others
        )

    def _after_mapper_constructed(self, mapper: Mapper[Any], model: type[Any]) -> None:
        """Track a new subclass of a tracked class."""
        self._registry.extend(mapper)
        self._registry.publish()

    def attach(self, target: Any) -> None:
        """Listen to the Sessions of *target*. A second call changes nothing."""
        factory = getattr(target, "session_factory", target)  # other attributes of a scoped_session create a Session
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
            f"Cannot attach to target={target!r}. Pass a sessionmaker, a Session class, a scoped_session or an "
            "async_sessionmaker."
        )

    def _async_target(self, target: Any) -> Any:
        from sqlalchemy.ext.asyncio import AsyncSession, async_scoped_session, async_sessionmaker

        if isinstance(target, AsyncSession):
            return target.sync_session
        if isinstance(target, async_scoped_session):
            return self._async_target(target.session_factory)
        if not isinstance(target, async_sessionmaker):
            raise TypeError(f"Cannot attach to target={target!r}. Pass the async_sessionmaker.")
        current = target.kw.get("sync_session_class") or target.class_.sync_session_class
        if current in self._attached:
            return current
        # The class may be SQLAlchemy's own Session. To listen on it would attach every Session of the process.
        own = type("MemstateSession", (current,), {})
        target.configure(sync_session_class=own)
        return own

    @property
    def is_any_attached(self) -> bool:
        return bool(self._attached)

    def is_attached(self, session: Session) -> bool:
        return session in self._attached or any(base in self._attached for base in type(session).__mro__)

    # -- the open transaction ----------------------------------------------------------------------------------------

    def transaction(self, session: Session) -> OpenTransaction:
        """The transaction of *session*. It begins here if the Session has none."""
        return self._transactions.of(session)

    def open_transaction(self, session: Session) -> OpenTransaction | None:
        """The open transaction of *session*, or None."""
        return self._transactions.find(session)

    def _after_begin(self, session: Session, _: SessionTransaction, connection: Connection) -> None:
        transaction = self._transactions.of(session)
        is_new = self._transactions.add_connection(transaction, connection)
        if is_new and self._registry.by_trigger and self._has_triggers(session, connection):
            transaction.trigger_connections.add(connection)
        engine = connection.engine
        self.guard(engine)
        self.warn_of_cascades()
        if engine not in self._connected:
            self._connected.add(engine)
            if find_database(engine) is SQLITE:
                sqlite.warn_of_savepoints(connection)

    def warn_of_cascades(self) -> None:
        """Warn once about each foreign key whose ON DELETE or ON UPDATE changes rows without a log entry.

        Until all mappers are configured, warn only about foreign keys to classes that are not tracked.
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
        """Whether *session* has on *connection* a class that triggers capture."""
        for tracked in self._registry.by_entity.values():
            if tracked.by_trigger:
                with suppress(UnboundExecutionError):
                    if session.get_bind(tracked.mapper).engine is connection.engine:
                        return True
        return False

    @property
    def engines(self) -> Collection[Engine]:
        """The engines to which this object listens."""
        return list(self._guarded)

    def guard(self, engine: Engine) -> None:
        """Listen to the statements of *engine*. Call it early: a statement that another thread runs then may fail."""
        # Add to the set last: other threads treat membership as "already listening". Listening twice does no harm.
        if engine not in self._guarded:
            missing_tables.explain(engine)
            watching.watch(engine.dialect, self._guard.before_statement)
            self._watched.add(engine.dialect)
            self._guarded.add(engine)
        if self._registry.by_trigger and engine not in self._with_contexts:
            for name, listener in self._contexts.engine_listeners.items():
                listening.listen(engine, name, listener)
            self._with_contexts.add(engine)

    def _before_commit(self, session: Session) -> None:
        """Seal the transaction. The commit's own flush comes later, and its first entry seals the transaction, too.

        This listener flushes only if it must. The application's listeners should still see the unflushed objects.
        """
        if session.in_nested_transaction():  # the event also comes at each release of a SAVEPOINT
            return
        transaction = self._transactions.of(session)
        transaction.seal = self._seal
        if self._veto is not None or self._registry.by_trigger:
            session.flush()  # the veto needs all writes, and triggers do not report their entries
        if transaction.context_on is not None and not transaction.is_logged:
            if have_logged(transaction.context_on, transaction.tx):
                transaction.status = Status.LOGGED
            transaction.written_on = transaction.context_on
        if transaction.is_logged:
            self._seal(transaction)
            if self._veto is not None:
                self._veto.write(session, transaction)

    def _seal(self, transaction: OpenTransaction) -> None:
        """Write the header just before the commit."""
        has_entries = transaction.tx in transaction.logged_under
        if has_entries and any(transaction.labels.values()) and not transaction.has_header:
            assert transaction.written_on is not None
            self._recorder.write_header(transaction.written_on, transaction.tx, transaction.labels)
            transaction.has_header = True
        transaction.status = Status.COMMITTING

    def relabel(self, transaction: OpenTransaction) -> None:
        """Write the header of *transaction* with its first labels, if its commit has begun without any."""
        if transaction.seal is not None and transaction.is_logged:
            self._seal(transaction)

    def _after_commit(self, session: Session) -> None:
        transaction = self._transactions.find(session)
        if transaction is None or not transaction.is_logged or session.in_nested_transaction():
            return
        assert transaction.written_on is not None
        self.committed[session] = (transaction.logged_under, transaction.written_on.engine)
        self._recorder.remember(transaction.written_on, transaction)
        if self._veto is not None:
            self._veto.committed(transaction)
        self._on_commit(transaction.written_on.engine)

    def _after_soft_rollback(self, session: Session, previous: SessionTransaction) -> None:
        """Write the header again, and forget the keys with new entries: the rollback may have removed all of them."""
        transaction = self._transactions.find(session)
        if transaction is not None:
            transaction.seen.clear()
            if transaction.has_header and previous.nested:
                assert transaction.written_on is not None
                self._recorder.write_header(transaction.written_on, transaction.tx, transaction.labels)

    def _after_rollback(self, session: Session) -> None:
        """End the flush and the commit that were under way: a transaction, SAVEPOINT or flush was rolled back."""
        self._flushes.end(session)
        transaction = self._transactions.find(session)
        if transaction is not None and not session.in_nested_transaction():
            transaction.seal = None
            if transaction.status is Status.COMMITTING:
                transaction.status = Status.LOGGED

    def _after_transaction_end(self, session: Session, ended: SessionTransaction) -> None:
        """Forget the transaction. close() and cancellation fire no other event."""
        if ended.parent is not None:
            return
        self._flushes.end(session)
        transaction = self._transactions.remove(session)
        if transaction is not None and self._veto is not None:
            self._veto.ended(transaction)

    @contextmanager
    def undoing(self, connection: Connection, tx: str, facts: Collection[tuple[str, str]]) -> Iterator[None]:
        """Run `TriggerContexts.undoing` if triggers capture any class."""
        if not self._registry.by_trigger:
            yield
            return
        with self._contexts.undoing(connection, tx, facts):
            yield


_captures: tuple[weakref.ref[SessionCapture], ...] = ()
_turns = itertools.count(1)
_remembering = threading.Lock()


def _remember(capture: SessionCapture) -> None:
    global _captures  # noqa: PLW0603  # the tuple is replaced as a whole, because readers take no lock
    with _remembering:
        _captures = (*(reference for reference in _captures if reference() is not None), weakref.ref(capture))


_BEGINNINGS = ("after_begin", "before_flush", "do_orm_execute", "before_commit")
"""The Session events that can start a change."""


class _Waker:
    """Listens in place of a stopped SessionCapture, and resumes it. It keeps nothing alive."""

    def __init__(self, target: Any, name: str, capture: SessionCapture) -> None:
        self._target, self._name = weakref.ref(target), name
        self._capture = weakref.ref(capture)
        listening.listen(target, name, self)

    def __call__(self, *arguments: Any) -> Any:
        capture = self._capture()
        session: Session = getattr(arguments[0], "session", arguments[0])  # an ORMExecuteState has a Session
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
