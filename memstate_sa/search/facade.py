"""`SearchMethods`: the methods of `Memory` that read: searches, history, time travel."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from datetime import datetime
from typing import TYPE_CHECKING, Any, Literal, TypeVar, overload

from sqlalchemy import Select, inspect
from sqlalchemy.engine import Connection, Engine
from sqlalchemy.orm import Session

from memstate_sa.db.codec import Image
from memstate_sa.db.sessions import blocking_session, in_scope
from memstate_sa.db.sqlite import require_no_transaction
from memstate_sa.db.tables import utcnow
from memstate_sa.errors import MemstateError
from memstate_sa.log import history
from memstate_sa.log.changes import Change
from memstate_sa.relay.memory_parts import MemoryParts
from memstate_sa.runtime.calls import call_directly, call_in_thread
from memstate_sa.search.hits import Hits
from memstate_sa.search.query import Query
from memstate_sa.search.searcher import Searcher
from memstate_sa.search.time_travel import PastSession, as_of_session
from memstate_sa.tracking.tracked import Tracked

if TYPE_CHECKING:
    from sqlalchemy.ext.asyncio import AsyncEngine, AsyncSession

M = TypeVar("M")


class SearchMethods(MemoryParts):
    """The methods of `Memory` that read."""

    _searcher: Searcher

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
        session = blocking_session(session)
        asked = Query(query, limit, max_distance, consistency, index, as_of)
        return self._searcher.search(call_directly, session, target, asked)

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

        def run(sync: Session) -> Hits[Any]:
            asked = Query(query, limit, max_distance, consistency, index, as_of)
            return self._searcher.search(call_in_thread, sync, target, asked)

        current = in_scope(session)
        if not hasattr(current, "run_sync"):
            raise MemstateError(f"{session!r} is not an AsyncSession; memory.search() is for a Session")
        return await current.run_sync(run)  # type: ignore[no-any-return]

    # -- history -------------------------------------------------------------------------------------------------------

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

    # -- time travel ---------------------------------------------------------------------------------------------------

    def as_of(self, session: Session, model: type[Any], key: Any, at: datetime | str) -> Image | None:
        """What the fact's row was at a time, or after a transaction (``Change.tx``), by column name; None: no row.

        A row that is older than its history was as its first entry says. Raises HistoryMissing for an erased fact.
        """
        tracked, connection = self._reading(session, model)
        image = history.image_at(connection, tracked, history.stored_key(connection, tracked, key), at)
        return None if image is None else tracked.columns_for(connection.dialect).past_values(dict(image))

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
        classes = [self._registry.of_whole(model)] if model is not None else list(self._registry.by_entity.values())
        changes: list[Change] = []
        for one in classes:
            tracked, connection = self._reading(session, one.model)
            end = utcnow() if b is None else b
            changes += history.differences(connection, self._registry, [tracked.entity], a, end)
        return sorted(changes, key=lambda change: change.id)

    def _reading(self, session: Session, model: type[Any] | None) -> tuple[Tracked, Connection]:
        """What tracks *model*, or the first class, and the connection to its database."""
        session = blocking_session(session)
        if model is None:
            self._registry.require_any()
        tracked = next(iter(self._registry.by_entity.values())) if model is None else self._registry.of(model)
        session.flush()
        return tracked, session.connection(bind_arguments={"mapper": tracked.mapper})
