"""The owners of leases: their names, and whether their process still runs."""

from __future__ import annotations

import os
from datetime import datetime
from functools import cache
from pathlib import Path
from uuid import UUID, uuid4
from weakref import WeakValueDictionary

from sqlalchemy.engine import Connection

from memstate_sa.db.dialects import database_of


def owner_id() -> str:
    """A name for a new owner. Other processes of this machine can tell from it whether the owner still runs."""
    return f"{_process(os.getpid())}-{uuid4().hex[:8]}"


@cache
def _process(pid: int) -> str:
    """A unique name for this process. A forked child has another *pid*."""
    return f"{_machine()} {pid} {_started(pid)} {uuid4().hex}"


def _machine() -> str:
    """A name for this boot of this machine, and its pid namespace. "?" when they are unknown.

    The host's name would not do, because clones and containers share it. The namespace alone is the same on all
    machines without containers.
    """
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text("ascii").strip()
        return f"{UUID(boot)}/{Path('/proc/self/ns/pid').stat().st_ino}"
    except (OSError, ValueError):
        return _UNKNOWN


def _started(pid: int) -> str:
    """The start time of the process, in clock ticks of this boot, as a pid can be used again. "?" if unknown."""
    try:
        # The name in parentheses may itself contain spaces and parentheses.
        state, *fields = Path(f"/proc/{pid}/stat").read_text("latin-1").rpartition(")")[2].split()
        return "ended" if state in "ZX" else fields[18]
    except (OSError, ValueError, IndexError):
        return _UNKNOWN


_UNKNOWN = "?"


def is_gone(owner: str) -> bool:
    """Whether *owner* is a process of this boot of this machine that has certainly ended.

    Then its slots can be taken before its lease expires. False for an owner that may run on another machine.
    """
    machine, _, process = owner.partition(" ")
    pid, *details = process.split(" ")
    if len(details) != 2 or _UNKNOWN in (machine, details[0]) or machine != _machine() or not pid.isdigit():
        return False
    try:
        os.kill(int(pid), 0)
    except ProcessLookupError:
        return True
    except OSError:
        pass  # the process runs under another user
    return _started(int(pid)) not in (_UNKNOWN, details[0])


_claimants: WeakValueDictionary[str, object] = WeakValueDictionary()
"""The objects of this process that claim slots, by owner."""


def new_owner(claimant: object) -> str:
    """An `owner_id` for *claimant*. `is_dropped` is true when that object is gone."""
    owner = owner_id()
    _claimants[owner] = claimant
    return owner


def is_dropped(owner: str) -> bool:
    """Whether *owner* belongs to this process, but its object is gone."""
    return owner.startswith(_process(os.getpid())) and owner not in _claimants


def database_now(connection: Connection) -> datetime:
    return database_of(connection).now(connection)
