"""A read that extends an item, beside a sweep that deletes it: it returns the item and keeps it, or returns None."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from datetime import timedelta
from typing import Any

import pytest
from sqlalchemy import Engine

pytest.importorskip("langgraph.store.base")

from langgraph.store.base import GetOp, PutOp, SearchOp

from memstate_sa import MemoryStore
from memstate_sa.indexes import InMemoryIndex
from memstate_sa.integrations.langgraph import MemStateStore, item_rows
from memstate_sa.testing import HashEmbedder
from tests.support import in_threads

NOTES = ("notes",)


@pytest.fixture
def store(engine: Engine) -> Iterator[MemStateStore]:
    """A store whose clock is one second before the end of "old"."""
    with MemoryStore(engine, InMemoryIndex(), embedder=HashEmbedder(), background=False) as facts:
        made = MemStateStore(facts)
        made.setup()
        now = made._now()
        made._now = lambda: now  # the clock stands still, however slow the machine is
        made.put(NOTES, "old", {"text": "apples"}, ttl=10)
        made.put(NOTES, "young", {"text": "apples"}, ttl=20)
        facts.memory.relay(engine).drain(60)
        made._now = lambda: now + timedelta(minutes=10, seconds=-1)
        yield made


def later(store: MemStateStore) -> None:
    now = store._now()
    store._now = lambda: now + timedelta(seconds=2)


def sweep_elsewhere(store: MemStateStore) -> int:
    """Sweep two seconds later, in another thread. In this thread it would join the reader's transaction."""
    later(store)
    counts: list[int] = []
    assert in_threads(1, lambda _: counts.append(store.sweep_ttl())) == []
    return counts[0]


def found(result: Any) -> list[str]:
    return sorted(item.key for item in result) if isinstance(result, list) else [result.key] if result else []


READS: dict[str, Callable[[MemStateStore], list[str]]] = {
    "get": lambda store: found(store.get(NOTES, "old", refresh_ttl=True)) + found(store.get(NOTES, "young")),
    "search": lambda store: found(store.search(NOTES)),
    "search by meaning": lambda store: found(store.search(NOTES, query="apples")),
    "batch": lambda store: [
        key for result in store.batch([GetOp(NOTES, "old"), SearchOp(NOTES)]) for key in found(result)
    ],
    "batch with a put": lambda store: found(
        store.batch([SearchOp(NOTES, filter={"text": "apples"}), PutOp(NOTES, "new", {"n": 1})])[0]
    ),
}


@pytest.mark.parametrize("read", READS)
def test_item_swept_before_it_is_prolonged_is_not_returned(
    store: MemStateStore, read: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same kind: a deleted item. A batch that writes takes SQLite's lock only after its reads."""
    keep, swept = item_rows.keep, list[int]()

    def sweep() -> None:
        if not swept:
            swept.append(sweep_elsewhere(store))

    def keep_late(connection: Any, kept: Any) -> None:
        sweep()
        keep(connection, kept)

    reading = store._read

    def read_and_sweep(session: Any, ops: Any) -> Any:
        result = reading(session, ops)
        if session.get_bind().dialect.name == "postgresql" and any(isinstance(op, PutOp) for op in ops):
            sweep()
        return result

    monkeypatch.setattr(item_rows, "keep", keep_late)
    monkeypatch.setattr(store, "_read", read_and_sweep)
    returned = READS[read](store)
    monkeypatch.undo()
    assert set(returned) == ({"young"} if swept else {"young", "old"})
    later(store)
    store.sweep_ttl()
    assert {item.key for item in store.search(NOTES, refresh_ttl=False)} - {"new"} == set(returned)


def test_item_prolonged_during_a_sweep_stays(store: MemStateStore, monkeypatch: pytest.MonkeyPatch) -> None:
    """PostgreSQL: the sweep skips rows that a reader locks. It checks rows again that a reader has just released."""
    if store.engine.dialect.name == "sqlite":
        pytest.skip("SQLite has one writer")
    keep, living, swept = item_rows._keep, item_rows.living, list[int]()

    def keep_slowly(connection: Any, kept: Any, there: Any) -> None:
        swept.append(sweep_elsewhere(store))
        keep(connection, kept, there)

    monkeypatch.setattr(item_rows, "_keep", keep_slowly)
    item = store.get(NOTES, "old", refresh_ttl=True)
    monkeypatch.undo()
    assert item is not None and swept == [0] and store.sweep_ttl() == 0
    assert store.get(NOTES, "old", refresh_ttl=False) == item

    store.put(NOTES, "other", {"n": 1}, ttl=5)
    now = store._now()
    other = item_rows.item_id(NOTES, "other")
    [row] = [row for row in [store.get(NOTES, "other", refresh_ttl=False)] if row]

    def kept_meanwhile(connection: Any, ids: Any, at: Any) -> set[str]:
        with store.engine.begin() as beside:  # a reader committed just before the sweep locked the row
            item_rows._keep(beside, [item_rows.KeptItem(other, row.updated_at, at + timedelta(minutes=5))], {other})
        return living(connection, ids, at)

    store._now = lambda: now + timedelta(minutes=6)
    monkeypatch.setattr(item_rows, "living", kept_meanwhile)
    assert store.sweep_ttl() == 0


def test_a_batch_reads_items_that_it_also_writes(store: MemStateStore) -> None:
    """It need not extend these items or wait for them, because it sets their end itself."""
    ops: list[Any] = [GetOp(NOTES, "old"), SearchOp(NOTES), PutOp(NOTES, "old", None), PutOp(NOTES, "young", {"n": 2})]
    assert [found(result) for result in store.batch(ops)] == [["old"], ["old", "young"], [], []]
    assert {item.key: item.value for item in store.search(NOTES)} == {"young": {"n": 2}}
