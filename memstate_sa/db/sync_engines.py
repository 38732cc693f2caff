"""`SyncEngines`: the sync engines of one Memory, for threads, on the URLs of AsyncEngines."""

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
    """One sync engine for each URL of an AsyncEngine: made when it is first needed, or given by the application."""

    def __init__(self) -> None:
        self.by_url: dict[URL, Engine] = {}
        self._own: list[Engine] = []

    def sync_engine(self, engine: Engine | AsyncEngine, use: Engine | None = None) -> Engine:
        """*engine*, or the sync engine on the URL of an AsyncEngine: *use*, if there was none before."""
        if isinstance(engine, Engine):
            missing_tables.explain(engine)
            return engine
        if not hasattr(engine, "sync_engine"):
            raise MemstateError(f"{engine!r} is not an Engine; sqlalchemy.create_engine(url) makes one")
        url: URL = engine.url
        sync = self.by_url.get(url) if use is None else self.by_url.setdefault(url, use)
        if sync is None:
            if is_in_memory(engine.sync_engine):
                raise MemstateError("an in-memory SQLite exists in the AsyncEngine's connection only; use a file")
            own = blocking_engine(url)
            sync = self.by_url.setdefault(url, own)
            if sync is own:
                self._own.append(own)  # else another thread was first; this one has no connections
        missing_tables.explain(sync)
        return sync

    def for_threads(self, engine: Engine | AsyncEngine) -> Engine:
        """*engine*, or one like it that a thread can use; also of the sync engine inside an AsyncEngine."""
        if isinstance(engine, Engine) and engine.dialect.is_async:
            from sqlalchemy.ext.asyncio import AsyncEngine

            engine = AsyncEngine(engine)
        return self.sync_engine(engine)

    def dispose(self) -> None:
        """Close the connections of the engines that were made here."""
        for engine in self._own:
            engine.dispose()
