"""The key of every table of relay state."""

from __future__ import annotations

from typing import NamedTuple

from sqlalchemy import ColumnElement, Table, and_, bindparam


class IndexKey(NamedTuple):
    """One lifetime of one index. Every table of relay state is keyed by it."""

    name: str
    incarnation: str

    def values(self) -> dict[str, str]:
        """Column values for an INSERT."""
        return {"index": self.name, "incarnation": self.incarnation}

    def parameters(self) -> dict[str, str]:
        """Parameters of `of_index`."""
        return {"the_index": self.name, "the_incarnation": self.incarnation}


def of_index(table: Table) -> ColumnElement[bool]:
    return and_(table.c.index == bindparam("the_index"), table.c.incarnation == bindparam("the_incarnation"))
