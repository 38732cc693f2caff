"""Statements that add to the log and the outbox, and statements that read undelivered keys.

A row of the outbox says "this key may have changed". The relay brings the index to the row that is committed when it
reads the key. So dirty keys need no order, and a repeated key does no harm.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from datetime import datetime
from functools import cache
from itertools import zip_longest
from typing import Any

from sqlalchemy import (
    ARRAY,
    BigInteger,
    BindParameter,
    ColumnElement,
    FromClause,
    Insert,
    Integer,
    Select,
    SmallInteger,
    Text,
    and_,
    any_,
    bindparam,
    case,
    cast,
    func,
    insert,
    literal_column,
    select,
    table,
    text,
    true,
    tuple_,
    union_all,
)
from sqlalchemy.engine import Connection

from memstate_sa.db.dialects import Database, database_of
from memstate_sa.db.engines import with_separate_pool
from memstate_sa.db.json_params import as_array, as_json, row_value, unnest_rows, unnest_strings
from memstate_sa.db.sqlite import is_in_memory
from memstate_sa.db.sqlite_database import in_transaction
from memstate_sa.db.statements import batches
from memstate_sa.db.tables import log, outbox, statement_snapshot
from memstate_sa.log.changes import LogEntry
from memstate_sa.log.positions import SLOTS, Page, Position, Snapshot, slot_of

_keys = unnest_strings("keys")

_entry = (
    select(literal_column("1"))
    .where(log.c.entity == bindparam("entity"), log.c.key == _keys.c.value)
    .limit(1)
    .scalar_subquery()
)

unknown_keys: Select[Any] = select(_keys.c.value).where(_entry.is_(None))
"""The keys among ``keys`` of ``entity`` that have no entry in the log.

