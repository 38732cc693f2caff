"""A vendor's own message about a failure, for an operator: short, printable, and without the sent texts. Pure."""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Iterable, Iterator
from http import HTTPStatus
from typing import Any

from memstate_sa.runtime.printable import printable

_LONGEST = 200
_PIECE = 12
"""A provider may quote a refused text. Quotations of at least this length are removed from its message."""
_NAMES = ("message", "error", "detail", "errors", "msg", "reason", "title", "description")
_STATUS_LINE = re.compile(r"for url:?\s", re.IGNORECASE)
_QUERY = re.compile(r"(https?://)(?:[^\s/@]*@)?([^\s?'\"]*)(\?[^\s'\"]*)?")


def phrase(status: int) -> str:
    """The HTTP status with its name."""
    try:
        return f"{status} {HTTPStatus(status).phrase}"
    except ValueError:
        return str(status)


def words(chain: Iterable[BaseException], sent: Collection[str]) -> str:
    """The first line of the provider's own message, without quotations of the *sent* texts. It may be empty."""
    links = list(chain)
    message = next((text for link in links if (text := _body(getattr(link, "response", None)))), None)
    if message is None and links and not _STATUS_LINE.search(str(links[0])):
        message = str(links[0])
    line = next((line for line in (message or "").splitlines() if line.strip()), "")
    line = " ".join(_QUERY.sub(r"\1\2", line[: 4 * _LONGEST]).split())
    shown = printable(_without(line, sent))
    return shown if len(shown) <= _LONGEST else f"{shown[:_LONGEST]}…"


def _body(response: Any) -> str | None:
    """The message in an HTTP answer. None for a gateway's HTML page."""
    try:
        return _message(response.json(), 4)
    except Exception:  # noqa: BLE001  # without a JSON answer, each client raises another error
        content = getattr(response, "_content", None)
        text = content.decode("utf-8", "replace") if isinstance(content, bytes) else ""
        return text if text and not text.lstrip().startswith(("<", "{", "[")) else None


def _message(answer: Any, depth: int) -> str | None:
    if isinstance(answer, str):
        return answer.strip() or None
    if depth == 0:
        return None
    if isinstance(answer, dict):
        inner: Iterable[Any] = [answer[name] for name in _NAMES if name in answer]
    else:
        inner = answer if isinstance(answer, list) else []
    return next((text for part in inner if (text := _message(part, depth - 1))), None)


def _without(line: str, sent: Collection[str]) -> str:
    compared, covered = _lower(line), [False] * len(line)
    for text in sent:
        for form in _forms(text):
            for start in _places(compared, form):
                covered[start : start + min(_PIECE, len(form))] = [True] * min(_PIECE, len(form))
    return re.sub("\0+", "…", "".join("\0" if hidden else c for c, hidden in zip(line, covered, strict=True)))


def _places(line: str, form: str) -> Iterator[int]:
    """The offsets in *line* where a piece of *form* begins. A short *form* counts only as a whole."""
    size = min(_PIECE, len(form))
    if size >= 3:
        yield from (start for start in range(len(line) - size + 1) if line[start : start + size] in form)


def _forms(text: str) -> set[str]:
    """*text* itself, and its quoted forms in Python and JSON."""
    return {_lower(" ".join(form.split())) for form in (text, repr(text)[1:-1], json.dumps(text)[1:-1])}


def _lower(text: str) -> str:
    """*text* in lower case, with the same length: a character with a longer lower case stays unchanged."""
    return "".join(low if len(low := c.lower()) == 1 else c for c in text)
