"""Positions: every entry is delivered, in any order of commits."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from hypothesis import given, strategies as st

from memstate_sa.log.positions import SLOTS, Position, Snapshot, meet, slot_of

Entry = tuple[int, int]
"""(xid, id)"""


class Database(NamedTuple):
    """Transactions in the order of their xids, with each one's end and number of entries."""

    ends: Sequence[int]
    entries: Sequence[Entry]

    def snapshot(self, now: int) -> Snapshot:
        """The snapshot at moment *now*: transaction n takes its xid, 10 + n, at moment n."""
        running = tuple(10 + n for n, end in enumerate(self.ends) if n < now < end)
        return Snapshot(10 + min(now, len(self.ends)), running)

    def page(self, at: Position, present: Position, limit: int) -> list[Entry]:
        found = [
            (xid, id_)
            for xid, id_ in self.entries
            if present.snapshot.sees(xid)
            and not at.snapshot.sees(xid)
            and (xid, id_) not in {(at.xid, n) for n in range(at.id + 1)}
        ]
        return sorted(found)[:limit]


@st.composite
def databases(draw: st.DrawFn) -> Database:
    lengths = draw(st.lists(st.integers(1, 12), min_size=1, max_size=8))
    order = draw(st.permutations([n for n in range(len(lengths)) for _ in range(draw(st.integers(0, 3)))]))
    return Database(
        [n + length for n, length in enumerate(lengths)], [(10 + n, id_) for id_, n in enumerate(order, start=1)]
    )


snapshots = st.builds(
    lambda xmax, running: Snapshot(xmax, tuple(sorted(xid for xid in running if xid < xmax))),
    st.integers(1, 12),
    st.sets(st.integers(0, 11)),
)
positions = st.builds(Position, snapshots, st.integers(0, 11), st.integers(0, 3))


@given(databases(), st.integers(1, 3), st.data())
def test_pages_deliver_everything(database: Database, limit: int, data: st.DataObject) -> None:
    """Late commits are neither skipped nor waited for. An entry is not seen before its transaction ends."""
    at, delivered, now = Position(Snapshot(10)), set[Entry](), 0
    last = max(database.ends) + 1
    page: list[Entry] = []
    while now < last or page or not at.covers(Position(database.snapshot(last))):
        present = Position(database.snapshot(now))
        page = database.page(at, present, limit)
        assert all(present.snapshot.sees(xid) for xid, _ in page)
        delivered.update(page)
        at = at.advance(present, page[-1] if len(page) == limit else None)
        # The position covers the delivered entries, and no others.
        for entry in database.entries:
            says = at.snapshot.sees(entry[0]) or (entry[0] == at.xid and entry[1] <= at.id)
            assert not says or entry in delivered
        now = min(last, now + data.draw(st.integers(0, 2)) + (not page))
    assert delivered == set(database.entries)


@given(st.integers(0, 40), st.integers(1, 5))
def test_sqlite_pages_by_id(newest: int, limit: int) -> None:
    """The same arithmetic works where every entry has xid 0."""
    at, delivered = Position(Snapshot(0)), list[int]()
    present = Position(Snapshot(0), 0, newest)
    while not at.covers(present):
        ids = [id_ for id_ in range(1, newest + 1) if id_ > at.id][:limit]
        delivered += ids
        at = at.advance(present, (0, ids[-1]) if len(ids) == limit else None)
    assert delivered == list(range(1, newest + 1))
    assert at.advance(Position(Snapshot(0), 0, 0), None) == at  # the outbox was emptied


@given(snapshots)
def test_snapshot_survives_as_text(snapshot: Snapshot) -> None:
    """The text is PostgreSQL's own form."""
    assert Snapshot.parse(str(snapshot)) == snapshot


@given(snapshots, snapshots)
def test_snapshots_compare_by_the_entries_they_see(one: Snapshot, other: Snapshot) -> None:
    """Inclusion may miss a later snapshot that sees no more entries. The intersection is exact."""
    sees = [{xid for xid in range(14) if snapshot.sees(xid)} for snapshot in (one, other)]
    assert one.includes(other) == (sees[0] >= sees[1] and one.xmax >= other.xmax)
    assert {xid for xid in range(14) if one.meet(other).sees(xid)} == sees[0] & sees[1]
    assert all(one.sees(xid) for xid in range(one.xmin))


def holds(at: Position) -> set[Entry]:
    everything = [(xid, id_) for xid in range(13) for id_ in range(1, 5)]
    return {(xid, id_) for xid, id_ in everything if at.snapshot.sees(xid) or (xid == at.xid and id_ <= at.id)}


@given(positions, positions)
def test_positions_compare_by_delivered_entries(one: Position, other: Position) -> None:
    """`covers` never claims too much. Entries below `meet`, or below a floor, are delivered at both positions."""
    if one.covers(other):
        assert holds(one) >= holds(other)
    assert holds(meet([one, other])) <= holds(one) & holds(other)
    assert meet([one, one]) == one
    assert {entry for entry in holds(Position(Snapshot(13))) if entry <= one.floor} <= holds(one)


def test_slots_never_change() -> None:
    """Stored slots depend on this function."""
    assert SLOTS == 64
    assert [slot_of("note", f"[{n}]") for n in range(4)] == [53, 40, 54, 1]
