"""Compare an index with the tables by content, page by page, and repair differences."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, field

from sqlalchemy import and_, select
from sqlalchemy.engine import Connection, Engine

from memstate_sa.db.codec import FactKey, by_entity
from memstate_sa.db.dialects import database_of
from memstate_sa.db.json_params import as_array, unnest_strings
from memstate_sa.db.statements import batches
from memstate_sa.db.tables import outbox
from memstate_sa.embedding.batches import Destination
from memstate_sa.errors import IndexBroken
from memstate_sa.indexes.base import RemakableIndex
from memstate_sa.log.outbox import ALL, position_parameters, undelivered
from memstate_sa.log.positions import Position, meet
from memstate_sa.relay import ledger
from memstate_sa.relay.backlog import read_positions
from memstate_sa.relay.index_key import IndexKey
from memstate_sa.relay.plan import Parked, ParkedState
from memstate_sa.relay.progress import Progress
from memstate_sa.runtime.display import html_table, summary
from memstate_sa.runtime.printable import printable_logger
from memstate_sa.tracking import committed
from memstate_sa.tracking.projection import Projection, split_point_id
from memstate_sa.tracking.tracked import Tracked

logger = printable_logger("memstate_sa.memory")


@dataclass(repr=False)
class DriftReport:
    """Facts that the indexes and the tables disagree on, as (entity, primary key).

    - ``missing``: rows without a vector.
    - ``ghost``: vectors without a row.
    - ``stale``: vectors whose row has other content now.
    - ``pending``: facts that were not compared, because a change of them still waits for delivery.
    """

    checked: int = 0
    missing: list[tuple[str, object]] = field(default_factory=list)
    ghost: list[tuple[str, object]] = field(default_factory=list)
    stale: list[tuple[str, object]] = field(default_factory=list)
    pending: list[tuple[str, object]] = field(default_factory=list)

    @property
    def clean(self) -> bool:
        """True if no difference was found. Repaired differences count, and pending facts do not."""
        return not (self.missing or self.ghost or self.stale)

    def _facts(self) -> dict[str, list[tuple[str, object]]]:
        return {"missing": self.missing, "ghost": self.ghost, "stale": self.stale, "pending": self.pending}

    def __repr__(self) -> str:
        counts = ", ".join(f"{len(facts)} {kind}" for kind, facts in self._facts().items() if facts)
        return summary(self, "clean" if self.clean else "not clean", f"{self.checked} checked", counts)

    def _repr_html_(self) -> str:
        rows = ((kind, *fact) for kind, facts in self._facts().items() for fact in facts)
        return html_table(repr(self), ("difference", "entity", "key"), rows)


def remake_if_broken(name: str, destination: Destination) -> None:
    """Replace the index *name* by an empty one if its files are damaged. Raises IndexBroken if that is impossible."""
    index = destination.index
    try:
        destination.open()
    except IndexBroken:
        if not isinstance(index, RemakableIndex):
            raise
        logger.warning("Index %r is damaged. It is replaced by an empty one and filled again.", name)
        index.remake()


class Verify:
    """One comparison of one index with one database."""

    def __init__(
        self,
        engine: Engine,
        name: str,
        destination: Destination,
        tracked: Mapping[str, Tracked],
        *,
        intended: Callable[[], Collection[FactKey]] = set,
        page_size: int = 500,
    ) -> None:
        """*intended* returns the keys of announced intents: an index may get these facts before they are committed."""
        self._engine = engine
        self._intended = intended
        self._index = destination.index
        self._tracked = tracked
        self._embedder = destination.vectors.embedder.fingerprint
        self._key = IndexKey(name, destination.open())
        self._page_size = min(page_size, self._index.max_batch)

    def run(self, report: DriftReport, *, repair: bool, progress: Progress | None = None) -> None:
        for kind, facts in self._differences(report, progress):
            at = self._position() if facts else None
            pending = self._pending(facts, at)
            drifted = self._confirmed([fact for fact in facts if fact not in pending])
            # Facts that changed between the two reads may be delivered by now, so they do not count as drift. Read the
            # intents before the outbox: when an intent is gone, its fact is in the outbox already.
            changed = set(self._intended()).intersection(drifted) if drifted else set()
            changed |= self._pending(drifted, at)
            pending |= changed
            drifted = [fact for fact in drifted if fact not in changed]
            if pending:
                report.pending += map(self._shown, pending)
            if not drifted:
                continue
            getattr(report, kind).extend(map(self._shown, drifted))
            if repair:
                # Park the keys: the relay writes a parked key even if the ledger has the same fingerprint.
                with self._engine.begin() as connection:
                    parking = Parked(0, 0.0, ParkedState.AGAIN, f"drift: {kind}")
                    ledger.redirty(connection, self._key, dict.fromkeys(drifted, parking))

    def _differences(self, report: DriftReport, progress: Progress | None) -> Iterator[tuple[str, list[FactKey]]]:
        after: str | None = None
        while entries := self._index.scan(after, self._page_size):
            after = entries[-1].id
            stored = {
                fact: e.fingerprint for e in entries if (fact := split_point_id(e.id)) and fact[0] in self._tracked
            }
            truth = self._truth(stored)
            ghosts = [fact for fact in stored if fact not in truth]
            stale = [fact for fact, fingerprint in stored.items() if truth.get(fact, fingerprint) != fingerprint]
            yield "ghost", ghosts
            yield "stale", stale
        for entity, tracked in self._tracked.items():
            last: str | None = None
            while True:
                with self._engine.connect() as connection:
                    keys = committed.page(connection, tracked, last, self._page_size)
                if not keys:
                    break
                last = keys[-1]
                truth = self._truth([(entity, key) for key in keys])
                present = {stored.id for stored in self._index.get([tracked.point_id(key) for _, key in truth])}
                report.checked += len(keys)
                yield "missing", [fact for fact in truth if tracked.point_id(fact[1]) not in present]
                if progress is not None:
                    progress(report.checked, None)

    def _confirmed(self, facts: list[FactKey]) -> list[FactKey]:
        """The *facts* that still differ when read again: a delivery may have changed the vector between the reads."""
        if not facts:
            return facts
        ids = {fact: self._tracked[fact[0]].point_id(fact[1]) for fact in facts}
        stored = {point.id: point.fingerprint for point in self._index.get(list(ids.values()))}
        truth = self._truth(facts)
        return [fact for fact in facts if stored.get(ids[fact]) != truth.get(fact)]

    def _truth(self, facts: Iterable[FactKey]) -> dict[FactKey, str]:
        """The fingerprints that the index should hold for *facts*."""
        truth = {}
        with self._engine.connect() as connection:
            for entity, keys in by_entity(facts).items():
                for projection in committed.project(connection, self._tracked[entity], keys, self._embedder):
                    if isinstance(projection, Projection) and projection.fingerprint is not None:
                        truth[entity, projection.key] = projection.fingerprint
        return truth

    def _position(self) -> Position | None:
        """The position of the index, or None if it was never delivered to."""
        with self._engine.connect() as connection:
            positions = read_positions(connection, self._key)
        return meet(positions) if positions else None

    def _pending(self, facts: Collection[FactKey], at: Position | None) -> set[FactKey]:
        """The *facts* with a change that is not delivered when the index is at the position *at*."""
        if not facts or at is None:
            return set()
        with self._engine.connect() as connection:
            return {
                (entity, key)
                for entity, group in by_entity(facts).items()
                for page in batches(group, self._page_size)
                for key in self._dirty(connection, at, entity, page)
            }

    @staticmethod
    def _dirty(connection: Connection, at: Position, entity: str, group: Iterable[str]) -> Iterable[str]:
        among = outbox.c.key.in_(select(unnest_strings("keys").c.value))
        entries = undelivered(database_of(connection), outbox.c.key, where=and_(outbox.c.entity == entity, among))
        parameters = {**position_parameters(at), "keys": as_array(group), "limit": ALL}
        return connection.scalars(select(entries.c.key), parameters).all()

    def _shown(self, fact: FactKey) -> tuple[str, object]:
        entity, key = fact
        identity = self._tracked[entity].columns_for(self._engine.dialect).identity(key)
        return entity, identity[0] if len(identity) == 1 else identity
