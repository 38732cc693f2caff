"""`TableLog`: the database makes the images of a class' rows itself, compares them with the log, and logs changes.

It uses the same SQL for images as the triggers, so that both kinds of capture agree.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from typing import Any

from sqlalchemy import (
    FromClause,
    LargeBinary,
    Select,
    String,
    Table,
    Text,
    and_,
    func,
    literal_column,
    select,
    text,
)
from sqlalchemy.engine import Connection, Dialect
from sqlalchemy.exc import CompileError, IntegrityError
from sqlalchemy.sql.selectable import NamedFromClause
from sqlalchemy.sql.util import ClauseAdapter

from memstate_sa.capture.captured_tables import CapturedTable
from memstate_sa.capture.logging_statements import ROW, Kind, log_rows, look_at, marking_logged, reading_logged
from memstate_sa.capture.looks import ClassLog, Header, Logged, Look, NoEntry, RawKey
from memstate_sa.capture.read_log import ReadLog
from memstate_sa.capture.row_images import TableWriter, stored_as
from memstate_sa.capture.sql_text import as_sent
from memstate_sa.db.codec import Image
from memstate_sa.db.json_params import as_array, as_json
from memstate_sa.db.rows import MAX_KEY_CHARS, TableColumns
from memstate_sa.db.statements import batches
from memstate_sa.errors import MemstateError
from memstate_sa.log.changes import LogEntry
from memstate_sa.tracking.tracked import Tracked


class TableLog:
    """The SQL statements that log the rows of one class."""

    def __init__(self, tracked: Tracked, columns: TableColumns, dialect: Dialect) -> None:
        """Raises MemstateError when SQL cannot write the image or the key of a row."""
        key, image, tables, table = _row(tracked, dialect)
        adapter = ClauseAdapter(table)
        by_key = adapter.traverse(columns.key_in)
        self._tracked = tracked
        self._columns = columns
        self._rows: Any = (
            select(literal_column(key, Text()).label("key"), literal_column(image, Text()).label("image"))
            .select_from(tables)
            .where(by_key)
        )
        if tracked.criterion is not None:
            self._rows = self._rows.where(adapter.traverse(tracked.criterion))
        self._count: Select[Any] = select(func.count()).select_from(tables).where(by_key)
        self._look = look_at(self._rows.subquery("here"))
        kinds = [columns.implementation(column) for column in tracked.key_columns]
        self._has_texts = any(isinstance(kind, (String, LargeBinary)) for kind in kinds)
        self._logging: dict[Kind, Any] = {}

    def look(self, connection: Connection, keys: Sequence[RawKey]) -> list[Look]:
        """The rows of *keys* before they change, read by one statement for each batch."""
        looks: list[Look] = []
        for batch in batches(keys):
            looks += self._looks_of_batch(connection, batch)
        return looks

    def _looks_of_batch(self, connection: Connection, keys: Sequence[RawKey]) -> list[Look]:
        parameters = {"entity": self._tracked.entity, **self._columns.key_parameters(keys)}
        rows = {row[0]: row[1] for row in connection.execute(self._look, parameters)}
        if len(keys) == 1 or sum(len(image) for image in rows.values() if image is not None) <= _CHARS:
            return [Look(keys, rows)]
        middle = len(keys) // 2
        return [*self._looks_of_batch(connection, keys[:middle]), *self._looks_of_batch(connection, keys[middle:])]

    def images(self, connection: Connection, keys: Sequence[RawKey]) -> dict[str, Image]:
        parameters = map(self._columns.key_parameters, batches(keys))
        return {key: json.loads(image) for batch in parameters for key, image in connection.execute(self._rows, batch)}

    def count(self, connection: Connection, keys: Sequence[RawKey]) -> int:
        parameters = map(self._columns.key_parameters, batches(keys))
        return sum(connection.execute(self._count, batch).scalar_one() for batch in parameters)

    def log(self, connection: Connection, header: Header, look: Look, *, new: bool) -> Logged:
        self._require_short(look.keys)
        baselines = [row for row in look.rows.items() if row[1] is not None]
        parameters = {
            **header._asdict(),
            "entity": self._tracked.entity,
            **self._columns.key_parameters(look.keys),
        }
        if not new:
            parameters["before"] = as_array(look.rows)
        if baselines:
            parameters["baselines"] = as_json(baselines)
        kind = Kind(new, bool(baselines), look.remembered)
        try:
            result = connection.execute(self._statement(kind), parameters)
        except IntegrityError as error:
            if look.remembered and _LACKS_OP.search(str(error.orig)):
                raise NoEntry from error
            raise
        if result.returns_rows:
            entries = self._entries(result)
            return Logged(len(entries), entries)
        if self._columns.database.has_writing_ctes or not result.rowcount:
            return Logged(result.rowcount)
        # SQLite has no INSERT within another statement. It has one writer, so the ids of the entries are consecutive.
        ids = {"first": result.lastrowid - result.rowcount + 1, "last": result.lastrowid}
        count = connection.execute(marking_logged, ids).rowcount
        return Logged(count, self._entries(connection.execute(reading_logged, ids)) if self._tracked.is_checked else ())

    def _require_short(self, keys: Sequence[RawKey]) -> None:
        """Raise MemstateError if a key is too long for our database indexes."""
        for key in keys if self._has_texts else ():
            if sum(len(part) for part in key if isinstance(part, (str, bytes))) > _KEY_CHARS:
                self._columns.encode_key(key)

    def _statement(self, kind: Kind) -> Any:
        statement = self._logging.get(kind)
        if statement is None:
            statement = log_rows(self._columns.database, self._rows, kind, returns=self._tracked.is_checked)
            statement = self._logging[kind] = statement.execution_options(preserve_rowcount=True)
        return statement

    def _entries(self, rows: Any) -> list[LogEntry]:
        return [LogEntry(self._tracked.entity, *row) for row in rows]


_LACKS_OP = re.compile(r'memstate_log\.op|"op".*memstate_log')
"""The driver's message when a `Kind.remembered` statement finds no entry."""

