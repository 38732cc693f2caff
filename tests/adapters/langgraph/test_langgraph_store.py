"""Items of a LangGraph store are facts: history, undo, transactions, time, and refused values."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from datetime import datetime
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from langgraph.store.base import GetOp, InvalidNamespaceError, PutOp, SearchOp
from sqlalchemy import Engine, event, select, text

from memstate_sa import ConflictError, Fact, MemoryStore, MemstateError, NotFound
from memstate_sa.db.codec import encode_key
from memstate_sa.db.tables import log, utcnow
from memstate_sa.indexes import InMemoryIndex
from memstate_sa.integrations.langgraph import MemStateStore, item_rows
from memstate_sa.integrations.langgraph.item_rows import ItemRow
from memstate_sa.integrations.langgraph.item_validation import InvalidItem
from memstate_sa.testing import HashEmbedder
from tests.support import assert_index_holds, in_threads
from tests.support.plans import assert_served, plans
from tests.support.shelf import NOTES, Shelf

pytest.importorskip("langgraph.store.base")


@pytest.fixture
def shelf(engine: Engine) -> Iterator[Shelf]:
    made = Shelf(engine, index={"fields": ["text", "more[*]"]})
    yield made
    made.memory.close()


def test_puts_and_deletes_are_history(shelf: Shelf) -> None:
    shelf.store.put(NOTES, "a", {"text": "one"})
    shelf.store.put(NOTES, "a", {"text": "two"})
    shelf.store.delete(NOTES, "a")
    shelf.store.put(NOTES, "a", {"text": "three"})
    changes = shelf.store.history(NOTES, "a")
    assert [(change.op, change.after and change.after["value"]) for change in changes] == [
        ("insert", {"text": "one"}),
        ("update", {"text": "two"}),
        ("delete", None),
        ("insert", {"text": "three"}),
    ]
    shelf.assert_in_step()


def test_the_same_value_makes_no_history(shelf: Shelf) -> None:
    """The order of names and JSONB's way of writing numbers do not matter. But True is not 1."""
    value = {"text": "one", "n": 1, "big": 1e16, "deep": {"x": [1.5, None], "y": True}}
    shelf.store.put(NOTES, "a", value)
    before = shelf.store.get(NOTES, "a")
    for _ in range(2):
        shelf.store.put(NOTES, "a", dict(reversed(value.items())))
        shelf.store.put(NOTES, "a", {**value, "n": 1.0})
    assert shelf.ops("a") == ["insert"]
    assert shelf.store.get(NOTES, "a") == before
    shelf.store.put(NOTES, "a", {**value, "n": True})
    assert shelf.ops("a") == ["insert", "update"]


def test_updated_at_says_when_the_value_last_changed(shelf: Shelf) -> None:
    """A search without a query sorts by it. Putting an existing value again does not move an item up."""
    for key in ("a", "b"):
        shelf.store.put(NOTES, key, {"seen": 1})
        shelf.later(1)
    shelf.store.put(NOTES, "a", {"seen": 1})
    assert [item.key for item in shelf.store.search(NOTES)] == ["b", "a"]
    shelf.store.put(NOTES, "a", {"seen": 2})
    assert [item.key for item in shelf.store.search(NOTES)] == ["a", "b"]


def test_an_undone_put_is_gone_and_so_are_its_vectors(shelf: Shelf) -> None:
    shelf.store.put(NOTES, "a", {"text": "one", "more": ["two", "three"]})
    shelf.store.batch([PutOp(NOTES, "a", {"text": "four"}), PutOp(NOTES, "b", {"text": "five"})])
    shelf.assert_in_step()
    assert shelf.texts() == {"a": ["four"], "b": ["five"]}
    shelf.rollback(steps=1)  # a batch is one transaction
    assert shelf.values() == {"a": {"text": "one", "more": ["two", "three"]}}
    assert shelf.texts() == {"a": ["one", "two", "three"]}
    shelf.assert_in_step()
    shelf.rollback(steps=1)
    assert shelf.values() == {}
    shelf.assert_in_step()


