"""Backfill of rows older than tracking, compared with one SQL statement that writes the same, and with bare Chroma."""

from __future__ import annotations

import resource
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from functools import partial
from statistics import median
from time import perf_counter
from typing import Any

from sqlalchemy import Engine, insert, text

from benchmarks import databases
from benchmarks.drain import Nowhere, define, remember
from benchmarks.facts import Precomputed, texts
from benchmarks.relay import BATCHES, TARGET, Base, Preference, bulk, rows
from benchmarks.report import Target, console, interleaved, ratio, spread, table
from memstate_sa import Memory
from memstate_sa.embedders import Embedder, WordLlamaEmbedder
from memstate_sa.indexes import ChromaIndex

ROWS_A_SECOND = Target(10_000, " rows/s", at_least=True)


def run(*, quick: bool = False) -> None:
    with databases.postgres_server() as server, databases.folder() as home, ExitStack() as stack:
        baselines("PostgreSQL", lambda: stack.enter_context(databases.postgres_database(server)), quick=quick)
        baselines("SQLite, file", lambda: databases.sqlite_url(home), quick=quick)
    deliveries(quick=quick)


# -- log and outbox ----------------------------------------------------------------------------------------------------

_FILL = """
INSERT INTO preference (id, number, user_id, role, content)
WITH RECURSIVE numbers(n) AS (SELECT 1 UNION ALL SELECT n + 1 FROM numbers WHERE n < :count)
SELECT n, n, 'u' || (n % 50), 'preference', 'User prefers dish number ' || n FROM numbers
"""
_LOG = """
INSERT INTO memstate_log (tx, at, version, step, entity, key, op, image)
SELECT '0123456789abcdef0123456789abcdef', CURRENT_TIMESTAMP, 1, false, 'preference', '[' || id || ']', 'baseline',
  {object}('id', id, 'number', number, 'user_id', user_id, 'role', role, 'content', content)
FROM preference
"""
_OUTBOX = """
INSERT INTO memstate_outbox (tx, created_at, slot, intent, xid, entity, key)
SELECT '0123456789abcdef0123456789abcdef', CURRENT_TIMESTAMP, id % 64, false, {xid}, 'preference', '[' || id || ']'
FROM preference
"""


def baselines(database: str, new_url: Callable[[], str], *, quick: bool) -> None:
    count, rounds = (20_000, 1) if quick else (1_000_000, 3)
    grown: list[int] = []
    contenders: dict[str, Callable[[], float]] = {
        "one INSERT … SELECT": partial(in_the_database, new_url, count),
        "backfill": partial(backfill, new_url, count, grown),
        "backfill, nothing new": partial(backfill, new_url, count, [], again=True),
    }
    measured = interleaved(contenders, rounds)
    result = table(
        f"{count} rows taken in, {database}: median of {rounds} interleaved rounds",
        "", "rows/s", "range", "of one INSERT … SELECT", "target", "memory, 10 % to the end",
    )  # fmt: skip
    for name, rates in measured.items():
        result.add_row(
            name,
            f"[bold]{median(rates):.0f}[/]",
            f"{min(rates):.0f}-{max(rates):.0f}",
            f"{100 * ratio(rates, measured['one INSERT … SELECT']):.0f} %",
            ROWS_A_SECOND.verdict(median(rates)) if name == "backfill" else "",
            f"+{max(grown) / 1024:.0f} MB" if name == "backfill" else "",
        )
    console.print(result)


def _application(url: str, count: int) -> tuple[Engine, Memory, Any]:
    """A database with rows, and a Memory that does not know them yet."""
    model = define()
    engine = databases.engine(url)
    model.metadata.create_all(engine)
    with engine.begin() as connection:
        connection.execute(text(_FILL), {"count": count})
    memory = remember(model, Nowhere())
    memory.create_tables(engine)
    return engine, memory, model


