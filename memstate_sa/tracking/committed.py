"""The committed rows of a tracked class, and their projections."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from sqlalchemy import ColumnElement, Select, func, select, tuple_, type_coerce
from sqlalchemy.engine import Connection, Row
from sqlalchemy.sql import operators

from memstate_sa.db.codec import encode_key
from memstate_sa.db.raw_values import RAW
from memstate_sa.db.rows import TableColumns
from memstate_sa.db.statements import batches
from memstate_sa.tracking.projection import Projection
from memstate_sa.tracking.tracked import Tracked


def raw_key_columns(columns: TableColumns) -> list[ColumnElement[Any]]:
    """The columns of the primary key, with the values that `TableColumns.encode_key` takes."""
    keys = columns.table.primary_key.columns
    return [columns.raw(column).label(f"memstate_key_{n}") for n, column in enumerate(keys)]


def _rows(tracked: Tracked, columns: TableColumns) -> Select[Any]:
    statement = select(*raw_key_columns(columns), *tracked.projected_columns).select_from(tracked.rows)
    criterion = tracked.criterion
    return statement if criterion is None else statement.where(criterion)


def _split(tracked: Tracked, row: Row[Any]) -> tuple[str, Sequence[Any]]:
    width = len(tracked.key_columns)
    return encode_key(row[:width]), row[width:]


def read(connection: Connection, tracked: Tracked, keys: Sequence[str]) -> dict[str, Sequence[Any]]:
    """The existing rows of *keys*, each as the values that `Tracked.project` takes."""
    columns = tracked.columns_for(connection.dialect)
    statement = _rows(tracked, columns).where(columns.key_in)
    values: dict[str, Sequence[Any]] = {}
    for batch in batches(keys):
        possible = columns.possible(connection, batch)
        rows = connection.execute(statement, columns.key_parameters(possible.values())).all() if possible else []
        values.update(_split(tracked, row) for row in rows)
    return values


def project(
    connection: Connection, tracked: Tracked, keys: Sequence[str], embedder: str
) -> Iterator[Projection | tuple[str, Exception]]:
    """The projection of each existing row of *keys*, or (key, error) if its text function raised."""
    for key, row in read(connection, tracked, keys).items():
        try:
            yield tracked.project(key, row, embedder)
        except Exception as error:  # noqa: BLE001  # one row must not stop the others
            yield key, error


def count(connection: Connection, tracked: Tracked) -> int:
    """The number of rows of the class."""
    rows = select(func.count()).select_from(tracked.rows)
    row_count: int = connection.scalars(rows if tracked.criterion is None else rows.where(tracked.criterion)).one()
    return row_count


def page(
    connection: Connection,
    tracked: Tracked,
    after: str | None,
    limit: int,
    *,
    until: str | None = None,
    skip: int = 0,
) -> list[str]:
    """Up to *limit* keys in primary-key order, from those after the key *after*, up to the key *until*.

    The first *skip* of them are left out. A bound that no row can have is ignored: the type of the key has changed.
    """
    columns = tracked.columns_for(connection.dialect)
    possible = columns.possible(connection, filter(None, (after, until)))
    statement = select(*raw_key_columns(columns)).select_from(tracked.rows)
    statement = statement.order_by(*tracked.key_columns).limit(limit)
    if tracked.criterion is not None:
        statement = statement.where(tracked.criterion)
    if after in possible:
        statement = statement.where(operators.gt(*_compared(connection, tracked, possible[after])))
    if until in possible:
        statement = statement.where(operators.le(*_compared(connection, tracked, possible[until])))
    if skip:
        statement = statement.offset(skip)
    return list(map(columns.encode_key, connection.execute(statement).all()))


def _compared(connection: Connection, tracked: Tracked, key: Sequence[Any]) -> tuple[Any, Any]:
    """The primary key's columns, and the values of *key*. The database compares them, in its collations."""
    columns = tracked.columns_for(connection.dialect)
    sides = [
        (type_coerce(column, RAW), columns.raw_bind(column, value))
        for column, value in zip(tracked.key_columns, key, strict=True)
    ]
    if len(sides) == 1:
        return sides[0]
    return tuple_(*(column for column, _ in sides)), tuple_(*(value for _, value in sides))
