"""`CapturedResult`: the result of a captured statement, without the keys that capture added to it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from sqlalchemy.engine import CursorResult, IteratorResult, Result, Row
from sqlalchemy.engine.result import SimpleResultMetaData


class CapturedResult(IteratorResult[Any], CursorResult[Any]):  # type: ignore[misc, override]
    """The rows that the caller asked for. In everything else it behaves like the cursor's own result.

    The rows are read to the end, because SQLite releases no SAVEPOINT below an open cursor.
    """

    def __init__(self, result: Result[Any], key_names: Sequence[str] = ()) -> None:
        """Read *result*. Its last columns are the key columns, *key_names*. The caller's rows do not have them."""
        frozen = result.freeze()
        metadata: Any = frozen.metadata
        names = list(metadata.keys)
        width = len(names) - len(key_names)
        # A caller may look up values by column, as well as by name.
        columns = [metadata._keymap[name][2] for name in names[:width]]  # noqa: SLF001  # no other way keeps them
        rows = [tuple(row) for row in frozen().all()]
        self.keys_returned = [row[width:] for row in rows]
        super().__init__(SimpleResultMetaData(names[:width], extra=columns), iter([row[:width] for row in rows]))
        cursor_result: Any = getattr(result, "raw", None) or result  # an ORM result has the cursor's own in ``raw``
        for name in CursorResult.__slots__:
            setattr(self, name, getattr(cursor_result, name, None))
        self._key_names = key_names
        self.rowcount = len(rows)
        self._returns_rows = bool(names[:width])
        if not self._returns_rows:
            self.close()

    @property
    def returns_rows(self) -> bool:
        return self._returns_rows

    @property
    def inserted_primary_key_rows(self) -> Sequence[Row[Any]]:  # type: ignore[override]
        """The keys of the inserted rows. `CursorResult` itself refuses them after a RETURNING."""
        if self.returns_rows or not self.is_insert:
            rows: Any = super().inserted_primary_key_rows
        else:
            rows = IteratorResult(SimpleResultMetaData(self._key_names), iter(self.keys_returned)).all()
        return rows  # type: ignore[no-any-return]

    @property
    def inserted_primary_key(self) -> Any:
        """The key of the inserted row, when there is exactly one."""
        rows = self.inserted_primary_key_rows
        return rows[0] if len(rows) == 1 else super().inserted_primary_key
