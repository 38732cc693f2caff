"""Convert LangGraph's checkpoints to rows and bytes, and back."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from datetime import datetime
from typing import Any, cast

from langchain_core.runnables import RunnableConfig
from langgraph.checkpoint.base import (
    WRITES_IDX_MAP,
    Checkpoint,
    CheckpointMetadata,
    CheckpointTuple,
    PendingWrite,
    get_serializable_checkpoint_metadata,
)
from langgraph.checkpoint.serde.base import SerializerProtocol

from memstate_sa.db.codec import is_text
from memstate_sa.errors import MemstateError
from memstate_sa.integrations.langgraph.checkpoint_rows import (
    CheckpointKey,
    NewCheckpoint,
    SerializedValue,
    StoredCheckpoint,
    TaskWrite,
)
from memstate_sa.log.history import SNAPSHOT_MARK, Moment

POSITION = "memstate_position"
"""The name, in a checkpoint's metadata, of the log's last transaction at that time."""
_SMALL = 64


class EncodedCheckpoint:
    """A serialized checkpoint. It contains the small values. Other values are blobs, stored once for each version."""

    def __init__(
        self, serde: SerializerProtocol, config: RunnableConfig, checkpoint: Checkpoint, metadata: CheckpointMetadata
    ) -> None:
        versions, values = checkpoint["channel_versions"], checkpoint["channel_values"]
        small = {name: value for name, value in values.items() if is_small(value) or name not in versions}
        self._serde, self._values = serde, values
        self.channels = {name: None if name in small else str(versions[name]) for name in values}
        self._payload = SerializedValue(*serde.dumps_typed({**checkpoint, "channel_values": small}))
        self._metadata = storable(get_serializable_checkpoint_metadata(config, metadata))

    def row(self, key: CheckpointKey, parent_id: str | None, position: str | bool | None) -> NewCheckpoint:
        return NewCheckpoint(key, parent_id, self._payload, self.channels, self._metadata, position)

    def blobs(self, channels: Iterable[str]) -> dict[tuple[str, str], SerializedValue]:
        """The blobs of *channels*, by channel and version. Small values have none."""
        versions = ((name, self.channels.get(name)) for name in channels)
        return {
            (name, version): _serialized(self._serde, name, self._values[name])
            for name, version in versions
            if version is not None
        }

    @property
    def delta_channels(self) -> set[str]:
        """The DeltaChannels that are not stored in full. Reading them needs the checkpoint's ancestors."""
        return set(self._metadata.get("counters_since_delta_snapshot") or ()) - set(self.channels)


def decoded(serde: SerializerProtocol, stored: StoredCheckpoint, *, positioned: bool) -> CheckpointTuple:
    """The checkpoint for LangGraph. Its metadata names its position in the log if it has one, or if *positioned*."""
    checkpoint = serde.loads_typed(stored.payload)
    values = {channel: serde.loads_typed(value) for channel, value in stored.blobs.items()}
    checkpoint["channel_values"] = {**checkpoint["channel_values"], **values}
    metadata = stored.metadata
    if positioned or stored.position is not None:
        metadata[POSITION] = stored.position or checkpoint["ts"]
    return CheckpointTuple(
        config_of(stored.key),
        cast("Checkpoint", checkpoint),
        cast("CheckpointMetadata", metadata),
        None if stored.parent_id is None else config_of(stored.key._replace(id=stored.parent_id)),
        [decoded_write(serde, task_write) for task_write in stored.writes],
    )


def encoded_writes(
    serde: SerializerProtocol, writes: Sequence[tuple[str, Any]], task_id: str, task_path: str
) -> list[TaskWrite]:
    """The writes of a task. Errors, interrupts and answers have fixed negative indexes."""
    return [
        TaskWrite(task_path, task_id, WRITES_IDX_MAP.get(name, n), name, _serialized(serde, name, value))
        for n, (name, value) in enumerate(writes)
    ]


def _serialized(serde: SerializerProtocol, name: str, value: Any) -> SerializedValue:
    try:
        return SerializedValue(*serde.dumps_typed(value))
    except TypeError as error:
        raise MemstateError(
            f"Cannot save {name!r} of the graph's state: {error}. Store plain data there, such as an id, and make the "
            "object in the node. Or pass the checkpointer a serializer with serde=."
        ) from error


def decoded_write(serde: SerializerProtocol, task_write: TaskWrite) -> PendingWrite:
    return task_write.task_id, task_write.channel, serde.loads_typed(task_write.value)


def config_of(key: CheckpointKey) -> RunnableConfig:
    return {"configurable": {"thread_id": key.thread_id, "checkpoint_ns": key.ns, "checkpoint_id": key.id}}


def moment_of(position: str) -> Moment:
    """The moment of a stored *position*: a transaction, with or without a snapshot, or a time."""
    is_transaction = position.partition(SNAPSHOT_MARK)[0].isalnum()
    return position if is_transaction else datetime.fromisoformat(position)


def is_small(value: Any) -> bool:
    """Whether to store a value in every checkpoint, instead of once a version as a blob.

    The answer must be the same for all checkpoints of a version. So a mutable value is never small: a change in place
    could change the answer.
    """
    if value is None or isinstance(value, (bool, int, float)):
        return True
    if isinstance(value, (str, bytes)):
        return len(value) <= _SMALL
    return type(value) is tuple and not value


def storable(metadata: Any) -> Any:
    """*metadata* in a form that JSONB can hold. LangGraph itself removes NUL only from the outer strings."""
    if isinstance(metadata, str):
        return metadata if is_text(metadata) else metadata.replace("\x00", "").encode(errors="replace").decode()
    if isinstance(metadata, float):
        return metadata if math.isfinite(metadata) else None
    if isinstance(metadata, dict):
        return {storable(name): storable(value) for name, value in metadata.items()}
    return [storable(value) for value in metadata] if isinstance(metadata, (list, tuple)) else metadata
