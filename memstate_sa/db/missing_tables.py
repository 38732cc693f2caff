"""What to do where a table of ours is not in the database, or is of another version. One place says so."""

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
    """Have statements on *engine* that miss a table of ours raise TablesMissing. Idempotent."""
    dialect = engine.dialect  # which an engine shares with those that execution_options() makes of it
    if not event.contains(dialect, "handle_error", _explained):
        event.listen(dialect, "handle_error", _explained)


def _explained(context: ExceptionContext) -> TablesMissing | None:
    error: Any = context.original_exception
    message = str(error)
    state = getattr(error, "sqlstate", None) or next(
        (state for said, state in _SQLITE_MESSAGES.items() if said in message), None
    )
    if state not in _PROBLEMS:
        return None
    # SQLite makes this table, of the counters of ids, along with the first of ours.
    names = ["memstate_outbox"] if "sqlite_sequence" in message else _NAME.findall(message)
    name = next((name for name in names if name in metadata.tables), None)
    if name is None:
        return None
    return TablesMissing(
        f"The table {name} {_PROBLEMS[state]}. Create or upgrade the tables with memory.create_tables(engine), "
        "`memstate-sa init` or an Alembic migration; setup() does it for a LangGraph checkpointer or store."
    )
