"""An application that moves between two Chroma collections while it writes and searches, until it is killed."""

from __future__ import annotations

import os
import random
import threading
import time
import traceback
from multiprocessing.connection import Connection
from pathlib import Path

import chromadb
from sqlalchemy import create_engine, delete
from sqlalchemy.orm import Session

from memstate_sa import DeliveryError, Hits, IndexBroken, sqlite
from memstate_sa.db.tables import refill
from memstate_sa.indexes import ChromaIndex
from tests.support import Tag
from tests.support.processes import Process, Shop, embedded_by


def moving_in(folder: Path, url: str) -> Process:
    engine = create_engine(url)
    sqlite.configure(engine)
    shop = Shop(engine)
    client = chromadb.PersistentClient(str(folder / "chroma"))
    shop.indexes = {name: ChromaIndex(client, name) for name in shop.indexes}
    return shop.moving()


def check(folder: Path, url: str) -> None:
    """Assert that an interrupted move resumes, ends, and leaves both indexes equal to the tables."""
    moving = moving_in(folder, url)
    drain(moving)
    moving.memory.reindex(moving.engine, timeout=60)
    assert moving.asks("item 1") == "memory_v2"
    moving.assert_in_step("memory", "memory_v2")
    moving.memory.close()


def drain(moving: Process) -> None:
    """Deliver all changes. If a kill has damaged Chroma's files, repair them as the error says."""
    relay = moving.memory.relay(moving.engine)
    try:
        relay.drain()
    except DeliveryError as error:
        if not isinstance(error.__cause__, IndexBroken):
            raise
        moving.memory.verify(moving.engine, repair=True)
        relay.drain()


def run(folder: Path, url: str, seed: int, started: Connection) -> None:
    """Search, write, and reindex back and forth, until the process is killed."""
    moving = moving_in(folder, url)
    chance = random.Random(seed)
    turn = threading.Lock()
    drain(moving)
    moving.memory.relay(moving.engine).start()
    started.send("ready")

    def write() -> None:
        while True:
            with turn, moving.sessions() as session:
                for _ in range(5):
                    name = f"t{chance.randrange(3000)}"
                    if chance.random() < 0.2:
                        session.execute(delete(Tag).where(Tag.name == name))
                    else:
                        session.merge(Tag(name=name, meaning=f"item {chance.randrange(5000)}"))
                session.commit()

    def answer(session: Session, query: str) -> Hits[Tag]:
        """Search when the relay has nearly caught up. No other thread writes during this time."""
        deadline = time.monotonic() + 60
        while not (hits := moving.memory.search(session, query, Tag, limit=10)).complete:
            assert time.monotonic() < deadline
        return hits

    def look() -> None:
        try:
            while True:
                query = f"item {chance.randrange(5000)}"
                with turn, moving.sessions() as session:
                    # Chroma is approximate, and a match during a write may mix two writes for a moment.
                    assert any(embedded_by(answer(session, query), query) for _ in range(5))
        except BaseException:
            traceback.print_exc()
            os._exit(1)

    for work in (write, look):
        threading.Thread(target=work, daemon=True).start()
    while True:
        moving.memory.reindex(moving.engine)
        moving.memory.reindex_back(moving.engine)
        with moving.engine.begin() as connection:  # as if the index were new, so that there is always work to interrupt
            connection.execute(refill.update().where(refill.c.index == "memory_v2").values(done=False, position=None))
