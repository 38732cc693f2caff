"""Statements on the tables of checkpoints: bytes in, bytes out. What they mean, the checkpointer knows."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from typing import Any, NamedTuple

from sqlalchemy import (
    ColumnElement,
    CompoundSelect,
    FromClause,
    Integer,
    LargeBinary,
    Select,
    Table,
    Text,
    and_,
    bindparam,
    cast,
    delete,
    false,
    func,
    literal,
    literal_column,
    null,
    select,
    true,
    tuple_,
    union_all,
    update,
)
from sqlalchemy.engine import Connection
from sqlalchemy.ext.compiler import compiles
from sqlalchemy.sql.functions import FunctionElement

from memstate_sa.db import json_filter
from memstate_sa.db.json_params import as_array, as_json, row_value, unnest_rows, unnest_strings
from memstate_sa.db.statements import upsert
from memstate_sa.db.tables import log
from memstate_sa.integrations.langgraph.tables import blob, checkpoint, write
from memstate_sa.log.history import SNAPSHOT_MARK

TABLES: tuple[Table, ...] = (checkpoint, blob, write)


class Place(NamedTuple):
    """Where a checkpoint is: of which thread, and of which graph in it."""

    thread_id: str
    ns: str
    id: str


class Value(NamedTuple):
    """What a serializer made of something."""

    type: str
    data: bytes


class Write(NamedTuple):
    """The *idx*-th thing that a task wrote, to *channel*. Sorted, they are in the order in which they take effect."""

    task_path: str
    task_id: str
    idx: int
    channel: str
    value: Value


@dataclass
class Stored:
    """A checkpoint with all that belongs to it."""

    place: Place
    parent_id: str | None
    position: str | None
    metadata: dict[str, Any]
    channels: dict[str, str | None]
    payload: Value
    blobs: dict[str, Value] = field(default_factory=dict)
    writes: list[Write] = field(default_factory=list)


class _pairs(FunctionElement[Any]):  # noqa: N801  # as in SQL
    """The members of a JSON object, values as text."""

    inherit_cache = True


@compiles(_pairs, "sqlite")
def _pairs_sqlite(element: Any, compiler: Any, **kw: Any) -> str:
    return f"json_each({compiler.process(element.clauses, **kw)})"


@compiles(_pairs, "postgresql")
def _pairs_postgresql(element: Any, compiler: Any, **kw: Any) -> str:
    return f"jsonb_each_text(CAST({compiler.process(element.clauses, **kw)} AS JSONB))"


_thread, _ns, _id = (bindparam(f"the_{name}", type_=Text()) for name in ("thread", "ns", "id"))
_data = bindparam("data", type_=LargeBinary())
_ids = unnest_strings("ids")


def _in_graph(table: Table) -> ColumnElement[bool]:
    return and_(table.c.thread_id == _thread, table.c.ns == _ns)


def _graph(thread_id: str, ns: str) -> dict[str, Any]:
    """For what `_in_graph` selects."""
    return {"the_thread": thread_id, "the_ns": ns}


def _at(place: Place) -> dict[str, Any]:
    return {**_graph(place.thread_id, place.ns), "the_id": place.id}


# -- writing ----------------------------------------------------------------------------------------------------------
# All values of a call travel in one parameter, one after the other, and are cut out of it by the database.


def _packed(values: Iterable[tuple[Sequence[Any], Value]]) -> dict[str, Any]:
    """Rows and their values as the parameters `given` and `data`."""
    # With a byte before them: no bytes at all are NULL to SQLite's driver.
    places, data, start = [], [b"-"], 2
    for row, value in values:
        places.append([*row, value.type, start, len(value.data)])
        data.append(value.data)
        start += len(value.data)
    return {"given": as_json(places), "data": b"".join(data)}


def _unpacked(given: FromClause, width: int) -> list[ColumnElement[Any]]:
    """Type and value of each row of `given`, which has *width* columns before them."""
    return [
        row_value(given, width, Text()),
        func.substr(_data, *(row_value(given, width + n, Integer()) for n in (1, 2))),
    ]


def _insert(dialect_name: str, table: Table, values: Mapping[str, ColumnElement[Any]]) -> Any:
    # Without a WHERE, SQLite takes ON CONFLICT for a join's ON.
    return upsert(dialect_name, table).from_select(list(values), select(*values.values()).where(true()))


@cache
def _put_blobs(dialect_name: str) -> Any:
    given = unnest_rows("given")
    names = ["thread_id", "ns", "channel", "version", "type", "value"]
    values = [_thread, _ns, row_value(given, 0, Text()), row_value(given, 1, Text()), *_unpacked(given, 2)]
    return _insert(dialect_name, blob, dict(zip(names, values, strict=True))).on_conflict_do_nothing()


_last_tx = select(log.c.tx).order_by(log.c.id.desc()).limit(1).scalar_subquery()


_parent = (
    select(checkpoint.c.id)
    .where(_in_graph(checkpoint), checkpoint.c.id == bindparam("the_parent", type_=Text()))
    .with_for_update(read=True, key_share=True)
)
_of_row = ("parent_id", "run_id", "position", "snapshot", "metadata", "channels", "type", "payload")


def _present(dialect_name: str) -> dict[str, ColumnElement[Any]]:
    """Where the log is now. On PostgreSQL its last transaction may have seen less than there is."""
    if dialect_name != "postgresql":
        return {"position": _last_tx, "snapshot": null()}
    return {"position": _last_tx, "snapshot": cast(func.pg_current_snapshot(), Text)}


@cache
def _put_checkpoint(dialect_name: str, *, positioned: bool, with_blobs: bool, replace: bool, follows: bool) -> Any:
    given: dict[str, ColumnElement[Any]] = {"thread_id": _thread, "ns": _ns, "id": _id}
    given |= {name: bindparam(name, type_=checkpoint.c[name].type) for name in _of_row}
    if positioned:
        given |= _present(dialect_name)
    row = select(*given.values()).where(true())  # see `_insert`
    if follows:
        # The parent's row stays until this transaction ends, and with it the blobs that both checkpoints share.
        row = row.select_from(_parent.subquery("parent"))
    statement = upsert(dialect_name, checkpoint).from_select(list(given), row)
    if replace:
        names = _of_row
        statement = statement.on_conflict_do_update(
            index_elements=list(checkpoint.primary_key), set_={name: statement.excluded[name] for name in names}
        )
    else:
        statement = statement.on_conflict_do_nothing()
    if follows:
        statement = statement.returning(checkpoint.c.id)
    return statement.add_cte(_put_blobs(dialect_name).cte("putting_blobs")) if with_blobs else statement


def put(
    connection: Connection,
    place: Place,
    parent_id: str | None,
    payload: Value,
    channels: Mapping[str, str | None],
    blobs: Mapping[tuple[str, str], Value],
    metadata: Mapping[str, Any],
    position: str | bool | None = None,
    *,
    replace: bool = True,
    follows: bool = False,
) -> bool:
    """Store a checkpoint, and *blobs* by channel and version: on PostgreSQL one statement.

    *position* True is where the log is now. Without *replace*, a checkpoint that is there stays as it is.
    With *follows*, it is stored only while its parent is there. Returns whether it is stored.
    """
    run_id = metadata.get("run_id")
    given = {
        **_at(place),
        "parent_id": parent_id,
        "run_id": None if run_id is None else str(run_id),
        "metadata": metadata,
        "channels": as_json(channels),
        "type": payload.type,
        "payload": payload.data,
    }
    if position is not True:
        tx, _, snapshot = (position or "").partition(SNAPSHOT_MARK)
        given |= {"position": tx or None, "snapshot": snapshot or None}
    if follows:
        given["the_parent"] = parent_id
    dialect = connection.dialect.name
    together = bool(blobs) and dialect == "postgresql"
    packed = _packed(((channel, version), value) for (channel, version), value in blobs.items())
    if blobs and not together:
        connection.execute(_put_blobs(dialect), {**_graph(place.thread_id, place.ns), **packed})
    statement = _put_checkpoint(
        dialect, positioned=position is True, with_blobs=together, replace=replace, follows=follows
    )
    result = connection.execute(statement, {**given, **packed} if together else given)
    return not follows or result.first() is not None


@cache
def _put_writes(dialect_name: str, *, replace: bool) -> Any:
    given = unnest_rows("given")
    values = {
        "thread_id": _thread,
        "ns": _ns,
        "checkpoint_id": _id,
        "task_id": row_value(given, 0, Text()),
        "idx": row_value(given, 1, Integer()),
        "task_path": row_value(given, 2, Text()),
        "channel": row_value(given, 3, Text()),
    }
    values |= dict(zip(("type", "value"), _unpacked(given, 4), strict=True))
    statement = _insert(dialect_name, write, values)
    if not replace:
        return statement.on_conflict_do_nothing()
    names = ("channel", "type", "value")
    return statement.on_conflict_do_update(
        index_elements=list(write.primary_key), set_={name: statement.excluded[name] for name in names}
    )


def put_writes(connection: Connection, place: Place, writes: Iterable[Write], *, replace: bool) -> None:
    """Store what tasks wrote, unless it is there already; with *replace*, over what is there."""
    kept: dict[tuple[str, int], Write] = {}
    for each_write in writes:
        if replace or (each_write.task_id, each_write.idx) not in kept:
            kept[each_write.task_id, each_write.idx] = each_write
    if kept:
        packed = _packed(((w.task_id, w.idx, w.task_path, w.channel), w.value) for w in kept.values())
        connection.execute(_put_writes(connection.dialect.name, replace=replace), {**_at(place), **packed})


# -- reading ----------------------------------------------------------------------------------------------------------

_CHECKPOINT, _BLOB, _WRITE = range(3)
_head = (
    checkpoint.c.thread_id,
    checkpoint.c.ns,
    checkpoint.c.id,
    checkpoint.c.parent_id,
    func.coalesce(
        checkpoint.c.position.concat(SNAPSHOT_MARK).concat(checkpoint.c.snapshot), checkpoint.c.position
    ).label("position"),
    checkpoint.c.metadata,
    checkpoint.c.channels,
    checkpoint.c.type,
    checkpoint.c.payload,
)


def _with_all(checkpoints: Select[Any]) -> CompoundSelect[Any]:
    """*checkpoints*, their blobs and their writes, by one statement: all of one state.

    Not by a CTE: a statement that begins with WITH is taken for one that writes, on SQLite.
    """
    heads = checkpoints.subquery("heads")
    h, nothing = heads.c, cast(null(), Text)
    pair = _pairs(h.channels).table_valued("key", "value", name="pair")
    used = select(h.thread_id, h.ns, pair.c.key, pair.c.value).select_from(heads.join(pair, true()))
    # Of one checkpoint they are distinct anyway; but only so does SQLite look for these, instead of through all blobs.
    wanted = used.distinct().where(pair.c.value.is_not(None)).subquery("wanted")
    columns = {"thread_id": "thread_id", "ns": "ns", "channel": "key", "version": "value"}
    its_blob = and_(*(blob.c[name] == wanted.c[given] for name, given in columns.items()))
    its_write = and_(write.c.thread_id == h.thread_id, write.c.ns == h.ns, write.c.checkpoint_id == h.id)
    return union_all(
        select(
            literal_column(str(_CHECKPOINT)).label("kind"), h.thread_id, h.ns, h.id, h.parent_id, h.position,
            cast(h.metadata, Text).label("metadata"), h.channels, literal_column("0").label("idx"), h.type, h.payload
        ),
        select(
            literal_column(str(_BLOB)), blob.c.thread_id, blob.c.ns, blob.c.channel, blob.c.version, nothing,
            nothing, nothing, literal_column("0"), blob.c.type, blob.c.value
        ).select_from(wanted.join(blob, its_blob)),
        select(
            literal_column(str(_WRITE)), write.c.thread_id, write.c.ns, write.c.checkpoint_id, write.c.channel,
            nothing, write.c.task_id, write.c.task_path, write.c.idx, write.c.type, write.c.value
        ).select_from(heads.join(write, its_write)),
    )  # fmt: skip


_of_graph = select(*_head).where(_in_graph(checkpoint))
_exact = _with_all(_of_graph.where(checkpoint.c.id == _id))
# Not a bound 1: PostgreSQL would take it for any number, and plan anew each time.
_latest = _with_all(_of_graph.order_by(checkpoint.c.id.desc()).limit(literal_column("1")))


def get(connection: Connection, thread_id: str, ns: str, checkpoint_id: str | None) -> Stored | None:
    """A checkpoint, or the latest of its graph."""
    graph = _graph(thread_id, ns)
    if checkpoint_id is None:
        return next(iter(_assembled(connection, _latest, graph)), None)
    return next(iter(_assembled(connection, _exact, {**graph, "the_id": checkpoint_id})), None)


def _assembled(connection: Connection, statement: Any, given: Mapping[str, Any]) -> list[Stored]:
    found: dict[Place, Stored] = {}
    blobs: dict[tuple[str, str, str, str], Value] = {}
    writes: list[tuple[Place, Write]] = []
    for kind, thread_id, ns, a, b, position, c, d, idx, type_, data in connection.execute(statement, given).all():
        value = Value(type_, data)
        if kind == _CHECKPOINT:
            place = Place(thread_id, ns, a)
            found[place] = Stored(place, b, position, json.loads(c), json.loads(d), value)
        elif kind == _BLOB:
            blobs[thread_id, ns, a, b] = value
        else:
            writes.append((Place(thread_id, ns, a), Write(d, c, idx, b, value)))
    for place, stored in found.items():
        for channel, version in stored.channels.items():
            if version is not None and (held := blobs.get((place.thread_id, place.ns, channel, version))) is not None:
                stored.blobs[channel] = held
    for place, written in writes:
        found[place].writes.append(written)
    for stored in found.values():
        stored.writes.sort(key=lambda w: w[:3])
    return sorted(found.values(), key=_newest_first, reverse=True)


def _newest_first(stored: Stored) -> tuple[str, str, str]:
    return stored.place.id, stored.place.thread_id, stored.place.ns


class Cursor(NamedTuple):
    """Which checkpoints to list: all but what is None is a condition."""

    thread_id: str | None = None
    ns: str | None = None
    id: str | None = None
    before: str | None = None
    after: Place | None = None
    """The last one of the page before."""


def page(connection: Connection, cursor: Cursor, filters: Mapping[str, Any], limit: int) -> list[Stored]:
    """Up to *limit* checkpoints, newest first, whose metadata are as *filters* say (`json_criteria`)."""
    c = checkpoint.c
    wanted = ((c.thread_id, cursor.thread_id), (c.ns, cursor.ns), (c.id, cursor.id))
    criteria = [column == value for column, value in wanted if value is not None]
    criteria.append(json_filter.matches(connection.dialect.name, c.metadata, filters))
    if cursor.before is not None:
        criteria.append(c.id < cursor.before)
    if cursor.after is not None:
        criteria.append(c.id <= cursor.after.id)
        after = (cursor.after.id, cursor.after.thread_id, cursor.after.ns)
        criteria.append(tuple_(c.id, c.thread_id, c.ns) < tuple_(*map(literal, after)))
    newest = (c.id.desc(), c.thread_id.desc(), c.ns.desc())
    heads = select(*_head).where(*criteria).order_by(*newest).limit(limit)
    return _assembled(connection, _with_all(heads), {})


_is_there: Any = select(literal_column("1")).where(_in_graph(checkpoint), checkpoint.c.id == _id)


def is_there(connection: Connection, place: Place) -> bool:
    return connection.execute(_is_there, _at(place)).first() is not None


# -- ancestors --------------------------------------------------------------------------------------------------------


class Link(NamedTuple):
    """A checkpoint without its contents."""

    id: str
    parent_id: str | None
    channels: dict[str, str | None]


_CHAIN = 500
_depth = literal_column("0", Integer)
_chain = (
    select(checkpoint.c.id, checkpoint.c.parent_id, checkpoint.c.channels, _depth.label("depth"))
    .where(_in_graph(checkpoint), checkpoint.c.id == _id)
    .cte("chain", recursive=True)
)
_chain = _chain.union_all(
    select(checkpoint.c.id, checkpoint.c.parent_id, checkpoint.c.channels, _chain.c.depth + 1)
    .join(_chain, checkpoint.c.id == _chain.c.parent_id)
    .where(_in_graph(checkpoint), _chain.c.depth < _CHAIN)
)
_links = select(_chain.c.id, _chain.c.parent_id, _chain.c.channels).order_by(_chain.c.depth)


def ancestry(connection: Connection, place: Place) -> Iterable[Link]:
    """A checkpoint and those that led to it, itself first, read as they are asked for."""
    wanted: str | None = place.id
    while wanted is not None:
        found = connection.execute(_links, _at(place._replace(id=wanted))).all()
        links = [Link(row.id, row.parent_id, json.loads(row.channels)) for row in found]
        yield from links
        # The walk ends at a root, at a parent that is gone, or because it is long.
        wanted = links[-1].parent_id if len(links) > _CHAIN else None


_writes_to = (
    select(write)
    .select_from(_ids.join(write, write.c.checkpoint_id == _ids.c.value))
    .where(_in_graph(write), write.c.channel == bindparam("the_channel", type_=Text()))
)


def writes_to(connection: Connection, place: Place, channel: str, ids: Sequence[str]) -> dict[str, list[Write]]:
    """What was written to *channel* at each of the checkpoints *ids* of the same graph as *place*, in order."""
    given = {**_graph(place.thread_id, place.ns), "the_channel": channel, "ids": as_array(ids)}
    found: dict[str, list[Write]] = {}
    for row in connection.execute(_writes_to, given).all():
        written = Write(row.task_path, row.task_id, row.idx, row.channel, Value(row.type, row.value))
        found.setdefault(row.checkpoint_id, []).append(written)
    return {id_: sorted(written, key=lambda w: w[:3]) for id_, written in found.items()}


# -- threads and runs -------------------------------------------------------------------------------------------------

_threads = unnest_strings("threads")


def _of_threads(table: Table) -> ColumnElement[bool]:
    return table.c.thread_id.in_(select(_threads.c.value))


_alone = select(func.count(func.pg_advisory_xact_lock(func.hashtextextended(_threads.c.value, 8021))))
_rows_of_threads: Any = (
    select(literal_column("1")).where(_of_threads(checkpoint)).order_by(*checkpoint.primary_key).with_for_update()
)
_nothing = delete(checkpoint).where(false())


def lock_threads(connection: Connection, thread_ids: Iterable[str]) -> None:
    """Keep others from saving to these threads until this transaction ends.

    A checkpoint that follows another one waits for that one's row; one whose parent is gone waits for the thread.
    """
    if connection.dialect.name == "sqlite":
        connection.execute(_nothing)  # which takes the write lock
        return
    given = {"threads": as_array(sorted(thread_ids))}
    connection.execute(_alone, given)
    connection.execute(_rows_of_threads, given)


def delete_threads(connection: Connection, thread_ids: Iterable[str]) -> None:
    thread_ids = list(thread_ids)
    lock_threads(connection, thread_ids)
    _at_once(
        connection, [delete(table).where(_of_threads(table)) for table in TABLES], {"threads": as_array(thread_ids)}
    )


def _at_once(connection: Connection, statements: Sequence[Any], given: Mapping[str, Any]) -> None:
    """Run *statements* on one state of the database."""
    if connection.dialect.name == "postgresql":  # where each statement sees another; on SQLite, we are the writer
        first, *others = statements
        statements = [first.add_cte(*(other.cte(f"also_{n}") for n, other in enumerate(others)))]
    for statement in statements:
        connection.execute(statement, given)


def copy_thread(connection: Connection, source: str, target: str) -> None:
    """All of a thread as it is at one moment, in which nothing is pruned half-way."""
    statements = [_copy(connection.dialect.name, table) for table in TABLES]
    _at_once(connection, statements, {"source": source, "target": target})


def _copy(dialect_name: str, table: Table) -> Any:
    values: dict[str, ColumnElement[Any]] = {column.name: column for column in table.columns}
    values["thread_id"] = bindparam("target", type_=Text())
    copied = select(*values.values()).where(table.c.thread_id == bindparam("source", type_=Text()))
    return upsert(dialect_name, table).from_select(list(values), copied).on_conflict_do_nothing()


class Outline(NamedTuple):
    """What pruning needs to know of a checkpoint."""

    id: str
    parent_id: str | None
    run_id: str | None
    channels: dict[str, str | None]
    metadata: dict[str, Any]


_outlines = (
    select(checkpoint.c.ns, *(checkpoint.c[name] for name in Outline._fields))
    .where(checkpoint.c.thread_id == _thread)
    .order_by(checkpoint.c.ns, checkpoint.c.id)
)


def outlines(connection: Connection, thread_id: str) -> dict[str, dict[str, Outline]]:
    """The checkpoints of a thread, by graph and id, oldest first; see `lock_threads`."""
    found: dict[str, dict[str, Outline]] = {}
    for row in connection.execute(_outlines, {"the_thread": thread_id}):
        outline = Outline(row.id, row.parent_id, row.run_id, json.loads(row.channels), row.metadata)
        found.setdefault(row.ns, {})[row.id] = outline
    return found


def threads_of_runs(connection: Connection, run_ids: Iterable[str]) -> list[str]:
    runs = unnest_strings("runs")
    statement = select(checkpoint.c.thread_id).distinct().where(
        checkpoint.c.run_id.is_not(None), checkpoint.c.run_id.in_(select(runs.c.value))
    )  # fmt: skip
    return list(connection.scalars(statement, {"runs": as_array(run_ids)}))


_delete_writes = delete(write).where(_in_graph(write), write.c.checkpoint_id.in_(select(_ids.c.value)))
_delete_checkpoints = delete(checkpoint).where(_in_graph(checkpoint), checkpoint.c.id.in_(select(_ids.c.value)))
_reparent = (
    update(checkpoint)
    .where(_in_graph(checkpoint), checkpoint.c.id == _id)
    .values(parent_id=bindparam("new_parent", type_=Text()))
)
_still_used = select(checkpoint.c.channels).where(_in_graph(checkpoint))
_delete_blobs = delete(blob).where(
    _in_graph(blob),
    blob.c.channel == bindparam("the_channel", type_=Text()),
    blob.c.version.in_(select(unnest_strings("versions").c.value)),
)


def delete_checkpoints(connection: Connection, thread_id: str, ns: str, all_: Mapping[str, Outline],
                       gone: set[str]) -> None:  # fmt: skip
    """Delete those of *gone* among *all_* checkpoints of a graph; their children become those of their ancestors.

    Blobs go with the last checkpoint that has them.
    """
    if not gone:
        return
    graph = _graph(thread_id, ns)
    connection.execute(_delete_writes, {**graph, "ids": as_array(gone)})
    connection.execute(_delete_checkpoints, {**graph, "ids": as_array(gone)})
    for outline in all_.values():
        if outline.id not in gone and outline.parent_id in gone:
            parent: str | None = outline.parent_id
            while parent in gone and parent is not None:
                parent = all_[parent].parent_id
            connection.execute(_reparent, {**graph, "the_id": outline.id, "new_parent": parent})
    freed = {(channel, version) for id_ in gone for channel, version in all_[id_].channels.items() if version}
    if freed:
        # Read after the deletion: those that were put meanwhile count.
        for channels in connection.scalars(_still_used, graph):
            freed.difference_update(json.loads(channels).items())
    garbage: dict[str, list[str]] = {}
    for channel, version in freed:
        garbage.setdefault(channel, []).append(version)
    for channel, versions in garbage.items():
        connection.execute(_delete_blobs, {**graph, "the_channel": channel, "versions": as_array(versions)})


def delete_graph(connection: Connection, thread_id: str, ns: str) -> None:
    for table in TABLES:
        connection.execute(delete(table).where(_in_graph(table)), _graph(thread_id, ns))
