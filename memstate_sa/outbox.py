"""Statements on the log and the outbox: add, window, pending, acknowledge. No I/O of its own.

An outbox entry says "this key may have changed". The relay converges the key to the row that is committed when it
looks, so entries need no order among themselves, and repeating one does no harm.
"""

from __future__ import annotations

import json
import zlib
from collections.abc import Collection, Iterable
from dataclasses import dataclass
from datetime import datetime
from typing import Any

from sqlalchemy import (
    ColumnElement,
    Delete,
    FromClause,
    Select,
    Text,
    and_,
    bindparam,
    cast,
    delete,
    exists,
    false,
    func,
    literal,
    not_,
    or_,
    select,
)
from sqlalchemy.engine import Connection
from sqlalchemy.ext.compiler import compiles
from sqlalchemy.sql.elements import Cast
from sqlalchemy.sql.functions import FunctionElement

from memstate_sa.changes import Entry
from memstate_sa.tables import SLOTS, Xid8, log, outbox


class _each(FunctionElement[str]):
    """The strings of a JSON array as rows with a column ``value``: any number of keys in one parameter."""

    name = "each"
    inherit_cache = True


@compiles(_each, "sqlite")
def _each_sqlite(element: Any, compiler: Any, **kw: Any) -> str:
    return f"json_each({compiler.process(element.clauses, **kw)})"


@compiles(_each, "postgresql")
def _each_postgresql(element: Any, compiler: Any, **kw: Any) -> str:
    return f"jsonb_array_elements_text(CAST({compiler.process(element.clauses, **kw)} AS JSONB))"


def each(parameter: str) -> FromClause:
    """A FROM element of the strings in the JSON array parameter *parameter*; bind it with `as_array`."""
    return _each(bindparam(parameter, type_=Text())).table_valued("value", name=parameter)


def as_array(keys: Iterable[str]) -> str:
    return json.dumps(list(keys))


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
known_keys: Select[Any] = select(_keys.c.value).where(
    exists().where(log.c.entity == bindparam("entity"), log.c.key == _keys.c.value)
)
"""Which of ``keys`` of ``entity`` the log has seen. EXISTS: a key with a long history costs no more."""


def log_rows(entries: Iterable[Entry], tx: str, at: datetime) -> list[dict[str, Any]]:
    return [
        {
            "tx": tx,
            "entity": entry.entity,
            "key": entry.key,
            "op": entry.op,
            "image": entry.image,
            "version": 1,
            "reverts": entry.reverts,
            "step": entry.op != "baseline" and entry.reverts is None,
            "at": at,
        }
        for entry in entries
    ]


def outbox_rows(keys: Collection[tuple[str, str]], tx: str, at: datetime) -> list[dict[str, Any]]:
    return [
        {"slot": slot_of(entity, key), "entity": entity, "key": key, "tx": tx, "created_at": at} for entity, key in keys
    ]


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


def here(dialect_name: str) -> ColumnElement[str]:
    """The present, as a target."""
    if dialect_name == "postgresql":
        return cast(func.pg_current_snapshot(), Text)
    return func.coalesce(cast(select(func.max(outbox.c.id)).scalar_subquery(), Text), literal("0"))


def _not_seen_by(snapshot: str) -> ColumnElement[bool]:
    """Rows of transactions that *snapshot* (``xmin:xmax:xip,…``) does not see, in a form the xid index serves."""
    _xmin, xmax, xip = snapshot.split(":")
    late = outbox.c.xid >= _xid(xmax)
    return or_(late, outbox.c.xid.in_([_xid(xid) for xid in xip.split(",")])) if xip else late


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


def window(at: Position) -> Select[Any]:
    """The entries between *at* and its target, oldest id first; add a LIMIT."""
    assert at.target is not None
    page = select(outbox.c.id, outbox.c.entity, outbox.c.key).where(outbox.c.id > at.position).order_by(outbox.c.id)
    if at.snapshot is None:
        return page.where(outbox.c.id <= int(at.target))
    return page.where(_not_seen_by(at.snapshot), _seen_by(at.target))


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
