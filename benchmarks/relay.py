"""Delivery by the relay to persistent Chroma, compared with Chroma's own bulk upsert of the same vectors."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from statistics import median
from time import perf_counter
from typing import Any

from sqlalchemy import Text, insert
from sqlalchemy.orm import DeclarativeBase, Mapped, Session, mapped_column, sessionmaker

from benchmarks import databases
from benchmarks.facts import Precomputed, texts
from benchmarks.report import Target, console, interleaved, ratio, spread, table
from memstate_sa import Memory
from memstate_sa.indexes import ChromaIndex

TARGET = Target(85, " %", at_least=True)
BATCHES = (250, 1000, 2500, None)
"""Batch sizes to try for Chroma. None is the largest that it accepts."""


class Base(DeclarativeBase):
    pass


class Preference(Base):
    __tablename__ = "preference"

    id: Mapped[int] = mapped_column(primary_key=True)
    user_id: Mapped[str]
    role: Mapped[str]
    content: Mapped[str] = mapped_column(Text)


def rows(contents: Sequence[str]) -> list[dict[str, Any]]:
    return [{"id": n, "user_id": f"u{n % 50}", "role": "preference", "content": c} for n, c in enumerate(contents)]


def run(*, quick: bool = False) -> None:
    count, rounds = (2000, 2) if quick else (10_000, 7)
    contents = texts(count)
    embedder = Precomputed(contents)
    trials = interleaved({str(size): partial(bulk, contents, embedder, size) for size in BATCHES}, 1 if quick else 2)
    best = max(BATCHES, key=lambda size: median(trials[str(size)]))
    for size in BATCHES:
        console.print(
            f"Chroma alone, batches of {size or 'the largest size'}: {median(trials[str(size)]):.0f} points/s"
        )

    alone, marked = "Chroma alone", "Chroma alone, points marked as ours are"
    contenders: dict[str, Callable[[], float]] = {
        alone: partial(bulk, contents, embedder, best),
        marked: partial(bulk, contents, embedder, best, marked=True),
        "relay, new facts": partial(relay, contents, embedder),
        "relay, new index": partial(relay, contents, embedder, refill=True),
    }
    measured = interleaved(contenders, rounds)

    result = table(
        f"Delivery of {count} facts to persistent Chroma, batches of {best or 'the largest size'}: "
        f"median of {rounds} interleaved rounds",
        "", "points/s", "of Chroma alone", "quartiles", "target", "of marked points",
    )  # fmt: skip
    for name, rates in measured.items():
        share = 100 * ratio(rates, measured[alone])
        low, high = spread([100 * a / b for a, b in zip(rates, measured[alone], strict=True)])
        ours = name.startswith("relay")
        result.add_row(
            name,
            f"{median(rates):.0f}",
            "" if name == alone else f"[bold]{share:.0f} %[/]",
            "" if name == alone else f"{low:.0f}-{high:.0f}",
            TARGET.verdict(share) if ours else "",
            f"{100 * ratio(rates, measured[marked]):.0f} %" if ours else "",
        )
    console.print(result)


def bulk(contents: Sequence[str], embedder: Precomputed, batch: int | None, *, marked: bool = False) -> float:
    """Points a second of ``collection.upsert`` with ids, vectors and the same two metadata fields.

    With *marked*, each point also has a fingerprint of its content, like ours.
    """
    all_rows = rows(contents)
    with databases.folder() as home, databases.chroma(home) as client:
        collection = client.create_collection(
            "memory", configuration={"hnsw": {"space": "cosine"}}, embedding_function=None
        )
        size = batch or client.get_max_batch_size()
        start = perf_counter()
        for first in range(0, len(all_rows), size):
            part = all_rows[first : first + size]
            marks = {"memstate_sa": "0123456789abcdef0123456789abcdef"} if marked else {}
            collection.upsert(
                ids=[f"preference[{row['id']}]" for row in part],
                embeddings=embedder.embed([row["content"] for row in part]),
                metadatas=[{"user_id": row["user_id"], "role": row["role"], **marks} for row in part],
            )
        return len(contents) / (perf_counter() - start)


def relay(contents: Sequence[str], embedder: Precomputed, *, refill: bool = False) -> float:
    """Keys a second of ``drain()``, for new facts, or for a new index with *refill*."""
    with databases.folder() as home, databases.chroma(home) as client:
        memory = Memory(ChromaIndex(client, "memory"), embedder=embedder)
        memory.track(Preference, text="content", metadata=("user_id", "role"))
        engine = databases.engine(databases.sqlite_url(home))
        Base.metadata.create_all(engine)
        memory.create_tables(engine)
        sessions: sessionmaker[Session] = sessionmaker(engine)
        memory.attach(sessions)
        courier = memory.relay(engine)
        if not refill:
            courier.drain()
        with sessions() as session:
            session.execute(insert(Preference), rows(contents))
            session.commit()
        start = perf_counter()
        delivered = courier.drain(timeout=600)
        took = perf_counter() - start
        assert delivered >= len(contents)
        memory.close()
        engine.dispose()
    return len(contents) / took
