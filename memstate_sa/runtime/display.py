"""Objects as people see them: values as people write them, texts for ``repr``, and HTML tables for notebooks."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from html import escape
from itertools import islice
from typing import Any

from memstate_sa.runtime.printable import printable

_LONGEST_VALUE, _LONGEST_CELL = 120, 1000  # characters
_MOST_ROWS = 100


def counted(count: int, one: str, many: str) -> str:
    return f"{count} {one if count == 1 else many}"


def to_json(value: Any) -> str:
    """*value* as JSON in one line: times in ISO 8601, bytes in hexadecimal."""
    from pydantic_core import to_json

    text = to_json(value, bytes_mode="hex", inf_nan_mode="strings", fallback=str)
    return printable(text.decode())


def written(value: Any) -> str:
    """*value* as people write it, and as the commands read it: text plain, the rest as JSON."""
    plain = json.loads(to_json(value))
    return plain if isinstance(plain, str) and plain else json.dumps(plain, ensure_ascii=False)


def shown(value: Any) -> str:
    """*value* as people write it, cut where it is long."""
    try:
        text = written(value)
    except ValueError:  # JSON cannot express it: half of a surrogate pair, for example
        text = repr(value)
    return _cut(text, _LONGEST_VALUE)


def shortened(value: object, length: int = _LONGEST_VALUE) -> str:
    """The ``repr`` of *value*, cut to *length* characters."""
    return _cut(repr(value), length)


def _cut(text: str, length: int) -> str:
    return text if len(text) <= length else f"{text[: length - 1]}…"


def summary(subject: object, *parts: str) -> str:
    """A ``repr`` like ``<Relay [running | memory: 3 delivered]>``. Empty parts are left out."""
    return printable(f"<{type(subject).__name__} [{' | '.join(filter(None, parts))}]>")


def html_table(caption: str, columns: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    """An HTML table of *rows*. Values are shown as people write them. A summary as *caption* loses its brackets."""
    row_iterator = iter(rows)
    body = "".join(_row("td", row) for row in islice(row_iterator, _MOST_ROWS))
    if hidden := sum(1 for _ in row_iterator):
        body += f'<tr><td colspan="{len(columns)}">… and {hidden} more</td></tr>'
    head = _row("th", columns)
    return f"<table><caption>{_cell(caption.strip('<>'))}</caption><thead>{head}</thead><tbody>{body}</tbody></table>"


def _row(tag: str, values: Iterable[object]) -> str:
    cells = "".join(f"<{tag}>{_cell(value)}</{tag}>" for value in values)
    return f"<tr>{cells}</tr>"


def _cell(value: object) -> str:
    text = "" if value is None else value if isinstance(value, str) else shown(value)
    return escape(printable(_cut(text, _LONGEST_CELL)))