def test_an_undone_delete_is_found_again(shelf: Shelf) -> None:
    shelf.store.put(NOTES, "a", {"text": "sweet red apple", "more": ["pear"]})
    shelf.store.delete(NOTES, "a")
    shelf.assert_in_step()
    assert shelf.store.search(NOTES, query="pear") == []
    shelf.rollback(steps=1)
    [found] = shelf.store.search(NOTES, query="pear")
    assert found.score == pytest.approx(1.0, abs=1e-5)
    shelf.assert_in_step()


def test_undo_keeps_or_undoes_an_item_as_a_whole(shelf: Shelf) -> None:
    """One run puts an item. Another changes its value only, not its texts. Revoking the first keeps the texts."""
    with MemoryStore(shelf.engine, shelf.index, embedder=shelf.embedder, background=False) as facts:
        store = MemStateStore(facts, index={"fields": ["more[*]"]})
        with facts.transaction(actor="first"):
            store.put(NOTES, "a", {"n": 1, "more": ["apple", "pear"]})
        with facts.transaction(actor="second"):
            store.put(NOTES, "a", {"n": 2, "more": ["apple", "pear"]})
        assert facts.revoke(actor="first").kept
        assert store.get(NOTES, "a").value == {"n": 2, "more": ["apple", "pear"]}  # type: ignore[union-attr]
        assert shelf.texts() == {"a": ["apple", "pear"]}
        shelf.assert_in_step()


def test_search_finds_items_that_its_transaction_sees(shelf: Shelf) -> None:
    """An undelivered item is found. A deleted item that the index still has is not. A rolled back item is not."""
    with MemoryStore(shelf.engine, shelf.index, embedder=shelf.embedder, background=False) as facts:
        store = MemStateStore(facts, index={"fields": ["text"]})
        store.put(NOTES, "old", {"text": "sweet red apple"})
        shelf.memory.relay(shelf.engine).drain()
        with pytest.raises(ZeroDivisionError), facts.transaction():
            store.put(NOTES, "new", {"text": "sweet red apples"})
            store.delete(NOTES, "old")
            assert [item.key for item in store.search(NOTES, query="sweet red apple")] == ["new"]
            assert store.get(NOTES, "old") is None
            raise ZeroDivisionError
        assert [item.key for item in store.search(NOTES, query="sweet red apple")] == ["old"]
        assert shelf.ops("new") == []
    shelf.assert_in_step()


def test_a_put_that_fails_leaves_the_transaction_it_joined(shelf: Shelf) -> None:
    with MemoryStore(shelf.engine, shelf.index, embedder=shelf.embedder, background=False) as facts:
        store = MemStateStore(facts)
        with facts.transaction(reason="mine"):
            store.put(NOTES, "a", {"n": 1})
            with pytest.raises(InvalidItem):
                store.batch([PutOp(NOTES, "b", {"n": 2}), PutOp(NOTES, "c", {"n": float("nan")})])
            store.put(NOTES, "d", {"n": 4})
        assert shelf.values() == {"a": {"n": 1}, "d": {"n": 4}}
        [first], [second] = store.history(NOTES, "a"), store.history(NOTES, "d")
        assert (first.tx, first.reason) == (second.tx, "mine")


def test_an_erased_item_is_in_no_history(shelf: Shelf) -> None:
    """Its former texts are not in history either."""
    shelf.store.put(NOTES, "a", {"text": "secret", "more": ["secret two", "secret three"]})
    shelf.store.put(NOTES, "a", {"text": "secret", "more": ["secret two"]})
    shelf.store.put(NOTES, "b", {"text": "other"})
    shelf.store.erase(NOTES, "a", reason="asked to")
    with shelf.engine.connect() as connection:
        images = [str(image) for image in connection.scalars(select(log.c.image)) if image is not None]
    assert sum("other" in image for image in images) == 1
    assert not any("secret" in image for image in images)
    assert shelf.values() == {"b": {"text": "other"}}
    assert shelf.store.history(NOTES, "a")[-1].reason == "asked to"
    with pytest.raises(NotFound):
        shelf.store.erase(NOTES, "nobody")
    shelf.memory.relay(shelf.engine).drain()
    assert [entry.id for entry in shelf.index.scan(None, 10)] == [
        "memstate_item" + encode_key([item_rows.item_id(NOTES, "b")])
    ]


