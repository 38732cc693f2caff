"""The table of unique values: its differences from the rows, and their repair.

A flush updates the table for the rows that it writes. Values of older rows are missing when ``unique_by`` is new or
changed.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

from sqlalchemy import bindparam, delete, select, tuple_
from sqlalchemy.engine import Connection

from memstate_sa.db.codec import Image, decode_key
from memstate_sa.db.dialects import database_of
from memstate_sa.db.statements import READ_CHUNK, batches
from memstate_sa.db.tables import unique
from memstate_sa.tracking.tracked import Tracked, unique_value


class Differences(NamedTuple):
    """The differences between rows and the table of unique values.

    - ``missing``: the values that rows have and the table lacks, by the key of the row.
    - ``stale``: pairs (value, key) in the table, where the row is gone or has another value now.
    - ``shared``: the keys of rows that have the same value as another row, to which the table gives the value.
    """

    missing: dict[str, str]
    stale: list[tuple[str, str]]
    shared: list[str]

    @property
    def keys(self) -> set[str]:
        """The keys of rows whose value in the table must change."""
        return {*self.missing, *(key for _, key in self.stale)}


def values_of(connection: Connection, tracked: Tracked, images: Mapping[str, Image]) -> dict[str, str]:
    """The unique values of *images*, by key. A row may have none."""
    columns = tracked.columns_for(connection.dialect)
    values = ((key, unique_value(tracked, columns.values(dict(image)))) for key, image in images.items())
    return {key: value for key, value in values if value is not None}


def differences(connection: Connection, tracked: Tracked, images: Mapping[str, Image]) -> Differences:
    """The differences between the table of unique values and *images*, which has all existing rows of its keys."""
    values = values_of(connection, tracked, images)
    table_rows = _table_rows(connection, tracked, images, values.values())
    other_keys = [decode_key(key) for _, key in table_rows if key not in images]
    other_images = tracked.columns_for(connection.dialect).read(connection, other_keys)
    known, living = values | values_of(connection, tracked, other_images), {*images, *other_images}
    stale = [
        (value, key) for value, key in table_rows if _is_stale(tracked, value, known.get(key), is_living=key in living)
    ]
    holders = dict(set(table_rows) - set(stale))
    missing = {key: value for key, value in values.items() if value not in holders}
    shared = [key for key, value in values.items() if holders.get(value, key) != key]
    return Differences(missing, stale, shared)


def _is_stale(tracked: Tracked, value: str, now: str | None, *, is_living: bool) -> bool:
    """Whether *value* no longer fits its row. If a function makes the value, and makes none now, the old one stays."""
    if now is None and is_living:
        return bool(tracked.unique_names)
    return now != value


def _table_rows(
    connection: Connection, tracked: Tracked, keys: Iterable[str], values: Iterable[str]
) -> list[tuple[str, str]]:
    """The rows (value, key) of the table with one of these *keys* or *values*."""
    of_class = select(unique.c.value, unique.c.key).where(unique.c.entity == tracked.entity)
    rows: dict[tuple[str, str], None] = {}
    for column, parts in ((unique.c.key, list(keys)), (unique.c.value, list(values))):
        for batch in batches(parts, READ_CHUNK):
            rows.update(dict.fromkeys((v, k) for v, k in connection.execute(of_class.where(column.in_(batch)))))
    return list(rows)


def give(connection: Connection, tracked: Tracked, values: Mapping[str, str]) -> list[str]:
    """Give rows their *values*, by key, if no other row has them. Returns the keys of rows that got none."""
    rows = [{"entity": tracked.entity, "value": value, "key": key} for key, value in values.items()]
    if not rows:
        return []
    new = database_of(connection).upsert(unique).on_conflict_do_nothing().returning(unique.c.key)
    new_keys = set(connection.scalars(new, rows))
    return [key for key in values if key not in new_keys]


def take(connection: Connection, tracked: Tracked, stale: Collection[tuple[str, str]]) -> None:
    """Remove *stale* values (value, key) from the table."""
    for batch in batches(list(stale), READ_CHUNK):
        is_stale = tuple_(unique.c.value, unique.c.key).in_(batch)
        connection.execute(delete(unique).where(unique.c.entity == tracked.entity, is_stale))


_page = (
    select(unique.c.value, unique.c.key)
    .where(
        unique.c.entity == bindparam("entity"),
        tuple_(unique.c.key, unique.c.value) > tuple_(bindparam("key"), bindparam("value")),
    )
    .order_by(unique.c.key, unique.c.value)
    .limit(READ_CHUNK)
)


def of_no_row(
    connection: Connection, tracked: Tracked, after: tuple[str, str]
) -> tuple[list[tuple[str, str]], tuple[str, str] | None]:
    """The (value, key) pairs in the next page whose rows were deleted, and the last pair of the page.

    That pair is the next call's *after*. It is None after the last page.
    """
    parameters = {"entity": tracked.entity, "value": after[0], "key": after[1]}
    page: Sequence[tuple[Any, Any]] = [(value, key) for value, key in connection.execute(_page, parameters)]
    images = tracked.columns_for(connection.dialect).read(
        connection, [decode_key(key) for key in {key for _, key in page}]
    )
    return [(value, key) for value, key in page if key not in images], page[-1] if len(page) == READ_CHUNK else None
