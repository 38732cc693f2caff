"""The values that a primary key can have: a driver reads them from its columns, and takes them as parameters.

A key in the outbox, the log or an index may not fit the table. A column's type may have changed, or another program may
have written the key. One such key must not make a driver refuse the other keys of the same statement.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from datetime import date, datetime, time, timedelta
from decimal import Decimal
from typing import Any
from uuid import UUID

from sqlalchemy import Boolean, Date, DateTime, Enum, Float, Integer, Interval, LargeBinary, Numeric, String, Time, Uuid
from sqlalchemy.dialects.postgresql import INTERVAL
from sqlalchemy.engine import Connection
from sqlalchemy.types import TypeEngine

from memstate_sa.db.codec import is_text
from memstate_sa.db.dialects import Database, database_of

_NUMBERS: frozenset[type] = frozenset({int, float, Decimal})
_DAYS: frozenset[type] = frozenset({date, datetime})
_READ_BY_PSYCOPG: Mapping[type[TypeEngine[Any]], frozenset[type]] = {
    Integer: frozenset({int}),
    String: frozenset({str}),
    Numeric: _NUMBERS,
    Float: _NUMBERS,  # SQLAlchemy 2.1: Float is no Numeric
    DateTime: _DAYS,
    Date: _DAYS,
    Time: frozenset({time}),
    Boolean: frozenset({bool, int}),
    LargeBinary: frozenset({bytes}),
    Interval: frozenset({timedelta}),
    INTERVAL: frozenset({timedelta}),
}
_DYNAMIC: frozenset[type] = frozenset({int, float, str, bytes, type(None)})
"""The types of values in a database with dynamic types. A column may hold any of them, NULL included."""
_OF_ANY: frozenset[type] = frozenset({bool, str, bytes, list, time, timedelta, UUID}) | _NUMBERS | _DAYS
_INT64 = 2**63


def types_of(impl: TypeEngine[Any], database: Database) -> frozenset[type]:
    """The Python types that the driver reads from a key column of type *impl*."""
    if database.has_dynamic_types:
        return _DYNAMIC
    if isinstance(impl, Uuid):
        return frozenset({UUID if impl.native_uuid else str})
    return next((types for kind, types in _READ_BY_PSYCOPG.items() if isinstance(impl, kind)), _OF_ANY)


def is_read_by_database(impl: TypeEngine[Any], database: Database) -> bool:
    """Whether only the database can tell if a text is a value of *impl*, for example of an enum or an address."""
    if database.has_dynamic_types:
        return False
    return (isinstance(impl, Enum) and impl.native_enum) or not isinstance(impl, (*_READ_BY_PSYCOPG, Uuid))


class DoesNotFit(ValueError):
    """No row can have this value in its key."""


def fitted(value: Any, types: frozenset[type]) -> Any:
    """*value* as the driver takes it for a column of *types*. Raises DoesNotFit if it cannot be one."""
    if type(value) in (Decimal, float) and types == {int} and value == value // 1:
        value = int(value)  # the column is a NUMERIC in the database
    kind = type(value)
    if kind not in types or (kind is int and not is_int64(value)) or (kind is str and not is_text(value)):
        raise DoesNotFit
    return value


def is_int64(value: int) -> bool:
    return -_INT64 <= value < _INT64


def tolerate_refusal(connection: Connection) -> AbstractContextManager[Any]:
    """Keep the transaction usable after a refused statement. PostgreSQL would end it."""
    ends = database_of(connection).aborts_on_error and not connection._is_autocommit_isolation()  # noqa: SLF001
    return connection.begin_nested() if ends else nullcontext()
