"""Import checkpoints from the tables of LangGraph's own savers, in PostgreSQL or SQLite.

Values are copied in their stored form. None is unpickled, and no class is imported.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import ormsgpack
from langgraph.checkpoint.serde.base import SerializerProtocol
from langgraph.checkpoint.serde.types import TASKS
from sqlalchemy import Connection, Engine, Table, func, inspect, literal, select
from sqlalchemy.engine import URL
from sqlalchemy.schema import MetaData

from memstate_sa.db.dialects import POSTGRESQL, database_of
from memstate_sa.errors import MemstateError
from memstate_sa.integrations.langgraph import checkpoint_inserts
from memstate_sa.integrations.langgraph.checkpoint_codec import is_small, storable
from memstate_sa.integrations.langgraph.checkpoint_rows import CheckpointKey, NewCheckpoint, SerializedValue, TaskWrite
from memstate_sa.integrations.langgraph.checkpointer import MemStateCheckpointer
from memstate_sa.integrations.langgraph.sync_engines import sync_engine
from memstate_sa.relay.progress import ProgressOption, reporting

_PAGE = 200
_PASS_ON = ormsgpack.OPT_PASSTHROUGH_DATACLASS | ormsgpack.OPT_NON_STR_KEYS


def import_checkpoints(
    source: Engine | URL | str,
    checkpointer: MemStateCheckpointer,
    *,
    threads: Sequence[str] = (),
    serde: SerializerProtocol | None = None,
    progress: ProgressOption = None,
) -> int:
    """Copy the checkpoints of a PostgresSaver or SqliteSaver (only *threads*, if set), and return their number.

    *source* is the saver's database. Each thread is one transaction. Existing checkpoints stay unchanged, so a second
    run imports only new ones. If the saver used another serializer than the default, pass it as *serde* to read the
    values.

    *progress* is called with the number of copied checkpoints. True shows a progress bar.

    Raises MemstateError if *source* has no such tables, or if a value cannot be read without *serde*.
    """
    engine = sync_engine(source, None)
    tables = _SaverTables(engine, serde, checkpointer.serde)
    count = 0
    with engine.connect() as connection, reporting(progress, "importing") as report:
        total = tables.count(connection, threads)
        for thread_id in tables.threads(connection, threads):
            with checkpointer.engine.begin() as target:
                for key, source_checkpoint in tables.checkpoints(connection, thread_id):
                    _put(target, checkpointer, key, source_checkpoint)
                    count += 1
                    if report is not None:
                        report(count, total)
    if engine is not source:
        engine.dispose()
    return count


class _SaverCheckpoint(NamedTuple):
    parent_id: str | None
    checkpoint: dict[str, Any]
    metadata: dict[str, Any]
    values: dict[str, SerializedValue]
    """The values that are stored outside the checkpoint, by channel."""
    writes: list[TaskWrite]


def _put(target: Connection, checkpointer: MemStateCheckpointer, key: CheckpointKey, source: _SaverCheckpoint) -> None:
    versions = source.checkpoint["channel_versions"]
    small = dict.fromkeys(source.checkpoint["channel_values"])
    channels: dict[str, str | None] = {**small, **{name: str(versions[name]) for name in source.values}}
    blobs = {(name, str(versions[name])): value for name, value in source.values.items()}
    payload = SerializedValue(*checkpointer.serde.dumps_typed(source.checkpoint))
    new = NewCheckpoint(key, source.parent_id, payload, channels, storable(source.metadata))
    checkpoint_inserts.put_checkpoint(target, new, blobs, replace=False)
    checkpoint_inserts.put_writes(target, key, source.writes, replace=False)


class _SaverTables:
    """The tables of one of LangGraph's own savers."""

    def __init__(self, engine: Engine, serde: SerializerProtocol | None, new_serde: SerializerProtocol) -> None:
        self._serde, self._new_serde = serde, new_serde
        self._has_blobs = database_of(engine) is POSTGRESQL
        names = {"checkpoints", *(("checkpoint_writes", "checkpoint_blobs") if self._has_blobs else ("writes",))}
        missing = names - set(inspect(engine).get_table_names())
        if missing:
            raise MemstateError(
                f"Cannot find checkpoints of LangGraph's savers: there is no table {', '.join(sorted(missing))}. Check "
                "that source= is the saver's database."
            )
        metadata = MetaData()
        metadata.reflect(engine, only=list(names))
        self._checkpoints = metadata.tables["checkpoints"]
        self._writes: Table = metadata.tables["checkpoint_writes" if self._has_blobs else "writes"]
        self._blobs = metadata.tables.get("checkpoint_blobs")

    def count(self, connection: Connection, threads: Sequence[str]) -> int:
        statement = select(func.count()).select_from(self._checkpoints)
        if threads:
            statement = statement.where(self._checkpoints.c.thread_id.in_(threads))
        count: int = connection.execute(statement).scalar_one()
        return count

    def threads(self, connection: Connection, threads: Sequence[str]) -> Iterable[str]:
        thread_id = self._checkpoints.c.thread_id
        statement = select(thread_id).distinct().order_by(thread_id)
        return connection.scalars(statement.where(thread_id.in_(threads)) if threads else statement).all()

    def checkpoints(self, connection: Connection, thread_id: str) -> Iterator[tuple[CheckpointKey, _SaverCheckpoint]]:
        """The checkpoints of a thread, read in pages."""
        c = self._checkpoints.c
        statement = select(self._checkpoints).where(c.thread_id == thread_id).order_by(c.checkpoint_ns, c.checkpoint_id)
        after: tuple[str, str] | None = None
        while True:
            page = statement.limit(_PAGE)
            if after is not None:
                ns, id_ = after
                page = page.where((c.checkpoint_ns > ns) | ((c.checkpoint_ns == ns) & (c.checkpoint_id > id_)))
            rows = connection.execute(page).all()
            for row in rows:
                key = CheckpointKey(thread_id, row.checkpoint_ns, row.checkpoint_id)
                yield key, self._read_row(connection, key, row)
            if len(rows) < _PAGE:
                return
            after = rows[-1].checkpoint_ns, rows[-1].checkpoint_id

    def _read_row(self, connection: Connection, key: CheckpointKey, row: Any) -> _SaverCheckpoint:
        metadata = row.metadata if isinstance(row.metadata, dict) else json.loads(row.metadata or b"{}")
        if self._blobs is not None:
            checkpoint, values = dict(row.checkpoint), self._values(connection, key, row.checkpoint)
            inline_values = checkpoint.get("channel_values") or {}
        else:
            checkpoint, inline_values, values = self._unpacked(SerializedValue(row.type, row.checkpoint), key)
        checkpoint["channel_values"] = {name: value for name, value in inline_values.items() if name not in values}
        if checkpoint.get("v", 1) < 4 and row.parent_checkpoint_id:
            self._add_sends(connection, key._replace(id=row.parent_checkpoint_id), checkpoint, values)
        writes = self._read_writes(connection, key)
        return _SaverCheckpoint(row.parent_checkpoint_id, checkpoint, metadata, values, writes)

    def _values(
        self, connection: Connection, key: CheckpointKey, checkpoint: Mapping[str, Any]
    ) -> dict[str, SerializedValue]:
        """The values that a PostgresSaver stores outside its checkpoints."""
        assert self._blobs is not None
        c, versions = self._blobs.c, checkpoint["channel_versions"]
        criteria = [c.thread_id == key.thread_id, c.checkpoint_ns == key.ns, c.channel.in_(list(versions))]
        criteria.append(c.version.in_([str(version) for version in versions.values()]))
        rows = connection.execute(select(c.channel, c.version, c.type, c.blob).where(*criteria))
        return {
            row.channel: self._value(SerializedValue(row.type, bytes(row.blob)), key)
            for row in rows
            if row.type != "empty" and str(versions[row.channel]) == row.version
        }

    def _unpacked(
        self, stored: SerializedValue, key: CheckpointKey
    ) -> tuple[dict[str, Any], dict[str, Any], dict[str, SerializedValue]]:
        """A SqliteSaver's checkpoint in three parts: without its values, the small values, and the other values."""
        checkpoint = self._read(stored, key)
        values = checkpoint.pop("channel_values")
        small = {name: value for name, value in values.items() if is_small(value)}
        versions = checkpoint["channel_versions"]
        packed = {
            name: self._packed(stored.type, value)
            for name, value in values.items()
            if name not in small and name in versions
        }
        return checkpoint, small, packed

    def _read_writes(self, connection: Connection, key: CheckpointKey) -> list[TaskWrite]:
        c = self._writes.c
        value = c.blob if self._has_blobs else c.value
        path = c.task_path if "task_path" in c else literal("")  # old tables lack this column
        statement = select(c.task_id, c.idx, c.channel, c.type, value.label("data"), path.label("path")).where(
            c.thread_id == key.thread_id, c.checkpoint_ns == key.ns, c.checkpoint_id == key.id
        )
        return [
            TaskWrite(
                row.path,
                row.task_id,
                row.idx,
                row.channel,
                self._value(SerializedValue(row.type, bytes(row.data)), key),
            )
            for row in connection.execute(statement)
        ]

    def _add_sends(
        self,
        connection: Connection,
        parent: CheckpointKey,
        checkpoint: dict[str, Any],
        values: dict[str, SerializedValue],
    ) -> None:
        """Add the pending sends. Checkpoints before version 4 have them only in the writes at the parent."""
        sends = [write for write in sorted(self._read_writes(connection, parent)) if write.channel == TASKS]
        if sends and TASKS not in values and TASKS not in checkpoint["channel_values"]:
            versions = checkpoint["channel_versions"]
            versions[TASKS] = max(versions.values(), default="1")
            values[TASKS] = self._packed(sends[0].value.type, [self._read(send.value, parent) for send in sends])

    # -- values: copied in their stored form, or converted with the caller's serializer --------------------------------

    def _value(self, stored: SerializedValue, key: CheckpointKey) -> SerializedValue:
        if self._serde is None:
            _check_type(stored, key)
            return stored
        return SerializedValue(*self._new_serde.dumps_typed(self._serde.loads_typed(stored)))

    def _read(self, stored: SerializedValue, key: CheckpointKey) -> Any:
        if self._serde is not None:
            return self._serde.loads_typed(stored)
        _check_type(stored, key)
        if stored.type == "json":
            return json.loads(stored.data)
        # Keep ext values, which stand for objects, as they are.
        return ormsgpack.unpackb(stored.data, ext_hook=ormsgpack.Ext, option=ormsgpack.OPT_NON_STR_KEYS)

    def _packed(self, type_: str, value: Any) -> SerializedValue:
        if self._serde is not None:
            return SerializedValue(*self._new_serde.dumps_typed(value))
        if type_ == "json":
            return SerializedValue("json", json.dumps(value).encode())
        return SerializedValue("msgpack", ormsgpack.packb(value, option=_PASS_ON))


def _check_type(stored: SerializedValue, key: CheckpointKey) -> None:
    if stored.type not in ("msgpack", "json", "null", "bytes", "bytearray"):
        raise MemstateError(
            f"Cannot read checkpoint {key.id} of thread {key.thread_id!r}. It has a value of type {stored.type!r}. "
            "Pass the serializer that wrote it as serde=."
        )
