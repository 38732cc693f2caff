"""Whether a member of a JSON document equals a scalar, as SQL; `json_filter` compares more than scalars."""

from __future__ import annotations

from typing import Any

from sqlalchemy import ColumnElement, exists, func, literal, not_, or_, select, type_coerce
from sqlalchemy.dialects.postgresql import JSONB


def member_equals(dialect_name: str, document: Any, name: str, value: str | float | bool | None) -> ColumnElement[bool]:
    """Whether the member *name* is this JSON value: of this type, and nothing that merely casts to it.

    None also selects documents without the member.
    """
    if dialect_name == "postgresql":
        jsonb: Any = type_coerce(document, JSONB)
        if value is None:
            return or_(not_(jsonb.has_key(name)), jsonb.contains({name: None}))
        contains: ColumnElement[bool] = jsonb.contains({name: value})
        return contains
    # A row for each field, and no path in which the name would have to be quoted.
    field = func.json_each(document).table_valued("key", "type", "atom")
    row = select(literal(1)).select_from(field).where(field.c.key == name)
    if value is None:
        return not_(exists(row.where(field.c.type != "null")))
    if isinstance(value, bool):
        return exists(row.where(field.c.type == ("true" if value else "false")))
    if isinstance(value, str):
        return exists(row.where(field.c.type == "text", field.c.atom == value))
    number = value if -(2**63) <= value < 2**63 else float(value)  # as SQLite itself reads larger ones
    return exists(row.where(field.c.type.in_(("integer", "real")), field.c.atom == literal(number)))
