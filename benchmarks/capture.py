"""The cost of tracking for a commit of 1,000 objects, compared with plain SQLAlchemy and history libraries.

Also the cost for a read.
"""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from statistics import median
from time import perf_counter
from typing import Any

from rich.progress import track
from sqlalchemy.orm import Session, sessionmaker

from benchmarks import databases
from benchmarks.report import Target, console, interleaved, ratio, spread, table
from benchmarks.writer import memstate_sa, plain

OPERATIONS = ("insert", "update", "delete")
TARGETS = {
    "SQLite, file": {"insert": Target(1.4), "update": Target(1.7), "delete": Target(2.0)},
    "PostgreSQL": {"insert": Target(1.4), "update": Target(1.5), "delete": Target(1.6)},
}
SLOW = {"continuum": 3, "history": 3}
"""Contenders that need seconds for a commit. They run only in every n-th round."""

PEERS = {
    "continuum-subquery": "Continuum subquery",
    "continuum": "Continuum",
    "history": "sqlalchemy-history",
}
CONTENDERS = ("plain", "by hand", "memstate_sa", "triggers", *PEERS)
GET = Target(1.03)


def run(*, quick: bool = False, databases_: tuple[str, ...] = ("sqlite", "postgresql")) -> None:
    count, rounds = (100, 3) if quick else (1000, 18)
    contenders = [name for name in CONTENDERS if not (quick and name in SLOW)]
    if "sqlite" in databases_:
        with databases.folder() as home:
            urls = {name: databases.sqlite_url(home) for name in contenders}
            show("SQLite, file", measure(urls, count, rounds), count)
            gets("SQLite, file", lambda: databases.sqlite_url(home), quick=quick)
    if "postgresql" in databases_:
        with databases.postgres_server() as server, ExitStack() as stack:
            urls = {name: stack.enter_context(databases.postgres_database(server)) for name in contenders}
            show("PostgreSQL", measure(urls, count, rounds), count)
            gets("PostgreSQL", lambda: stack.enter_context(databases.postgres_database(server)), quick=quick)


Measured = dict[str, dict[str, list[tuple[float, int]]]]
"""Seconds and bytes of WAL, by contender and operation."""


def measure(urls: dict[str, str], count: int, rounds: int) -> Measured:
    measured: Measured = {name: {op: [] for op in OPERATIONS} for name in urls}
    with ExitStack() as stack:
        writers = {name: stack.enter_context(writer(name, url)) for name, url in urls.items()}
        for commit in writers.values():  # warm up caches, files and prepared statements
            for op in OPERATIONS:
                commit(op, count)
        for number in track(range(rounds), "commits", console=console, transient=True):
            for op in OPERATIONS:
                for name in list(writers)[:: -1 if number % 2 else 1]:
                    if number % SLOW.get(name, 1) == 0:
                        measured[name][op].append(writers[name](op, count))
    return measured


@contextmanager
def writer(contender: str, url: str) -> Iterator[Callable[[str, int], tuple[float, int]]]:
    command = [sys.executable, "-m", "benchmarks.writer", contender, url]
    root = Path(__file__).parent.parent
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=root) as process:
        stdin, stdout = process.stdin, process.stdout
        assert stdin is not None and stdout is not None

        def answer() -> str:
            line = stdout.readline()
            if not line:
                raise RuntimeError(f"The writer {contender} ended with {process.wait()}.")
            return line

        def commit(op: str, count: int) -> tuple[float, int]:
            stdin.write(f"{op} {count}\n")
            stdin.flush()
            seconds, written = answer().split()
            return float(seconds), int(written)

        answer()
        yield commit
        stdin.close()


def show(database: str, measured: Measured, count: int) -> None:
    seconds = {name: {op: [took for took, _ in of[op]] for op in OPERATIONS} for name, of in measured.items()}
    plain = seconds["plain"]
    rounds = len(plain["insert"])
    result = table(
        f"Commit of {count} tracked objects, {database}: median of {rounds} interleaved rounds",
        "", "plain", "memstate_sa", "ratio", "quartiles", "target", "by hand", "triggers",
        *(shown for name, shown in PEERS.items() if name in seconds),
    )  # fmt: skip
    for op in OPERATIONS:
        ours = seconds["memstate_sa"][op]
        low, high = spread([a / b for a, b in zip(ours, plain[op], strict=True)])
        result.add_row(
            op,
            f"{median(plain[op]) * 1000:.0f} ms",
            f"{median(ours) * 1000:.0f} ms",
            f"[bold]{ratio(ours, plain[op]):.2f}×[/]",
            f"{low:.2f}-{high:.2f}",
            TARGETS[database][op].verdict(ratio(ours, plain[op])),
            *(f"{ratio(seconds[name][op], plain[op]):.2f}×" for name in ("by hand", "triggers")),
            *(f"{ratio(seconds[name][op], plain[op][:: SLOW.get(name, 1)]):.1f}×" for name in PEERS if name in seconds),
        )
    console.print(result)
    if database == "PostgreSQL":
        written = table("WAL, bytes an object", "", *measured)
        for op in OPERATIONS:
            written.add_row(op, *(f"{median(w for _, w in of[op]) / count:.0f}" for of in measured.values()))
        console.print(written)


# -- the cost for reads ------------------------------------------------------------------------------------------------


def gets(database: str, new_url: Callable[[], str], *, quick: bool) -> None:
    """``session.get()`` of 1,000 rows by key, with and without attach."""
    contenders = {}
    for name in ("plain", "attached"):
        engine = databases.engine(new_url())
        model, sessions = CONTENDERS_HERE[name](engine)
        with sessions() as session:
            session.add_all(model(user_id="u", role="r", content=f"text {n}", weight=1.0) for n in range(1000))
            session.commit()
        contenders[name] = partial(_gets, model, sessions)
        contenders[name]()
    measured = interleaved(contenders, 3 if quick else 25)
    share = ratio(measured["attached"], measured["plain"])
    result = table(f"session.get() of a row, {database}", "", "plain", "attached", "ratio", "target")
    row = (f"{median(measured[name]) * 1000:.0f} µs" for name in contenders)
    result.add_row("by key", *row, f"[bold]{share:.2f}×[/]", GET.verdict(share))
    console.print(result)


def _gets(model: type[Any], sessions: sessionmaker[Session]) -> float:
    with sessions() as session:
        start = perf_counter()
        for n in range(1, 1001):
            assert session.get(model, n) is not None
        return perf_counter() - start


CONTENDERS_HERE = {"plain": plain, "attached": memstate_sa("session")}
