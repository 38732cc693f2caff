"""The output of commands: progress, JSON and changes."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from datetime import UTC
from typing import TYPE_CHECKING, Any

import typer
from rich import console
from rich.markup import escape
from rich.progress import Progress, ProgressColumn
from rich.text import Text

from memstate_sa.runtime.display import shown, to_json, written
from memstate_sa.runtime.printable import printable

if TYPE_CHECKING:
    from memstate_sa.log.changes import Change

_COLOURS = {"insert": "green", "update": "yellow", "delete": "red"}


class Console(console.Console):
    """Rich's console with control characters as escapes. So no text from data can drive the terminal."""

    def render_str(self, text: str, **options: Any) -> Text:
        return super().render_str(printable(text, keep="\n\t"), **options)


def cell(value: str | None) -> str:
    """*value*, which came from data, for one line. Markup and control characters in it have no effect."""
    return escape(printable(value or ""))


@contextmanager
def progress_bar(
    title: str, *columns: ProgressColumn, transient: bool = True
) -> Iterator[Callable[[int, int | None], None]]:
    """A function that moves a progress bar on stderr. A *transient* bar vanishes at the end, and needs a terminal."""
    stderr = Console(stderr=True)
    is_disabled = transient and not stderr.is_terminal
    with Progress(*columns, console=stderr, transient=transient, disable=is_disabled) as progress:
        task = progress.add_task(cell(title), total=None)

        def update(done: int, total: int | None) -> None:
            progress.update(task, completed=done, total=total)

        yield update


# -- JSON ------------------------------------------------------------------------------------------------------------


def print_json(value: Any) -> None:
    typer.echo(to_json(value))


def facts_json(facts: Iterable[tuple[str, object]]) -> list[dict[str, object]]:
    """(entity, key) pairs as JSON objects, with the names that they have in a `Change`."""
    return [{"entity": entity, "key": key} for entity, key in facts]


# -- for people ------------------------------------------------------------------------------------------------------


def fact_name(entity: str, key: object) -> str:
    """The fact as `memstate-sa log ENTITY KEY` reads it."""
    return f"{entity} {written(key)}"


def print_changes(console: Console, changes: Iterable[Change], title: str = "") -> None:
    """Print a paragraph for each change. No line is cut, so times and ids are whole in a pipe too."""
    if title:
        console.print(f"[bold]{escape(title)}[/]")
    for change in changes:
        for line in _paragraph(change):
            console.print(line, highlight=False, soft_wrap=True)


def _paragraph(change: Change) -> Iterator[str]:
    from memstate_sa.log.changes import value_texts

    at = change.at.astimezone(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
    op = f"[{_COLOURS.get(change.op, 'default')}]{change.op}{' (undo)' if change.reverts else ''}[/]"
    yield f"{at}  {change.tx}  {op}  [bold]{cell(fact_name(change.entity, change.key))}[/]"
    session = change.session_id and f"in {change.session_id}"
    author = " ".join(filter(None, (change.actor, session)))
    labels = (f"by {author}" if author else "", f"({change.reason})" if change.reason else "")
    if any(labels):
        yield cell(f"  {' '.join(filter(None, labels))}")
    if change.before is None and change.after is None:
        yield "  (the values were erased)"
    for name, text in value_texts(_readable(change), shown):
        yield cell(f"  {name}: {text}")


def _readable(change: Change) -> Change:
    """*change*, with the namespace that the column of a LangGraph item holds in hex."""
    if change.entity != "memstate_item":
        return change
    from memstate_sa.integrations.langgraph.item_rows import namespace_of

    before, after = (
        image and {name: namespace_of(value) if name == "scope" else value for name, value in image.items()}
        for image in (change.before, change.after)
    )
    return replace(change, before=before, after=after)
