"""Marks: they tell whether an index or its database was restored from a backup.

A restore of the database takes back all our tables. So each index keeps a mark beside its points, and a row of the
database has the same mark. Before relays write to the index, they begin a page: the row gets a new random mark, then
the index gets it. If the row does not know the mark of an index, the index was filled from another past of the
database.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple
from uuid import uuid4

from sqlalchemy import Row, select, update
from sqlalchemy.engine import Connection

from memstate_sa.db.dialects import database_of
from memstate_sa.db.statements import take_write_lock
from memstate_sa.db.tables import past
from memstate_sa.indexes.base import VectorIndex, keeps_mark
from memstate_sa.log.outbox import slots
from memstate_sa.relay.index_key import IndexKey, of_index

NONE = ""
"""The result of `kept_by` for an index that can keep a mark, but has none."""


class Mark(NamedTuple):
    """The number of a page, and its random name."""

    page: int
    name: str

    def __str__(self) -> str:
        return f"{self.page}.{self.name}"

    @classmethod
    def parse(cls, text: str) -> Mark:
        """The mark in an index's text. A foreign text becomes a page that no database knows."""
        page, _, name = text.partition(".")
        return cls(int(page), name) if page.isdecimal() else cls(0, text)

    @classmethod
    def new(cls, page: int) -> Mark:
        return cls(page, uuid4().hex[:12])


@dataclass(frozen=True, slots=True)
class Past:
    """The past of an index in the database: the number of its page, and the names of this and the earlier pages.

    ``refused`` is the foreign mark that the index had when it was last compared in full.
    """

    page: int
    names: tuple[str, ...]
    refused: str | None = None

    @property
    def mark(self) -> Mark:
        return Mark(self.page, self.names[0])

    def knows(self, mark: Mark) -> bool:
        """Whether *mark* is one of the last pages of this past."""
        return 0 <= self.page - mark.page < len(self.names) and self.names[self.page - mark.page] == mark.name

    def fits(self, kept: str | None, *, alone: bool) -> bool:
        """Whether an index that keeps the mark *kept* was filled from this past.

        Such an index is never ahead. The index may be some pages behind, because a relay may have ended after it wrote
        the row, and before it wrote to the index. Only a relay that is *alone* can tell the distance: other relays
        would begin pages at the same time.
        """
        if kept is None or kept == self.refused:  # the index keeps no marks, or it is being compared already
            return True
        if kept == NONE:
            return not alone or self.page < len(self.names)
        mark = Mark.parse(kept)
        return self.knows(mark) if alone else not self.is_before(mark)

    def is_before(self, mark: Mark) -> bool:
        """Whether the database was restored to a state before *mark*."""
        return mark.page > self.page or (self.page - mark.page < len(self.names) and not self.knows(mark))

    def next(self, most: int) -> Past:
        """This past after its next page has begun. It keeps at most *most* names."""
        return Past(self.page + 1, (Mark.new(0).name, *self.names[: most - 1]))

    def values(self) -> dict[str, Any]:
        return {"page": self.page, "names": " ".join(self.names), "refused": self.refused}


def beginning() -> Past:
    return Past(0, (Mark.new(0).name,))


def kept_by(index: VectorIndex) -> str | None:
    """The mark that *index* keeps: `NONE` if it has no mark yet, and None if it cannot keep marks."""
    return (index.read_mark() or NONE) if keeps_mark(index) else None


# -- in the database ---------------------------------------------------------------------------------------------------

columns: tuple[Any, ...] = (past.c.page, past.c.names, past.c.refused)


def as_past(row: Sequence[Any]) -> Past | None:
    """The past in a row of `columns`; None if there is no row."""
    page, names, refused = row
    return None if page is None else Past(page, tuple(names.split(" ")), refused)


_row = select(*columns).where(of_index(past)).with_for_update()


def _locked(connection: Connection, index: IndexKey) -> Past | None:
    take_write_lock(connection)
    row: Row[Any] | None = connection.execute(_row, index.parameters()).one_or_none()
    return None if row is None else as_past(row)


def _save(connection: Connection, index: IndexKey, new: Past) -> None:
    connection.execute(update(past).where(of_index(past)).values(**new.values()), index.parameters())


def begin_page(connection: Connection, index: IndexKey) -> Past | None:
    """Begin the next page, and return the new past; None if *index* is unknown."""
    old = _locked(connection, index)
    if old is None:
        return None
    # Keep one more name than there can be relays: each may have ended before it wrote its mark to the index.
    new = old.next(len(slots(database_of(connection))) + 1)
    _save(connection, index, new)
    return new


def compare(
    connection: Connection, index: IndexKey, kept_mark: str | None, *, alone: bool, went_back: bool
) -> tuple[Past, bool]:
    """Compare the mark of *index* with its past. Return the past, and True if a new one has begun.

    A new past begins if the index was filled from another past, or if the relay *went_back*. It has then seen a later
    page than the database has. *kept_mark* is the mark that the index had before this transaction. *alone*: no other
    relay lives. An index without a mark fits a database that has just begun to count pages.
    """
    first = {**index.values(), **beginning().values()}
    connection.execute(database_of(connection).upsert(past).on_conflict_do_nothing(), first)
    old = _locked(connection, index)
    assert old is not None
    if old.fits(kept_mark, alone=alone) and not went_back:
        return old, False
    latest_page = max(old.page, Mark.parse(kept_mark or "").page)
    new = Past(latest_page + 1, (Mark.new(0).name,), kept_mark)  # a page that no relay has seen
    _save(connection, index, new)
    return new, True


# -- in a relay --------------------------------------------------------------------------------------------------------


@dataclass
class Bookmark:
    """The last mark that one relay has seen, and whether the index has it."""

    mark: Mark | None = None
    went_back: bool = False
    is_begun: bool = False
    index_has_mark: bool = False
    over_at: float = 0.0

    def claimed(self, now: Past) -> None:
        self.mark, self.went_back, self.is_begun, self.index_has_mark = now.mark, False, False, False

    def begun(self, over_at: float) -> None:
        self.is_begun, self.index_has_mark, self.over_at = True, False, over_at

    def end_page(self, now: float) -> None:
        """End the page if its time is over and the index has its mark. The next write then begins a new page."""
        if self.index_has_mark and now >= self.over_at:
            self.is_begun = False

    def sees(self, now: Past | None) -> bool:
        """Remember the present past *now* of the database. Return whether our claims were made in it."""
        if self.mark is not None:
            self.went_back |= now is not None and now.is_before(self.mark)
            if now is None or self.went_back:
                return False
            if now.page > self.mark.page:
                self.mark = now.mark
        return True
