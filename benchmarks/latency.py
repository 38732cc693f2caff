"""Possible delays of delivery: from commit to index, an old transaction, a poison row, a backlog of a million keys."""

from __future__ import annotations

import multiprocessing
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from statistics import quantiles
from typing import Any

from sqlalchemy import Engine, create_engine, event, insert, select, text
from sqlalchemy.engine import URL
from sqlalchemy.orm import Session, sessionmaker

from benchmarks import databases
from benchmarks.drain import Nowhere, define, facts, remember
from benchmarks.report import Target, console, interleaved, ratio, table
from memstate_sa import DeliveryRejected, Memory
from memstate_sa.db.tables import outbox
from memstate_sa.indexes.base import Point
from memstate_sa.relay import RetryPolicy


def run(*, quick: bool = False) -> None:
    with databases.postgres_server() as server:
        with databases.folder() as home:
            commit_to_index(server, home, quick=quick)
        old_transaction(server, seconds=2 if quick else 60)
        poison(server, quick=quick)
        backlog(server, keys=10_000 if quick else 1_000_000)


class Application:
    """A model, its Memory and a session factory, with a separate database."""

    def __init__(self, url: str, index: Nowhere | None = None) -> None:
        self.engine = databases.engine(url)
        self.model = define()
        self.index = index or Nowhere()
        self.memory: Memory = remember(self.model, self.index)
        self.sessions: sessionmaker[Session] = sessionmaker(self.engine)
        self.memory.attach(self.sessions)
        self.model.metadata.create_all(self.engine)
        self.memory.create_tables(self.engine)
        self.memory.relay(self.engine).drain()

    def commit(self, numbers: Sequence[int]) -> None:
        with self.sessions() as session:
            session.add_all(facts(self.model, numbers))
            session.commit()

    def close(self) -> None:
        self.memory.close()
        self.engine.dispose()


@contextmanager
def application(server: URL, index: Nowhere | None = None) -> Iterator[Application]:
    with databases.postgres_database(server) as url:
        app = Application(url, index)
        try:
            yield app
        finally:
            app.close()


# -- from commit to index ----------------------------------------------------------------------------------------------

_INTERVAL_S = 0.01


