"""`Memory`: the facade that wires capture, relay, search, undo and verification together."""

from __future__ import annotations

import asyncio
import contextlib
import math
import threading
import time
import weakref
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from datetime import datetime
from functools import partial
from typing import TYPE_CHECKING, Any, Literal, ParamSpec, TextIO, TypeVar, overload

from sqlalchemy import Select, Table, inspect
from sqlalchemy.engine import URL, Connection, Engine
from sqlalchemy.orm import QueryableAttribute, Session
from sqlalchemy.sql import visitors

from memstate_sa.capture import append_only, triggers
from memstate_sa.capture.listeners import SessionCapture
from memstate_sa.capture.recorder import Recorder
from memstate_sa.capture.transaction import OpenTransaction
from memstate_sa.db import creation, functions, missing_tables
from memstate_sa.db.codec import Image, is_text
from memstate_sa.db.engines import blocking_engine, with_separate_pool
from memstate_sa.db.sqlite import is_in_memory, require_no_transaction
from memstate_sa.db.tables import utcnow
from memstate_sa.embedders import Embedder, WordLlamaEmbedder
from memstate_sa.embedding.batches import Destination, Vectors
from memstate_sa.errors import DeliveryError, IndexBroken, MemstateError
from memstate_sa.indexes.base import PurgeableIndex, RemakableIndex, VectorIndex
from memstate_sa.log import history
from memstate_sa.log.changes import Change
from memstate_sa.maintenance import export_import, reindex
from memstate_sa.maintenance.backfill import Backfill
from memstate_sa.maintenance.doctor import Diagnosis, Doctor
from memstate_sa.maintenance.erase import Eraser
from memstate_sa.maintenance.expiry import Sweeper
from memstate_sa.maintenance.progress import Progress
from memstate_sa.maintenance.verify import DriftReport, Verify
from memstate_sa.relay import Relay
from memstate_sa.relay.backlog import Backlog, backlog
from memstate_sa.relay.index_key import IndexKey
from memstate_sa.relay.loop import STOP_TIMEOUT_S
from memstate_sa.relay.retry import guarded
from memstate_sa.relay.strict import Strict
from memstate_sa.relay.waiting import wait_for
from memstate_sa.relay.wakeup import Notifier
from memstate_sa.runtime import forks
from memstate_sa.runtime.printable import printable_logger
from memstate_sa.search.search import Call, Hits, Opened, Search, call_directly, resolve_target
from memstate_sa.search.time_travel import PastSession, as_of_session, search_past, take_criteria
from memstate_sa.tracking import committed
from memstate_sa.tracking.options import describe
from memstate_sa.tracking.registry import Registry
from memstate_sa.tracking.tracked import Tracked, Upgrade
from memstate_sa.tracking.validation import require_count
from memstate_sa.undo.undo import OnConflict, Revocation, Scope, Undo

if TYPE_CHECKING:
    from sqlalchemy.ext.asyncio import AsyncEngine, AsyncSession

logger = printable_logger("memstate_sa.memory")

M = TypeVar("M")
P = ParamSpec("P")
R = TypeVar("R")


