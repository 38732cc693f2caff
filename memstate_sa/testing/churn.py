"""The writes of a process that will be killed. The number of the round determines the content of the index.

`IndexConformance` runs this module in a separate process, after lines that define ``index``.
"""

from __future__ import annotations

import json
from itertools import count
from typing import NamedTuple

from memstate_sa.indexes.base import VectorIndex
from memstate_sa.testing.points import fingerprints, point

EMBEDDER, DIMENSION = "suite:3", 3
_NAMES = 40


class Round(NamedTuple):
    """The points that one round upserts, and the ids that it then deletes."""

    upserted: dict[str, tuple[str, list[float]]]
    deleted: list[str]


def round_of(number: int) -> Round:
    upserted = {
        f"n{(7 * number + n) % _NAMES}": (f"step {number}", [float(number % 97), float(n), 1.0]) for n in range(20)
    }
    return Round(upserted, [f"n{(7 * number + n) % _NAMES}" for n in range(25, 30)])


def state(rounds: int) -> dict[str, tuple[str, list[float]]]:
    """The fingerprint and the vector of every point after *rounds* rounds."""
    points: dict[str, tuple[str, list[float]]] = {}
    for number in range(rounds):
        upserted, deleted = round_of(number)
        points.update(upserted)
        for id_ in deleted:
            points.pop(id_, None)
    return points


def main(index: VectorIndex, first: int, last: int | None) -> None:
    """Print the content, then run rounds from *first* to *last*, or until the kill, and print the number of each."""
    index.open(embedder=EMBEDDER, dimension=DIMENSION)
    listed = fingerprints(index)
    stored = {entry.id: (entry.fingerprint, entry.vector.round(3).tolist()) for entry in index.get(list(listed))}
    answer = {match.id: match.fingerprint for match in index.query(point("query").vector, 1000)}
    print(json.dumps([index.incarnation, listed, stored, answer]), flush=True)  # noqa: T201  # the parent process reads it
    for number in count(first) if last is None else range(first, last):
        upserted, deleted = round_of(number)
        index.upsert([point(id_, values, fingerprint=mark) for id_, (mark, values) in upserted.items()])
        index.delete(deleted)
        print(number, flush=True)  # noqa: T201
    index.close()
