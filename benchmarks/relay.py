"""The relay into persistent Chroma, beside Chroma's own bulk upsert of the same vectors."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from statistics import median
from time import perf_counter
from typing import Any
from uuid import uuid4

import chromadb
from rich.progress import track
from sqlalchemy import Text, insert
from sqlalchemy.orm import DeclarativeBase, Mapped, Session, mapped_column, sessionmaker

from benchmarks import databases
from benchmarks.facts import Precomputed, texts
from benchmarks.report import Target, console, ratio, spread, table
from memstate_sa import Memory
from memstate_sa.indexes import ChromaIndex

TARGET = Target(85, " %", at_least=True)
BATCHES = (250, 1000, 2500, None)
"""Batch sizes to try for Chroma; None is the largest it takes."""


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
    count, rounds = (2000, 2) if quick else (10_000, 5)
    contents = texts(count)
    embedder = Precomputed(contents)
    console.print(f"[bold]Chroma's own bulk upsert of {count} points, by batch size[/]")
    rates: dict[int | None, float] = {}
    for batch in BATCHES:
        with databases.folder() as home:
            rates[batch] = bulk(home, contents, embedder, batch)
        console.print(f"  {batch or 'largest'}: {rates[batch]:.0f} points/s")
    best = max(rates, key=lambda batch: rates[batch])

    measured: dict[str, list[float]] = {"Chroma": [], "relay": [], "refill": []}
    for number in track(range(rounds), "relay", console=console, transient=True):
        for name in list(measured)[:: -1 if number % 2 else 1]:
            with databases.folder() as home:
                if name == "Chroma":
                    measured[name].append(bulk(home, contents, embedder, best))
                else:
                    measured[name].append(relay(home, contents, embedder, refill=name == "refill"))

    result = table(f"Delivery of {count} facts to persistent Chroma: median of {rounds}", "", "points/s", "of Chroma's", "quartiles", "target")
    result.add_row(f"Chroma, batches of {best or 'the largest size'}", f"{median(measured['Chroma']):.0f}", "", "", "")
    for name, title in (("relay", "relay, new facts"), ("refill", "relay, new index")):
        share = 100 * ratio(measured[name], measured["Chroma"])
        low, high = spread([100 * a / b for a, b in zip(measured[name], measured["Chroma"], strict=True)])
        result.add_row(
            title, f"{median(measured[name]):.0f}", f"[bold]{share:.0f} %[/]", f"{low:.0f}-{high:.0f}", TARGET.verdict(share)
        )
    console.print(result)


def bulk(home: Path, contents: Sequence[str], embedder: Precomputed, batch: int | None) -> float:
    """Points a second of ``collection.upsert`` with ids, vectors and the same two metadata fields."""
    client = chromadb.PersistentClient(str(home))
    collection = client.create_collection("memory", configuration={"hnsw": {"space": "cosine"}}, embedding_function=None)
    size = batch or client.get_max_batch_size()
    all_rows = rows(contents)
    start = perf_counter()
    for first in range(0, len(all_rows), size):
        some = all_rows[first : first + size]
        collection.upsert(
            ids=[f"preference[{row['id']}]" for row in some],
            embeddings=embedder.embed([row["content"] for row in some]),
            metadatas=[{"user_id": row["user_id"], "role": row["role"]} for row in some],
        )
    took = perf_counter() - start
    client.close()
    return len(contents) / took


def relay(home: Path, contents: Sequence[str], embedder: Precomputed, *, refill: bool) -> float:
    """Keys a second of ``drain()``: of facts just committed, or (*refill*) to an index that is new."""
    client = chromadb.PersistentClient(str(home))
    memory = Memory(ChromaIndex(client, f"memory-{uuid4().hex[:8]}"), embedder=embedder)
    memory.track(Preference, text="content", metadata=("user_id", "role"))
    engine = databases.engine(databases.sqlite_url(home))
    Base.metadata.create_all(engine)
    memory.create_tables(engine)
    sessions: sessionmaker[Session] = sessionmaker(engine)
    memory.attach(sessions)
    deliver = memory.relay(engine)
    if not refill:
        deliver.drain()
    with sessions() as session:
        session.execute(insert(Preference), rows(contents))
        session.commit()
    start = perf_counter()
    delivered = deliver.drain(timeout=600)
    took = perf_counter() - start
    assert delivered == len(contents), delivered
    memory.close()
    engine.dispose()
    client.close()
    return len(contents) / took