class Memory:
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
        self.indexes: dict[str, VectorIndex] = dict(index) if isinstance(index, Mapping) else {"memory": index}
        if not self.indexes:
            raise MemstateError("give at least one index")
        for name, each in self.indexes.items():
            if not isinstance(name, str) or not callable(getattr(type(each), "upsert", None)):
                raise MemstateError(f"index={each!r}: give a VectorIndex, or a dict of them by name")
        if embedding_cache != 0:
            require_count("embedding_cache", embedding_cache, "how many vectors to keep, 0 for none")
        self.successors = dict(successors or {})
        reindex.check(self.successors, self.indexes)
        embedders = _embedders(embedder, self.indexes)
        self.embedder = next(iter(embedders.values()))
        vectors = {id(each): Vectors(each, stored=embedding_cache) for each in embedders.values()}
        self._destinations = {
            name: Destination(each, vectors[id(embedders[name])]) for name, each in self.indexes.items()
        }
        self._registry = Registry()
        self._notifier = Notifier()
        self._strict = Strict(self._registry, self._destinations, blocking=self._blocking, wake=self._committed)
        veto = self._strict if delivery == "strict" else None
        self._recorder = Recorder(self._registry)
        self._capture = SessionCapture(self._registry, self._recorder, self._committed, veto)
        self._undo = Undo(self._registry, self._capture, self._recorder)
        self._sweeper = Sweeper(self._capture)
        self._eraser = Eraser(self._registry, self._capture, self._recorder, list(embedders.values()))
        self._relays: weakref.WeakSet[Relay] = weakref.WeakSet()
        self._make_lock()
        forks.in_child(self, Memory._make_lock)
        self._engines: dict[URL, Engine] = {}  # for threads, by the URL of an AsyncEngine
        self._derived: list[Engine] = []
        self._opened: dict[str, Opened] = {}  # indexes that a search has opened
        self._asked: dict[str, str] = {}  # which one the last search of each has asked

    def _make_lock(self) -> None:
        self._listing = threading.RLock()  # a relay that is made while a commit wakes the others would fail that commit

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

        Raises MemstateError for a class that is not mapped, unknown column attributes, or an entity tracked already.
        """
        names = [*self.indexes] if index is None else [index] if isinstance(index, str) else [*index]
        self._open()
        if not names or not self.indexes.keys() >= set(names):
            raise MemstateError(f"index={index!r}: this Memory has {', '.join(self.indexes)}")
        for name in names:
            if (other := self.successors.get(name, name)) not in names:
                names.append(other)  # which is looked at in its turn

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
                )
            )
            return model

        return tracked if model is None else tracked(model)

    def attach(self, target: Any) -> None:
        """Capture what the Sessions of *target* write. Idempotent.

        *target* is a sessionmaker, a Session class (every Session made of it or of a subclass), a scoped_session, a
        Session, or an async_sessionmaker, which gets a sync Session class of its own. Raises TypeError otherwise.
        """
        self._open()
        self._capture.attach(target)

    def _open(self) -> None:
        """Go on after `close`."""
        self._capture.resume()
        self._notifier.open()

    def create_tables(self, engine: Engine | AsyncEngine) -> None:
        """Create the tables and columns of memstate_sa that are not there yet, and the triggers of log and classes.

        Triggers of a class that is no longer captured so are dropped.

        Their own tables have to be there. With Alembic, let a migration do it.
        """
        self._open()
        self._capture.warn_of_cascades()
        creation.create(self.sync_engine(engine), install=self._install)

    def _install(self, connection: Connection) -> None:
        append_only.install(connection)
        for tracked in self._registry.by_entity.values():
            (triggers.install if tracked.by_trigger else triggers.uninstall)(connection, tracked)
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
            _check_label(name, value)
        unit = self._transaction(_sync_session(session))
        unit.actor = actor if actor is not None else unit.actor
        unit.reason = reason if reason is not None else unit.reason
        unit.session_id = session_id if session_id is not None else unit.session_id

    def _transaction(self, session: Session) -> OpenTransaction:
        if not self._capture.is_attached(session):
            raise MemstateError("this Session is not attached: call memory.attach() with its sessionmaker first")
        return self._capture.transaction(session)

    # -- search ----------------------------------------------------------------------------------------------------

    @overload
    def search(
        self,
        session: Session,
        query: str,
        target: type[M],
        *,
        limit: int = 5,
        max_distance: float | None = None,
        consistency: Literal["fresh", "eventual"] = "fresh",
        index: str | None = None,
        as_of: datetime | str | None = None,
    ) -> Hits[M]: ...

    @overload
    def search(
        self,
        session: Session,
        query: str,
        target: Select[Any],
        *,
        limit: int = 5,
        max_distance: float | None = None,
        consistency: Literal["fresh", "eventual"] = "fresh",
        index: str | None = None,
        as_of: datetime | str | None = None,
    ) -> Hits[Any]: ...

    def search(
        self,
        session: Session,
        query: str,
        target: Any,
        *,
        limit: int = 5,
        max_distance: float | None = None,
        consistency: Literal["fresh", "eventual"] = "fresh",
        index: str | None = None,
        as_of: datetime | str | None = None,
    ) -> Hits[Any]:
        """The facts nearest in meaning to *query*, best first, among the rows that *target* selects.

        Every hit is a row that this Session's transaction sees, found by an embedding of its current content. "fresh"
        includes what is committed, or flushed in this transaction, and not yet delivered; "eventual" does not look
        for it. ``.complete`` of the result is False when something could not be considered.

        *target* is a tracked class or a ``select()`` of one, whose criteria may be anything; its order is ignored.
        With *as_of*, a time or a transaction (``Change.tx``), it searches the facts as they were then: exactly, so it
        embeds what is not known any more; the hits' facts are detached.
        Raises MemstateError for other targets, DeliveryError when the index or the embedder is unavailable.
        """
        return self._search(call_directly, session, query, target, limit, max_distance, consistency, index, as_of)

    @overload
    async def asearch(
        self,
        session: AsyncSession,
        query: str,
        target: type[M],
        *,
        limit: int = 5,
        max_distance: float | None = None,
        consistency: Literal["fresh", "eventual"] = "fresh",
        index: str | None = None,
        as_of: datetime | str | None = None,
    ) -> Hits[M]: ...

    @overload
    async def asearch(
        self,
        session: AsyncSession,
        query: str,
        target: Select[Any],
        *,
        limit: int = 5,
        max_distance: float | None = None,
        consistency: Literal["fresh", "eventual"] = "fresh",
        index: str | None = None,
        as_of: datetime | str | None = None,
    ) -> Hits[Any]: ...

    async def asearch(
        self,
        session: AsyncSession,
        query: str,
        target: Any,
        *,
        limit: int = 5,
        max_distance: float | None = None,
        consistency: Literal["fresh", "eventual"] = "fresh",
        index: str | None = None,
        as_of: datetime | str | None = None,
    ) -> Hits[Any]:
        """`search` for an AsyncSession; the index and the embedder are called in threads."""
        from sqlalchemy.util import await_only

        def in_thread(function: Callable[P, R], /, *args: P.args, **kwargs: P.kwargs) -> R:
            return await_only(asyncio.to_thread(function, *args, **kwargs))

        def run(sync: Session) -> Hits[Any]:
            return self._search(in_thread, sync, query, target, limit, max_distance, consistency, index, as_of)

        current = _current(session)
        if not hasattr(current, "run_sync"):
            raise MemstateError(f"{session!r} is not an AsyncSession; memory.search() is for a Session")
        return await current.run_sync(run)  # type: ignore[no-any-return]

    def _search(
        self,
        call: Call,
        session: Session,
        query: str,
        target: Any,
        limit: int,
        max_distance: float | None,
        consistency: str,
        index: str | None,
        as_of: datetime | str | None,
    ) -> Hits[Any]:
        session = _blocking_session(session)
        if not isinstance(query, str):
            raise MemstateError(f"query={query!r}: a string to search for")
        require_count("limit", limit, "how many hits, at least 1")
        if max_distance is not None and (
            isinstance(max_distance, bool) or not isinstance(max_distance, (int, float)) or math.isnan(max_distance)
        ):
            raise MemstateError(f"max_distance={max_distance!r}: a cosine distance, from 0 (identical) to 2 (opposite)")
        if consistency not in ("fresh", "eventual"):
            raise MemstateError(f"consistency={consistency!r}: 'fresh' or 'eventual'")
        statement, tracked = resolve_target(self._registry, target)
        name = self._searched(tracked, index)
        if as_of is not None:
            engine = with_separate_pool(session.get_bind(tracked.mapper).engine)  # the Session may hold a connection
            read = {
                self._registry.named(table, None) for table in visitors.iterate(statement) if isinstance(table, Table)
            }
            models = [each.model for each in {tracked, *read} if each is not None]
            with self.as_of_session(engine, as_of, models) as past:
                take_criteria(past, session)
                vectors = self._destinations[self._asked.get(name, name)].vectors
                hits = search_past(past, tracked, statement, vectors, query, limit, max_distance, call)
                past.expunge_all()
            return hits
        search = Search(
            session,
            self._capture,
            self._destinations,
            self._asked.get(name, name),
            self._opened,
            statement,
            tracked,
            resolve=partial(self._replacement, name) if name in self.successors else None,
            call=call,
        )
        hits = search.run(query, limit, max_distance, fresh=consistency == "fresh")
        self._asked[name] = search.name
        return hits

    def _searched(self, tracked: Tracked, index: str | None) -> str:
        """The index that a search is meant for; see `_replacement` for the one that is asked."""
        if index is None:
            following = {*self.successors.values()}
            index = next((name for name in tracked.indexes if name not in following), tracked.indexes[0])
        elif index not in tracked.indexes:
            raise MemstateError(f"{tracked.model.__name__} does not go to an index {index!r}")
        return index

    def _replacement(self, name: str, connection: Connection) -> str:
        return reindex.searched(
            connection, name, self.successors, lambda other: guarded(self._destinations[other].open, f"index {other!r}")
        )

    # -- history ---------------------------------------------------------------------------------------------------

    def history(
        self,
        session: Session,
        model_or_instance: Any = None,
        key: Any = None,
        *,
        actor: str | None = None,
        session_id: str | None = None,
        limit: int | None = None,
    ) -> list[Change]:
        """What happened to a fact, oldest first: ``history(session, instance)`` or ``history(session, Model, key)``.

        A class without a key gives the changes of all its facts, no class those of all. A composite key is a tuple.
        *actor* and *session_id* keep what is so labelled, *limit* the last so many changes.
        """
        model = model_or_instance
        if model is not None and not isinstance(model, type):
            model = type(model_or_instance)
            self._registry.of(model)
            key = inspect(model_or_instance).identity
            if key is None:
                raise MemstateError(f"{model_or_instance!r} was never flushed, so it has no history")
        if model is None and key is not None:
            raise MemstateError(f"key={key!r}: of which class?")
        tracked, connection = self._reading(session, model)
        return history.find_changes(
            connection,
            self._registry,
            entity=None if model is None else tracked.entity,
            key=None if key is None else history.stored_key(connection, tracked, key),
            actor=actor,
            session_id=session_id,
            limit=limit,
        )

    def rollback(
        self,
        session: Session,
        steps: int = 1,
        *,
        session_id: str | None = None,
        actor: str | None = None,
        model: type[Any] | None = None,
        to: datetime | str | None = None,
        tx: str | None = None,
        on_conflict: OnConflict = "raise",
        dry_run: bool = False,
    ) -> list[Change]:
        """Undo the last *steps* transactions as new log entries, newest first, in the caller's transaction.

        Nothing is committed on your behalf, the log only grows, and the vectors follow as for any write. With
        *session_id* or *actor* (by default what the session is annotated with) only transactions so labelled count,
        with *model* only changes of that class. What is undone does not count again, so two calls walk back two steps.
        Instead of a number, *to* undoes everything since a time or a transaction (``Change.tx``), and *tx* names one
        transaction; undoing a rollback that way redoes what it undid. Instances in the session are expired.

        Returns the new entries; fewer transactions than *steps* may have been there. Raises ConflictError, with the
        changes in the way, when someone outside of what is undone has since changed a fact, refers to one that would
        go, or holds a value that must be unique; nothing is written then. ``on_conflict="skip"`` leaves such facts as
        they are, "force" overwrites later changes of the same facts. *dry_run* writes nothing, and returns the entries
        that would have been written.
        """
        session = _blocking_session(session)
        scope = self._scope(session, session_id, actor, model, on_conflict)
        _check_label("tx", tx)
        if tx is not None and to is not None:
            raise MemstateError("give tx= or to=, not both")
        if tx is not None:
            return self._undo.transaction(session, tx, scope, on_conflict, dry_run=dry_run)
        if to is not None:
            return self._undo.back_to(session, to, scope, on_conflict, dry_run=dry_run)
        return self._undo.steps(session, steps, scope, on_conflict, dry_run=dry_run)

    def revoke(
        self,
        session: Session,
        *,
        session_id: str | None = None,
        actor: str | None = None,
        tx: Sequence[str] = (),
        model: type[Any] | None = None,
        on_conflict: OnConflict = "skip",
        dry_run: bool = False,
    ) -> Revocation:
        """Take one run's changes out from among those of others: of an actor, a session_id, or the transactions *tx*.

        As `rollback` undoes them, but all of them, and by default leaving alone what others have built upon: the
        result says what was reverted, which changes of the run are kept, and whose are in their way. Where nothing is
        kept, tables and vectors are what the others alone would have made.
        """
        session = _blocking_session(session)
        scope = self._scope(session, session_id, actor, model, on_conflict)
        txs = [tx] if isinstance(tx, str) else list(tx)
        for each in txs:
            _check_label("tx", each)
        if bool(txs) == bool(scope.labels):
            raise MemstateError("revoke whose changes? Give actor= or session_id=, or transactions as tx=")
        return self._undo.revoke(session, scope, txs, on_conflict, dry_run=dry_run)

    def _scope(
        self, session: Session, session_id: str | None, actor: str | None, model: type[Any] | None, on_conflict: str
    ) -> Scope:
        self._transaction(session)
        for name, value in (("session_id", session_id), ("actor", actor)):
            _check_label(name, value)
        self._require_tracked()
        if on_conflict not in ("raise", "skip", "force"):
            raise MemstateError(f"on_conflict={on_conflict!r}: 'raise', 'skip' or 'force'")
        return Scope(session_id, actor, None if model is None else self._whole(model).entity)

    def _whole(self, model: type[Any]) -> Tracked:
        """What tracks *model*, unless that has other classes' facts, too."""
        tracked = self._registry.of(model)
        if tracked.model is not model:
            raise MemstateError(
                f"{model.__name__} is tracked along with {tracked.model.__name__}, whose changes are not told apart: "
                f"model={tracked.model.__name__}"
            )
        return tracked

    def _require_tracked(self) -> None:
        if not self._registry.by_entity:
            raise MemstateError("no class is tracked")

    # -- time travel -------------------------------------------------------------------------------------------------

    def as_of(self, session: Session, model: type[Any], key: Any, at: datetime | str) -> Image | None:
        """What the fact's row was at a time, or after a transaction (``Change.tx``), by column name; None: no row.

        A row that is older than its history was as its first entry says. Raises HistoryMissing for an erased fact.
        """
        tracked, connection = self._reading(session, model)
        image = history.image_at(connection, tracked, history.stored_key(connection, tracked, key), at)
        return None if image is None else tracked.on(connection.dialect).values(dict(image))

    @contextlib.contextmanager
    def as_of_session(
        self, engine: Engine | AsyncEngine, at: datetime | str, models: Sequence[type[Any]] = ()
    ) -> Iterator[PastSession]:
        """A read-only Session in which tracked classes (or *models*) have the rows that they had at a moment.

        Any ``select()`` works, relationships too, and gives ordinary instances; tables that are not tracked are as they
        are now. The rows of that moment are written to temporary tables first, so it takes time in proportion to them.
        """
        sync = self.sync_engine(engine)
        require_no_transaction(sync)
        tracked = [self._registry.of(model) for model in models] or list(self._registry.by_entity.values())
        with as_of_session(sync, dict.fromkeys(tracked), at) as session:
            yield session

    def diff(
        self, session: Session, a: datetime | str, b: datetime | str | None = None, model: type[Any] | None = None
    ) -> list[Change]:
        """What became of each fact (of *model*) from moment *a* to *b* (default: now), as one change a fact.

        Facts that are the same at both are left out; labels and ids are those of the last change between.
        """
        models = (
            [self._whole(model).model]
            if model is not None
            else [tracked.model for tracked in self._registry.by_entity.values()]
        )
        found: list[Change] = []
        for each in models:
            tracked, connection = self._reading(session, each)
            found += history.differences(connection, self._registry, [tracked.entity], a, utcnow() if b is None else b)
        return sorted(found, key=lambda change: change.id)

    # -- erasure -----------------------------------------------------------------------------------------------------

    def erase(self, session: Session, model: type[Any], key: Any, reason: str | None = None) -> int:
        """Forget a fact for good: its row, what the log says it was, its vectors; in the caller's transaction.

        That there was such a key, and when it changed and was erased, stays in the history, as does the key itself,
        and who did it with what *reason*. It cannot be undone; a fact that is added later under the same key is
        another; so is what the row was under an earlier primary key (a change of key is a delete and an insert), which
        is to be erased by that key. Nothing is committed on your behalf. The files hold the bytes until they are
        rewritten: see `purge`.

        Returns how many entries of the log were redacted. Raises NotFound for a key that neither the table nor the log
        has, and ConflictError when other rows refer to the row; those that triggers capture may go along with it, by
        ON DELETE.
        """
        _check_label("reason", reason)
        tracked = self._registry.of(model)
        session = _blocking_session(session)
        self._transaction(session)
        return self._eraser.erase(session, tracked, key, reason)

    def purge(self, engine: Engine | AsyncEngine, timeout: float = 30.0) -> None:
        """After erasures that are committed: have them delivered, and rewrite the files that may still hold the bytes.

        The tables concerned are locked meanwhile (PostgreSQL: VACUUM FULL; SQLite: VACUUM), and an index that is
        replaced by a copy of itself is compared with them again; nothing is embedded anew. What lies elsewhere is not
        reached: backups, replicas, archived WAL, other programs' logs.

        Raises DeliveryError when the deletions are not delivered within *timeout* seconds, and MemstateError when a
        transaction is open for so long that may still read what was erased, or the files of an index are out of reach.
        """
        sync = self.sync_engine(engine)
        require_no_transaction(sync)
        self._deliver(sync, timeout)
        try:
            for index in self.indexes.values():
                if isinstance(index, PurgeableIndex):
                    index.purge()
            self._deliver(sync, timeout)
        finally:
            self._eraser.overwrite(sync, timeout)

    def _reading(self, session: Session, model: type[Any] | None) -> tuple[Tracked, Connection]:
        session = _blocking_session(session)
        if model is None:
            self._require_tracked()
        tracked = next(iter(self._registry.by_entity.values())) if model is None else self._registry.of(model)
        session.flush()
        return tracked, session.connection(bind_arguments={"mapper": tracked.mapper})

    # -- operation -------------------------------------------------------------------------------------------------

    def relay(self, engine: Engine | AsyncEngine, **options: Any) -> Relay:
        """What brings the indexes up to date with *engine*'s database; see `Relay` for the options.

        ``with memory.relay(engine):`` runs it in the background.
        """
        self._open()
        sync = self.sync_engine(engine)
        self._capture.guard(sync)
        self._strict.watch(sync)
        relay = self._relay_to(sync, self.indexes, **{"sweep": partial(self.sweep, sync), **options})
        with self._listing:
            self._relays.add(relay)
        return relay

    def _relay_to(self, engine: Engine, names: Iterable[str], **options: Any) -> Relay:
        delivered = self._registry.delivered
        destinations = {name: (self._destinations[name], partial(delivered, name)) for name in names}
        return Relay(engine, destinations, notifier=self._notifier, **options)

    def _by_index(self) -> dict[str, tuple[Destination, dict[str, Tracked]]]:
        return {name: (destination, self._registry.published(name)) for name, destination in self._destinations.items()}

    def _wake(self) -> None:
        for relay in self._all_relays():
            relay.wake()

    def _all_relays(self) -> list[Relay]:
        with self._listing:
            return list(self._relays)

    def _committed(self, engine: Engine) -> None:
        self._wake()
        if engine.dialect.name == "postgresql":
            with contextlib.suppress(ImportError):  # of a driver that blocks: relays elsewhere find it by polling
                self._notifier.committed(self._blocking(engine))

    def token(self, session: Session | AsyncSession) -> str | None:
        """Names the last transaction with tracked changes that *session* committed, for `wait`, in any process.

        It is the ``tx`` of the `Change` entries of that transaction.
        """
        txs, _ = self._capture.committed.get(_sync_session(session), ((), None))
        return txs[-1] if txs else None

    def wait(
        self,
        session_or_token: Session | AsyncSession | str | None,
        timeout: float = 30.0,
        *,
        engine: Engine | AsyncEngine | None = None,
    ) -> None:
        """Return when what a transaction changed is in every index, so that an "eventual" search finds it, too.

        *session_or_token*: a Session, for its last commit, or a `token`; None returns at once. *engine* says where a
        token's transaction is, when this Memory has seen several. Blocks: ``await asyncio.to_thread(memory.wait, …)``.

        Raises DeliveryError after *timeout* seconds (is a relay running?), or when an index refused a key for good.
        """
        txs: Sequence[str] = [session_or_token] if isinstance(session_or_token, str) else []
        if session_or_token is not None and not isinstance(session_or_token, str):
            txs, committed_on = self._capture.committed.get(_sync_session(session_or_token), ((), None))
            engine = engine or committed_on
        if txs:
            sync = self._only_engine() if engine is None else self._blocking(engine)
            require_no_transaction(sync)
            wait_for(sync, txs, self._by_index(), timeout)

    def _only_engine(self) -> Engine:
        known = [engine for engine in self._capture.engines if not engine.dialect.is_async]
        if len(known) != 1:
            raise MemstateError(f"this Memory knows {len(known)} engines: say where the transaction is, with engine=")
        return known[0]

    def _blocking(self, engine: Engine | AsyncEngine) -> Engine:
        """*engine*, or one like it that a thread can use; also of the sync engine inside an AsyncEngine."""
        if isinstance(engine, Engine) and engine.dialect.is_async:
            from sqlalchemy.ext.asyncio import AsyncEngine

            engine = AsyncEngine(engine)
        return self.sync_engine(engine)

    def verify(
        self, engine: Engine | AsyncEngine, *, repair: bool = False, progress: Progress | None = None
    ) -> DriftReport:
        """Compare every index with the tables by content, in pages.

        *repair* redelivers what differs, and returns when that is done; the report says what was found. An index whose
        files are damaged is made anew. Without *repair* it raises IndexBroken.
        """
        sync, report = self.sync_engine(engine), DriftReport()
        require_no_transaction(sync)
        self._strict.watch(sync)
        intended = partial(self._strict.intended, sync)
        for name, (destination, tracked) in self._by_index().items():
            if repair:
                _remake_if_broken(name, destination)
            verify = Verify(sync, name, destination, tracked, intended=intended)
            verify.run(report, repair=repair, progress=progress)
        if repair and not report.clean:
            self._deliver(sync)
        return report

    def _deliver(self, engine: Engine, timeout: float = 30.0) -> None:
        """Deliver what is due: here, or by whoever holds the lease."""
        relay = self.relay(engine)
        deadline = time.monotonic() + timeout
        self._wake()
        relay.drain(timeout)
        while any(backlog.due for backlog in self.status(engine).values()):
            if time.monotonic() > deadline:
                raise DeliveryError(f"what is due was not delivered within {timeout:g} s; is a relay stuck?")
            relay.drain(timeout)
            time.sleep(0.02)

    def doctor(
        self,
        engine: Engine | AsyncEngine,
        *,
        repair: bool = False,
        rows: bool = True,
        progress: Progress | None = None,
    ) -> Diagnosis:
        """Replay the log against the tables, in pages, and look for what would make them differ.

        Without *rows*, only the latter: what is not there, or not as it should be. *repair* logs rows that were changed
        past it, as transactions with the reason "reconciled", and has them delivered. `verify` compares the indexes
        with the tables.
        """
        sync = self.sync_engine(engine)
        require_no_transaction(sync)
        doctor = Doctor(sync, self._registry, self._capture, self._recorder, self._destinations)
        found = doctor.run(repair=repair, rows=rows, progress=progress)
        if repair:
            self._wake()
        return found

    def backfill(
        self,
        engine: Engine | AsyncEngine,
        model: type[Any] | Collection[type[Any]] | None = None,
        *,
        batch_size: int = 1000,
        rate: float | None = None,
        limit: int | None = None,
        restart: bool | None = None,
        progress: Progress | None = None,
    ) -> int:
        """Log a baseline for the rows of *model* that the log has not seen, and mark them for delivery.

        *model* is a tracked class, several, or None for all. Each batch is one transaction, safe beside live writes,
        in which it is noted how far that is: after an interruption the next call goes on there, and calls in other
        threads and processes share what is left. *rate* is how many rows a second this call looks at, at most; *limit*
        how many at all (0: only note that there is something to do). On SQLite it rests after each batch for as long
        as that took, so that others get to write.

        A class that is done with is gone through again; *restart* says so of others, too, or (False) not even of that.
        *progress* is told of all callers' rows. Returns how many rows this one found that were new to the log.
        """
        require_count("batch_size", batch_size, "at least 1")
        if rate is not None and not rate > 0:
            raise MemstateError(f"rate={rate!r}: rows a second")
        sync = self.sync_engine(engine)
        models = [model] if isinstance(model, type) else model
        registered = self._registry.by_entity.values()
        tracked = list(registered) if models is None else [self._registry.of(each) for each in models]
        require_no_transaction(sync)
        worker = Backfill(sync, self._recorder, tracked, batch_size=batch_size, rate=rate)
        worker.begin(restart=restart)
        added = worker.run(limit=limit, progress=progress)
        self._committed(sync)
        return added

    def sweep(self, engine: Engine | AsyncEngine) -> int:
        """Delete the facts that have expired, as ordinary transactions with the reason "expired"; returns how many.

        History keeps them, and rollback counts no sweep as a step; ``rollback(tx=…)`` brings them back. A fact that
        others refer to is left, with a warning in the log.
        """
        sync = self.sync_engine(engine)
        require_no_transaction(sync)
        return self._sweeper.sweep(sync, self._registry.published().values())

    def export_facts(
        self,
        engine: Engine | AsyncEngine,
        file: TextIO,
        models: Sequence[type[Any]] = (),
        *,
        progress: Progress | None = None,
    ) -> int:
        """Write the tracked classes' history (or that of *models*) as JSON lines, all of it as at one moment.

        *file* is a text stream in UTF-8. Rows that the log has not seen are written as baselines, what is tracked no
        more is left out. Returns how many entries of history there were.
        """
        sync = self.sync_engine(engine)
        require_no_transaction(sync)
        tracked = [self._registry.of(model) for model in models] or list(self._registry.by_entity.values())
        return export_import.export_facts(sync, list(dict.fromkeys(tracked)), file, progress)

    def import_facts(
        self, engine: Engine | AsyncEngine, file: Iterable[str], *, progress: Progress | None = None
    ) -> int:
        """Take in what `export_facts` wrote, of this database or another: history, labels and rows, in one transaction.

        The rows are those that the history ends with, in the shape of today, and relays deliver them. Memory is taken
        for a page of them at a time, or for all of a class whose rows refer to each other. Returns how many entries of
        history there were.

        Raises MemstateError, with the number of the line, for a file that is broken or cut off, of another format, or
        of classes that are not tracked; ConflictError when a fact or a transaction of it is there already, or was, or
        when the tables refuse a row. Nothing is written then.
        """
        sync = self.sync_engine(engine)
        require_no_transaction(sync)
        count = export_import.import_facts(sync, self._registry, self._capture, file, progress)
        self._committed(sync)
        return count

    def status(self, engine: Engine | AsyncEngine) -> dict[str, Backlog]:
        """What each index has not been given yet."""
        sync = self.sync_engine(engine)
        require_no_transaction(sync)
        problems = {name: why for relay in self._all_relays() for name, why in relay.problems().items()}
        found = {}
        with sync.connect() as connection:
            for name, (destination, tracked) in self._by_index().items():
                left = backlog(connection, IndexKey(name, destination.open()), list(tracked))
                asked = self._replacement(name, connection)
                replaced_by, problem = None if asked == name else asked, problems.get(name, left.problem)
                found[name] = replace(left, replaced_by=replaced_by, problem=problem)
        return found

    # -- another index or embedder -------------------------------------------------------------------------------------

    def reindex(
        self,
        engine: Engine | AsyncEngine,
        index: str | None = None,
        *,
        timeout: float = math.inf,
        progress: Progress | None = None,
    ) -> str:
        """Fill the successor of *index*, beside it, then have searches ask it, in every process at once.

        *index* may be left out when this Memory's `successors` name one only. Writes and searches go on meanwhile;
        when it is interrupted, run it again: it goes on where it was. The old index is delivered to until a Memory no
        longer has it, so that `reindex_back` is possible. Returns the successor's name.

        Every process that searches has to have a Memory with these *successors* before; one that has not goes on with
        the old index. Raises DeliveryError when the successor is not filled within *timeout* seconds, or refuses facts
        that the old index has; nothing has changed then.
        """
        sync, (name, other) = self.sync_engine(engine), self._succession(index)
        tracked = self._registry.published(other).values()
        require_no_transaction(sync)
        self._capture.guard(sync)
        with sync.connect() as connection:
            total = sum(committed.count(connection, each) for each in tracked) if progress is not None else None
        relay = self._relay_to(sync, [other])
        relay.drain(timeout, progress=None if progress is None else lambda done: progress(min(done, total or 0), total))
        old, new = (IndexKey(each, self._destinations[each].open()) for each in (name, other))
        with sync.begin() as connection:
            reindex.switch(connection, old, new)
        if progress is not None:
            progress(total or 0, total)
        return other

    def reindex_back(self, engine: Engine | AsyncEngine, index: str | None = None) -> str:
        """Have searches ask *index* again, which its successor had replaced. Returns its name."""
        sync, (name, _) = self.sync_engine(engine), self._succession(index)
        with sync.begin() as connection:
            reindex.switch_back(connection, name)
        return name

    def forget_index(self, engine: Engine | AsyncEngine, name: str) -> None:
        """Forget what relays know of an index that no application has any more; the outbox no longer waits for it.

        What it holds, its own tools delete; given again, under that name, it is compared with the tables in full. (An
        index that no relay has delivered to for a week is forgotten in any case, see `Retention`.)
        """
        if name in self.indexes:
            raise MemstateError(f"this Memory has the index {name!r}: take it out first")
        with self.sync_engine(engine).begin() as connection:
            reindex.forget(connection, name)

    def _succession(self, index: str | None) -> tuple[str, str]:
        if index is None and len(self.successors) == 1:
            [index] = self.successors
        if index not in self.successors:
            raise MemstateError(
                f"index={index!r}: which index is to be replaced, and by what? Memory(..., successors={{'memory': "
                "'memory_v2'}) says that, for indexes that it has"
            )
        return index, self.successors[index]

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
        relays = self._all_relays()
        for relay in relays:
            relay.stop(max(0.0, deadline - time.monotonic()))
        self._capture.stop()
        self._strict.stop()
        self._notifier.close(max(0.1, deadline - time.monotonic()))
        for name, index in self.indexes.items():
            _close_after(relays, name, index)
        for engine in self._derived:
            engine.dispose()

    def sync_engine(self, engine: Engine | AsyncEngine, *, use: Engine | None = None) -> Engine:
        """*engine*, or a sync engine on the URL of an AsyncEngine: the relay is a thread, not a coroutine.

        Of an AsyncEngine the URL alone is known: where ``connect_args``, a ``creator`` or listeners say more, give one
        that has them too, before anything else: ``memory.sync_engine(async_engine, use=engine)``.
        """
        if isinstance(engine, Engine):
            missing_tables.explain(engine)
            return engine
        if not hasattr(engine, "sync_engine"):
            raise MemstateError(f"{engine!r} is not an Engine; sqlalchemy.create_engine(url) makes one")
        url: URL = engine.url
        found = self._engines.get(url) if use is None else self._engines.setdefault(url, use)
        if found is None:
            if is_in_memory(engine.sync_engine):
                raise MemstateError("an in-memory SQLite exists in the AsyncEngine's connection only; use a file")
            made = blocking_engine(url)
            found = self._engines.setdefault(url, made)
            if found is made:
                self._derived.append(found)  # else another thread was first; this one has no connections
        missing_tables.explain(found)
        return found


