"""Facts that expire: a sweeper deletes them through a Session, and their history says that they expired."""

from __future__ import annotations

from collections.abc import Iterable

from sqlalchemy import select
from sqlalchemy.engine import Engine
from sqlalchemy.orm import Session, lazyload

from memstate_sa.capture.listeners import SessionCapture
from memstate_sa.db.codec import decode_key
from memstate_sa.db.statements import take_write_lock
from memstate_sa.db.tables import utcnow
from memstate_sa.runtime.printable import printable_logger
from memstate_sa.tracking.committed import raw_key_columns
from memstate_sa.tracking.tracked import Tracked

logger = printable_logger("memstate_sa.expiry")

EXPIRED = "expired"
"""The reason of transactions that delete expired facts."""

_PAGE = 500


class Sweeper:
    """Deletes expired facts of one Memory, one page per transaction. Any number of sweepers may run at once."""

    def __init__(self, capture: SessionCapture) -> None:
        self._capture = capture
        self._session_class = type("SweepSession", (Session,), {})

    def sweep(self, engine: Engine, tracked: Iterable[Tracked]) -> int:
        """Delete expired facts, and return their number. Log a warning for each fact that cannot be deleted."""
        expiring = [one for one in tracked if one.expires is not None]
        if not expiring:
            return 0
        self._capture.attach(self._session_class)
        return sum(self._sweep(engine, one) for one in expiring)

    def _sweep(self, engine: Engine, tracked: Tracked) -> int:
        count, refused = 0, set[str]()
        halves: list[int] = []  # the sizes of the smaller pages that a refused page was divided into
        while True:
            chosen: list[str] = []
            size = halves.pop() if halves else _PAGE
            try:
                self._page(engine, tracked, refused, chosen, size)
            except Exception as error:  # the application's cascades and constraints may raise anything
                if not chosen:
                    raise
                half = len(chosen) // 2
                if half:
                    halves += [len(chosen) - half, half]
                else:
                    refused.update(chosen)
                    logger.warning("Cannot delete expired %s %s (%s).", tracked.entity, *chosen, type(error).__name__)
                continue
            count += len(chosen)
            if len(chosen) < size:
                return count

    def _page(self, engine: Engine, tracked: Tracked, refused: set[str], chosen: list[str], limit: int) -> None:
        """Delete up to *limit* expired facts that are not in *refused*.

        The keys of these facts are added to *chosen* before the deletion: the caller needs them if the deletion fails.
        """
        columns = tracked.columns_for(engine.dialect)
        expires = tracked.mapper.columns[tracked.expires or ""]
        now = utcnow() if getattr(expires.type, "timezone", True) else utcnow().replace(tzinfo=None)
        keys = select(*raw_key_columns(columns)).select_from(tracked.rows).where(expires <= now)
        if tracked.criterion is not None:
            keys = keys.where(tracked.criterion)
        keys = keys.order_by(expires, *tracked.key_columns).with_for_update(of=tracked.table, skip_locked=True)
        with self._session_class(engine) as session:
            transaction = self._capture.transaction(session)
            transaction.reason, transaction.step = EXPIRED, False
            connection = session.connection(bind_arguments={"mapper": tracked.mapper})
            with transaction.writing():
                take_write_lock(connection)
            page = [columns.encode_key(row) for row in connection.execute(keys.limit(limit + len(refused)))]
            chosen += [key for key in page if key not in refused][:limit]
            if chosen:
                facts = select(tracked.model).where(columns.key_in).options(lazyload("*"))
                parameters = columns.key_parameters([decode_key(key) for key in chosen])
                for fact in session.scalars(facts, parameters).all():
                    session.delete(fact)
            session.commit()