_KEY_CHARS = MAX_KEY_CHARS // 6  # JSON may write one character as six
_CHARS = 64_000_000
"""The most characters of images in one parameter. PostgreSQL takes JSONB of up to 256 MB."""


def class_log(tracked: Tracked, connection: Connection) -> ClassLog:
    """The `ClassLog` for rows of *tracked* on *connection*."""
    columns, dialect = tracked.columns_for(connection.dialect), connection.dialect
    try:
        table_log = TableLog(tracked, columns, dialect)
    except (MemstateError, CompileError):
        return ReadLog(tracked, columns)
    is_right = all(_is_stored_as_declared(connection, of_table) for of_table in columns.of_table.values())
    return table_log if is_right else ReadLog(tracked, columns)


_types = text(
    "SELECT a.attname, coalesce(b.typname, t.typname) FROM pg_attribute AS a JOIN pg_type AS t ON t.oid = a.atttypid "
    "LEFT JOIN pg_type AS b ON b.oid = t.typbasetype WHERE a.attrelid = to_regclass(:name) AND a.attnum > 0"
)


def _is_stored_as_declared(connection: Connection, columns: TableColumns) -> bool:
    """Whether the columns have the types that the SQL of an image expects."""
    if columns.database.has_dynamic_types:
        return True  # the SQL tests each value's own type
    name = as_sent(connection.dialect.identifier_preparer.format_table(columns.table), connection.dialect)
    stored: dict[str, str] = {row[0]: row[1] for row in connection.execute(_types, {"name": name})}
    declared = {name: stored_as(columns.implementation(column)) for name, column in columns.by_name.items()}
    return all(stored[name] in types for name, types in declared.items() if types and name in stored)


def _keys(table: Table, alias: NamedFromClause[Any]) -> list[Any]:
    return [alias.c[column.key] for column in table.primary_key.columns]


def _row(tracked: Tracked, dialect: Dialect) -> tuple[str, str, FromClause, NamedFromClause[Any]]:
    """The key and the image of a row in SQL, its joined tables, and the first of them.

    As in `JoinedColumns`, a row may be missing from the tables of subclasses.
    """
    first = tracked.table.alias(ROW)
    tables: FromClause = first
    writer = TableWriter(tracked, dialect)
    key, members = writer.key(ROW), [writer.fields(ROW)]
    for position, table in enumerate(tracked.tables[1:], start=1):
        alias = f"t{position}"
        part = table.alias(alias)
        pairs = zip(_keys(tracked.table, first), _keys(table, part), strict=True)
        is_optional = position > tracked.base_table_count
        tables = tables.join(part, and_(*(one == other for one, other in pairs)), isouter=is_optional)
        captured = CapturedTable(table, tracked.entity, excluded=tracked.excluded_of(table))
        writer = TableWriter(captured, dialect)
        name = f"{writer.quote(alias)}.{writer.quote(writer.keys[0].name)}"
        fields = f"',' || {writer.fields(alias, prefix=f'{table.fullname}.')}"
        members.append(f"CASE WHEN {name} IS NULL THEN '' ELSE {fields} END" if is_optional else fields)
    return key, f"'{{' || {' || '.join(members)} || '}}'", tables, first
