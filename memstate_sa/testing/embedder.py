"""An embedder without a model."""

from __future__ import annotations

from collections.abc import Sequence
from hashlib import blake2b

import numpy as np
from numpy.typing import NDArray


class HashEmbedder:
    """Unit vectors of hashed words and letter trigrams: similar spellings are near. Blank text has a zero vector."""

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
