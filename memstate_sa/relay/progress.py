"""`Progress`: how long work reports its progress."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TypeAlias

from memstate_sa.errors import require_module

Progress: TypeAlias = Callable[[int, int | None], None]
"""A function of the finished part and of the total, which is None where it is unknown."""

ProgressOption: TypeAlias = Progress | bool | None
"""A function that is told of the progress, or True for a progress bar in the terminal."""


@contextmanager
def reporting(progress: ProgressOption, title: str) -> Iterator[Progress | None]:
    """The function to report to. Raises MissingExtra where the bar is asked for, and rich is not installed."""
    if not isinstance(progress, bool):
        yield progress
    elif not progress:
        yield None
    else:
        with require_module("rich.progress", "cli").Progress() as bar:
            task = bar.add_task(title, total=None)

            def update(done: int, total: int | None) -> None:
                bar.update(task, completed=done, total=total)

            yield update
