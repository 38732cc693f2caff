"""Search: the index proposes facts, and SQL decides.

1. Embed the query.
2. Read the undelivered keys (the overlay).
3. Query the index.
4. Load the rows through the caller's Session (hydrate).
5. Keep rows whose fingerprint the index has, and embed newer rows.
6. Query the index for more if hits are missing.

The overlay is read before the index. So a key that is delivered in between is found in one of them.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ParamSpec, TypeVar

import numpy as np
from sqlalchemy import ColumnElement, Select, func, select
from sqlalchemy.engine import Connection
from sqlalchemy.orm import Session

from memstate_sa.capture.listeners import SessionCapture
from memstate_sa.db.codec import encode_key
from memstate_sa.db.dialects import database_of
from memstate_sa.embedding import cache as embeddings
from memstate_sa.embedding.batches import Destination
from memstate_sa.errors import DeliveryError, DeliveryRejected, MemstateError
from memstate_sa.indexes.base import Filter, Match, Vector
from memstate_sa.log.outbox import is_behind
from memstate_sa.relay import marks
from memstate_sa.relay.backlog import EntityCoverage, read_entity_coverage
from memstate_sa.relay.index_key import IndexKey
from memstate_sa.relay.marks import Past
from memstate_sa.relay.points import ENTITY
from memstate_sa.relay.retry import guarded, halves
from memstate_sa.runtime.calls import Call, call_directly
from memstate_sa.runtime.printable import printable_logger
from memstate_sa.search.comparable import Comparable
from memstate_sa.search.hits import Hit, Hits, Incomplete, cosine_distance
from memstate_sa.search.hydration import Hydration, keys_of
from memstate_sa.search.overlay import OVERLAY_LIMIT, read_overlay
from memstate_sa.search.pushdown import push_down
from memstate_sa.tracking.projection import Projection, split_point_id
from memstate_sa.tracking.registry import Registry
from memstate_sa.tracking.tracked import Tracked

P = ParamSpec("P")
R = TypeVar("R")
logger = printable_logger("memstate_sa.search")

_IDS_LIMIT = 1000
"""The greatest number of ids in a query of an index."""

_MISMATCH_LIMIT = 100
"""The greatest number of hits with another fingerprint than their row that are checked again."""

_LARGEST_QUERY = 1 << 20
"""The greatest number of points in a query. An index fails or finds nothing if its integers cannot hold the number."""

_TIES = 10_000
"""The greatest number of facts at the last hit's distance that are sorted. If there are more, the index chooses."""

_ROUNDING_ERROR = 1e-6
"""The largest difference of two distances that counts as rounding. Indexes compute in single precision."""


@dataclass
class OpenedIndex:
    """An index that this process has opened, with the mark that it had then, or a later mark of the database."""

    mark: str | None
    has_warned: bool = False  # whether a warning said that its content differs from the rows

    def is_of(self, now: Past) -> bool:
        """Whether the index was filled from the present past *now* of the database."""
        if not now.fits(self.mark, alone=False):
            return False
        if self.mark:
            self.mark = str(now.mark)
        return True


