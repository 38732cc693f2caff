"""The error for a table of memstate_sa that is missing or of another version: it says how to create or upgrade it."""

from __future__ import annotations

import re
from typing import Any

from sqlalchemy import Engine, event
from sqlalchemy.engine import ExceptionContext
from sqlalchemy.exc import SQLAlchemyError

from memstate_sa.db.tables import metadata
from memstate_sa.errors import MemstateError

_PROBLEMS = {"42P01": "is not in this database", "42703": "is of another version of memstate_sa"}
_SQLITE_MESSAGES = {"no such table": "42P01", "no such column": "42703", "has no column": "42703"}
_NAME = re.compile(r"memstate_\w+")


class TablesMissing(MemstateError, SQLAlchemyError):
    """The tables of memstate_sa are not in this database."""


def explain(engine: Engine) -> None:
    """Make statements on *engine* raise TablesMissing when they miss one of our tables. Idempotent."""
    dialect = engine.dialect  # engines made by execution_options() share the dialect
    if not event.contains(dialect, "handle_error", _explained):
        event.listen(dialect, "handle_error", _explained)


def _explained(context: ExceptionContext) -> TablesMissing | None:
    error: Any = context.original_exception
    message = str(error)
    state = getattr(error, "sqlstate", None) or next(
        (state for part, state in _SQLITE_MESSAGES.items() if part in message), None
    )
    if state not in _PROBLEMS:
        return None
    # SQLite creates sqlite_sequence, its table of id counters, together with our first table.
    names = ["memstate_outbox"] if "sqlite_sequence" in message else _NAME.findall(message)
    name = next((name for name in names if name in metadata.tables), None)
    if name is None:
        return None
    return TablesMissing(
        f"The table {name} {_PROBLEMS[state]}. Create or upgrade the tables with memory.create_tables(engine), "
        "`memstate-sa init` or an Alembic migration. For a LangGraph checkpointer or store, call setup()."
    )
