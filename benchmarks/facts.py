"""What the vector benchmarks remember: templated facts, and their vectors, computed beforehand."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import islice, product

import numpy as np
from numpy.typing import NDArray

from memstate_sa.embedders import WordLlamaEmbedder
from memstate_sa.indexes.base import Vector

_WHO = ("Ana", "Ben", "Chen", "Dara", "Elif", "Femi", "Goran", "Hana", "Ivo", "Jun")
_HOW = ("likes", "dislikes", "is allergic to", "asked about", "often orders", "never eats", "cooks", "grows", "sells", "misses")
_WHAT = ("mushroom risotto", "green curry", "lentil soup", "sourdough", "pickled plums", "black tea", "goat cheese", "ramen", "peanuts", "olives")
_WHEN = ("on Mondays", "in winter", "at work", "while travelling", "with friends", "late at night", "for breakfast", "in Lisbon", "after running", "as a child")
_WHY = ("because it is cheap", "since 2019", "by doctor's orders", "out of habit", "to save time", "for the smell", "with regret", "in secret", "by tradition", "for no reason")


def texts(count: int) -> list[str]:
    """Up to 100,000 different sentences, in an order that repeats no word more than it must."""
    every = [" ".join(words) for words in product(_WHO, _HOW, _WHAT, _WHEN, _WHY)]
    assert count <= len(every)
    return list(islice((every[n * 7919 % len(every)] for n in range(len(every))), count))


class Precomputed:
    """Looks up the vectors of texts that were embedded before: nothing but the index is measured."""

    fingerprint = "precomputed:wordllama"

    def __init__(self, known: Sequence[str]) -> None:
        model = WordLlamaEmbedder()
        self.dimension = model.dimension
        self._vectors: dict[str, Vector] = dict(zip(known, model.embed(known), strict=True))

    def embed(self, texts: Sequence[str]) -> NDArray[np.float32]:
        return np.stack([self._vectors[text] for text in texts])

    def embed_query(self, text: str) -> Vector:
        return self._vectors[text]
