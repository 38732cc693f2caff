"""Conditions on a JSON document, as SQL with bound values. They compare by JSON's types, alike on both databases."""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping
from typing import Any, Protocol

from sqlalchemy import (
    ColumnElement,
    Integer,
    Text,
    and_,
    case,
    cast,
    exists,
    false,
    func,
    literal,
    not_,
    or_,
    select,
    true,
    type_coerce,
)
from sqlalchemy.dialects.postgresql import JSONB
from sqlalchemy.sql.expression import literal_column

from memstate_sa.db.dialects import POSTGRESQL, SQLITE, Database
from memstate_sa.db.json_params import as_json

_Test = Callable[[Any], ColumnElement[bool]]
_ORDERINGS = {"$gt": operator.gt, "$gte": operator.ge, "$lt": operator.lt, "$lte": operator.le}


def matches(database: Database, document: Any, filter_: Mapping[str, Any]) -> ColumnElement[bool]:
    """SQL for "each member of the object *document* satisfies *filter_*", which is plain JSON.

    The condition on a member depends on the value in the filter:

    - A scalar: the member equals it.
    - An object: the member is an object, and satisfies this object as a filter. It may have more members.
    - A list: the member is a list of the same length, and each of its items satisfies the item of this list.
    - None: the member is null or missing.
    - An object of operators (``$eq $ne $gt $gte $lt $lte``): ``$eq`` and ``$ne`` compare the whole value. The others
      compare numbers with numbers, and strings with strings by code points. Any other member does not match.

    Raises ValueError for unknown operators, and for operands that have no order.
    """
    json = _JSON[database]
    return and_(true(), *(_member(json, document, name, value) for name, value in filter_.items()))


def member_equals(
    database: Database, document: Any, name: str, value: str | float | bool | None
) -> ColumnElement[bool]:
    """SQL for "the member *name* is this JSON value", of the same JSON type.

    None also selects documents without the member. On PostgreSQL, an index on the documents can serve the condition.
    """
    if database is not POSTGRESQL:
        return _member(_JSON[database], document, name, value)
    jsonb: Any = type_coerce(document, JSONB)
    contains: ColumnElement[bool] = jsonb.contains({name: value})
    return contains if value is not None else or_(~jsonb.has_key(name), contains)


def _member(json: _Json, document: Any, name: str | int, condition: Any) -> ColumnElement[bool]:
    if isinstance(condition, Mapping) and any(key.startswith("$") for key in condition):
        return and_(*(_compared(json, document, name, *item) for item in condition.items()))
    if condition is None:
        return not_(json.member(document, name, lambda member: not_(json.is_a(member, "null"))))
    if isinstance(condition, Mapping):
        inside: Any = [(key, value) for key, value in condition.items()]
        return json.member(
            document,
            name,
            lambda member: and_(
                json.is_a(member, "object"), *(_member(json, json.document(member), *item) for item in inside)
            ),
        )
    if isinstance(condition, list):
        return json.member(
            document,
            name,
            lambda member: and_(
                json.is_a(member, "array"),
                json.has_items(member, len(condition)),
                *(_member(json, json.document(member), *item) for item in enumerate(condition)),
            ),
        )
    return json.member(document, name, lambda member: json.equals(member, condition))


def _compared(json: _Json, document: Any, name: str | int, how: str, operand: Any) -> ColumnElement[bool]:
    if how in _ORDERINGS:
        if isinstance(operand, bool) or not isinstance(operand, (int, float, str)):
            raise ValueError(f"{how} needs a number or a string, not a value of type {type(operand).__name__}.")
        return json.member(document, name, lambda member: json.compares(member, _ORDERINGS[how], operand))
    if how not in ("$eq", "$ne"):
        raise ValueError(f"Unsupported operator {how!r}. Use $eq, $ne, $gt, $gte, $lt or $lte.")
    if operand is None:
        same = _member(json, document, name, None)
    else:
        same = json.member(document, name, lambda member: json.equals(member, operand))
    return same if how == "$eq" else not_(same)


