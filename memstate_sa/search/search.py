"""Search: the index proposes, SQL disposes.

Embed the query, read which keys are undelivered, ask the index, hydrate through the caller's Session, keep what the
fingerprint vouches for, embed what is newer than its vector, and ask for more when too little is left. In that order: a
key that is delivered between two of these steps is found either among the undelivered or in the index.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any, Generic, ParamSpec, Protocol, TypeVar

import numpy as np
from sqlalchemy import (
    BigInteger,
    ColumnElement,
    FromClause,
    Select,
    Text,
    and_,
    bindparam,
    case,
    cast,
    func,
    literal_column,
    select,
    union,
)
from sqlalchemy.engine import Connection
from sqlalchemy.orm import Session

from memstate_sa.capture.listeners import SessionCapture
from memstate_sa.db.codec import encode_key
from memstate_sa.db.rows import TableColumns
from memstate_sa.db.statements import batches
from memstate_sa.db.tables import outbox
from memstate_sa.embedding import cache as embeddings
from memstate_sa.embedding.batches import Destination
from memstate_sa.errors import DeliveryError, DeliveryRejected, MemstateError
from memstate_sa.indexes.base import Filter, Match, Vector
from memstate_sa.log.outbox import is_behind, position_parameters, undelivered
from memstate_sa.relay import marks
from memstate_sa.relay.backlog import Standing, read_standing, stuck
from memstate_sa.relay.index_key import IndexKey
from memstate_sa.relay.marks import Past
from memstate_sa.relay.protocol import ENTITY
from memstate_sa.relay.retry import guarded, halves
from memstate_sa.runtime.printable import printable_logger
from memstate_sa.search.comparable import Comparable
from memstate_sa.search.pushdown import push_down
from memstate_sa.tracking import committed
from memstate_sa.tracking.committed import raw_key_columns
from memstate_sa.tracking.projection import Projection, split_point_id
from memstate_sa.tracking.registry import Registry
from memstate_sa.tracking.tracked import Tracked

logger = printable_logger("memstate_sa.search.search")

F = TypeVar("F")
P = ParamSpec("P")
R = TypeVar("R")

OVERLAY_LIMIT = 500
"""The most rows that one search embeds because the index does not have them yet."""

_IDS_LIMIT = 1000
_DOUBTED = 100
"""So many hits by content that they do not have are looked at once more."""
_LARGEST_ASK = 1 << 20
"""So many points at most are asked for: with a count that is beyond its integers, an index fails, or finds nothing."""
_TIES = 10_000
"""So many facts at the distance of the last hit are put in order; of more, the index chooses."""
_NOISE = 1e-6
"""An index computes a distance in single precision: the last digits depend on where the vector lies in memory."""


@dataclass(frozen=True, slots=True)
class Hit(Generic[F]):
    """A fact that SQL holds, and how near it is: cosine distance, 0 identical to 2 opposite."""

    fact: F
    distance: float

    @property
    def score(self) -> float:
        return 1.0 - self.distance


class Hits(list[Hit[F]]):
    """Hits, best first.

    ``complete`` is False when some rows could not be considered: more undelivered than `OVERLAY_LIMIT`, an embedding
    that failed, an index that is still being filled, a key that no row can have, or a transaction whose snapshot is
    older than the index.
    """

    complete: bool = True


class Call(Protocol):
    """How to call an index or an embedder: at once, or in a thread while the event loop goes on."""

    def __call__(self, function: Callable[P, R], /, *args: P.args, **kwargs: P.kwargs) -> R: ...


def call_directly(function: Callable[P, R], /, *args: P.args, **kwargs: P.kwargs) -> R:
    return function(*args, **kwargs)


_RECENT = 10 * OVERLAY_LIMIT
"""The most outbox entries that one search looks at, newest first: a backlog may be long."""

_own_xid = cast(cast(func.pg_current_xact_id_if_assigned(), Text), BigInteger)


@cache
def _dirty(dialect_name: str, *, everything: bool) -> Select[Any]:
    """The keys of recent entries, the caller's own first, and how many entries each has.

    Of what is after a position, or of the whole outbox. Built once: building costs more than running.
    """
    own = case((outbox.c.tx == bindparam("own_tx"), 1), else_=0).label("own")
    columns, mine = (outbox.c.id, outbox.c.key, own), outbox.c.entity == bindparam("entity")
    if dialect_name == "sqlite":  # the index by entity has the xid before the id, and here it is always 0
        mine = and_(mine, outbox.c.xid == literal_column("0"))
    if everything:
        newest_first = select(*columns).where(mine).order_by(outbox.c.xid.desc(), outbox.c.id.desc())
        newest_first = newest_first.limit(bindparam("limit"))
        entries: FromClause = newest_first.subquery()
    else:
        entries = undelivered(dialect_name, *columns, where=mine, newest_first=True)
        if dialect_name == "postgresql":
            # The entries of a long transaction are older than what was committed meanwhile.
            of_own = select(*columns).where(outbox.c.xid == _own_xid, mine)
            entries = union(select(entries), of_own).subquery()
    order = (func.max(entries.c.own).desc(), func.max(entries.c.id).desc())
    return select(entries.c.key, func.count()).group_by(entries.c.key).order_by(*order).limit(OVERLAY_LIMIT + 1)


@dataclass
class Opened:
    """An index that this process has opened, with the mark that it had then, or that the database has had since."""

    mark: str | None
    is_doubted: bool = False

    def is_of(self, now: Past) -> bool:
        """Whether the index was filled from the past that the database is in *now*."""
        if not now.fits(self.mark, alone=False):
            return False
        if self.mark:
            self.mark = str(now.mark)
        return True


@dataclass
class _Row:
    fact: Any
    projection: Projection


class Search:
    """One search; see the module's docstring for its order."""

    def __init__(
        self,
        session: Session,
        capture: SessionCapture,
        destinations: Mapping[str, Destination],
        name: str,
        opened: dict[str, Opened],
        statement: Select[Any],
        tracked: Tracked,
        *,
        resolve: Callable[[Connection], str] | None = None,
        call: Call = call_directly,
    ) -> None:
        """*statement* and *tracked* are what `resolve_target` returns.

        *name* is the index that is asked, or was, the last time, if *resolve* tells which it is now.
        """
        self._session = session
        self._call = call
        self._statement, self._tracked = statement, tracked
        self._destinations = destinations
        self._opened = opened
        self._resolve = resolve
        self._aim(name)
        self._capture = capture
        self._complete = True
        self._rows: dict[str, _Row | None] = {}
        self._distances: dict[str, float] = {}
        self._of_texts: dict[str | None, float] = {}
        self._budget = OVERLAY_LIMIT
        self._standing: Standing | None = None
        self._mark = Opened(None)
        self._stale: list[str] = []  # found by content that they do not have
        self._too_many = False

    def _aim(self, name: str) -> None:
        self.name = name
        self._index, self._vectors = self._destinations[name].index, self._destinations[name].vectors

    def run(self, query: str, limit: int, max_distance: float | None, *, fresh: bool) -> Hits[Any]:
        try:
            return self._run(query, limit, max_distance, fresh=fresh)
        except DeliveryError:
            self._opened.pop(self.name, None)  # it may have been deleted, or be another by the next search
            raise

    def _open(self) -> None:
        opened = self._opened.get(self.name)
        if opened is None:
            self._ask(self._destinations[self.name].open)
            opened = self._opened[self.name] = Opened(self._ask(marks.kept_by, self._index))
        self._mark = opened

    def _ask(self, function: Callable[P, R], /, *args: P.args, **kwargs: P.kwargs) -> R:
        """Call the index; whatever it raises becomes ours."""
        return guarded(lambda: self._call(function, *args, **kwargs), f"index {self.name!r}")

    def _run(self, query: str, limit: int, max_distance: float | None, *, fresh: bool) -> Hits[Any]:
        self._open()
        vector = self._embedded(query)
        if self._session.autoflush:
            self._session.flush()
        if self._resolve is not None and (name := self._resolve(self._connection())) != self.name:
            self._aim(name)
            self._open()
            vector = self._embedded(query)
        pending = self._pending() if fresh else self._passed_over()
        where, ids = self._restriction()
        # What is undelivered may be in the index as it was before: so many may not count.
        # And one more tells whether the last hit is alone at its distance.
        ask, asked_for = limit + 1 + min(len(pending), 20), -1
        if self._too_many:
            ask *= 4  # criteria that only SQL applies
        ask = min(ask, _LARGEST_ASK)
        hits: list[tuple[float, str]] = []
        crowded = False
        while True:
            matches = [] if ids == [] else self._ask(self._index.query, vector, ask, where=where, ids=ids)
            ours = [(found[1], match) for match in matches if (found := self._fact(match)) is not None]
            self._hydrate([*pending, *(key for key, _ in ours)])
            self._measure(vector, dict(ours), pending, fresh=fresh)
            hits = self._nearest(limit, max_distance, {key for key, _ in ours} | set(pending))
            exhausted = len(matches) < ask or len(matches) == asked_for or ask >= _LARGEST_ASK
            horizon = matches[-1].distance if matches else 2.0
            if exhausted or (max_distance is not None and horizon > max_distance):
                break
            # An index returns facts at one distance in any order. Ours is by key, so that pages fit together.
            last = hits[-1][0] if len(hits) == limit else math.inf
            if last < horizon - _NOISE or (last <= horizon and ask > limit + _TIES):
                break
            asked_for = len(matches)
            if where is None and ids is None and not crowded and len(ours) * 2 < len(matches):
                crowded, asked_for = True, -1  # by other entities, or by points of others
                where = self._entity_filter()
                if where is None and not self._too_many:
                    ids = self._few_ids()
            ask = min(4 * ask, _LARGEST_ASK)
        if fresh and self._complete and self._stale:
            self._doubt(set(self._stale[:_DOUBTED]))
        result: Hits[Any] = Hits(Hit(self._rows[key].fact, distance) for distance, key in hits)  # type: ignore[union-attr]
        result.complete = self._complete and not self._sees_the_past()
        return result

    def _embedded(self, query: str) -> Vector:
        return np.asarray(self._call(self._vectors.of_query, query), dtype=np.float32)

    def _doubt(self, keys: set[str]) -> None:
        """Were *keys* found by content that they do not have, though no change of them is on its way?

        Then the index may lack others altogether: text= does something else now, or the index drifted.
        """
        keys.difference_update(self._pending())
        if not keys or not self._complete:
            return
        stored = self._ask(self._index.get, [self._tracked.point_id(key) for key in keys])
        fingerprints = {found[1]: point.fingerprint for point in stored if (found := split_point_id(point.id))}
        rows = {key: self._rows[key] for key in keys & fingerprints.keys()}
        stale = [key for key, row in rows.items() if row and row.projection.fingerprint != fingerprints[key]]
        if stale and not self._mark.is_doubted:
            self._mark.is_doubted = True
            logger.warning(
                "index %r has other content of %s%s than its row. If text= does something else now, give another "
                "text_version=. If not, memory.verify(engine, repair=True) delivers what differs",
                self.name,
                self._tracked.entity,
                stale[0],
            )
        self._complete = not stale

    # -- what the index may not know -----------------------------------------------------------------------------------

    def _connection(self) -> Connection:
        return self._session.connection(bind_arguments={"mapper": self._tracked.mapper})

    def _index_key(self) -> IndexKey:
        return IndexKey(self.name, self._ask(lambda: self._index.incarnation))

    def _pending(self) -> list[str]:
        """Keys that are committed or flushed but not delivered, the caller's own first."""
        connection = self._connection()
        index = self._index_key()
        standing = self._standing = self._read_standing(connection, index)
        at = standing.at
        if not standing.filled:
            # What was committed before the index's cursor began is delivered from the table: no position tells how far.
            at, self._complete = None, False
        keys: list[str] = []
        # One look for all: what is undelivered now may be refused, and its entry gone, by the next statement.
        quiet = connection.dialect.name == "sqlite" and at is not None and at.id >= standing.newest
        if not quiet:
            unit = self._capture.open_transaction(self._session)
            mine = {"entity": self._tracked.entity, "own_tx": unit.tx if unit is not None else "", "limit": _RECENT}
            statement = _dirty(connection.dialect.name, everything=at is None)
            rows = connection.execute(statement, {**mine, **(position_parameters(at) if at is not None else {})}).all()
            keys = [key for key, _ in rows]
            if sum(count for _, count in rows) >= _RECENT:
                self._complete = False
        if standing.stuck or not quiet:
            keys += stuck(connection, index, self._tracked.entity, OVERLAY_LIMIT + 1)
        keys = list(dict.fromkeys(keys))
        if len(keys) > OVERLAY_LIMIT:
            self._complete = False
            del keys[OVERLAY_LIMIT:]
        if len(self._tracked.on(connection.dialect).possible(connection, keys)) < len(keys):
            self._complete = False  # something has changed, and no row has such a key
        return keys

    def _passed_over(self) -> list[str]:
        """Nothing is looked for beside the index; but whether it was ever delivered in full."""
        standing = self._standing = self._read_standing(self._connection(), self._index_key())
        self._complete = standing.filled
        return []

    def _read_standing(self, connection: Connection, index: IndexKey) -> Standing:
        """How the index stands. It is not filled, either, when it was filled from something else than what is here now.

        That is another past of the database, or another projection of the class. No relay may have seen it yet.
        """
        standing = read_standing(connection, index, self._tracked.entity)
        if standing.past is not None and not self._mark.is_of(standing.past):
            self._opened.pop(self.name, None)
            self._open()  # the mark first: relays write it to the database before the index
            standing = read_standing(connection, index, self._tracked.entity)
        if standing.past is not None and not self._mark.is_of(standing.past):
            self._opened.pop(self.name, None)
            return standing._replace(filled=False)
        return standing._replace(filled=standing.filled and standing.projection == self._tracked.projection)

    def _sees_the_past(self) -> bool:
        """Whether the index may be ahead of what this transaction sees: ask after the index was."""
        connection = self._connection()
        if connection.dialect.name == "sqlite":
            return is_behind(connection)
        isolation: str = connection.execute(select(func.current_setting("transaction_isolation"))).scalar_one()
        return isolation in ("repeatable read", "serializable")

    # -- what the index is asked ---------------------------------------------------------------------------------------

    def _restriction(self) -> tuple[Filter | None, list[str] | None]:
        """A filter or a list of ids that the index can apply; neither: hydration alone applies the criteria."""
        criteria = list(self._statement._where_criteria)
        simple = not criteria or not _joins(self._statement)
        # What is not filled yet may lack the fields that a filter asks for.
        filled = self._standing is not None and self._standing.filled
        pushed = self._pushed_down(criteria) if simple and criteria and filled else None
        if pushed is not None:
            return pushed, None
        if not criteria and simple:
            return None, None
        return None, self._few_ids()

    def _pushed_down(self, criteria: Sequence[ColumnElement[bool]]) -> Filter | None:
        return push_down(self._tracked, criteria, Comparable(self._connection(), self._tracked.table))

    def _entity_filter(self) -> Filter | None:
        """What tells this entity from others in the index, where every point carries its entity."""
        standing = self._standing
        assert standing is not None
        return {ENTITY: {"$eq": self._tracked.entity}} if standing.marked and standing.filled else None

    def _few_ids(self) -> list[str] | None:
        """The point ids of all rows that the statement selects; None when there are too many to name."""
        keys = keys_of(self._statement, self._tracked).limit(_IDS_LIMIT + 1)
        rows = self._connection().execute(keys).all()
        if len(rows) > _IDS_LIMIT:
            self._too_many = True
            return None
        return [self._tracked.point_id(encode_key(row)) for row in rows]

    def _fact(self, match: Match) -> tuple[str, str] | None:
        found = split_point_id(match.id)
        return found if found is not None and found[0] == self._tracked.entity else None

    # -- what SQL says -------------------------------------------------------------------------------------------------

    def _hydrate(self, keys: Collection[str]) -> None:
        """Load the rows of *keys* that the caller's transaction sees and that the statement selects."""
        wanted = [key for key in dict.fromkeys(keys) if key not in self._rows]
        if not wanted:
            return
        columns = self._tracked.on(self._connection().dialect)
        width = len(self._tracked.key_columns)
        statement = _hydration(self._statement, self._tracked, columns)
        embedder = self._vectors.embedder.fingerprint
        for some in batches(wanted):
            self._rows.update(dict.fromkeys(some))
            possible = columns.possible(self._connection(), some)
            if not possible:
                continue
            parameters = columns.key_parameters(possible.values())
            # Columns beside the entity: the identity map may hold older or edited values. The filter makes joined eager
            # loading of collections possible, which repeats rows.
            rows = self._session.execute(statement, parameters).unique(lambda row: tuple(row[1 : 1 + width]))
            projected = self._projected_of_many(some)
            for row in rows:
                key = encode_key(row[1 : 1 + width])
                if key not in possible:  # SQLite finds "1" by 1, where the type of the key was changed
                    self._complete = False
                try:
                    projection = self._tracked.project(key, projected.get(key, row[1 + width :]), embedder)
                except Exception:  # noqa: BLE001  # the application's own callable: the relay parks such a row, too
                    self._complete = False
                else:
                    self._rows[key] = _Row(row[0], projection)

    def _projected_of_many(self, keys: Sequence[str]) -> dict[str, Sequence[Any]]:
        """What tells the content of *keys* whose rows are in several tables, of which a select() may have but one."""
        return committed.read(self._connection(), self._tracked, keys) if self._tracked.is_projected_of_many else {}

    def _measure(self, query: Vector, matches: Mapping[str, Match], pending: Sequence[str], *, fresh: bool) -> None:
        """The distance of every row whose current content is known: from the index, or embedded now."""
        stale: dict[str, Projection] = {}
        for key in (*pending, *matches):
            row = self._rows.get(key)
            if row is None or row.projection.fingerprint is None or key in self._distances:
                continue
            match = matches.get(key)
            if match is not None and match.fingerprint == row.projection.fingerprint:
                self._place(key, row.projection, match.distance)
            elif fresh:
                stale[key] = row.projection
                if match is not None and key not in pending:
                    self._stale.append(key)
        if len(stale) > self._budget:
            self._complete = False
            stale = dict(list(stale.items())[: self._budget])
        self._budget -= len(stale)
        if not stale:
            return
        texts = {p.text_fingerprint: p.text for p in stale.values() if p.text_fingerprint and p.text}
        vectors = embeddings.known(self._connection(), self._vectors, texts)
        vectors |= self._embed({digest: text for digest, text in texts.items() if digest not in vectors})
        for key, projection in stale.items():
            vector = vectors.get(projection.text_fingerprint or "")
            if vector is not None:
                self._place(key, projection, cosine_distance(query, vector))

    def _place(self, key: str, projection: Projection, distance: float) -> None:
        """Facts of one text are at one distance, whatever the last digits of each: only so is their order by key."""
        self._distances[key] = self._of_texts.setdefault(projection.text_fingerprint, distance)

    def _embed(self, texts: Mapping[str, str]) -> dict[str, Vector]:
        """The vectors of *texts*, without those that the embedder refuses; none when it is unavailable.

        They are remembered in this process, where a relay finds them: a search writes nothing to the database.
        """
        if not texts:
            return {}
        try:
            return self._call(self._vectors.embed, texts, remember=True)
        except DeliveryRejected:
            self._complete = False
            if len(texts) == 1:
                return {}
            first, second = halves(list(texts))
            return self._embed({k: texts[k] for k in first}) | self._embed({k: texts[k] for k in second})
        except DeliveryError:
            self._complete = False
            return {}

    def _nearest(self, limit: int, max_distance: float | None, keys: Collection[str]) -> list[tuple[float, str]]:
        found = ((self._distances[key], key) for key in keys if key in self._distances)
        near = (item for item in found if max_distance is None or item[0] <= max_distance)
        return heapq.nsmallest(limit, near)


