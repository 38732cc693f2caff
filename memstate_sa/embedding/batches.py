"""Embedding in bounded batches, a cache of recent vectors, and the indexes that get the vectors."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property

from memstate_sa.embedders import Embedder, WordLlamaEmbedder, checked, embed_query
from memstate_sa.indexes.base import Vector, VectorIndex
from memstate_sa.runtime import forks

MAX_TEXTS = 256
MAX_CHARS = 1_000_000


class Vectors:
    """The vectors of texts, by text fingerprint. Thread-safe: two threads may embed the same text at the same time.

    *stored*: the number of vectors that the application's database keeps, see `embedding.cache`.
    """

    def __init__(self, embedder: Embedder | None, *, capacity: int = 4096, stored: int = 0) -> None:
        if embedder is not None:
            self.embedder = embedder
        self.stored = stored
        self._capacity = capacity
        self._recent: OrderedDict[str, Vector] = OrderedDict()
        self._make_lock()
        forks.in_child(self, Vectors._make_lock)

    def _make_lock(self) -> None:
        self._lock = threading.Lock()

    @cached_property
    def embedder(self) -> Embedder:
        """The embedder. The default one is made at its first use, and raises MissingExtra without its package."""
        return WordLlamaEmbedder()

    def of_query(self, query: str) -> Vector:
        return embed_query(self.embedder, query)

    def recent(self, digests: Iterable[str]) -> dict[str, Vector]:
        """The remembered vectors of *digests*, which are text fingerprints."""
        with self._lock:
            return {digest: self._recent[digest] for digest in digests if digest in self._recent}

    def remember(self, vectors: Mapping[str, Vector]) -> None:
        with self._lock:
            self._recent.update(vectors)
            while len(self._recent) > self._capacity:
                self._recent.popitem(last=False)

    def embed(self, texts: Mapping[str, str], *, remember: bool = False) -> dict[str, Vector]:
        """Embed *texts*, and return the vectors by text fingerprint. Raises DeliveryError if the embedder fails."""
        vectors: dict[str, Vector] = {}
        for batch in text_batches(texts):
            vectors.update(zip(batch, checked(self.embedder, list(batch.values())), strict=True))
        if remember:
            self.remember(vectors)
        return vectors


@dataclass(frozen=True, slots=True)
class Destination:
    """An index, and the source of its vectors."""

    index: VectorIndex
    vectors: Vectors

    def open(self) -> str:
        """Open the index, and return its incarnation. Raises IndexMismatch if another embedder has filled it."""
        embedder = self.vectors.embedder
        self.index.open(embedder=embedder.fingerprint, dimension=embedder.dimension)
        return self.index.incarnation


def text_batches(texts: Mapping[str, str]) -> Iterator[dict[str, str]]:
    """*texts* in batches of at most `MAX_TEXTS` texts and `MAX_CHARS` characters. A longer text is a batch alone."""
    batch: dict[str, str] = {}
    chars = 0
    for digest, text in texts.items():
        if batch and (len(batch) >= MAX_TEXTS or chars + len(text) > MAX_CHARS):
            yield batch
            batch, chars = {}, 0
        batch[digest] = text
        chars += len(text)
    if batch:
        yield batch
