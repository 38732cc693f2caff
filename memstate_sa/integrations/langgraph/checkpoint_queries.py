"""Queries for one checkpoint, a page of checkpoints, or the ancestors of a checkpoint."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

from sqlalchemy import (
    CompoundSelect,
    Integer,
    Select,
    Text,
    and_,
    bindparam,
    cast,
    func,
    literal,
    literal_column,
    null,
    select,
    true,
    tuple_,
    union_all,
)
from sqlalchemy.engine import Connection
from sqlalchemy.ext.compiler import compiles
from sqlalchemy.sql.functions import FunctionElement

from memstate_sa.db import json_filter
from memstate_sa.db.dialects import database_of
from memstate_sa.db.json_params import as_array
from memstate_sa.integrations.langgraph.checkpoint_rows import (
    CheckpointKey,
    SerializedValue,
    StoredCheckpoint,
    TaskWrite,
    checkpoint_params,
    graph_params,
    id_list,
    id_param,
    in_graph,
)
from memstate_sa.integrations.langgraph.tables import blob, checkpoint, write
from memstate_sa.log.history import SNAPSHOT_MARK


class _pairs(FunctionElement[Any]):  # noqa: N801  # as in SQL
    """The names and values of a JSON object, as a table. Values are text."""

    inherit_cache = True


@compiles(_pairs, "sqlite")
def _pairs_sqlite(element: Any, compiler: Any, **kw: Any) -> str:
    return f"json_each({compiler.process(element.clauses, **kw)})"


@compiles(_pairs, "postgresql")
def _pairs_postgresql(element: Any, compiler: Any, **kw: Any) -> str:
    return f"jsonb_each_text(CAST({compiler.process(element.clauses, **kw)} AS JSONB))"


# -- checkpoints with their blobs and writes --------------------------------------------------------------------------

_CHECKPOINT, _BLOB, _WRITE = range(3)
_columns = (
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


def _with_contents(checkpoints: Select[Any]) -> CompoundSelect[Any]:
    """A statement for *checkpoints*, their blobs and their writes. One statement reads one state of the database.

    It has no CTE, because on SQLite a statement that begins with WITH is treated as a write.
    """
    heads = checkpoints.subquery("heads")
    h, nothing = heads.c, cast(null(), Text)
    pair = _pairs(h.channels).table_valued("key", "value", name="pair")
    used = select(h.thread_id, h.ns, pair.c.key, pair.c.value).select_from(heads.join(pair, true()))
    # The keys of one checkpoint are distinct anyway. DISTINCT makes SQLite search for these keys, instead of reading
    # all blobs.
    blob_keys = used.distinct().where(pair.c.value.is_not(None)).subquery("blob_keys")
    columns = {"thread_id": "thread_id", "ns": "ns", "channel": "key", "version": "value"}
    same_blob = and_(*(blob.c[name] == blob_keys.c[source] for name, source in columns.items()))
    same_checkpoint = and_(write.c.thread_id == h.thread_id, write.c.ns == h.ns, write.c.checkpoint_id == h.id)
    return union_all(
        select(
            literal_column(str(_CHECKPOINT)).label("kind"), h.thread_id, h.ns, h.id, h.parent_id, h.position,
            cast(h.metadata, Text).label("metadata"), h.channels, literal_column("0").label("idx"), h.type, h.payload
        ),
        select(
            literal_column(str(_BLOB)), blob.c.thread_id, blob.c.ns, blob.c.channel, blob.c.version, nothing,
            nothing, nothing, literal_column("0"), blob.c.type, blob.c.value
        ).select_from(blob_keys.join(blob, same_blob)),
        select(
            literal_column(str(_WRITE)), write.c.thread_id, write.c.ns, write.c.checkpoint_id, write.c.channel,
            nothing, write.c.task_id, write.c.task_path, write.c.idx, write.c.type, write.c.value
        ).select_from(heads.join(write, same_checkpoint)),
    )  # fmt: skip


_of_graph = select(*_columns).where(in_graph(checkpoint))
_exact = _with_contents(_of_graph.where(checkpoint.c.id == id_param))
# The limit is a literal 1, because PostgreSQL would make a new plan for each parameter.
_latest = _with_contents(_of_graph.order_by(checkpoint.c.id.desc()).limit(literal_column("1")))


def get_checkpoint(
    connection: Connection, thread_id: str, ns: str, checkpoint_id: str | None
) -> StoredCheckpoint | None:
    """The checkpoint with this id, or the latest of the graph if *checkpoint_id* is None."""
    graph = graph_params(thread_id, ns)
    if checkpoint_id is None:
        return next(iter(_assembled(connection, _latest, graph)), None)
    return next(iter(_assembled(connection, _exact, {**graph, "the_id": checkpoint_id})), None)


def _assembled(connection: Connection, statement: Any, params: Mapping[str, Any]) -> list[StoredCheckpoint]:
    """The checkpoints of a statement of `_with_contents`, newest first."""
    checkpoints: dict[CheckpointKey, StoredCheckpoint] = {}
    blobs: dict[tuple[str, str, str, str], SerializedValue] = {}
    writes: list[tuple[CheckpointKey, TaskWrite]] = []
    for kind, thread_id, ns, a, b, position, c, d, idx, type_, data in connection.execute(statement, params).all():
        value = SerializedValue(type_, data)
        if kind == _CHECKPOINT:
            key = CheckpointKey(thread_id, ns, a)
            checkpoints[key] = StoredCheckpoint(key, b, position, json.loads(c), json.loads(d), value)
        elif kind == _BLOB:
            blobs[thread_id, ns, a, b] = value
        else:
            writes.append((CheckpointKey(thread_id, ns, a), TaskWrite(d, c, idx, b, value)))
    for key, stored in checkpoints.items():
        for channel, version in stored.channels.items():
            if version is not None and (blob_value := blobs.get((key.thread_id, key.ns, channel, version))) is not None:
                stored.blobs[channel] = blob_value
    for key, task_write in writes:
        checkpoints[key].writes.append(task_write)
    for stored in checkpoints.values():
        stored.writes.sort(key=_write_order)
    return sorted(checkpoints.values(), key=_age_order, reverse=True)


def _write_order(task_write: TaskWrite) -> tuple[str, str, int]:
    return task_write.task_path, task_write.task_id, task_write.idx


def _age_order(stored: StoredCheckpoint) -> tuple[str, str, str]:
    return stored.key.id, stored.key.thread_id, stored.key.ns


class CheckpointQuery(NamedTuple):
    """The conditions of a listing. None means no condition."""

    thread_id: str | None = None
    ns: str | None = None
    id: str | None = None
    before: str | None = None
    after: CheckpointKey | None = None
    """The last checkpoint of the previous page."""


def page(
    connection: Connection, query: CheckpointQuery, filters: Mapping[str, Any], limit: int
) -> list[StoredCheckpoint]:
    """Up to *limit* checkpoints, newest first, whose metadata match *filters* (see `json_filter.matches`)."""
    c = checkpoint.c
    conditions = ((c.thread_id, query.thread_id), (c.ns, query.ns), (c.id, query.id))
    criteria = [column == value for column, value in conditions if value is not None]
    criteria.append(json_filter.matches(database_of(connection), c.metadata, filters))
    if query.before is not None:
        criteria.append(c.id < query.before)
    if query.after is not None:
        criteria.append(c.id <= query.after.id)
        after = (query.after.id, query.after.thread_id, query.after.ns)
        criteria.append(tuple_(c.id, c.thread_id, c.ns) < tuple_(*map(literal, after)))
    newest_first = (c.id.desc(), c.thread_id.desc(), c.ns.desc())
    heads = select(*_columns).where(*criteria).order_by(*newest_first).limit(limit)
    return _assembled(connection, _with_contents(heads), {})


_is_stored: Any = select(literal_column("1")).where(in_graph(checkpoint), checkpoint.c.id == id_param)


def is_stored(connection: Connection, key: CheckpointKey) -> bool:
    return connection.execute(_is_stored, checkpoint_params(key)).first() is not None


# -- ancestors --------------------------------------------------------------------------------------------------------


class CheckpointLink(NamedTuple):
    """A checkpoint without its contents."""

    id: str
    parent_id: str | None
    channels: dict[str, str | None]


CHAIN_LIMIT = 500
"""The number of ancestors that one statement reads."""
_depth = literal_column("0", Integer)
_chain = (
    select(checkpoint.c.id, checkpoint.c.parent_id, checkpoint.c.channels, _depth.label("depth"))
    .where(in_graph(checkpoint), checkpoint.c.id == id_param)
    .cte("chain", recursive=True)
)
_chain = _chain.union_all(
    select(checkpoint.c.id, checkpoint.c.parent_id, checkpoint.c.channels, _chain.c.depth + 1)
    .join(_chain, checkpoint.c.id == _chain.c.parent_id)
    .where(in_graph(checkpoint), _chain.c.depth < CHAIN_LIMIT)
)
_links = select(_chain.c.id, _chain.c.parent_id, _chain.c.channels).order_by(_chain.c.depth)


def ancestry(connection: Connection, key: CheckpointKey) -> Iterable[CheckpointLink]:
    """The checkpoint and its ancestors, nearest first. They are read lazily."""
    next_id: str | None = key.id
    while next_id is not None:
        rows = connection.execute(_links, checkpoint_params(key._replace(id=next_id))).all()
        links = [CheckpointLink(row.id, row.parent_id, json.loads(row.channels)) for row in rows]
        yield from links
        # A statement stops at a root, at a deleted parent, or at the limit. Continue only if it stopped at the limit.
        next_id = links[-1].parent_id if len(links) > CHAIN_LIMIT else None


_writes_to = (
    select(write)
    .select_from(id_list.join(write, write.c.checkpoint_id == id_list.c.value))
    .where(in_graph(write), write.c.channel == bindparam("the_channel", type_=Text()))
)


def writes_to(
    connection: Connection, key: CheckpointKey, channel: str, ids: Sequence[str]
) -> dict[str, list[TaskWrite]]:
    """The writes to *channel* at each of the checkpoints *ids*, in order. They are in the same graph as *key*."""
    params = {**graph_params(key.thread_id, key.ns), "the_channel": channel, "ids": as_array(ids)}
    writes: dict[str, list[TaskWrite]] = {}
    for row in connection.execute(_writes_to, params).all():
        value = SerializedValue(row.type, row.value)
        task_write = TaskWrite(row.task_path, row.task_id, row.idx, row.channel, value)
        writes.setdefault(row.checkpoint_id, []).append(task_write)
    return {id_: sorted(task_writes, key=_write_order) for id_, task_writes in writes.items()}
