"""The CPU time of an import, and of the command line's first words. Each is a process of its own."""

from __future__ import annotations

import os
import resource
import subprocess
import sys
from functools import partial
from statistics import median

from benchmarks.report import Target, console, interleaved, spread, table

BASE = "import sqlalchemy.orm, sqlalchemy.dialects.sqlite, sqlalchemy.dialects.postgresql, pydantic, numpy"
PROCESSES = {
    "SQLAlchemy, Pydantic, NumPy": ["-c", BASE],
    "… and memstate_sa.Memory": ["-c", f"{BASE}; from memstate_sa import Memory"],
    "memstate-sa --version": ["-m", "memstate_sa", "--version"],
    "memstate-sa --help": ["-m", "memstate_sa", "--help"],
    "memstate-sa status --help": ["-m", "memstate_sa", "status", "--help"],
}
COMMAND = Target(0.3, " s")
IMPORT = Target(0.15, " s more")


def run(*, quick: bool = False) -> None:
    contenders = {name: partial(cpu_time, arguments) for name, arguments in PROCESSES.items()}
    measured = interleaved(contenders, 3 if quick else 15)
    base, ours = list(measured.values())[:2]
    report = table("Start-up, in seconds of CPU", "process", "median", "quartiles", "target")
    for name, times in measured.items():
        low, high = spread(times)
        verdict = COMMAND.verdict(median(times)) if name.startswith("memstate-sa") else ""
        if times is ours:
            verdict = IMPORT.verdict(median(a - b for a, b in zip(ours, base, strict=True)))
        report.add_row(name, f"{median(times):.3f}", f"{low:.3f}-{high:.3f}", verdict)
    console.print(report)


def cpu_time(arguments: list[str]) -> float:
    """The user and system time of a Python process, in seconds."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    # The threads of NumPy's OpenBLAS wait actively for a moment: that time would count too.
    environment = {**os.environ, "OPENBLAS_NUM_THREADS": "1"}
    subprocess.run([sys.executable, *arguments], check=True, stdout=subprocess.DEVNULL, env=environment)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime - before.ru_utime + after.ru_stime - before.ru_stime
