"""What must be true of a JSON document, as SQL: bound, with JSON's own types, and the same on both databases."""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping
from typing import Any

from sqlalchemy import ColumnElement, Integer, Text, and_, case, cast, exists, false, func, literal, not_, select, true
from sqlalchemy.dialects.postgresql import JSONB
from sqlalchemy.sql.expression import literal_column

from memstate_sa.db.json_params import as_json

_Test = Callable[[Any], ColumnElement[bool]]
_ORDERINGS = {"$gt": operator.gt, "$gte": operator.ge, "$lt": operator.lt, "$lte": operator.le}


def matches(dialect_name: str, document: Any, wanted: Mapping[str, Any]) -> ColumnElement[bool]:
    """Whether each member of the object *document* is as *wanted* says, which is plain JSON.

    A scalar is what the member has to be, an object what (more) there has to be in it, a list what it consists of, and
    None a null, or no such member. An object of operators, ``$eq $ne $gt $gte $lt $lte``, compares: ``$eq`` to the
    whole of a value, an ordering numbers with numbers, and strings with strings by code points; what is neither, or
    not there, is in no order. Raises ValueError for other operators, and for what has no order.
    """
    json = _Postgresql() if dialect_name == "postgresql" else _Sqlite()
    return and_(true(), *(_member(json, document, name, value) for name, value in wanted.items()))


def _member(json: _Json, document: Any, name: str | int, wanted: Any) -> ColumnElement[bool]:
    if isinstance(wanted, Mapping) and any(key.startswith("$") for key in wanted):
        return and_(*(_compared(json, document, name, *item) for item in wanted.items()))
    if wanted is None:
        return not_(json.member(document, name, lambda found: not_(json.is_a(found, "null"))))
    if isinstance(wanted, Mapping):
        inside: Any = [(key, value) for key, value in wanted.items()]
        return json.member(
            document,
            name,
            lambda found: and_(
                json.is_a(found, "object"), *(_member(json, json.document(found), *item) for item in inside)
            ),
        )
    if isinstance(wanted, list):
        return json.member(
            document,
            name,
            lambda found: and_(
                json.is_a(found, "array"),
                json.has_items(found, len(wanted)),
                *(_member(json, json.document(found), *item) for item in enumerate(wanted)),
            ),
        )
    return json.member(document, name, lambda found: json.equals(found, wanted))


def _compared(json: _Json, document: Any, name: str | int, how: str, wanted: Any) -> ColumnElement[bool]:
    if how in _ORDERINGS:
        if isinstance(wanted, bool) or not isinstance(wanted, (int, float, str)):
            raise ValueError(f"{how} compares with a number or a string, not with {type(wanted).__name__}")
        return json.member(document, name, lambda found: json.compares(found, _ORDERINGS[how], wanted))
    if how not in ("$eq", "$ne"):
        raise ValueError(f"unsupported operator {how!r}: $eq, $ne, $gt, $gte, $lt or $lte")
    if wanted is None:
        same = _member(json, document, name, None)
    else:
        same = json.member(document, name, lambda found: json.equals(found, wanted))
    return same if how == "$eq" else not_(same)


class _Json:
    """How a database looks into JSON. A member, once found, is whatever the other methods take."""

    def member(self, document: Any, name: str | int, test: _Test) -> ColumnElement[bool]:
        """Whether *document* has a member (or, by its number, an item) that passes *test*; never NULL."""
        raise NotImplementedError

    def document(self, found: Any) -> Any:
        """A member as a document with members of its own; NULL when it has none."""
        raise NotImplementedError

    def is_a(self, found: Any, kind: str) -> ColumnElement[bool]:
        raise NotImplementedError

    def has_items(self, found: Any, count: int) -> ColumnElement[bool]:
        """Whether an array or object has so many."""
        raise NotImplementedError

    def equals(self, found: Any, wanted: Any) -> ColumnElement[bool]:
        raise NotImplementedError

    def compares(self, found: Any, ordering: Callable[[Any, Any], Any], wanted: Any) -> ColumnElement[bool]:
        raise NotImplementedError


