"""An agent that remembers, forgets and relays to an index that outlives it, until it is killed.

Each run begins by checking the state that the last run left. No other process may open the index's folder at that time.
"""

from __future__ import annotations

import random
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from sqlalchemy import create_engine, select

from memstate_sa import sqlite
from memstate_sa.indexes import ChromaIndex, FaissIndex, PgVectorIndex, RedisIndex
from memstate_sa.relay import RetryPolicy
from memstate_sa.testing import FlakyFencedIndex, FlakyIndex
from tests.support import Note, Person, Tag, World, expire_leases


@dataclass(frozen=True)
class Place:
    """The database of the facts and the index, perhaps on a server."""

    kind: str
    folder: Path
    url: str
    server: str = ""

    def index(self) -> Any:
        if self.kind == "chroma":
            import chromadb

            return ChromaIndex(chromadb.PersistentClient(str(self.folder / "chroma")), "memory")
        if self.kind == "redis":
            return RedisIndex(self.server)
        return FaissIndex(self.folder / "faiss") if self.kind == "faiss" else PgVectorIndex(self.url)

    def world(self, *, rate: float = 0.0, seed: int = 0) -> World:
        engine = create_engine(self.url)
        if engine.dialect.name == "sqlite":
            sqlite.configure(engine)
        flaky = FlakyIndex if self.kind == "chroma" else FlakyFencedIndex
        return World(engine, flaky(self.index(), rate=rate, seed=seed))


def check(place: Place) -> None:
    """Assert replay(log) == tables, index == f(tables), and that no reported commit is lost."""
    world = place.world()
    expire_leases(world.engine)  # the killed process was the only one with leases
    world.assert_in_step()
    assert world.memory.verify(world.engine).clean
    lines = (place.folder / "committed.log").read_text().splitlines()
    undone = {line.removeprefix("undone ") for line in lines if line.startswith("undone ")}
    committed = {line for line in lines if not line.startswith("undone ")}
    with world.session() as session:
        lost = committed - undone - set(session.scalars(select(Tag.name)))
    # Each run may be killed once between an undo and its line in the file.
    assert len(lost) == len({name.split("-")[0] for name in lost}), lost
    world.memory.close()
    world.engine.dispose()


def run(place: Place, seed: int, started: Connection) -> None:
    """Check, report, and go on until the process is killed."""
    (place.folder / "committed.log").touch()
    check(place)
    chance = random.Random(seed)
    world = place.world(rate=0.1, seed=seed)
    with (
        world.memory.relay(world.engine, page_size=20, policy=RetryPolicy(delay_s=0.01)),
        (place.folder / "committed.log").open("a") as committed,
    ):
        started.send("ready")
        for step in range(100_000):
            name = f"{seed}-{step}"
            with world.session() as session:
                session.add(Tag(name=name, meaning=f"meaning {chance.random()}"))
                session.add(Person(name=name, about=f"about {name}", notes=[Note(topic=name, number=1, content=name)]))
                if (old := session.scalars(select(Person).limit(1).offset(chance.randrange(9))).first()) is not None:
                    if chance.random() < 0.5:
                        old.about = f"changed at {name}"
                    else:
                        session.delete(old)
                if chance.random() < 0.1:
                    session.flush()
                    session.rollback()
                    continue
                session.commit()
            committed.write(name + "\n")
            committed.flush()
            if chance.random() < 0.1:
                with world.session() as session:
                    world.memory.rollback(session)
                    session.commit()
                committed.write(f"undone {name}\n")
                committed.flush()
