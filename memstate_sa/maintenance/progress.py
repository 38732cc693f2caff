"""`Progress`: the callback with which a long task reports its progress."""

from __future__ import annotations

from collections.abc import Callable

Progress = Callable[[int, int | None], None]
"""Called with the number of rows done and the total; the total is None if it is unknown."""
