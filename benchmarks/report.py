"""Timing side by side, and tables of ratios."""

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
    """The measurement of every contender, *rounds* times, taking turns: a slow minute of the machine hits them all.

    Every second round goes backwards, so that none is always the one after a heavy neighbour.
    """
    measured: dict[str, list[float]] = {name: [] for name in contenders}
    for number in track(range(rounds), "measuring", console=console, transient=True):
        for name in list(contenders)[:: -1 if number % 2 else 1]:
            measured[name].append(contenders[name]())
    return measured


def ratio(ours: Sequence[float], theirs: Sequence[float]) -> float:
    """The median of the pairs' ratios."""
    return median(a / b for a, b in zip(ours, theirs, strict=True))


def spread(values: Sequence[float]) -> tuple[float, float]:
    """The quartiles around the median."""
    low, _, high = quantiles(values, n=4) if len(values) > 1 else (values[0],) * 3
    return low, high


@dataclass(frozen=True)
class Target:
    """What a figure is held against; it is only ever printed, never asserted."""

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
