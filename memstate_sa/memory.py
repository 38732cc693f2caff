"""`Memory`: the object that connects capture, relays, search, undo and maintenance."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, TypeAlias, TypeVar, Unpack, overload

from sqlalchemy.engine import Connection, Engine
from sqlalchemy.orm import QueryableAttribute, Session, scoped_session, sessionmaker

from memstate_sa.capture import append_only, triggers
from memstate_sa.capture.listeners import SessionCapture
from memstate_sa.capture.recorder import Recorder
from memstate_sa.capture.supported import require_supported_tables
from memstate_sa.db import creation, functions
from memstate_sa.db.dialects import database_of
from memstate_sa.db.sessions import AnySession, sync_session
from memstate_sa.db.sync_engines import SyncEngines
from memstate_sa.embedders import Embedder
from memstate_sa.embedding.destinations import indexes_by_name, make_destinations
from memstate_sa.errors import MemstateError
from memstate_sa.indexes.base import VectorIndex
from memstate_sa.maintenance.erase import Eraser
from memstate_sa.maintenance.expiry import Sweeper
from memstate_sa.maintenance.facade import MaintenanceMethods
from memstate_sa.options import MemoryOptions, TrackOptions, require_options
from memstate_sa.relay.loop import STOP_TIMEOUT_S
from memstate_sa.relay.relays import Relays, close_after
from memstate_sa.relay.strict import Strict
from memstate_sa.relay.wakeup import Notifier
from memstate_sa.runtime.display import summary
from memstate_sa.search.facade import SearchMethods
from memstate_sa.search.searcher import Searcher
from memstate_sa.search.succession import Succession, check_successors
from memstate_sa.tracking.options import describe
from memstate_sa.tracking.registry import Registry
from memstate_sa.tracking.validation import require_count, require_label
from memstate_sa.undo.facade import UndoMethods
from memstate_sa.undo.undo import Undo

if TYPE_CHECKING:
    from sqlalchemy.ext.asyncio import AsyncEngine, AsyncSession, async_scoped_session, async_sessionmaker

    SessionSource: TypeAlias = (
        sessionmaker[Any]
        | scoped_session[Any]
        | type[Session]
        | Session
        | async_sessionmaker[Any]
        | async_scoped_session[Any]
        | AsyncSession
    )

M = TypeVar("M")
Text: TypeAlias = str | QueryableAttribute[Any] | Callable[[M], str | None] | None


class Memory(SearchMethods, UndoMethods, MaintenanceMethods):
    """Facts in SQL, and their meaning in vector indexes that follow the application's own transactions.

    *index*: a `VectorIndex`, which is then named "memory", or a dict of several by name. Without an index there is no
    search, but history and undo work.
    *options*: see `MemoryOptions`.

    There is no module-level state: two Memory objects do not see each other. Nothing is opened before its first use.
    """

    def __init__(
        self, index: VectorIndex | Mapping[str, VectorIndex] | None = None, **options: Unpack[MemoryOptions]
    ) -> None:
        require_options(Memory, options, MemoryOptions)
        delivery, embedding_cache = options.get("delivery", "relay"), options.get("embedding_cache", 100_000)
        if delivery not in ("relay", "strict"):
            raise MemstateError(f"Cannot use delivery={delivery!r}. Choose 'relay' or 'strict'.")
        self.indexes = indexes_by_name(index)
        if delivery == "strict" and not self.indexes:
            raise MemstateError("Cannot use delivery='strict' without an index. Give an index.")
        if embedding_cache != 0:
            require_count("embedding_cache", embedding_cache, "how many vectors to keep, 0 for none")
        self.successors = dict(options.get("successors") or {})
        check_successors(self.successors, self.indexes)
        self._destinations = make_destinations(self.indexes, options.get("embedder"), stored=embedding_cache)
        self._engines = SyncEngines()
        self._registry = Registry()
        self._notifier = Notifier()
        self._relays = Relays(self._registry, self._destinations, self._engines, self._notifier)
        threads, wake = self._engines.for_threads, self._relays.committed
        self._strict = Strict(self._registry, self._destinations, blocking=threads, wake=wake)
        self._recorder = Recorder(self._registry)
        self._capture = SessionCapture(
            self._registry, self._recorder, wake, self._strict if delivery == "strict" else None
        )
        self._succession = Succession(self.successors, self._destinations)
        self._searcher = Searcher(self._registry, self._capture, self._destinations, self._succession)
        self._undo = Undo(self._registry, self._capture, self._recorder)
        self._sweeper = Sweeper(self._capture)
        self._eraser = Eraser(self._registry, self._capture, self._recorder, self._destinations)

    def __repr__(self) -> str:
        indexes = ", ".join(f"{name}: {type(index).__name__}" for name, index in self.indexes.items()) or "no index"
        classes = ", ".join(tracked.model.__name__ for tracked in self._registry.by_entity.values())
        return summary(self, indexes, classes and f"tracks {classes}")

    @property
    def embedder(self) -> Embedder:
        """The embedder of the first index. Raises MemstateError when this Memory has no index."""
        for destination in self._destinations.values():
            return destination.vectors.embedder
        raise MemstateError("Cannot embed: there is no index. Give one as index= to Memory or MemoryStore.")

    # -- adoption --------------------------------------------------------------------------------------------------

    @overload
    def track(self, model: type[M], *, text: Text[M], **options: Unpack[TrackOptions]) -> type[M]: ...

    @overload
    def track(self, *, text: Text[Any], **options: Unpack[TrackOptions]) -> Callable[[type[M]], type[M]]: ...

    def track(self, model: Any = None, *, text: Text[Any], **options: Unpack[TrackOptions]) -> Any:
        """Make every row of *model* a fact: by a call, or as a class decorator. The table needs no change.

        Subclasses are tracked too. Single-table and joined subclasses are rows of this class. A concrete subclass is an
        entity of its own.

        *text*: the column attribute to embed, or a function of a detached instance with the row's own columns. A row
        whose text is None or blank has no vector. None: no row has a vector, and only history and undo work.
        *options*: see `TrackOptions`.

        Raises MemstateError for a class that is not mapped, for an unknown column attribute, and for an entity that is
        tracked already.
        """
        require_options(Memory.track, options, TrackOptions)
        index = options.get("index")
        names = [*self.indexes] if index is None else [index] if isinstance(index, str) else [*index]
        self._open()
        if (index is not None and not names) or not self.indexes.keys() >= set(names):
            raise MemstateError(f"Cannot use index={index!r}: this Memory has {', '.join(self.indexes) or 'no index'}.")
        names = self._succession.with_successors(names)

        def tracked(model: type[M]) -> type[M]:
            self._capture.track(describe(model, text, names, options))
            return model

        return tracked if model is None else tracked(model)

    def attach(self, target: SessionSource) -> None:
        """Capture the writes of the Sessions that *target* makes. A second call changes nothing.

        *target*: a sessionmaker, a scoped_session, a Session class with its subclasses, a Session, or their async
        counterparts. An async_sessionmaker gets a sync Session class of its own. Raises TypeError for anything else.
        """
        self._open()
        self._capture.attach(target)

    def create_tables(self, engine: Engine | AsyncEngine) -> None:
        """Create the missing tables and columns of memstate_sa, and the triggers of the log and of tracked classes.

        Create the tables of the tracked classes first. Triggers of a class that no longer needs them are dropped. With
        Alembic, let a migration do this work.

        Raises MemstateError, and creates nothing, for a tracked view, for a table in an attached SQLite database, and
        for a schema_translate_map.
        """
        self._open()
        self._capture.warn_of_cascades()
        sync_engine = self.sync_engine(engine)
        require_supported_tables(sync_engine, self._registry.by_table.keys())
        creation.create(sync_engine, install=self._install)

    def _install(self, connection: Connection) -> None:
        append_only.install(connection)
        for tracked in self._registry.by_entity.values():
            (triggers.install if tracked.by_trigger else triggers.uninstall)(connection, tracked)
        if not database_of(connection).runs_in_process:
            functions.close(connection)

    def annotate(
        self,
        session: AnySession,
        actor: str | None = None,
        reason: str | None = None,
        session_id: str | None = None,
    ) -> None:
        """Label the changes of the current (or next) transaction of *session*. The labels end with that transaction.

        A label that is None stays as it was. In a step of a LangGraph thread, *session_id* can only be the thread's id:
        another one raises MemstateError.
        """
        for name, value in (("actor", actor), ("reason", reason), ("session_id", session_id)):
            require_label(name, value)
        transaction = self._transaction(sync_session(session))
        if session_id is not None and transaction.thread_id not in (None, session_id):
            raise MemstateError(
                f"Cannot use session_id={session_id!r} in a step of thread {transaction.thread_id!r}. The log has one "
                "session_id for all changes of a step: the thread. Label a run with actor=. Give a fact its own "
                "session by Fact(session_id=…)."
            )
        transaction.actor = actor if actor is not None else transaction.actor
        transaction.reason = reason if reason is not None else transaction.reason
        transaction.session_id = session_id if session_id is not None else transaction.session_id
        self._capture.relabel(transaction)

    # -- the end -------------------------------------------------------------------------------------------------------

    def close(self, timeout: float = STOP_TIMEOUT_S) -> None:
        """Stop this Memory's relays and close its indexes.

        This call waits at most *timeout* seconds for a running call of an index or embedder. The index of a longer call
        is closed when the call has ended: see `Relay.stop`.

        Afterwards, tracked classes, attached Sessions and engines no longer keep this Memory alive. While the
        application itself keeps it, attached Sessions are still captured. Their next use opens this Memory again, and a
        relay delivers their writes.
        """
        deadline = time.monotonic() + timeout
        relays = self._relays.stop(deadline)
        self._capture.stop()
        self._strict.stop()
        self._notifier.close(max(0.1, deadline - time.monotonic()))
        for name, index in self.indexes.items():
            close_after(relays, name, index)
        self._engines.dispose()