def _hydration(statement: Select[Any], tracked: Tracked, columns: TableColumns) -> Select[Any]:
    """*statement* for the rows of some keys, with what tells their content beside the entity."""
    plain = statement is tracked.everything
    cached: Select[Any] | None = tracked.hydrations.get(columns.dialect.name) if plain else None
    if cached is not None:
        return cached
    beside = () if tracked.is_projected_of_many else tracked.projected_columns
    projected = [column.label(f"memstate_{n}") for n, column in enumerate(beside)]
    full = statement.order_by(None).add_columns(*raw_key_columns(tracked), *projected).where(columns.key_in)
    if plain:
        tracked.hydrations[columns.dialect.name] = full
    return full


def keys_of(statement: Select[Any], tracked: Tracked) -> Select[Any]:
    """The keys of all facts that *statement* selects."""
    keys = statement.with_only_columns(*raw_key_columns(tracked), maintain_column_froms=True).order_by(None).distinct()
    keys._for_update_arg = None  # PostgreSQL locks no DISTINCT rows; hydrating locks what is returned
    return keys


def cosine_distance(a: Vector, b: Vector) -> float:
    """1 − cosine similarity; 1 when either vector is zero."""
    a, b = a.astype(np.float64), b.astype(np.float64)
    norm = float(np.linalg.norm(a) * np.linalg.norm(b))
    return 1.0 - float(a @ b) / norm if norm else 1.0


def resolve_target(registry: Registry, target: Any) -> tuple[Select[Any], Tracked]:
    """The select() that *target* is, or stands for. Raises MemstateError for what cannot be searched."""
    if isinstance(target, type):
        tracked = registry.of(target)
        return (tracked.everything if target is tracked.model else select(target)), tracked
    if not isinstance(target, Select):
        raise MemstateError(f"search {target!r}: give a tracked class or a select() of one")
    described = target.column_descriptions
    if len(described) != 1 or described[0]["type"] is not described[0]["expr"]:
        raise MemstateError("search takes a select() of exactly one tracked class, like select(Model).where(…)")
    if (
        target._limit_clause is not None
        or target._offset_clause is not None
        or target._fetch_clause is not None
        or target._group_by_clauses
        or target._distinct
    ):
        raise MemstateError("a select() to search in has no LIMIT, OFFSET, FETCH, GROUP BY or DISTINCT; use limit=")
    return target, registry.of(described[0]["type"])


def _joins(statement: Select[Any]) -> bool:
    return bool(statement._setup_joins or statement._from_obj)
