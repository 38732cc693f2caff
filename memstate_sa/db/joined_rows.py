"""`JoinedColumns`: the rows of a class with joined inheritance, which are in several tables."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from typing import Any

from sqlalchemy import ColumnElement, Table
from sqlalchemy.engine import Connection, Dialect

from memstate_sa.db.codec import decode_key
from memstate_sa.db.rows import REFUSALS, Refusals, TableColumns


class JoinedColumns(TableColumns):
    """Statements and conversions for a class with joined inheritance: rows in several tables, with one primary key.

    An image has the columns of the first table by name, and the columns of other tables as ``table.column``. Tables
    without a row are left out. A fact exists only if it has a row in the first table and in the *required* ones after
    it.
    """

    def __init__(
        self,
        tables: Sequence[Table],
        dialect: Dialect,
        excluded: Callable[[Table], Collection[str]] = lambda _: (),
        *,
        required: int = 0,
    ) -> None:
        super().__init__(tables[0], dialect, excluded(tables[0]))
        self._of_table = {table: TableColumns(table, dialect, excluded(table)) for table in tables}
        self._prefixes = {f"{table.fullname}.": table for table in tables[1:]}
        self._required = tables[1 : 1 + required]

    @property
    def of_table(self) -> Mapping[Table, TableColumns]:
        return self._of_table

    def read(
        self,
        connection: Connection,
        keys: Sequence[Sequence[Any]],
        *,
        for_update: bool = False,
        skip_locked: bool = False,
        where: ColumnElement[bool] | None = None,
    ) -> dict[str, dict[str, Any]]:
        images = super().read(connection, keys, for_update=for_update, skip_locked=skip_locked, where=where)
        keys = [decode_key(key) for key in images]
        for prefix, table in self._prefixes.items():
            parts = self._of_table[table].read(connection, keys) if keys else {}
            for key, part in parts.items():
                images[key].update({prefix + name: value for name, value in part.items()})
            if table in self._required:
                images = {key: image for key, image in images.items() if key in parts}
        return images

    def lock(
        self,
        connection: Connection,
        keys: Sequence[Sequence[Any]],
        *,
        leaving: bool = False,
        skip_locked: bool = False,
    ) -> set[str]:
        locked = super().lock(connection, keys, leaving=leaving, skip_locked=skip_locked)
        if leaving:  # others may refer to any part of a fact
            for table in self._prefixes.values():
                self._of_table[table].lock(connection, keys, leaving=True)
        return locked

    def parts(self, image: Mapping[str, Any] | None) -> dict[Table, Mapping[str, Any] | None]:
        parts: dict[Table, Mapping[str, Any] | None] = dict.fromkeys(self._of_table)
        parts.update({self._prefixes.get(prefix, self.table): part for prefix, part in self._divide(image or {})})
        return parts

    def values(self, image: dict[str, Any], refusals: Refusals = REFUSALS) -> dict[str, Any]:
        return {
            prefix + name: value
            for prefix, part in self._divide(image)
            for name, value in self._of_table[self._prefixes.get(prefix, self.table)].values(part, refusals).items()
        }

    def to_raw(self, name: str, value: Any) -> Any:
        prefix = next((prefix for prefix in self._prefixes if name.startswith(prefix)), "")
        table = self._prefixes.get(prefix, self.table)
        return TableColumns.to_raw(self._of_table[table], name.removeprefix(prefix), value)

    def _divide(self, image: Mapping[str, Any]) -> Iterable[tuple[str, dict[str, Any]]]:
        """The part of *image* for each table, by the prefix of its names. The first table has no prefix."""
        parts: dict[str, dict[str, Any]] = {}
        for name, value in image.items():
            prefix = next((prefix for prefix in self._prefixes if name.startswith(prefix)), "")
            parts.setdefault(prefix, {})[name.removeprefix(prefix)] = value
        return parts.items()
