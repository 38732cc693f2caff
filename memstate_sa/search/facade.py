"""`SearchMethods`: the methods of `Memory` that read: search, history, time travel."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any, TypeVar, Unpack, overload

from sqlalchemy import Select, inspect
from sqlalchemy.engine import Connection, Engine
from sqlalchemy.orm import Session

from memstate_sa.db.async_methods import AsyncMethod, awaited_session
from memstate_sa.db.codec import Image
from memstate_sa.db.sessions import AwaitedSession, SyncSession, blocking_session
from memstate_sa.db.sqlite import require_no_transaction
from memstate_sa.db.tables import utcnow
from memstate_sa.errors import MemstateError
from memstate_sa.log import history
from memstate_sa.log.changes import Change, Changes
from memstate_sa.log.history import Moment
from memstate_sa.options import HistoryOptions, SearchOptions, require_options
from memstate_sa.relay.memory_parts import MemoryParts
from memstate_sa.runtime.calls import Call, call_directly, call_in_thread
from memstate_sa.search.hits import Hits
from memstate_sa.search.query import Query
from memstate_sa.search.searcher import Searcher
from memstate_sa.search.time_travel import PastSession, as_of_session
from memstate_sa.tracking.tracked import Tracked

if TYPE_CHECKING:
    from sqlalchemy.ext.asyncio import AsyncEngine

M = TypeVar("M")


class SearchMethods(MemoryParts):
    """The methods of `Memory` that read."""

    _searcher: Searcher

    # SQLAlchemy 2.0 types select(Model) as Select[tuple[Model]], and 2.1 as Select[Model].
    @overload
    def search(
        self,
        session: SyncSession,
        /,
        query: str,
        target: Select[tuple[M]],
        *,
        limit: int = 5,
        **options: Unpack[SearchOptions],
    ) -> Hits[M]: ...

    @overload
    def search(
        self,
        session: SyncSession,
        /,
        query: str,
        target: type[M] | Select[M],
        *,
        limit: int = 5,
        **options: Unpack[SearchOptions],
    ) -> Hits[M]: ...

    def search(
        self, session: SyncSession, /, query: str, target: Any, *, limit: int = 5, **options: Unpack[SearchOptions]
    ) -> Hits[Any]:
        """The *limit* facts nearest in meaning to *query*, best first, among the rows that *target* selects.

        Every hit is a row that this Session's transaction sees, found by an embedding of its current content. The
        result's ``complete`` is False when the search could not consider some rows, and ``reasons`` says why.

        *target*: a tracked class, or a ``select()`` of one with any criteria. Its order is ignored.
        *options*: see `SearchOptions`.

        Raises MemstateError for another target, and DeliveryError when the index or the embedder is unavailable.
        """
        return self._search(call_directly, blocking_session(session, "search"), query, target, limit, options)

    @overload
    async def asearch(
        self,
        session: AwaitedSession,
        /,
        query: str,
        target: Select[tuple[M]],
        *,
        limit: int = 5,
        **options: Unpack[SearchOptions],
    ) -> Hits[M]: ...

    @overload
    async def asearch(
        self,
        session: AwaitedSession,
        /,
        query: str,
        target: type[M] | Select[M],
        *,
        limit: int = 5,
        **options: Unpack[SearchOptions],
    ) -> Hits[M]: ...

    async def asearch(
        self, session: AwaitedSession, /, query: str, target: Any, *, limit: int = 5, **options: Unpack[SearchOptions]
    ) -> Hits[Any]:
        """`search` for an AsyncSession. It calls the index and the embedder in threads."""

        def run(sync: Session) -> Hits[Any]:
            return self._search(call_in_thread, sync, query, target, limit, options)

        hits: Hits[Any] = await awaited_session(session, "search").run_sync(run)
        return hits

    def _search(
        self, call: Call, session: Session, query: str, target: Any, limit: int, options: SearchOptions
    ) -> Hits[Any]:
        require_options(SearchMethods.search, options, SearchOptions)
        return self._searcher.search(call, session, target, Query(query, limit, **options))

    # -- history -------------------------------------------------------------------------------------------------------

    def history(
        self,
        session: SyncSession,
        /,
        model_or_instance: object = None,
        key: Any = None,
        **options: Unpack[HistoryOptions],
    ) -> Changes:
        """The changes of a fact, oldest first: ``history(session, instance)`` or ``history(session, Model, key)``.

        A class without a key gives the changes of all its facts. Without a class, all changes are returned. A composite
        key is a tuple.

        *options*: see `HistoryOptions`.
        """
        require_options(SearchMethods.history, options, HistoryOptions)
        model = model_or_instance if model_or_instance is None else type(model_or_instance)
        if isinstance(model_or_instance, type):
            model = model_or_instance
        elif model is not None:
            self._registry.of(model)
            key = inspect(model_or_instance).identity
            if key is None:
                raise MemstateError(f"{model_or_instance!r} has no history: it was never flushed. Flush it first.")
        if model is None and key is not None:
            raise MemstateError(f"Cannot use key={key!r} without a class. Use history(session, Model, key).")
        tracked, connection = self._reading(session, "history", model)
        return Changes(
            history.find_changes(
                connection,
                self._registry,
                entity=None if model is None else tracked.entity,
                key=None if key is None else history.stored_key(connection, tracked, key),
                **options,
            )
        )

    ahistory = AsyncMethod(history)
    """`history` for an AsyncSession."""

    # -- time travel ---------------------------------------------------------------------------------------------------

    def as_of(self, session: SyncSession, model: type[Any], key: Any, at: Moment) -> Image | None:
        """The row of a fact at a moment, by column name; None when there was no row.

        *at*: an aware datetime, or a transaction (``Change.tx``). Before its first entry, a row was as that entry says.

        Raises HistoryMissing for an erased fact.
        """
        tracked, connection = self._reading(session, "as_of", model)
        image = history.image_at(connection, tracked, history.stored_key(connection, tracked, key), at)
        return None if image is None else tracked.columns_for(connection.dialect).past_values(dict(image))

    aas_of = AsyncMethod(as_of)
    """`as_of` for an AsyncSession."""

    @contextlib.contextmanager
    def as_of_session(
        self, engine: Engine | AsyncEngine, at: Moment, models: Sequence[type[Any]] = ()
    ) -> Iterator[PastSession]:
        """A read-only Session in which tracked classes (or *models*) have the rows of a moment.

        Any ``select()`` works, relationships too, and returns ordinary instances. Tables that are not tracked have
        their present rows. The rows of the moment are copied to temporary tables first: this takes time in proportion
        to their number.
        """
        sync = self.sync_engine(engine)
        require_no_transaction(sync)
        tracked = [self._registry.of(model) for model in models] or list(self._registry.by_entity.values())
        with as_of_session(sync, dict.fromkeys(tracked), at) as session:
            yield session

    def diff(self, session: SyncSession, a: Moment, b: Moment | None = None, model: type[Any] | None = None) -> Changes:
        """The difference between moment *a* and moment *b* (default: now), as one change per fact.

        Facts that are the same at both moments are left out. A change has the labels and ids of the fact's last change.
        *model*: only facts of this class.
        """
        classes = [self._registry.of_whole(model)] if model is not None else list(self._registry.by_entity.values())
        changes: list[Change] = []
        for one in classes:
            tracked, connection = self._reading(session, "diff", one.model)
            end = utcnow() if b is None else b
            changes += history.differences(connection, self._registry, [tracked.entity], a, end)
        return Changes(sorted(changes, key=lambda change: change.id))

    adiff = AsyncMethod(diff)
    """`diff` for an AsyncSession."""

    def _reading(self, session: SyncSession, method: str, model: type[Any] | None) -> tuple[Tracked, Connection]:
        """The `Tracked` of *model*, or of the first class, and the connection to its database."""
        sync = blocking_session(session, method)
        if model is None:
            self._registry.require_any()
        tracked = next(iter(self._registry.by_entity.values())) if model is None else self._registry.of(model)
        sync.flush()
        return tracked, sync.connection(bind_arguments={"mapper": tracked.mapper})
