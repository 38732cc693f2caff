"""The Session that this thread works in: calls that take none join it."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager

from sqlalchemy.engine import Engine
from sqlalchemy.orm import Session

_Entered = tuple[object, Engine, Session]
_here = threading.local()


@contextmanager
def joining(memory: object, engine: Engine, session: Session) -> Iterator[None]:
    """What this thread does with *memory* in *engine*'s database is to join *session*: see `joined`."""
    before: tuple[_Entered, ...] = getattr(_here, "entered", ())
    _here.entered = ((memory, engine, session), *before)
    try:
        yield
    finally:
        _here.entered = before


def joined(memory: object, engine: Engine) -> Session | None:
    """The Session that this thread entered last, of those with *memory* in *engine*'s database."""
    entered: tuple[_Entered, ...] = getattr(_here, "entered", ())
    return next((session for of, its, session in entered if of is memory and _is_same(its, engine)), None)


def _is_same(one: Engine, other: Engine) -> bool:
    """Whether they are of one database, by whatever driver: on SQLite a second engine would wait for the first."""
    return one is other or one.url.set(drivername=_kind(one)) == other.url.set(drivername=_kind(other))


def _kind(engine: Engine) -> str:
    return engine.url.get_backend_name()
