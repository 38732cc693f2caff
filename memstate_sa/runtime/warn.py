"""Warnings that point at the application's line, and not at the frames of memstate_sa and SQLAlchemy."""

from __future__ import annotations

import os
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path
from types import FrameType

import sqlalchemy

_INSIDE = tuple(f"{folder}{os.sep}" for folder in (Path(__file__).parents[1], Path(sqlalchemy.__file__).parent))
"""The folders whose frames are skipped."""


def warn(message: str, category: type[Warning]) -> None:
    """Warn about the nearest calling line outside of memstate_sa and SQLAlchemy."""
    frame = next((frame for frame in _frames() if not _is_inside(frame)), None)
    if frame is None:
        warnings.warn(message, category, stacklevel=2)
        return
    names = frame.f_globals
    warnings.warn_explicit(
        message,
        category,
        filename=frame.f_code.co_filename,
        lineno=frame.f_lineno,
        module=names.get("__name__", "<unknown>"),
        registry=names.setdefault("__warningregistry__", {}),
    )


def _is_inside(frame: FrameType) -> bool:
    """Whether *frame* is ours or SQLAlchemy's. Code that SQLAlchemy generates has no file, like a Python prompt."""
    file = frame.f_code.co_filename
    return file.startswith(_INSIDE) or (file.startswith("<") and frame.f_globals.get("__name__") != "__main__")


def _frames() -> Iterator[FrameType]:
    frame: FrameType | None = sys._getframe(1)  # noqa: SLF001  # inspect.stack() reads every file
    parents = _greenlet_parents()
    while frame is not None:
        yield frame
        # An AsyncSession works in a greenlet. Its first frame has no caller: that is in the parent greenlet.
        frame = frame.f_back or next(parents, None)


def _greenlet_parents() -> Iterator[FrameType]:
    greenlets = sys.modules.get("greenlet")
    current = None if greenlets is None else greenlets.getcurrent().parent
    while current is not None:
        if current.gr_frame is not None:
            yield current.gr_frame
        current = current.parent
