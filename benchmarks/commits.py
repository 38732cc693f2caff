"""Single-fact commits a second: MemoryStore with its relay running, and memstate, on the same Chroma and embedder."""

from __future__ import annotations

from collections.abc import Callable
from statistics import median
from time import perf_counter
from typing import Any

import chromadb
from chromadb import Documents, EmbeddingFunction, Embeddings

from benchmarks import databases
from benchmarks.facts import texts
from benchmarks.report import Target, console, interleaved, ratio, table
from memstate_sa import Fact, MemoryStore
from memstate_sa.embedders import WordLlamaEmbedder
from memstate_sa.indexes import ChromaIndex

TARGET = Target(10, at_least=True)
OURS_PER_THEIRS = 10
"""Ours commits this many times as often in a round, so that both are measured for about as long."""


class ForChroma(EmbeddingFunction[Documents]):
    """Our embedder as Chroma's, for memstate."""

    def __init__(self) -> None:
        self._embedder = WordLlamaEmbedder()

    def __call__(self, input: Documents) -> Embeddings:
        return list(self._embedder.embed(input))

    @staticmethod
    def name() -> str:
        return "wordllama"

    def get_config(self) -> dict[str, Any]:
        return {}

    @staticmethod
    def build_from_config(config: dict[str, Any]) -> ForChroma:
        return ForChroma()


def run(*, quick: bool = False) -> None:
    import memstate
    from memstate.backends.sqlite import SQLiteStorage
    from memstate.integrations.chroma import ChromaSyncHook

    rounds, per_round = (4, 25) if quick else (16, 50)
    every = iter(texts(2 * rounds * per_round * (OURS_PER_THEIRS + 1)))
    with databases.folder() as home:
        hook = ChromaSyncHook(
            chromadb.PersistentClient(str(home / "theirs")),
            "memory",
            embedding_fn=ForChroma(),
            text_field="content",
            metadata_fields=["role", "user_id"],
        )
        storage = SQLiteStorage(str(home / "theirs.sqlite3"))
        theirs = memstate.MemoryStore(storage, hooks=[hook])
        index = ChromaIndex(chromadb.PersistentClient(str(home / "ours")), "memory")
        with MemoryStore(databases.sqlite_url(home), index) as ours:

            def commit_theirs(content: str) -> None:
                theirs.commit(memstate.Fact(type="preference", payload=payload(content)))

            def commit_ours(content: str) -> None:
                ours.commit(Fact(type="preference", payload=payload(content)))

            latencies: dict[str, list[float]] = {"memstate": [], "memstate_sa": []}

            def burst(name: str, commit: Callable[[str], None], count: int) -> Callable[[], float]:
                def measure() -> float:
                    start = before = perf_counter()
                    for _ in range(count):
                        commit(next(every))
                        now = perf_counter()
                        latencies[name].append(now - before)
                        before = now
                    return count / (before - start)

                return measure

            commit_theirs(next(every))
            commit_ours(next(every))
            rates = interleaved(
                {
                    "memstate": burst("memstate", commit_theirs, per_round),
                    "memstate_sa": burst("memstate_sa", commit_ours, per_round * OURS_PER_THEIRS),
                },
                rounds,
            )
            lag = ours.memory.status(ours.engine)["memory"].pending
            start = perf_counter()
            ours.memory.relay(ours.engine)  # the one of the store holds the lease; we only wait for it
            while ours.memory.status(ours.engine)["memory"].pending:
                pass
            caught_up = perf_counter() - start
        storage.close()

    result = table(
        f"Single-fact commits, SQLite and persistent Chroma: median of {rounds} interleaved rounds",
        "", "commits/s", "p50", "p99",
    )  # fmt: skip
    for name in ("memstate", "memstate_sa"):
        ordered = sorted(latencies[name])
        result.add_row(
            name,
            f"{median(rates[name]):.0f}",
            f"{median(ordered) * 1000:.2f} ms",
            f"{ordered[int(len(ordered) * 0.99)] * 1000:.2f} ms",
        )
    console.print(result)
    times = ratio(rates["memstate_sa"], rates["memstate"])
    console.print(
        f"ratio [bold]{times:.1f}×[/], {TARGET.verdict(times)}; at the end {lag} keys were still to be delivered, which "
        f"took {caught_up:.1f} s\n"
    )


def payload(content: str) -> dict[str, str]:
    return {"content": content, "role": "preference", "user_id": "u1"}