def test_as_of_shows_the_store_as_it_was(shelf: Shelf) -> None:
    shelf.store.put(("people", "ann"), "city", {"text": "ann lives in paris"})
    shelf.store.put(("people", "bob"), "city", {"text": "bob lives in rome"})
    then = shelf.store.history(("people", "bob"), "city")[-1].tx
    shelf.store.put(("people", "ann"), "city", {"text": "ann lives in berlin"})
    shelf.store.delete(("people", "bob"), "city")
    shelf.store.put(("places",), "x", {"text": "somewhere"})
    past = shelf.store.as_of(then)
    assert past.get(("people", "ann"), "city").value == {"text": "ann lives in paris"}  # type: ignore[union-attr]
    assert {item.value["text"] for item in past.search(())} == {"ann lives in paris", "bob lives in rome"}
    assert [item.key for item in past.search((), filter={"text": "ann lives in berlin"})] == []
    [best] = past.search(("people",), query="ann lives in paris", limit=1)
    assert (best.namespace, best.score) == (("people", "ann"), pytest.approx(1.0, abs=1e-5))
    shelf.memory.relay(shelf.engine).drain()  # the index has forgotten it
    [best] = past.search(("people",), query="bob lives in rome", limit=1)
    assert (best.namespace, best.score) == (("people", "bob"), pytest.approx(1.0, abs=1e-5))
    assert past.list_namespaces() == [("people", "ann"), ("people", "bob")]
    with pytest.raises(MemstateError, match="read-only"):
        past.put(NOTES, "a", {"n": 1})
    assert shelf.store.as_of(None) is shelf.store
    assert shelf.store.get(("people", "ann"), "city").value == {"text": "ann lives in berlin"}  # type: ignore[union-attr]


def test_expired_item_is_not_found_before_the_sweep(shelf: Shelf) -> None:
    """It is hidden as soon as it expires."""
    shelf.store.put(("a", "b"), "mortal", {"text": "sweet red apple", "more": ["pear"]}, ttl=10)
    shelf.store.put(("a", "c"), "immortal", {"text": "sweet red apple"})
    shelf.memory.relay(shelf.engine).drain()
    for minutes, expected in ((9, {"mortal", "immortal"}), (1, {"immortal"})):
        shelf.later(minutes)
        found = shelf.store.get(("a", "b"), "mortal", refresh_ttl=False)
        assert (found is not None) == ("mortal" in expected)
        for query in (None, "sweet red apple", "pear"):
            assert {i.key for i in shelf.store.search(("a",), query=query, refresh_ttl=False)} == expected
            assert len(shelf.store.search((), query=query, filter={"text": {"$ne": 1}}, refresh_ttl=False)) == len(
                expected
            )
        assert shelf.store.list_namespaces(max_depth=1) == [("a",)]
        assert (("a", "b") in shelf.store.list_namespaces()) == ("mortal" in expected)


def test_reading_keeps_an_item_and_is_no_history(shelf: Shelf) -> None:
    shelf.store.put(NOTES, "got", {"text": "one"}, ttl=10)
    shelf.store.put(NOTES, "found", {"text": "two"}, ttl=10)
    shelf.store.put(NOTES, "meant", {"text": "three"}, ttl=10)
    shelf.store.put(NOTES, "left", {"text": "four"}, ttl=10)
    for _ in range(3):
        shelf.later(9)
        assert shelf.store.get(NOTES, "got") is not None
        assert [i.key for i in shelf.store.search(NOTES, filter={"text": "two"})] == ["found"]
        assert [i.key for i in shelf.store.search(NOTES, query="three", limit=1)] == ["meant"]
    assert set(shelf.values()) == {"got", "found", "meant"}
    assert shelf.store.sweep_ttl() == 1
    assert [shelf.ops(key) for key in ("got", "found", "meant", "left")] == [["insert"]] * 3 + [["insert", "delete"]]
    shelf.later(10)
    assert shelf.values() == {}
    assert shelf.store.sweep_ttl() == 3
    shelf.assert_in_step()


