"""`ReadLog`: logs the rows of a class by reading them, where SQL cannot write their images."""

from __future__ import annotations

import json
from collections.abc import Sequence

from sqlalchemy.engine import Connection

from memstate_sa.capture.looks import Header, Logged, Look, NoEntry, RawKey
from memstate_sa.db.codec import Image
from memstate_sa.db.json_params import as_array, as_json
from memstate_sa.db.rows import TableColumns
from memstate_sa.db.statements import batches
from memstate_sa.log import outbox
from memstate_sa.log.changes import LogEntry, classify
from memstate_sa.log.history import last_entries
from memstate_sa.tracking.tracked import Tracked


class ReadLog:
    """A log like `TableLog`. Python makes the images, and compares them with the last entries."""

    def __init__(self, tracked: Tracked, columns: TableColumns) -> None:
        self._tracked = tracked
        self._columns = columns

    def look(self, connection: Connection, keys: Sequence[RawKey]) -> list[Look]:
        return [self._look(connection, batch) for batch in batches(keys)]

    def _look(self, connection: Connection, keys: Sequence[RawKey]) -> Look:
        images = self._columns.read(connection, keys, where=self._tracked.criterion)
        parameters = {"entity": self._tracked.entity, "keys": as_array(images)}
        unknown = set(connection.scalars(outbox.unknown_keys, parameters))
        return Look(keys, {key: as_json(image) if key in unknown else None for key, image in images.items()})

    def images(self, connection: Connection, keys: Sequence[RawKey]) -> dict[str, Image]:
        return {**self._columns.read(connection, keys, where=self._tracked.criterion)}

    def count(self, connection: Connection, keys: Sequence[RawKey]) -> int:
        return len(self._columns.read(connection, keys))

    def log(self, connection: Connection, header: Header, look: Look, *, new: bool) -> Logged:
        images = self._columns.read(connection, look.keys, where=self._tracked.criterion)
        keys = list(dict.fromkeys((*look.rows, *images)))
        last = {} if new else last_entries(connection, self._tracked, keys)
        baselines: list[LogEntry] = []
        changes: list[LogEntry] = []
        if look.remembered and not last.keys() >= images.keys():
            raise NoEntry
        for key in keys:
            first = None if key in last else look.rows.get(key)
            before = json.loads(first) if first is not None else last[key].image if key in last else None
            was_there = first is not None or (key in last and last[key].op != "delete")
            op = classify(before, images.get(key), was_there=was_there)
            if op is None:
                continue
            if first is not None:
                baselines.append(LogEntry(self._tracked.entity, key, "baseline", before, step=False))
            changes.append(LogEntry(self._tracked.entity, key, op, images.get(key), step=header.step))
        if changes:
            dirty = [(change.entity, change.key) for change in changes]
            versions = {self._tracked.entity: header.version}
            outbox.add(connection, [*baselines, *changes], dirty, header.tx, header.at, versions)
        return Logged(len(changes), changes)
