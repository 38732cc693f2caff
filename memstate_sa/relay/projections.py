"""The projection in which an index holds each class. If it changes, all rows of the class are delivered again.

During a deployment, two releases deliver to one index, and must not overwrite each other's work for ever. So a class
keeps its projection as long as a relay lives that delivers it. After that, the release that tracked the class last
wins.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from datetime import datetime, timedelta
from typing import NamedTuple

from sqlalchemy import delete, select
from sqlalchemy.engine import Connection

from memstate_sa.db.dialects import database_of
from memstate_sa.db.tables import projection
from memstate_sa.relay.index_key import IndexKey, of_index

HELD_BY_INDEX = ""
"""The value of ``owner`` in the rows for projections that the index itself holds."""

PATIENCE = timedelta(minutes=10)
"""An older release takes a class back if no relay of the newer release was seen for this time."""


class Projected(NamedTuple):
    """A relay's projection of a class, and the time when it was tracked.

    ``withdrawn``: the class is no longer delivered to this index.
    """

    projection: str
    since: datetime
    withdrawn: bool = False


class HeldProjection(NamedTuple):
    projection: str
    since: datetime
    seen_at: datetime


class Settled(NamedTuple):
    """``delivered``: the entities that this relay delivers. ``changed``: the entities that need another refill."""

    delivered: Collection[str]
    changed: Collection[str]


def settle(
    connection: Connection,
    index: IndexKey,
    owner: str,
    live: Collection[str],
    known: Collection[str],
    classes: Mapping[str, Projected],
    now: datetime,
) -> Settled:
    """Agree with the *live* relays on the projections of classes, and record them.

    *known* has the entities that were delivered to the index before. The caller has locked all slots.
    """
    rows = connection.execute(select(projection).where(of_index(projection)), index.parameters()).all()
    held_by_entity = {
        row.entity: HeldProjection(row.projection, row.since, row.seen_at) for row in rows if row.owner == HELD_BY_INDEX
    }
    others = {(row.entity, row.projection) for row in rows if row.owner in live and row.owner != owner}
    delivered: dict[str, Projected] = {}
    changed = set()
    for entity, projected in classes.items():
        held = held_by_entity.get(entity)
        if projected.withdrawn and entity not in known:
            continue
        if held is None or held.projection == projected.projection:
            delivered[entity] = projected
            if held is None and entity in known:
                changed.add(entity)
        elif (entity, held.projection) not in others and wins(projected, held, now):
            delivered[entity] = projected
            changed.add(entity)
    ended = {row.owner for row in rows} - {HELD_BY_INDEX, *live}
    deleting = delete(projection).where(of_index(projection), projection.c.owner.in_({owner, *ended}))
    connection.execute(deleting, index.parameters())
    if delivered:
        statement = database_of(connection).upsert(projection)
        new = {name: statement.excluded[name] for name in ("projection", "since", "seen_at")}
        connection.execute(
            statement.on_conflict_do_update(index_elements=list(projection.primary_key.columns), set_=new),
            [
                {
                    **index.values(),
                    "entity": entity,
                    "owner": row_owner,
                    **_row(projected, held_by_entity.get(entity)),
                    "seen_at": now,
                }
                for entity, projected in delivered.items()
                for row_owner in (HELD_BY_INDEX, owner)
            ],
        )
    return Settled(delivered, changed)


def wins(projected: Projected, held: HeldProjection, now: datetime) -> bool:
    """Whether *projected* replaces the projection *held*, which no living relay delivers."""
    return projected.since > held.since or held.seen_at < now - PATIENCE


def _row(projected: Projected, held: HeldProjection | None) -> dict[str, object]:
    is_same = held is not None and held.projection == projected.projection
    since = max(projected.since, held.since) if held is not None and is_same else projected.since
    return {"projection": projected.projection, "since": since}


def differing(connection: Connection, index: IndexKey, own: Mapping[str, str]) -> dict[str, str]:
    """The projections of the index that differ from our *own* projections, by entity."""
    statement = select(projection.c.entity, projection.c.projection)
    statement = statement.where(of_index(projection), projection.c.owner == HELD_BY_INDEX)
    rows = connection.execute(statement, index.parameters()).all()
    return {entity: held for entity, held in rows if entity in own and own[entity] != held}