def test_reading_without_refresh_does_not_prolong_an_item(shelf: Shelf) -> None:
    quiet = shelf.another(ttl={"refresh_on_read": False, "default_ttl": 10})
    quiet.put(NOTES, "a", {"n": 1})
    shelf.store.put(NOTES, "b", {"n": 1}, ttl=10)
    shelf.later(9)
    assert quiet.get(NOTES, "a") is not None
    assert len(quiet.search(NOTES)) == 2
    assert shelf.store.get(NOTES, "b", refresh_ttl=False) is not None
    shelf.later(1)
    assert shelf.values() == {}


def test_reading_does_not_block_an_undo(shelf: Shelf) -> None:
    shelf.store.put(NOTES, "a", {"n": 1}, ttl=10)
    shelf.store.put(NOTES, "a", {"n": 2}, ttl=10)
    shelf.later(5)
    assert shelf.store.get(NOTES, "a") is not None
    shelf.rollback(steps=1)
    assert shelf.store.get(NOTES, "a").value == {"n": 1}  # type: ignore[union-attr]


def test_same_put_restarts_the_ttl(shelf: Shelf) -> None:
    shelf.store.put(NOTES, "a", {"n": 1}, ttl=10)
    shelf.later(9)
    shelf.store.put(NOTES, "a", {"n": 1}, ttl=10)
    shelf.later(9)
    assert shelf.values() == {"a": {"n": 1}}
    assert shelf.ops("a") == ["insert"]
    shelf.store.put(NOTES, "a", {"n": 1})  # the item has no end now, which history shows as a change
    shelf.later(1000)
    assert shelf.values() == {"a": {"n": 1}}
    assert shelf.ops("a") == ["insert", "update"]


def test_later_put_may_shorten_the_ttl(shelf: Shelf) -> None:
    """A put overrides a reader's extension."""
    shelf.store.put(NOTES, "a", {"n": 1}, ttl=100)
    shelf.later(50)
    assert shelf.store.get(NOTES, "a") is not None
    shelf.store.put(NOTES, "a", {"n": 2}, ttl=1)
    shelf.later(1)
    assert shelf.values() == {}


def test_late_reader_does_not_shorten_the_ttl(shelf: Shelf) -> None:
    """Its clock was read earlier than another reader's."""
    shelf.store.put(NOTES, "a", {"n": 1}, ttl=10)
    shelf.later(5)
    assert shelf.store.get(NOTES, "a") is not None
    shelf.later(-1)
    assert shelf.store.get(NOTES, "a") is not None
    shelf.later(10.5)
    assert shelf.values() == {"a": {"n": 1}}


def test_put_over_an_expired_item_creates_it(shelf: Shelf) -> None:
    shelf.store.put(NOTES, "a", {"n": 1}, ttl=1)
    shelf.later(1)
    shelf.store.put(NOTES, "a", {"n": 1}, ttl=1)
    found = shelf.store.get(NOTES, "a")
    assert found is not None
    assert found.created_at == found.updated_at == shelf.now


def test_a_sweep_is_an_ordinary_transaction_that_no_step_counts(shelf: Shelf) -> None:
    shelf.store.batch([PutOp(NOTES, f"k{n}", {"text": f"{n}", "more": ["x"]}, ttl=1 + n % 2) for n in range(6)])
    shelf.store.put(NOTES, "last", {"n": 1})
    shelf.later(1)
    assert shelf.store.sweep_ttl() == 3
    assert shelf.store.sweep_ttl() == 0
    assert set(shelf.texts()) == {"k1", "k3", "k5", "last"}
    swept = shelf.store.history(NOTES, "k0")[-1]
    assert (swept.op, swept.reason) == ("delete", "expired")
    shelf.assert_in_step()
    shelf.rollback(steps=1)
    assert set(shelf.texts()) == {"k1", "k3", "k5"}
    shelf.rollback(tx=swept.tx)
    assert set(shelf.texts()) == {f"k{n}" for n in range(6)}


