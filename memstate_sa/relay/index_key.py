"""`IndexKey`: the key of all tables that hold the state of relays."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

from sqlalchemy import BindParameter, ColumnElement, Table, and_, bindparam

from memstate_sa.db.dialects import Database
from memstate_sa.db.json_params import row_value, unnest_rows
from memstate_sa.db.statements import upsert_select


class IndexKey(NamedTuple):
    """One incarnation of an index. It is part of the key of all tables that hold the state of relays."""

    name: str
    incarnation: str

    def values(self) -> dict[str, str]:
        """Column values for an INSERT."""
        return {"index": self.name, "incarnation": self.incarnation}

    def parameters(self) -> dict[str, str]:
        """Parameters of `of_index`."""
        return {"the_index": self.name, "the_incarnation": self.incarnation}


def insert_rows(database: Database, table: Table, names: Sequence[str], *common: BindParameter[Any]) -> Any:
    """An INSERT of the parameter ``rows`` (`json_params.unnest_rows`) with the columns *names*.

    The statement also needs the parameters of `of_index`. *common*: parameters that are the same in all rows, named
    like their columns. An ON CONFLICT clause may follow.
    """
    rows, key = unnest_rows("rows"), ("index", "incarnation")
    values: dict[str, Any] = {name: bindparam(f"the_{name}", type_=table.c[name].type) for name in key}
    values |= {parameter.key: parameter for parameter in common}
    values |= {name: row_value(rows, n, table.c[name].type) for n, name in enumerate(names)}
    return upsert_select(database, table, values)


def of_index(table: Table) -> ColumnElement[bool]:
    return and_(table.c.index == bindparam("the_index"), table.c.incarnation == bindparam("the_incarnation"))
