"""The rows that the log does not know."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from sqlalchemy.engine import Connection

from memstate_sa.db.codec import Image, decode_key
from memstate_sa.db.json_params import as_array
from memstate_sa.db.statements import READ_CHUNK
from memstate_sa.log.outbox import unknown_keys
from memstate_sa.tracking.committed import page
from memstate_sa.tracking.tracked import Tracked


def unlogged_rows(connection: Connection, tracked: Tracked) -> Iterator[Mapping[str, Image]]:
    """The rows without an entry in the log, by key, in pages. They are older than tracking, or bypassed it."""
    after: str | None = None
    columns = tracked.columns_for(connection.dialect)
    while keys := page(connection, tracked, after, READ_CHUNK):
        after = keys[-1]
        unknown = connection.scalars(unknown_keys, {"entity": tracked.entity, "keys": as_array(keys)}).all()
        yield columns.read(connection, [decode_key(key) for key in unknown])
