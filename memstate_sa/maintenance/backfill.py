"""Rows that are older than tracking, taken in: a baseline in the log, and a mark for delivery.

Batch by batch, by any number of processes, each going on where another was killed. What is left is kept as ranges of
keys. A worker is one transaction at a time: it locks a range that nobody else has, logs its next rows, and moves its
beginning past them. So there is nothing to lease, and nothing to clean up: the database lets go of a range when the
process that had it dies.
"""

from __future__ import annotations

import time
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

from sqlalchemy import Row, Select, and_, bindparam, delete, false, func, insert, select, text, update
from sqlalchemy.engine import Connection, Engine

from memstate_sa.capture import unique_values
from memstate_sa.capture.recorder import Recorder
from memstate_sa.db.dialects import database_of
from memstate_sa.db.statements import take_write_lock
from memstate_sa.db.tables import backfill
from memstate_sa.maintenance.progress import Progress
from memstate_sa.tracking import committed
from memstate_sa.tracking.tracked import Tracked

_BATCHES = 20
"""So many of them are divided off as a range: few enough ranges, and at the end no worker is idle for long."""

_BEGINNING = ""


class BackfillState(NamedTuple):
    """How far the backfill of some classes is, whoever works on it: rows seen, of how many; those new to the log."""

    seen: int
    total: int
    added: int
    done: bool


class Backfill:
    """One worker's part in the backfill of *tracked*. *rate*: it looks at no more rows a second than that."""

    def __init__(
        self,
        engine: Engine,
        recorder: Recorder,
        tracked: Collection[Tracked],
        *,
        batch_size: int,
        rate: float | None = None,
    ) -> None:
        self._engine = engine
        self._recorder = recorder
        self._tracked = {one.entity: one for one in tracked}
        self._batch_size = batch_size
        self._rate = rate

    def begin(self, *, restart: bool | None = None) -> None:
        """See to it that there are ranges: of classes that have none, and anew of those that are done with.

        *restart*: anew of all (True), or only where there were none (False).
        """
        database = database_of(self._engine)
        for entity, tracked in self._tracked.items():
            of_entity = backfill.c.entity == entity
            enough = select(backfill.c.entity).where(of_entity).limit(1)
            if restart is None:
                enough = enough.where(backfill.c.done == false())
            with self._transaction() as connection:
                if not restart and connection.execute(enough).first():
                    continue
                total = committed.count(connection, tracked)
            with self._transaction() as connection:
                take_write_lock(connection)
                if not database.has_one_writer:
                    connection.execute(_alone)
                if not restart and connection.execute(enough).first():
                    continue  # somebody else was first
                connection.execute(delete(backfill).where(of_entity))
                connection.execute(
                    database.upsert(backfill).on_conflict_do_nothing(),
                    _range(entity, _BEGINNING, total=total),
                )
            if tracked.unique_values is not None:
                self._free_values(tracked)

    def _free_values(self, tracked: Tracked) -> None:
        """Free unique values of rows that were deleted while ``unique_by`` was not kept."""
        after: tuple[str, str] | None = ("", "")
        while after is not None:
            with self._transaction() as connection:
                take_write_lock(connection)
                of_no_row, after = unique_values.of_no_row(connection, tracked, after)
                unique_values.take(connection, tracked, of_no_row)

    def run(self, *, limit: int | None = None, progress: Progress | None = None) -> int:
        """Work until nothing is left, or *limit* rows were looked at; how many of them were new to the log."""
        added = seen = 0
        self._report(progress)
        while limit is None or seen < limit:
            since = time.monotonic()
            turn = self._turn(self._batch_size if limit is None else min(self._batch_size, limit - seen))
            if turn is None:
                break
            added, seen = added + turn[1], seen + turn[0]
            self._report(progress)
            now = time.monotonic()
            pause = 0.0 if self._rate is None else turn[0] / self._rate - (now - since)
            if database_of(self._engine).has_one_writer:
                # Who waits to be it asks again after as long as it has waited, about.
                pause = max(pause, now - since)
            if pause > 0:
                time.sleep(pause)
        return added

    def state(self, connection: Connection) -> BackfillState:
        *numbers, unfinished = connection.execute(_state, {"entities": list(self._tracked)}).one()
        seen, total, added = map(int, numbers)
        return BackfillState(seen, max(seen, total) if unfinished else seen, added, not unfinished)

    def _report(self, progress: Progress | None) -> None:
        if progress is not None:
            with self._engine.connect() as connection:
                state = self.state(connection)
            progress(state.seen, state.total)

    # -- one transaction -----------------------------------------------------------------------------------------------

    def _turn(self, size: int) -> tuple[int, int] | None:
        """How many rows were looked at, and how many of them were logged; None when nothing is left."""
        with self._transaction() as connection:
            take_write_lock(connection)
            range_row = self._lock_range(connection)
            if range_row is None:
                return None
            tracked, after = self._tracked[range_row.entity], range_row.position or None
            this = and_(backfill.c.entity == range_row.entity, backfill.c.start == range_row.start)
            if range_row.until is None:
                skip = _BATCHES * self._batch_size - 1
                boundary = committed.page(connection, tracked, after, 1, skip=skip)
                if boundary:  # what is beyond is for whoever comes next
                    connection.execute(update(backfill).where(this).values(until=boundary[0]))
                    connection.execute(insert(backfill), _range(range_row.entity, boundary[0]))
                    return 0, 0
            keys = committed.page(connection, tracked, after, size, until=range_row.until)
            added = passed = 0
            if keys:
                added, passed = self._recorder.log_baselines(connection, tracked, keys)
            connection.execute(
                update(backfill)
                .where(this)
                .values(
                    position=keys[passed - 1] if passed else range_row.position,
                    seen=backfill.c.seen + passed,
                    added=backfill.c.added + added,
                    done=len(keys) < size and passed == len(keys),
                )
            )
            return passed, added

    def _lock_range(self, connection: Connection) -> Row[Any] | None:
        """Lock a range, that is not worked on, if there is one; None when all are done."""
        entities = {"entities": list(self._tracked)}
        while True:
            for statement in (_unlocked, _any):
                if range_row := connection.execute(statement, entities).first():
                    return range_row
            # Nothing, or what was waited for is done now, and others are not.
            if self.state(connection).done:
                return None

    @contextmanager
    def _transaction(self) -> Iterator[Connection]:
        """In READ COMMITTED: what is read after a lock has to be what is there then."""
        database = database_of(self._engine)
        connected = self._engine.connect().execution_options(**database.isolation("READ COMMITTED"))
        with connected as connection, connection.begin():
            if not database.has_one_writer:
                connection.execute(_limit_idle)
            yield connection


