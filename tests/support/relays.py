"""Helpers that the relay's tests share."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from typing import Any

from memstate_sa.indexes import InMemoryIndex, Point, VectorIndex
from memstate_sa.indexes.base import Entry, Stored
from memstate_sa.testing import HashEmbedder
from tests.support import (
    Tag,
    World,
    assert_index_holds,
)


class Spy(InMemoryIndex):
    """A real index that records its calls, and can be told to refuse points."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self.batches: list[list[str]] = []
        self.deleted: list[list[str]] = []
        self.refuse: Callable[[Point], Exception | None] = lambda point: None

    def upsert(self, points: Sequence[Point]) -> None:
        self.batches.append([point.id for point in points])
        for point in points:
            if error := self.refuse(point):
                raise error
        super().upsert(points)

    def delete(self, ids: Sequence[str], *, epoch: int = 0) -> None:
        self.deleted.append(list(ids))
        super().delete(ids, epoch=epoch)


def say(world: World, **tags: str) -> None:
    with world.session() as session:
        for name, meaning in tags.items():
            session.merge(Tag(name=name, meaning=meaning))
        session.commit()


def eventually(condition: Callable[[], object]) -> None:
    """Wait until *condition* is true: long enough for a busy machine."""
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline, "did not happen in time"
        time.sleep(0.005)


def holds(index: VectorIndex, expected: dict[str, str]) -> bool:
    """Whether *index* holds these texts, by point id. Use it while a relay runs."""
    try:
        assert_index_holds(index, HashEmbedder(), expected)
    except (AssertionError, KeyError):
        return False
    return True


class Interrupted(InMemoryIndex):
    """A real index with an interruption: once, before or after the call that `during` names."""

    def __init__(self, *, fenced: bool = True) -> None:
        super().__init__()
        self.fenced = fenced
        self.during = ""
        self.meddle: Callable[[], object] = lambda: None

    def _passes(self, id_: str, epoch: int) -> bool:
        return super()._passes(id_, epoch) or not self.fenced

    def _now(self, moment: str) -> None:
        if self.during == moment:
            self.during = ""
            self.meddle()

    def upsert(self, points: Sequence[Point]) -> None:
        self._now("before upsert")
        super().upsert(points)

    def get(self, ids: Sequence[str]) -> list[Stored]:
        self._now("before get")
        found = super().get(ids)
        self._now("after get")
        return found

    def scan(self, after: str | None, limit: int) -> list[Entry]:
        found = super().scan(after, limit)
        self._now("after scan")
        return found


class Waits(threading.Event):
    """A relay's wait for work: short waits end at once, long ones last until it is woken."""

    def __init__(self, short_s: float) -> None:
        super().__init__()
        self.short_s = short_s
        self.asked: list[float] = []

    def wait(self, timeout: float | None = None) -> bool:
        assert timeout is not None
        self.asked.append(timeout)
        return super().wait(0.0 if timeout < self.short_s else 100.0)
