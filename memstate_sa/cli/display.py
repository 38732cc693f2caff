"""The output of commands: progress, and tables of changes."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

from rich import console
from rich.markup import escape
from rich.progress import Progress
from rich.table import Table
from rich.text import Text

from memstate_sa.log.changes import Change
from memstate_sa.runtime.printable import printable

_SHOWN = 120  # characters of a value


class Console(console.Console):
    """Rich's console, which lets no text drive the terminal: control characters show as escapes."""

    def render_str(self, text: str, **options: Any) -> Text:
        return super().render_str(printable(text, keep="\n\t"), **options)


def cell(value: str | None) -> str:
    """A value that came from data, for one line of a table: neither markup nor control characters act."""
    return escape(printable(value or ""))


def progress_of(progress: Progress, title: str) -> Callable[[int, int | None], None]:
    task = progress.add_task(cell(title), total=None)

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
            cell(f"{change.entity} {change.key}"),
            change.op + (" (undo)" if change.reverts else ""),
            cell(_changed(change)),
            cell(" ".join(filter(None, (change.actor, session)))),
            cell(change.reason),
        )
    return table


def _changed(change: Change) -> str:
    """The new values of a row; of an update, the columns that differ."""
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
