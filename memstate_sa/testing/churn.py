"""What a process writes until it is killed: every state follows from the number of the step.

Run by `IndexConformance`, in a process of its own, after lines that define ``index``.
"""

from __future__ import annotations

import json
from itertools import count
from typing import NamedTuple

from memstate_sa.indexes.base import VectorIndex
from memstate_sa.testing.points import fingerprints, point

EMBEDDER, DIMENSION = "suite:3", 3
_NAMES = 40


class Step(NamedTuple):
    upserted: dict[str, tuple[str, list[float]]]
    deleted: list[str]


def step(number: int) -> Step:
    upserted = {
        f"n{(7 * number + n) % _NAMES}": (f"step {number}", [float(number % 97), float(n), 1.0]) for n in range(20)
    }
    return Step(upserted, [f"n{(7 * number + n) % _NAMES}" for n in range(25, 30)])


def state(steps: int) -> dict[str, tuple[str, list[float]]]:
    """Fingerprint and vector of everything that is there after so many steps."""
    held: dict[str, tuple[str, list[float]]] = {}
    for number in range(steps):
        upserted, deleted = step(number)
        held.update(upserted)
        for id_ in deleted:
            held.pop(id_, None)
    return held


def main(index: VectorIndex, first: int, last: int | None) -> None:
    """Print what is there, and then the number of each step that is done: from *first*, up to *last* or to a kill."""
    index.open(embedder=EMBEDDER, dimension=DIMENSION)
    listed = fingerprints(index)
    stored = {each.id: (each.fingerprint, each.vector.round(3).tolist()) for each in index.get(list(listed))}
    found = {match.id: match.fingerprint for match in index.query(point("query").vector, 1000)}
    print(json.dumps([index.incarnation, listed, stored, found]), flush=True)  # noqa: T201  # to the process that started this one
    for number in count(first) if last is None else range(first, last):
        upserted, deleted = step(number)
        index.upsert([point(id_, values, fingerprint=mark) for id_, (mark, values) in upserted.items()])
        index.delete(deleted)
        print(number, flush=True)  # noqa: T201
    index.close()