It makes one index lookup for each key. For a NOT EXISTS, PostgreSQL may hash the whole log of the entity.
"""

# -- adding -----------------------------------------------------------------------------------------------------------

_LOG_COLUMNS = ("entity", "key", "op", "image", "version", "reverts", "step")
_OUTBOX_COLUMNS = ("slot", "entity", "key")
_tx, _at = bindparam("tx", type_=log.c.tx.type), bindparam("at", type_=log.c.at.type)
_log_rows, _outbox_rows = unnest_rows("logged"), unnest_rows("marked")

_add_to_log: Insert = insert(log).from_select(
    ["tx", "at", "snapshot", *_LOG_COLUMNS],
    select(
        _tx,
        _at,
        statement_snapshot(),
        *(row_value(_log_rows, n, log.c[name].type) for n, name in enumerate(_LOG_COLUMNS)),
    ),
)

_add_to_outbox: Insert = insert(outbox).from_select(
    ["tx", "created_at", *_OUTBOX_COLUMNS],
    select(_tx, _at, *(row_value(_outbox_rows, n, outbox.c[name].type) for n, name in enumerate(_OUTBOX_COLUMNS))),
)

_add_to_both: Insert = _add_to_outbox.add_cte(_add_to_log.cte("logging"))

_CHARS = 16_000_000
"""The most characters of one statement, about. PostgreSQL takes a JSONB value of 256 MB, and SQLite a text of 1 GB."""

_KEYS = 8_000
"""The most keys of one statement."""


def _payloads(entries: Iterable[LogEntry], versions: Mapping[str, int]) -> Iterator[str]:
    """*entries* as values of the parameter ``logged``. There is one value, unless it is too large for a statement."""
    rows: list[tuple[Any, ...]] = []
    chars = 0
    for entity, key, op, image, reverts, step in entries:
        # The image is text here, because SQLite would parse and print JSON within JSON twice.
        image_text = None if image is None else as_json(image)
        chars += len(image_text or key)
        if rows and chars > _CHARS:
            yield as_json(rows)
            rows, chars = [], 0
        is_step = step and op != "baseline" and not reverts
        rows.append((entity, key, op, image_text, versions[entity], reverts, is_step))
    if rows:
        yield as_json(rows)


def add(
    connection: Connection,
    entries: Iterable[LogEntry],
    dirty: Iterable[tuple[str, str]],
    tx: str,
    at: datetime,
    versions: Mapping[str, int],
) -> None:
    """Log *entries*, and add *dirty* keys to the outbox. On PostgreSQL, a few megabytes take one round trip.

    *versions*: the shape of the images of each entity.
    """
    log_payloads = _payloads(entries, versions)
    outbox_payloads = (as_json(rows) for rows in batches([(slot_of(*fact), *fact) for fact in dirty], _KEYS))
    common = {"tx": tx, "at": at}
    if database_of(connection).has_writing_ctes:
        for logged, marked in zip_longest(log_payloads, outbox_payloads, fillvalue="[]"):
            connection.execute(_add_to_both, {**common, "logged": logged, "marked": marked})
        return
    for logged in log_payloads:
        connection.execute(_add_to_log, {**common, "logged": logged})
    for marked in outbox_payloads:
        connection.execute(_add_to_outbox, {**common, "marked": marked})


# -- changes outside of a SQLite snapshot ------------------------------------------------------------------------------

_newest_id = text("SELECT seq FROM sqlite_sequence WHERE name = 'memstate_outbox'")
_journal = text("PRAGMA journal_mode")


def is_behind(connection: Connection) -> bool:
    """Whether others have committed changes that this transaction does not see. For SQLite only.

    With a write-ahead log, a transaction that began with a read keeps its snapshot. In the other journal modes, its
    locks prevent commits of others.
    """
    if is_in_memory(connection.engine) or not in_transaction(connection):
        return False
    if connection.execute(_journal).scalar_one() != "wal":
        return False
    ours = connection.execute(_newest_id).scalar() or 0
    with with_separate_pool(connection.engine).connect() as other:
        return (other.execute(_newest_id).scalar() or 0) > ours


# -- reading ----------------------------------------------------------------------------------------------------------

ALL = 1 << 62
"""A ``limit`` that limits nothing."""


def slots(database: Database) -> range:
    """The slots that relays share. A database with one writer has one slot, so one relay delivers at a time."""
    return range(1 if database.has_one_writer else SLOTS)


@cache
def present_column(database: Database) -> ColumnElement[Any]:
    """The column that `to_position` reads."""
    if not database.has_one_writer:
        return cast(func.pg_current_snapshot(), Text)
    # The newest row will not do, because delivered rows are deleted. Only a restore takes the counter back.
    counted = select(func.max(literal_column("seq", Integer))).select_from(table("sqlite_sequence"))
    return func.coalesce(counted.where(literal_column("name") == outbox.name).scalar_subquery(), 0)


def to_position(value: Any) -> Position:
    """The position of an index that is fully caught up, from the value of `present_column`."""
    if isinstance(value, int):  # SQLite gives the newest id so far
        return Position(Snapshot(0), 0, value)
    return Position(Snapshot.parse(value))


def read_present(connection: Connection) -> Position:
    return to_position(connection.execute(select(present_column(database_of(connection)))).scalar_one())


def _xid(value: ColumnElement[Any]) -> ColumnElement[Any]:
    return cast(value, BigInteger())


_limit: BindParameter[int] = bindparam("limit", type_=BigInteger())
_late_xids = unnest_strings("late_xids")


def undelivered(
    database: Database, *columns: ColumnElement[Any], where: ColumnElement[bool], newest_first: bool = False
) -> FromClause:
    """Up to ``limit`` rows of the outbox after a position, oldest or newest first: see `position_parameters`.

    A late transaction was running when the position was taken. PostgreSQL reads the index on (xid, id) twice: once for
    late transactions, and once for newer ones. With one condition for both, it would read all rows that
    are newer than the oldest late transaction.
    """
    if database.has_one_writer:
        order_by = outbox.c.id.desc() if newest_first else outbox.c.id.asc()
        entries = select(*columns).where(outbox.c.id > bindparam("after_id"), where)
        return entries.order_by(order_by).limit(_limit).subquery()
    after_id = bindparam("after_id", type_=BigInteger())
    first_id = case((_late_xids.c.value == bindparam("xid", type_=Text()), after_id), else_=0)
    is_late = and_(outbox.c.xid == _xid(_late_xids.c.value), outbox.c.id > first_id)
    is_newer = tuple_(outbox.c.xid, outbox.c.id) > tuple_(
        _xid(bindparam("xmax", type_=Text())), bindparam("after_id_of_xmax", type_=BigInteger())
    )
    order = [column.desc() if newest_first else column for column in (outbox.c.xid, outbox.c.id)]
    late_walk, newer_walk = (
        select(*columns).where(condition, where).order_by(*order).limit(_limit) for condition in (is_late, is_newer)
    )
    entries_of_xid = late_walk.correlate(_late_xids).lateral()
    late_entries = select(entries_of_xid).select_from(_late_xids.join(entries_of_xid, true()))
    return union_all(late_entries, select(newer_walk.subquery())).subquery()


def position_parameters(position: Position, late_xids: Iterable[int] | None = None) -> dict[str, Any]:
    """The parameters of `undelivered`.

    *late_xids* are transactions that were running at *position* and may have ended since. None means all that were
    running.
    """
    xmax = position.snapshot.xmax
    return {
        "xid": str(position.xid),
        "after_id": position.id,
        "xmax": str(xmax),
        "after_id_of_xmax": position.after(xmax),
        "late_xids": as_array(map(str, position.snapshot.running if late_xids is None else late_xids)),
    }


def in_slots(database: Database, column: ColumnElement[int]) -> ColumnElement[bool]:
    """SQL for "*column* is in the parameter ``slots``". `slot_array` makes the parameter."""
    if database.has_one_writer:
        return true()
    return column == any_(cast(bindparam("slots", type_=Text()), ARRAY(SmallInteger)))


def slot_array(slots: Iterable[int]) -> str:
    return "{" + ",".join(map(str, slots)) + "}"


_running = unnest_strings("running")


@cache
def _page(database: Database) -> Select[Any]:
    if database.has_one_writer:
        xid: ColumnElement[Any] = literal_column("0").label("xid")
        is_present = outbox.c.id <= bindparam("newest", type_=BigInteger())
    else:
        xid = outbox.c.xid
        has_ended = and_(xid < _xid(bindparam("newest", type_=Text())), xid.not_in(select(_xid(_running.c.value))))
        is_present = and_(has_ended, in_slots(database, outbox.c.slot))
    read = (xid, outbox.c.id, outbox.c.entity, outbox.c.key, outbox.c.intent)
    entries = undelivered(database, *read, where=is_present).c
    columns = (entries.xid, entries.id, entries.entity, entries.key, entries.intent)
    return select(*columns).order_by(entries.xid, entries.id).limit(_limit)


def read_page(connection: Connection, position: Position, present: Position, slots: Iterable[int], limit: int) -> Page:
    """Up to *limit* dirty keys of *slots* between *position* and *present*."""
    database = database_of(connection)
    if not database.has_one_writer:
        now = present.snapshot
        parameters: dict[str, Any] = position_parameters(position, filter(now.sees, position.snapshot.running))
        running = as_array(str(xid) for xid in now.running if xid >= position.snapshot.xmax)
        parameters |= {"newest": str(now.xmax), "running": running, "slots": slot_array(slots)}
    else:
        parameters = {"after_id": position.id, "newest": present.id}
    rows = connection.execute(_page(database), {**parameters, "limit": limit}).all()
    last = (rows[-1][0], rows[-1][1]) if len(rows) == limit else None
    return Page([(row[2], row[3]) for row in rows], last, frozenset((row[2], row[3]) for row in rows if row[4]))
