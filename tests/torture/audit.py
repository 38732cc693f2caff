"""The checks after the faults, by content, without trusting memstate_sa's own records."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from sqlalchemy import inspect, select, text

from memstate_sa.db.codec import encode_key
from memstate_sa.log.changes import replay
from memstate_sa.log.positions import slot_of
from memstate_sa.tracking.projection import split_point_id
from tests.torture.app import VECTORS, App, Habit, Receipt, Recollection, habit_text


class Held(NamedTuple):
    """An index's expected or actual content of one row."""

    fingerprint: str
    metadata: Mapping[str, Any]
    vector: Any


@dataclass
class Audit:
    """``differences`` are the violations. ``context`` is the relay's records about the first of them."""

    counts: dict[str, int] = field(default_factory=dict)
    differences: list[str] = field(default_factory=list)
    context: list[str] = field(default_factory=list)

    def count(self, what: str, found: Iterable[str]) -> None:
        found = sorted(found)
        self.counts[what] = len(found)
        self.differences += [f"{what}: {each}" for each in found]


def audit(app: App) -> Audit:
    result = Audit()
    expected = _expected(app)
    result.counts["points that each index must hold"] = len(expected)
    differing = []
    for name, read in INDEXES.items():
        held = read(app)
        missing, ghosts = expected.keys() - held.keys(), held.keys() - expected.keys()
        stale = {id_ for id_ in expected.keys() & held.keys() if not _equal(expected[id_], held[id_])}
        result.count(f"{name}: missing", missing)
        result.count(f"{name}: ghosts", (f"{id_} {dict(held[id_].metadata)}" for id_ in ghosts))
        result.count(
            f"{name}: stale", (f"{i} {dict(held[i].metadata)}, not {dict(expected[i].metadata)}" for i in stale)
        )
        differing += [(name, id_) for id_ in (*missing, *ghosts, *stale)]
    receipts = _receipts(app)
    journals = {path.stem: _lines([path]) for path in sorted((app.setting.folder / "journal").glob("*.jsonl"))}
    result.count("commits lost", _lost(journals, receipts))
    result.count("rows that were rolled back", _come_back(journals, receipts))
    result.count("rows that differ from their writer's journal", _unlike(app, journals, receipts))
    result.count("points that were never committed", _never_committed(app.setting.folder, receipts))
    result.count("rows that the log does not replay to", _unlike_log(app))
    result.count(
        "errors that a writer saw",
        (line["problem"] for lines in journals.values() for line in lines if "problem" in line),
    )
    for name, id_ in differing[:20]:
        result.context += _context(app, name, id_)
    return result


# -- indexes ----------------------------------------------------------------------------------------------------------


def _expected(app: App) -> dict[str, Held]:
    with app.sessions() as session:
        facts = [
            *((Recollection, "recollection", [r.id], r, r.content) for r in session.scalars(select(Recollection))),
            *((Habit, "habit", [h.topic, h.number], h, habit_text(h)) for h in session.scalars(select(Habit))),
        ]
        expected = {}
        for model, entity, key, row, content in facts:
            if content is None or not content.strip():
                continue
            tracked = app.memory._registry.of(model)
            values = [getattr(row, name) for name in tracked.projected_attributes]
            projection = tracked.project(encode_key(key), values, app.embedder.fingerprint)
            assert projection.text == content
            assert projection.fingerprint is not None
            [vector] = app.embedder.embed([content])
            expected[entity + encode_key(key)] = Held(projection.fingerprint, projection.metadata, vector)
    return expected


def _of_chroma(app: App) -> dict[str, Held]:
    found: Any = app.chroma._client.get_collection("memory", embedding_function=None).get(
        include=["embeddings", "metadatas"]
    )
    return {
        id_: Held(str(metadata.pop("memstate_sa")), _ours(metadata), np.asarray(vector))
        for id_, metadata, vector in zip(found["ids"], found["metadatas"], found["embeddings"], strict=True)
    }


def _of_file(app: App) -> dict[str, Held]:
    metadata = app.file.metadata()
    return {
        stored.id: Held(stored.fingerprint, _ours(metadata[stored.id]), stored.vector)
        for stored in app.file.get(list(metadata))
    }


def _of_pgvector(app: App) -> dict[str, Held]:
    with app.engine.connect() as connection:
        metadata = dict(connection.execute(text(f"SELECT id, metadata FROM {VECTORS} WHERE id IS NOT NULL")).all())
    return {
        stored.id: Held(stored.fingerprint, _ours(metadata[stored.id]), stored.vector)
        for stored in app.pgvector.get(list(metadata))
    }


def _of_redis(app: App) -> dict[str, Held]:
    """The ids of its own list, which has as many as its vector set."""
    client, (_, points, ids, _) = app.redis._client, app.redis._keys
    named = [id_.decode() for id_ in client.zrange(ids, 0, -1)]
    assert client.execute_command("VCARD", points) == len(named)
    metadata = {id_: json.loads(client.execute_command("VGETATTR", points, id_))["m"] for id_ in named}
    return {
        stored.id: Held(stored.fingerprint, _ours(metadata[stored.id]), stored.vector)
        for stored in app.redis.get(named)
    }


