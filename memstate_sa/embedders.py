"""Embedders: what turns texts into vectors, and one that works offline."""

from __future__ import annotations

import json
import threading
from collections.abc import Sequence
from hashlib import blake2b
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import numpy as np
from numpy.typing import NDArray

from memstate_sa.errors import DeliveryError, DeliveryRejected, MissingExtra
from memstate_sa.indexes.base import Vector
from memstate_sa.indexes.provider_errors import delivery_error
from memstate_sa.runtime import forks


@runtime_checkable
class Embedder(Protocol):
    """Texts to vectors; called from several threads.

    ``fingerprint`` names the model and whatever else changes its vectors: an index keeps it, and refuses another.

    A model that embeds queries unlike documents has another method, ``embed_query(text: str) -> Vector``, which the
    module's `embed_query` prefers.

    OSError, TimeoutError, an HTTP client's connection errors and the statuses 401, 403, 408, 409, 425, 429 and 5xx are
    tried again later; any other exception rejects the batch, which is then bisected.
    """

    @property
    def dimension(self) -> int: ...

    @property
    def fingerprint(self) -> str: ...

    def embed(self, texts: Sequence[str]) -> NDArray[np.float32]:
        """The vectors of *texts*, shape ``(len(texts), dimension)``."""
        ...


def checked(embedder: Embedder, texts: Sequence[str]) -> NDArray[np.float32]:
    """``embedder.embed(texts)`` as a float32 array of shape ``(len(texts), dimension)``, every value finite.

    Raises DeliveryRetryable when the embedder is unavailable, DeliveryRejected when it fails otherwise or returns
    anything else.
    """
    if not texts:
        return np.empty((0, embedder.dimension), dtype=np.float32)
    try:
        result = embedder.embed(texts)
    except DeliveryError:
        raise
    except Exception as error:
        raise _failure(embedder, error, texts) from error
    return _valid(embedder, result, (len(texts), embedder.dimension))


def embed_query(embedder: Embedder, text: str) -> Vector:
    """The vector to search with for *text*: by the embedder's own ``embed_query`` where it has one."""
    own = getattr(embedder, "embed_query", None)
    if own is None:
        vector: Vector = checked(embedder, [text])[0]
        return vector
    try:
        result = own(text)
    except DeliveryError:
        raise
    except Exception as error:
        raise _failure(embedder, error, [text]) from error
    return _valid(embedder, result, (embedder.dimension,))


def _failure(embedder: Embedder, error: Exception, texts: Sequence[str]) -> DeliveryError:
    message = f"embedder {embedder.fingerprint!r} failed"
    return delivery_error(error, message, unknown=DeliveryRejected, sent=texts)


def _valid(embedder: Embedder, result: Any, shape: tuple[int, ...]) -> NDArray[np.float32]:
    try:
        with np.errstate(over="ignore"):  # what is too large for float32 becomes infinity, refused below
            array = np.array(result, dtype=np.float32)  # a copy: the embedder may fill the same buffer the next time
    except (TypeError, ValueError) as error:
        raise DeliveryRejected(f"embedder {embedder.fingerprint!r} returned no array of numbers") from error
    if array.shape != shape:
        raise DeliveryRejected(f"embedder {embedder.fingerprint!r} returned shape {array.shape}, not {shape}")
    if not np.isfinite(array).all():
        raise DeliveryRejected(f"embedder {embedder.fingerprint!r} returned NaN or infinity")
    return array