def commit_to_index(server: URL, home: Path, *, quick: bool) -> None:
    commits = 200 if quick else 2_000
    result = table(
        "From the end of a commit to the call of the index, 100 commits a second, an embedder that does nothing (ms)",
        "", "p50", "target", "p99", "target",
    )  # fmt: skip
    for where in ("SQLite", "PostgreSQL"):
        for elsewhere in (False, True):
            with databases.postgres_database(server) as postgres:
                url = databases.sqlite_url(home) if where == "SQLite" else postgres
                waits = sorted(_waits(url, commits, elsewhere=elsewhere))
            middle, last = waits[len(waits) // 2] * 1000, quantiles(waits, n=100)[98] * 1000
            verdict = Target(50 if elsewhere else 8, " ms").verdict(middle)
            verdict_99 = "" if elsewhere else Target(25, " ms").verdict(last)
            name = f"{where}, relay in {'another' if elsewhere else 'this'} process"
            result.add_row(name, f"{middle:.1f}", verdict, f"{last:.1f}", verdict_99)
    console.print(result)


def _waits(url: str, commits: int, *, elsewhere: bool) -> list[float]:
    """Seconds from each commit until the index was called with its fact, by the machine's clock."""
    context = multiprocessing.get_context("spawn")
    seen: Any = context.Queue()
    ready, stop = context.Event(), context.Event()
    here = Application(url, Nowhere(lambda *numbers: [seen.put((number, time.time())) for number in numbers]))
    committed: dict[int, float] = {}
    process: Any = None
    try:
        if elsewhere:
            process = context.Process(target=_deliver, args=(url, seen, ready, stop))
            process.start()
            ready.wait(60)
        relay = None if elsewhere else here.memory.relay(here.engine).start()
        arrived: dict[int, float] = {}
        for number in range(-20, commits):
            due = time.time() + _INTERVAL_S
            here.commit([number])
            committed[number] = time.time()
            time.sleep(max(0.0, due - time.time()))
        while len(arrived) < len(committed):
            number, at = seen.get(timeout=60)
            arrived[number] = at
        if relay is not None:
            relay.stop()
        return [max(0.0, arrived[number] - at) for number, at in committed.items() if number >= 0]
    finally:
        if process is not None:
            stop.set()
            process.join()
        here.close()


def _deliver(url: str, seen: Any, ready: Any, stop: Any) -> None:
    there = Application(url, Nowhere(lambda *numbers: [seen.put((number, time.time())) for number in numbers]))
    with there.memory.relay(there.engine):
        ready.set()
        stop.wait()
    there.close()


# -- an old transaction ------------------------------------------------------------------------------------------------


def old_transaction(server: URL, *, seconds: int) -> None:
    """Deliver keys while a transaction stays open, so that PostgreSQL can vacuum nothing."""
    taken: list[tuple[float, float]] = []
    lateness: list[float] = []
    born: dict[int, float] = {}
    index = Nowhere(lambda *numbers: lateness.extend(time.monotonic() - born[number] for number in numbers))
    with application(server, index) as app, app.engine.connect() as pinned:
        _time_pages(app.engine, taken)
        pinned.execute(text("SELECT pg_current_xact_id()"))
        began, number, per_commit = time.monotonic(), 0, 50
        with app.memory.relay(app.engine):
            while time.monotonic() - began < seconds:
                numbers = list(range(number, number + per_commit))
                born.update(dict.fromkeys(numbers, time.monotonic()))
                app.commit(numbers)
                number += per_commit
                time.sleep(per_commit * seconds / 100_000 / 2)
        app.memory.relay(app.engine).drain()
        pinned.rollback()
    tenth = max(1, len(taken) // 10)
    first, last = (sorted(ms for _, ms in pages)[len(pages) // 2] for pages in (taken[:tenth], taken[-tenth:]))
    result = table(
        f"A transaction held open for {seconds} s while {number} keys are committed and delivered",
        "", "first tenth", "last tenth", "ratio", "target",
    )  # fmt: skip
    verdict = Target(1.5).verdict(last / first)
    result.add_row("reading a page, median (ms)", f"{first:.2f}", f"{last:.2f}", f"{last / first:.2f}×", verdict)
    part = max(1, len(lateness) // 10)
    early, late = (sorted(delays)[int(len(delays) * 0.99)] * 1000 for delays in (lateness[:part], lateness[-part:]))
    result.add_row(
        "before the commit to the index, p99 (ms)", f"{early:.0f}", f"{late:.0f}", f"{late / early:.2f}×", ""
    )
    console.print(result)


def _time_pages(engine: Engine, taken: list[tuple[float, float]]) -> None:
    """Record the execution time of each page of the outbox in *taken*."""
    started = threading.local()

    @event.listens_for(engine, "before_cursor_execute")
    def _before(connection: Any, cursor: Any, statement: str, *rest: Any) -> None:
        started.at = time.perf_counter()

    @event.listens_for(engine, "after_cursor_execute")
    def _after(connection: Any, cursor: Any, statement: str, *rest: Any) -> None:
        if "LATERAL" in statement and "SMALLINT" in statement:
            taken.append((time.monotonic(), (time.perf_counter() - started.at) * 1000))


# -- a poison row ------------------------------------------------------------------------------------------------------


class Picky(Nowhere):
    """An index that refuses every batch with the fact *poison*."""

    def upsert(self, points: Sequence[Point]) -> None:
        for point in points:
            if point.metadata["number"] == self.poison:
                raise DeliveryRejected("too odd")

    poison = -1


def poison(server: URL, *, quick: bool) -> None:
    keys, rounds = (2_000, 2) if quick else (10_000, 7)

    def rate(poisoned: bool) -> float:
        index = Picky()
        index.poison = keys // 3 if poisoned else -1
        with application(server, index) as app:
            for start in range(0, keys, 100):
                app.commit(range(start, start + 100))
            relay = app.memory.relay(app.engine, policy=RetryPolicy(max_attempts=1))
            began = time.perf_counter()
            relay.drain()
            elapsed = time.perf_counter() - began
            dead = [(letter.key, letter.error) for letter in relay.dead()]
            expected = [(f"[{keys // 3 + 1}]", "DeliveryRejected: too odd")] if poisoned else []
            assert dead == expected, dead
            assert relay.counters()["memory"].converged >= keys - len(expected) - 100
            return keys / elapsed

    measured = interleaved({"clean": lambda: rate(False), "poisoned": lambda: rate(True)}, rounds)
    share = 100 * ratio(measured["poisoned"], measured["clean"])
    result = table(f"One poison row among {keys}: the others are delivered", "", "share of the clean rate", "target")
    result.add_row("drain", f"{share:.0f} %", Target(95, " %", at_least=True).verdict(share))
    console.print(result)


# -- a long backlog ----------------------------------------------------------------------------------------------------


def backlog(server: URL, *, keys: int) -> None:
    """Drain *keys* keys in a separate process, and read its peak memory at the end."""
    context = multiprocessing.get_context("spawn")
    with application(server) as app:
        app.commit(range(100))
        rows = [
            {"number": n, "user_id": f"u{n % 50}", "role": "preference", "content": f"User prefers dish number {n}"}
            for n in range(10_000)
        ]
        with console.status("filling the backlog"):
            for _ in range(keys // len(rows)):
                with app.sessions() as session:
                    session.execute(insert(app.model), rows)
                    session.commit()
        url = app.engine.url.render_as_string(hide_password=False)
        answers: Any = context.Queue()
        process = context.Process(target=_drain, args=(url, answers))
        process.start()
        delivered, seconds, before, after = answers.get(timeout=1800)
        process.join()
        with app.engine.connect() as connection:
            left = connection.execute(select(outbox.c.id).limit(1)).all()
    result = table(f"A backlog of {keys} keys, drained by one process", "", "", "target")
    result.add_row("delivered", f"{delivered}", "")
    result.add_row("keys/s", f"{delivered / seconds:.0f}", "")
    result.add_row("peak RSS (MB)", f"{after:.0f}", Target(300, " MB").verdict(after))
    result.add_row("of which before it began", f"{before:.0f}", "")
    result.add_row("left in the outbox", "nothing" if not left else "something", "")
    console.print(result)


def _drain(url: str, answers: Any) -> None:
    engine, index = create_engine(url), Nowhere()
    index._incarnation = _incarnation(engine)
    memory = remember(define(), index)
    before = _peak_mb()
    relay = memory.relay(engine)
    began = time.perf_counter()
    delivered = relay.drain(timeout=1800)
    seconds = time.perf_counter() - began
    relay._clean_up_at = 0.0
    while relay._clean_up_at == 0.0:  # there is more to delete
        relay.run_once()
    relay.stop()
    answers.put((delivered, seconds, before, _peak_mb()))
    engine.dispose()


def _incarnation(engine: Engine) -> str:
    """The incarnation of the index in the other process. With it, this process continues at its position."""
    with engine.connect() as connection:
        return str(connection.execute(text("SELECT incarnation FROM memstate_index")).scalar_one())


def _peak_mb() -> float:
    """The peak memory of this process alone. (getrusage would include the parent's peak before the fork.)"""
    [line] = (line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM"))
    return int(line.split()[1]) / 1024
