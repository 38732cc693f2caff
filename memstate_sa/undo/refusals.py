"""The words for rows that the database does not let an undo write."""

from __future__ import annotations

from typing import Any

from sqlalchemy.exc import DBAPIError

from memstate_sa.runtime.printable import printable

_IN_THE_WAY = (
    "Cannot undo: the database refuses the rows as they were, beside those that are there now. It says: {}. Change the "
    "rows in the way, and undo again."
)
_NO_VALUE = (
    "Cannot undo: a row that would come back has no value for a column that must have one. The database says: {}. Give "
    "the column a default in the database, or write the row by hand."
)


def message_of(error: DBAPIError) -> str:
    """Why the database refused, with the name of the constraint, and with the values in the way where it tells them."""
    refusal: Any = error.orig
    diagnostics = getattr(refusal, "diag", None)
    parts = [str(refusal)] if diagnostics is None else [diagnostics.message_primary, diagnostics.message_detail]
    reason = ". ".join(part.strip().rstrip(".") for part in parts if part)
    lacks_value = (
        getattr(refusal, "sqlstate", None) == "23502"
        or getattr(refusal, "sqlite_errorname", None) == "SQLITE_CONSTRAINT_NOTNULL"
    )
    return (_NO_VALUE if lacks_value else _IN_THE_WAY).format(printable(reason))
