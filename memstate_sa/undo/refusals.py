"""The error messages for rows that the database refuses during an undo."""

from __future__ import annotations

from typing import Any

from sqlalchemy.exc import DBAPIError

from memstate_sa.runtime.printable import printable

_IN_THE_WAY = (
    "Cannot undo: the old rows contradict rows that exist now. The database says: {}. Change the rows in the way, and "
    "undo again."
)
_NO_VALUE = (
    "Cannot undo: a restored row has no value for a NOT NULL column. The database says: {}. Give the column a default "
    "in the database, or write the row by hand."
)


def message_of(error: DBAPIError) -> str:
    """The error message for a refusal. It quotes the database, which names the constraint, and often the values."""
    refusal: Any = error.orig
    diagnostics = getattr(refusal, "diag", None)
    parts = [str(refusal)] if diagnostics is None else [diagnostics.message_primary, diagnostics.message_detail]
    reason = ". ".join(part.strip().rstrip(".") for part in parts if part)
    lacks_value = (
        getattr(refusal, "sqlstate", None) == "23502"
        or getattr(refusal, "sqlite_errorname", None) == "SQLITE_CONSTRAINT_NOTNULL"
    )
    return (_NO_VALUE if lacks_value else _IN_THE_WAY).format(printable(reason))
