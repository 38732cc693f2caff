"""The referee: compares plain SQL with plain Chroma, by content, without memstate_sa."""

from __future__ import annotations

import json
from typing import Any, NamedTuple

import numpy as np
from chromadb.api.models.Collection import Collection
from sqlalchemy import Engine, select
from sqlalchemy.orm import Session

from memstate_sa.demo.agent import Note
from memstate_sa.embedders import Embedder


class Drift(NamedTuple):
    missing: list[str]
    ghost: list[str]
    stale: list[str]


def drift(engine: Engine, collection: Collection, embedder: Embedder) -> Drift:
    """The notes that are missing in Chroma, deleted notes that are still there, and notes with an outdated vector."""
    with Session(engine) as session:
        notes = {note.id: note for note in session.scalars(select(Note))}
    stored = collection.get(include=["embeddings", "metadatas"])
    vectors = dict(zip(map(_note_id, stored["ids"]), np.asarray(stored["embeddings"]), strict=True))
    metadata = dict(zip(map(_note_id, stored["ids"]), stored["metadatas"] or [], strict=True))
    both = sorted(notes.keys() & vectors.keys())
    current = dict(zip(both, embedder.embed([notes[id_].text for id_ in both]), strict=True))
    return Drift(
        missing=sorted(notes.keys() - vectors.keys()),
        ghost=sorted(vectors.keys() - notes.keys()),
        stale=[
            id_
            for id_ in both
            if _cosine_distance(current[id_], vectors[id_]) > 1e-4
            or (metadata[id_]["user_id"], metadata[id_]["role"]) != (notes[id_].user_id, notes[id_].role)
        ],
    )


def _note_id(point_id: str) -> str:
    """The id of a point's note. By hand both ids are the same. memstate_sa adds the table: ``note["f1"]``."""
    return str(json.loads(point_id.removeprefix("note"))[0]) if point_id.startswith("note[") else point_id


def _cosine_distance(a: Any, b: Any) -> float:
    return float(1 - a @ b / (np.linalg.norm(a) * np.linalg.norm(b)))
