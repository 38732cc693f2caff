"""Statements on the log and the outbox: what is added, and what an index has not been given yet.

An outbox entry says "this key may have changed". The relay converges the key to the row that is committed when it
looks, so entries need no order among themselves, and repeating one does no harm.
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

from memstate_sa.db.engines import with_separate_pool
from memstate_sa.db.json_params import as_array, as_json, row_value, unnest_rows, unnest_strings
from memstate_sa.db.sqlite import in_transaction, is_in_memory
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
"""Which of ``keys`` of ``entity`` the log has not seen.

One look into the index for each: NOT EXISTS is a join for PostgreSQL, which may hash all that the log has of it.
"""

_last_op = (
    select(log.c.op)
    .where(log.c.entity == bindparam("entity"), log.c.key == _keys.c.value)
    .order_by(log.c.id.desc())
    .limit(1)
    .scalar_subquery()
)

deleted_keys: Select[Any] = select(_keys.c.value).where(_last_op == "delete")
"""Which of ``keys`` of ``entity`` are deleted, as far as the log goes."""


# -- adding -----------------------------------------------------------------------------------------------------------

_LOGGED = ("entity", "key", "op", "image", "version", "reverts", "step")
_MARKED = ("slot", "entity", "key")
_tx, _at = bindparam("tx", type_=log.c.tx.type), bindparam("at", type_=log.c.at.type)
_logged, _marked = unnest_rows("logged"), unnest_rows("marked")

_add_to_log: Insert = insert(log).from_select(
    ["tx", "at", "snapshot", *_LOGGED],
    select(
        _tx, _at, statement_snapshot(), *(row_value(_logged, n, log.c[name].type) for n, name in enumerate(_LOGGED))
    ),
)

_add_to_outbox: Insert = insert(outbox).from_select(
    ["tx", "created_at", *_MARKED],
    select(_tx, _at, *(row_value(_marked, n, outbox.c[name].type) for n, name in enumerate(_MARKED))),
)

_add_to_both: Insert = _add_to_outbox.add_cte(_add_to_log.cte("logging"))

_CHARS = 16_000_000
"""About one statement's worth of text: PostgreSQL takes a JSONB value of 256 MB, SQLite a text of 1 GB."""

_MARKS = 8_000
"""And of keys, which are short."""


def _payloads(entries: Iterable[LogEntry], versions: Mapping[str, int]) -> Iterator[str]:
    """*entries* as values of the parameter ``logged``: one, unless they are too large for a statement."""
    some: list[tuple[Any, ...]] = []
    chars = 0
    for entity, key, op, image, reverts, step in entries:
        # The image as text: as JSON within JSON, SQLite would parse and print it twice.
        shown = None if image is None else as_json(image)
        chars += len(shown or key)
        if some and chars > _CHARS:
            yield as_json(some)
            some, chars = [], 0
        some.append((entity, key, op, shown, versions[entity], reverts, step and op != "baseline" and not reverts))
    if some:
        yield as_json(some)


def add(
    connection: Connection,
    entries: Iterable[LogEntry],
    dirty: Iterable[tuple[str, str]],
    tx: str,
    at: datetime,
    versions: Mapping[str, int],
) -> None:
    """Log *entries*, and mark the keys *dirty*: on PostgreSQL one round trip, as long as it is not megabytes.

    *versions*: of which shape the images of each entity are.
    """
    logged = _payloads(entries, versions)
    marked = (as_json(some) for some in batches([(slot_of(*fact), *fact) for fact in dirty], _MARKS))
    given = {"tx": tx, "at": at}
    if connection.dialect.name == "postgresql":
        for some, marks in zip_longest(logged, marked, fillvalue="[]"):
            connection.execute(_add_to_both, {**given, "logged": some, "marked": marks})
        return
    for some in logged:
        connection.execute(_add_to_log, {**given, "logged": some})
    for marks in marked:
        connection.execute(_add_to_outbox, {**given, "marked": marks})


# -- what a snapshot of SQLite does not see ----------------------------------------------------------------------------

_newest_given = text("SELECT seq FROM sqlite_sequence WHERE name = 'memstate_outbox'")
_journal = text("PRAGMA journal_mode")


def is_behind(connection: Connection) -> bool:
    """Whether others have committed changes that this transaction does not see. Of SQLite only.

    A transaction that began with a read keeps its snapshot, where the file has a write-ahead log. Elsewhere a reader
    keeps others from committing, and so does a writer.
    """
    if is_in_memory(connection.engine) or not in_transaction(connection):
        return False
    if connection.execute(_journal).scalar_one() != "wal":
        return False
    ours = connection.execute(_newest_given).scalar() or 0
    with with_separate_pool(connection.engine).connect() as beside:
        return (beside.execute(_newest_given).scalar() or 0) > ours


# -- reading ----------------------------------------------------------------------------------------------------------

ALL = 1 << 62
"""A ``limit`` that is none."""


def slots(dialect_name: str) -> range:
    """The slots of which relays may each hold some. SQLite has one: its relays elect one of them."""
    return range(SLOTS) if dialect_name == "postgresql" else range(1)


