"""The operator's view of a provider's failure."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given, strategies as st

from memstate_sa.errors import DeliveryRejected, DeliveryRetryable
from memstate_sa.indexes.provider_errors import delivery_error
from memstate_sa.runtime.printable import printable

TEXT = "My password is hunter2, do not tell"


class Response:
    def __init__(self, status: int, answer: Any, content: bytes = b"") -> None:
        self.headers: dict[str, str] = {}
        self.status_code, self._answer, self._content = status, answer, content

    def json(self) -> Any:
        if self._answer is None:
            raise ValueError("no JSON")
        return self._answer


class HTTPError(Exception):
    def __init__(self, response: Response, message: str = "Client error '400' for url 'http://a/b?key=1'") -> None:
        super().__init__(message)
        self.response = response


def reason_of(error: Exception, *sent: str) -> str:
    return str(delivery_error(error, "failed", unknown=DeliveryRejected, sent=sent))


@pytest.mark.parametrize(
    ("answer", "words"),
    [
        ({"error": "input exceeds 8192 tokens"}, ": input exceeds 8192 tokens"),
        ({"error": {"message": "too long", "code": 7}}, ": too long"),
        ({"detail": [{"loc": ["body"], "msg": "field required"}]}, ": field required"),
        ({"errors": ["a", "b"]}, ": a"),
        ({"status": {"error": "Wrong input"}}, ""),
        ({"error": {}}, ""),
        ({"error": None}, ""),
        ("plain", ": plain"),
        ({"error": "one\ntwo"}, ": one"),
        ({"error": "\x1b[31mred\x07"}, r": \u001b[31mred\u0007"),
        (None, ""),
    ],
)
def test_status_and_words_of_an_answer_are_told(answer: Any, words: str) -> None:
    """The cases: answers of OpenAI, Cohere, Ollama, TEI, FastAPI and other clients, and a gateway's HTML page."""
    assert reason_of(HTTPError(Response(400, answer))) == f"failed: HTTPError: 400 Bad Request{words}"
    assert reason_of(HTTPError(Response(400, None, b"<html>Bad</html>"))) == "failed: HTTPError: 400 Bad Request"
    assert reason_of(HTTPError(Response(400, None, b"busy\nnow"))) == "failed: HTTPError: 400 Bad Request: busy"


def test_status_without_a_name_is_told() -> None:
    error = HTTPError(Response(529, {"error": {"message": "overloaded"}}))
    assert reason_of(error) == "failed: HTTPError: 529: overloaded"
    assert isinstance(delivery_error(error, "failed", unknown=DeliveryRejected), DeliveryRetryable)


def test_words_stay_in_the_chain_where_the_sent_text_is_unknown() -> None:
    """An index's client may quote metadata, which we cannot remove from its words."""
    error = HTTPError(Response(400, {"error": TEXT}))
    assert str(delivery_error(error, "failed", unknown=DeliveryRejected)) == "failed: HTTPError: 400 Bad Request"


@pytest.mark.parametrize("status", [401, 403, 429])
def test_words_of_a_refused_caller_are_told_where_the_sent_text_is_unknown(status: int) -> None:
    error = HTTPError(Response(status, {"error": "wrong key"}))
    assert str(delivery_error(error, "failed", unknown=DeliveryRejected)).endswith(": wrong key")


def test_words_of_a_failed_connection_are_told_where_the_sent_text_is_unknown() -> None:
    """As of qdrant-client, which wraps httpx's error."""
    error = RuntimeError("[Errno 111] Connection refused")
    error.__cause__ = ConnectionRefusedError(111, "Connection refused")
    message = str(delivery_error(error, "failed", unknown=DeliveryRejected))
    assert message == "failed: RuntimeError: [Errno 111] Connection refused"


@pytest.mark.parametrize(
    "words",
    [
        f"bad input: {TEXT}",
        f"bad input: {TEXT!r}",
        f"bad input: {TEXT[:20]}...",
        f"bad input: {TEXT.upper()}",
        "bad input: My  password is\thunter2,",
    ],
)
@pytest.mark.parametrize("wrapped", [True, False])
def test_text_that_was_sent_is_left_out(words: str, wrapped: bool) -> None:
    """The text may be whole, cut, quoted or in capitals, in an HTTP answer or in an exception of a local model."""
    error = HTTPError(Response(422, {"detail": words})) if wrapped else ValueError(words)
    message = reason_of(error, "another text", TEXT)
    assert "bad input: " in message
    assert "hunter2" not in message.lower()
    assert "password" not in message.lower()


def test_secrets_of_an_address_are_left_out() -> None:
    error = RuntimeError("cannot reach https://me:secret@api.example/v1/embed?key=abc#top of it")
    assert reason_of(error) == "failed: RuntimeError: cannot reach https://api.example/v1/embed of it"


def test_words_are_short() -> None:
    assert len(reason_of(ValueError("x" * 10_000))) < 300


@given(st.text(min_size=12, max_size=60).filter(lambda text: len(text.split()) == 1), st.text(max_size=30))
def test_no_long_piece_of_a_text_is_told(text: str, around: str) -> None:
    """No piece is shown, with any characters in the text."""
    words = f"{around} {text} {around}"
    message = reason_of(ValueError(words), text)
    assert text not in message or text in around
    assert printable(message) == message
