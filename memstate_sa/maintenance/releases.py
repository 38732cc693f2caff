"""Find the differences between this release's tracked classes and the data that earlier releases have left.

This module reads only the database, because another process may have the index open. `Doctor` reports its findings.
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
"""The number of rows of a class that are projected again, to compare them with the ledger."""


class Finding(NamedTuple):
    """A subject, and a message that completes a sentence about it."""

    subject: str
    message: str


def problems(connection: Connection, registry: Registry, destinations: Mapping[str, Destination]) -> Iterator[Finding]:
    """Findings about classes that this release projects in another way than the index holds them.

    Searches would miss rows of these classes.
    """
    for name, destination in destinations.items():
        index = _latest(connection, name)
        if index is None:
            continue
        classes = registry.delivered(name)
        current = {entity: tracked.projection for entity, tracked in classes.items()}
        differing = projections.differing(connection, index, current)
        for entity, delivered in differing.items():
            yield Finding(
                f"{entity} in index {name!r}",
                f"was delivered as {_shown(delivered)}, but is tracked as {_shown(current[entity])}. A relay of this "
                "release delivers it again as soon as the other release's relays have stopped.",
            )
        for entity, tracked in classes.items():
            if entity in differing or not callable(tracked.text):
                continue
            if stale := _stale(connection, index, tracked, destination.vectors.embedder.fingerprint):
                yield Finding(
                    f"{entity} in index {name!r}",
                    f"is outdated for {stale} of {_SAMPLE} rows, and no delivery of them is pending. If the text= "
                    "function was changed, pass another text_version=. If not, deliver them with "
                    "memory.verify(engine, repair=True).",
                )


def _shown(projection: str) -> str:
    content = json.loads(projection)
    if content["text"] is None:
        return "no text"
    text = content["text"] if isinstance(content["text"], str) else "column " + ", ".join(content["text"])
    version = "" if content["version"] == 1 else f" of version {content['version']}"
    return f"text from {text}{version}, metadata ({', '.join(content['metadata'])})"


def _latest(connection: Connection, name: str) -> IndexKey | None:
    """The incarnation of the index that a relay claimed last."""
    incarnations = select(index_state.c.incarnation).where(index_state.c.index == name)
    incarnation = connection.scalar(incarnations.order_by(index_state.c.active_at.desc()).limit(1))
    return None if incarnation is None else IndexKey(name, incarnation)


_parked = select(parked.c.key).where(
    parked.c.index == bindparam("index"),
    parked.c.incarnation == bindparam("incarnation"),
    parked.c.entity == bindparam("entity"),
    parked.c.key.in_(select(unnest_strings("keys").c.value)),
)


def _stale(connection: Connection, index: IndexKey, tracked: Tracked, embedder: str) -> int:
    """The number of sampled rows whose content differs from the ledger, and that are not waiting for delivery."""
    keys = committed.page(connection, tracked, None, _SAMPLE)
    positions = read_positions(connection, index)
    if not keys or not positions:
        return 0
    current = {
        (tracked.entity, row.key): row.fingerprint
        for row in committed.project(connection, tracked, keys, embedder)
        if isinstance(row, Projection)
    }
    delivered = ledger.read_ledger(connection, index, current)
    differing = [key for (entity, key), entry in delivered.items() if entry.fingerprint != current[entity, key]]
    if not differing:
        return 0
    entries = undelivered(
        database_of(connection),
        outbox.c.key,
        where=(outbox.c.entity == tracked.entity) & outbox.c.key.in_(select(unnest_strings("keys").c.value)),
    )
    parameters = {"keys": as_array(differing), "limit": ALL}
    waiting = set(connection.scalars(select(entries.c.key), {**position_parameters(meet(positions)), **parameters}))
    waiting |= set(connection.scalars(_parked, {**index.values(), "entity": tracked.entity, **parameters}))
    return len(set(differing) - waiting)


def renamed(connection: Connection, registry: Registry, tracked: Tracked) -> Iterator[Finding]:
    """A finding if the class may have been renamed: its rows have no history, and an untracked entity has one."""
    of_class = select(exists().where(log.c.entity == tracked.entity))
    if connection.scalar(of_class) or not committed.page(connection, tracked, None, 1):
        return
    others = [name for name in _logged_entities(connection) if name not in registry.by_entity]
    if others:
        yield Finding(
            tracked.entity,
            f"has rows without any history. The log has entries of {', '.join(others)}, but no class is tracked by "
            "that name. If the class or its table was renamed, track it with entity= the old name. If not, log the "
            "rows with memory.backfill.",
        )


def _logged_entities(connection: Connection) -> Iterator[str]:
    """The entities of the log. Each costs one query of the log's index, so the cost does not grow with the log."""
    name: str | None = ""
    next_entity = select(log.c.entity).where(log.c.entity > bindparam("name")).order_by(log.c.entity).limit(1)
    while (name := connection.scalar(next_entity, {"name": name})) is not None:
        yield name


def left_triggers(connection: Connection, registry: Registry, tracked: Tracked) -> Iterator[Finding]:
    """Findings about triggers that an earlier release has left. They log changes twice, or under an unknown entity."""
    for table in tracked.tables:
        for entity in sorted(triggers.entities_of(connection, table)):
            owner = registry.by_entity.get(entity)
            if owner is None:
                yield Finding(
                    table.fullname,
                    f"has triggers that log it as {entity}, but no class is tracked by that name, so memory.history "
                    f"shows none of these entries. Remove the triggers with a migration, or track the class with "
                    f"entity={entity!r}.",
                )
            elif not owner.by_trigger:
                yield Finding(
                    table.fullname,
                    f"has triggers that log {entity}, which is tracked with capture='session', so each change is "
                    "logged twice. Remove the triggers with memory.create_tables(engine) or a migration.",
                )
