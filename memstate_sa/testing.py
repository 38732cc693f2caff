"""Parts for tests: an embedder without a model, and an index that fails."""

from __future__ import annotations

import random
import threading
from collections.abc import Sequence
from hashlib import blake2b
from typing import NoReturn

import numpy as np
from numpy.typing import NDArray

from memstate_sa.errors import DeliveryRetryable
from memstate_sa.indexes.base import Entry, Filter, Match, Point, Stored, Vector, VectorIndex


class HashEmbedder:
    """Hashed words and letter trigrams as unit vectors: texts that share spelling are near. Blank text is zero."""

    def __init__(self, dimension: int = 64) -> None:
        self.dimension = dimension
        self.fingerprint = f"hash:{dimension}"

    def embed(self, texts: Sequence[str]) -> NDArray[np.float32]:
        vectors = np.zeros((len(texts), self.dimension), dtype=np.float32)
        for vector, text in zip(vectors, texts, strict=True):
            for feature in _features(text):
                number = int.from_bytes(blake2b(feature.encode("utf-8", "surrogatepass"), digest_size=8).digest())
                vector[(number >> 1) % self.dimension] += 1 if number & 1 else -1
            norm = np.linalg.norm(vector)
            if norm > 0:
                vector[:] = vector / norm
        return vectors


def _features(text: str) -> list[str]:
    words = text.lower().split()
    return words + [word[n : n + 3] for word in (f"<{word}>" for word in words) for n in range(len(word) - 2)]


class FlakyIndex:
    """*inner*, with DeliveryRetryable raised in a share *rate* of the calls, reproducibly by *seed* in one thread.

    A read fails before it happens. A write fails before it, after it (a lost acknowledgement) or, with *partial*, after
    half of its batch. ``open``, ``close`` and ``incarnation`` never fail. ``rate`` may be changed at any time: 0 heals.
    """

    def __init__(self, inner: VectorIndex, *, rate: float = 0.1, seed: int = 0, partial: bool = True) -> None:
        self.inner = inner
        self.rate = rate
        self._moments = ("before", "after", "half") if partial else ("before", "after")
        self._random = random.Random(seed)
        self._lock = threading.Lock()

    @property
    def incarnation(self) -> str:
        return self.inner.incarnation

    @property
    def max_batch(self) -> int:
        return self.inner.max_batch

    @property
    def in_process(self) -> bool:
        return getattr(self.inner, "in_process", False)

    def open(self, *, embedder: str, dimension: int) -> None:
        self.inner.open(embedder=embedder, dimension=dimension)

    def close(self) -> None:
        self.inner.close()

    def upsert(self, points: Sequence[Point]) -> None:
        moment = self._moment()
        if moment != "before":
            self.inner.upsert(points[: len(points) // 2] if moment == "half" else points)
        if moment:
            _fail(moment, "upsert")

    def delete(self, ids: Sequence[str]) -> None:
        moment = self._moment()
        if moment != "before":
            self.inner.delete(ids[: len(ids) // 2] if moment == "half" else ids)
        if moment:
            _fail(moment, "delete")

    def query(
        self, vector: Vector, limit: int, *, where: Filter | None = None, ids: Sequence[str] | None = None
    ) -> list[Match]:
        if self._moment():
            _fail("before", "query")
        return self.inner.query(vector, limit, where=where, ids=ids)

    def get(self, ids: Sequence[str]) -> list[Stored]:
        if self._moment():
            _fail("before", "get")
        return self.inner.get(ids)

    def scan(self, after: str | None, limit: int) -> list[Entry]:
        if self._moment():
            _fail("before", "scan")
        return self.inner.scan(after, limit)

    def _moment(self) -> str | None:
        with self._lock:
            return self._random.choice(self._moments) if self._random.random() < self.rate else None


def _fail(moment: str, call: str) -> NoReturn:
    raise DeliveryRetryable(f"injected failure: {moment} of {call}")
