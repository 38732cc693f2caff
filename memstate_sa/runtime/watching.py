"""Watchers of an engine's statements, at a fifth of the cost of an engine event.

An event makes SQLAlchemy prepare much for each statement: a SELECT by primary key takes 10 % longer. The method
`ExecutionContext.pre_exec` is called for each statement anyway.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from contextlib import suppress
from typing import Any

Watcher = Callable[[Any], None]
"""It takes the ExecutionContext of a statement that is about to be sent, and may raise."""

_changing = threading.Lock()


class _Watched:
    """A mixin that `watch` puts in front of the ExecutionContext class of a dialect."""

    watchers: tuple[Watcher, ...] = ()

    def pre_exec(self) -> None:
        super().pre_exec()  # type: ignore[misc]
        context: Any = self
        try:
            for watcher in self.watchers:
                watcher(context)
        except BaseException:
            with suppress(Exception):  # an interrupt has closed the connection already
                context.cursor.close()  # SQLAlchemy does the same when a listener raises
            raise


def watch(dialect: Any, watcher: Watcher) -> None:
    """Call *watcher* for each statement of the engines that have *dialect*, until `unwatch`. Idempotent."""
    with _changing:
        kind = dialect.execution_ctx_cls
        if not issubclass(kind, _Watched):
            kind = dialect.execution_ctx_cls = type(kind.__name__, (_Watched, kind), {})
        if watcher not in kind.watchers:
            kind.watchers = (*kind.watchers, watcher)


def unwatch(dialect: Any, watcher: Watcher) -> None:
    with _changing:
        kind = dialect.execution_ctx_cls
        kind.watchers = tuple(other for other in getattr(kind, "watchers", ()) if other != watcher)
