"""Concurrent calls of coroutines on a store form one batch, and each call gets its own result."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from typing import Any

import pytest
from sqlalchemy import Engine
from sqlalchemy.exc import OperationalError

pytest.importorskip("langgraph.graph")

from langgraph.config import get_store
from langgraph.graph import START, StateGraph
from langgraph.store.base import InvalidNamespaceError, SearchItem

from memstate_sa import MemoryStore, MemstateError
from memstate_sa.indexes import InMemoryIndex
from memstate_sa.integrations.langgraph import MemStateStore
from memstate_sa.integrations.langgraph.item_rows import ItemRow
from memstate_sa.testing import HashEmbedder
from tests.support import in_threads

NOTES = ("notes",)


@pytest.fixture
def store(engine: Engine) -> Iterator[MemStateStore]:
    with MemoryStore(engine, InMemoryIndex(), embedder=HashEmbedder(), background=False) as facts:
        made = MemStateStore(facts)
        made.setup()
        yield made


def transactions(store: MemStateStore) -> dict[str, set[str]]:
    """The keys that each transaction has put."""
    found: dict[str, set[str]] = {}
    with store._readers() as session:
        for change in store.memory.history(session, ItemRow):
            found.setdefault(change.tx, set()).add((change.after or change.before or {})["key"])
    return found


def values(store: MemStateStore) -> dict[str, Any]:
    return {item.key: item.value for item in store.search((), limit=1000)}


def test_puts_and_gets_of_one_moment_are_one_batch(store: MemStateStore, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same kind: deletes, lists of namespaces, a put and a delete of one key, where the later one counts."""
    batches: list[int] = []
    batch = store.batch
    monkeypatch.setattr(store, "batch", lambda ops: batches.append(len(ops)) or batch(ops))

    async def run() -> None:
        keys = [f"k{n}" for n in range(30)]
        await asyncio.gather(*(store.aput(NOTES, key, {"of": key}) for key in keys))
        got = await asyncio.gather(*(store.aget(NOTES, key) for key in [*keys, "none"]))
        assert [item and item.value for item in got] == [*({"of": key} for key in keys), None]
        results = await asyncio.gather(
            store.adelete(NOTES, "k0"),
            store.alist_namespaces(),
            store.aput(NOTES, "k1", {}),
            store.adelete(NOTES, "k1"),
        )
        assert results == [None, [NOTES], None, None]

    asyncio.run(run())
    assert batches == [30, 31, 4]
    assert next(iter(transactions(store).values())) == {f"k{n}" for n in range(30)}
    assert values(store) == {f"k{n}": {"of": f"k{n}"} for n in range(2, 30)}


def test_searches_do_not_wait_for_each_other(store: MemStateStore) -> None:
    """An embedder may be slow, so searches run separately at the same time."""

    async def run() -> list[list[SearchItem]]:
        await store.aput(NOTES, "a", {"text": "apples"})
        return await asyncio.gather(*(store.asearch(NOTES, query="apples") for _ in range(5)))

    assert [[item.key for item in found] for found in asyncio.run(run())] == [["a"]] * 5


class Strange:
    pass


@pytest.mark.parametrize(
    ("namespace", "key", "value", "error"),
    [
        (NOTES, "bad", {"a": Strange()}, MemstateError),
        (NOTES, "bad", {"a": float("nan")}, MemstateError),
        (NOTES, "b\0d", {"a": 1}, MemstateError),
        (("no\ud800",), "bad", {"a": 1}, InvalidNamespaceError),
        (NOTES, "bad", {"text": "refused"}, MemstateError),
    ],
)
def test_a_call_that_is_refused_fails_alone(
    engine: Engine, namespace: Any, key: str, value: Any, error: type[Exception]
) -> None:
    """Our code refuses it, or the embedder with strict delivery, at any place among the others."""

    class Picky(HashEmbedder):
        def embed(self, texts: Any) -> Any:
            if any("refused" in words for words in texts):
                raise ValueError("not this one")
            return super().embed(texts)

    with MemoryStore(engine, InMemoryIndex(), embedder=Picky(), delivery="strict", background=False) as facts:
        store = MemStateStore(facts)
        store.setup()

        async def run(place: int) -> list[Any]:
            calls = [store.aput(NOTES, f"{place} {n}", {"n": n}) for n in range(7)]
            calls.insert(place, store.aput(namespace, key, value))
            return await asyncio.gather(*calls, return_exceptions=True)

        for place in (0, 3, 7):
            results = asyncio.run(run(place))
            assert isinstance(results.pop(place), error)
            assert results == [None] * 7
        assert values(store) == {f"{place} {n}": {"n": n} for place in (0, 3, 7) for n in range(7)}


