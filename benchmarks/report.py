"""Interleaved measurements, and tables of ratios."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from statistics import median, quantiles

from rich.console import Console
from rich.progress import track
from rich.table import Table

console = Console(width=None if sys.stdout.isatty() else 140)


def interleaved(contenders: Mapping[str, Callable[[], float]], rounds: int) -> dict[str, list[float]]:
    """*rounds* measurements of every contender, in turns, so that a slow minute of the machine affects all of them.

    Every second round has the reverse order, so that a contender does not always run after the same one.
    """
    measured: dict[str, list[float]] = {name: [] for name in contenders}
    for number in track(range(rounds), "measuring", console=console, transient=True):
        for name in list(contenders)[:: -1 if number % 2 else 1]:
            measured[name].append(contenders[name]())
    return measured


def ratio(ours: Sequence[float], theirs: Sequence[float]) -> float:
    """The median of the ratios of pairs."""
    return median(a / b for a, b in zip(ours, theirs, strict=True))


def spread(values: Sequence[float]) -> tuple[float, float]:
    """The quartiles around the median."""
    low, _, high = quantiles(values, n=4) if len(values) > 1 else (values[0],) * 3
    return low, high


@dataclass(frozen=True)
class Target:
    """The goal for a figure. It is only printed, never asserted."""

    limit: float
    unit: str = "×"
    at_least: bool = False

    def verdict(self, value: float) -> str:
        met = value >= self.limit if self.at_least else value <= self.limit
        sign = "≥" if self.at_least else "≤"
        return f"[{'green' if met else 'red'}]{'met' if met else 'MISSED'}[/] ({sign} {self.limit:g}{self.unit})"


def table(title: str, *columns: str) -> Table:
    result = Table(title=title, title_justify="left", title_style="bold")
    result.add_column(columns[0])
    for column in columns[1:]:
        result.add_column(column, justify="right")
    return result
