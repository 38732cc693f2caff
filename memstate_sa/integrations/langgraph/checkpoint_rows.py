"""Checkpoints as rows: bytes in, bytes out. The saver knows what the bytes mean."""

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
    """The bytes that a serializer made of a value, and their type."""

    type: str
    data: bytes


class TaskWrite(NamedTuple):
    """The *idx*-th thing that a task wrote, to *channel*. Sorted, they are in the order in which they take effect."""

    task_path: str
    task_id: str
    idx: int
    channel: str
    value: SerializedValue


class NewCheckpoint(NamedTuple):
    """A checkpoint to be stored. *position* True stands for where the log is now."""

    key: CheckpointKey
    parent_id: str | None
    payload: SerializedValue
    channels: Mapping[str, str | None]
    """The version of each channel's blob; None: the value is in the payload."""
    metadata: Mapping[str, Any]
    position: str | bool | None = None


@dataclass
class StoredCheckpoint:
    """A checkpoint as it was read, with its blobs by channel and the writes of tasks that ran at it."""

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
    """Whether a row is of the graph in the parameters: see `graph_params`."""
    return and_(table.c.thread_id == thread_param, table.c.ns == ns_param)


def graph_params(thread_id: str, ns: str) -> dict[str, Any]:
    """The parameters of `in_graph`."""
    return {"the_thread": thread_id, "the_ns": ns}


def checkpoint_params(key: CheckpointKey) -> dict[str, Any]:
    """The parameters of `in_graph`, and `id_param`."""
    return {**graph_params(key.thread_id, key.ns), "the_id": key.id}