def _ours(metadata: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in metadata.items() if not name.startswith("memstate_")}


def _equal(a: Held, b: Held) -> bool:
    return a.fingerprint == b.fingerprint and a.metadata == b.metadata and np.allclose(a.vector, b.vector, atol=1e-5)


INDEXES = {"chroma": _of_chroma, "file": _of_file, "pgvector": _of_pgvector, "redis": _of_redis}


# -- commits ----------------------------------------------------------------------------------------------------------


def _receipts(app: App) -> set[str]:
    with app.sessions() as session:
        return set(session.scalars(select(Receipt.mark)))


def _lost(journals: Mapping[str, list[Any]], receipts: set[str]) -> Iterator[str]:
    """Transactions whose commit() returned."""
    for lines in journals.values():
        yield from (line["mark"] for line in lines if "committed" in line and line["mark"] not in receipts)


def _come_back(journals: Mapping[str, list[Any]], receipts: set[str]) -> Iterator[str]:
    for lines in journals.values():
        yield from (line["mark"] for line in lines if "rolled_back" in line and line["mark"] in receipts)


def _unlike(app: App, journals: Mapping[str, list[Any]], receipts: set[str]) -> Iterator[str]:
    """Each writer's own rows must follow from its transactions that have a receipt."""
    with app.sessions() as session:
        there = {
            row.id: {"shelf": row.shelf, "content": row.content, "mark": row.mark}
            for row in session.scalars(select(Recollection))
        }
    left: dict[str, Any] = {}
    for lines in journals.values():
        for line in lines:
            if "committing" in line and line["mark"] in receipts:
                left.update(line["committing"])
    left = {id_: row for id_, row in left.items() if row is not None}
    for id_ in left.keys() | there.keys():
        if left.get(id_) != there.get(id_):
            yield f"{id_}: {there.get(id_)}, not {left.get(id_)}"


def _never_committed(folder: Path, receipts: set[str]) -> Iterator[str]:
    for path in (folder / "calls").glob("*.jsonl"):
        for line in _lines([path]):
            if line.get("op") == "upsert":
                for id_, _, mark in line["given"]:
                    if mark not in receipts:
                        yield f"{id_} of {mark} to {line['index']} by {path.stem}"


def _unlike_log(app: App) -> Iterator[str]:
    with app.sessions() as session:
        for model in (Recollection, Habit):
            table = inspect(model).local_table
            replayed = {key: dict(row) for (_, key), row in replay(app.memory.history(session, model)).items()}
            keys = [column.name for column in table.primary_key]
            rows = {}
            for row in session.execute(select(table)).mappings():
                key = tuple(row[name] for name in keys)
                rows[key[0] if len(key) == 1 else key] = dict(row)
            for key in replayed.keys() | rows.keys():
                if replayed.get(key) != rows.get(key):
                    yield f"{key}: {rows.get(key)}, log: {replayed.get(key)}"


# -- help for finding the cause ----------------------------------------------------------------------------------------


def _context(app: App, index: str, id_: str) -> Iterator[str]:
    """The relay's records of a key, and every call that carried it."""
    fact = split_point_id(id_)
    yield f"-- {index} {id_}"
    if fact is None:
        return
    entity, key = fact
    of_key = "entity = :entity AND key = :key"
    queries = {
        "ledger": f"SELECT * FROM memstate_ledger WHERE index = :index AND {of_key}",
        "parked": f"SELECT * FROM memstate_parked WHERE index = :index AND {of_key}",
        "cursor": "SELECT * FROM memstate_cursor WHERE index = :index AND slot = :slot",
        "outbox": f"SELECT * FROM memstate_outbox WHERE {of_key} ORDER BY id",
        "log": f"SELECT id, tx, op, image, at FROM memstate_log WHERE {of_key} ORDER BY id DESC LIMIT 5",
    }
    given = {"index": index, "entity": entity, "key": key, "slot": slot_of(entity, key)}
    with app.engine.connect() as connection:
        for name, query in queries.items():
            for row in connection.execute(text(query), given).mappings():
                yield f"   {name}: {dict(row)}"
    calls = []
    for path in (app.setting.folder / "calls").glob("*.jsonl"):
        numbers = set()
        for line in _lines([path]):
            if line["index"] == index and any(id_ == each or id_ in each for each in line.get("given", ())):
                numbers.add(line["call"])
                line["given"] = [each for each in line["given"] if each == id_ or id_ in each]
                calls.append((line["t"], path.stem, line))
            elif line["index"] == index and line["call"] in numbers and "end" in line:
                calls.append((line["t"], path.stem, line))
    for at, process, line in sorted(calls, key=lambda call: call[0])[-30:]:
        yield f"   {at:.3f} {process}: { {name: value for name, value in line.items() if name not in ('t', 'index')} }"


def _lines(paths: Iterable[Path]) -> list[Any]:
    """The lines of the files. The last line of a killed process may be cut off."""
    found = []
    for path in paths:
        for line in path.read_bytes().splitlines():
            try:
                found.append(json.loads(line))
            except ValueError:
                continue
    return found