class _Json(Protocol):
    """The JSON functions of a database. The type of a member is private to each implementation."""

    def member(self, document: Any, name: str | int, test: _Test) -> ColumnElement[bool]:
        """SQL for "*document* has this member (or item, by number), and it passes *test*". It is never NULL."""

    def document(self, member: Any) -> Any:
        """A member as a document with members of its own. NULL when it is no object or array."""

    def is_a(self, member: Any, kind: str) -> ColumnElement[bool]: ...

    def has_items(self, member: Any, count: int) -> ColumnElement[bool]:
        """SQL for "the array or object has *count* items"."""

    def equals(self, member: Any, value: Any) -> ColumnElement[bool]: ...

    def compares(self, member: Any, ordering: Callable[[Any, Any], Any], value: Any) -> ColumnElement[bool]: ...


class _Postgresql:
    def member(self, document: Any, name: str | int, test: _Test) -> ColumnElement[bool]:
        key = literal(name, Text() if isinstance(name, str) else Integer())
        return func.coalesce(test(document.op("->", return_type=JSONB())(key)), false())

    def document(self, member: Any) -> Any:
        return member

    def is_a(self, member: Any, kind: str) -> ColumnElement[bool]:
        return func.jsonb_typeof(member) == kind

    def has_items(self, member: Any, count: int) -> ColumnElement[bool]:
        array = case((self.is_a(member, "array"), member), else_=cast(literal("[]", Text), JSONB))
        return func.jsonb_array_length(array) == count

    def equals(self, member: Any, value: Any) -> ColumnElement[bool]:
        same: ColumnElement[bool] = member == self._bound(value)
        return same

    def compares(self, member: Any, ordering: Callable[[Any, Any], Any], value: Any) -> ColumnElement[bool]:
        if isinstance(value, str):
            as_text = member.op("#>>", return_type=Text())(literal_column("'{}'")).collate("C")
            return and_(self.is_a(member, "string"), ordering(as_text, literal(value, Text)))
        return and_(self.is_a(member, "number"), ordering(member, self._bound(value)))

    @staticmethod
    def _bound(value: Any) -> Any:
        return cast(literal(as_json(value), Text), JSONB)


_SQLITE_TYPES = {"null": ("null",), "object": ("object",), "array": ("array",), "number": ("integer", "real")}


class _Sqlite:
    """A member is a row of json_each(), so that no name must be quoted in a JSON path."""

    def member(self, document: Any, name: str | int, test: _Test) -> ColumnElement[bool]:
        item = func.json_each(document).table_valued("key", "value", "type", "atom").alias()
        return exists(select(literal_column("1")).select_from(item).where(item.c.key == literal(name), test(item.c)))

    def document(self, member: Any) -> Any:
        return case((member.type.in_(("object", "array")), member.value))  # a string would be parsed, and may fail

    def is_a(self, member: Any, kind: str) -> ColumnElement[bool]:
        has_type: ColumnElement[bool] = member.type.in_(_SQLITE_TYPES[kind])
        return has_type

    def has_items(self, member: Any, count: int) -> ColumnElement[bool]:
        items = func.json_each(self.document(member)).table_valued("key").alias()
        return select(func.count()).select_from(items).scalar_subquery() == count

    def equals(self, member: Any, value: Any) -> ColumnElement[bool]:
        if isinstance(value, (Mapping, list)):
            inside: Any = enumerate(value) if isinstance(value, list) else value.items()
            return and_(
                self.is_a(member, "array" if isinstance(value, list) else "object"),
                self.has_items(member, len(value)),
                *(self.member(self.document(member), name, self._equal_to(item)) for name, item in inside),
            )
        if value is None or isinstance(value, bool):
            same: ColumnElement[bool] = member.type == as_json(value)
            return same
        if isinstance(value, str):
            return and_(member.type == "text", member.atom == literal(value, Text))
        return self.compares(member, operator.eq, value)

    def _equal_to(self, value: Any) -> _Test:
        return lambda member: self.equals(member, value)

    def compares(self, member: Any, ordering: Callable[[Any, Any], Any], value: Any) -> ColumnElement[bool]:
        if isinstance(value, str):
            return and_(member.type == "text", ordering(member.atom, literal(value, Text)))
        number = value if -(2**63) <= value < 2**63 else float(value)  # SQLite reads larger numbers as floats too
        return and_(self.is_a(member, "number"), ordering(member.atom, literal(number)))


_JSON: Mapping[Database, _Json] = {POSTGRESQL: _Postgresql(), SQLITE: _Sqlite()}
