"""`Memory`: the facade that wires capture, relay, search, undo and verification together."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal, TypeVar, overload

from sqlalchemy.engine import Connection, Engine
from sqlalchemy.orm import QueryableAttribute, Session

from memstate_sa.capture import append_only, triggers
from memstate_sa.capture.listeners import SessionCapture
from memstate_sa.capture.recorder import Recorder
from memstate_sa.capture.supported import require_supported_tables
from memstate_sa.db import creation, functions
from memstate_sa.db.dialects import database_of
from memstate_sa.db.sessions import sync_session
from memstate_sa.db.sync_engines import SyncEngines
from memstate_sa.embedders import Embedder
from memstate_sa.embedding.destinations import indexes_by_name, make_destinations
from memstate_sa.errors import MemstateError
from memstate_sa.indexes.base import VectorIndex
from memstate_sa.maintenance.erase import Eraser
from memstate_sa.maintenance.expiry import Sweeper
from memstate_sa.maintenance.facade import MaintenanceMethods
from memstate_sa.relay.loop import STOP_TIMEOUT_S
from memstate_sa.relay.relays import Relays, close_after
from memstate_sa.relay.strict import Strict
from memstate_sa.relay.wakeup import Notifier
from memstate_sa.search.facade import SearchMethods
from memstate_sa.search.searcher import Searcher
from memstate_sa.search.succession import Succession, check_successors
from memstate_sa.tracking.options import describe
from memstate_sa.tracking.registry import Registry
from memstate_sa.tracking.tracked import Upgrade
from memstate_sa.tracking.validation import require_count, require_label
from memstate_sa.undo.facade import UndoMethods
from memstate_sa.undo.undo import Undo

if TYPE_CHECKING:
    from sqlalchemy.ext.asyncio import AsyncEngine, AsyncSession

M = TypeVar("M")


class Memory(SearchMethods, UndoMethods, MaintenanceMethods):
    """Facts in SQL, their meaning in one or more vector indexes, kept in step by the application's own transactions.

    *index* is a `VectorIndex`, which is named "memory", or several by name; *embedder* is what embeds for all of them
    (default: `WordLlamaEmbedder`), or one for each by its name. Holds no module-level state: two Memory objects do not
    see each other. Nothing is opened before it is first needed.

    *delivery*: with "relay" a commit writes the database alone, and a relay brings the indexes up to date. With
    "strict" they are written before it commits, which raises DeliveryError and rolls back when that fails; a relay is
    needed all the same, for what a crash or a rollback leaves in them.

    *embedding_cache*: about how many vectors relays keep in the application's database, by a digest of the text, so
    that a rollback, a text that is said again and an index that is new cost no embedding. 0 keeps none.

    *successors*: ``{"memory": "memory_v2"}`` says that the second index is to take the place of the first, see
    `reindex`. All that goes to the first then goes to both.
    """

    def __init__(
        self,
        index: VectorIndex | Mapping[str, VectorIndex],
        *,
        embedder: Embedder | Mapping[str, Embedder] | None = None,
        delivery: Literal["relay", "strict"] = "relay",
        embedding_cache: int = 100_000,
        successors: Mapping[str, str] | None = None,
    ) -> None:
        if delivery not in ("relay", "strict"):
            raise MemstateError(f"delivery={delivery!r}: 'relay' or 'strict'")
        self.indexes = indexes_by_name(index)
        if embedding_cache != 0:
            require_count("embedding_cache", embedding_cache, "how many vectors to keep, 0 for none")
        self.successors = dict(successors or {})
        check_successors(self.successors, self.indexes)
        self._destinations = make_destinations(self.indexes, embedder, stored=embedding_cache)
        embedders = [destination.vectors.embedder for destination in self._destinations.values()]
        self.embedder = embedders[0]
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
        self._eraser = Eraser(self._registry, self._capture, self._recorder, embedders)

    # -- adoption --------------------------------------------------------------------------------------------------

    @overload
    def track(
        self,
        model: type[M],
        *,
        text: str | QueryableAttribute[Any] | Callable[[M], str | None] | None,
        metadata: Sequence[str] = (),
        schema: Any = None,
        entity: str | None = None,
        index: str | Sequence[str] | None = None,
        unique_by: Any = (),
        immutable: Any = False,
        on_untracked: Literal["raise", "warn"] = "raise",
        capture: Literal["session", "trigger"] = "session",
        expires: str | None = None,
        version: int = 1,
        upgrade: Mapping[int, Upgrade] | None = None,
        text_version: int = 1,
        exclude: Sequence[str] = (),
    ) -> type[M]: ...

    @overload
    def track(
        self,
        model: None = None,
        *,
        text: str | QueryableAttribute[Any] | Callable[[Any], str | None] | None,
        metadata: Sequence[str] = (),
        schema: Any = None,
        entity: str | None = None,
        index: str | Sequence[str] | None = None,
        unique_by: Any = (),
        immutable: Any = False,
        on_untracked: Literal["raise", "warn"] = "raise",
        capture: Literal["session", "trigger"] = "session",
        expires: str | None = None,
        version: int = 1,
        upgrade: Mapping[int, Upgrade] | None = None,
        text_version: int = 1,
        exclude: Sequence[str] = (),
    ) -> Callable[[type[M]], type[M]]: ...

    def track(
        self,
        model: Any = None,
        *,
        text: str | QueryableAttribute[Any] | Callable[[Any], str | None] | None,
        metadata: Sequence[str] = (),
        schema: Any = None,
        entity: str | None = None,
        index: str | Sequence[str] | None = None,
        unique_by: Any = (),
        immutable: Any = False,
        on_untracked: Literal["raise", "warn"] = "raise",
        capture: Literal["session", "trigger"] = "session",
        expires: str | None = None,
        version: int = 1,
        upgrade: Mapping[int, Upgrade] | None = None,
        text_version: int = 1,
        exclude: Sequence[str] = (),
    ) -> Any:
        """Make every row of *model* a fact; a call, or a class decorator. The table needs no change.

        *text* is the column attribute to be embedded, or a callable that gets a detached instance with the row's own
        columns; None or blank text has no vector, and with None no row has: history and undo are all that is wanted.
        *metadata* are column attributes stored beside the vector, by which
        an index can filter. *schema* is a Pydantic model that every write must satisfy. *index* names which of the
        Memory's indexes get it (default: all). *unique_by* are column attributes of which no two rows may share all
        values. Subclasses are tracked along: single-table and joined ones as rows of this class, a concrete one as an
        entity of its own. *on_untracked* says what happens to writes that cannot be captured. With
        ``capture="trigger"`` triggers capture them all, those of other programs too; `create_tables` installs them.

        *expires* is a column attribute of times: what is past its own is deleted by `sweep`, which relays call. The
        column has a time zone, and a Session refuses a naive time in it (ValidationFailed).

        *version* counts the shapes that the class has had, and *upgrade* maps each older one to a function from its
        columns (a dict by column name, of values as the driver reads them) to those of the next: history of before a
        migration is shown, and undone, through these. A value that the function was given stays the driver's, whatever
        column it gives it to (True and False: in the same column); what it makes itself is as the ORM takes it, but
        None is always NULL.

        Relays notice a change of *text* or *metadata*, and deliver every row again; until then ``Hits.complete`` is
        False. Where *text* is a function, nothing tells when that changes: give another *text_version* then.

        *exclude* are column attributes that the log leaves out: secrets, large files, counters. A change of these alone
        is no change, history and export do not show them, and an undo leaves them as they are; a deleted row that an
        undo brings back has their defaults, or NULL. A function *text* cannot read them.

        Raises MemstateError for a class that is not mapped, unknown column attributes, or an entity tracked already.
        """
        names = [*self.indexes] if index is None else [index] if isinstance(index, str) else [*index]
        self._open()
        if not names or not self.indexes.keys() >= set(names):
            raise MemstateError(f"index={index!r}: this Memory has {', '.join(self.indexes)}")
        names = self._succession.with_successors(names)

        def tracked(model: type[M]) -> type[M]:
            self._capture.track(
                describe(
                    model,
                    text=text,
                    metadata=metadata,
                    schema=schema,
                    entity=entity,
                    indexes=tuple(names),
                    unique_by=unique_by,
                    immutable=immutable,
                    on_untracked=on_untracked,
                    capture=capture,
                    expires=expires,
                    version=version,
                    upgrade=upgrade,
                    text_version=text_version,
                    exclude=exclude,
                )
            )
            return model

        return tracked if model is None else tracked(model)

    def attach(self, target: Any) -> None:
        """SessionCapture what the Sessions of *target* write. Idempotent.

        *target* is a sessionmaker, a Session class (every Session made of it or of a subclass), a scoped_session, a
        Session, or an async_sessionmaker, which gets a sync Session class of its own. Raises TypeError otherwise.
        """
        self._open()
        self._capture.attach(target)

    def create_tables(self, engine: Engine | AsyncEngine) -> None:
        """Create the tables and columns of memstate_sa that are not there yet, and the triggers of log and classes.

        Triggers of a class that is no longer captured so are dropped.

        Their own tables have to be there. With Alembic, let a migration do it. Raises MemstateError, and creates
        nothing, for a tracked view, for a table in an attached SQLite database, and for a schema_translate_map.
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
        session: Session | AsyncSession,
        actor: str | None = None,
        reason: str | None = None,
        session_id: str | None = None,
    ) -> None:
        """Label what the current (or next) transaction of *session* changes; what is not given is left as it is.

        The labels end with the transaction, however it ends.
        """
        for name, value in (("actor", actor), ("reason", reason), ("session_id", session_id)):
            require_label(name, value)
        transaction = self._transaction(sync_session(session))
        transaction.actor = actor if actor is not None else transaction.actor
        transaction.reason = reason if reason is not None else transaction.reason
        transaction.session_id = session_id if session_id is not None else transaction.session_id
        self._capture.relabel(transaction)

    # -- the end -------------------------------------------------------------------------------------------------------

    def close(self, timeout: float = STOP_TIMEOUT_S) -> None:
        """Stop this Memory's relays and close its indexes.

        Waits *timeout* seconds at most for a call of an index or embedder; see `Relay.stop` for one that takes longer.
        Its index is closed when the call has ended.

        Tracked classes, attached Sessions and engines no longer keep this Memory alive. As long as the application
        does, Sessions that are attached go on being captured: their next use opens this Memory again, and a relay
        delivers what they write.
        """
        deadline = time.monotonic() + timeout
        relays = self._relays.stop(deadline)
        self._capture.stop()
        self._strict.stop()
        self._notifier.close(max(0.1, deadline - time.monotonic()))
        for name, index in self.indexes.items():
            close_after(relays, name, index)
        self._engines.dispose()
