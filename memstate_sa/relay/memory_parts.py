"""`MemoryParts`: the attributes that all methods of `Memory` share."""

from __future__ import annotations

from typing import TYPE_CHECKING

from sqlalchemy.engine import Engine
from sqlalchemy.orm import Session

from memstate_sa.capture.listeners import SessionCapture
from memstate_sa.capture.recorder import Recorder
from memstate_sa.capture.transaction import OpenTransaction
from memstate_sa.db.sync_engines import SyncEngines
from memstate_sa.embedding.batches import Destination
from memstate_sa.errors import MemstateError
from memstate_sa.indexes.base import VectorIndex
from memstate_sa.relay.relays import Relays
from memstate_sa.relay.strict import Strict
from memstate_sa.relay.wakeup import Notifier
from memstate_sa.tracking.registry import Registry

if TYPE_CHECKING:
    from sqlalchemy.ext.asyncio import AsyncEngine


class MemoryParts:
    """The parts of a `Memory`, which creates them.

    The methods of `Memory` are in one class for each folder: `SearchMethods`, `UndoMethods`, `MaintenanceMethods`.
    """

    indexes: dict[str, VectorIndex]
    successors: dict[str, str]
    _destinations: dict[str, Destination]
    _engines: SyncEngines
    _registry: Registry
    _recorder: Recorder
    _capture: SessionCapture
    _notifier: Notifier
    _relays: Relays
    _strict: Strict

    def sync_engine(self, engine: Engine | AsyncEngine, *, use: Engine | None = None) -> Engine:
        """*engine* itself, or a sync engine for an AsyncEngine: the relay runs in a thread, not as a coroutine.

        The sync engine is made from the URL of the AsyncEngine only. If that has ``connect_args``, a ``creator`` or
        listeners, pass your own sync engine first: ``memory.sync_engine(async_engine, use=engine)``.
        """
        return self._engines.sync_engine(engine, use)

    def _open(self) -> None:
        """Reopen a Memory after `close`."""
        self._capture.resume()
        self._notifier.open()

    def _transaction(self, session: Session) -> OpenTransaction:
        if not self._capture.is_attached(session):
            raise MemstateError("This Session is not attached. Call memory.attach() with its sessionmaker first.")
        return self._capture.transaction(session)
