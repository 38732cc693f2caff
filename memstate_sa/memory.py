"""`Memory`: the facade that wires capture, relay, search, undo and verification together."""

from __future__ import annotations

import asyncio
import contextlib
import math
import time
import weakref
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal, ParamSpec, TypeVar, overload

from sqlalchemy import Select, func, inspect, select
from sqlalchemy.engine import URL, Engine
from sqlalchemy.orm import Session

from memstate_sa import history, tables, triggers, truth
from memstate_sa.capture import Capture, Unit
from memstate_sa.changes import Change
from memstate_sa.codec import is_text
from memstate_sa.columns import TableColumns
from memstate_sa.doctor import Diagnosis, Doctor
from memstate_sa.embedders import Embedder, WordLlamaEmbedder
from memstate_sa.errors import DeliveryError, MemstateError, require_count
from memstate_sa.facts import Tracked, describe
from memstate_sa.indexes.base import VectorIndex
from memstate_sa.registry import Registry
from memstate_sa.relay import Relay
from memstate_sa.relay.backlog import Backlog, backlog, keys_of, lacks
from memstate_sa.relay.claims import IndexKey
from memstate_sa.relay.wakeup import Notifier
from memstate_sa.search import Call, Hits, Search, call_directly
from memstate_sa.sqlite import configure, is_in_memory, require_no_transaction
from memstate_sa.vectors import Vectors
from memstate_sa.verify import DriftReport, Progress, Verify

if TYPE_CHECKING:
    from sqlalchemy.ext.asyncio import AsyncEngine, AsyncSession

M = TypeVar("M")
P = ParamSpec("P")
R = TypeVar("R")


