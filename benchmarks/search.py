"""The cost of hydrating and checking hits: memory.search compared with the bare Chroma query that it makes."""

from __future__ import annotations

from random import Random
from statistics import median
from time import perf_counter

from rich.progress import track
from sqlalchemy import insert
from sqlalchemy.orm import Session, sessionmaker

from benchmarks import databases
from benchmarks.facts import Precomputed, texts
from benchmarks.relay import Base, Preference, rows
from benchmarks.report import Target, console, table
from memstate_sa import Memory
from memstate_sa.indexes import ChromaIndex

TARGET = Target(3, " ms")
LIMIT = 5


def run(*, quick: bool = False) -> None:
    count, searches = (2000, 100) if quick else (10_000, 500)
    every = texts(count + searches)
    contents, queries = every[:count], every[count:]
    embedder = Precomputed(every)
    with databases.folder() as home, databases.chroma(home) as client:
        memory = Memory(ChromaIndex(client, "memory"), embedder=embedder)
        memory.track(Preference, text="content", metadata=("user_id", "role"))
        engine = databases.engine(databases.sqlite_url(home))
        Base.metadata.create_all(engine)
        memory.create_tables(engine)
        sessions: sessionmaker[Session] = sessionmaker(engine)
        memory.attach(sessions)
        with sessions() as session:
            session.execute(insert(Preference), rows(contents))
            session.commit()
        memory.relay(engine).drain(timeout=600)
        collection = client.get_collection("memory", embedding_function=None)

        def bare(query: str) -> None:
            collection.query(query_embeddings=[embedder.embed_query(query)], n_results=LIMIT)

        def ours(query: str) -> None:
            with sessions() as session:
                hits = memory.search(session, query, Preference, limit=LIMIT)
            assert len(hits) == LIMIT and hits.complete

        measured: dict[str, list[float]] = {"bare": [], "ours": []}
        chance = Random(0)
        for query in queries[:20]:
            bare(query)
            ours(query)
        for query in track(queries, "search", console=console, transient=True):
            for name, search in chance.sample([("bare", bare), ("ours", ours)], 2):
                start = perf_counter()
                search(query)
                measured[name].append(perf_counter() - start)
        memory.close()
        engine.dispose()

    result = table(f"Search over {count} facts, top {LIMIT}: {searches} interleaved pairs", "", "p50", "p95")
    for name, title in (("bare", "Chroma's query alone"), ("ours", "memory.search, fresh")):
        ordered = sorted(measured[name])
        result.add_row(title, *(f"{ordered[int(len(ordered) * share)] * 1000:.2f} ms" for share in (0.5, 0.95)))
    console.print(result)
    more = (median(measured["ours"]) - median(measured["bare"])) * 1000
    console.print(f"[bold]+{more:.2f} ms[/], {TARGET.verdict(more)}\n")
