"""Forks: a child must not share connections, threads, names and locks with its parent.

gunicorn --preload, uWSGI and multiprocessing fork a process that has relays and pools. Each object that cannot be used
in two processes registers here how a child renews its copy.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar
from weakref import WeakKeyDictionary

T = TypeVar("T")

_renewals: WeakKeyDictionary[Any, Callable[[Any], None]] = WeakKeyDictionary()
_left_to_parent: list[Any] = []


def in_child(thing: T, renew: Callable[[T], None]) -> None:
    """Call ``renew(thing)`` in every child that is forked while *thing* lives.

    *renew* must not refer to *thing*, or *thing* would live forever.
    """
    _renewals[thing] = renew


def leave_to_parent(thing: Any) -> None:
    """Keep *thing* until this child ends. Its destructor would talk to the parent's server session."""
    _left_to_parent.append(thing)


class _Gate:
    """Lets threads in, except during a fork."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._inside: list[int] = []
        self._is_forking = False

    @contextmanager
    def inside(self) -> Iterator[None]:
        me = threading.get_ident()
        with self._changed:
            while self._is_forking and me not in self._inside:
                self._changed.wait()
            self._inside.append(me)
        try:
            yield
        finally:
            with self._changed:
                self._inside.remove(me)
                self._changed.notify_all()

    def close(self) -> None:
        """Wait until no other thread is inside."""
        me = threading.get_ident()
        with self._changed:
            self._is_forking = True
            self._changed.wait_for(lambda: not any(thread != me for thread in self._inside), _PATIENCE_S)

    def open(self) -> None:
        with self._changed:
            self._is_forking = False
            self._changed.notify_all()

    def renew(self) -> None:
        """Renew the gate in the child, which has only this thread."""
        me = threading.get_ident()
        self._changed, self._is_forking = threading.Condition(), False
        self._inside = [thread for thread in self._inside if thread == me]


_PATIENCE_S = 5.0
_gate = _Gate()
uninterrupted = _gate.inside
"""Makes a fork wait until the block ``with uninterrupted():`` ends, for a few seconds at most.

SQLite records its locks per process. A child that is forked during another thread's transaction would believe forever
that it has the locks of that transaction.
"""


def _renew_all() -> None:
    _gate.renew()
    for thing, renew in list(_renewals.items()):
        renew(thing)


os.register_at_fork(before=_gate.close, after_in_parent=_gate.open, after_in_child=_renew_all)
