"""The facts of the vector benchmarks, made from templates, and their precomputed vectors."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import product

import numpy as np
from numpy.typing import NDArray

from memstate_sa.embedders import WordLlamaEmbedder
from memstate_sa.indexes.base import Vector

_WHO = "Ana, Ben, Chen, Dara, Elif, Femi, Goran, Hana, Ivo, Jun"
_HOW = "likes, dislikes, is allergic to, asked about, often orders, never eats, cooks, grows, sells, misses"
_WHAT = "risotto, green curry, lentil soup, sourdough, plums, black tea, goat cheese, ramen, peanuts, olives"
_WHEN = (
    "on Mondays, in winter, at work, on trips, with friends, at night, at breakfast, in Rome, after runs, as a child"
)
_WHY = (
    "as it is cheap, since 2019, by order, out of habit, to save time, with regret, in secret, by custom, daily, anyhow"
)


def texts(count: int) -> list[str]:
    """Up to 100,000 different sentences, shuffled."""
    every = [" ".join(words) for words in product(*(part.split(", ") for part in (_WHO, _HOW, _WHAT, _WHEN, _WHY)))]
    assert count <= len(every)
    return [every[number * 7919 % len(every)] for number in range(count)]  # 7919 is prime, so each sentence comes once


class Precomputed:
    """An embedder that looks up precomputed vectors, so that embedding takes no time."""

    fingerprint = "precomputed:wordllama"

    def __init__(self, known: Sequence[str]) -> None:
        model = WordLlamaEmbedder()
        self.dimension = model.dimension
        self._vectors: dict[str, Vector] = dict(zip(known, model.embed(known), strict=True))

    def embed(self, texts: Sequence[str]) -> NDArray[np.float32]:
        return np.stack([self._vectors[text] for text in texts])

    def embed_query(self, text: str) -> Vector:
        return self._vectors[text]
