"""Who holds a lease: names of owners, and whether their process still runs."""

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
    """Names this holder so that another process of this machine can tell whether it is still alive."""
    return f"{_process(os.getpid())}-{uuid4().hex[:8]}"


@cache
def _process(pid: int) -> str:
    """A name for this process, which no other has. A forked child has another *pid*."""
    return f"{_machine()} {pid} {_started(pid)} {uuid4().hex}"


def _machine() -> str:
    """This boot of this machine, and the pid namespace in it; "?" where the system does not tell.

    Not the host's name: clones share it, and so do containers. The namespace alone is a constant outside of containers.
    """
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text("ascii").strip()
        return f"{UUID(boot)}/{Path('/proc/self/ns/pid').stat().st_ino}"
    except (OSError, ValueError):
        return _UNKNOWN


def _started(pid: int) -> str:
    """When the process began, in clock ticks of this boot: a pid is given again. "?" where that is not told."""
    try:
        # The name in parentheses may itself hold spaces and parentheses.
        state, *fields = Path(f"/proc/{pid}/stat").read_text("latin-1").rpartition(")")[2].split()
        return "ended" if state in "ZX" else fields[18]
    except (OSError, ValueError, IndexError):
        return _UNKNOWN


_UNKNOWN = "?"


def is_gone(owner: str) -> bool:
    """Whether *owner* certainly runs no more: a process of this boot of this machine that has ended.

    Its lease is not waited for. False wherever it may live elsewhere.
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
        pass  # it is there, and another user's
    return _started(int(pid)) not in (_UNKNOWN, details[0])


_holding: WeakValueDictionary[str, object] = WeakValueDictionary()
"""Who claims in this process, by owner."""


def new_owner(who: object) -> str:
    """An `owner_id` that is *who*'s, as long as that object lives."""
    owner = owner_id()
    _holding[owner] = who
    return owner


def is_dropped(owner: str) -> bool:
    """Whether *owner* was of this process, and the application has no such relay any more."""
    return owner.startswith(_process(os.getpid())) and owner not in _holding


def database_now(connection: Connection) -> datetime:
    return database_of(connection).now(connection)
