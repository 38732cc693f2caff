"""Listeners that are added and removed while other threads work.

SQLAlchemy's collections of listeners must not change while another thread iterates over them. So all Memories share one
hub for each event of a target. The hub stays registered, and its tuple of functions is replaced as a whole.

A hub cannot serve ``do_orm_execute``, because a listener there calls the later listeners itself and returns their
result. So each Memory has a place of its own there. The next Memory takes a place that is free.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any
from weakref import WeakKeyDictionary

from sqlalchemy import event

Function = Callable[..., Any]


class _Hub:
    def __init__(self) -> None:
        self.functions: tuple[Function, ...] = ()

    def __call__(self, *arguments: Any) -> None:
        for function in self.functions:
            function(*arguments)


class _Place:
    def __init__(self) -> None:
        self.function: Function | None = None

    def __call__(self, *arguments: Any) -> Any:
        function = self.function
        return None if function is None else function(*arguments)


_hubs: WeakKeyDictionary[Any, dict[str, _Hub]] = WeakKeyDictionary()
_places: WeakKeyDictionary[Any, list[_Place]] = WeakKeyDictionary()
_changing = threading.Lock()
_ANSWERED = "do_orm_execute"


def listen(target: Any, name: str, function: Function, **options: Any) -> None:
    """Call *function* at each event *name* of *target*, until `stop`. Only ``do_orm_execute`` uses its result."""
    with _changing:
        if name == _ANSWERED:
            _take_place(target, function)
            return
        hubs = _hubs.setdefault(target, {})
        hub = hubs.get(name)
        if hub is None:
            hub = hubs[name] = _Hub()
            event.listen(target, name, hub.__call__, **options)
        if function not in hub.functions:
            hub.functions = (*(existing for existing in hub.functions if not _is_over(existing)), function)


def _take_place(target: Any, function: Function) -> None:
    places = _places.setdefault(target, [])
    if any(place.function == function for place in places):
        return
    free = next((place for place in places if place.function is None or _is_over(place.function)), None)
    if free is None:
        free = _Place()
        places.append(free)
        event.listen(target, _ANSWERED, free.__call__)
    free.function = function


def _is_over(function: Function) -> bool:
    """Whether the object behind *function* is gone, so that it does nothing any more."""
    return getattr(function, "is_over", False)


def stop(target: Any, name: str, function: Function) -> None:
    """Stop calling *function*."""
    with _changing:
        for place in _places.get(target, ()) if name == _ANSWERED else ():
            if place.function == function:
                place.function = None
        hub = _hubs.get(target, {}).get(name)
        if hub is not None:
            hub.functions = tuple(existing for existing in hub.functions if existing != function)
