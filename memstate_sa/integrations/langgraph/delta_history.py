"""The writes to DeltaChannels, from which LangGraph rebuilds their values."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import islice

from langgraph.checkpoint.base import DeltaChannelHistory
from langgraph.checkpoint.serde.base import SerializerProtocol
from sqlalchemy.engine import Engine

from memstate_sa.db.dialects import database_of
from memstate_sa.integrations.langgraph import checkpoint_queries
from memstate_sa.integrations.langgraph.checkpoint_codec import decoded, decoded_write
from memstate_sa.integrations.langgraph.checkpoint_rows import CheckpointKey


def delta_history(
    engine: Engine,
    serde: SerializerProtocol,
    graph: tuple[str, str],
    checkpoint_id: str | None,
    channels: Sequence[str],
) -> Mapping[str, DeltaChannelHistory]:
    """The writes to each of *channels* up to a checkpoint, since the channel was last stored in full.

    *graph* is a thread and a namespace in it. *checkpoint_id* None means the latest checkpoint.
    """
    seeds: dict[str, str] = {}
    paths: dict[str, Sequence[str]] = {}
    # All statements read one snapshot, so that pruning cannot happen between them.
    with database_of(engine).snapshot(engine) as connection:
        if checkpoint_id is None:
            latest = checkpoint_queries.get_checkpoint(connection, *graph, None)
            if latest is None:
                return {channel: {"writes": []} for channel in channels}
            checkpoint_id = latest.key.id
        key = CheckpointKey(*graph, checkpoint_id)
        ancestor_ids: list[str] = []
        missing = set(channels)
        for link in islice(checkpoint_queries.ancestry(connection, key), 1, None):
            ancestor_ids.append(link.id)
            for channel in missing.intersection(link.channels):
                seeds[channel], paths[channel] = link.id, ancestor_ids[:]
            missing.difference_update(link.channels)
            if not missing:
                break
        histories: dict[str, DeltaChannelHistory] = {}
        for channel in channels:
            path = paths.get(channel, ancestor_ids)
            writes = checkpoint_queries.writes_to(connection, key, channel, path)
            oldest_first = (task_write for id_ in reversed(path) for task_write in writes.get(id_, ()))
            histories[channel] = {"writes": [decoded_write(serde, task_write) for task_write in oldest_first]}
        seed_ids = set(seeds.values())
        seed_checkpoints = {id_: checkpoint_queries.get_checkpoint(connection, *graph, id_) for id_ in seed_ids}
    for channel, id_ in seeds.items():
        stored = seed_checkpoints[id_]
        assert stored is not None
        checkpoint = decoded(serde, stored, positioned=False).checkpoint
        histories[channel]["seed"] = checkpoint["channel_values"][channel]
    return histories
