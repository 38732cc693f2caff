"""`Searcher`: the searches of one Memory, in the present and in the past."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

from sqlalchemy import Select, Table
from sqlalchemy.orm import Session
from sqlalchemy.sql import visitors

from memstate_sa.capture.listeners import SessionCapture
from memstate_sa.db import missing_tables
from memstate_sa.db.engines import with_separate_pool
from memstate_sa.db.sqlite import require_no_transaction
from memstate_sa.embedding.batches import Destination
from memstate_sa.runtime.calls import Call
from memstate_sa.search.hits import Hits
from memstate_sa.search.query import Query
from memstate_sa.search.search import OpenedIndex, Search, resolve_target
from memstate_sa.search.succession import Succession
from memstate_sa.search.time_travel import as_of_session, search_past, take_criteria
from memstate_sa.tracking.registry import Registry
from memstate_sa.tracking.tracked import Tracked


class Searcher:
    """Runs the searches of one Memory."""

    def __init__(
        self,
        registry: Registry,
        capture: SessionCapture,
        destinations: Mapping[str, Destination],
        succession: Succession,
    ) -> None:
        self._registry = registry
        self._capture = capture
        self._destinations = destinations
        self._succession = succession
        self._opened: dict[str, OpenedIndex] = {}  # indexes that a search has opened
        self._last_asked: dict[str, str] = {}  # the index, or its successor, that the last search has asked

    def search(self, call: Call, session: Session, target: Any, query: Query) -> Hits[Any]:
        """The hits of *query* among the rows that *target* selects. *call* calls indexes and embedders."""
        statement, tracked = resolve_target(self._registry, target)
        name = self._succession.index_for(tracked, query.index)
        last_name = self._last_asked.get(name, name)
        if query.as_of is not None:
            return self._search_past(call, session, statement, tracked, last_name, query)
        search = Search(
            session,
            self._capture,
            self._destinations,
            last_name,
            self._opened,
            statement,
            tracked,
            resolve=partial(self._succession.current, name=name) if self._succession.has_successor(name) else None,
            call=call,
        )
        hits = search.run(query.text, query.limit, query.max_distance, fresh=query.consistency == "fresh")
        self._last_asked[name] = search.name
        return hits

    def _search_past(
        self, call: Call, session: Session, statement: Select[Any], tracked: Tracked, index: str, query: Query
    ) -> Hits[Any]:
        assert query.as_of is not None
        # The Session may use the only connection of its pool.
        engine = with_separate_pool(session.get_bind(tracked.mapper).engine)
        missing_tables.explain(engine)
        require_no_transaction(engine)
        read = {self._registry.named(table, None) for table in visitors.iterate(statement) if isinstance(table, Table)}
        classes = [one for one in {tracked, *read} if one is not None]
        with as_of_session(engine, classes, query.as_of) as past:
            take_criteria(past, session)
            vectors = self._destinations[index].vectors
            hits = search_past(past, tracked, statement, vectors, query, call)
            past.expunge_all()
        return hits
