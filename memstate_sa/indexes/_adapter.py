"""The code that adapters share: the open state, errors of the vendor's client, the ids of a running scan."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import ClassVar, NamedTuple

from memstate_sa.errors import DeliveryError, DeliveryRejected, DeliveryRetryable, MemstateError
from memstate_sa.indexes.provider_errors import delivery_error
from memstate_sa.runtime.display import summary

REMEMBERED_S = 86_400
"""The epoch of a deleted id is remembered for this time. A late request of a relay that lost its claim takes less."""


class OpenState(NamedTuple):
    """The arguments with which an index was opened, and its incarnation if the adapter needs it."""

    embedder: str
    dimension: int
    incarnation: str = ""


class Adapter:
    """The base of indexes that need `open`, and have a vendor's client with its own errors."""

    _vendor: ClassVar[str] = ""
    """The name of the vendor, for messages."""

    _opened: OpenState | None = None

    @property
    def _open_state(self) -> OpenState:
        if self._opened is None:
            raise MemstateError("This index is not open. Call open() first.")
        return self._opened

    @property
    def _dimension(self) -> int:
        return self._open_state.dimension

    @property
    def _place(self) -> str:
        """The place of the points, for messages: a collection, a table or a folder."""
        raise NotImplementedError

    def __repr__(self) -> str:
        opened = self._opened
        state = "not open" if opened is None else f"{opened.dimension} dimensions by {opened.embedder}"
        return summary(self, self._place, state)

    @contextmanager
    def _translated(self, action: str, *, sends_facts: bool = True) -> Iterator[None]:
        """Turn each error of the client into a DeliveryError. *action* is a verb, for the message.

        *sends_facts*: the vendor's words may quote a fact, so the message leaves them out.
        """
        try:
            yield
        except MemstateError:
            raise
        except Exception as error:
            message = f"{self._vendor} could not {action} {self._place}"
            raise self._delivery_error(error, message, None if sends_facts else ()) from error

    def _delivery_error(self, error: Exception, message: str, sent: Sequence[str] | None) -> DeliveryError:
        # Clients refuse values with ValueError and TypeError. Other errors, such as a closed client, have nothing to do
        # with the points, so trying again may help.
        is_refusal = isinstance(error, ValueError | TypeError)
        return delivery_error(error, message, unknown=DeliveryRejected if is_refusal else DeliveryRetryable, sent=sent)


class IdListing:
    """A sorted list of all ids, which lives for one scan. It is for vendors that do not list ids in sorted order."""

    def __init__(self) -> None:
        self._listing: tuple[str, list[str]] | None = None

    def clear(self) -> None:
        self._listing = None

    def pages(
        self, incarnation: str, after: str | None, size: int, read_ids: Callable[[], Iterable[str]]
    ) -> Iterator[list[str]]:
        """The ids greater than *after*, in pages.

        *read_ids* is called for a list if *after* is None, or if there is no list for *incarnation*.
        """
        listing = self._listing
        if after is None or listing is None or listing[0] != incarnation:
            listing = self._listing = (incarnation, sorted(read_ids()))
        ids = listing[1]
        for start in range(0 if after is None else bisect_right(ids, after), len(ids), size):
            yield ids[start : start + size]
        self.clear()


def id_bytes(id_: str) -> bytes:
    """*id_* in UTF-8. Raises DeliveryRejected if it is not Unicode text."""
    try:
        return id_.encode()
    except UnicodeEncodeError as error:
        raise DeliveryRejected(f"Invalid id {id_!r}: it is not Unicode text. Change the key of the fact.") from error


def file_identity(path: Path) -> tuple[int, int] | None:
    """Device and inode of a file, or None if there is no file. They change when the file is deleted or replaced."""
    try:
        status = path.stat()
    except OSError:
        return None
    return status.st_dev, status.st_ino
