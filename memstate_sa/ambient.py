"""The Session that this thread works in: calls that take none join it."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager

from sqlalchemy.engine import URL, Engine
from sqlalchemy.orm import Session

_Entered = tuple[object, URL, Session]
_here = threading.local()


@contextmanager
def joining(memory: object, engine: Engine, session: Session) -> Iterator[None]:
    """What this thread does with *memory* in *engine*'s database is to join *session*: see `joined`."""
    before: tuple[_Entered, ...] = getattr(_here, "entered", ())
    _here.entered = ((memory, _database(engine), session), *before)
    try:
        yield
    finally:
        _here.entered = before


def joined(memory: object, engine: Engine) -> Session | None:
    """The Session that this thread entered last, of those with *memory* in *engine*'s database."""
    entered: tuple[_Entered, ...] = getattr(_here, "entered", ())
    if not entered:
        return None
    wanted = _database(engine)
    return next((session for of, database, session in entered if of is memory and database == wanted), None)


def _database(engine: Engine) -> URL:
    """Of whatever driver, and whichever engine: on SQLite a second one would wait for the first."""
    return engine.url.set(drivername=engine.url.get_backend_name())
