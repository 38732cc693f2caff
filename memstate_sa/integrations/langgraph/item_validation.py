"""Check the operations of a LangGraph store. Values become JSON that both databases can hold."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from datetime import datetime, timedelta
from typing import Any, Literal

from langgraph.store.base import IndexConfig, InvalidNamespaceError, ListNamespacesOp, PutOp, SearchOp, get_text_at_path

from memstate_sa.db.codec import is_text
from memstate_sa.db.tables import utcnow
from memstate_sa.errors import MemstateError
from memstate_sa.integrations.langgraph import item_rows
from memstate_sa.integrations.langgraph.item_rows import ItemRow
from memstate_sa.tracking.payloads import canonical_text

_MAX_SCOPE = 2000
"""A scope is a key of a B-tree, which on PostgreSQL holds about 2,700 bytes."""

_DEPTH = 200


class InvalidItem(MemstateError, ValueError):
    """The item, or the search for items, is invalid. Nothing was written."""


class ItemPut:
    """A valid PutOp. Its value is JSON that both databases can hold."""

    def __init__(self, op: PutOp, fields: Sequence[str] | None) -> None:
        self.id = item_id(op.namespace, op.key)
        self.key, self.ttl = op.key, op.ttl
        self.texts: list[str | None] = []
        self.value: dict[str, Any] | None = None
        if op.value is None:
            return
        if not op.namespace:
            raise InvalidNamespaceError("Invalid namespace: it is empty. Use a tuple with at least one string.")
        if not is_text(op.key):
            raise InvalidItem("Invalid key: it must be a string without NUL or lone surrogates.")
        self.key = str.__str__(op.key)
        if not isinstance(op.value, Mapping):
            raise InvalidItem(f"Invalid value: it must be a dict, not {type(op.value).__name__}.")
        if op.ttl is not None:
            end_of(utcnow(), op.ttl)
        self.scope = scope_of(op.namespace)
        self.value = plain(op.value, "value")
        self.texts = [*_texts(self.value, fields, op.index)] or [None]  # an item has at least one row

    def is_same(self, rows: Sequence[ItemRow]) -> bool:
        """Whether *rows* already hold this item."""
        head = rows[0]
        duration = None if head.expires_at is None else head.expires_at - head.updated_at
        return (
            duration == (None if self.ttl is None else timedelta(minutes=self.ttl))
            and [row.text for row in rows] == self.texts
            and canonical_text(head.value) == canonical_text(self.value)
        )


def wants_results(op: SearchOp | ListNamespacesOp) -> bool:
    """Whether *op* asks for any results. Raises InvalidItem for a limit or an offset below 0."""
    if op.limit < 0 or op.offset < 0:
        raise InvalidItem(f"Invalid limit={op.limit!r} or offset={op.offset!r}: both must be at least 0.")
    return op.limit > 0


def end_of(now: datetime, ttl: Any) -> datetime:
    if isinstance(ttl, bool) or not isinstance(ttl, (int, float)) or not (math.isfinite(ttl) and ttl > 0):
        raise InvalidItem(f"Invalid ttl={ttl!r}: it must be a number of minutes, more than 0.")
    try:
        return now + timedelta(minutes=ttl)
    except OverflowError as error:
        raise InvalidItem(f"Invalid ttl={ttl!r}: the end would be after the year 9999.") from error


def fields_of(index: IndexConfig | Literal[False] | None) -> list[str] | None:
    """The paths to the texts for embedding. None means that nothing is embedded."""
    if index is False:
        return None
    unknown = sorted(set(index or {}) - {"fields"})
    if unknown:
        raise MemstateError(
            f"Invalid index={{{unknown[0]!r}: …}}: only 'fields' is allowed, because the Memory has the embedder. Use "
            "{'fields': […]}."
        )
    return _paths((index or {}).get("fields") or ["$"])


def _paths(paths: Any) -> list[str]:
    if not isinstance(paths, (list, tuple)) or not all(isinstance(path, str) for path in paths):
        raise InvalidItem(f"Invalid index={paths!r}: use a list of paths, or False.")
    return list(paths)


def _texts(value: Any, fields: Sequence[str] | None, index: Any) -> list[str]:
    """The texts of a value for embedding, without duplicates."""
    if fields is None or index is False:
        return []
    paths = fields if index is None else _paths(index)
    texts = (text for path in paths for text in get_text_at_path(value, path))
    return list(dict.fromkeys(text for text in texts if text.strip()))


def plain(value: Any, argument: str, depth: int = 0) -> Any:
    """A copy of *value* in plain JSON types. Raises InvalidItem if JSONB cannot hold it: NUL, lone surrogates, NaN.

    *argument* is the name in the message.
    """
    if depth > _DEPTH:
        raise InvalidItem(f"Invalid {argument}: it has more than {_DEPTH} nested levels. Use fewer.")
    if value is None or isinstance(value, bool):
        return value
    if isinstance(value, str):
        if not is_text(value):
            raise InvalidItem(
                f"Invalid {argument}: it has a string with NUL or lone surrogates. JSONB cannot hold them. Remove them."
            )
        return str.__str__(value)
    if isinstance(value, (int, float)):
        try:
            finite = math.isfinite(value)
        except OverflowError:
            finite = False
        if not finite:
            raise InvalidItem(f"Invalid {argument}: it has a number that is not finite, or too large. Use a string.")
        return int(value) if isinstance(value, int) else float(value)
    if isinstance(value, Mapping):
        if not all(isinstance(name, str) for name in value):
            raise InvalidItem(f"Invalid {argument}: it has a dict with a key that is not a string. Use strings.")
        return {plain(name, argument): plain(inner, argument, depth + 1) for name, inner in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(inner, argument, depth + 1) for inner in value]
    raise InvalidItem(
        f"Invalid {argument}: a value of type {type(value).__name__} is not JSON. Use only dict, list, str, int, "
        "float, bool and None."
    )


def item_id(namespace: tuple[str, ...], key: Any) -> str:
    """The id of an item. A *key* that is not a string has the id of no item: None must not find the item "None"."""
    _check_parts(namespace)
    return item_rows.item_id(namespace, str.__str__(key) if isinstance(key, str) else f"\x00{key!r}")


def scope_of(namespace: tuple[str, ...]) -> str:
    _check_parts(namespace)
    try:
        scope = item_rows.scope_of(namespace)
    except UnicodeEncodeError as error:
        raise InvalidNamespaceError("Invalid namespace: a string in it has lone surrogates. Remove them.") from error
    if len(scope) > _MAX_SCOPE:
        raise InvalidNamespaceError(
            f"Invalid namespace: it is too long. Its strings in UTF-8, and one byte for each string, must have at most "
            f"{_MAX_SCOPE // 2} bytes."
        )
    return scope


def _check_parts(namespace: tuple[str, ...]) -> None:
    # Not every version of LangGraph checks this. NUL ends a part of the namespace, so it must not occur in a part.
    if not isinstance(namespace, (tuple, list)) or not all(isinstance(part, str) and part for part in namespace):
        raise InvalidNamespaceError("Invalid namespace: it must be a tuple of strings that are not empty.")
    if any("\x00" in part for part in namespace):
        raise InvalidNamespaceError("Invalid namespace: a string in it has a NUL. Remove it.")
