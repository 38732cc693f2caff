"""PostgreSQL's interval has months, days and seconds, each with a sign. Python's timedelta has days and seconds.

An interval that fits into a timedelta without loss is read as one. Any other is read as text with all three parts,
which the server accepts.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from datetime import timedelta
from decimal import Decimal
from typing import Any

from sqlalchemy import types as sqltypes
from sqlalchemy.dialects.postgresql import INTERVAL
from sqlalchemy.engine import Dialect
from sqlalchemy.types import UserDefinedType

KINDS = (sqltypes.Interval, INTERVAL)

_MONTHS = "(extract(year FROM {0}) * 12 + extract(month FROM {0}))"
_SECONDS = "(extract(hour FROM {0}) * 3600 + extract(minute FROM {0}) * 60 + extract(second FROM {0}))"
_TEXT = f"{_MONTHS} || ' mons ' || extract(day FROM {{0}}) || ' days ' || {_SECONDS} || ' secs'"
_IS_TIMEDELTA = f"{_MONTHS} = 0 AND {_SECONDS} >= 0 AND {_SECONDS} < 86400"
_PARTS = re.compile(r"(-?\d+) mons (-?\d+) days (-?[\d.]+) secs")


def as_text(value: str) -> str:
    """SQL for the text of *value*, which is itself SQL."""
    return _TEXT.format(value)


def is_timedelta(value: str) -> str:
    """SQL for "*value* fits into a timedelta without loss"."""
    return _IS_TIMEDELTA.format(value)


def _parts(text: str) -> tuple[int, int, Decimal]:
    match = _PARTS.fullmatch(text)
    if match is None:
        raise ValueError(f"{text!r} is not an interval.")
    return int(match[1]), int(match[2]), Decimal(match[3])


def as_timedelta(value: Any) -> Any:
    """An interval as psycopg reads it: a year has 365 days, and a month has 30."""
    if not isinstance(value, str):
        return value
    months, days, seconds = _parts(value)
    years, rest = divmod(abs(months), 12)
    sign = -1 if months < 0 else 1
    return timedelta(sign * (years * 365 + rest * 30) + days, microseconds=int(seconds * 1_000_000))


class RawInterval(UserDefinedType[Any]):
    """An interval that travels as text. It is read as a timedelta, or as text when a timedelta would lose a part."""

    cache_ok = True

    def get_col_spec(self, **_: Any) -> str:
        raise NotImplementedError("RawInterval is for expressions only.")

    def result_processor(self, dialect: Dialect, coltype: object) -> Callable[[Any], Any]:
        def read(text: str | None) -> Any:
            if text is None:
                return None
            months, _, seconds = _parts(text)
            return as_timedelta(text) if months == 0 and 0 <= seconds < 86400 else text

        return read

    def bind_processor(self, dialect: Dialect) -> Callable[[Any], Any]:
        def write(value: Any) -> Any:
            if not isinstance(value, timedelta):
                return value
            return f"{value.days} days {value.seconds}.{value.microseconds:06} secs"

        return write
