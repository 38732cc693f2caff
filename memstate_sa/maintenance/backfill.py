"""Take in rows that are older than tracking: log a baseline for each row, and add its key to the outbox.

The work is done in batches, by any number of processes, and it resumes after a crash. The remaining keys are kept as
ranges in a table. In each transaction, a worker locks a free range, logs its next rows, and records the last key. So
leases and clean-up are not needed: the database unlocks a range when its worker dies.
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
from memstate_sa.relay.progress import Progress
from memstate_sa.tracking import committed
from memstate_sa.tracking.tracked import Tracked

_BATCHES = 20
"""The number of batches in a range: large enough for few ranges, small enough to keep all workers busy to the end."""

_BEGINNING = ""


class BackfillState(NamedTuple):
    """The progress of all workers that backfill some classes.

    ``seen`` rows of about ``total`` were checked, and ``added`` of them were new to the log.
    """

    seen: int
    total: int
    added: int
    done: bool


class Backfill:
    """One worker in the backfill of *tracked*. *rate* is the greatest number of rows per second that it checks."""

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
        """Create the first range of each class that has no unfinished range.

        *restart*: True replaces the ranges of all classes. False keeps finished classes finished.
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
                    continue  # another worker was first
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
        """Work until no row is left, or until *limit* rows were checked. Return the number of rows new to the log."""
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
                # Other writers poll for the lock, at growing intervals: give them as much time as this batch took.
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
        """Process the next batch. Return the number of checked rows and of logged rows, or None at the end."""
        with self._transaction() as connection:
            take_write_lock(connection)
            range_row = self._lock_range(connection)
            if range_row is None:
                return None
            tracked, after = self._tracked[range_row.entity], range_row.position or None
            of_range = and_(backfill.c.entity == range_row.entity, backfill.c.start == range_row.start)
            if range_row.until is None:
                skip = _BATCHES * self._batch_size - 1
                boundary = committed.page(connection, tracked, after, 1, skip=skip)
                if boundary:  # leave the rest to the next worker
                    connection.execute(update(backfill).where(of_range).values(until=boundary[0]))
                    connection.execute(insert(backfill), _range(range_row.entity, boundary[0]))
                    return 0, 0
            keys = committed.page(connection, tracked, after, size, until=range_row.until)
            added = passed = 0
            if keys:
                added, passed = self._recorder.log_baselines(connection, tracked, keys)
            connection.execute(
                update(backfill)
                .where(of_range)
                .values(
                    position=keys[passed - 1] if passed else range_row.position,
                    seen=backfill.c.seen + passed,
                    added=backfill.c.added + added,
                    done=len(keys) < size and passed == len(keys),
                )
            )
            return passed, added

    def _lock_range(self, connection: Connection) -> Row[Any] | None:
        """Lock and return an unfinished range, if possible without waiting. Return None when all ranges are done."""
        entities = {"entities": list(self._tracked)}
        while True:
            for statement in (_unlocked, _any):
                if range_row := connection.execute(statement, entities).first():
                    return range_row
            # Another worker may have finished the range that we waited for. Try other ranges.
            if self.state(connection).done:
                return None

    @contextmanager
    def _transaction(self) -> Iterator[Connection]:
        """A transaction in READ COMMITTED, so that reads after a lock see the latest rows."""
        database = database_of(self._engine)
        connected = self._engine.connect().execution_options(**database.isolation("READ COMMITTED"))
        with connected as connection, connection.begin():
            if not database.has_one_writer:
                connection.execute(_limit_idle)
            yield connection


def _range(entity: str, start: str, *, total: int = 0) -> dict[str, Any]:
    counts = {"total": total, "seen": 0, "added": 0}
    return {"entity": entity, "start": start, "until": None, "position": start, "done": False, **counts}


# A process that is suspended in the middle of a batch must not lock the rows for ever.
_limit_idle = select(func.set_config("idle_in_transaction_session_timeout", "60s", True))
# Lock the table, not its rows: otherwise another worker could divide a range and insert a new one at the same time.
_alone = text(f"LOCK TABLE {backfill.name} IN EXCLUSIVE MODE")
_of_entities = backfill.c.entity.in_(bindparam("entities", expanding=True))
# The undivided range comes last: as long as it is not locked, other workers can divide it.
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
