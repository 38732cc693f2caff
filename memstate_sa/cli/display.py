"""What is printed: how far something is, and changes."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

from rich.markup import escape
from rich.progress import Progress
from rich.table import Table

from memstate_sa.changes import Change

_SHOWN = 120  # characters of a value


def progress_of(progress: Progress, title: str) -> Callable[[int, int | None], None]:
    task = progress.add_task(escape(title), total=None)

    def update(done: int, total: int | None) -> None:
        progress.update(task, completed=done, total=total)

    return update


def changes_table(changes: Iterable[Change], title: str = "") -> Table:
    columns = ("at (UTC)", "transaction", "fact", "what", "changed", "by", "why")
    table = Table(*columns, title=title or None, title_justify="left")
    for change in changes:
        session = change.session_id and f"in {change.session_id}"
        table.add_row(
            f"{change.at:%Y-%m-%d %H:%M:%S}",
            change.tx,
            escape(f"{change.entity} {change.key}"),
            change.op + (" (undo)" if change.reverts else ""),
            escape(_changed(change)),
            escape(" ".join(filter(None, (change.actor, session)))),
            escape(change.reason or ""),
        )
    return table


def _changed(change: Change) -> str:
    """What a change made of a row: of an update, the columns that differ."""
    before, after = change.before or {}, change.after or {}
    if not (before and after):
        return ", ".join(f"{name}={_shortened(value)}" for name, value in (after or before).items())
    return ", ".join(
        f"{name}={_shortened(before.get(name))} → {_shortened(value)}"
        for name, value in after.items()
        if name not in before or before[name] != value
    )


def _shortened(value: Any) -> str:
    shown = repr(value)
    return shown if len(shown) <= _SHOWN else f"{shown[: _SHOWN - 1]}…"
