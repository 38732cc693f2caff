"""Any number of keys or rows in one bound parameter: a JSON array, which the database takes apart.

In the layers above the driver, such a parameter costs a tenth of an executemany, and it needs one round trip. The text
of the statement is the same for any number of keys, so statement caches work.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import pydantic_core
from sqlalchemy import ColumnElement, FromClause, String, Text, bindparam, literal_column
from sqlalchemy.ext.compiler import compiles
from sqlalchemy.sql.elements import Cast
from sqlalchemy.sql.functions import FunctionElement
from sqlalchemy.types import TypeEngine


class _elements(FunctionElement[Any]):
    """The elements of a JSON array, in their order."""

    inherit_cache = True


class _strings(_elements):
    """The elements of a JSON array of strings, as text."""

    inherit_cache = True


@compiles(_strings, "sqlite")
@compiles(_elements, "sqlite")
def _elements_sqlite(element: Any, compiler: Any, **kw: Any) -> str:
    return f"json_each({compiler.process(element.clauses, **kw)})"


@compiles(_elements, "postgresql")
def _elements_postgresql(element: Any, compiler: Any, **kw: Any) -> str:
    return f"jsonb_array_elements(CAST({compiler.process(element.clauses, **kw)} AS JSONB))"


@compiles(_strings, "postgresql")
def _strings_postgresql(element: Any, compiler: Any, **kw: Any) -> str:
    return f"jsonb_array_elements_text(CAST({compiler.process(element.clauses, **kw)} AS JSONB))"


# -- keys -------------------------------------------------------------------------------------------------------------


def unnest_strings(parameter: str) -> FromClause:
    """A FROM element with the strings of *parameter* in its column ``value``. Bind the parameter with `as_array`."""
    return _strings(bindparam(parameter, type_=Text())).table_valued("value", name=parameter)


def as_array(keys: Iterable[str]) -> str:
    return as_json(list(keys))


def as_json(data: Any) -> str:
    """*data* as JSON, written by Pydantic's serializer: it takes a third of the time of the standard library's."""
    return pydantic_core.to_json(data).decode()


# -- rows -------------------------------------------------------------------------------------------------------------


class _element(FunctionElement[Any]):
    """Element *n* of a JSON array, as text."""

    inherit_cache = True

    def __init__(self, array: ColumnElement[Any], n: int) -> None:
        super().__init__(array, literal_column(str(n)))


@compiles(_element, "sqlite")
def _element_sqlite(element: Any, compiler: Any, **kw: Any) -> str:
    array, n = (compiler.process(clause, **kw) for clause in element.clauses)
    return f"json_extract({array}, '$[{n}]')"


@compiles(_element, "postgresql")
def _element_postgresql(element: Any, compiler: Any, **kw: Any) -> str:
    array, n = (compiler.process(clause, **kw) for clause in element.clauses)
    return f"({array} ->> {n})"


class typed(Cast[Any]):
    """A cast on PostgreSQL, where elements are text. On SQLite, elements have their types, so there is no cast."""

    inherit_cache = True


@compiles(typed, "sqlite")
def _typed_sqlite(element: Any, compiler: Any, **kw: Any) -> str:
    return str(compiler.process(element.clause, **kw))


def unnest_rows(parameter: str) -> FromClause:
    """A FROM element with the rows of *parameter*, a JSON array of arrays. `row_value` gives its columns."""
    return _elements(bindparam(parameter, type_=Text())).table_valued("value", name=f"{parameter}_given")


def row_value(rows: FromClause, n: int, type_: TypeEngine[Any]) -> ColumnElement[Any]:
    """Item *n* of each row of `unnest_rows`, as *type_*. JSON null is NULL."""
    # Strings are cast to TEXT, because a cast to VARCHAR(n) would cut a long string that the column must refuse.
    return typed(_element(rows.c.value, n), Text() if isinstance(type_, String) else type_)
