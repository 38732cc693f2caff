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
class _SessionBlock:
    """A ``with use_session(…)`` that has not ended."""

    memory: object
    engine: Engine
    session: Session
    task: object
    """The asyncio.Task that began it; None: the thread itself, and whatever it calls."""


class _ThreadBlocks(threading.local):
    def __init__(self) -> None:
        self.blocks: list[_SessionBlock] = []


_thread = _ThreadBlocks()


@contextmanager
def use_session(memory: object, engine: Engine, session: Session) -> Iterator[None]:
    """Have what this thread does with *memory* in *engine*'s database join *session*: see `current_session`."""
    block, blocks = _SessionBlock(memory, engine, session, _task()), _thread.blocks
    blocks.append(block)
    try:
        yield
    finally:
        blocks.remove(block)  # not the last: another task's block may have begun since, and another thread may end this


def current_session(memory: object, engine: Engine) -> Session | None:
    """The Session that this thread joined last, of those with *memory* in *engine*'s database.

    Raises MemstateError where an asyncio task joined it, and another one asks: what that commits would be rolled back
    with what it knows nothing of; and in a Session of its own it could wait, with the loop, for the first.
    """
    newest_first = reversed(_thread.blocks)
    block = next((one for one in newest_first if one.memory is memory and is_same_database(one.engine, engine)), None)
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
