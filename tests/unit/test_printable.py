"""Text from outside, shown with escapes."""

from __future__ import annotations

import json
import logging
import unicodedata
from collections.abc import Iterator

import pytest
from hypothesis import given, strategies as st

from memstate_sa.errors import ConflictError, DeliveryRejected, MemstateError
from memstate_sa.runtime.printable import printable, printable_logger

CONTROLS = "\x00\x07\x1b[2J\x7f\x9b31m\u2028\u202e\u2066\ud800"


@given(st.text())
def test_printable_text_drives_no_terminal_and_means_the_same_in_json(text: str) -> None:
    assert not {unicodedata.category(character) for character in printable(text)} & {"Cc", "Cs", "Zl", "Zp"}
    quoted = json.dumps(text, ensure_ascii=False)
    assert json.loads(printable(quoted)) == text


def test_printable_keeps_line_ends_where_asked() -> None:
    assert printable("a\nb\x1b", keep="\n") == "a\nb\\u001b"
    assert printable("naïve – 🙂 日本") == "naïve – 🙂 日本"


@pytest.mark.parametrize("kind", [MemstateError, ConflictError, DeliveryRejected])
def test_error_messages_hold_no_control_characters(kind: type[MemstateError]) -> None:
    """A traceback prints messages to a terminal unchanged. All errors of ours are like these three."""
    assert str(kind(f"note[{CONTROLS}]")) == f"note[{printable(CONTROLS)}]"


@pytest.fixture
def records() -> Iterator[list[str]]:
    formatted: list[str] = []

    class Keep(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            formatted.append(self.format(record))

    logger, handler = printable_logger("memstate_sa.relay"), Keep()
    logger.addHandler(handler)
    yield formatted
    logger.removeHandler(handler)


def test_log_records_hold_no_control_characters(records: list[str]) -> None:
    """The text, the error and the traceback of a record have no control characters."""
    logger = logging.getLogger("memstate_sa.relay")
    logger.warning("%s refused %d: %s", CONTROLS, 3, ValueError(CONTROLS))
    try:
        raise ValueError(CONTROLS)
    except ValueError:
        logger.exception("it failed")
    shown = printable(CONTROLS)
    assert records[0] == f"{shown} refused 3: {shown}"
    assert records[1].endswith(f"ValueError: {shown}") and records[1].startswith("it failed\nTraceback")
