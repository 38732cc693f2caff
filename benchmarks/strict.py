"""The cost of a commit of one row with strict delivery, compared with relay delivery and without tracking."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from statistics import median
from time import perf_counter

from sqlalchemy import Engine
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column, sessionmaker

from benchmarks import databases
from benchmarks.facts import texts
from benchmarks.report import console, interleaved, ratio, table
from memstate_sa import Memory
from memstate_sa.embedders import WordLlamaEmbedder
from memstate_sa.indexes import ChromaIndex, InMemoryIndex, VectorIndex

INDEXES = ("InMemoryIndex", "Chroma, persistent")


def run(*, quick: bool = False) -> None:
    with databases.folder() as home, databases.postgres_server() as server, ExitStack() as stack:
        for database in ("SQLite, file", "PostgreSQL"):
            for index in INDEXES:

                def new_engine(database: str = database) -> Engine:
                    if database == "PostgreSQL":
                        url = stack.enter_context(databases.postgres_database(server))
                    else:
                        url = databases.sqlite_url(home)
                    engine = databases.engine(url)
                    stack.callback(engine.dispose)
                    return engine

                measure(database, index, new_engine, home, quick=quick)


def measure(database: str, index: str, new_engine: Callable[[], Engine], home: Path, *, quick: bool) -> None:
    """Seconds a commit. A relay runs for both kinds of delivery. With strict delivery it has nothing to write."""
    rounds, count = (3, 5) if quick else (21, 40)
    contents = iter(texts((rounds + 1) * count * 3))
    with ExitStack() as stack:

        def new_index() -> VectorIndex:
            if index == "InMemoryIndex":
                return InMemoryIndex()
            return ChromaIndex(stack.enter_context(databases.chroma(home)), "memory")

        contenders = {
            "plain": plain(new_engine(), count, contents),
            "relay": remembered("relay", new_engine(), new_index(), count, contents, stack),
            "strict": remembered("strict", new_engine(), new_index(), count, contents, stack),
        }
        for contender in contenders.values():
            contender()
        measured = interleaved(contenders, rounds)
    result = table(
        f"Commit of one row, {database}, {index}: median of {rounds} interleaved bursts of {count}",
        "", "a commit", "to plain", "to relay",
    )  # fmt: skip
    for name, seconds in measured.items():
        result.add_row(
            name,
            f"{median(seconds) * 1000:.2f} ms",
            *(f"{ratio(seconds, measured[other]):.1f}×" for other in ("plain", "relay")),
        )
    console.print(result)


def plain(engine: Engine, count: int, contents: Iterator[str]) -> Callable[[], float]:
    return _committing(engine, None, count, contents)


def remembered(
    delivery: str, engine: Engine, index: VectorIndex, count: int, contents: Iterator[str], stack: ExitStack
) -> Callable[[], float]:
    memory = Memory(index, embedder=WordLlamaEmbedder(), delivery="strict" if delivery == "strict" else "relay")
    commit = _committing(engine, memory, count, contents)
    stack.callback(memory.close)
    stack.enter_context(memory.relay(engine))

    def burst() -> float:
        seconds = commit()
        while memory.status(engine)["memory"].pending:  # the next contender needs the machine to itself
            time.sleep(0.005)
        return seconds

    return burst


def _committing(engine: Engine, memory: Memory | None, count: int, contents: Iterator[str]) -> Callable[[], float]:
    class Base(DeclarativeBase):
        pass

    class Note(Base):
        __tablename__ = "note"
        id: Mapped[int] = mapped_column(primary_key=True)
        content: Mapped[str]

    sessions = sessionmaker(engine)
    Base.metadata.create_all(engine)
    if memory is not None:
        memory.track(Note, text="content")
        memory.attach(sessions)
        memory.create_tables(engine)

    def commit() -> float:
        start = perf_counter()
        for _ in range(count):
            with sessions() as session:
                session.add(Note(content=next(contents)))
                session.commit()
        return (perf_counter() - start) / count

    return commit
