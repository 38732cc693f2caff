"""The ids of the thread, the graph and the checkpoint in a config."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any
from uuid import UUID

from memstate_sa.db.codec import is_text
from memstate_sa.errors import MemstateError


class InvalidThread(MemstateError, ValueError):
    """The config has no valid thread. Nothing was read or written."""


_NO_THREAD = (
    "Cannot find the thread: thread_id is {}. All callers without an id would share one conversation. "
    'Set {{"configurable": {{"thread_id": …}}}} to a string, an int or a UUID, for example str(uuid4()).'
)


def as_text(value: Any) -> str | None:
    """A string, an int or a UUID as text. None for other types."""
    if isinstance(value, str):
        return str.__str__(value)  # an enum member is a string, too: take its value
    return str(value) if isinstance(value, (int, UUID)) and not isinstance(value, bool) else None


def thread_id_of(value: Any) -> str:
    """The id of a thread, as text.

    Raises InvalidThread for None, "" and other values that are not ids. Otherwise all callers without an id would share
    one conversation.
    """
    thread_id = as_text(value)
    if thread_id is None or not thread_id.strip():
        problem = value if value is None else "blank" if thread_id is not None else f"of type {type(value).__name__}"
        raise InvalidThread(_NO_THREAD.format(problem))
    if not is_text(thread_id):
        raise InvalidThread("Cannot use this thread_id: it has a NUL or a lone surrogate. Use another string.")
    return thread_id


def configured(config: Any) -> Mapping[str, Any]:
    """The ``configurable`` part of *config*."""
    conf: Mapping[str, Any] = (config or {}).get("configurable") or {}
    return conf


def graph_of(config: Any) -> tuple[str, str]:
    """The thread in *config*, and its graph: "" for the graph itself, a path for a subgraph."""
    conf = configured(config)
    ns = conf.get("checkpoint_ns") or ""
    if not is_text(ns):
        raise InvalidThread("Cannot use this checkpoint_ns: it is not a string, or has a NUL or a lone surrogate.")
    thread_id = thread_id_of(conf.get("thread_id"))
    if thread_id == "None":  # a graph's get_state and update_state turn None into this
        raise InvalidThread(_NO_THREAD.format("None"))
    return thread_id, str.__str__(ns)


def checkpoint_id_of(config: Any) -> str | None:
    """The checkpoint id in *config*. None means the latest checkpoint."""
    value = configured(config).get("checkpoint_id") or None
    checkpoint_id = None if value is None else as_text(value)
    if value is not None and not is_text(checkpoint_id):
        raise InvalidThread("Cannot use this checkpoint_id: it is not a string, or has a NUL or a lone surrogate.")
    return checkpoint_id
