"""Facts that expire: a sweeper deletes them, as anybody would, and history says that they expired."""

from __future__ import annotations

import logging
from collections.abc import Iterable

from sqlalchemy import select
from sqlalchemy.engine import Engine
from sqlalchemy.orm import Session, lazyload

from memstate_sa.capture import Capture
from memstate_sa.facts import Tracked
from memstate_sa.outbox import take_write_lock
from memstate_sa.tables import utcnow
from memstate_sa.truth import raw_key_columns

logger = logging.getLogger("memstate_sa.expiry")

EXPIRED = "expired"
"""The reason of transactions that delete what has expired."""

_PAGE = 500


class Sweeper:
    """Deletes expired facts of one Memory, a page a transaction. Any number may run at once."""

    def __init__(self, capture: Capture) -> None:
        self._capture = capture
        self._session_class = type("SweepSession", (Session,), {})

    def sweep(self, engine: Engine, tracked: Iterable[Tracked]) -> int:
        """Returns how many facts it deleted. One that cannot be deleted is left, and a warning logged."""
        self._capture.attach(self._session_class)
        return sum(self._sweep(engine, each) for each in tracked if each.expires is not None)

    def _sweep(self, engine: Engine, tracked: Tracked) -> int:
        count, held = 0, set[str]()
        while True:
            try:
                deleted = self._page(engine, tracked, held, [], _PAGE)
            except Exception:  # noqa: BLE001  # the application's own cascades and constraints
                deleted = self._one_by_one(engine, tracked, held)
            count += deleted
            if deleted < _PAGE:
                return count

    def _one_by_one(self, engine: Engine, tracked: Tracked, held: set[str]) -> int:
        """A page of which some are refused: they are *held*."""
        count, before = 0, len(held)
        while count + len(held) - before < _PAGE:
            chosen: list[str] = []
            try:
                if not self._page(engine, tracked, held, chosen, 1):
                    return count
                count += 1
            except Exception as error:
                if chosen:
                    held.update(chosen)
                    logger.warning(
                        "%s %s has expired, but cannot be deleted (%s)",
                        tracked.entity,
                        *chosen,
                        type(error).__name__,
                    )
                    continue
                raise
        return _PAGE

    def _page(self, engine: Engine, tracked: Tracked, held: set[str], chosen: list[str], limit: int) -> int:
        """Delete up to *limit* expired facts that are not *held*; how many. Puts their keys in *chosen*, first."""
        columns = tracked.on(engine.dialect)
        expires = tracked.mapper.columns[tracked.expires or ""]
        now = utcnow() if getattr(expires.type, "timezone", True) else utcnow().replace(tzinfo=None)
        keys = select(*raw_key_columns(tracked)).select_from(tracked.rows).where(expires <= now)
        if tracked.criterion is not None:
            keys = keys.where(tracked.criterion)
        keys = keys.order_by(expires, *tracked.key_columns).with_for_update(of=tracked.table, skip_locked=True)
        with self._session_class(engine) as session:
            unit = self._capture.unit(session)
            unit.reason, unit.step = EXPIRED, False
            connection = session.connection(bind_arguments={"mapper": tracked.mapper})
            with unit.writing():
                take_write_lock(connection)
            found = [columns.encode_key(row) for row in connection.execute(keys.limit(limit + len(held)))]
            chosen += [key for key in found if key not in held][:limit]
            for key in chosen:
                fact = session.get(tracked.model, columns.identity(key), options=[lazyload("*")])
                if fact is not None:
                    session.delete(fact)
            session.commit()
        return len(chosen)