class _Postgresql(_Json):
    def member(self, document: Any, name: str | int, test: _Test) -> ColumnElement[bool]:
        key = literal(name, Text() if isinstance(name, str) else Integer())
        return func.coalesce(test(document.op("->", return_type=JSONB())(key)), false())

    def document(self, found: Any) -> Any:
        return found

    def is_a(self, found: Any, kind: str) -> ColumnElement[bool]:
        return func.jsonb_typeof(found) == kind

    def has_items(self, found: Any, count: int) -> ColumnElement[bool]:
        of_array = case((self.is_a(found, "array"), found), else_=cast(literal("[]", Text), JSONB))
        return func.jsonb_array_length(of_array) == count

    def equals(self, found: Any, wanted: Any) -> ColumnElement[bool]:
        same: ColumnElement[bool] = found == self._bound(wanted)
        return same

    def compares(self, found: Any, ordering: Callable[[Any, Any], Any], wanted: Any) -> ColumnElement[bool]:
        if isinstance(wanted, str):
            as_text = found.op("#>>", return_type=Text())(literal_column("'{}'")).collate("C")
            return and_(self.is_a(found, "string"), ordering(as_text, literal(wanted, Text)))
        return and_(self.is_a(found, "number"), ordering(found, self._bound(wanted)))

    @staticmethod
    def _bound(value: Any) -> Any:
        return cast(literal(as_json(value), Text), JSONB)


_SQLITE_TYPES = {"null": ("null",), "object": ("object",), "array": ("array",), "number": ("integer", "real")}


class _Sqlite(_Json):
    """A row of json_each() is a member: there is no path in which a name would have to be quoted."""

    def member(self, document: Any, name: str | int, test: _Test) -> ColumnElement[bool]:
        found = func.json_each(document).table_valued("key", "value", "type", "atom").alias()
        return exists(select(literal_column("1")).select_from(found).where(found.c.key == literal(name), test(found.c)))

    def document(self, found: Any) -> Any:
        return case((found.type.in_(("object", "array")), found.value))  # a string may be no JSON, which is an error

    def is_a(self, found: Any, kind: str) -> ColumnElement[bool]:
        held: ColumnElement[bool] = found.type.in_(_SQLITE_TYPES[kind])
        return held

    def has_items(self, found: Any, count: int) -> ColumnElement[bool]:
        items = func.json_each(self.document(found)).table_valued("key").alias()
        return select(func.count()).select_from(items).scalar_subquery() == count

    def equals(self, found: Any, wanted: Any) -> ColumnElement[bool]:
        if isinstance(wanted, (Mapping, list)):
            inside: Any = enumerate(wanted) if isinstance(wanted, list) else wanted.items()
            return and_(
                self.is_a(found, "array" if isinstance(wanted, list) else "object"),
                self.has_items(found, len(wanted)),
                *(self.member(self.document(found), name, self._equal_to(value)) for name, value in inside),
            )
        if wanted is None or isinstance(wanted, bool):
            same: ColumnElement[bool] = found.type == as_json(wanted)
            return same
        if isinstance(wanted, str):
            return and_(found.type == "text", found.atom == literal(wanted, Text))
        return self.compares(found, operator.eq, wanted)

    def _equal_to(self, value: Any) -> _Test:
        return lambda found: self.equals(found, value)

    def compares(self, found: Any, ordering: Callable[[Any, Any], Any], wanted: Any) -> ColumnElement[bool]:
        if isinstance(wanted, str):
            return and_(found.type == "text", ordering(found.atom, literal(wanted, Text)))
        number = wanted if -(2**63) <= wanted < 2**63 else float(wanted)  # as SQLite itself reads larger ones
        return and_(self.is_a(found, "number"), ordering(found.atom, literal(number)))
