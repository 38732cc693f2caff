"""Embedders: their valid results, and their failures that are worth another try."""

from __future__ import annotations

import importlib
import logging
import subprocess
import sys
import warnings
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest

from memstate_sa.embedders import ChromaEmbedder, Embedder, WordLlamaEmbedder, checked, embed_query
from memstate_sa.errors import DeliveryError, DeliveryRejected, DeliveryRetryable, MissingExtra
from memstate_sa.indexes.provider_errors import delivery_error
from memstate_sa.testing import HashEmbedder

SECRET = "the user is allergic to peanuts"


class Scripted:
    """Returns or raises the given result."""

    dimension = 2
    fingerprint = "scripted:2"

    def __init__(self, result: Any) -> None:
        self.result = result
        self.calls: list[list[str]] = []

    def embed(self, texts: Sequence[str]) -> Any:
        self.calls.append(list(texts))
        if isinstance(self.result, BaseException):
            raise self.result
        return self.result


# -- checked and embed_query -----------------------------------------------------------------------------------------


def test_checked_returns_float32() -> None:
    """Lists and float64 come back as one float32 array."""
    result = checked(Scripted([[1, 2.5], [3, 4]]), ["a", "b"])
    assert result.dtype == np.float32
    assert result.tolist() == [[1, 2.5], [3, 4]]


def test_empty_batch_calls_no_model() -> None:
    """An empty batch is answered without asking the model."""
    embedder = Scripted(AssertionError())
    assert checked(embedder, []).shape == (0, 2)
    assert embedder.calls == []


@pytest.mark.parametrize(
    "result",
    [
        [[1.0, float("nan")]],
        [[1.0, float("inf")]],
        np.array([[1.0, 1e300]]),
        [[1.0, 2.0, 3.0]],
        [[1.0, 2.0], [3.0, 4.0]],
        [1.0, 2.0],
        [[1.0], [1.0, 2.0]],
        [["a", "b"]],
        None,
        [],
    ],
    ids=["nan", "inf", "overflow", "dimension", "count", "flat", "ragged", "strings", "none", "empty"],
)
def test_a_wrong_answer_is_rejected(result: Any) -> None:
    """The message names the embedder."""
    with pytest.raises(DeliveryRejected, match="scripted:2"):
        checked(Scripted(result), ["a"])


class OpenAIStyleError(Exception):
    """An error like those of SDKs: a status, no OSError."""

    def __init__(self, status_code: int) -> None:
        super().__init__(SECRET)
        self.status_code = status_code


def chained(outer: Exception, inner: Exception) -> Exception:
    outer.__cause__ = inner
    return outer


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (ConnectionResetError(), DeliveryRetryable),
        (TimeoutError(), DeliveryRetryable),
        (httpx.ReadTimeout(SECRET), DeliveryRetryable),
        (chained(RuntimeError(SECRET), httpx.RemoteProtocolError(SECRET)), DeliveryRetryable),
        (chained(RuntimeError(SECRET), ConnectionRefusedError()), DeliveryRetryable),
        (OpenAIStyleError(429), DeliveryRetryable),
        (OpenAIStyleError(401), DeliveryRetryable),
        (OpenAIStyleError(503), DeliveryRetryable),
        (OpenAIStyleError(400), DeliveryRejected),
        (chained(OpenAIStyleError(400), ConnectionResetError()), DeliveryRejected),
        (ValueError(SECRET), DeliveryRejected),
        (KeyError(SECRET), DeliveryRejected),
    ],
    ids=repr,
)
def test_failures_are_told_apart_by_type(error: Exception, expected: type[DeliveryError]) -> None:
    """A provider that is down or busy is retryable. A refused text is not. The provider's words stay in the cause."""
    with pytest.raises(DeliveryError, match="scripted:2") as caught:
        checked(Scripted(error), [SECRET])
    assert type(caught.value) is expected
    assert caught.value.__cause__ is error
    assert SECRET not in str(caught.value)


def test_a_delivery_error_passes_through() -> None:
    """An embedder may decide by itself."""
    error = DeliveryRetryable("busy", retry_after_s=3)
    with pytest.raises(DeliveryRetryable) as caught:
        checked(Scripted(error), ["a"])
    assert caught.value is error


def retry_after_s(header: str | None) -> float | None:
    response = httpx.Response(429, headers={} if header is None else {"Retry-After": header})
    error = httpx.HTTPStatusError("", request=httpx.Request("POST", "http://x"), response=response)
    verdict = delivery_error(error, "the index", unknown=DeliveryRejected)
    assert isinstance(verdict, DeliveryRetryable)
    return verdict.retry_after_s


