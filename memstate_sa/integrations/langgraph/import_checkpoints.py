"""Taking over the checkpoints that LangGraph's own savers have stored, from their tables in PostgreSQL or SQLite.

Values are carried over as they are stored: none is unpickled, and no class is imported for it.
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

from memstate_sa.errors import MemstateError
from memstate_sa.integrations.langgraph import checkpoint_rows
from memstate_sa.integrations.langgraph.checkpoint_rows import Place, Value, Write
from memstate_sa.integrations.langgraph.checkpointer import MemStateCheckpointer, is_small, storable, sync_engine
from memstate_sa.maintenance.progress import Progress

_PAGE = 200
_PASS_ON = ormsgpack.OPT_PASSTHROUGH_DATACLASS | ormsgpack.OPT_NON_STR_KEYS


def import_checkpoints(
    source: Engine | URL | str,
    checkpointer: MemStateCheckpointer,
    *,
    threads: Sequence[str] = (),
    serde: SerializerProtocol | None = None,
    progress: Progress | None = None,
) -> int:
    """Copy the checkpoints (of *threads*) that a PostgresSaver or SqliteSaver keeps in *source*; returns how many.

    One transaction a thread. What is there already stays as it is, so it may be run again, for what has come since.
    *serde* is the serializer that they were stored with, where it was not the default: they are read by it then.

    Raises MemstateError where there are no such tables, or for values that only *serde* could read.
    """
    engine = sync_engine(source, None)
    stored = _Stored(engine, serde, checkpointer.serde)
    count = 0
    with engine.connect() as connection:
        total = stored.count(connection, threads)
        for thread_id in stored.threads(connection, threads):
            with checkpointer.engine.begin() as target:
                for place, found in stored.checkpoints(connection, thread_id):
                    _put(target, checkpointer, place, found)
                    count += 1
                    if progress is not None:
                        progress(count, total)
    if engine is not source:
        engine.dispose()
    return count


class _Found(NamedTuple):
    parent_id: str | None
    checkpoint: dict[str, Any]
    metadata: dict[str, Any]
    values: dict[str, Value]
    """Of the channels that are not in the checkpoint itself."""
    writes: list[Write]


def _put(target: Connection, checkpointer: MemStateCheckpointer, place: Place, found: _Found) -> None:
    versions = found.checkpoint["channel_versions"]
    small = dict.fromkeys(found.checkpoint["channel_values"])
    channels: dict[str, str | None] = {**small, **{name: str(versions[name]) for name in found.values}}
    blobs = {(name, str(versions[name])): value for name, value in found.values.items()}
    payload = Value(*checkpointer.serde.dumps_typed(found.checkpoint))
    checkpoint_rows.put(
        target, place, found.parent_id, payload, channels, blobs, storable(found.metadata), replace=False
    )
    checkpoint_rows.put_writes(target, place, found.writes, replace=False)


class _Stored:
    """The tables of a saver of LangGraph's."""

    def __init__(self, engine: Engine, serde: SerializerProtocol | None, new_serde: SerializerProtocol) -> None:
        self._serde, self._new_serde = serde, new_serde
        names = {"checkpoints", "checkpoint_writes" if engine.dialect.name == "postgresql" else "writes"}
        self._has_blobs = engine.dialect.name == "postgresql"
        names |= {"checkpoint_blobs"} if self._has_blobs else set()
        missing = names - set(inspect(engine).get_table_names())
        if missing:
            raise MemstateError(f"no checkpoints of LangGraph's savers there: no table {', '.join(sorted(missing))}")
        metadata = MetaData()
        metadata.reflect(engine, only=list(names))
        self._checkpoints = metadata.tables["checkpoints"]
        self._writes: Table = metadata.tables["checkpoint_writes" if self._has_blobs else "writes"]
        self._blobs = metadata.tables.get("checkpoint_blobs")

    def count(self, connection: Connection, threads: Sequence[str]) -> int:
        statement = select(func.count()).select_from(self._checkpoints)
        if threads:
            statement = statement.where(self._checkpoints.c.thread_id.in_(threads))
        found: int = connection.execute(statement).scalar_one()
        return found

    def threads(self, connection: Connection, threads: Sequence[str]) -> Iterable[str]:
        thread_id = self._checkpoints.c.thread_id
        statement = select(thread_id).distinct().order_by(thread_id)
        return connection.scalars(statement.where(thread_id.in_(threads)) if threads else statement).all()

    def checkpoints(self, connection: Connection, thread_id: str) -> Iterator[tuple[Place, _Found]]:
        """Those of a thread, in pages."""
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
                place = Place(thread_id, row.checkpoint_ns, row.checkpoint_id)
                yield place, self._found(connection, place, row)
            if len(rows) < _PAGE:
                return
            after = rows[-1].checkpoint_ns, rows[-1].checkpoint_id

    def _found(self, connection: Connection, place: Place, row: Any) -> _Found:
        metadata = row.metadata if isinstance(row.metadata, dict) else json.loads(row.metadata or b"{}")
        if self._blobs is not None:
            checkpoint, values = dict(row.checkpoint), self._values(connection, place, row.checkpoint)
            kept = checkpoint.get("channel_values") or {}
        else:
            checkpoint, kept, values = self._unpacked(Value(row.type, row.checkpoint), place)
        checkpoint["channel_values"] = {name: value for name, value in kept.items() if name not in values}
        if checkpoint.get("v", 1) < 4 and row.parent_checkpoint_id:
            self._add_sends(connection, place._replace(id=row.parent_checkpoint_id), checkpoint, values)
        writes = self._written(connection, place)
        return _Found(row.parent_checkpoint_id, checkpoint, metadata, values, writes)

    def _values(self, connection: Connection, place: Place, checkpoint: Mapping[str, Any]) -> dict[str, Value]:
        """What a PostgresSaver keeps beside its checkpoints."""
        assert self._blobs is not None
        c, versions = self._blobs.c, checkpoint["channel_versions"]
        mine = (c.thread_id == place.thread_id, c.checkpoint_ns == place.ns, c.channel.in_(list(versions)))
        wanted = c.version.in_([str(version) for version in versions.values()])
        rows = connection.execute(select(c.channel, c.version, c.type, c.blob).where(*mine, wanted))
        return {
            row.channel: self._value(Value(row.type, bytes(row.blob)), place)
            for row in rows
            if row.type != "empty" and str(versions[row.channel]) == row.version
        }

    def _unpacked(self, stored: Value, place: Place) -> tuple[dict[str, Any], dict[str, Any], dict[str, Value]]:
        """A SqliteSaver's checkpoint: without its values, the small ones among them, and the others."""
        checkpoint = self._read(stored, place)
        values = checkpoint.pop("channel_values")
        small = {name: value for name, value in values.items() if is_small(value)}
        versions = checkpoint["channel_versions"]
        packed = {
            name: self._packed(stored.type, value)
            for name, value in values.items()
            if name not in small and name in versions
        }
        return checkpoint, small, packed

    def _written(self, connection: Connection, place: Place) -> list[Write]:
        c = self._writes.c
        value = c.blob if self._has_blobs else c.value
        path = c.task_path if "task_path" in c else literal("")  # of which old tables know nothing
        statement = select(c.task_id, c.idx, c.channel, c.type, value.label("data"), path.label("path")).where(
            c.thread_id == place.thread_id, c.checkpoint_ns == place.ns, c.checkpoint_id == place.id
        )
        return [
            Write(row.path, row.task_id, row.idx, row.channel, self._value(Value(row.type, bytes(row.data)), place))
            for row in connection.execute(statement)
        ]

    def _add_sends(
        self, connection: Connection, parent: Place, checkpoint: dict[str, Any], values: dict[str, Value]
    ) -> None:
        """Before version 4, what a step sent was read from the writes at its parent."""
        sends = [write for write in sorted(self._written(connection, parent)) if write.channel == TASKS]
        if sends and TASKS not in values and TASKS not in checkpoint["channel_values"]:
            versions = checkpoint["channel_versions"]
            versions[TASKS] = max(versions.values(), default="1")
            values[TASKS] = self._packed(sends[0].value.type, [self._read(send.value, parent) for send in sends])

    # -- values: as they are stored, unless a serializer of one's own is to read them --------------------------------

    def _value(self, stored: Value, place: Place) -> Value:
        if self._serde is None:
            _check_type(stored, place)
            return stored
        return Value(*self._new_serde.dumps_typed(self._serde.loads_typed(stored)))

    def _read(self, stored: Value, place: Place) -> Any:
        if self._serde is not None:
            return self._serde.loads_typed(stored)
        _check_type(stored, place)
        if stored.type == "json":
            return json.loads(stored.data)
        # What stands for an object stays what it is.
        return ormsgpack.unpackb(stored.data, ext_hook=ormsgpack.Ext, option=ormsgpack.OPT_NON_STR_KEYS)

    def _packed(self, type_: str, value: Any) -> Value:
        if self._serde is not None:
            return Value(*self._new_serde.dumps_typed(value))
        if type_ == "json":
            return Value("json", json.dumps(value).encode())
        return Value("msgpack", ormsgpack.packb(value, option=_PASS_ON))


def _check_type(stored: Value, place: Place) -> None:
    if stored.type not in ("msgpack", "json", "null", "bytes", "bytearray"):
        raise MemstateError(
            f"checkpoint {place.id} of thread {place.thread_id!r} has a value of type {stored.type!r}: give the "
            "serializer that reads it, as serde="
        )
