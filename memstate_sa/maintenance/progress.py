"""`Progress`: how long work reports how far it is."""

from __future__ import annotations

from collections.abc import Callable

Progress = Callable[[int, int | None], None]
"""Called with what is done and, where it is known, the total."""
