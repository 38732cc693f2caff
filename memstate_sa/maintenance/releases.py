"""What a release has changed of its tracked classes, and what of the release before is still there. For `Doctor`.

It reads the database alone: an index may be open in another process.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from typing import NamedTuple

from sqlalchemy import bindparam, exists, select
from sqlalchemy.engine import Connection

from memstate_sa.capture import triggers
from memstate_sa.db.dialects import database_of
from memstate_sa.db.json_params import as_array, unnest_strings
from memstate_sa.db.tables import index_state, log, outbox, parked
from memstate_sa.embedding.batches import Destination
from memstate_sa.log.outbox import ALL, position_parameters, undelivered
from memstate_sa.log.positions import meet
from memstate_sa.relay import ledger, projections
from memstate_sa.relay.backlog import read_positions
from memstate_sa.relay.index_key import IndexKey
from memstate_sa.tracking import committed
from memstate_sa.tracking.projection import Projection
from memstate_sa.tracking.registry import Registry
from memstate_sa.tracking.tracked import Tracked

_SAMPLE = 200
"""So many rows of a class are projected anew, to see whether an index was given the same."""


class Finding(NamedTuple):
    """A subject, and what is to be said of it."""

    subject: str
    message: str


def problems(connection: Connection, registry: Registry, destinations: Mapping[str, Destination]) -> Iterator[Finding]:
    """What searches would miss, as an index was filled by a release that projected a class otherwise."""
    for name, destination in destinations.items():
        index = _latest(connection, name)
        if index is None:
            continue
        classes = registry.delivered(name)
        current = {entity: tracked.projection for entity, tracked in classes.items()}
        differing = projections.differing(connection, index, current)
        for entity, was in differing.items():
            yield Finding(
                f"{entity} in index {name!r}",
                f"is delivered as {_shown(was)}, and tracked as {_shown(current[entity])}: a relay of this release "
                "delivers it again, once those of the other release have ended",
            )
        for entity, tracked in classes.items():
            if entity in differing or not callable(tracked.text):
                continue
            if stale := _stale(connection, index, tracked, destination.vectors.embedder.fingerprint):
                yield Finding(
                    f"{entity} in index {name!r}",
                    f"was given other content than {stale} of {_SAMPLE} rows have now, and no change of them is on "
                    "its way: if text= does something else now, give another text_version=; if not, "
                    "memory.verify(engine, repair=True) delivers them",
                )


def _shown(projection: str) -> str:
    content = json.loads(projection)
    if content["text"] is None:
        return "no text"
    text = content["text"] if isinstance(content["text"], str) else "column " + ", ".join(content["text"])
    version = "" if content["version"] == 1 else f" of version {content['version']}"
    return f"text from {text}{version}, metadata ({', '.join(content['metadata'])})"


def _latest(connection: Connection, name: str) -> IndexKey | None:
    """The lifetime of the index that a relay last claimed."""
    lifetimes = select(index_state.c.incarnation).where(index_state.c.index == name)
    incarnation = connection.scalar(lifetimes.order_by(index_state.c.active_at.desc()).limit(1))
    return None if incarnation is None else IndexKey(name, incarnation)


_parked = select(parked.c.key).where(
    parked.c.index == bindparam("index"),
    parked.c.incarnation == bindparam("incarnation"),
    parked.c.entity == bindparam("entity"),
    parked.c.key.in_(select(unnest_strings("keys").c.value)),
)


def _stale(connection: Connection, index: IndexKey, tracked: Tracked, embedder: str) -> int:
    """Of how many rows *index* was last given other content than they have, of those that are not on their way."""
    keys = committed.page(connection, tracked, None, _SAMPLE)
    places = read_positions(connection, index)
    if not keys or not places:
        return 0
    now = {
        (tracked.entity, row.key): row.fingerprint
        for row in committed.project(connection, tracked, keys, embedder)
        if isinstance(row, Projection)
    }
    delivered = ledger.read_ledger(connection, index, now)
    differing = [key for (entity, key), entry in delivered.items() if entry.fingerprint != now[entity, key]]
    if not differing:
        return 0
    entries = undelivered(
        database_of(connection),
        outbox.c.key,
        where=(outbox.c.entity == tracked.entity) & outbox.c.key.in_(select(unnest_strings("keys").c.value)),
    )
    parameters = {"keys": as_array(differing), "limit": ALL}
    late = set(connection.scalars(select(entries.c.key), {**position_parameters(meet(places)), **parameters}))
    late |= set(connection.scalars(_parked, {**index.values(), "entity": tracked.entity, **parameters}))
    return len(set(differing) - late)


def renamed(connection: Connection, registry: Registry, tracked: Tracked) -> Iterator[Finding]:
    """Whether the class may have had another name: its rows have no history, and a class that is gone has one."""
    of_class = select(exists().where(log.c.entity == tracked.entity))
    if connection.scalar(of_class) or not committed.page(connection, tracked, None, 1):
        return
    others = [name for name in _logged_entities(connection) if name not in registry.by_entity]
    if others:
        yield Finding(
            tracked.entity,
            f"has rows, and none of them has a history; no class is tracked as {', '.join(others)}, of which there is "
            "one: if the class or its table was renamed, track it with entity= the old name; if not, memory.backfill "
            "takes the rows in",
        )


def _logged_entities(connection: Connection) -> Iterator[str]:
    """By one look at the index for each, however long the log is."""
    name: str | None = ""
    following = select(log.c.entity).where(log.c.entity > bindparam("name")).order_by(log.c.entity).limit(1)
    while (name := connection.scalar(following, {"name": name})) is not None:
        yield name


def left_triggers(connection: Connection, registry: Registry, tracked: Tracked) -> Iterator[Finding]:
    """Triggers that a release before has left: what they log is logged twice, or for nobody."""
    for table in tracked.tables:
        for entity in sorted(triggers.entities_of(connection, table)):
            known = registry.by_entity.get(entity)
            if known is None:
                yield Finding(
                    table.fullname,
                    f"has triggers that log it as {entity}, as which no class is tracked: memory.history knows nothing "
                    "of that. A migration removes them, or track the class with entity= that name",
                )
            elif not known.by_trigger:
                yield Finding(
                    table.fullname,
                    f"has triggers that log {entity}, which is tracked with capture='session': each change is logged "
                    "twice. memory.create_tables(engine), or a migration, removes them",
                )
