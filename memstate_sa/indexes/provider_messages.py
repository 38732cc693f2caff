"""A vendor's words about a failure, for an operator: short, printable, without the texts that were sent. Pure."""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Iterable, Iterator
from http import HTTPStatus
from typing import Any

from memstate_sa.runtime.printable import printable

_LONGEST = 200
_PIECE = 12
"""A provider may quote the text that it refuses. Pieces of it from this length on are left out of its words."""
_NAMES = ("message", "error", "detail", "errors", "msg", "reason", "title", "description")
_STATUS_LINE = re.compile(r"for url:?\s", re.IGNORECASE)
_QUERY = re.compile(r"(https?://)(?:[^\s/@]*@)?([^\s?'\"]*)(\?[^\s'\"]*)?")


def phrase(status: int) -> str:
    """The status with its name in HTTP."""
    try:
        return f"{status} {HTTPStatus(status).phrase}"
    except ValueError:
        return str(status)


def words(chain: Iterable[BaseException], sent: Collection[str]) -> str:
    """The first line of what the provider itself says, without what of *sent* it quotes; or nothing."""
    links = list(chain)
    said = next((text for link in links if (text := _body(getattr(link, "response", None)))), None)
    if said is None and links and not _STATUS_LINE.search(str(links[0])):
        said = str(links[0])
    line = next((line for line in (said or "").splitlines() if line.strip()), "")
    line = " ".join(_QUERY.sub(r"\1\2", line[: 4 * _LONGEST]).split())
    shown = printable(_without(line, sent))
    return shown if len(shown) <= _LONGEST else f"{shown[:_LONGEST]}…"


def _body(response: Any) -> str | None:
    """The words in an HTTP answer. A gateway's page in HTML has none."""
    try:
        return _message(response.json(), 4)
    except Exception:  # noqa: BLE001  # no answer, no JSON, a stream that was not read: each client has its own
        text = getattr(response, "_content", None)
        said = text.decode("utf-8", "replace") if isinstance(text, bytes) else ""
        return said if said and not said.lstrip().startswith(("<", "{", "[")) else None


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
    """The places in *line* where a piece of *form* begins, or the whole of a short one."""
    size = min(_PIECE, len(form))
    if size >= 3:
        yield from (start for start in range(len(line) - size + 1) if line[start : start + size] in form)


def _forms(text: str) -> set[str]:
    """*text* as it is, and as programs quote it."""
    return {_lower(" ".join(form.split())) for form in (text, repr(text)[1:-1], json.dumps(text)[1:-1])}


def _lower(text: str) -> str:
    """Each character stays one."""
    return "".join(low if len(low := c.lower()) == 1 else c for c in text)
