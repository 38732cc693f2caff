"""Dates and times of PostgreSQL that Python cannot represent: infinity, years BC or after 9999, and 24:00.

Drivers refuse to read them. The log has them as text, which the server accepts with any settings.
"""

from __future__ import annotations

from datetime import date, datetime, time
from typing import Any

from sqlalchemy import types as sqltypes

KINDS = (sqltypes.Date, sqltypes.DateTime, sqltypes.Time)


def is_readable(type_: Any, value: str) -> str:
    """SQL for "Python can represent *value*". *value* is itself SQL."""
    if isinstance(type_, sqltypes.Time):
        return f"extract(hour FROM {value}) < 24"
    zone = "+00" if _has_zone(type_) else ""
    return f"{value} >= '0001-01-01{zone}' AND {value} < '10000-01-01{zone}'"


def as_text(type_: Any, value: str) -> str:
    """SQL for the text of *value*."""
    if isinstance(type_, sqltypes.Time):
        return f"CAST({value} AS text)"
    local = f"timezone('UTC', {value})" if _has_zone(type_) else value
    format_ = "YYYY-MM-DD" if isinstance(type_, sqltypes.Date) else "YYYY-MM-DD HH24:MI:SS.US"
    zone = " || '+00'" if _has_zone(type_) else ""
    return (
        f"CASE WHEN isfinite({value}) THEN to_char({local}, '{format_}'){zone} || "
        f"CASE WHEN extract(year FROM {local}) < 0 THEN ' BC' ELSE '' END ELSE CAST({value} AS text) END"
    )


def read(type_: Any, text: str | None) -> Any:
    """The value of a text that `as_text` wrote, or the text itself if Python cannot represent it."""
    if text is None or text.startswith("24:"):
        return text
    kind = time if isinstance(type_, sqltypes.Time) else date if isinstance(type_, sqltypes.Date) else datetime
    try:
        return kind.fromisoformat(text)
    except ValueError:
        return text


def _has_zone(type_: Any) -> bool:
    return isinstance(type_, sqltypes.DateTime) and type_.timezone
