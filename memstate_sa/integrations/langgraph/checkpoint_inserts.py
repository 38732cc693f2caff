"""Statements that store checkpoints and the writes of tasks."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from functools import cache
from typing import Any

from sqlalchemy import (
    ColumnElement,
    FromClause,
    Integer,
    LargeBinary,
    Text,
    bindparam,
    cast,
    func,
    null,
    select,
    true,
)
from sqlalchemy.engine import Connection

from memstate_sa.db.dialects import Database, database_of
from memstate_sa.db.json_params import as_json, row_value, unnest_rows
from memstate_sa.db.statements import upsert_select
from memstate_sa.db.tables import log
from memstate_sa.integrations.langgraph.checkpoint_rows import (
    CheckpointKey,
    NewCheckpoint,
    SerializedValue,
    TaskWrite,
    checkpoint_params,
    graph_params,
    id_param,
    in_graph,
    ns_param,
    thread_param,
)
from memstate_sa.integrations.langgraph.tables import blob, checkpoint, write
from memstate_sa.log.history import SNAPSHOT_MARK

_data = bindparam("data", type_=LargeBinary())


def _packed(values: Iterable[tuple[Sequence[Any], SerializedValue]]) -> dict[str, Any]:
    """Rows and their values, as the parameters ``rows`` and ``data``.

    ``data`` holds all values of the call, one after the other. The database cuts them out of it.
    """
    # ``data`` begins with an extra byte, because SQLite's driver turns empty bytes into NULL.
    rows, data, start = [], [b"-"], 2
    for row, value in values:
        rows.append([*row, value.type, start, len(value.data)])
        data.append(value.data)
        start += len(value.data)
    return {"rows": as_json(rows), "data": b"".join(data)}


def _unpacked(rows: FromClause, width: int) -> list[ColumnElement[Any]]:
    """The columns for the type and the value of each row. *width* columns come before them."""
    return [
        row_value(rows, width, Text()),
        func.substr(_data, *(row_value(rows, width + n, Integer()) for n in (1, 2))),
    ]


@cache
def _put_blobs(database: Database) -> Any:
    rows = unnest_rows("rows")
    names = ["thread_id", "ns", "channel", "version", "type", "value"]
    values = [thread_param, ns_param, row_value(rows, 0, Text()), row_value(rows, 1, Text()), *_unpacked(rows, 2)]
    return upsert_select(database, blob, dict(zip(names, values, strict=True))).on_conflict_do_nothing()


_last_tx = select(log.c.tx).order_by(log.c.id.desc()).limit(1).scalar_subquery()
_parent = (
    select(checkpoint.c.id)
    .where(in_graph(checkpoint), checkpoint.c.id == bindparam("the_parent", type_=Text()))
    .with_for_update(read=True, key_share=True)
)
_replaced_columns = ("parent_id", "run_id", "position", "snapshot", "metadata", "channels", "type", "payload")


def log_position(database: Database) -> dict[str, ColumnElement[Any]]:
    """The columns for the present moment of the log.

    On PostgreSQL they include a snapshot: the last transaction alone does not tell which others had committed.
    """
    if database.has_one_writer:
        return {"position": _last_tx, "snapshot": null()}
    return {"position": _last_tx, "snapshot": cast(func.pg_current_snapshot(), Text)}


@cache
def _put_checkpoint(database: Database, *, positioned: bool, with_blobs: bool, replace: bool, follows: bool) -> Any:
    values: dict[str, ColumnElement[Any]] = {"thread_id": thread_param, "ns": ns_param, "id": id_param}
    values |= {name: bindparam(name, type_=checkpoint.c[name].type) for name in _replaced_columns}
    if positioned:
        values |= log_position(database)
    row = select(*values.values()).where(true())  # see `upsert_select`
    if follows:
        # Lock the parent's row until this transaction ends. This also keeps the blobs that both checkpoints share.
        row = row.select_from(_parent.subquery("parent"))
    statement = database.upsert(checkpoint).from_select(list(values), row)
    if replace:
        statement = statement.on_conflict_do_update(
            index_elements=list(checkpoint.primary_key),
            set_={name: statement.excluded[name] for name in _replaced_columns},
        )
    else:
        statement = statement.on_conflict_do_nothing()
    if follows:
        statement = statement.returning(checkpoint.c.id)
    return statement.add_cte(_put_blobs(database).cte("putting_blobs")) if with_blobs else statement


def put_checkpoint(
    connection: Connection,
    new: NewCheckpoint,
    blobs: Mapping[tuple[str, str], SerializedValue],
    *,
    replace: bool = True,
    follows: bool = False,
) -> bool:
    """Store a checkpoint and its *blobs* (by channel and version). On PostgreSQL this is one statement.

    Without *replace*, an existing checkpoint stays unchanged. With *follows*, the checkpoint is stored only if its
    parent exists. Returns whether it is stored.
    """
    run_id = new.metadata.get("run_id")
    params = {
        **checkpoint_params(new.key),
        "parent_id": new.parent_id,
        "run_id": None if run_id is None else str(run_id),
        "metadata": new.metadata,
        "channels": as_json(new.channels),
        "type": new.payload.type,
        "payload": new.payload.data,
    }
    is_positioned = new.position is True
    if not is_positioned:
        tx, _, snapshot = str(new.position or "").partition(SNAPSHOT_MARK)
        params |= {"position": tx or None, "snapshot": snapshot or None}
    if follows:
        params["the_parent"] = new.parent_id
    database = database_of(connection)
    together = bool(blobs) and database.has_writing_ctes
    packed = _packed(((channel, version), value) for (channel, version), value in blobs.items())
    if blobs and not together:
        connection.execute(_put_blobs(database), {**graph_params(new.key.thread_id, new.key.ns), **packed})
    statement = _put_checkpoint(
        database, positioned=is_positioned, with_blobs=together, replace=replace, follows=follows
    )
    result = connection.execute(statement, {**params, **packed} if together else params)
    return not follows or result.first() is not None


@cache
def _put_writes(database: Database, *, replace: bool) -> Any:
    rows = unnest_rows("rows")
    values = {
        "thread_id": thread_param,
        "ns": ns_param,
        "checkpoint_id": id_param,
        "task_id": row_value(rows, 0, Text()),
        "idx": row_value(rows, 1, Integer()),
        "task_path": row_value(rows, 2, Text()),
        "channel": row_value(rows, 3, Text()),
    }
    values |= dict(zip(("type", "value"), _unpacked(rows, 4), strict=True))
    statement = upsert_select(database, write, values)
    if not replace:
        return statement.on_conflict_do_nothing()
    names = ("channel", "type", "value")
    return statement.on_conflict_do_update(
        index_elements=list(write.primary_key), set_={name: statement.excluded[name] for name in names}
    )


def put_writes(connection: Connection, key: CheckpointKey, writes: Iterable[TaskWrite], *, replace: bool) -> None:
    """Store the writes of tasks at a checkpoint. Existing writes stay unchanged, or are overwritten with *replace*."""
    unique_writes: dict[tuple[str, int], TaskWrite] = {}
    for task_write in writes:
        if replace or (task_write.task_id, task_write.idx) not in unique_writes:
            unique_writes[task_write.task_id, task_write.idx] = task_write
    if unique_writes:
        packed = _packed(((w.task_id, w.idx, w.task_path, w.channel), w.value) for w in unique_writes.values())
        statement = _put_writes(database_of(connection), replace=replace)
        connection.execute(statement, {**checkpoint_params(key), **packed})
