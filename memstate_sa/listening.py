"""Listeners that come and go while other threads work.

SQLAlchemy's own collections must not change while another thread goes through them. So each target has one listener for
each event, for all Memories together, and it stays. The functions that it calls are replaced as a whole.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from contextlib import suppress
from typing import Any
from weakref import WeakKeyDictionary

from sqlalchemy import event
from sqlalchemy.exc import InvalidRequestError

Function = Callable[..., Any]


class _Hub:
    def __init__(self) -> None:
        self.functions: tuple[Function, ...] = ()

    def __call__(self, *arguments: Any) -> None:
        for function in self.functions:
            function(*arguments)


_hubs: WeakKeyDictionary[Any, dict[str, _Hub]] = WeakKeyDictionary()
_changing = threading.Lock()
_ANSWERED = "do_orm_execute"
"""Its listeners call each other by what they return: each Memory has one of its own."""


def listen(target: Any, name: str, function: Function, **options: Any) -> None:
    """Call *function* at each event *name* of *target*, until `stop`. What it returns is ignored."""
    if name == _ANSWERED:
        event.listen(target, name, function, **options)
        return
    with _changing:
        hubs = _hubs.setdefault(target, {})
        hub = hubs.get(name)
        if hub is None:
            hub = hubs[name] = _Hub()
            event.listen(target, name, hub.__call__, **options)
        if function not in hub.functions:
            hub.functions = (*hub.functions, function)


def stop(target: Any, name: str, function: Function) -> None:
    """Do not call *function* any more."""
    if name == _ANSWERED:
        with suppress(InvalidRequestError):  # it was never there
            event.remove(target, name, function)
        return
    with _changing:
        hub = _hubs.get(target, {}).get(name)
        if hub is not None:
            hub.functions = tuple(each for each in hub.functions if each != function)
