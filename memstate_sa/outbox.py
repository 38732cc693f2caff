"""Statements on the log and the outbox: add, window, pending, acknowledge. No I/O of its own.

An outbox entry says "this key may have changed". The relay converges the key to the row that is committed when it
looks, so entries need no order among themselves, and repeating one does no harm.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any

import pydantic_core
from sqlalchemy import (
    ARRAY,
    ColumnElement,
    Delete,
    FromClause,
    Insert,
    Integer,
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
from sqlalchemy.types import TypeEngine

from memstate_sa.changes import Entry
from memstate_sa.tables import SLOTS, Xid8, current_xid, log, outbox

_TEXT = Text()


class _elements(FunctionElement[Any]):
    """The elements of a JSON array, in their order: any number of rows or keys in one parameter."""

    inherit_cache = True


class _strings(_elements):
    """The same, of strings, as text."""

    inherit_cache = True


@compiles(_strings, "sqlite")
@compiles(_elements, "sqlite")
def _elements_sqlite(element: Any, compiler: Any, **kw: Any) -> str:
    return f"json_each({compiler.process(element.clauses, **kw)})"


@compiles(_elements, "postgresql")
def _elements_postgresql(element: Any, compiler: Any, **kw: Any) -> str:
    return f"jsonb_array_elements(CAST({compiler.process(element.clauses, **kw)} AS JSONB))"


@compiles(_strings, "postgresql")
def _strings_postgresql(element: Any, compiler: Any, **kw: Any) -> str:
    return f"jsonb_array_elements_text(CAST({compiler.process(element.clauses, **kw)} AS JSONB))"


def each(parameter: str) -> FromClause:
    """A FROM element of the strings in the JSON array parameter *parameter*; bind it with `as_array`."""
    return _strings(bindparam(parameter, type_=_TEXT)).table_valued("value", name=parameter)


def as_array(keys: Iterable[str]) -> str:
    return _text(list(keys))


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

_PAYLOAD_CHARS = 16_000_000
"""One statement's worth of rows: PostgreSQL takes a JSONB value of 256 MB, SQLite a text of 1 GB."""


class _field(FunctionElement[Any]):
    """Item *n* of the current row of `_rows`, as *type_*; JSON null is NULL."""

    inherit_cache = True

    def __init__(self, source: FromClause, n: int, type_: TypeEngine[Any] = _TEXT) -> None:
        self.type = type_
        super().__init__(source.c.value, literal_column(str(n)))


@compiles(_field, "sqlite")
def _field_sqlite(element: Any, compiler: Any, **kw: Any) -> str:
    value, n = (compiler.process(clause, **kw) for clause in element.clauses)
    return f"json_extract({value}, '$[{n}]')"


@compiles(_field, "postgresql")
def _field_postgresql(element: Any, compiler: Any, **kw: Any) -> str:
    value, n = (compiler.process(clause, **kw) for clause in element.clauses)
    type_ = element.type.dialect_impl(compiler.dialect)
    return f"CAST({value} ->> {n} AS {compiler.dialect.type_compiler_instance.process(type_)})"


_LOGGED = ("entity", "key", "op", "image", "reverts", "step")
_rows = _elements(bindparam("rows", type_=_TEXT)).table_valued("value", name="entries")
_tx, _at = bindparam("tx", type_=_TEXT), bindparam("at", type_=log.c.at.type)

# All rows of a flush in one parameter: a tenth of what an executemany costs in the driver layers, and one round trip.
_add_to_log: Insert = insert(log).from_select(
    ["tx", "at", "version", *_LOGGED],
    select(_tx, _at, literal_column("1"), *(_field(_rows, n, log.c[name].type) for n, name in enumerate(_LOGGED))),
)
_add_to_outbox: Insert = insert(outbox).from_select(
    ["tx", "created_at", "xid", "slot", "entity", "key"],
    select(_tx, _at, current_xid(), _field(_rows, 0, Integer()), _field(_rows, 1), _field(_rows, 2)),
    include_defaults=False,
)


def add_to_log(connection: Connection, entries: Iterable[Entry], tx: str, at: datetime) -> None:
    rows = [
        # The image as text: as JSON within JSON, SQLite would parse and print it twice.
        (entity, key, op, None if image is None else _text(image), reverts, op != "baseline" and reverts is None)
        for entity, key, op, image, reverts in entries
    ]
    for payload in _payloads(rows):
        connection.execute(_add_to_log, {"tx": tx, "at": at, "rows": payload})


def add_to_outbox(connection: Connection, facts: Iterable[tuple[str, str]], tx: str, at: datetime) -> None:
    for payload in _payloads([(slot_of(entity, key), entity, key) for entity, key in facts]):
        connection.execute(_add_to_outbox, {"tx": tx, "at": at, "rows": payload})


def _text(data: Any) -> str:
    """JSON, by Pydantic's serializer: a third of what the standard library takes."""
    return pydantic_core.to_json(data).decode()


def _payloads(rows: Sequence[tuple[Any, ...]]) -> Iterator[str]:
    payload = _text(rows)
    if len(payload) <= _PAYLOAD_CHARS or len(rows) == 1:
        yield payload
    else:
        middle = len(rows) // 2
        yield from _payloads(rows[:middle])
        yield from _payloads(rows[middle:])


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
