"""The project's original promises, each in its own words."""

from __future__ import annotations

import multiprocessing
import signal
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from pydantic import BaseModel
from sqlalchemy import Engine, select

from memstate_sa import DeliveryError, Fact, MemoryStore, ValidationFailed
from memstate_sa.indexes import InMemoryIndex
from memstate_sa.indexes.base import Point
from memstate_sa.log.changes import replay
from memstate_sa.testing import HashEmbedder
from tests.support import assert_index_holds

pytestmark = pytest.mark.sa20


class Preference(BaseModel):
    key: str
    value: str


def store_on(engine: Engine, index: Any = None, **options: Any) -> MemoryStore:
    store = MemoryStore(engine, index or InMemoryIndex(), embedder=HashEmbedder(), background=False, **options)
    store.register_schema("preference", Preference, unique_by="key")
    return store


def put(store: MemoryStore, key: str, value: str, **labels: Any) -> str:
    return store.commit(Fact(type="preference", payload={"key": key, "value": value}), **labels)


def assert_in_step(store: MemoryStore, **expected: str) -> None:
    """Assert that SQL holds exactly these preferences, and the index their vectors."""
    facts = store.query("preference")
    assert {fact.payload["key"]: fact.payload["value"] for fact in facts} == expected
    store.memory.relay(store.engine).drain()
    texts = {
        f'memstate_fact["{fact.id}"]': f"key: {fact.payload['key']}\nvalue: {fact.payload['value']}" for fact in facts
    }
    assert_index_holds(store.memory.indexes["memory"], store.memory.embedder, texts)


class Failing(InMemoryIndex):
    failing = False

    def upsert(self, points: Sequence[Point]) -> None:
        if self.failing:
            raise ConnectionError("the index is down")
        super().upsert(points)


def test_auto_rollback_when_the_vector_write_fails(engine: Engine) -> None:
    index = Failing()
    with store_on(engine, index, delivery="strict") as store:
        put(store, "drink", "tea")
        index.failing = True
        with pytest.raises(DeliveryError):
            put(store, "food", "plums")
        with pytest.raises(DeliveryError):
            put(store, "drink", "coffee")
        assert [fact.payload["value"] for fact in store.query()] == ["tea"]
        index.failing = False
        assert_in_step(store, drink="tea")


def _crash(url: str, folder: str) -> None:
    """Die between the two stores: the index is written, the transaction is not committed."""
    import os

    from sqlalchemy import create_engine

    from memstate_sa import sqlite
    from tests.torture.fileindex import FileIndex

    engine = create_engine(url)
    if engine.dialect.name == "sqlite":
        sqlite.configure(engine)
    index = FileIndex(Path(folder))
    store = store_on(engine, index, delivery="strict")
    put(store, "drink", "tea")
    upsert = index.upsert

    def die(points: Sequence[Point]) -> None:
        upsert(points)
        os.kill(os.getpid(), signal.SIGKILL)

    index.upsert = die  # type: ignore[method-assign]
    put(store, "food", "a ghost")


@pytest.mark.deep
@pytest.mark.deep_on("postgres")
def test_no_ghost_after_a_crash(engine: Engine, tmp_path: Path) -> None:
    from tests.torture.fileindex import FileIndex

    url = engine.url.render_as_string(hide_password=False)
    child = multiprocessing.get_context("spawn").Process(target=_crash, args=(url, str(tmp_path / "index")))
    child.start()
    child.join(60)
    assert child.exitcode == -signal.SIGKILL
    with store_on(engine, FileIndex(tmp_path / "index")) as store:
        assert "a ghost" not in [hit.fact.payload["value"] for hit in store.search("a ghost")]
        assert_in_step(store, drink="tea")


def test_malformed_payload_is_refused(engine: Engine) -> None:
    with store_on(engine) as store:
        put(store, "drink", "tea")
        for payload in ({"key": "food"}, {"key": 1, "value": "x"}, {}, {"value": "x", "other": 1}):
            with pytest.raises(ValidationFailed) as refused:
                store.commit(Fact(type="preference", payload=payload))
            assert refused.value.errors[0]["loc"][0] in ("key", "value")
        assert_in_step(store, drink="tea")


def test_undo_the_last_n(engine: Engine) -> None:
    with store_on(engine) as store:
        put(store, "drink", "tea")
        first = put(store, "food", "plums")
        put(store, "drink", "coffee")
        store.delete(first)
        assert_in_step(store, drink="coffee")
        store.rollback(3)
        assert_in_step(store, drink="tea")
        store.rollback(1)
        assert_in_step(store)


def test_deterministic_replay(engine: Engine) -> None:
    """The log alone gives the same present and past of every fact, each time."""
    with store_on(engine) as store:
        states = []
        for n in range(6):
            put(store, f"k{n % 3}", f"v{n}", session_id="s")
            states.append({fact.id: fact.payload for fact in store.query()})
        store.rollback(2)
        states.append({fact.id: fact.payload for fact in store.query()})
        with store.transaction() as session:
            changes = store.memory.history(session, Fact)
            assert changes == store.memory.history(session, Fact)
            rows = {fact.id: fact.payload for fact in session.scalars(select(Fact))}
        replayed = [
            {key: row["payload"] for (_, key), row in replay(changes[:n]).items()}
            for n in (1, 2, 3, 4, 5, 6, len(changes))
        ]
        assert replayed == states
        assert replayed[-1] == rows


def test_ephemeral_promoted_discarded_and_all_of_it_undone(engine: Engine) -> None:
    with store_on(engine) as store:
        kept = put(store, "drink", "tea", session_id="s", ephemeral=True)
        put(store, "food", "plums", session_id="s", ephemeral=True)
        assert store.promote_session("s", lambda fact: fact.payload["key"] == "drink") == [kept]
        store.discard_session("s")
        assert_in_step(store, drink="tea")
        store.rollback(1)
        assert_in_step(store, drink="tea", food="plums")
        store.rollback(1)
        assert [fact.ephemeral for fact in store.query()] == [True, True]
        store.rollback(1)
        assert_in_step(store, drink="tea")
        store.rollback(1)
        assert_in_step(store)