def _range(entity: str, start: str, *, total: int = 0) -> dict[str, Any]:
    counts = {"total": total, "seen": 0, "added": 0}
    return {"entity": entity, "start": start, "until": None, "position": start, "done": False, **counts}


# A process that is stopped in the middle of a batch must not hold the rows for ever.
_limit_idle = select(func.set_config("idle_in_transaction_session_timeout", "60s", True))
# Not the ranges: a worker that divides one meanwhile would leave a range that is not of these.
_alone = text(f"LOCK TABLE {backfill.name} IN EXCLUSIVE MODE")
_of_entities = backfill.c.entity.in_(bindparam("entities", expanding=True))
# The undivided rest last, so that others can divide it meanwhile.
_ranges: Select[Any] = (
    select(backfill.c.entity, backfill.c.start, backfill.c.until, backfill.c.position)
    .where(_of_entities, backfill.c.done == false())
    .order_by(backfill.c.until.is_(None), backfill.c.entity, backfill.c.start)
    .limit(1)
)
_unlocked, _any = _ranges.with_for_update(skip_locked=True), _ranges.with_for_update()
_state = select(
    *(func.coalesce(func.sum(column), 0) for column in (backfill.c.seen, backfill.c.total, backfill.c.added)),
    select(backfill.c.entity).where(_of_entities, backfill.c.done == false()).exists(),
).where(_of_entities)