def in_the_database(new_url: Callable[[], str], count: int) -> float:
    """The limit: the rows stay in the database, the log is not checked for them, and other writers are locked out."""
    engine, _, _ = _application(new_url(), count)
    is_sqlite = engine.dialect.name == "sqlite"
    own = {"object": "json_object", "xid": "0"} if is_sqlite else {
        "object": "jsonb_build_object", "xid": "CAST(CAST(pg_current_xact_id() AS TEXT) AS BIGINT)"
    }  # fmt: skip
    start = perf_counter()
    with engine.begin() as connection:
        for statement in (_LOG, _OUTBOX):
            connection.execute(text(statement.format(**own)))
    took = perf_counter() - start
    engine.dispose()
    return count / took


def backfill(new_url: Callable[[], str], count: int, grown: list[int], *, again: bool = False) -> float:
    """Rows a second. Add the growth of the process after the first tenth to *grown*, in kilobytes."""
    engine, memory, model = _application(new_url(), count)
    if again:
        memory.backfill(engine, model)
    high: list[int] = []

    def note(done: int, total: int | None) -> None:
        if done >= count // 10:
            high.append(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)

    start = perf_counter()
    added = memory.backfill(engine, model, progress=note)
    took = perf_counter() - start
    assert added == (0 if again else count)
    grown.append(high[-1] - high[0])
    engine.dispose()
    return count / took


# -- vectors -----------------------------------------------------------------------------------------------------------


def deliveries(*, quick: bool) -> None:
    count, rounds = (2_000, 1) if quick else (50_000, 3)
    contents = texts(count)
    known, model = Precomputed(contents), WordLlamaEmbedder()
    trials = interleaved({str(size): partial(bulk, contents[:10_000], known, size) for size in BATCHES}, 1)
    best = max(BATCHES, key=lambda size: trials[str(size)])
    alone, embedding = "Chroma alone, vectors known", "WordLlama, then Chroma"
    contenders: dict[str, Callable[[], float]] = {
        alone: partial(bulk, contents, known, best),
        embedding: partial(embed_and_bulk, contents, model, known, best),
        "backfill and relay, vectors known": partial(backfill_and_relay, contents, known),
        "backfill and relay, WordLlama": partial(backfill_and_relay, contents, model),
    }
    measured = interleaved(contenders, rounds)
    result = table(
        f"{count} old rows in persistent Chroma (batches of {best or 'the largest size'}): median of {rounds} rounds",
        "", "rows/s", "of Chroma alone", "quartiles", "target", "of WordLlama, then Chroma",
    )  # fmt: skip
    for name, rates in measured.items():
        share = 100 * ratio(rates, measured[alone])
        low, high = spread([100 * a / b for a, b in zip(rates, measured[alone], strict=True)])
        ours = name.startswith("backfill")
        result.add_row(
            name,
            f"{median(rates):.0f}",
            "" if name == alone else f"[bold]{share:.0f} %[/]",
            "" if name == alone else f"{low:.0f}-{high:.0f}",
            TARGET.verdict(share) if ours else "",
            f"{100 * ratio(rates, measured[embedding]):.0f} %",
        )
    console.print(result)


def embed_and_bulk(contents: Sequence[str], model: WordLlamaEmbedder, known: Precomputed, batch: int | None) -> float:
    """Rows a second, for embedding and writing together."""
    start = perf_counter()
    model.embed(contents)
    embedded = perf_counter() - start
    return len(contents) / (embedded + len(contents) / bulk(contents, known, batch))


def backfill_and_relay(contents: Sequence[str], embedder: Embedder) -> float:
    """Rows a second, for the backfill and ``drain()`` together."""
    with databases.folder() as home, databases.chroma(home) as client:
        memory = Memory(ChromaIndex(client, "memory"), embedder=embedder, embedding_cache=0)
        memory.track(Preference, text="content", metadata=("user_id", "role"))
        engine = databases.engine(databases.sqlite_url(home))
        Base.metadata.create_all(engine)
        memory.create_tables(engine)
        courier = memory.relay(engine)
        courier.drain()  # a new index would be filled from the table instead of the outbox
        with engine.begin() as connection:
            connection.execute(insert(Preference), rows(contents))
        start = perf_counter()
        with courier:
            memory.backfill(engine, Preference)
            courier.drain(timeout=600)
        took = perf_counter() - start
        assert client.get_collection("memory").count() == len(contents)
        memory.close()
        engine.dispose()
    return len(contents) / took
