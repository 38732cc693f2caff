"""`ReadingMethods`: the methods of `MemoryStore` that read facts and their history."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Unpack

from sqlalchemy import Select, select

from memstate_sa.db.dialects import database_of
from memstate_sa.db.json_filter import member_equals
from memstate_sa.fact import Fact
from memstate_sa.log.changes import Changes
from memstate_sa.log.history import Moment
from memstate_sa.options import SearchOptions, require_options
from memstate_sa.search.hits import Hits
from memstate_sa.store.parts import StoreParts
from memstate_sa.tracking.fact_types import check_id, check_texts
from memstate_sa.tracking.payloads import filter_value


class ReadingMethods(StoreParts):
    """The methods of `MemoryStore` that read."""

    def get(self, id: str) -> Fact | None:
        """The fact *id*, or None."""
        check_id(id)
        with self._reading() as session:
            return session.get(Fact, id)

    def query(
        self, type: str | None = None, filters: Mapping[str, Any] | None = None, session_id: str | None = None
    ) -> list[Fact]:
        """The facts of a type and of a session whose payload fields equal *filters*, oldest first.

        *session_id* is the fact's own column, from ``Fact(session_id=…)`` or ``commit(…, session_id=…)``. For the facts
        that a transaction with this label has changed, call `history`.

        ::

            notes = store.query("note", {"user": "ada"}, session_id="chat-1")
        """
        with self._reading() as session:
            statement = self._selecting(type, filters, session_id).order_by(Fact.created_at, Fact.id)
            return list(session.scalars(statement))

    def search(
        self,
        query: str,
        limit: int = 5,
        filters: Mapping[str, Any] | None = None,
        *,
        type: str | None = None,
        session_id: str | None = None,
        **options: Unpack[SearchOptions],
    ) -> Hits[Fact]:
        """The *limit* facts nearest in meaning to *query*, best first; see `Memory.search`.

        *type*, *filters* and *session_id* select facts as in `query`. *options*: see `SearchOptions`.

        ::

            for hit in store.search("what does Ada drink?", filters={"user": "ada"}):
                print(hit.fact.payload, hit.score)
        """
        require_options(ReadingMethods.search, options, SearchOptions)
        with self._reading() as session:
            target = self._selecting(type, filters, session_id)
            return self.memory.search(session, query, target, limit=limit, **options)

    def _selecting(self, type: str | None, filters: Mapping[str, Any] | None, session_id: str | None) -> Select[Any]:
        check_texts(type=type, session_id=session_id)
        statement = select(Fact)
        if type is not None:
            statement = statement.where(Fact.type == type)
        if session_id is not None:
            statement = statement.where(Fact.session_id == session_id)
        for name, value in (filters or {}).items():
            criterion = member_equals(database_of(self.engine), Fact.payload, name, filter_value(name, value))
            statement = statement.where(criterion)
        return statement

    # -- the past --------------------------------------------------------------------------------------------------

    def history(
        self,
        id: str | None = None,
        *,
        actor: str | None = None,
        session_id: str | None = None,
        limit: int | None = None,
    ) -> Changes:
        """The changes of fact *id*, or of all facts, oldest first.

        Items of a MemStateStore are left out: ``store.memory.history(session)`` has them too. `revoke` and `rollback`
        undo changes of both.

        *actor*, *session_id*: only changes with this label.
        *limit*: only the newest changes, at most this number.
        """
        if id is not None:
            check_id(id)
        with self._reading() as session:
            return self.memory.history(session, Fact, id, actor=actor, session_id=session_id, limit=limit)

    def as_of(self, id: str, at: Moment) -> Fact | None:
        """A copy of fact *id* as it was at a time, or after a transaction (``Change.tx``).

        Returns None if there was no such fact then. Raises HistoryMissing for an erased fact.

        ::

            first = store.history(id)[0]
            print(store.as_of(id, first.tx).payload)
        """
        check_id(id)
        with self._reading() as session:
            values = self.memory.as_of(session, Fact, id, at)
        return None if values is None else Fact(**values)

    def diff(self, a: Moment, b: Moment | None = None) -> Changes:
        """The difference between two moments (*b*: now), as one change for each fact; see `Memory.diff`.

        Items of a MemStateStore are left out: ``store.memory.diff(session, a, b)`` has them too.
        """
        with self._reading() as session:
            return self.memory.diff(session, a, b, Fact)

    def token(self, id: str) -> str | None:
        """The transaction that changed fact *id* last, for `wait` in any process. None if no such fact ever existed."""
        changes = self.history(id, limit=1)
        return changes[0].tx if changes else None