def test_a_large_sweep_is_of_several_pages(shelf: Shelf, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("memstate_sa.integrations.langgraph.store._SWEEP_PAGE", 4)
    shelf.store.batch([PutOp(NOTES, f"k{n}", {"n": n}, ttl=1) for n in range(10)])
    shelf.later(1)
    assert shelf.store.sweep_ttl() == 10
    assert shelf.texts() == {}
    with shelf.engine.connect() as connection:
        assert connection.execute(select(item_rows.kept)).all() == []


def test_sweeper_deletes_expired_items(shelf: Shelf) -> None:
    store = shelf.another(ttl={"default_ttl": 1, "sweep_interval_minutes": 60})
    store.put(NOTES, "a", {"n": 1})
    shelf.later(1)
    swept = store.start_ttl_sweeper(sweep_interval_minutes=0.0001)
    again = store.start_ttl_sweeper()
    for _ in range(6000):
        if not shelf.texts():
            break
        store._sweeper.stop_event.wait(0.01)
    assert shelf.texts() == {}
    assert store.stop_ttl_sweeper(timeout=60)
    assert swept.result(timeout=60) is None
    assert not again.done()


def test_a_sweeper_is_cancelled_and_outlives_errors(shelf: Shelf, caplog: pytest.LogCaptureFixture) -> None:
    store = shelf.another(ttl={"default_ttl": 1})
    shelf.later(0)

    def broken() -> datetime:
        raise ConnectionError("postgresql://user:secret@host")

    store._now = broken
    future = store.start_ttl_sweeper(sweep_interval_minutes=0.0001)
    for _ in range(6000):
        if len(caplog.records) > 1:
            break
        store._sweeper.stop_event.wait(0.01)
    assert "Could not sweep expired items, will try again: ConnectionError" in caplog.text
    assert "secret" not in caplog.text
    assert future.cancel()
    assert store._sweeper.thread is not None
    store._sweeper.thread.join(60)
    assert not store._sweeper.thread.is_alive()


def test_without_ttl_there_is_no_sweeper(shelf: Shelf) -> None:
    assert shelf.store.start_ttl_sweeper().result(timeout=0) is None
    assert shelf.store.stop_ttl_sweeper()


def test_sweep_inside_a_transaction_is_refused(shelf: Shelf) -> None:
    """It would no longer count as a step."""
    with MemoryStore(shelf.engine, shelf.index, embedder=shelf.embedder, background=False) as facts:
        store = MemStateStore(facts)
        with facts.transaction(), pytest.raises(MemstateError, match="inside another transaction"):
            store.sweep_ttl()


@pytest.mark.parametrize("ttl", [0, -1, float("nan"), float("inf"), 1e300, "1", True])
def test_put_refuses_an_invalid_ttl(shelf: Shelf, ttl: Any) -> None:
    with pytest.raises(InvalidItem, match="ttl"):
        shelf.store.put(NOTES, "a", {"n": 1}, ttl=ttl)
    assert shelf.values() == {}


class Odd:
    def __repr__(self) -> str:
        return "a secret"


def nested(depth: int) -> Any:
    value: Any = 1
    for _ in range(depth):
        value = [value]
    return value


BAD: list[Any] = [
    {"a": "nul\x00"},
    {"nul\x00": 1},
    {"a": {"b": ["\ud800"]}},
    {"\udfff": 1},
    {"a": float("nan")},
    {"a": [float("-inf")]},
    {"a": 10**400},
    {"a": b"bytes"},
    {"a": {1, 2}},
    {"a": utcnow()},
    {"a": Odd()},
    {1: "number"},
    {"a": {None: 1}},
    {"a": nested(5000)},
    [1, 2],
    "text",
    7,
]


def test_bad_values_are_refused_and_lose_nothing(shelf: Shelf) -> None:
    shelf.store.put(NOTES, "a", {"text": "before"})
    for bad in BAD:
        with pytest.raises(InvalidItem) as caught:
            shelf.store.batch([PutOp(NOTES, "b", {"n": 1}), PutOp(NOTES, "a", bad), GetOp(NOTES, "a")])
        assert "secret" not in str(caught.value)
    for key in ("nul\x00", "\ud800"):
        with pytest.raises(InvalidItem, match="key"):
            shelf.store.put(NOTES, key, {"n": 1})
        assert shelf.store.get(NOTES, key) is None
        shelf.store.delete(NOTES, key)
    for namespace in (("\ud800",), ("n" * 1000,), ("a", "ü" * 500)):
        with pytest.raises(InvalidNamespaceError):
            shelf.store.put(namespace, "a", {"n": 1})
    indexes: list[Any] = ["text", [1], {"a": 1}, True]
    for index in indexes:
        with pytest.raises(InvalidItem, match="index"):
            shelf.store.put(NOTES, "a", {"n": 1}, index=index)
    with pytest.raises(InvalidItem, match="operation"):
        shelf.store.batch([PutOp(NOTES, "a", {"n": 1}), ("not", "one")])  # type: ignore[list-item]
    assert shelf.values() == {"a": {"text": "before"}}
    assert shelf.ops("a") == ["insert"]
    shelf.assert_in_step()


def test_large_values_are_stored(shelf: Shelf) -> None:
    """10 MB, and as deep as allowed."""
    large = {"blob": "x" * 10_000_000, "deep": nested(190)}
    shelf.store.put(NOTES, "large", large)
    assert shelf.store.get(NOTES, "large").value == large  # type: ignore[union-attr]
    shelf.store.put(("n" * 999,), "k" * 100_000, {"n": 1})
    assert shelf.store.get(("n" * 999,), "k" * 100_000).value == {"n": 1}  # type: ignore[union-attr]
    shelf.store.delete(NOTES, "large")
    assert shelf.store.search(NOTES) == []


def test_subclasses_of_plain_types_are_stored_plain(shelf: Shelf) -> None:
    from enum import Enum, IntEnum

    class Color(str, Enum):  # noqa: UP042  # of which str() is not the value
        RED = "red"

    class Level(IntEnum):
        HIGH = 3

    given = {"color": Color.RED, "level": Level.HIGH, "tuple": (1, 2), "numpy": float(np.float64(0.5))}
    shelf.store.put(NOTES, "a", given)
    expected = {"color": "red", "level": 3, "tuple": [1, 2], "numpy": 0.5}
    assert repr(sorted(shelf.values()["a"].items())) == repr(sorted(expected.items()))


def test_store_takes_a_url_an_engine_or_an_async_engine(shelf: Shelf, tmp_path: Path) -> None:
    from sqlalchemy.ext.asyncio import create_async_engine

    url = shelf.engine.url.render_as_string(hide_password=False)
    asynchronous = create_async_engine(url.replace("sqlite://", "sqlite+aiosqlite://"))
    shelf.store.put(NOTES, "a", {"n": 1})
    for where in (url, shelf.engine.url, shelf.engine, asynchronous):
        store = MemStateStore(where, memory=shelf.memory)
        assert store.get(NOTES, "a") == shelf.store.get(NOTES, "a")
        if store.engine is not shelf.engine:
            store.engine.dispose()
    for where in (url, shelf.engine, asynchronous):
        with pytest.raises(MemstateError, match="memory="):
            MemStateStore(where)
    with pytest.raises(MemstateError, match="file"):
        MemStateStore("sqlite://", memory=shelf.memory)
    indexes: list[Any] = [{"dims": 3, "embed": len}, {"fields": "text"}, {"fields": [1]}]
    for index in indexes:
        with pytest.raises(MemstateError, match="index"):
            MemStateStore(shelf.engine, memory=shelf.memory, index=index)


def test_store_works_on_an_in_memory_database() -> None:
    """The MemoryStore lets one thread at a time use the connection."""
    with MemoryStore("sqlite://", InMemoryIndex(), embedder=HashEmbedder()) as facts:
        store = MemStateStore(facts, ttl={"default_ttl": 5})
        store.setup()
        assert in_threads(4, lambda n: store.put(NOTES, f"k{n}", {"text": f"apple {n}"})) == []
        assert {item.key for item in store.search(NOTES, query="apple")} == {f"k{n}" for n in range(4)}
        assert all(item.score is not None for item in store.search(NOTES, query="apple"))
        facts.rollback(steps=1)
        assert len(store.search(NOTES)) == 3
        assert not facts.memory.status(facts.engine)["memory"].pending


def test_a_relay_that_ran_before_delivers_items(engine: Engine) -> None:
    index, embedder = InMemoryIndex(), HashEmbedder()
    with MemoryStore(engine, index, embedder=embedder) as facts:
        facts.commit(Fact(id="f", type="note", payload={"text": "green pear"}))
        store = MemStateStore(facts, index={"fields": ["text"]})
        store.setup()
        store.put(NOTES, "a", {"text": "sweet red apple"})
        facts.relay.drain(60)
        [change] = store.history(NOTES, "a")
        expected = {"memstate_item" + encode_key([change.key]): "sweet red apple"}
        assert_index_holds(index, embedder, {'memstate_fact["f"]': "text: green pear", **expected})
        assert MemStateStore(facts).get(NOTES, "a") is not None
    with pytest.raises(MemstateError, match="closed"):
        store.get(NOTES, "a")


def test_sixteen_writers_of_one_key_lose_nothing(shelf: Shelf) -> None:
    """Each write is in the history, in order. None is lost, and none raises an error."""

    def write(n: int) -> None:
        for round_ in range(3):
            shelf.store.put(NOTES, "a", {"by": n, "round": round_, "more": [f"{n}", f"of {round_}"][: 1 + n % 2]})

    assert in_threads(16, write) == []
    changes = shelf.store.history(NOTES, "a")
    assert [change.op for change in changes] == ["insert"] + ["update"] * 47
    written = [(change.after["value"]["by"], change.after["value"]["round"]) for change in changes if change.after]
    assert sorted(written) == [(n, round_) for n in range(16) for round_ in range(3)]
    for n in range(16):
        assert [round_ for by, round_ in written if by == n] == [0, 1, 2]
    assert shelf.values()["a"] == changes[-1].after["value"]  # type: ignore[index]
    shelf.assert_in_step()


def test_overlapping_batches_do_not_deadlock(shelf: Shelf) -> None:
    """Batches have new and old keys in any order, beside readers that extend items. There is no deadlock."""
    shelf.store.batch([PutOp(NOTES, f"k{n}", {"by": -1}, ttl=60) for n in range(0, 12, 2)])

    def write(n: int) -> None:
        for round_ in range(4):
            keys = [f"k{(n * 5 + round_ + i * 7) % 12}" for i in range(6)]
            value = None if (n + round_) % 5 == 0 else {"by": n, "round": round_}
            shelf.store.batch(
                [*(PutOp(NOTES, key, value, ttl=60) for key in keys), SearchOp(NOTES), GetOp(NOTES, "k1")]
            )
            shelf.store.search(NOTES)

    assert in_threads(8, write) == []
    by_tx: dict[str, set[Any]] = {}
    with shelf.sessions() as session:
        for change in shelf.memory.history(session, ItemRow):
            by_tx.setdefault(change.tx, set()).add(json.dumps(change.after and change.after["value"], sort_keys=True))
    assert all(len(values) == 1 for values in by_tx.values())  # of one batch each
    shelf.assert_in_step()


def test_put_that_keeps_losing_raises_a_conflict(shelf: Shelf, monkeypatch: pytest.MonkeyPatch) -> None:
    from sqlalchemy.exc import IntegrityError

    def lost(*_: Any) -> None:
        raise IntegrityError("INSERT", None, Exception())

    monkeypatch.setattr(shelf.store, "_write", lost)
    with pytest.raises(ConflictError, match="try again"):
        shelf.store.put(NOTES, "a", {"n": 1})
    assert shelf.values() == {}


def test_statements_are_served_by_indexes(shelf: Shelf) -> None:
    """There are 3,000 items in 300 namespaces. Each operation reads only its own items."""
    shelf.store.batch(
        [
            PutOp(("t", str(n % 300)), f"k{n}", {"text": f"t{n}", "n": n}, ttl=None if n % 7 else 60, index=False)
            for n in range(3000)
        ]
    )
    if shelf.engine.dialect.name == "postgresql":
        with shelf.engine.begin() as connection:
            connection.execute(text("ANALYZE"))

    def use() -> None:
        shelf.store.batch([GetOp(("t", "7"), "k7"), GetOp(("t", "9"), "k9")])
        shelf.store.search(("t", "7"))
        shelf.store.search(("t", "7"), filter={"n": {"$gt": 5}})
        shelf.store.list_namespaces(prefix=("t",), limit=20)
        shelf.store.list_namespaces(max_depth=1)
        shelf.store.put(("t", "7"), "k7", {"text": "new", "more": ["x"]}, ttl=5)
        shelf.store.search(("t", "7"), query="new")
        shelf.store.search(("t", "7"), query="new", filter={"n": {"$gt": 5}})
        shelf.store.delete(("t", "7"), "k7")
        shelf.later(1000)
        shelf.store.sweep_ttl()

    assert_served(shelf.engine, plans(shelf.engine, use), "item|item_kept")


def test_search_filters_the_index_by_namespace(shelf: Shelf) -> None:
    """The filter lists the namespaces while their number allows it. Otherwise their rows decide."""
    asked: list[Any] = []
    query = shelf.index.query

    def spy(vector: Any, limit: int, *, where: Any = None, ids: Any = None) -> Any:
        asked.append(where)
        return query(vector, limit, where=where, ids=ids)

    shelf.index.query = spy  # type: ignore[method-assign]
    shelf.store.batch([PutOp(("t", "a", str(n)), "k", {"text": f"apple {n}"}) for n in range(10)])
    shelf.store.batch([PutOp(("t", "b"), f"k{n}", {"text": f"apple {n}"}) for n in range(1100)])
    shelf.memory.relay(shelf.engine).drain()
    assert len(shelf.store.search(("t", "a"), query="apple", limit=5)) == 5
    scopes = {"scope": {"$in": [item_rows.scope_of(("t", "a", str(n))) for n in range(10)]}}
    assert asked and all(where == scopes for where in asked)
    asked.clear()
    found = shelf.store.search(("t",), query="apple 7", limit=3)
    assert asked[0]["scope"]["$in"][-1] == item_rows.scope_of(("t", "b"))
    shelf.store.batch([PutOp(("t", "c", str(n)), "k", {"text": f"pear {n}"}) for n in range(100)])
    shelf.memory.relay(shelf.engine).drain()
    assert shelf.store.search(("t",), query="apple 7", limit=3) == found
    [best] = shelf.store.search(("t", "c"), query="pear 42", limit=1)
    assert best.namespace == ("t", "c", "42")


def test_statements_do_not_grow_with_the_items(shelf: Shelf) -> None:
    """No statement is sent per item."""
    counts: list[str] = []

    def note(connection: Any, cursor: Any, statement: str, *_: Any) -> None:
        if "memstate_" in statement:  # another thread notifies relays
            counts.append(statement)

    event.listen(shelf.engine, "before_cursor_execute", note)

    def statements(action: Any) -> int:
        counts.clear()
        action()
        return len(counts)

    def put_all(n: int, round_: int) -> None:
        shelf.store.batch([PutOp(NOTES, f"k{i}", {"text": f"t{i}", "round": round_}) for i in range(n)])

    for round_ in (0, 1):  # from the second put on, the log is known to have the keys
        put_all(20, round_)
    assert statements(lambda: put_all(20, 2)) == statements(lambda: put_all(20, 3))
    some = statements(lambda: put_all(20, 4))
    for round_ in (0, 1):
        put_all(300, round_)
    assert statements(lambda: put_all(300, 2)) <= some
    assert statements(lambda: shelf.store.batch([GetOp(NOTES, f"k{i}") for i in range(300)])) == 1
    assert statements(lambda: shelf.store.search(NOTES, limit=300)) == 1


def test_scopes_sort_as_namespaces_do() -> None:
    namespaces = [
        ("a",),
        ("a", "b"),
        ("a", "b", "c"),
        ("a b",),
        ("a", " "),
        ("ab",),
        ("é",),
        ("\U0001f9e0", "x"),
        ("Z",),
    ]
    assert [item_rows.namespace_of(item_rows.scope_of(each)) for each in namespaces] == namespaces
    assert sorted(namespaces) == sorted(namespaces, key=item_rows.scope_of)
    assert all(re.fullmatch(r"([0-9a-f]{2})+", item_rows.scope_of(each)) for each in namespaces)
