"""The overlay of a search: the keys that are not delivered to the index yet."""

from __future__ import annotations

from functools import cache
from typing import Any, NamedTuple

from sqlalchemy import (
    BigInteger,
    FromClause,
    Select,
    Text,
    and_,
    bindparam,
    case,
    cast,
    func,
    literal_column,
    select,
    union,
)
from sqlalchemy.engine import Connection

from memstate_sa.db.dialects import Database, database_of
from memstate_sa.db.tables import outbox
from memstate_sa.log.outbox import position_parameters, undelivered
from memstate_sa.relay.backlog import EntityCoverage, refused_keys
from memstate_sa.relay.index_key import IndexKey

OVERLAY_LIMIT = 500
"""The greatest number of undelivered rows that one search embeds."""

_RECENT = 10 * OVERLAY_LIMIT
"""The greatest number of outbox entries that one search reads, newest first, because a backlog may be long."""

_own_xid = cast(cast(func.pg_current_xact_id_if_assigned(), Text), BigInteger)


class Overlay(NamedTuple):
    """Undelivered keys of one entity. ``complete`` is False if there may be more."""

    keys: list[str]
    complete: bool


def read_overlay(
    connection: Connection, index: IndexKey, entity: str, coverage: EntityCoverage, own_tx: str
) -> Overlay:
    """The keys that are committed or flushed but not delivered. The keys of *own_tx* come first."""
    # During a refill, no position helps, because rows are delivered from the table.
    position, complete = (coverage.position, True) if coverage.filled else (None, False)
    keys: list[str] = []
    # Read all entries in one statement, before the refused keys. Between the two reads, an index may refuse a key, and
    # its entry may be deleted.
    is_caught_up = database_of(connection).has_one_writer and position is not None and position.id >= coverage.newest_id
    if not is_caught_up:
        parameters: dict[str, Any] = {"entity": entity, "own_tx": own_tx, "limit": _RECENT}
        if position is not None:
            parameters |= position_parameters(position)
        statement = _undelivered_keys(database_of(connection), everything=position is None)
        rows = connection.execute(statement, parameters).all()
        keys = [key for key, _ in rows]
        if sum(count for _, count in rows) >= _RECENT:
            complete = False
    if coverage.has_refused_keys or not is_caught_up:
        keys += refused_keys(connection, index, entity, OVERLAY_LIMIT + 1)
    keys = list(dict.fromkeys(keys))
    if len(keys) > OVERLAY_LIMIT:
        complete = False
        del keys[OVERLAY_LIMIT:]
    return Overlay(keys, complete)


@cache
def _undelivered_keys(database: Database, *, everything: bool) -> Select[Any]:
    """Select the keys of recent entries after a position, or of *everything*, with the number of entries of each.

    The caller's own keys come first. The statement is built once, because building costs more than running it.
    """
    own = case((outbox.c.tx == bindparam("own_tx"), 1), else_=0).label("own")
    columns, of_entity = (outbox.c.id, outbox.c.key, own), outbox.c.entity == bindparam("entity")
    if database.has_one_writer:  # the xid is always 0 here, and the index has it between entity and id
        of_entity = and_(of_entity, outbox.c.xid == literal_column("0"))
    if everything:
        newest_first = select(*columns).where(of_entity).order_by(outbox.c.xid.desc(), outbox.c.id.desc())
        newest_first = newest_first.limit(bindparam("limit"))
        entries: FromClause = newest_first.subquery()
    else:
        entries = undelivered(database, *columns, where=of_entity, newest_first=True)
        if not database.has_one_writer:
            # Add the caller's own entries: in a long transaction, they are older than many committed entries.
            own_entries = select(*columns).where(outbox.c.xid == _own_xid, of_entity)
            entries = union(select(entries), own_entries).subquery()
    order = (func.max(entries.c.own).desc(), func.max(entries.c.id).desc())
    return select(entries.c.key, func.count()).group_by(entries.c.key).order_by(*order).limit(OVERLAY_LIMIT + 1)
