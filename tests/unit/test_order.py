"""The order in which an undo writes rows keeps immediate constraints at each step."""

from __future__ import annotations

from itertools import count
from typing import Any

from hypothesis import assume, example, given, settings, strategies as st
from sqlalchemy import Column, ForeignKey, Integer, MetaData, Table

from memstate_sa.undo.order import (
    Columns,
    Kind,
    Order,
    Wait,
    Write,
    waits_for_references,
    waits_for_unique_values,
)

IDS = range(6)
NODE = Table(
    "node",
    MetaData(),
    Column("id", Integer, primary_key=True),
    Column("value", Integer, unique=True),
    Column("parent", ForeignKey("node.id")),
    Column("likes", ForeignKey("node.value")),
)
Rows = dict[int, dict[str, Any]]


def is_valid(rows: Rows) -> bool:
    """Whether unique values hold, and references to rows and values."""
    values = [row["value"] for row in rows.values() if row["value"] is not None]
    return len(values) == len(set(values)) and all(
        row["parent"] in (None, *rows) and row["likes"] in (None, *values) for row in rows.values()
    )


@st.composite
def tables(draw: st.DrawFn) -> Rows:
    ids = draw(st.sets(st.sampled_from(IDS)))
    values = draw(st.permutations(IDS))
    rows: Rows = {id_: {"id": id_, "value": draw(st.sampled_from([None, values[id_]]))} for id_ in ids}
    taken = [row["value"] for row in rows.values() if row["value"] is not None]
    for row in rows.values():
        row["parent"] = draw(st.sampled_from([None, *ids]))
        row["likes"] = draw(st.sampled_from([None, *taken]))
    return rows


def waits_of(writes: list[Write]) -> list[Wait]:
    waits = list(waits_for_unique_values(writes, (NODE.c.value,)))
    for key in NODE.foreign_key_constraints:
        waits += waits_for_references(writes, writes, key)
    return waits


def node(id_: int, value: int | None = None, parent: int | None = None, likes: int | None = None) -> Rows:
    return {id_: {"id": id_, "value": value, "parent": parent, "likes": likes}}


@settings(max_examples=500, deadline=None)
@given(current=tables(), final=tables())
@example(current=node(0, 1) | node(1, 2) | node(2, likes=1), final=node(0, 2) | node(1, 1) | node(2, likes=2))
@example(current=node(0, parent=5) | node(5, 1, likes=1), final=node(0, 1))
@example(current=node(0, parent=5) | node(4, likes=1) | node(5, 1), final=node(0, 1))
def test_no_step_breaks_a_constraint(current: Rows, final: Rows) -> None:
    """Values may move between rows, also in circles. A temporary value need not be known to the database."""
    # No row keeps a reference to a value that another row has now, because that needs ON UPDATE CASCADE.
    holders, new_holders = ({row["value"]: id_ for id_, row in rows.items()} for rows in (current, final))
    for id_ in current.keys() & final.keys():
        kept = current[id_]["likes"]
        if kept is not None and kept == final[id_]["likes"]:
            assume(holders[kept] == new_holders[kept])
    writes = []
    for id_ in sorted(current.keys() | final.keys()):
        kind = Kind.INSERT if id_ not in current else Kind.DELETE if id_ not in final else Kind.UPDATE
        writes.append(Write(NODE, str(id_), kind, current.get(id_), final.get(id_)))
    rows = {id_: dict(row) for id_, row in current.items()}
    cleared: list[tuple[Write, Columns]] = []
    replaced: list[Write] = []
    fresh = count(-1, -1)

    def clear(write: Write, columns: Columns) -> bool:
        cleared.append((write, columns))
        return True

    def replace(write: Write, _: Columns) -> bool:
        replaced.append(write)
        return True

    written = []
    for writes_now in Order(writes, waits_of(writes), clear, replace).rounds():
        while cleared:
            write, columns = cleared.pop()
            rows[int(write.key)].update({column.name: None for column in columns})
            assert is_valid(rows)
        while replaced:
            rows[int(replaced.pop().key)]["value"] = next(fresh)
            assert is_valid(rows)
        for write in writes_now:
            if write.final is None:
                del rows[int(write.key)]
            else:
                rows[int(write.key)] = {**write.final, **dict.fromkeys(write.postponed)}
            assert is_valid(rows)
            written.append(write)
    assert sorted(write.key for write in written) == sorted(write.key for write in writes)
    for write in writes:
        if write.postponed:
            rows[int(write.key)].update({name: write.final[name] for name in write.postponed if write.final})
            assert is_valid(rows)
    assert rows == final


def test_rows_that_wait_for_nothing_are_one_round() -> None:
    """Many rows need few statements."""
    writes = [Write(NODE, str(n), Kind.INSERT, None, {"id": n, "value": n, "parent": None}) for n in range(100)]
    never: Any = None
    assert list(Order(writes, waits_of(writes), never, never).rounds()) == [writes]
