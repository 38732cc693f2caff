"""`Projection`: the text, metadata and fingerprints of one row for an index."""

from __future__ import annotations

import hashlib
import json
import math
from datetime import date, datetime, time
from enum import Enum
from functools import lru_cache
from typing import Any, NamedTuple

from memstate_sa.db.codec import encode
from memstate_sa.indexes.base import Scalar


class Projection(NamedTuple):
    """The content of an index for one row. Without text, there is no point and no fingerprint."""

    key: str
    text: str | None
    metadata: dict[str, Scalar]
    fingerprint: str | None
    text_fingerprint: str | None


def part_of(text: str) -> bytes:
    """*text* with its length in front, so that different lists of parts never give the same bytes."""
    return f"{len(text)}:{text}".encode("utf-8", "surrogatepass")


@lru_cache(64)
def digest_of(text: str) -> hashlib.blake2b:
    """A digest that begins with *text*. Callers must update a copy of it."""
    return hashlib.blake2b(part_of(text), digest_size=16)


PLAIN_TYPES = frozenset((str, int, bool, type(None)))


def to_scalar(value: Any) -> Scalar:
    """A metadata value in the form that every index takes."""
    if isinstance(value, Enum):
        value = value.name
    if value is None or isinstance(value, (bool, int, str)):
        return value
    if isinstance(value, float):
        return value if math.isfinite(value) else repr(value)
    if isinstance(value, (datetime, date, time)):
        return str(next(iter(encode(value).values())))
    if isinstance(value, (dict, list, tuple)):
        return json.dumps(value, sort_keys=True, default=str)
    return str(value)


def point_id(entity: str, key: str) -> str:
    """The id of a fact's point in an index."""
    return entity + key


def split_point_id(point_id: str) -> tuple[str, str] | None:
    """(entity, key) of a point id, or None for a point that is not ours."""
    entity, bracket, values = point_id.partition("[")
    return (entity, bracket + values) if entity and values.endswith("]") else None
