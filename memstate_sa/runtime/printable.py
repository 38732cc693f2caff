"""Makes foreign text safe to print: a label or a key must not control the terminal."""

from __future__ import annotations

import logging
import re

# C0 and C1 controls, line separators, the characters that reorder text, and surrogates, which no terminal can encode.
_CONTROL = re.compile("[\x00-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")


def printable(text: str, *, keep: str = "") -> str:
    r"""*text* with its control characters as ``\u001b``, except those in *keep*.

    JSON has the same escapes, so JSON text keeps its meaning.
    """
    return _CONTROL.sub(lambda match: match[0] if match[0] in keep else f"\\u{ord(match[0]):04x}", text)


class _PrintableRecord(logging.Filter):
    """Escape control characters in a record's arguments and traceback. Its template has none, as it is ours."""

    def filter(self, record: logging.LogRecord) -> bool:
        if isinstance(record.args, tuple):
            record.args = tuple(
                printable(str(value)) if isinstance(value, str | BaseException) else value for value in record.args
            )
        if record.exc_info:
            # If this text is set, a formatter uses it as the traceback.
            record.exc_text = printable(logging.Formatter().formatException(record.exc_info), keep="\n\t")
        return True


def printable_logger(name: str) -> logging.Logger:
    """The logger *name*. Its records contain no control characters from data."""
    logger = logging.getLogger(name)
    if not any(isinstance(known, _PrintableRecord) for known in logger.filters):
        logger.addFilter(_PrintableRecord())
    return logger
