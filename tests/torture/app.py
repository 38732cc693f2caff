"""The application under torture: two tracked classes, four indexes that fail, and a receipt for every transaction."""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path

import chromadb
from chromadb.api import ClientAPI
from sqlalchemy import Engine, String, create_engine
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column, sessionmaker

from memstate_sa import Memory
from memstate_sa.indexes import ChromaIndex, PgVectorIndex, RedisIndex
from memstate_sa.testing import HashEmbedder
from tests.support.redis_server import redis_client
from tests.torture.faults import FaultyFencedIndex, FaultyIndex, Injector
from tests.torture.fileindex import FileIndex

WRITERS = 3
WORKERS = 3
COLLECTION = "memory"
VECTORS = "memory_vectors"


class Base(DeclarativeBase):
    pass


class Recollection(Base):
    """A fact of one writer, which therefore knows its expected value."""

    __tablename__ = "recollection"
    id: Mapped[str] = mapped_column(String(40), primary_key=True)
    writer: Mapped[int]
    shelf: Mapped[int]
    content: Mapped[str | None]
    mark: Mapped[str] = mapped_column(String(40))


class Habit(Base):
    """One of a few facts over which all writers fight."""

    __tablename__ = "habit"
    topic: Mapped[str] = mapped_column(String(40), primary_key=True)
    number: Mapped[int] = mapped_column(primary_key=True, autoincrement=False)
    content: Mapped[str]
    mark: Mapped[str] = mapped_column(String(40))


class Receipt(Base):
    """Not tracked. Every transaction adds one before its commit, so that the audit can see whether it committed.

    Points carry the mark of the transaction that wrote them. A mark without a receipt was never committed.
    """

    __tablename__ = "receipt"
    mark: Mapped[str] = mapped_column(String(40), primary_key=True)


@dataclass(frozen=True)
class Setting:
    """The settings that every process of a run shares."""

    folder: Path
    url: str
    chroma_port: int
    redis_port: int
    seed: int
    lease_s: float = 2.5
    rate: float = 0.1

    def engine(self, name: str) -> Engine:
        return create_engine(self.url, connect_args={"application_name": name})


class App:
    """One process's application. Its indexes fail until the file ``calm`` exists."""

    def __init__(self, setting: Setting, name: str, life: int = 0) -> None:
        self.setting = setting
        self.engine = setting.engine(name)
        self.embedder = HashEmbedder()
        self.injector = Injector(setting.folder, f"{name}.{life}", f"{setting.seed} {name} {life}", setting.rate)
        self.chroma = ChromaIndex(chroma_client(setting.chroma_port), COLLECTION)
        self.file = FileIndex(setting.folder / "index.db")
        self.pgvector = PgVectorIndex(self.engine, VECTORS)  # beside the facts, and stopped with them
        self.redis = RedisIndex(redis_client(setting.redis_port))
        self.memory = Memory(
            {
                "chroma": FaultyIndex(self.chroma, "chroma", self.injector, setting.lease_s),
                "file": FaultyFencedIndex(self.file, "file", self.injector, setting.lease_s),
                "pgvector": FaultyFencedIndex(self.pgvector, "pgvector", self.injector, setting.lease_s),
                "redis": FaultyFencedIndex(self.redis, "redis", self.injector, setting.lease_s),
            },
            embedder=self.embedder,
        )
        self.memory.track(Recollection, text="content", metadata=("writer", "shelf", "mark"))
        self.memory.track(Habit, text=habit_text, metadata=("topic", "mark"))
        self.sessions = sessionmaker(self.engine)
        self.memory.attach(self.sessions)

    def close(self) -> None:
        self.memory.close()
        self.engine.dispose()


def habit_text(habit: Habit) -> str:
    return f"{habit.topic} {habit.number}: {habit.content}"


def chroma_client(port: int, timeout: float = 60.0) -> ClientAPI:
    """Its constructor already asks the server, which may be down."""
    deadline = time.monotonic() + timeout
    while True:
        try:
            return chromadb.HttpClient(host="127.0.0.1", port=port)
        except Exception:
            if time.monotonic() > deadline:
                raise
            time.sleep(0.2)
