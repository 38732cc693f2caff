"""Watchers of the statements of engines, at a fifth of the price of an engine event.

SQLAlchemy prepares much for an event before it asks whether anybody listens to it: a SELECT by primary key takes 10 %
longer. `ExecutionContext.pre_exec` is called for each statement anyway.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from contextlib import suppress
from typing import Any

Watcher = Callable[[Any], None]
"""It is given the ExecutionContext of a statement that is about to be sent, and may raise."""

_changing = threading.Lock()


class _Watched:
    """What the ExecutionContext class of a dialect gets before its other bases."""

    watchers: tuple[Watcher, ...] = ()

    def pre_exec(self) -> None:
        super().pre_exec()  # type: ignore[misc]
        context: Any = self
        try:
            for watcher in self.watchers:
                watcher(context)
        except BaseException:
            with suppress(Exception):  # an interrupt has closed the connection, too
                context.cursor.close()  # as SQLAlchemy does where a listener raises
            raise


def watch(dialect: Any, watcher: Watcher) -> None:
    """Show *watcher* each statement of the engines that have *dialect*, until `unwatch`. Idempotent."""
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
