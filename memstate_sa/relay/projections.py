"""What of each class an index holds: with another projection, a class is delivered again in full.

During a deployment two releases deliver to one index. They must not undo each other's work for ever. So a class keeps
its projection while a relay that delivers it so lives. After that the release wins that tracked the class last.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from datetime import datetime, timedelta
from typing import NamedTuple

from sqlalchemy import delete, select
from sqlalchemy.engine import Connection

from memstate_sa.db.statements import upsert
from memstate_sa.db.tables import projection
from memstate_sa.relay.index_key import IndexKey, of_index

HELD = ""
"""The owner of the rows that say what the index holds."""

PATIENCE = timedelta(minutes=10)
"""An older release takes a class back when no relay of the newer one was seen for so long."""


class Projected(NamedTuple):
    """How a relay projects a class, and when it was tracked; ``withdrawn``: it goes to this index no longer."""

    projection: str
    since: datetime
    withdrawn: bool = False


class Held(NamedTuple):
    projection: str
    since: datetime
    seen_at: datetime


class Settled(NamedTuple):
    """``mine``: the entities that this relay delivers. ``changed``: those whose rows have to be delivered again."""

    mine: Collection[str]
    changed: Collection[str]


def settle(
    connection: Connection,
    index: IndexKey,
    owner: str,
    live: Collection[str],
    known: Collection[str],
    given: Mapping[str, Projected],
    now: datetime,
) -> Settled:
    """Agree with the *live* relays on how classes are projected, and record it.

    *known* are the entities that the index has been delivered; whoever calls holds all slots locked.
    """
    rows = connection.execute(select(projection).where(of_index(projection)), index.parameters()).all()
    held = {row.entity: Held(row.projection, row.since, row.seen_at) for row in rows if row.owner == HELD}
    others = {(row.entity, row.projection) for row in rows if row.owner in live and row.owner != owner}
    mine: dict[str, Projected] = {}
    changed = set()
    for entity, projected in given.items():
        was = held.get(entity)
        if projected.withdrawn and entity not in known:
            continue
        if was is None or was.projection == projected.projection:
            mine[entity] = projected
            if was is None and entity in known:
                changed.add(entity)
        elif (entity, was.projection) not in others and wins(projected, was, now):
            mine[entity] = projected
            changed.add(entity)
    ended = {row.owner for row in rows} - {HELD, *live}
    gone = delete(projection).where(of_index(projection), projection.c.owner.in_({owner, *ended}))
    connection.execute(gone, index.parameters())
    if mine:
        statement = upsert(connection.dialect.name, projection)
        new = {name: statement.excluded[name] for name in ("projection", "since", "seen_at")}
        connection.execute(
            statement.on_conflict_do_update(index_elements=list(projection.primary_key.columns), set_=new),
            [
                {**index.values(), "entity": entity, "owner": who, **_row(projected, held.get(entity)), "seen_at": now}
                for entity, projected in mine.items()
                for who in (HELD, owner)
            ],
        )
    return Settled(mine, changed)


def wins(projected: Projected, held: Held, now: datetime) -> bool:
    """Whether *projected* takes the place of what is *held*, which no living relay delivers."""
    return projected.since > held.since or held.seen_at < now - PATIENCE


def _row(projected: Projected, held: Held | None) -> dict[str, object]:
    is_same = held is not None and held.projection == projected.projection
    since = max(projected.since, held.since) if held is not None and is_same else projected.since
    return {"projection": projected.projection, "since": since}


def differing(connection: Connection, index: IndexKey, given: Mapping[str, str]) -> dict[str, str]:
    """Of the projections *given* by entity, those that the index does not hold, with what it holds."""
    held = select(projection.c.entity, projection.c.projection).where(of_index(projection), projection.c.owner == HELD)
    rows = connection.execute(held, index.parameters()).all()
    return {entity: was for entity, was in rows if entity in given and given[entity] != was}
