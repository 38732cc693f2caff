"""Objects as people see them: short texts for ``repr``, and HTML tables for notebooks."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from html import escape
from itertools import islice

from memstate_sa.runtime.printable import printable

_LONGEST_TEXT = 120  # characters of one value
_MOST_ROWS = 100


def shortened(value: object, length: int = _LONGEST_TEXT) -> str:
    """*value* as text on one line, cut to *length* characters. Strings are quoted."""
    text = repr(value)
    return text if len(text) <= length else f"{text[: length - 1]}…"


def summary(subject: object, *parts: str) -> str:
    """A ``repr`` like ``<Relay [running | memory: 3 delivered]>``. Empty parts are left out."""
    return printable(f"<{type(subject).__name__} [{' | '.join(filter(None, parts))}]>")


def html_table(caption: str, columns: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    """An HTML table of *rows*. Strings are shown as they are, other values by their ``repr``; long ones are cut."""
    row_iterator = iter(rows)
    body = "".join(_row("td", row) for row in islice(row_iterator, _MOST_ROWS))
    if hidden := sum(1 for _ in row_iterator):
        body += f'<tr><td colspan="{len(columns)}">… and {hidden} more</td></tr>'
    head = _row("th", columns)
    return f"<table><caption>{_cell(caption)}</caption><thead>{head}</thead><tbody>{body}</tbody></table>"


def _row(tag: str, values: Iterable[object]) -> str:
    cells = "".join(f"<{tag}>{_cell(value)}</{tag}>" for value in values)
    return f"<tr>{cells}</tr>"


def _cell(value: object) -> str:
    text = "" if value is None else value if isinstance(value, str) else repr(value)
    text = text if len(text) <= _LONGEST_TEXT else f"{text[: _LONGEST_TEXT - 1]}…"
    return escape(printable(text))
