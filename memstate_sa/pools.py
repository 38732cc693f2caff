"""Connections beside those of an application's pool."""

from __future__ import annotations

import os
import threading
from functools import partial
from typing import TYPE_CHECKING

from sqlalchemy import Engine, Pool, event
from sqlalchemy.engine.base import OptionEngine

_MADE = "memstate_own_pool"
_making = threading.Lock()


class _Apart(OptionEngine):
    """As an engine is, with its events and its options, but for the pool."""

    def __init__(self, engine: Engine) -> None:
        self._own = engine.pool.recreate()
        super().__init__(engine, {})

    if not TYPE_CHECKING:

        @property
        def pool(self) -> Pool:
            return self._own

        @pool.setter
        def pool(self, pool: Pool) -> None:
            self._own = pool


def own_pool(engine: Engine) -> Engine:
    """*engine* with a pool of its own, which is disposed of with the engine.

    Who holds a connection while waiting for a second one of the same pool waits for ever, once enough others do.
    """
    if engine.dialect.server_version_info is None:
        # What the first connection finds out is found out once; one of another pool would not wait for it.
        engine.connect().close()
    with _making:
        pid, made = getattr(engine, _MADE, (0, engine))
        if pid != os.getpid():  # its connections would be the parent's
            made = _Apart(engine)
            setattr(engine, _MADE, (os.getpid(), made))
            event.listen(engine, "engine_disposed", partial(_dispose, made, os.getpid()))
        return made


def _dispose(made: Engine, pid: int, engine: Engine) -> None:
    if engine is not made and pid == os.getpid():
        made.dispose()