def test_a_database_that_is_away_is_asked_once(store: MemStateStore, monkeypatch: pytest.MonkeyPatch) -> None:
    """All calls fail together, because separate calls would each wait as long again."""
    asked: list[int] = []

    def away(ops: Any) -> Any:
        asked.append(len(ops))
        raise OperationalError("", {}, Exception("away"))

    monkeypatch.setattr(store, "batch", away)

    async def run() -> list[Any]:
        return await asyncio.gather(*(store.aget(NOTES, str(n)) for n in range(9)), return_exceptions=True)

    assert {type(found) for found in asyncio.run(run())} == {OperationalError} and asked == [9]


def test_a_call_that_is_cancelled_takes_no_other_along(store: MemStateStore) -> None:
    async def run() -> None:
        calls = [asyncio.ensure_future(store.aput(NOTES, str(n), {})) for n in range(3)]
        await asyncio.sleep(0)
        calls[0].cancel()
        await asyncio.gather(*calls[1:])
        assert calls[0].cancelled()

    asyncio.run(run())
    assert {"1", "2"} <= set(values(store))


def test_nodes_of_different_threads_are_labelled_by_their_own(store: MemStateStore) -> None:
    """Runs of two users share one event loop. Undoing one run leaves the other's puts."""

    async def write(state: dict[str, Any]) -> dict[str, Any]:
        await asyncio.gather(*(get_store().aput(NOTES, f"{state['of']}{n}", {}) for n in range(3)))
        return state

    graph = StateGraph(dict).add_node("write", write).add_edge(START, "write").compile(store=store)

    async def run() -> None:
        configs: Any = [{"configurable": {"thread_id": of}} for of in "ab"]
        await asyncio.gather(*(graph.ainvoke({"of": c["configurable"]["thread_id"]}, c) for c in configs))

    asyncio.run(run())
    assert sorted(map(sorted, transactions(store).values())) == [["a0", "a1", "a2"], ["b0", "b1", "b2"]]
    with store._begin() as session:
        store.memory.rollback(session, session_id="a")
    assert set(values(store)) == {"b0", "b1", "b2"}


def test_present_and_past_reads_are_gathered_separately(store: MemStateStore) -> None:
    store.put(NOTES, "k", {"n": 1})
    past = store.as_of(next(iter(transactions(store))))
    store.put(NOTES, "k", {"n": 2})

    async def run() -> list[Any]:
        return await asyncio.gather(store.aget(NOTES, "k"), past.aget(NOTES, "k"))

    assert [item.value for item in asyncio.run(run())] == [{"n": 2}, {"n": 1}]


def test_event_loops_of_several_threads_use_one_store(store: MemStateStore) -> None:
    async def run(thread: int) -> None:
        await asyncio.gather(*(store.aput(NOTES, f"{thread} {n}", {}) for n in range(10)))
        assert all(await asyncio.gather(*(store.aget(NOTES, f"{thread} {n}") for n in range(10))))

    assert in_threads(4, lambda thread: asyncio.run(run(thread))) == []
    assert set(values(store)) == {f"{thread} {n}" for thread in range(4) for n in range(10)}
