"""`MemoryStore`: memory for people without models of their own."""

from __future__ import annotations

import threading
from collections.abc import Mapping, Sequence
from types import TracebackType
from typing import TYPE_CHECKING, Self, Unpack, cast

from pydantic import BaseModel
from sqlalchemy.engine import URL, Engine
from sqlalchemy.orm import sessionmaker

from memstate_sa.db import sqlite
from memstate_sa.db.engines import engine_of, shown_url
from memstate_sa.fact import Fact
from memstate_sa.indexes.base import VectorIndex
from memstate_sa.memory import Memory
from memstate_sa.options import MemoryOptions, StoreOptions, require_options
from memstate_sa.relay.loop import STOP_TIMEOUT_S
from memstate_sa.runtime import forks
from memstate_sa.store.maintenance import MaintenanceMethods
from memstate_sa.store.reading import ReadingMethods
from memstate_sa.store.writing import ThreadState, WritingMethods
from memstate_sa.tracking.fact_types import FactTypes
from memstate_sa.tracking.payloads import text_of

if TYPE_CHECKING:
    from sqlalchemy.ext.asyncio import AsyncEngine


class MemoryStore(WritingMethods, ReadingMethods, MaintenanceMethods):
    """Facts with a type and a JSON payload, in any SQLite or PostgreSQL database. `AsyncMemoryStore` is for asyncio.

    *index*: a `VectorIndex`, which is then named "memory", or a dict of several by name. Without one there is no
    search.
    *options*: see `StoreOptions`.

    A store creates its tables, and its relay in a background thread keeps the index up to date. A store is thread-safe.
    Close it, or use it as a context manager. The facts that it returns are detached, so they stay usable afterwards.
    ``.memory``, ``.engine`` and ``.relay`` are its `Memory`, its Engine and its `Relay`.

    Raises MemstateError if the URL does not connect, and IndexMismatch if another embedder has filled the index.

    ::

        with MemoryStore("sqlite:///facts.db", InMemoryIndex()) as store:
            store.commit(Fact(type="note", payload={"content": "Ada likes tea"}))
            print(store.search("what does Ada drink?")[0].fact.payload)
    """

    _connects_at_once = True

    def __init__(
        self,
        url_or_engine: str | URL | Engine | AsyncEngine,
        index: VectorIndex | Mapping[str, VectorIndex] | None = None,
        **options: Unpack[StoreOptions],
    ) -> None:
        require_options(MemoryStore, options, StoreOptions)
        names = MemoryOptions.__annotations__
        memory_options = {name: value for name, value in options.items() if name in names}
        self.memory = Memory(index, **cast("MemoryOptions", memory_options))
        self._types = FactTypes(strict=options.get("strict_types", False))
        self.memory.track(
            Fact,
            text=_text,
            metadata=("type", "session_id"),
            schema=self._types.check,
            unique_by=self._types.unique_values,
            immutable=self._is_immutable,
            expires="expires_at",
        )
        self._thread = ThreadState()
        self._closed = self._is_connected = False
        self.engine = (
            engine_of(url_or_engine) if isinstance(url_or_engine, str | URL) else self.memory.sync_engine(url_or_engine)
        )
        self._owns_engine = self.engine is not url_or_engine
        self._is_shared = sqlite.is_in_memory(self.engine)
        self._make_lock()
        forks.in_child(self, MemoryStore._make_lock)
        self._background = options.get("background", True)
        self._drains = self._background and self._is_shared
        self._sessions = sessionmaker(self.engine, expire_on_commit=False)
        self.memory.attach(self._sessions)
        self.relay = self.memory.relay(self.engine)
        if self._connects_at_once:
            try:
                self._open()
            except BaseException:
                self.close()
                raise

    def _make_lock(self) -> None:
        self._lock = threading.RLock()

    def register_schema(
        self,
        type: str,
        model: type[BaseModel],
        *,
        unique_by: str | Sequence[str] | None = None,
        immutable: bool = False,
    ) -> None:
        """Declare that facts of *type* must satisfy the Pydantic *model*.

        *unique_by* names one or more fields of the model. If another fact has the same values, `commit` updates that
        fact. The fields are read as the model reads them, by their aliases too. An *immutable* fact can be added and
        deleted, but not changed.
        """
        self._types.register(type, model, unique_by, immutable=immutable)

    def close(self, timeout: float = STOP_TIMEOUT_S) -> None:
        """Stop the relay and close the index. The next store on this database delivers the rest.

        See `Memory.close` for *timeout*.
        """
        self._closed = True
        self.memory.close(timeout)
        if self._owns_engine:
            self.engine.dispose()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def __repr__(self) -> str:
        indexes = ", ".join(self.memory.indexes) or "none"
        return f"<MemoryStore [{shown_url(self.engine.url)} | index: {indexes} | {self._state()}]>"

    def _state(self) -> str:
        if self._closed:
            return "closed"
        if self._drains:
            return "relay: after each commit"
        return f"relay: {'running' if self.relay.is_running else 'stopped'}"


def _text(fact: Fact) -> str:
    return text_of(fact.payload)
