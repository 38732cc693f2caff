"""Single-fact commits a second: MemoryStore with a running relay, and memstate, with the same Chroma and embedder."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from statistics import median
from time import perf_counter
from typing import Any

from chromadb import Documents, EmbeddingFunction, Embeddings
from rich.progress import track

from benchmarks import databases
from benchmarks.facts import texts
from benchmarks.report import Target, console, ratio, table
from memstate_sa import Fact, MemoryStore
from memstate_sa.embedders import WordLlamaEmbedder
from memstate_sa.indexes import ChromaIndex

TARGET = Target(10, at_least=True)
OURS_PER_THEIRS = 10
"""Ours makes this many times more commits in a round, so that both take about the same time."""


class ForChroma(EmbeddingFunction[Documents]):
    """Our embedder as a Chroma embedding function, for memstate."""

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


class Contender:
    """A store that commits one fact at a time, and its measurements."""

    def __init__(self, title: str, commit: Callable[[str], object], count: int, settled: Callable[[], bool]) -> None:
        self.title = title
        self.rates: list[float] = []
        self.delivered: list[float] = []
        self.latencies: list[float] = []
        self._commit = commit
        self._count = count
        self._settled = settled

    def burst(self, contents: Iterator[str]) -> None:
        """Commit, then wait until the index has caught up, so that the next contender has the machine to itself."""
        start = before = perf_counter()
        for _ in range(self._count):
            self._commit(next(contents))
            now = perf_counter()
            self.latencies.append(now - before)
            before = now
        self.rates.append(self._count / (before - start))
        while not self._settled():
            time.sleep(0.005)
        self.delivered.append(self._count / (perf_counter() - start))


def run(*, quick: bool = False) -> None:
    rounds, per_round = (4, 25) if quick else (15, 60)
    contents = iter(texts((rounds + 1) * per_round * (2 * OURS_PER_THEIRS + 1)))
    with databases.folder() as home, ExitStack() as stack:
        contenders = [
            theirs(home, per_round, stack),
            ours(home, per_round * OURS_PER_THEIRS, stack, "memstate_sa", None),
            ours(home, per_round * OURS_PER_THEIRS, stack, "memstate_sa, synchronous=NORMAL like memstate", "NORMAL"),
        ]
        for number in track(range(rounds + 1), "commits", console=console, transient=True):
            for contender in contenders[:: -1 if number % 2 else 1]:
                contender.burst(contents)
    show(contenders, rounds)


def memstate_store(home: Path, stack: ExitStack) -> Any:
    """The peer, with the same Chroma and embedder."""
    import memstate
    from memstate.backends.sqlite import SQLiteStorage
    from memstate.integrations.chroma import ChromaSyncHook

    hook = ChromaSyncHook(
        stack.enter_context(databases.chroma(home)),
        "memory",
        embedding_fn=ForChroma(),
        text_field="content",
        metadata_fields=["role", "user_id"],
    )
    storage = SQLiteStorage(str(home / "theirs.sqlite3"))
    stack.callback(storage.close)
    return memstate.MemoryStore(storage, hooks=[hook])


def theirs(home: Path, count: int, stack: ExitStack) -> Contender:
    import memstate

    store = memstate_store(home, stack)

    def commit(content: str) -> None:
        store.commit(memstate.Fact(type="preference", payload=payload(content)))

    return Contender(f"memstate {memstate.__version__}", commit, count, lambda: True)


def ours(home: Any, count: int, stack: ExitStack, title: str, synchronous: str | None) -> Contender:
    index = ChromaIndex(stack.enter_context(databases.chroma(home)), "memory")
    engine = databases.engine(databases.sqlite_url(home), synchronous=synchronous)
    stack.callback(engine.dispose)
    store = stack.enter_context(MemoryStore(engine, index))

    def commit(content: str) -> None:
        store.commit(Fact(type="preference", payload=payload(content)))

    def settled() -> bool:
        return not store.memory.status(engine)["memory"].pending

    return Contender(title, commit, count, settled)


def payload(content: str) -> dict[str, str]:
    return {"content": content, "role": "preference", "user_id": "u1"}


def show(contenders: list[Contender], rounds: int) -> None:
    peer = contenders[0]
    result = table(
        f"Single-fact commits, SQLite and persistent Chroma: median of {rounds} interleaved bursts",
        "", "commits/s", "ratio", "target", "p50", "p99", "in the index/s",
    )  # fmt: skip
    for contender in contenders:
        ordered = sorted(contender.latencies)
        times = ratio(contender.rates[1:], peer.rates[1:])  # the first burst fills caches
        result.add_row(
            contender.title,
            f"{median(contender.rates[1:]):.0f}",
            *(("", "") if contender is peer else (f"[bold]{times:.1f}×[/]", TARGET.verdict(times))),
            f"{ordered[len(ordered) // 2] * 1000:.1f} ms",
            f"{ordered[int(len(ordered) * 0.99)] * 1000:.0f} ms",
            f"{median(contender.delivered[1:]):.0f}",
        )
    console.print(result)
