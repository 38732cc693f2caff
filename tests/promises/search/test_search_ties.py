"""Facts at one distance are ordered by key, so a longer search begins with the hits of a shorter one."""

from __future__ import annotations

import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import Engine

from memstate_sa import Fact, MemoryStore
from memstate_sa.indexes import InMemoryIndex, VectorIndex
from memstate_sa.indexes.base import Filter, Match, Vector
from memstate_sa.testing import HashEmbedder

TEXTS = ("strong coffee", "green tea", "only water")


class Noisy(InMemoryIndex):
    """Like any real index: each call orders ties differently, and their distances differ in the last digits."""

    chance = random.Random(7)

    def query(
        self, vector: Vector, limit: int, *, where: Filter | None = None, ids: Sequence[str] | None = None
    ) -> list[Match]:
        found = super().query(vector, 1 << 20, where=where, ids=ids)
        found = [match._replace(distance=match.distance + self.chance.uniform(0, 3e-7)) for match in found]
        return sorted(found, key=lambda match: match.distance)[:limit]


def faiss(path: Path) -> VectorIndex:
    pytest.importorskip("faiss")
    from memstate_sa.indexes import FaissIndex

    return FaissIndex(path / "faiss")


def qdrant(path: Path) -> VectorIndex:
    client = pytest.importorskip("qdrant_client").QdrantClient(":memory:")
    from memstate_sa.indexes import QdrantIndex

    return QdrantIndex(client, "ties")


INDEXES: dict[str, Any] = {
    "in memory": lambda path: InMemoryIndex(),
    "noisy": lambda path: Noisy(),
    "faiss": faiss,
    "qdrant": qdrant,
}


@pytest.fixture(params=INDEXES)
def facts(request: pytest.FixtureRequest, engine: Engine, tmp_path: Path) -> Any:
    with MemoryStore(engine, INDEXES[request.param](tmp_path), embedder=HashEmbedder(), background=False) as made:
        yield made


@pytest.mark.deep_on("qdrant")
def test_a_longer_search_begins_with_the_hits_of_a_shorter_one(facts: MemoryStore) -> None:
    """This holds at each limit, with criteria and without. The same kind: some facts are not delivered yet."""
    with facts.transaction():
        for n in range(60):
            facts.commit(Fact(type="drink", payload={"text": TEXTS[n % 3]}, id=f"{n * 37 % 60:02}"))
    facts.memory.relay(facts.engine).drain(60)
    with facts.transaction():
        for n in range(60, 66):  # undelivered
            facts.commit(Fact(type="drink", payload={"text": TEXTS[n % 3]}, id=f"{n * 37 % 66:02}-new"))
    everything = [hit.fact.id for hit in facts.search("coffee", limit=100)]
    groups = [everything[start : start + 22] for start in (0, 22, 44)]
    assert [sorted(group) for group in groups] == groups and len(set(everything)) == 66
    for limit in (1, 5, 10, 21, 22, 23, 44, 60):
        assert [hit.fact.id for hit in facts.search("coffee", limit=limit)] == everything[:limit]
        assert [hit.fact.id for hit in facts.search("coffee", limit=limit, type="drink")] == everything[:limit]


@pytest.mark.deep_on("qdrant")
def test_pages_of_a_store_show_each_item_once(facts: MemoryStore) -> None:
    """Items may have several texts, and the nearest counts. There are more namespaces than an index filter can name."""
    pytest.importorskip("langgraph.store.base")
    from langgraph.store.base import PutOp

    from memstate_sa.integrations.langgraph import MemStateStore

    store = MemStateStore(facts, index={"fields": ["text", "notes[*]"]})
    store.setup()
    values = [{"text": TEXTS[n % 3], "notes": [TEXTS[(n + 1) % 3]] * (n % 2)} for n in range(60)]
    store.batch([PutOp(("users", f"u{n}"), "drink", value) for n, value in enumerate(values)])
    facts.memory.relay(facts.engine).drain(60)
    for size in (7, 10, 45):
        pages = [store.search(("users",), query="coffee", limit=size, offset=start) for start in range(0, 60, size)]
        shown = [item.namespace[1] for page in pages for item in page]
        assert sorted(shown) == sorted(f"u{n}" for n in range(60))
        assert shown == [item.namespace[1] for item in store.search(("users",), query="coffee", limit=60)]
