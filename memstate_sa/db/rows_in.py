"""Conditions that find rows by composite keys."""

from __future__ import annotations

from typing import Any

from sqlalchemy import Boolean
from sqlalchemy.ext.compiler import compiles
from sqlalchemy.sql.functions import FunctionElement


class rows_in(FunctionElement[bool]):
    """``(a, b) IN (:keys)``, served by the index on (a, b)."""

    inherit_cache = True
    type = Boolean()

    def self_group(self, against: Any = None) -> rows_in:
        return self  # SQLAlchemy would add "= 1" to a boolean on SQLite, which would prevent index use


class rows_are(rows_in):
    """Like `rows_in`, for keys with NULL in a part, which SQLite allows. SQLite then uses no index."""

    inherit_cache = True


@compiles(rows_in)
def _rows_in_any(element: Any, compiler: Any, **kw: Any) -> str:
    row, keys = (compiler.process(clause, **kw) for clause in element.clauses)
    return f"{row} IN {keys}"


@compiles(rows_in, "sqlite")
def _rows_in_sqlite(element: Any, compiler: Any, **kw: Any) -> str:
    """Select from the VALUES, because SQLite scans the table for a bare list of VALUES."""
    row, keys = (compiler.process(clause, **kw) for clause in element.clauses)
    return f"{row} IN (SELECT * FROM {keys})"  # noqa: S608  # the keys are parameters


@compiles(rows_are, "sqlite")
def _rows_are_sqlite(element: Any, compiler: Any, **kw: Any) -> str:
    row, keys = element.clauses
    parts = (compiler.process(part, **kw) for part in row.clauses)
    same = " AND ".join(f"memstate_key.column{n} IS {part}" for n, part in enumerate(parts, start=1))
    return f"EXISTS (SELECT 1 FROM {compiler.process(keys, **kw)} AS memstate_key WHERE {same})"  # noqa: S608
