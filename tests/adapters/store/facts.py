"""Stores of tests, and facts for them."""

from __future__ import annotations

from typing import Any

from sqlalchemy import Engine

from memstate_sa import AsyncMemoryStore, Fact, MemoryStore
from memstate_sa.indexes import InMemoryIndex, VectorIndex
from memstate_sa.testing import HashEmbedder


def opened(where: Engine | str, index: VectorIndex | None = None, **options: Any) -> MemoryStore:
    options = {"background": False, **options}
    return MemoryStore(where, index or InMemoryIndex(), embedder=HashEmbedder(), **options)


def opened_async(where: Engine | str, index: VectorIndex | None = None, **options: Any) -> AsyncMemoryStore:
    options = {"background": False, **options}
    return AsyncMemoryStore(where, index or InMemoryIndex(), embedder=HashEmbedder(), **options)


def note(content: str, **more: Any) -> Fact:
    return Fact(type="note", payload={"content": content, **more})


def contents(store: MemoryStore, /, **criteria: Any) -> list[str]:
    return [fact.payload["content"] for fact in store.query(**criteria)]
