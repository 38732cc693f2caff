"""A flush -> log and outbox, by the database itself: it makes the images of the rows, and decides what became of them.

By the SQL with which triggers write a row, so that both captures agree. Where SQL cannot write the rows of a class, or
Python has to look at each of them, `Recorder.log_touched` reads them instead.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from datetime import datetime
from typing import Any, NamedTuple

from sqlalchemy import (
    Boolean,
    ColumnElement,
    CompoundSelect,
    FromClause,
    Insert,
    Select,
    SmallInteger,
    Text,
    and_,
    bindparam,
    case,
    false,
    func,
    insert,
    literal_column,
    or_,
    select,
    text,
    true,
    union_all,
)
from sqlalchemy.engine import Connection, Dialect
from sqlalchemy.exc import CompileError
from sqlalchemy.sql.util import ClauseAdapter

from memstate_sa.capture.row_images import TableWriter, stored_as
from memstate_sa.capture.sql_text import as_sent
from memstate_sa.db.json_params import as_array, as_json, row_value, typed, unnest_rows, unnest_strings
from memstate_sa.db.rows import TableColumns
from memstate_sa.db.statements import batches
from memstate_sa.db.tables import StoredJson, log, outbox, statement_snapshot
from memstate_sa.errors import MemstateError
from memstate_sa.log.positions import SLOTS
from memstate_sa.tracking.tracked import Tracked

RawKey = tuple[Any, ...]
"""A primary key as the driver has it."""


class Header(NamedTuple):
    """What all entries of a statement share."""

    tx: str
    at: datetime
    version: int
    step: bool


class Look(NamedTuple):
    """A batch of keys, and the rows that they had: by canonical key, with the image where the log has not seen it."""

    keys: Sequence[RawKey]
    rows: Mapping[str, str | None]


def with_others(looks: Sequence[Look], keys: Iterable[RawKey]) -> list[Look]:
    """*looks*, and batches of those *keys* that they lack: there was no row of them."""
    seen = {key for look in looks for key in look.keys}
    others = [key for key in keys if key not in seen]
    return [*looks, *(Look(batch, {}) for batch in batches(others))]


class TableLog:
    """The statements by which the database logs the rows of one class."""

    def __init__(self, tracked: Tracked, columns: TableColumns, dialect: Dialect) -> None:
        """Raises MemstateError where SQL cannot write a row, or its key."""
        row = TableWriter(tracked, dialect).row("t")
        table = tracked.table.alias("t")
        by_key = ClauseAdapter(table).traverse(columns.key_in)
        self._entity = tracked.entity
        self._columns = columns
        self._rows: Any = (
            select(literal_column(row.key, Text()).label("key"), literal_column(row.image, Text()).label("image"))
            .select_from(table)
            .where(by_key, literal_column(f"({row.criterion})", Boolean()))
        )
        self._count = select(func.count()).select_from(table).where(by_key)
        self._look = _look(self._rows.subquery("here"))
        self._logging: dict[tuple[bool, bool], Insert] = {}

    @classmethod
    def of(cls, tracked: Tracked, connection: Connection) -> TableLog | None:
        """None where Python has to look at the rows, or SQL cannot write them."""
        columns, dialect = tracked.columns_for(connection.dialect), connection.dialect
        looks = tracked.validate or tracked.immutable or tracked.unique_values
        if looks or len(tracked.tables) > 1 or (dialect.name == "sqlite" and len(columns.names) > _COLUMNS):
            return None
        try:
            table_log = cls(tracked, columns, dialect)
        except (MemstateError, CompileError):
            return None
        return table_log if _is_stored_as_declared(connection, columns) else None

    def look(self, connection: Connection, keys: Sequence[RawKey]) -> list[Look]:
        """The rows of *keys* before they are changed, in batches: one statement for each."""
        looks: list[Look] = []
        for batch in batches(keys):
            looks += self._looks_of_batch(connection, batch)
        return looks

    def _looks_of_batch(self, connection: Connection, keys: Sequence[RawKey]) -> list[Look]:
        parameters = {"entity": self._entity, **self._columns.key_parameters(keys)}
        rows = {row[0]: row[1] for row in connection.execute(self._look, parameters)}
        if len(keys) == 1 or sum(len(image) for image in rows.values() if image is not None) <= _CHARS:
            return [Look(keys, rows)]
        middle = len(keys) // 2
        return [*self._looks_of_batch(connection, keys[:middle]), *self._looks_of_batch(connection, keys[middle:])]

    def count(self, connection: Connection, keys: Sequence[RawKey]) -> int:
        """How many rows there are of *keys*, of whichever class in their table."""
        parameters = map(self._columns.key_parameters, batches(keys))
        return sum(connection.execute(self._count, each).scalar_one() for each in parameters)

    def log(self, connection: Connection, header: Header, look: Look, *, new: bool) -> int:
        """Log what became of the rows of *look*, and mark them dirty. Returns how many have changed.

        *new*: the transaction has made all of them. Then the log is not asked what it knows of them.
        """
        baselines = [row for row in look.rows.items() if row[1] is not None]
        parameters = {**header._asdict(), "entity": self._entity, **self._columns.key_parameters(look.keys)}
        if not new:
            parameters["before"] = as_array(look.rows)
        if baselines:
            parameters["baselines"] = as_json(baselines)
        kind = new, bool(baselines)
        if kind not in self._logging:
            statement = _logging(self._rows, connection.dialect.name, new=new, baselines=bool(baselines))
            self._logging[kind] = statement.execution_options(preserve_rowcount=True)
        result = connection.execute(self._logging[kind], parameters)
        if connection.dialect.name == "postgresql" or not result.rowcount:
            return result.rowcount
        # SQLite has no INSERT within another. Nobody else writes: the ids of the entries follow each other.
        ids = {"first": result.lastrowid - result.rowcount + 1, "last": result.lastrowid}
        return connection.execute(_marking_logged, ids).rowcount


_COLUMNS = 250
"""SQLite takes an expression of a thousand parts at most. That of an image has three for each column."""

_CHARS = 64_000_000
"""Of images in one parameter. PostgreSQL takes JSONB of 256 MB."""

_types = text(
    "SELECT a.attname, coalesce(b.typname, t.typname) FROM pg_attribute AS a JOIN pg_type AS t ON t.oid = a.atttypid "
    "LEFT JOIN pg_type AS b ON b.oid = t.typbasetype WHERE a.attrelid = to_regclass(:name) AND a.attnum > 0"
)


def _is_stored_as_declared(connection: Connection, columns: TableColumns) -> bool:
    """Whether the columns have the types for which the SQL of an image is made."""
    if connection.dialect.name != "postgresql":
        return True  # SQLite's goes by the value
    name = as_sent(connection.dialect.identifier_preparer.format_table(columns.table), connection.dialect)
    stored: dict[str, str] = {row[0]: row[1] for row in connection.execute(_types, {"name": name})}
    declared = {name: stored_as(columns.implementation(column)) for name, column in columns.by_name.items()}
    return all(stored[name] in types for name, types in declared.items() if types and name in stored)


# -- the statements ----------------------------------------------------------------------------------------------------

_entity = bindparam("entity", type_=Text())
_tx, _at = bindparam("tx", type_=log.c.tx.type), bindparam("at", type_=log.c.at.type)
_version, _step = bindparam("version", type_=SmallInteger()), bindparam("step", type_=Boolean())
_LOG_COLUMNS = ("tx", "at", "version", "entity", "snapshot", "key", "op", "image", "step")
_OUTBOX_COLUMNS = ("tx", "created_at", "entity", "slot", "key")
_before, _baselines = unnest_strings("before"), unnest_rows("baselines")


def _look(here: FromClause) -> Select[Any]:
    """The rows, with the images of those that the log has not seen."""
    entry: Select[Any] = select(literal_column("1")).where(log.c.entity == _entity, log.c.key == here.c.key).limit(1)
    return select(here.c.key, case((entry.scalar_subquery().is_(None), here.c.image)))


def _logging(rows: Select[Any], dialect_name: str, *, new: bool, baselines: bool) -> Insert:
    """Log what became of *rows*, and on PostgreSQL mark them dirty in the same statement."""
    is_postgresql = dialect_name == "postgresql"
    changing = _inserted(rows) if new else _changed(rows, baselines=baselines, is_postgresql=is_postgresql)
    # On SQLite the statement has to begin with its INSERT: the driver counts the rows of no other.
    changed: FromClause = changing.cte("changed") if is_postgresql else changing.subquery("changed")
    entry: list[Any] = [changed.c.key, changed.c.op, typed(changed.c.image, StoredJson), _step]
    shared = [_tx, _at, _version, _entity, statement_snapshot()]
    order = [func.length(changed.c.key), changed.c.key]  # numbers as numbers
    entries = select(*shared, *entry).order_by(*order)
    if baselines:
        part = _PARTS.alias("part")
        is_first = part.c.n == 1
        op: ColumnElement[Any] = case((is_first, "baseline"), else_=changed.c.op)
        image = typed(case((is_first, changed.c.first), else_=changed.c.image), StoredJson)
        entry = [changed.c.key, op, image, case((is_first, false()), else_=_step)]
        is_there = or_(~is_first, changed.c.first.is_not(None))
        entries = select(*shared, *entry).select_from(changed.join(part, is_there)).order_by(part.c.n, *order)
    logging = insert(log).from_select(_LOG_COLUMNS, entries)
    if not is_postgresql:
        return logging
    marks = select(_tx, _at, _entity, _slot(changed.c.key), changed.c.key)
    return insert(outbox).from_select(_OUTBOX_COLUMNS, marks).add_cte(logging.cte("logging"))


_PARTS: CompoundSelect[Any] = union_all(select(literal_column("1").label("n")), select(literal_column("2").label("n")))
"""A baseline, and the change after it."""

_marking_logged = (
    insert(outbox)
    .from_select(
        _OUTBOX_COLUMNS,
        select(log.c.tx, log.c.at, log.c.entity, literal_column("0"), log.c.key)
        .where(log.c.id.between(bindparam("first"), bindparam("last")), log.c.op != "baseline")
        .order_by(log.c.id),
    )
    .execution_options(preserve_rowcount=True)
)


def _slot(key: ColumnElement[str]) -> ColumnElement[int]:
    """`positions.slot_of`, in SQL."""
    digest = func.sha256(func.convert_to(_entity.concat(key), "UTF8"))
    return func.mod(func.get_byte(digest, 0), literal_column(str(SLOTS)))


def _inserted(rows: Select[Any]) -> Select[Any]:
    here = rows.subquery("here")
    return select(here.c.key, literal_column("'insert'", Text()).label("op"), here.c.image)


def _with_last_entries(touched: FromClause, *, is_postgresql: bool) -> tuple[FromClause, FromClause, FromClause]:
    """Each of the keys *touched*, and its last entry if it has one: both together, the keys, the entries."""
    its = and_(log.c.entity == _entity, log.c.key == touched.c.key)
    if is_postgresql:  # one look into the index for each key, and not a join, which may read the whole log
        last: FromClause = select(log.c.op, log.c.image).where(its).order_by(log.c.id.desc()).limit(1).lateral("last")
        return touched.outerjoin(last, true()), touched, last
    newest = select(func.max(log.c.id)).where(its).scalar_subquery()
    known = select(touched.c.key, touched.c.image, newest.label("id")).subquery("known")
    last = log.alias("last")
    return known.outerjoin(last, last.c.id == known.c.id), known, last


def _changed(rows: Select[Any], *, baselines: bool, is_postgresql: bool) -> Select[Any]:
    """The keys of which the log does not say yet what has become of them."""
    before = select(_before.c.value, literal_column("NULL", Text()))
    each = union_all(rows, before).subquery("each")
    touched = select(each.c.key, func.max(each.c.image).label("image")).group_by(each.c.key).subquery("touched")
    source, known, last = _with_last_entries(touched, is_postgresql=is_postgresql)
    op: ColumnElement[Any] = last.c.op
    image: ColumnElement[Any] = last.c.image
    columns = []
    if baselines:
        seen = select(row_value(_baselines, 0, Text()).label("key"), row_value(_baselines, 1, Text()).label("image"))
        first = seen.subquery("first")
        source = source.outerjoin(first, and_(first.c.key == known.c.key, last.c.op.is_(None)))
        op = case((first.c.key.is_not(None), "baseline"), else_=op)
        image = case((first.c.key.is_not(None), typed(first.c.image, StoredJson)), else_=image)
        columns = [first.c.image.label("first")]
    is_gone, was_gone = known.c.image.is_(None), func.coalesce(op, "delete") == "delete"
    differs = typed(known.c.image, StoredJson).is_distinct_from(image)
    became = case((is_gone, "delete"), (was_gone, "insert"), else_="update").label("op")
    has_changed = case((is_gone, ~was_gone), else_=or_(was_gone, differs))
    return select(known.c.key, became, known.c.image, *columns).select_from(source).where(has_changed)
