"""The Session that this thread works in: calls that take none join it."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from sqlalchemy.engine import Engine
from sqlalchemy.orm import Session

from memstate_sa.db.engines import is_same_database
from memstate_sa.errors import MemstateError


@dataclass(eq=False)
class _Entered:
    memory: object
    engine: Engine
    session: Session
    task: object
    """The asyncio.Task that entered it; None: the thread itself, and whatever it calls."""


class _Here(threading.local):
    def __init__(self) -> None:
        self.entered: list[_Entered] = []


_here = _Here()


@contextmanager
def use_session(memory: object, engine: Engine, session: Session) -> Iterator[None]:
    """What this thread does with *memory* in *engine*'s database is to join *session*: see `joined`."""
    mine, entered = _Entered(memory, engine, session, _task()), _here.entered
    entered.append(mine)
    try:
        yield
    finally:
        entered.remove(mine)  # not the last: another task's block may have begun since, and another thread may end this


def current_session(memory: object, engine: Engine) -> Session | None:
    """The Session that this thread entered last, of those with *memory* in *engine*'s database.

    Raises MemstateError where an asyncio task entered it, and another one asks: what that commits would be rolled back
    with what it knows nothing of; and in a Session of its own it could wait, with the loop, for the first.
    """
    every = reversed(_here.entered)
    block = next((one for one in every if one.memory is memory and is_same_database(one.engine, engine)), None)
    if block is None:
        return None
    if block.task is not None and block.task is not _task():
        raise MemstateError(
            "another asyncio task of this thread is in a transaction, which is its own: await its end, or call this in "
            "a thread (asyncio.to_thread)"
        )
    return block.session


def _task() -> object:
    try:
        return asyncio.current_task()
    except RuntimeError:  # no loop runs in this thread
        return None