def test_retry_after_is_passed_on() -> None:
    """The header's delay or date becomes seconds from now. An unreadable header counts as absent."""
    now = datetime.now(UTC)
    assert retry_after_s("7") == 7
    assert retry_after_s(format_datetime(now + timedelta(seconds=600), usegmt=True)) == pytest.approx(600, abs=60)
    assert retry_after_s(format_datetime(now - timedelta(seconds=600), usegmt=True)) == 0
    assert retry_after_s("soon") is None
    assert retry_after_s("nan") is None
    assert retry_after_s(None) is None


def test_a_circular_chain_ends() -> None:
    """Exceptions that cause each other are read only once."""
    first, second = ValueError(), KeyError()
    first.__cause__, second.__cause__ = second, first
    assert type(delivery_error(first, "x", unknown=DeliveryRetryable)) is DeliveryRetryable


def test_a_query_is_embedded_like_a_text() -> None:
    """embed is used if the embedder has no embed_query."""
    assert embed_query(Scripted([[1, 2]]), "q").tolist() == [1, 2]


def test_an_asymmetric_embedder_is_asked_its_own_way() -> None:
    """embed_query is preferred. Its results and failures are checked like those of embed."""

    class Asymmetric(Scripted):
        query: Any = (3, 4)

        def embed_query(self, text: str) -> Any:
            if isinstance(self.query, Exception):
                raise self.query
            return self.query

    embedder = Asymmetric([[1, 2]])
    assert embed_query(embedder, "q").tolist() == [3, 4]
    assert embedder.calls == []
    embedder.query = [[3, 4]]
    with pytest.raises(DeliveryRejected, match="shape"):
        embed_query(embedder, "q")
    embedder.query = TimeoutError()
    with pytest.raises(DeliveryRetryable):
        embed_query(embedder, "q")


# -- WordLlama --------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def wordllama() -> WordLlamaEmbedder:
    return WordLlamaEmbedder()


def cosine(a: Any, b: Any) -> float:
    return float(a @ b / np.linalg.norm(a) / np.linalg.norm(b))


def test_question_is_near_the_fact_that_answers_it(wordllama: WordLlamaEmbedder) -> None:
    """The question finds the fact that answers it, without a common word."""
    facts = checked(wordllama, ["User prefers vegetarian food", "The invoice is due on Friday"])
    query = embed_query(wordllama, "what should I cook?")
    assert cosine(facts[0], query) > cosine(facts[1], query)


def test_vectors_are_wordllamas_own(wordllama: WordLlamaEmbedder, quiet_logging: None) -> None:
    """The vectors are those of wordllama's own embed(), although we read its files directly."""
    package = importlib.import_module("wordllama")
    texts = ["User prefers vegetarian food", "", "naïve café 🙂", "a\0b", "x " * 300]
    folder = Path(package.__file__ or "").parent
    theirs = package.WordLlama.load(cache_dir=folder, disable_download=True).embed(texts)
    np.testing.assert_allclose(wordllama.embed(texts), theirs, atol=1e-6)


@pytest.fixture
def quiet_logging() -> Iterator[None]:
    """Importing wordllama configures the root logger."""
    root = logging.getLogger()
    handlers, level = list(root.handlers), root.level
    yield
    root.handlers[:], root.level = handlers, level


def test_the_application_keeps_its_logging() -> None:
    """Embedding does not configure the root logger, and logs nothing."""
    code = """
import logging
from memstate_sa.embedders import WordLlamaEmbedder
assert WordLlamaEmbedder().embed(["a", "b"]).shape == (2, 256)
assert (logging.getLogger().handlers, logging.getLogger().level) == ([], logging.WARNING)
"""
    result = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)
    assert (result.stdout, result.stderr) == (b"", b"")


def test_a_vector_does_not_depend_on_its_batch(wordllama: WordLlamaEmbedder) -> None:
    """The vector is the same to the bit, alone or beside a long text."""
    alone = wordllama.embed(["User prefers tea"])[0]
    assert np.array_equal(wordllama.embed(["y " * 5000, "User prefers tea"])[1], alone)


@pytest.mark.parametrize("text", ["", " ", "\0", "a\0b", "\ud800", "a\udfffb", "🙂" * 50, "\n\t"], ids=ascii)
def test_odd_texts_do_no_harm(wordllama: WordLlamaEmbedder, text: str) -> None:
    """NUL, lone surrogates and blanks have a finite vector."""
    assert checked(wordllama, [text]).shape == (1, 256)


def test_ten_megabytes_do_no_harm(wordllama: WordLlamaEmbedder) -> None:
    """A long text is as near to its short form as if it had been read to the end."""
    long, short = checked(wordllama, ["I like tea. " * 870_000, "I like tea. " * 100])
    assert cosine(long, short) > 0.999


def test_threads_load_it_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """First uses at the same time wait for one load."""
    files = importlib.import_module("safetensors.numpy")
    loads: list[object] = []
    load_file = files.load_file

    def counted(path: Any) -> Any:
        loads.append(path)
        return load_file(path)

    monkeypatch.setattr(files, "load_file", counted)
    embedder = WordLlamaEmbedder()
    assert loads == []
    with ThreadPoolExecutor(4) as pool:
        vectors = list(pool.map(lambda _: embedder.embed(["tea"])[0].tolist(), range(8)))
    assert len(loads) == 1
    assert all(vector == vectors[0] for vector in vectors)


