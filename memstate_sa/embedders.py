"""Embedders, which turn texts into vectors. `WordLlamaEmbedder` works offline."""

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
    """Turns texts into vectors. Several threads call it.

    ``fingerprint`` identifies the model, and every setting that changes its vectors. An index stores it, and refuses
    an embedder with another one.

    A model that embeds queries and documents differently has a second method, ``embed_query(text: str) -> Vector``.
    Searches use it.

    The relay tries again later after OSError, TimeoutError, an HTTP client's connection errors, and the statuses 401,
    403, 408, 409, 425, 429 and 5xx. After any other exception, it splits the batch in halves to find the refused text.
    """

    @property
    def dimension(self) -> int: ...

    @property
    def fingerprint(self) -> str: ...

    def embed(self, texts: Sequence[str]) -> NDArray[np.float32]:
        """The vectors of *texts*, shape ``(len(texts), dimension)``."""
        ...


def checked(embedder: Embedder, texts: Sequence[str]) -> NDArray[np.float32]:
    """``embedder.embed(texts)`` as a float32 array of shape ``(len(texts), dimension)``, with finite values only.

    Raises DeliveryRetryable if the embedder is unavailable. Raises DeliveryRejected if it fails otherwise, or returns
    an invalid array.
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
    """The vector of the query *text*, from ``embedder.embed_query`` if it exists, and otherwise from ``embed``."""
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
    message = f"Embedder {embedder.fingerprint!r} failed"
    return delivery_error(error, message, unknown=DeliveryRejected, sent=texts)


def _valid(embedder: Embedder, result: Any, shape: tuple[int, ...]) -> NDArray[np.float32]:
    try:
        with np.errstate(over="ignore"):  # a value too large for float32 becomes infinity, which is refused below
            array = np.array(result, dtype=np.float32)  # make a copy, because the embedder may reuse its buffer
    except (TypeError, ValueError) as error:
        raise DeliveryRejected(f"Embedder {embedder.fingerprint!r} did not return an array of numbers.") from error
    if array.shape != shape:
        raise DeliveryRejected(f"Embedder {embedder.fingerprint!r} returned shape {array.shape} instead of {shape}.")
    if not np.isfinite(array).all():
        raise DeliveryRejected(f"Embedder {embedder.fingerprint!r} returned NaN or infinity.")
    return array


class WordLlamaEmbedder:
    """Static word embeddings from the wordllama wheel. They work offline with NumPy only, and have 256 dimensions.

    The model (16 MB) is loaded at the first use. A text's vector is the mean of its tokens' vectors. Only the first
    50,000 characters count: the mean hardly changes after them, and tokenizing 10 MB takes 20 s and 1 GB.
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
        # The tokenizer needs UTF-8, which cannot hold lone surrogates. They become "?".
        clipped = [text[: self._CHARACTERS].encode(errors="replace").decode() for text in texts]
        for vector, encoding in zip(vectors, tokenizer.encode_batch(clipped, add_special_tokens=False), strict=True):
            if encoding.ids:
                table[encoding.ids].mean(axis=0, out=vector)
        return vectors

    def _loaded(self) -> tuple[Any, NDArray[np.float32]]:
        with self._lock:
            if self._model is None:
                # Read the model's files directly. Importing wordllama sets the root logger to INFO and adds a handler.
                # Its embed() pads a batch to the longest text: with one text of 1 MB, a batch of 64 takes 60 GB.
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
    """Any Chroma embedding function. Queries use the function's own ``embed_query`` if it has one.

    The fingerprint is made from its ``name()`` and ``get_config()``, or only from its class if it has neither. For such
    a function, pass a *fingerprint* that changes with the model. Without *dimension*, one word is embedded to measure
    it.
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
        # The base class's method only warns with a DeprecationWarning and returns NotImplemented.
        return getattr(function, method)() if callable(own) and own is not getattr(base, method) else None

    name, config = ask("name"), ask("get_config")
    if not isinstance(name, str):
        name = f"{kind.__module__}.{kind.__qualname__}"
    if not config:
        return f"chroma:{name}"
    digest = blake2b(json.dumps(config, sort_keys=True, default=str).encode(), digest_size=8).hexdigest()
    return ":".join(["chroma", name, *([str(config["model_name"])] if config.get("model_name") else []), digest])
