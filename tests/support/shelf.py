"""A store of LangGraph, and its expected content."""

from __future__ import annotations

from datetime import timedelta
from typing import Any

from sqlalchemy import Engine, select
from sqlalchemy.orm import sessionmaker

from memstate_sa import Memory
from memstate_sa.db.codec import encode_key
from memstate_sa.db.tables import utcnow
from memstate_sa.indexes import InMemoryIndex
from memstate_sa.integrations.langgraph import MemStateStore
from memstate_sa.integrations.langgraph.item_rows import ItemRow
from memstate_sa.log.changes import replay
from memstate_sa.testing import HashEmbedder
from tests.support import assert_index_holds

NOTES = ("notes",)


class Shelf:
    """A store, its memory, and its database."""

    def __init__(self, engine: Engine, **options: Any) -> None:
        self.engine, self.index, self.embedder = engine, InMemoryIndex(), HashEmbedder()
        self.memory = Memory(self.index, embedder=self.embedder)
        self.store = MemStateStore(engine, memory=self.memory, **options)
        self.store.setup()
        self.sessions = sessionmaker(engine)
        self.memory.attach(self.sessions)
        self.now = utcnow()
        self.store._now = lambda: self.now

    def another(self, **options: Any) -> MemStateStore:
        store = MemStateStore(self.engine, memory=self.memory, **options)
        store._now = lambda: self.now
        return store

    def later(self, minutes: float) -> None:
        self.now += timedelta(minutes=minutes)

    def ops(self, key: str, namespace: tuple[str, ...] = NOTES) -> list[str]:
        return [change.op for change in self.store.history(namespace, key)]

    def rollback(self, **which: Any) -> None:
        with self.sessions() as session:
            self.memory.rollback(session, **which)
            session.commit()

    def values(self, *namespace: str) -> dict[str, Any]:
        return {item.key: item.value for item in self.store.search(namespace, limit=1000, refresh_ttl=False)}

    def texts(self) -> dict[str, list[str | None]]:
        """The embedded texts of each item's rows, by the item's key."""
        found: dict[str, list[str | None]] = {}
        with self.sessions() as session:
            for row in session.scalars(select(ItemRow).order_by(ItemRow.id)):
                assert row.n == len(found.get(row.key, ()))
                assert (row.value is None) == (row.n > 0)
                found.setdefault(row.key, []).append(row.text)
        return found

    def assert_in_step(self) -> None:
        """Assert replay(log) == the table, and the index == f(the table), by content."""
        self.memory.relay(self.engine).drain()
        with self.sessions() as session:
            replayed = {key: dict(row) for (_, key), row in replay(self.memory.history(session, ItemRow)).items()}
            rows = [dict(row) for row in session.execute(select(ItemRow.__table__)).mappings()]
        assert replayed == {row["id"]: row for row in rows}
        expected = {"memstate_item" + encode_key([row["id"]]): row["text"] for row in rows if row["text"]}
        assert_index_holds(self.index, self.embedder, expected)