class WordLlamaEmbedder:
    """Static word embeddings from the wordllama wheel: offline, NumPy alone, 256 dimensions.

    The model (16 MB) is loaded at the first use. A text's vector is the mean of its tokens' vectors, of which only the
    first 50,000 characters count: the mean has settled long before, and tokenizing 10 MB takes 20 s and 1 GB.
    """

    dimension = 256
    fingerprint = "wordllama:l2_supercat:256"
    _CHARACTERS = 50_000

    def __init__(self) -> None:
        if find_spec("wordllama") is None:
            raise MissingExtra("wordllama", "wordllama")
        self._make_lock()
        forks.in_child(self, WordLlamaEmbedder._make_lock)
        self._model: tuple[Any, NDArray[np.float32]] | None = None

    def _make_lock(self) -> None:
        self._lock = threading.Lock()

    def embed(self, texts: Sequence[str]) -> NDArray[np.float32]:
        tokenizer, table = self._loaded()
        vectors = np.zeros((len(texts), self.dimension), dtype=np.float32)
        # The tokenizer takes UTF-8, which has no lone surrogates: they become "?".
        clipped = [text[: self._CHARACTERS].encode(errors="replace").decode() for text in texts]
        for vector, encoding in zip(vectors, tokenizer.encode_batch(clipped, add_special_tokens=False), strict=True):
            if encoding.ids:
                table[encoding.ids].mean(axis=0, out=vector)
        return vectors

    def _loaded(self) -> tuple[Any, NDArray[np.float32]]:
        with self._lock:
            if self._model is None:
                # Its files are read directly. Importing wordllama sets the root logger to INFO with a handler of its
                # own, and its embed() pads a batch to its longest text: one of 1 MB among 64 takes 60 GB.
                spec = find_spec("wordllama")
                if spec is None or spec.origin is None:
                    raise MissingExtra("wordllama", "wordllama")
                folder = Path(spec.origin).parent
                tokenizer = import_module("tokenizers").Tokenizer.from_file(
                    str(folder / "tokenizers" / "l2_supercat_tokenizer_config.json")
                )
                tokenizer.no_padding()
                tokenizer.no_truncation()
                weights = import_module("safetensors.numpy").load_file(
                    folder / "weights" / "l2_supercat_256.safetensors"
                )
                self._model = tokenizer, weights["embedding.weight"].astype(np.float32)
            return self._model


class ChromaEmbedder:
    """Any Chroma embedding function, with its own ``embed_query`` where it has one.

    The fingerprint is made of its ``name()`` and ``get_config()``. A function without them is known by its class alone:
    give a *fingerprint* that changes with the model. Without *dimension*, one word is embedded to learn it.
    """

    def __init__(
        self, embedding_function: Any, *, dimension: int | None = None, fingerprint: str | None = None
    ) -> None:
        self._function = embedding_function
        self._dimension = dimension
        self._fingerprint = fingerprint or _fingerprint(embedding_function)

    @property
    def fingerprint(self) -> str:
        return self._fingerprint

    @property
    def dimension(self) -> int:
        if self._dimension is None:
            try:
                self._dimension = len(self._function(["dimension"])[0])
            except Exception as error:
                raise _failure(self, error, ["dimension"]) from error
        return self._dimension

    def embed(self, texts: Sequence[str]) -> NDArray[np.float32]:
        return np.asarray(self._function(list(texts)), dtype=np.float32)

    def embed_query(self, text: str) -> Vector:
        own = getattr(self._function, "embed_query", self._function)
        vector: Vector = np.asarray(own([text]), dtype=np.float32)[0]
        return vector


def _fingerprint(function: Any) -> str:
    try:
        base = import_module("chromadb.api.types").EmbeddingFunction
    except ImportError as error:
        raise MissingExtra("chromadb", "chroma") from error
    kind = type(function)

    def ask(method: str) -> Any:
        own = getattr(kind, method, None)
        # The base class's answer is a DeprecationWarning and NotImplemented.
        return getattr(function, method)() if callable(own) and own is not getattr(base, method) else None

    name, config = ask("name"), ask("get_config")
    if not isinstance(name, str):
        name = f"{kind.__module__}.{kind.__qualname__}"
    if not config:
        return f"chroma:{name}"
    digest = blake2b(json.dumps(config, sort_keys=True, default=str).encode(), digest_size=8).hexdigest()
    return ":".join(["chroma", name, *([str(config["model_name"])] if config.get("model_name") else []), digest])
