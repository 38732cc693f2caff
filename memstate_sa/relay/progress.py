"""`Progress`: the callback with which a long task reports its progress, and the bar in the terminal."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TypeAlias

from memstate_sa.errors import require_module

Progress: TypeAlias = Callable[[int, int | None], None]
"""A function that takes the finished part and the total. The total is None if it is unknown."""

ProgressOption: TypeAlias = Progress | bool | None
"""A function that gets the progress, or True for a progress bar in the terminal."""


@contextmanager
def reporting(progress: ProgressOption, title: str) -> Iterator[Progress | None]:
    """The function that gets the progress. Raises MissingExtra if *progress* is True, and rich is not installed."""
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
