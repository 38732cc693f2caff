"""Delete single checkpoints. Decide which ones must stay."""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping
from typing import Any, NamedTuple

from sqlalchemy import Text, bindparam, delete, select, update
from sqlalchemy.engine import Connection

from memstate_sa.db.json_params import as_array, unnest_strings
from memstate_sa.integrations.langgraph import thread_rows
from memstate_sa.integrations.langgraph.checkpoint_rows import (
    TABLES,
    graph_params,
    id_list,
    id_param,
    in_graph,
    thread_param,
)
from memstate_sa.integrations.langgraph.tables import blob, checkpoint, write


class CheckpointOutline(NamedTuple):
    """The columns of a checkpoint that are needed to decide whether it stays."""

    id: str
    parent_id: str | None
    run_id: str | None
    channels: dict[str, str | None]
    metadata: dict[str, Any]


Outlines = Mapping[str, CheckpointOutline]
"""The checkpoints of a graph by id, oldest first."""


def prune_thread(connection: Connection, thread_id: str) -> None:
    """Delete the checkpoints of a thread. The latest of each graph stays, with the ancestors that rebuild it."""
    thread_rows.lock_threads(connection, [thread_id])
    graphs = _outlines_by_graph(connection, thread_id)
    kept_ids = {ns: _needed_ids(outlines) for ns, outlines in graphs.items()}
    for ns, outlines in graphs.items():
        if ns and _has_ended(ns, outlines, graphs.get("", {}), kept_ids.get("", set())):
            _delete_graph(connection, thread_id, ns)
        else:
            _delete_checkpoints(connection, thread_id, ns, outlines, set(outlines) - kept_ids[ns])


def delete_runs(connection: Connection, run_ids: Collection[str]) -> None:
    """Delete the checkpoints of runs. Their children become children of the nearest remaining ancestor."""
    for thread_id in sorted(thread_rows.threads_of_runs(connection, run_ids)):
        thread_rows.lock_threads(connection, [thread_id])
        for ns, outlines in _outlines_by_graph(connection, thread_id).items():
            deleted_ids = {outline.id for outline in outlines.values() if outline.run_id in run_ids}
            _delete_checkpoints(connection, thread_id, ns, outlines, deleted_ids)


# -- the checkpoints that stay ----------------------------------------------------------------------------------------


def _needed_ids(outlines: Outlines) -> set[str]:
    """The ids of a graph's latest checkpoint, and of the ancestors that rebuild its DeltaChannels."""
    latest = outlines[max(outlines)]
    needed_ids = {latest.id}
    # The metadata counts the writes to each DeltaChannel that is not stored in full.
    missing = set(latest.metadata.get("counters_since_delta_snapshot") or ()) - set(latest.channels)
    parent = latest.parent_id
    while missing and parent in outlines and parent is not None:
        needed_ids.add(parent)
        missing.difference_update(outlines[parent].channels)
        parent = outlines[parent].parent_id
    return needed_ids


def _has_ended(ns: str, outlines: Outlines, root: Outlines, kept_ids: set[str]) -> bool:
    """Whether the subgraph *ns* is one call (a task's id is in *ns*), and the call began at a deleted checkpoint."""
    began_at = (outlines[max(outlines)].metadata.get("parents") or {}).get("")
    return ":" in ns and began_at in root and began_at not in kept_ids


# -- statements -------------------------------------------------------------------------------------------------------

_select_outlines = (
    select(checkpoint.c.ns, *(checkpoint.c[name] for name in CheckpointOutline._fields))
    .where(checkpoint.c.thread_id == thread_param)
    .order_by(checkpoint.c.ns, checkpoint.c.id)
)
_delete_writes = delete(write).where(in_graph(write), write.c.checkpoint_id.in_(select(id_list.c.value)))
_delete_rows = delete(checkpoint).where(in_graph(checkpoint), checkpoint.c.id.in_(select(id_list.c.value)))
_reparent = (
    update(checkpoint)
    .where(in_graph(checkpoint), checkpoint.c.id == id_param)
    .values(parent_id=bindparam("new_parent", type_=Text()))
)
_channels_in_use = select(checkpoint.c.channels).where(in_graph(checkpoint))
_delete_blobs = delete(blob).where(
    in_graph(blob),
    blob.c.channel == bindparam("the_channel", type_=Text()),
    blob.c.version.in_(select(unnest_strings("versions").c.value)),
)


def _outlines_by_graph(connection: Connection, thread_id: str) -> dict[str, dict[str, CheckpointOutline]]:
    """The checkpoints of a thread, by graph and id, oldest first. The caller has locked the thread."""
    graphs: dict[str, dict[str, CheckpointOutline]] = {}
    for row in connection.execute(_select_outlines, {"the_thread": thread_id}):
        outline = CheckpointOutline(row.id, row.parent_id, row.run_id, json.loads(row.channels), row.metadata)
        graphs.setdefault(row.ns, {})[row.id] = outline
    return graphs


def _delete_checkpoints(
    connection: Connection, thread_id: str, ns: str, outlines: Outlines, deleted_ids: set[str]
) -> None:
    """Delete checkpoints of a graph. Their children become children of the nearest remaining ancestor.

    A blob is deleted with the last checkpoint that uses it.
    """
    if not deleted_ids:
        return
    graph = graph_params(thread_id, ns)
    connection.execute(_delete_writes, {**graph, "ids": as_array(deleted_ids)})
    connection.execute(_delete_rows, {**graph, "ids": as_array(deleted_ids)})
    for outline in outlines.values():
        if outline.id not in deleted_ids and outline.parent_id in deleted_ids:
            parent: str | None = outline.parent_id
            while parent in deleted_ids and parent is not None:
                parent = outlines[parent].parent_id
            connection.execute(_reparent, {**graph, "the_id": outline.id, "new_parent": parent})
    blobs = {
        (channel, version) for id_ in deleted_ids for channel, version in outlines[id_].channels.items() if version
    }
    if blobs:
        # Read this after the deletion, to include checkpoints that were stored in between.
        for channels in connection.scalars(_channels_in_use, graph):
            blobs.difference_update(json.loads(channels).items())
    unused_versions: dict[str, list[str]] = {}
    for channel, version in blobs:
        unused_versions.setdefault(channel, []).append(version)
    for channel, versions in unused_versions.items():
        connection.execute(_delete_blobs, {**graph, "the_channel": channel, "versions": as_array(versions)})


def _delete_graph(connection: Connection, thread_id: str, ns: str) -> None:
    for table in TABLES:
        connection.execute(delete(table).where(in_graph(table)), graph_params(thread_id, ns))