def test_without_the_package_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    """The error comes at construction, not at the first search."""
    monkeypatch.setattr("memstate_sa.embedders.find_spec", lambda _: None)
    with pytest.raises(MissingExtra, match=r"memstate-sa\[wordllama\]"):
        WordLlamaEmbedder()


# -- Chroma's embedding functions -------------------------------------------------------------------------------------

chroma_types = pytest.importorskip("chromadb.api.types")


class Lengths(chroma_types.EmbeddingFunction):  # type: ignore[misc,name-defined]
    """A modern embedding function of Chroma: named, configured, asymmetric."""

    def __init__(self, model_name: str = "small") -> None:
        self.model_name = model_name
        self.calls: list[list[str]] = []

    def __call__(self, input: Any) -> Any:
        self.calls.append(list(input))
        return [np.array([len(text), 1, 0], dtype=np.float32) for text in input]

    def embed_query(self, input: Any) -> Any:
        return [np.array([len(text), 0, 1], dtype=np.float32) for text in input]

    @staticmethod
    def name() -> str:
        return "lengths"

    def get_config(self) -> dict[str, Any]:
        return {"model_name": self.model_name}


class Nameless(chroma_types.EmbeddingFunction):  # type: ignore[misc,name-defined]
    """An embedding function as in Chroma's older documentation."""

    def __init__(self) -> None:
        pass

    def __call__(self, input: Any) -> Any:
        return [np.array([len(text), 1], dtype=np.float32) for text in input]


def test_chromas_functions_embed() -> None:
    """Texts are embedded by a call of the function, and queries by its embed_query."""
    embedder = ChromaEmbedder(Lengths())
    assert checked(embedder, ["ab", "abc"]).tolist() == [[2, 1, 0], [3, 1, 0]]
    assert embed_query(embedder, "abcd").tolist() == [4, 0, 1]
    nameless = ChromaEmbedder(Nameless())
    assert checked(nameless, ["ab"]).tolist() == [[2, 1]]
    assert embed_query(nameless, "ab").tolist() == [2, 1]


def test_the_dimension_is_found_by_one_call() -> None:
    """The model is called at the first use of the dimension, once, and not at construction."""
    function = Lengths()
    embedder = ChromaEmbedder(function)
    assert function.calls == []
    assert (embedder.dimension, embedder.dimension, len(function.calls)) == (3, 3, 1)
    given = Lengths()
    assert (ChromaEmbedder(given, dimension=7).dimension, given.calls) == (7, [])


def test_the_fingerprint_tells_models_apart() -> None:
    """The fingerprint depends on name and configuration. It is stable and readable, and can be set."""
    small, large = ChromaEmbedder(Lengths("small")).fingerprint, ChromaEmbedder(Lengths("large")).fingerprint
    assert small.startswith("chroma:lengths:small:")
    assert large.startswith("chroma:lengths:large:")
    assert small == ChromaEmbedder(Lengths("small")).fingerprint
    assert ChromaEmbedder(Lengths(), fingerprint="mine:1").fingerprint == "mine:1"


def test_a_nameless_function_is_known_by_its_class() -> None:
    """The function's name is not read, because that would cause a DeprecationWarning."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert ChromaEmbedder(Nameless()).fingerprint == f"chroma:{__name__}.Nameless"


def test_a_failing_function_is_an_embedder_that_fails() -> None:
    """The call for the dimension fails in the same way."""

    class Down(Lengths):
        def __call__(self, input: Any) -> Any:
            raise ConnectionError

    with pytest.raises(DeliveryRetryable, match="lengths"):
        _ = ChromaEmbedder(Down()).dimension


# -- for tests ---------------------------------------------------------------------------------------------------------


def test_hash_embedder_is_deterministic() -> None:
    """Vectors are always the same, with length 1. Similar spelling is near, and blank text has a zero vector."""
    embedder = HashEmbedder()
    vectors = checked(embedder, ["I like green tea", "I like green teas", "quarterly invoice", " ", "\ud800"])
    assert np.linalg.norm(vectors, axis=1).tolist() == pytest.approx([1, 1, 1, 0, 1])
    assert cosine(vectors[0], vectors[1]) > cosine(vectors[0], vectors[2])
    assert np.flatnonzero(embedder.embed(["tea"])[0]).tolist() == [8, 17, 48]


@pytest.mark.parametrize("embedder", [HashEmbedder(16), Scripted(None)], ids=lambda e: type(e).__name__)
def test_embedders_are_embedders(embedder: Embedder) -> None:
    """The protocol can be checked at run time, with plain attributes too."""
    assert isinstance(embedder, Embedder)
    assert not isinstance(object(), Embedder)
