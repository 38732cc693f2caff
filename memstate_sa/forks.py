"""What a forked child must not share with its parent: connections, threads, names, and locks that a thread may hold.

gunicorn --preload, uWSGI and multiprocessing fork a process that has relays and pools. Each object that cannot be used
in two processes says here how a child renews its copy.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any, TypeVar
from weakref import WeakKeyDictionary

T = TypeVar("T")

_renewals: WeakKeyDictionary[Any, Callable[[Any], None]] = WeakKeyDictionary()
_left_to_parent: list[Any] = []


def in_child(thing: T, renew: Callable[[T], None]) -> None:
    """Call ``renew(thing)`` in every child that is forked while *thing* lives.

    *renew* must not refer to *thing*, which would then live for ever.
    """
    _renewals[thing] = renew


def leave_to_parent(thing: Any) -> None:
    """Keep *thing* until this child ends. Its destructor would talk to the parent's server session."""
    _left_to_parent.append(thing)


def _renew_all() -> None:
    for thing, renew in list(_renewals.items()):
        renew(thing)


os.register_at_fork(after_in_child=_renew_all)
