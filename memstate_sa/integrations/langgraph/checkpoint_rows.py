"""Checkpoints as rows with serialized values. Only the saver interprets the values."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from sqlalchemy import ColumnElement, Table, Text, and_, bindparam

from memstate_sa.db.json_params import unnest_strings
from memstate_sa.integrations.langgraph.tables import blob, checkpoint, write

TABLES: tuple[Table, ...] = (checkpoint, blob, write)


class CheckpointKey(NamedTuple):
    """The primary key of a checkpoint: its thread, its graph in that thread, and its id."""

    thread_id: str
    ns: str
    id: str


class SerializedValue(NamedTuple):
    """A value in bytes, and the type that the serializer gave it."""

    type: str
    data: bytes


class TaskWrite(NamedTuple):
    """The *idx*-th write of a task, to *channel*. Sorted writes are in the order of their effects."""

    task_path: str
    task_id: str
    idx: int
    channel: str
    value: SerializedValue


class NewCheckpoint(NamedTuple):
    """A checkpoint that will be stored. If *position* is True, it gets the present moment of the log."""

    key: CheckpointKey
    parent_id: str | None
    payload: SerializedValue
    channels: Mapping[str, str | None]
    """The version of each channel's blob. None means that the payload has the value."""
    metadata: Mapping[str, Any]
    position: str | bool | None = None


@dataclass
class StoredCheckpoint:
    """A stored checkpoint, with its blobs by channel and the writes of tasks that ran at it."""

    key: CheckpointKey
    parent_id: str | None
    position: str | None
    metadata: dict[str, Any]
    channels: dict[str, str | None]
    payload: SerializedValue
    blobs: dict[str, SerializedValue] = field(default_factory=dict)
    writes: list[TaskWrite] = field(default_factory=list)


thread_param, ns_param, id_param = (bindparam(f"the_{name}", type_=Text()) for name in ("thread", "ns", "id"))
id_list = unnest_strings("ids")


def in_graph(table: Table) -> ColumnElement[bool]:
    """Whether a row belongs to the graph in the parameters (see `graph_params`)."""
    return and_(table.c.thread_id == thread_param, table.c.ns == ns_param)


def graph_params(thread_id: str, ns: str) -> dict[str, Any]:
    """The parameters of `in_graph`."""
    return {"the_thread": thread_id, "the_ns": ns}


def checkpoint_params(key: CheckpointKey) -> dict[str, Any]:
    """The parameters of `in_graph` and `id_param`."""
    return {**graph_params(key.thread_id, key.ns), "the_id": key.id}
