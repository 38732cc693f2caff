"""What tracking costs a commit: 1,000 objects, beside plain SQLAlchemy and SQLAlchemy-Continuum."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from statistics import median

from rich.progress import track

from benchmarks import databases
from benchmarks.report import Target, console, ratio, spread, table

OPERATIONS = ("insert", "update", "delete")
TARGETS = {"insert": Target(1.8), "update": Target(2.2), "delete": Target(2.7)}
SLOW = {"continuum": 3}
"""Contenders that take part in every n-th round only: Continuum's default strategy takes seconds a commit."""

CONTENDERS = ("plain", "memstate_sa", "continuum-subquery", "continuum")


def run(*, quick: bool = False, databases_: tuple[str, ...] = ("sqlite", "postgresql")) -> None:
    count, rounds = (200, 5) if quick else (1000, 18)
    if "sqlite" in databases_:
        with databases.folder() as home:
            urls = {name: databases.sqlite_url(home) for name in CONTENDERS}
            show("SQLite, file", measure(urls, count, rounds), count)
    if "postgresql" in databases_:
        with databases.postgres_server() as server, ExitStack() as stack:
            urls = {name: stack.enter_context(databases.postgres_database(server)) for name in CONTENDERS}
            show("PostgreSQL", measure(urls, count, rounds), count)


Measured = dict[str, dict[str, list[float]]]
"""Seconds by contender and operation."""


def measure(urls: dict[str, str], count: int, rounds: int) -> Measured:
    measured: Measured = {name: {op: [] for op in OPERATIONS} for name in urls}
    with ExitStack() as stack:
        writers = {name: stack.enter_context(writer(name, url)) for name, url in urls.items()}
        for commit in writers.values():  # caches, files and prepared statements
            for op in OPERATIONS:
                commit(op, count)
        for number in track(range(rounds), "commits", console=console, transient=True):
            for op in OPERATIONS:
                for name in list(writers)[:: -1 if number % 2 else 1]:
                    if number % SLOW.get(name, 1) == 0:
                        measured[name][op].append(writers[name](op, count))
    return measured


@contextmanager
def writer(contender: str, url: str) -> Iterator[Callable[[str, int], float]]:
    command = [sys.executable, "-m", "benchmarks.writer", contender, url]
    root = Path(__file__).parent.parent
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=root) as process:
        stdin, stdout = process.stdin, process.stdout
        assert stdin is not None and stdout is not None

        def answer() -> str:
            line = stdout.readline()
            if not line:
                raise RuntimeError(f"the writer {contender} ended with {process.wait()}")
            return line

        def commit(op: str, count: int) -> float:
            stdin.write(f"{op} {count}\n")
            stdin.flush()
            return float(answer())

        answer()
        yield commit
        stdin.close()


def show(database: str, measured: Measured, count: int) -> None:
    plain = measured["plain"]
    rounds = len(plain["insert"])
    result = table(
        f"Commit of {count} tracked objects, {database}: median of {rounds} interleaved rounds",
        "", "plain", "memstate_sa", "ratio", "quartiles", "target", "Continuum subquery", "Continuum default",
    )  # fmt: skip
    for op in OPERATIONS:
        ours = measured["memstate_sa"][op]
        low, high = spread([a / b for a, b in zip(ours, plain[op], strict=True)])
        result.add_row(
            op,
            f"{median(plain[op]) * 1000:.0f} ms",
            f"{median(ours) * 1000:.0f} ms",
            f"[bold]{ratio(ours, plain[op]):.2f}×[/]",
            f"{low:.2f}-{high:.2f}",
            TARGETS[op].verdict(ratio(ours, plain[op])) if database.startswith("SQLite") else "",
            *(
                f"{ratio(measured[name][op], plain[op][:: SLOW.get(name, 1)]):.1f}×"
                for name in ("continuum-subquery", "continuum")
            ),
        )
    console.print(result)
