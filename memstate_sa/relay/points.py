"""The points that are written to an index."""

from __future__ import annotations

from memstate_sa.db.codec import FactKey
from memstate_sa.indexes.base import Point, Vector
from memstate_sa.tracking.projection import Projection, point_id

ENTITY = "memstate_entity"
"""The metadata field with the entity of a point, in an index that has several entities."""


def make_point(fact: FactKey, projection: Projection, vector: Vector, epoch: int, *, marked: bool) -> Point:
    """The point of a fact with a text. A *marked* point carries its entity."""
    assert projection.fingerprint is not None
    metadata = {ENTITY: fact[0], **projection.metadata} if marked else projection.metadata
    return Point(point_id(*fact), vector, projection.fingerprint, epoch, metadata, projection.text)