class Search:
    """One search. The module's docstring describes its order."""

    def __init__(
        self,
        session: Session,
        capture: SessionCapture,
        destinations: Mapping[str, Destination],
        name: str,
        opened: dict[str, OpenedIndex],
        statement: Select[Any],
        tracked: Tracked,
        *,
        resolve: Callable[[Connection], str] | None = None,
        call: Call = call_directly,
    ) -> None:
        """*statement* and *tracked* are the result of `resolve_target`.

        *name* is the index to query. With *resolve*, *name* is the index that the last search queried, and *resolve*
        returns the present index.
        """
        self._session = session
        self._call = call
        self._statement, self._tracked = statement, tracked
        self._destinations = destinations
        self._opened_indexes = opened
        self._resolve = resolve
        self._use_index(name)
        self._capture = capture
        self._reasons: dict[Incomplete, None] = {}
        self._hydration = Hydration(session, statement, tracked)
        self._distances: dict[str, float] = {}
        self._distances_of_texts: dict[str | None, float] = {}
        self._budget = OVERLAY_LIMIT
        self._coverage: EntityCoverage | None = None
        self._opened = OpenedIndex(None)
        self._mismatched_keys: list[str] = []  # keys of matches with another fingerprint than their row
        self._too_many_ids = False

    def _use_index(self, name: str) -> None:
        self.name = name
        self._index, self._vectors = self._destinations[name].index, self._destinations[name].vectors

    def run(self, query: str, limit: int, max_distance: float | None, *, fresh: bool) -> Hits[Any]:
        try:
            return self._run(query, limit, max_distance, fresh=fresh)
        except DeliveryError:
            self._opened_indexes.pop(self.name, None)  # open it again: it may have been deleted or replaced
            raise

    def _open(self) -> None:
        opened = self._opened_indexes.get(self.name)
        if opened is None:
            self._call_index(self._destinations[self.name].open)
            opened = self._opened_indexes[self.name] = OpenedIndex(self._call_index(marks.kept_by, self._index))
        self._opened = opened

    def _call_index(self, function: Callable[P, R], /, *args: P.args, **kwargs: P.kwargs) -> R:
        """Call the index, and turn its exceptions into ours."""
        return guarded(lambda: self._call(function, *args, **kwargs), f"index {self.name!r}")

    def _run(self, query: str, limit: int, max_distance: float | None, *, fresh: bool) -> Hits[Any]:
        self._open()
        vector = self._embedded(query)
        if self._session.autoflush:
            self._session.flush()
        if self._resolve is not None and (name := self._resolve(self._connection())) != self.name:
            self._use_index(name)
            self._open()
            vector = self._embedded(query)
        undelivered = self._undelivered_keys() if fresh else self._no_keys()
        nearest = self._query(vector, limit, max_distance, undelivered, fresh=fresh)
        if fresh and self._is_complete and self._mismatched_keys:
            self._check_mismatches(set(self._mismatched_keys[:_MISMATCH_LIMIT]))
        rows = self._hydration.rows
        if self._is_complete and self._sees_the_past():
            self._reasons[Incomplete.OLD_SNAPSHOT] = None
        hits = (Hit(rows[key].fact, distance) for distance, key in nearest)  # type: ignore[union-attr]
        return Hits(hits, {**self._reasons, **self._hydration.reasons})

    def _query(
        self, vector: Vector, limit: int, max_distance: float | None, undelivered: Sequence[str], *, fresh: bool
    ) -> list[tuple[float, str]]:
        """The nearest keys, with their distances. The index is queried repeatedly until there are enough."""
        where, ids = self._restriction()
        # Matches of undelivered keys may be outdated and not count, so ask for more. One match more than the limit
        # tells whether the last hit is alone at its distance.
        size, last_count = limit + 1 + min(len(undelivered), 20), -1
        if self._too_many_ids:
            size *= 4  # the index does not apply the criteria, so most matches may not count
        size = min(size, _LARGEST_QUERY)
        is_crowded = False
        while True:
            matches = [] if ids == [] else self._call_index(self._index.query, vector, size, where=where, ids=ids)
            keyed_matches = [(fact[1], match) for match in matches if (fact := self._fact(match)) is not None]
            self._hydrate([*undelivered, *(key for key, _ in keyed_matches)])
            self._measure(vector, dict(keyed_matches), undelivered, fresh=fresh)
            hits = self._nearest(limit, max_distance, {key for key, _ in keyed_matches} | set(undelivered))
            is_exhausted = len(matches) < size or len(matches) == last_count or size >= _LARGEST_QUERY
            farthest = matches[-1].distance if matches else 2.0
            if is_exhausted or (max_distance is not None and farthest > max_distance):
                return hits
            # An index returns facts at the same distance in any order. We sort them by key, so that a search with a
            # larger limit begins with the same hits.
            last_distance = hits[-1][0] if len(hits) == limit else math.inf
            if last_distance < farthest - _ROUNDING_ERROR or (last_distance <= farthest and size > limit + _TIES):
                return hits
            last_count = len(matches)
            if where is None and ids is None and not is_crowded and len(keyed_matches) * 2 < len(matches):
                is_crowded, last_count = True, -1  # most matches are of other entities, or foreign points
                where = self._entity_filter()
                if where is None and not self._too_many_ids:
                    ids = self._few_ids()
            size = min(4 * size, _LARGEST_QUERY)

    @property
    def _is_complete(self) -> bool:
        return not self._reasons and not self._hydration.reasons

    def _embedded(self, query: str) -> Vector:
        return np.asarray(self._call(self._vectors.of_query, query), dtype=np.float32)

    def _check_mismatches(self, keys: set[str]) -> None:
        """Warn if the index has other content for *keys* than their rows, although all their changes are delivered.

        The cause is a changed text= function, or drift of the index. The index may also lack other keys.
        """
        keys.difference_update(self._undelivered_keys())
        if not keys or not self._is_complete:
            return
        stored = self._call_index(self._index.get, [self._tracked.point_id(key) for key in keys])
        fingerprints = {fact[1]: point.fingerprint for point in stored if (fact := split_point_id(point.id))}
        rows = {key: self._hydration.rows[key] for key in keys & fingerprints.keys()}
        stale_keys = [key for key, row in rows.items() if row and row.projection.fingerprint != fingerprints[key]]
        if stale_keys and not self._opened.has_warned:
            self._opened.has_warned = True
            logger.warning(
                "Index %r has other content of %s%s than its row. If the text= function was changed, pass another "
                "text_version=. If not, repair the index with memory.verify(engine, repair=True).",
                self.name,
                self._tracked.entity,
                stale_keys[0],
            )
        if stale_keys:
            self._reasons[Incomplete.OTHER_CONTENT] = None

    # -- undelivered keys ----------------------------------------------------------------------------------------------

    def _connection(self) -> Connection:
        return self._session.connection(bind_arguments={"mapper": self._tracked.mapper})

    def _index_key(self) -> IndexKey:
        return IndexKey(self.name, self._call_index(lambda: self._index.incarnation))

    def _undelivered_keys(self) -> list[str]:
        """The keys that are committed or flushed but not delivered. The caller's own keys come first."""
        connection = self._connection()
        index = self._index_key()
        coverage = self._coverage = self._read_coverage(connection, index)
        transaction = self._capture.open_transaction(self._session)
        own_tx = transaction.tx if transaction is not None else ""
        overlay = read_overlay(connection, index, self._tracked.entity, coverage, own_tx)
        possible = self._tracked.columns_for(connection.dialect).possible(connection, overlay.keys)
        if not coverage.filled:
            self._reasons[Incomplete.FILLING] = None
        elif not overlay.complete:
            self._reasons[Incomplete.TOO_MANY] = None
        # A key that is not possible shows that the type of the key was changed.
        if len(possible) < len(overlay.keys):
            self._reasons[Incomplete.IMPOSSIBLE_KEY] = None
        return overlay.keys

    def _no_keys(self) -> list[str]:
        """The overlay of a search that is not ``fresh``: no keys. Hits are complete if all rows were delivered once."""
        coverage = self._coverage = self._read_coverage(self._connection(), self._index_key())
        if not coverage.filled:
            self._reasons[Incomplete.FILLING] = None
        return []

    def _read_coverage(self, connection: Connection, index: IndexKey) -> EntityCoverage:
        """The coverage of the index. ``filled`` is False if the index was filled from another past or projection.

        Each search compares past and projection itself, because perhaps no relay has noticed the difference yet.
        """
        coverage = read_entity_coverage(connection, index, self._tracked.entity)
        if coverage.past is not None and not self._opened.is_of(coverage.past):
            self._opened_indexes.pop(self.name, None)
            # Relays write a mark to the database first, so read the index's mark first.
            self._open()
            coverage = read_entity_coverage(connection, index, self._tracked.entity)
        if coverage.past is not None and not self._opened.is_of(coverage.past):
            self._opened_indexes.pop(self.name, None)
            return coverage._replace(filled=False)
        return coverage._replace(filled=coverage.filled and coverage.projection == self._tracked.projection)

    def _sees_the_past(self) -> bool:
        """Whether the index may be ahead of the rows that this transaction sees. Call it after the query."""
        connection = self._connection()
        if database_of(connection).has_one_writer:
            return is_behind(connection)
        isolation: str = connection.execute(select(func.current_setting("transaction_isolation"))).scalar_one()
        return isolation in ("repeatable read", "serializable")

    # -- the query -----------------------------------------------------------------------------------------------------

    def _restriction(self) -> tuple[Filter | None, list[str] | None]:
        """A filter, or a list of ids, for the index. With neither, only hydration applies the criteria."""
        criteria = list(self._statement._where_criteria)
        is_simple = not criteria or not _joins(self._statement)
        # Use no filter during a refill: old points may lack its fields.
        is_filled = self._coverage is not None and self._coverage.filled
        where = self._pushed_down(criteria) if is_simple and criteria and is_filled else None
        if where is not None:
            return where, None
        if not criteria and is_simple:
            return None, None
        return None, self._few_ids()

    def _pushed_down(self, criteria: Sequence[ColumnElement[bool]]) -> Filter | None:
        return push_down(self._tracked, criteria, Comparable(self._connection(), self._tracked.table))

    def _entity_filter(self) -> Filter | None:
        """A filter for this entity, if every point of the index carries its entity."""
        coverage = self._coverage
        assert coverage is not None
        return {ENTITY: {"$eq": self._tracked.entity}} if coverage.marked and coverage.filled else None

    def _few_ids(self) -> list[str] | None:
        """The point ids of all rows that the statement selects, or None if there are too many."""
        connection = self._connection()
        keys = keys_of(self._statement, self._tracked.columns_for(connection.dialect)).limit(_IDS_LIMIT + 1)
        rows = connection.execute(keys).all()
        if len(rows) > _IDS_LIMIT:
            self._too_many_ids = True
            return None
        return [self._tracked.point_id(encode_key(row)) for row in rows]

    def _fact(self, match: Match) -> tuple[str, str] | None:
        fact = split_point_id(match.id)
        return fact if fact is not None and fact[0] == self._tracked.entity else None

    # -- rows and distances --------------------------------------------------------------------------------------------

    def _hydrate(self, keys: Collection[str]) -> None:
        self._hydration.load(keys, self._connection(), self._vectors.embedder.fingerprint)

    def _measure(self, query: Vector, matches: Mapping[str, Match], undelivered: Sequence[str], *, fresh: bool) -> None:
        """Set the distances of rows. If the index has the row's fingerprint, use its distance. Else embed the row."""
        unmeasured: dict[str, Projection] = {}
        for key in (*undelivered, *matches):
            row = self._hydration.rows.get(key)
            if row is None or row.projection.fingerprint is None or key in self._distances:
                continue
            match = matches.get(key)
            if match is not None and match.fingerprint == row.projection.fingerprint:
                self._set_distance(key, row.projection, match.distance)
            elif fresh:
                unmeasured[key] = row.projection
                if match is not None and key not in undelivered:
                    self._mismatched_keys.append(key)
        if len(unmeasured) > self._budget:
            self._reasons[Incomplete.TOO_MANY] = None
            unmeasured = dict(list(unmeasured.items())[: self._budget])
        self._budget -= len(unmeasured)
        if not unmeasured:
            return
        texts = {p.text_fingerprint: p.text for p in unmeasured.values() if p.text_fingerprint and p.text}
        vectors = embeddings.known(self._connection(), self._vectors, texts)
        vectors |= self._embed({digest: text for digest, text in texts.items() if digest not in vectors})
        for key, projection in unmeasured.items():
            vector = vectors.get(projection.text_fingerprint or "")
            if vector is not None:
                self._set_distance(key, projection, cosine_distance(query, vector))

    def _set_distance(self, key: str, projection: Projection, distance: float) -> None:
        """Set the distance of a key. Facts with the same text get exactly the same distance, so keys order them."""
        self._distances[key] = self._distances_of_texts.setdefault(projection.text_fingerprint, distance)

    def _embed(self, texts: Mapping[str, str]) -> dict[str, Vector]:
        """Embed *texts*, and return their vectors. Refused texts have none. If the embedder is unavailable, return {}.

        The vectors are kept in this process, where a relay can find them: a search writes nothing to the database.
        """
        if not texts:
            return {}
        try:
            return self._call(self._vectors.embed, texts, remember=True)
        except DeliveryRejected:
            self._reasons[Incomplete.REFUSED] = None
            if len(texts) == 1:
                return {}
            first, second = halves(list(texts))
            return self._embed({k: texts[k] for k in first}) | self._embed({k: texts[k] for k in second})
        except DeliveryError:
            self._reasons[Incomplete.UNAVAILABLE] = None
            return {}

    def _nearest(self, limit: int, max_distance: float | None, keys: Collection[str]) -> list[tuple[float, str]]:
        measured = ((self._distances[key], key) for key in keys if key in self._distances)
        near = (item for item in measured if max_distance is None or item[0] <= max_distance)
        return heapq.nsmallest(limit, near)


def resolve_target(registry: Registry, target: Any) -> tuple[Select[Any], Tracked]:
    """The select() of *target* (a class or a select() of one), and the class. Other targets raise MemstateError."""
    if isinstance(target, type):
        tracked = registry.of(target)
        return (tracked.select_all if target is tracked.model else select(target)), tracked
    if not isinstance(target, Select):
        raise MemstateError(f"Cannot search {target!r}. Give a tracked class, or a select() of one.")
    columns = target.column_descriptions
    if len(columns) != 1 or columns[0]["type"] is not columns[0]["expr"]:
        raise MemstateError(
            "Cannot search: the select() must have exactly one tracked class, like select(Model).where(…)."
        )
    if (
        target._limit_clause is not None
        or target._offset_clause is not None
        or target._fetch_clause is not None
        or target._group_by_clauses
        or target._distinct
    ):
        raise MemstateError(
            "Cannot search: the select() has LIMIT, OFFSET, FETCH, GROUP BY or DISTINCT. Remove it; the number of hits "
            "is search's limit=."
        )
    return target, registry.of(columns[0]["type"])


def _joins(statement: Select[Any]) -> bool:
    return bool(statement._setup_joins or statement._from_obj)