@cache
def present_column(dialect_name: str) -> ColumnElement[Any]:
    """The present, for `as_position`."""
    if dialect_name == "postgresql":
        return cast(func.pg_current_snapshot(), Text)
    # Not the newest entry that is there: delivered ones are deleted, and only a restore takes the counter back.
    counted = select(func.max(literal_column("seq", Integer))).select_from(table("sqlite_sequence"))
    return func.coalesce(counted.where(literal_column("name") == outbox.name).scalar_subquery(), 0)


def to_position(here: Any) -> Position:
    """Where an index is that has everything there is."""
    if isinstance(here, int):  # SQLite: the newest id that there was
        return Position(Snapshot(0), 0, here)
    return Position(Snapshot.parse(here))


def read_present(connection: Connection) -> Position:
    return to_position(connection.execute(select(present_column(connection.dialect.name))).scalar_one())


def _xid(value: ColumnElement[Any]) -> ColumnElement[Any]:
    return cast(value, BigInteger())


_limit: BindParameter[int] = bindparam("limit", type_=BigInteger())
_late = unnest_strings("late")


def undelivered(
    dialect_name: str, *columns: ColumnElement[Any], where: ColumnElement[bool], newest_first: bool = False
) -> FromClause:
    """Up to ``limit`` entries after a position, oldest or newest first; `after` makes the other parameters.

    On PostgreSQL two walks along the index on (xid, id): entries of transactions that were running at the position, and
    of later ones. One condition for both would be a walk from the oldest transaction that runs, however old that is.
    """
    if dialect_name != "postgresql":
        newest = outbox.c.id.desc() if newest_first else outbox.c.id.asc()
        return select(*columns).where(outbox.c.id > bindparam("after"), where).order_by(newest).limit(_limit).subquery()
    begin = case((_late.c.value == bindparam("xid", type_=Text()), bindparam("after", type_=BigInteger())), else_=0)
    late = and_(outbox.c.xid == _xid(_late.c.value), outbox.c.id > begin)
    later = tuple_(outbox.c.xid, outbox.c.id) > tuple_(
        _xid(bindparam("xmax", type_=Text())), bindparam("later_after", type_=BigInteger())
    )
    order = [column.desc() if newest_first else column for column in (outbox.c.xid, outbox.c.id)]
    of_late, of_later = (
        select(*columns).where(transactions, where).order_by(*order).limit(_limit) for transactions in (late, later)
    )
    each_late = of_late.correlate(_late).lateral()
    late_entries = select(each_late).select_from(_late.join(each_late, true()))
    return union_all(late_entries, select(of_later.subquery())).subquery()


def position_parameters(at: Position, late: Iterable[int] | None = None) -> dict[str, Any]:
    """Parameters of `undelivered`; *late* are those of the transactions running at *at* that may have ended since."""
    xmax = at.snapshot.xmax
    begin = {"xid": str(at.xid), "after": at.id, "xmax": str(xmax), "later_after": at.after(xmax)}
    return {**begin, "late": as_array(map(str, at.snapshot.running if late is None else late))}


def in_slots(dialect_name: str, column: ColumnElement[int]) -> ColumnElement[bool]:
    """Whether *column* is among the parameter ``slots``, made by `slot_array`."""
    if dialect_name != "postgresql":
        return true()
    return column == any_(cast(bindparam("slots", type_=Text()), ARRAY(SmallInteger)))


def slot_array(slots: Iterable[int]) -> str:
    return "{" + ",".join(map(str, slots)) + "}"


_running = unnest_strings("running")


@cache
def _page(dialect_name: str) -> Select[Any]:
    if dialect_name != "postgresql":
        xid: ColumnElement[Any] = literal_column("0").label("xid")
        limits = outbox.c.id <= bindparam("newest", type_=BigInteger())
    else:
        xid = outbox.c.xid
        ended = and_(xid < _xid(bindparam("newest", type_=Text())), xid.not_in(select(_xid(_running.c.value))))
        limits = and_(ended, in_slots(dialect_name, outbox.c.slot))
    read = (xid, outbox.c.id, outbox.c.entity, outbox.c.key, outbox.c.intent)
    entries = undelivered(dialect_name, *read, where=limits).c
    columns = (entries.xid, entries.id, entries.entity, entries.key, entries.intent)
    return select(*columns).order_by(entries.xid, entries.id).limit(_limit)


def read_page(connection: Connection, at: Position, present: Position, slots: Iterable[int], limit: int) -> Page:
    """Up to *limit* entries of *slots* that *present* has and *at* has not."""
    dialect = connection.dialect.name
    if dialect == "postgresql":
        now = present.snapshot
        parameters: dict[str, Any] = position_parameters(at, filter(now.sees, at.snapshot.running))
        running = as_array(str(xid) for xid in now.running if xid >= at.snapshot.xmax)
        parameters |= {"newest": str(now.xmax), "running": running, "slots": slot_array(slots)}
    else:
        parameters = {"after": at.id, "newest": present.id}
    found = connection.execute(_page(dialect), {**parameters, "limit": limit}).all()
    last = (found[-1][0], found[-1][1]) if len(found) == limit else None
    return Page([(row[2], row[3]) for row in found], last, frozenset((row[2], row[3]) for row in found if row[4]))
