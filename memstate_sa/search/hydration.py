"""Hydration: load the rows of keys that the caller's transaction sees."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any

from sqlalchemy import Select
from sqlalchemy.engine import Connection
from sqlalchemy.orm import Session

from memstate_sa.db.codec import encode_key
from memstate_sa.db.rows import TableColumns
from memstate_sa.db.statements import batches
from memstate_sa.search.hits import Incomplete
from memstate_sa.tracking import committed
from memstate_sa.tracking.committed import raw_key_columns
from memstate_sa.tracking.projection import Projection
from memstate_sa.tracking.tracked import Tracked


@dataclass
class HydratedRow:
    """A fact, and the projection of its row."""

    fact: Any
    projection: Projection


class Hydration:
    """Loads rows by key, each only once.

    ``rows`` has None for a key if the statement selects no row of it. ``reasons`` says why the content of some
    row is unknown.
    """

    def __init__(self, session: Session, statement: Select[Any], tracked: Tracked) -> None:
        self.rows: dict[str, HydratedRow | None] = {}
        self.reasons: dict[Incomplete, None] = {}
        self._session = session
        self._statement = statement
        self._tracked = tracked

    def load(self, keys: Collection[str], connection: Connection, embedder: str) -> None:
        """Load the rows of *keys* that the caller's transaction sees and that the statement selects."""
        missing_keys = [key for key in dict.fromkeys(keys) if key not in self.rows]
        if not missing_keys:
            return
        columns = self._tracked.columns_for(connection.dialect)
        width = len(self._tracked.key_columns)
        statement = _hydration_statement(self._statement, self._tracked, columns)
        for batch in batches(missing_keys):
            self.rows.update(dict.fromkeys(batch))
            possible = columns.possible(connection, batch)
            if not possible:
                continue
            parameters = columns.key_parameters(possible.values())
            # Select the columns beside the entity, because the identity map may have older or edited values. Joined
            # eager loading of collections repeats rows, so it needs unique().
            rows = self._session.execute(statement, parameters).unique(lambda row: tuple(row[1 : 1 + width]))
            rows_of_several_tables = self._read_from_several_tables(connection, batch)
            for row in rows:
                key = encode_key(row[1 : 1 + width])
                if key not in possible:  # the key column's type was changed: SQLite then finds the row of "1" by 1
                    self.reasons[Incomplete.IMPOSSIBLE_KEY] = None
                try:
                    projection = self._tracked.project(key, rows_of_several_tables.get(key, row[1 + width :]), embedder)
                except Exception:  # noqa: BLE001  # the application's function failed: the relay parks such a row too
                    self.reasons[Incomplete.TEXT_FAILED] = None
                else:
                    self.rows[key] = HydratedRow(row[0], projection)

    def _read_from_several_tables(self, connection: Connection, keys: Sequence[str]) -> dict[str, Sequence[Any]]:
        """The projected columns of *keys* from all tables of a fact, if it has several. The statement may lack some."""
        return committed.read(connection, self._tracked, keys) if self._tracked.is_projected_of_many else {}


def _hydration_statement(statement: Select[Any], tracked: Tracked, columns: TableColumns) -> Select[Any]:
    """*statement* for the rows of some keys, with the projected columns beside the entity."""
    is_plain = statement is tracked.select_all
    cached: Select[Any] | None = tracked.hydrations.get(columns) if is_plain else None
    if cached is not None:
        return cached
    projected_columns = () if tracked.is_projected_of_many else tracked.projected_columns
    labels = [column.label(f"memstate_{n}") for n, column in enumerate(projected_columns)]
    hydrating = statement.order_by(None).add_columns(*raw_key_columns(columns), *labels).where(columns.key_in)
    if is_plain:
        tracked.hydrations[columns] = hydrating
    return hydrating


def keys_of(statement: Select[Any], columns: TableColumns) -> Select[Any]:
    """The keys of all facts that *statement* selects."""
    keys = statement.with_only_columns(*raw_key_columns(columns), maintain_column_froms=True).order_by(None).distinct()
    keys._for_update_arg = None  # noqa: SLF001  # PostgreSQL cannot lock DISTINCT rows; hydration locks them
    return keys
