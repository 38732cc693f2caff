"""A shop whose index is changed by other processes."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from sqlalchemy import Engine, select
from sqlalchemy.orm import sessionmaker

from memstate_sa import Hits, Memory
from memstate_sa.indexes import InMemoryIndex
from memstate_sa.search.hits import cosine_distance
from memstate_sa.testing import HashEmbedder
from tests.support import Base, Tag, assert_index_holds, texts

EMBEDDERS = {"memory": HashEmbedder(64), "memory_v2": HashEmbedder(48)}


class Shop:
    """An application that moves from one index to another, while its processes are redeployed one by one."""

    def __init__(self, engine: Engine) -> None:
        self.engine = engine
        self.indexes: dict[str, Any] = {"memory": InMemoryIndex(), "memory_v2": InMemoryIndex()}
        Base.metadata.create_all(engine)

    def process(self, *names: str, successors: Mapping[str, str] | None = None, **options: Any) -> Process:
        return Process(self, names, successors, options)

    def before(self) -> Process:
        return self.process("memory")

    def moving(self, **options: Any) -> Process:
        return self.process("memory", "memory_v2", successors={"memory": "memory_v2"}, **options)

    def after(self) -> Process:
        return self.process("memory_v2")


class Process:
    def __init__(
        self, shop: Shop, names: tuple[str, ...], successors: Mapping[str, str] | None, options: Mapping[str, Any]
    ) -> None:
        self.engine = shop.engine
        self.indexes = {name: shop.indexes[name] for name in names}
        embedders = {name: EMBEDDERS[name] for name in names}
        self.memory = Memory(self.indexes, embedder=embedders, successors=successors, **options)
        self.memory.track(Tag, text="meaning", metadata=("name",), index=names[0])
        self.sessions = sessionmaker(shop.engine)
        self.memory.attach(self.sessions)
        self.memory.create_tables(shop.engine)

    def say(self, **tags: str) -> None:
        with self.sessions() as session:
            for name, meaning in tags.items():
                session.merge(Tag(name=name, meaning=meaning))
            session.commit()

    def search(self, query: str, **options: Any) -> Hits[Tag]:
        with self.sessions() as session:
            return self.memory.search(session, query, Tag, **options)

    def asks(self, query: str = "something to drink") -> str:
        """The index that a search asks. The distances of hits show it, because no two embedders give the same ones."""
        [name] = embedded_by(self.search(query), query)
        return name

    def assert_in_step(self, *names: str) -> None:
        self.memory.relay(self.engine).drain()
        assert self.memory.verify(self.engine).clean
        with self.sessions() as session:
            expected = texts("tag", session.scalars(select(Tag)), lambda t: [t.name], lambda t: t.meaning)
        for name in names:
            assert_index_holds(self.indexes[name], EMBEDDERS[name], expected)


def embedded_by(hits: Hits[Tag], query: str) -> set[str]:
    """The embedders that explain every distance."""
    found = set()
    for name, embedder in EMBEDDERS.items():
        vectors = embedder.embed([query, *(hit.fact.meaning for hit in hits)])
        distances = [cosine_distance(vectors[0], vector) for vector in vectors[1:]]
        if all(abs(hit.distance - distance) < 1e-4 for hit, distance in zip(hits, distances, strict=True)):
            found.add(name)
    return found
