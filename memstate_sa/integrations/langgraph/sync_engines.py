"""The sync engine of a checkpointer or a store, and its room for open steps."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from sqlalchemy.engine import URL, Engine
from sqlalchemy.pool import QueuePool

from memstate_sa.db import missing_tables
from memstate_sa.db.dialects import database_of
from memstate_sa.db.engines import engine_of
from memstate_sa.errors import MemstateError
from memstate_sa.memory import Memory
from memstate_sa.store import MemoryStore

if TYPE_CHECKING:
    from sqlalchemy.ext.asyncio import AsyncEngine

_UNBOUNDED_ROOM = 64


def sync_engine(where: MemoryStore | Engine | AsyncEngine | URL | str, memory: Memory | None) -> Engine:
    """The engine of *where*, or a new sync engine for its URL."""
    engine = _sync_engine(where, memory)
    missing_tables.explain(engine)
    return engine


def _sync_engine(where: MemoryStore | Engine | AsyncEngine | URL | str, memory: Memory | None) -> Engine:
    if isinstance(where, (MemoryStore, Engine)):
        return where if isinstance(where, Engine) else where.engine
    if memory is not None and not isinstance(where, (str, URL)):
        return memory.sync_engine(where)
    url = getattr(where, "url", where)
    if not isinstance(url, (str, URL)):
        raise MemstateError(f"Invalid database {where!r}: pass a MemoryStore, an Engine or a URL.")
    return engine_of(url)


def room_for_steps(engine: Engine) -> int:
    """The number of steps that may be open at the same time: one for each connection, but only one on SQLite."""
    if database_of(engine).has_one_writer:
        return 1
    pool: Any = engine.pool
    if not isinstance(pool, QueuePool) or pool.size() == 0 or pool._max_overflow < 0:  # noqa: SLF001  # SQLAlchemy has no public way
        return _UNBOUNDED_ROOM
    return pool.size() + pool._max_overflow  # noqa: SLF001
