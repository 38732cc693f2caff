"""Statements on the log and the outbox: add, window, pending, acknowledge. No I/O of its own.

An outbox entry says "this key may have changed". The relay converges the key to the row that is committed when it
looks, so entries need no order among themselves, and repeating one does no harm.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterable
from dataclasses import dataclass
from datetime import datetime
from functools import cache
from typing import Any

from sqlalchemy import (
    ARRAY,
    ColumnElement,
    Delete,
    Insert,
    Select,
    SmallInteger,
    Text,
    and_,
    any_,
    bindparam,
    cast,
    delete,
    false,
    func,
    insert,
    literal,
    literal_column,
    not_,
    or_,
    select,
)
from sqlalchemy.engine import Connection
from sqlalchemy.ext.compiler import compiles
from sqlalchemy.sql.elements import Cast
from sqlalchemy.sql.functions import FunctionElement

from memstate_sa.arrays import as_json, each, item, payloads
from memstate_sa.changes import Entry
from memstate_sa.tables import SLOTS, Xid8, current_xid, log, outbox


def slot_of(entity: str, key: str) -> int:
    """The slot of a key. Stored, so it must never change."""
    return zlib.crc32(f"{entity}\0{key}".encode()) % SLOTS


def take_write_lock(connection: Connection) -> None:
    """On SQLite, become the writer now: what is read next stays true until this transaction ends.

    PostgreSQL locks rows instead. A DELETE that matches nothing takes the lock, begins the transaction in the driver's
    legacy mode too, and writes nothing.
    """
    if connection.dialect.name == "sqlite":
        connection.execute(_nothing)


_nothing: Delete = delete(outbox).where(false())

_keys = each("keys")
# Of a constant: SQLite would read the rows for EXISTS (SELECT *), where their index is enough.
_entries: Select[Any] = select(literal_column("1")).where(
    log.c.entity == bindparam("entity"), log.c.key == _keys.c.value
)
unknown_keys: Select[Any] = select(_keys.c.value).where(not_(_entries.exists()))
"""Which of ``keys`` of ``entity`` the log has not seen. EXISTS: a key with a long history costs no more."""

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

_QUEUED = ("slot", "entity", "key")
_LOGGED = ("entity", "key", "op", "image", "reverts", "step")
_tx, _at = bindparam("tx", type_=log.c.tx.type), bindparam("at", type_=log.c.at.type)
_add_to_log: Insert = insert(log).from_select(
    ["tx", "at", "version", *_LOGGED],
    select(_tx, _at, literal_column("1"), *(item(n, log.c[name].type) for n, name in enumerate(_LOGGED))),
)
_add_to_outbox: Insert = insert(outbox).from_select(
    ["tx", "created_at", "xid", *_QUEUED],
    select(_tx, _at, current_xid(), *(item(n, outbox.c[name].type) for n, name in enumerate(_QUEUED))),
    include_defaults=False,
)


def add_to_log(connection: Connection, entries: Iterable[Entry], tx: str, at: datetime) -> None:
    rows = (
        # The image as text: as JSON within JSON, SQLite would parse and print it twice.
        (entity, key, op, None if image is None else as_json(image), reverts, op != "baseline" and reverts is None)
        for entity, key, op, image, reverts in entries
    )
    for payload in payloads(rows):
        connection.execute(_add_to_log, {"tx": tx, "at": at, "rows": payload})


def add_to_outbox(connection: Connection, facts: Iterable[tuple[str, str]], tx: str, at: datetime) -> None:
    for payload in payloads((slot_of(entity, key), entity, key) for entity, key in facts):
        connection.execute(_add_to_outbox, {"tx": tx, "at": at, "rows": payload})


# -- windows ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Position:
    """How far an index has come.

    PostgreSQL: what ``snapshot`` sees is delivered, and of the window up to snapshot ``target``, the ids up to
    ``position``. A late-committing transaction is in no earlier snapshot, whatever its ids are. SQLite: one writer
    makes id order commit order; ``snapshot`` stays None and ``target`` is the window's last id.
    """

    snapshot: str | None
    target: str | None
    position: int


@cache
def here(dialect_name: str) -> Select[Any]:
    """The present, as a target."""
    if dialect_name == "postgresql":
        return select(cast(func.pg_current_snapshot(), Text))
    return select(func.coalesce(cast(func.max(outbox.c.id), Text), literal("0")))


def _not_seen_by(snapshot: str) -> ColumnElement[bool]:
    """Rows of transactions that *snapshot* (``xmin:xmax:xip,…``) does not see.

    Every slot is named and nothing is older than xmin: with that, the index on (slot, xid, id) serves it.
    """
    xmin, xmax, xip = snapshot.split(":")
    late = outbox.c.xid >= _xid(xmax)
    if xip:
        late = or_(late, outbox.c.xid.in_([_xid(xid) for xid in xip.split(",")]))
    return and_(outbox.c.slot == any_(_all_slots), outbox.c.xid >= _xid(xmin), late)


_all_slots = cast(literal("{" + ",".join(map(str, range(SLOTS))) + "}", Text), ARRAY(SmallInteger))


def _xid(value: str) -> Cast[Any]:
    return cast(literal(value, Text), Xid8())


def _seen_by(snapshot: str) -> ColumnElement[bool]:
    return func.pg_visible_in_snapshot(outbox.c.xid, _Snapshot(literal(snapshot, Text)))


class _Snapshot(FunctionElement[Any]):
    name = "snapshot"
    inherit_cache = True


@compiles(_Snapshot)
def _snapshot(element: Any, compiler: Any, **kw: Any) -> str:
    return f"CAST({compiler.process(element.clauses, **kw)} AS pg_snapshot)"


_page = (
    select(outbox.c.id, outbox.c.entity, outbox.c.key)
    .where(outbox.c.id > bindparam("position"))
    .order_by(outbox.c.id)
    .limit(bindparam("limit"))
)
_page_of_ids = _page.where(outbox.c.id <= bindparam("target"))


def window(at: Position) -> tuple[Select[Any], dict[str, Any]]:
    """The entries between *at* and its target, oldest id first, up to a ``limit``: statement and other parameters."""
    assert at.target is not None
    if at.snapshot is None:
        return _page_of_ids, {"position": at.position, "target": int(at.target)}
    return _page.where(_not_seen_by(at.snapshot), _seen_by(at.target)), {"position": at.position}


def undelivered(at: Position | None) -> ColumnElement[bool]:
    """The entries that an index at *at* (None: never delivered to) may not have, as far as the reader sees them."""
    if at is None:
        return outbox.c.id > 0
    if at.snapshot is None:
        return outbox.c.id > at.position
    late = _not_seen_by(at.snapshot)
    if at.target is None:
        return late
    return and_(late, not_(and_(outbox.c.id <= at.position, _seen_by(at.target))))


def advance(at: Position, last_id: int | None) -> Position:
    """*at* after a page that ended with *last_id*, or after the page that was the window's last (None)."""
    if last_id is not None:
        return Position(at.snapshot, at.target, last_id)
    if at.snapshot is None:
        return Position(None, None, max(at.position, int(at.target or 0)))
    return Position(at.target, None, 0)
