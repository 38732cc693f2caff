"""What capture asks of a class: to look at its rows before they change, and to log what became of them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from datetime import datetime
from typing import Any, NamedTuple, Protocol

from sqlalchemy.engine import Connection

from memstate_sa.db.codec import Image
from memstate_sa.db.statements import batches
from memstate_sa.log.changes import LogEntry

RawKey = tuple[Any, ...]
"""A primary key as the driver has it."""


class Header(NamedTuple):
    """What all entries of a statement share."""

    tx: str
    at: datetime
    version: int
    step: bool


class Look(NamedTuple):
    """A batch of keys, and the rows that they had: by canonical key, with the image where the log has not seen it.

    ``remembered``: there was no look, as the log is known to have an entry of each key. `ClassLog.log` raises `NoEntry`
    for a row of which it has none.
    """

    keys: Sequence[RawKey]
    rows: Mapping[str, str | None]
    remembered: bool = False


class NoEntry(Exception):  # it asks for another attempt
    """The log has no entry of a key that was known to have one."""


def with_others(looks: Sequence[Look], keys: Iterable[RawKey]) -> list[Look]:
    """*looks*, and batches of those *keys* that they lack: there was no row of them."""
    seen = {key for look in looks for key in look.keys}
    others = [key for key in keys if key not in seen]
    return [*looks, *(Look(batch, {}) for batch in batches(others))]


class Logged(NamedTuple):
    """How many rows have changed, and their entries where Python checks each of them."""

    changed: int = 0
    entries: Sequence[LogEntry] = ()


class ClassLog(Protocol):
    """Logs the rows of one class in one database: `TableLog`, or `ReadLog` where SQL cannot write its images."""

    def look(self, connection: Connection, keys: Sequence[RawKey]) -> list[Look]:
        """The rows of *keys* before they are changed, in batches."""

    def images(self, connection: Connection, keys: Sequence[RawKey]) -> dict[str, Image]:
        """The images of the rows of *keys*, in the form that `log` gives them."""

    def count(self, connection: Connection, keys: Sequence[RawKey]) -> int:
        """How many rows there are of *keys*, of whichever class in their table."""

    def log(self, connection: Connection, header: Header, look: Look, *, new: bool) -> Logged:
        """Log what became of the rows of *look*, and mark them dirty.

        *new*: the transaction has made all of them. Then the log is not asked what it knows of them.
        """
