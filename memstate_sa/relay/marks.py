"""Marks: they tell whether an index or its database was restored from a backup, and so one is ahead of the other.

A restore takes back every table of ours. So each index keeps a mark beside its points, and a row of the database says
which mark that has to be. Before relays write to the index they begin a page: the row gets a new random mark, then the
index does. An index with a mark that the row does not know was filled from another past of this database.
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
"""The answer of `kept_by` for an index that could keep a mark, and has none."""


class Mark(NamedTuple):
    """A page, by its number and a random name."""

    page: int
    name: str

    def __str__(self) -> str:
        return f"{self.page}.{self.name}"

    @classmethod
    def parse(cls, text: str) -> Mark:
        """The mark that an index keeps. A foreign text becomes a page that no database knows."""
        page, _, name = text.partition(".")
        return cls(int(page), name) if page.isdecimal() else cls(0, text)

    @classmethod
    def new(cls, page: int) -> Mark:
        return cls(page, uuid4().hex[:12])


@dataclass(frozen=True, slots=True)
class Past:
    """The past of an index in the database: the number of its page, and the names of that page and those before it.

    ``refused`` is the mark of another past that the index had when it was last compared in full.
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

        Such an index is never ahead. It may be some pages behind: a relay may have ended after it wrote the row, and
        before it wrote to the index. Only a relay that is *alone* can tell how far: others go on while it looks.
        """
        if kept is None or kept == self.refused:  # it keeps no marks; or it is being compared already
            return True
        if kept == NONE:
            return not alone or self.page < len(self.names)
        mark = Mark.parse(kept)
        return self.knows(mark) if alone else not self.is_before(mark)

    def is_before(self, mark: Mark) -> bool:
        """Whether the database was at *mark* once, and is not any more, as it was restored."""
        return mark.page > self.page or (self.page - mark.page < len(self.names) and not self.knows(mark))

    def next(self, most: int) -> Past:
        """The past with another page, and with *most* names at most."""
        return Past(self.page + 1, (Mark.new(0).name, *self.names[: most - 1]))

    def values(self) -> dict[str, Any]:
        return {"page": self.page, "names": " ".join(self.names), "refused": self.refused}


def beginning() -> Past:
    return Past(0, (Mark.new(0).name,))


def kept_by(index: VectorIndex) -> str | None:
    """The mark that *index* keeps, `NONE` when there is none; None of an index that keeps no marks."""
    return (index.read_mark() or NONE) if keeps_mark(index) else None


# -- in the database ---------------------------------------------------------------------------------------------------

columns: tuple[Any, ...] = (past.c.page, past.c.names, past.c.refused)


def as_past(row: Sequence[Any]) -> Past | None:
    """The past in a row of `columns`; None without one."""
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
    """Begin the next page; None when *index* is unknown."""
    known = _locked(connection, index)
    if known is None:
        return None
    # One more name than there can be relays, each of which may have ended before it wrote to the index.
    new = known.next(len(slots(database_of(connection))) + 1)
    _save(connection, index, new)
    return new


def compare(
    connection: Connection, index: IndexKey, kept_mark: str | None, *, alone: bool, went_back: bool
) -> tuple[Past, bool]:
    """The past of *index*, and whether the index was filled from another one: then another one has begun.

    *kept_mark* is the mark that the index had before this transaction. *alone*: no other relay lives. *went_back*: the
    relay has seen a later page. An index without a mark fits a database that has just begun to count pages.
    """
    first = {**index.values(), **beginning().values()}
    connection.execute(database_of(connection).upsert(past).on_conflict_do_nothing(), first)
    known = _locked(connection, index)
    assert known is not None
    if known.fits(kept_mark, alone=alone) and not went_back:
        return known, False
    latest = max(known.page, Mark.parse(kept_mark or "").page)  # a page that no relay has seen
    another = Past(latest + 1, (Mark.new(0).name,), kept_mark)
    _save(connection, index, another)
    return another, True


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
        """Have another page begun before the next write, if the index has the mark of this one, and it has lasted."""
        if self.index_has_mark and now >= self.over_at:
            self.is_begun = False

    def sees(self, now: Past | None) -> bool:
        """Note the past *now* of the database, and return whether we claimed in it."""
        if self.mark is not None:
            self.went_back |= now is not None and now.is_before(self.mark)
            if now is None or self.went_back:
                return False
            if now.page > self.mark.page:
                self.mark = now.mark
        return True
