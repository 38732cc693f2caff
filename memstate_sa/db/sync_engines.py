"""`SyncEngines`: the sync engines of one Memory. Threads use them in place of AsyncEngines."""

from __future__ import annotations

from typing import TYPE_CHECKING

from sqlalchemy.engine import URL, Engine

from memstate_sa.db import missing_tables
from memstate_sa.db.engines import blocking_engine
from memstate_sa.db.sqlite import is_in_memory
from memstate_sa.errors import MemstateError

if TYPE_CHECKING:
    from sqlalchemy.ext.asyncio import AsyncEngine


class SyncEngines:
    """One sync engine for each URL of an AsyncEngine. The application gives it, or it is made at first use."""

    def __init__(self) -> None:
        self.by_url: dict[URL, Engine] = {}
        self._own: list[Engine] = []

    def sync_engine(self, engine: Engine | AsyncEngine, use: Engine | None = None) -> Engine:
        """*engine* itself, or a sync engine for an AsyncEngine. *use* becomes that engine, if the URL has none yet."""
        if isinstance(engine, Engine):
            missing_tables.explain(engine)
            return engine
        if not hasattr(engine, "sync_engine"):
            raise MemstateError(f"engine={engine!r} is not an Engine. Create one with sqlalchemy.create_engine(url).")
        url: URL = engine.url
        sync = self.by_url.get(url) if use is None else self.by_url.setdefault(url, use)
        if sync is None:
            if is_in_memory(engine.sync_engine):
                raise MemstateError(
                    "Cannot use an in-memory SQLite with an AsyncEngine here: only its own connection can see the "
                    "data. Use a file."
                )
            own = blocking_engine(url)
            sync = self.by_url.setdefault(url, own)
            if sync is own:
                self._own.append(own)  # otherwise another thread was faster, and its engine is used
        missing_tables.explain(sync)
        return sync

    def for_threads(self, engine: Engine | AsyncEngine) -> Engine:
        """*engine*, or a sync engine on its URL if it is async, or the sync engine inside an AsyncEngine."""
        if isinstance(engine, Engine) and engine.dialect.is_async:
            from sqlalchemy.ext.asyncio import AsyncEngine

            engine = AsyncEngine(engine)
        return self.sync_engine(engine)

    def dispose(self) -> None:
        """Close the connections of the engines that this object made."""
        for engine in self._own:
            engine.dispose()