class Memory:
    """Facts in SQL, their meaning in one or more vector indexes, kept in step by the application's own transactions.

    *index* is a `VectorIndex`, or several by name; *embedder* defaults to `WordLlamaEmbedder`. Holds no module-level
    state: two Memory objects do not see each other. Nothing is opened before it is first needed.
    """

    def __init__(
        self,
        index: VectorIndex | Mapping[str, VectorIndex],
        *,
        embedder: Embedder | None = None,
        delivery: Literal["relay"] = "relay",
    ) -> None:
        if delivery != "relay":
            raise MemstateError(f"delivery={delivery!r}: only 'relay' is available")
        self.indexes: dict[str, VectorIndex] = dict(index) if isinstance(index, Mapping) else {"memory": index}
        if not self.indexes:
            raise MemstateError("give at least one index")
        for name, each in self.indexes.items():
            if not isinstance(name, str) or not callable(getattr(type(each), "upsert", None)):
                raise MemstateError(f"index={each!r}: give a VectorIndex, or a dict of them by name")
        if embedder is not None and not callable(getattr(embedder, "embed", None)):
            raise MemstateError(f"embedder={embedder!r}: give an Embedder; without one it is WordLlamaEmbedder()")
        self.embedder = embedder if embedder is not None else WordLlamaEmbedder()
        self._vectors = Vectors(self.embedder)
        self._registry = Registry()
        self._notifier = Notifier()
        self._capture = Capture(self._registry, self._committed)
        self._rollback = history.Rollback(self._registry, self._capture)
        self._relays: weakref.WeakSet[Relay] = weakref.WeakSet()
        self._engines: dict[URL, Engine] = {}
        self._opened: set[str] = set()  # indexes that a search has opened

    # -- adoption --------------------------------------------------------------------------------------------------

    @overload
    def track(
        self,
        model: type[M],
        *,
        text: str | Callable[[M], str | None],
        metadata: Sequence[str] = (),
        schema: Any = None,
        entity: str | None = None,
        index: str | Sequence[str] | None = None,
        unique_by: Any = (),
        immutable: Any = False,
        on_untracked: Literal["raise", "warn"] = "raise",
        capture: Literal["session", "trigger"] = "session",
    ) -> type[M]: ...

    @overload
    def track(
        self,
        model: None = None,
        *,
        text: str | Callable[[Any], str | None],
        metadata: Sequence[str] = (),
        schema: Any = None,
        entity: str | None = None,
        index: str | Sequence[str] | None = None,
        unique_by: Any = (),
        immutable: Any = False,
        on_untracked: Literal["raise", "warn"] = "raise",
        capture: Literal["session", "trigger"] = "session",
    ) -> Callable[[type[M]], type[M]]: ...

    def track(
        self,
        model: Any = None,
        *,
        text: str | Callable[[Any], str | None],
        metadata: Sequence[str] = (),
        schema: Any = None,
        entity: str | None = None,
        index: str | Sequence[str] | None = None,
        unique_by: Any = (),
        immutable: Any = False,
        on_untracked: Literal["raise", "warn"] = "raise",
        capture: Literal["session", "trigger"] = "session",
    ) -> Any:
        """Make every row of *model* a fact; a call, or a class decorator. The table needs no change.

        *text* is the column attribute to be embedded, or a callable that gets a detached instance with the row's own
        columns; None or blank text has no vector. *metadata* are column attributes stored beside the vector, by which
        an index can filter. *schema* is a Pydantic model that every write must satisfy. *index* names which of the
        Memory's indexes get it (default: all). *unique_by* are column attributes of which no two rows may share all
        values. Subclasses are tracked along: single-table and joined ones as rows of this class, a concrete one as an
        entity of its own. *on_untracked* says what happens to writes that cannot be captured. With
        ``capture="trigger"`` triggers capture them all, those of other programs too; `create_tables` installs them.

        Raises MemstateError for a class that is not mapped, unknown column attributes, or an entity tracked already.
        """
        names = tuple(self.indexes) if index is None else (index,) if isinstance(index, str) else tuple(index)
        unknown = [name for name in names if name not in self.indexes]
        if unknown or not names:
            raise MemstateError(f"index={index!r}: this Memory has {', '.join(self.indexes)}")

        def tracked(model: type[M]) -> type[M]:
            self._capture.track(
                describe(
                    model,
                    text=text,
                    metadata=metadata,
                    schema=schema,
                    entity=entity,
                    indexes=names,
                    unique_by=unique_by,
                    immutable=immutable,
                    on_untracked=on_untracked,
                    capture=capture,
                )
            )
            return model

        return tracked if model is None else tracked(model)

    def attach(self, target: Any) -> None:
        """Capture what the Sessions of *target* write. Idempotent.

        *target* is a sessionmaker, a Session class (every Session made of it or of a subclass), a scoped_session, a
        Session, or an async_sessionmaker, which gets a sync Session class of its own. Raises TypeError otherwise.
        """
        self._capture.attach(target)

    def create_tables(self, engine: Engine | AsyncEngine) -> None:
        """Create the tables of memstate_sa that are not there yet, and the triggers of classes that are captured so.

        Their own tables have to be there. With Alembic, let a migration do it.
        """
        sync = self.sync_engine(engine)
        tables.metadata.create_all(sync)
        with sync.begin() as connection:
            for tracked in self._registry.by_entity.values():
                if tracked.by_trigger:
                    triggers.install(connection, tracked)

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
        unit = self._unit(_sync_session(session))
        unit.actor = actor if actor is not None else unit.actor
        unit.reason = reason if reason is not None else unit.reason
        unit.session_id = session_id if session_id is not None else unit.session_id

    def _unit(self, session: Session) -> Unit:
        if not self._capture.is_attached(session):
            raise MemstateError("this Session is not attached: call memory.attach() with its sessionmaker first")
        return self._capture.unit(session)

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
    ) -> Hits[Any]:
        """The facts nearest in meaning to *query*, best first, among the rows that *target* selects.

        Every hit is a row that this Session's transaction sees, found by an embedding of its current content. "fresh"
        includes what is committed, or flushed in this transaction, and not yet delivered; "eventual" does not look
        for it. ``.complete`` of the result is False when something could not be considered.

        *target* is a tracked class or a ``select()`` of one, whose criteria may be anything; its order is ignored.
        Raises MemstateError for other targets, DeliveryError when the index or the embedder is unavailable.
        """
        return self._search(call_directly, session, query, target, limit, max_distance, consistency, index)

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
    ) -> Hits[Any]:
        """`search` for an AsyncSession; the index and the embedder are called in threads."""
        from sqlalchemy.util import await_only

        def in_thread(function: Callable[P, R], /, *args: P.args, **kwargs: P.kwargs) -> R:
            return await_only(asyncio.to_thread(function, *args, **kwargs))

        def run(sync: Session) -> Hits[Any]:
            return self._search(in_thread, sync, query, target, limit, max_distance, consistency, index)

        return await session.run_sync(run)

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
    ) -> Hits[Any]:
        _sync_session(session)
        if not isinstance(query, str):
            raise MemstateError(f"query={query!r}: a string to search for")
        require_count("limit", limit, "how many hits, at least 1")
        if max_distance is not None and (
            isinstance(max_distance, bool) or not isinstance(max_distance, (int, float)) or math.isnan(max_distance)
        ):
            raise MemstateError(f"max_distance={max_distance!r}: a cosine distance, from 0 (identical) to 2 (opposite)")
        if consistency not in ("fresh", "eventual"):
            raise MemstateError(f"consistency={consistency!r}: 'fresh' or 'eventual'")
        search = Search(
            session,
            self._registry,
            self._capture,
            self.indexes,
            self._opened,
            self._vectors,
            target,
            index=index,
            call=call,
        )
        return search.run(query, limit, max_distance, fresh=consistency == "fresh")

    # -- history ---------------------------------------------------------------------------------------------------

    def history(
        self, session: Session, model_or_instance: Any, key: Any = None, *, limit: int | None = None
    ) -> list[Change]:
        """What happened to a fact, oldest first: ``history(session, instance)`` or ``history(session, Model, key)``.

        A class without a key gives the changes of all its facts. A composite key is a tuple. *limit* keeps the last
        so many changes.
        """
        if isinstance(model_or_instance, type):
            tracked = self._registry.of(model_or_instance)
        else:
            tracked = self._registry.of(type(model_or_instance))
            state = inspect(model_or_instance)
            key = state.identity
            if key is None:
                raise MemstateError(f"{model_or_instance!r} was never flushed, so it has no history")
        _sync_session(session).flush()
        connection = session.connection(bind_arguments={"mapper": tracked.mapper})
        canonical = None if key is None else self._canonical(tracked.on(connection.dialect), key)
        return history.of_entity(connection, self._registry, tracked, canonical, limit)

    @staticmethod
    def _canonical(columns: TableColumns, key: Any) -> str:
        identity = key if isinstance(key, tuple) else (key,)
        if len(identity) != len(columns.key_names):
            raise MemstateError(f"key={key!r}: {columns.table.fullname} is keyed by {', '.join(columns.key_names)}")
        return columns.encode_key(columns.raw_key(identity))

    def rollback(
        self,
        session: Session,
        steps: int = 1,
        *,
        session_id: str | None = None,
        actor: str | None = None,
        tx: str | None = None,
    ) -> list[Change]:
        """Undo the last *steps* transactions as new log entries, newest first, in the caller's transaction.

        Nothing is committed on your behalf, the log only grows, and the vectors follow as for any write. With
        *session_id* or *actor* (by default what the session is annotated with) only transactions so labelled count. A
        transaction that is undone does not count again, so two calls walk back two steps; *tx* names one transaction
        instead, and undoing a rollback that way redoes what it undid. Instances in the session are expired.

        Returns the new entries; fewer transactions than *steps* may have been there. Raises ConflictError, with the
        changes in the way, when someone outside of what is undone has since changed a fact; nothing is written then.
        """
        self._unit(_sync_session(session))
        for name, value in (("session_id", session_id), ("actor", actor), ("tx", tx)):
            _check_label(name, value)
        if not self._registry.by_entity:
            raise MemstateError("no class is tracked")
        if tx is not None:
            return self._rollback.transaction(session, tx)
        return self._rollback.steps(session, steps, session_id, actor)

    # -- operation -------------------------------------------------------------------------------------------------

    def relay(self, engine: Engine | AsyncEngine, **options: Any) -> Relay:
        """What brings the indexes up to date with *engine*'s database; see `Relay` for the options.

        ``with memory.relay(engine):`` runs it in the background.
        """
        sync = self.sync_engine(engine)
        self._capture.guard(sync)
        relay = Relay(sync, self._by_index(), self._vectors, sender=self._notifier.name, **options)
        self._relays.add(relay)
        return relay

    def _by_index(self) -> dict[str, tuple[VectorIndex, dict[str, Tracked]]]:
        everything = self._registry.by_entity
        return {
            name: (index, {entity: t for entity, t in everything.items() if name in t.indexes})
            for name, index in self.indexes.items()
        }

    def _wake(self) -> None:
        for relay in list(self._relays):
            relay.wake()

    def _committed(self, engine: Engine) -> None:
        self._wake()
        if engine.dialect.name == "postgresql":
            with contextlib.suppress(ImportError):  # of a driver that blocks: relays elsewhere find it by polling
                self._notifier.committed(self._blocking(engine))

    def token(self, session: Session | AsyncSession) -> str | None:
        """Names the last transaction with tracked changes that *session* committed, for `wait`, in any process.

        It is the ``tx`` of the `Change` entries of that transaction.
        """
        return self._capture.committed.get(_sync_session(session), (None,))[0]

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
        token = session_or_token
        if token is not None and not isinstance(token, str):
            token, committed_on = self._capture.committed.get(_sync_session(token), (None, None))
            engine = engine or committed_on
        if token is None:
            return
        sync = self._only_engine() if engine is None else self._blocking(engine)
        require_no_transaction(sync)
        deadline, pause = time.monotonic() + timeout, 0.001
        with sync.connect() as connection:
            facts = keys_of(connection, token)
        waiting = [
            (IndexKey(name, self._incarnation(index)), tracked) for name, (index, tracked) in self._by_index().items()
        ]
        while waiting:
            began = time.monotonic()
            with sync.connect() as connection:
                waiting = [
                    (key, tracked)
                    for key, tracked in waiting
                    if lacks(connection, key, tracked, self.embedder.fingerprint, token, facts)
                ]
            now = time.monotonic()
            if waiting and now > deadline:
                raise DeliveryError(f"not in index {waiting[0][0].name!r} within {timeout:g} s; is a relay running?")
            if waiting:
                time.sleep(max(pause, now - began))  # behind a long backlog a look takes its time
                pause = min(pause * 1.5, 0.05)

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

        *repair* redelivers what differs, and returns when that is done; the report says what was found.
        """
        sync, report = self.sync_engine(engine), DriftReport()
        require_no_transaction(sync)
        for name, (index, tracked) in self._by_index().items():
            index.open(embedder=self.embedder.fingerprint, dimension=self.embedder.dimension)
            Verify(sync, name, index, tracked, self.embedder.fingerprint).run(report, repair=repair, progress=progress)
        if repair and not report.clean:
            self._repair(sync)
        return report

    def _repair(self, engine: Engine, timeout: float = 30.0) -> None:
        """Deliver what was marked: here, or by whoever holds the lease."""
        relay = self.relay(engine)
        deadline = time.monotonic() + timeout
        self._wake()
        relay.drain(timeout)
        while any(backlog.due for backlog in self.status(engine).values()):
            if time.monotonic() > deadline:
                raise DeliveryError(f"repairs were not delivered within {timeout:g} s; is a relay stuck?")
            relay.drain(timeout)
            time.sleep(0.02)

    def doctor(
        self, engine: Engine | AsyncEngine, *, repair: bool = False, progress: Progress | None = None
    ) -> Diagnosis:
        """Replay the log against the tables, in pages, and look for what would make them differ.

        *repair* logs rows that were changed past it, as transactions with the reason "reconciled", and has them
        delivered. `verify` compares the indexes with the tables.
        """
        sync = self.sync_engine(engine)
        require_no_transaction(sync)
        found = Doctor(sync, self._registry, self._capture).run(repair=repair, progress=progress)
        if repair:
            self._wake()
        return found

    def backfill(
        self,
        engine: Engine | AsyncEngine,
        model: type[Any],
        *,
        batch_size: int = 500,
        progress: Progress | None = None,
    ) -> int:
        """Log a baseline for the rows of *model* that the log has not seen, and mark them for delivery.

        One transaction a batch, safe beside live writes; run again after an interruption, it goes on with what is
        left. Returns how many rows were new to the log.
        """
        require_count("batch_size", batch_size, "at least 1")
        sync, tracked, added, seen = self.sync_engine(engine), self._registry.of(model), 0, 0
        require_no_transaction(sync)
        after: str | None = None
        total: int | None = None
        if progress is not None:
            with sync.connect() as connection:
                total = connection.execute(select(func.count()).select_from(tracked.table)).scalar_one()
        while True:
            with sync.begin() as connection:
                keys = truth.page(connection, tracked, after, batch_size)
                if keys:
                    added += self._capture.log_baselines(connection, tracked, keys)
            if not keys:
                self._wake()
                return added
            after, seen = keys[-1], seen + len(keys)
            if progress is not None:
                progress(seen, total)

    def status(self, engine: Engine | AsyncEngine) -> dict[str, Backlog]:
        """What each index has not been given yet."""
        sync = self.sync_engine(engine)
        require_no_transaction(sync)
        with sync.connect() as connection:
            return {
                name: backlog(connection, IndexKey(name, self._incarnation(index)), list(tracked))
                for name, (index, tracked) in self._by_index().items()
            }

    def _incarnation(self, index: VectorIndex) -> str:
        index.open(embedder=self.embedder.fingerprint, dimension=self.embedder.dimension)
        return index.incarnation

    def close(self) -> None:
        """Stop this Memory's relays and close its indexes."""
        for relay in list(self._relays):
            relay.stop()
        self._notifier.close()
        for index in self.indexes.values():
            index.close()

    def sync_engine(self, engine: Engine | AsyncEngine) -> Engine:
        """*engine*, or a sync engine on the URL of an AsyncEngine: the relay is a thread, not a coroutine."""
        if isinstance(engine, Engine):
            return engine
        if not hasattr(engine, "sync_engine"):
            raise MemstateError(f"{engine!r} is not an Engine; sqlalchemy.create_engine(url) makes one")
        from sqlalchemy import create_engine

        url: URL = engine.url
        found = self._engines.get(url)
        if found is None:
            if is_in_memory(engine.sync_engine):
                raise MemstateError("an in-memory SQLite exists in the AsyncEngine's connection only; use a file")
            backend = url.get_backend_name()
            driver = {"sqlite": "sqlite+pysqlite", "postgresql": "postgresql+psycopg"}.get(backend, backend)
            found = self._engines[url] = create_engine(url.set(drivername=driver))
            if backend == "sqlite":
                configure(found)
        return found


def _check_label(name: str, value: Any) -> None:
    """A label must be text that both databases hold."""
    if value is not None and not is_text(value):
        raise MemstateError(f"{name}={value!r}: give a string without NUL or lone surrogates")


def _sync_session(session: Session | AsyncSession) -> Session:
    if isinstance(session, Session):
        return session
    sync = getattr(session, "sync_session", None)
    if not isinstance(sync, Session):
        raise MemstateError(f"{session!r} is not a Session")
    return sync
