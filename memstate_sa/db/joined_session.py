"""The Session that this thread has joined with `use_session`. Calls without a Session use it."""

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
    refusal: str | None
    """The error for calls with another Memory. If it is None, such calls work as without this block."""
    task: object
    """The asyncio.Task that began it. None: the thread began it outside of any task."""


class _ThreadBlocks(threading.local):
    def __init__(self) -> None:
        self.blocks: list[_SessionBlock] = []


_thread = _ThreadBlocks()


@contextmanager
def use_session(memory: object, engine: Engine, session: Session, *, refusal: str | None = None) -> Iterator[None]:
    """Make this thread's calls on *memory* in *engine*'s database join *session*. See `current_session`.

    With *refusal*, calls with another Memory in that database raise MemstateError with this text.
    """
    block, blocks = _SessionBlock(memory, engine, session, refusal, _task()), _thread.blocks
    blocks.append(block)
    try:
        yield
    finally:
        blocks.remove(block)  # it may not be the last one, and another thread may run this line


def current_session(memory: object, engine: Engine) -> Session | None:
    """The Session that this thread joined last with *memory* in *engine*'s database, or None.

    Raises MemstateError when it belongs to another Memory, and refuses this one.

    Raises MemstateError when another asyncio task joined it. Writes in that Session could be rolled back by the other
    task. A Session of our own could wait for the other task while it blocks the event loop.
    """
    blocks = (b for b in reversed(_thread.blocks) if b.memory is memory or b.refusal is not None)
    block = next((b for b in blocks if is_same_database(b.engine, engine)), None)
    if block is None:
        return None
    if block.memory is not memory:
        raise MemstateError(block.refusal)
    if block.task is not None and block.task is not _task():
        raise MemstateError(
            "Cannot join this thread's transaction: it belongs to another asyncio task. Await its end, or call this in "
            "a thread (asyncio.to_thread)."
        )
    return block.session


def _task() -> object:
    try:
        return asyncio.current_task()
    except RuntimeError:  # no loop runs in this thread
        return None