def _close_after(relays: Sequence[Relay], name: str, index: VectorIndex) -> None:
    """Close *index* when none of *relays* uses it. Another process might open its folder beside a late write."""
    if relays:
        relays[0].after_stop(name, partial(_close_after, relays[1:], name, index))
    else:
        index.close()


def _remake_if_broken(name: str, destination: Destination) -> None:
    index = destination.index
    try:
        destination.open()
    except IndexBroken:
        if not isinstance(index, RemakableIndex):
            raise
        logger.warning("index %r is damaged, and made anew", name)
        index.remake()


def _embedders(given: Any, indexes: Collection[str]) -> dict[str, Embedder]:
    """The embedder of each index, in their order."""
    found = dict(given) if isinstance(given, Mapping) else dict.fromkeys(indexes, given or WordLlamaEmbedder())
    for embedder in found.values():
        if not callable(getattr(embedder, "embed", None)):
            raise MemstateError(f"embedder={embedder!r}: give an Embedder; without one it is WordLlamaEmbedder()")
    if found.keys() != set(indexes):
        raise MemstateError(f"embedder={given!r}: give one for each index: {', '.join(indexes)}")
    return {name: found[name] for name in indexes}


def _check_label(name: str, value: Any) -> None:
    """A label must be text that both databases hold."""
    if value is not None and not is_text(value):
        raise MemstateError(f"{name}={value!r}: give a string without NUL or lone surrogates")


def _current(session: Any) -> Any:
    """Of a scoped_session, or an async_scoped_session, the one of this scope."""
    return session() if hasattr(session, "registry") else session


def _sync_session(session: Any) -> Session:
    """The Session that *session* is, stands for (scoped_session), or has (AsyncSession)."""
    current = _current(session)
    found = getattr(current, "sync_session", current)
    if not isinstance(found, Session):
        raise MemstateError(f"{session!r} is not a Session")
    return found


def _blocking_session(session: Any) -> Session:
    """The same, for what waits for the database."""
    if hasattr(_current(session), "sync_session"):
        raise MemstateError(
            "this waits for the database, which an AsyncSession cannot: await session.run_sync(memory.history, Model, "
            "key), for example, gives it the Session; search has `await memory.asearch(session, …)`"
        )
    return _sync_session(session)
