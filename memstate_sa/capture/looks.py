"""The log of a class, as capture uses it: look at its rows before they change, and log the changes afterwards."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from datetime import datetime
from typing import Any, NamedTuple, Protocol

from sqlalchemy.engine import Connection

from memstate_sa.db.codec import Image
from memstate_sa.db.statements import batches
from memstate_sa.log.changes import LogEntry

RawKey = tuple[Any, ...]
"""A primary key as the driver takes and returns it."""


class Header(NamedTuple):
    """The values that all entries of a statement share."""

    tx: str
    at: datetime
    version: int
    step: bool


class Look(NamedTuple):
    """A batch of keys, and their rows before the change: by canonical key, an image or None.

    Only a row without an entry in the log has an image here. With ``remembered`` no row was read, as the log should
    have an entry of each key. `ClassLog.log` raises `NoEntry` if one is missing.
    """

    keys: Sequence[RawKey]
    rows: Mapping[str, str | None]
    remembered: bool = False


class NoEntry(Exception):  # a signal to `Recorder`, which reports it
    """The log has lost the entry of a known key."""


def with_others(looks: Sequence[Look], keys: Iterable[RawKey]) -> list[Look]:
    """*looks*, and further looks for the other *keys*, which had no row."""
    seen = {key for look in looks for key in look.keys}
    others = [key for key in keys if key not in seen]
    return [*looks, *(Look(batch, {}) for batch in batches(others))]


class Logged(NamedTuple):
    """The number of changed rows, and their entries if Python must check them."""

    changed: int = 0
    entries: Sequence[LogEntry] = ()


class ClassLog(Protocol):
    """Logs the rows of one class in one database: `TableLog`, or `ReadLog` where SQL cannot write its images."""

    def look(self, connection: Connection, keys: Sequence[RawKey]) -> list[Look]:
        """The rows of *keys* before they change, in batches."""

    def images(self, connection: Connection, keys: Sequence[RawKey]) -> dict[str, Image]:
        """The images of the rows of *keys*, in the form that `log` gives them."""

    def count(self, connection: Connection, keys: Sequence[RawKey]) -> int:
        """The number of *keys* that have a row in the table, of any class."""

    def log(self, connection: Connection, header: Header, look: Look, *, new: bool) -> Logged:
        """Log the changes of the rows of *look*, and mark them dirty.

        With *new*, the transaction has inserted all of them, and they are not compared with the log.
        """
