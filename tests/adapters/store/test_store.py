"""MemoryStore: committing, reading and undoing facts, its transactions, and schemas."""

from __future__ import annotations

import asyncio
import logging
import re
import sys
import threading
from collections.abc import Callable, Iterator
from datetime import UTC, date, datetime, timedelta
from decimal import Decimal
from functools import partial
from pathlib import Path
from typing import Any
from uuid import UUID

import numpy as np
import pytest
from pydantic import AliasChoices, AliasPath, BaseModel, ConfigDict, Field, ValidationError, computed_field
from sqlalchemy import Engine, create_engine, select, text
from sqlalchemy.orm import Session

from memstate_sa import ConflictError, Fact, MemoryStore, MemstateError, MissingExtra, NotFound, ValidationFailed
from memstate_sa.db.codec import encode_key
from memstate_sa.db.tables import log, outbox, unique
from memstate_sa.indexes import InMemoryIndex
from memstate_sa.log.changes import replay
from memstate_sa.store import parts
from memstate_sa.testing import FlakyIndex, HashEmbedder
from tests.adapters.store.facts import contents, note, opened
from tests.support import Base, Tag, assert_index_holds, in_threads
from tests.support.relays import eventually

pytestmark = pytest.mark.sa20


class Preference(BaseModel):
    content: str = Field(min_length=3)
    strength: int = Field(5, ge=0, le=10)


class Profile(BaseModel):
    user: str
    city: str | None = None


class Event(BaseModel):
    on: date
    where: str = Field(alias="location")


@pytest.fixture
def store(engine: Engine) -> Iterator[MemoryStore]:
    with opened(engine) as made:
        yield made


def ops(store: MemoryStore, id: str) -> list[str]:
    return [change.op for change in store.history(id)]


def point_of(id: str) -> str:
    return Fact.__tablename__ + encode_key([id])


def assert_holds(store: MemoryStore, expected: dict[str, str]) -> None:
    """Assert that these facts, by id with their text ("": none), are all that index and log hold."""
    store.memory.relay(store.engine).drain()
    embedded = {point_of(id_): words for id_, words in expected.items() if words}
    assert_index_holds(store.memory.indexes["memory"], HashEmbedder(), embedded)
    with Session(store.engine) as session:
        replayed = {key: dict(row) for (_, key), row in replay(store.memory.history(session, Fact)).items()}
        rows = session.execute(select(Fact.__table__)).mappings()
        assert replayed == {row["id"]: dict(row) for row in rows}
        assert set(replayed) == set(expected)


# -- facts -----------------------------------------------------------------------------------------------------------


def test_fact_stays_consistent_from_commit_to_delete(store: MemoryStore) -> None:
    """Rows, log and index agree after every call. The history has every change, with its labels."""
    id_ = store.commit(note("likes tea", sugar=True), actor="ada", reason="said so", session_id="s1")
    other = store.commit(note("likes rain"))
    assert_holds(store, {id_: "content: likes tea\nsugar: True", other: "content: likes rain"})

    assert store.update(id_, {"payload": {"content": "likes coffee", "cups": 3}}, actor="bob") == id_
    fact = store.get(id_)
    assert fact is not None
    assert (fact.type, fact.session_id, fact.ephemeral) == ("note", "s1", False)
    assert fact.payload == {"content": "likes coffee", "sugar": True, "cups": 3}
    assert_holds(store, {id_: "content: likes coffee\nsugar: True\ncups: 3", other: "content: likes rain"})

    assert store.delete(id_, reason="wrong") == id_
    assert store.get(id_) is None
    assert_holds(store, {other: "content: likes rain"})

    changes = store.history(id_)
    assert [(c.op, c.actor, c.reason, c.session_id) for c in changes] == [
        ("insert", "ada", "said so", "s1"),
        ("update", "bob", None, None),
        ("delete", None, "wrong", None),
    ]
    assert [c.after and c.after["payload"] for c in changes] == [
        {"content": "likes tea", "sugar": True},
        {"content": "likes coffee", "sugar": True, "cups": 3},
        None,
    ]


def test_update_changes_nothing_but_the_payload(store: MemoryStore) -> None:
    """It merges into the payload. A patch of another column is refused, and changes nothing."""
    id_ = store.commit(note("likes tea"))
    for patch in ({"type": "x"}, {"payload": {"a": 1}, "id": "x"}, {"payload": "x"}, {}, None):
        with pytest.raises(MemstateError, match="Only its payload can change"):
            store.update(id_, patch)  # type: ignore[arg-type]
    store.update(id_, {"payload": {"content": None}})
    assert [c.after["payload"] for c in store.history(id_) if c.after] == [{"content": "likes tea"}, {"content": None}]
    assert_holds(store, {id_: ""})


def test_concurrent_updates_are_all_merged(store: MemoryStore) -> None:
    """Each update reads the payload that the update before it committed. No field is lost."""
    id_ = store.commit(note("counts"))
    assert in_threads(8, lambda n: store.update(id_, {"payload": {f"field{n}": n}}) and None) == []
    fact = store.get(id_)
    assert fact is not None
    assert fact.payload == {"content": "counts", **{f"field{n}": n for n in range(8)}}
    assert ops(store, id_) == ["insert"] + ["update"] * 8


def test_concurrent_deletes_are_one(store: MemoryStore) -> None:
    """One call deletes the fact, and the others raise NotFound. The log has one delete, which rollback undoes."""
    id_ = store.commit(note("likes tea"))
    errors = in_threads(6, lambda n: store.delete(id_) and None)
    assert [type(error) for error in errors] == [NotFound] * 5
    assert ops(store, id_) == ["insert", "delete"]
    store.rollback()
    assert_holds(store, {id_: "content: likes tea"})


def test_given_id_is_kept_and_must_be_new(store: MemoryStore) -> None:
    """A second fact with the same id is a conflict, and the first fact stays."""
    assert store.commit(Fact(id="mine", type="note", payload={"content": "first"})) == "mine"
    with pytest.raises(ConflictError, match="Cannot add fact 'mine'"):
        store.commit(Fact(id="mine", type="note", payload={"content": "second"}))
    assert_holds(store, {"mine": "content: first"})


def test_a_committed_fact_is_copied(store: MemoryStore) -> None:
    """A Fact that was read can be committed again, under another id. The caller's object does not change."""
    first = store.get(store.commit(note("likes tea")))
    assert first is not None
    given = note("likes tea")
    second = store.commit(given)
    assert (second != first.id, given.id) == (True, None)
    assert_holds(store, {first.id: "content: likes tea", second: "content: likes tea"})


def test_commit_model_stores_the_payload_as_json(store: MemoryStore) -> None:
    """The type is the registered one, and fields have their aliases. fact_id replaces the whole payload."""
    store.register_schema("event", Event)
    store.register_schema("preference", Preference)
    id_ = store.commit_model(Event(on=date(2026, 1, 2), location="Graz"), actor="ada")
    fact = store.get(id_)
    assert fact is not None
    assert (fact.type, fact.payload) == ("event", {"on": "2026-01-02", "location": "Graz"})
    assert store.commit_model(Event(on=date(2026, 3, 4), location="Linz"), fact_id=id_) == id_
    assert [c.after["payload"] for c in store.history(id_) if c.after] == [
        {"on": "2026-01-02", "location": "Graz"},
        {"on": "2026-03-04", "location": "Linz"},
    ]
    with pytest.raises(MemstateError, match="is of type 'event', not 'preference'"):
        store.commit_model(Preference(content="tea"), fact_id=id_)
    with pytest.raises(MemstateError, match="Profile is not registered"):
        store.commit_model(Profile(user="u"))
    assert_holds(store, {id_: "on: 2026-03-04\nlocation: Linz"})


class Split(BaseModel):
    """A model that is written under other names than it is read."""

    model_config = ConfigDict(extra="forbid")
    a: str = Field("default", validation_alias="in", serialization_alias="out")
    b: str = Field("default", validation_alias=AliasChoices("first", "second"))
    c: str = Field("default", serialization_alias="in_c")
    secret: str = Field("left out", exclude=True)

    @computed_field
    def both(self) -> str:
        return self.a + self.b


class ByPath(BaseModel):
    a: str = Field("default", validation_alias=AliasPath("list", 0))


class Around(BaseModel):
    split: Split


def test_commit_model_writes_what_the_model_reads(store: MemoryStore) -> None:
    """The payload has the names that the model reads. Excluded and computed fields are left out."""
    store.register_schema("split", Split)
    model = Split(**{"in": "x", "second": "y", "c": "z", "secret": "s"})
    fact = store.get(store.commit_model(model))
    assert fact is not None and fact.payload == {"in": "x", "first": "y", "c": "z"}
    assert Split.model_validate(fact.payload) == model.model_copy(update={"secret": "left out"})


@pytest.mark.parametrize("model", [ByPath(list=["x"]), Around(split=Split(**{"in": "x"}))])
def test_commit_model_refuses_values_that_change_on_reading(store: MemoryStore, model: BaseModel) -> None:
    """The model would read back a default in place of the value."""
    store.register_schema("model", type(model))
    with pytest.raises(ValidationFailed) as caught:
        store.commit_model(model)
    assert caught.value.errors and store.query() == []


@pytest.mark.parametrize(
    ("by", "payloads"),
    [
        ("a", [{"in": "x"}, {"in": "x", "first": "1"}]),
        ("b", [{"first": "x"}, {"second": "x"}]),
        ("c", [{"c": "x"}, {"c": "x", "in": "y"}]),
    ],
)
def test_unique_by_looks_where_the_model_does(store: MemoryStore, by: str, payloads: list[dict[str, str]]) -> None:
    """It looks under every name that the model reads, in their order, and under the name that commit_model writes."""
    store.register_schema("split", Split, unique_by=by)
    ids = {store.commit(Fact(type="split", payload=payload)) for payload in payloads}
    ids.add(store.commit_model(Split.model_validate(payloads[0])))
    assert [fact.id for fact in store.query()] == list(ids)


def test_unique_by_takes_no_path(store: MemoryStore) -> None:
    with pytest.raises(MemstateError, match=r"unique_by='a': its alias is a path \(AliasPath\)"):
        store.register_schema("path", ByPath, unique_by="a")


@pytest.mark.parametrize("call", ["update", "delete", "commit_model"])
def test_unknown_id_raises_not_found(store: MemoryStore, call: str) -> None:
    """The error names the id, and nothing is written. get() returns None, and history() an empty list."""
    store.register_schema("preference", Preference)
    calls: dict[str, Callable[[], Any]] = {
        "update": lambda: store.update("nope", {"payload": {"content": "x"}}),
        "delete": lambda: store.delete("nope"),
        "commit_model": lambda: store.commit_model(Preference(content="tea"), fact_id="nope"),
    }
    with pytest.raises(NotFound, match="There is no fact 'nope'"):
        calls[call]()
    assert (store.get("nope"), store.history("nope")) == (None, [])
    assert_holds(store, {})


# -- reading ----------------------------------------------------------------------------------------------------------

VALUES: dict[str, Any] = {
    "int": 5,
    "text of int": "5",
    "float": 4.5,
    "one": 1,
    "true": True,
    "false": False,
    "text of true": "true",
    "zero": 0,
    "null": None,
    "text": "tea",
    "text of null": "null",
    "not ascii": "Kräutertee ☕",
    "empty": "",
    "large": 2**40,
    "larger": 2**70,
    "list": [5],
    "object": {"x": 5},
}


FOUND: dict[Any, list[str]] = {
    5: ["int"],
    "5": ["text of int"],
    4.5: ["float"],
    "true": ["text of true"],
    None: ["null", "absent"],
    "tea": ["text"],
    "null": ["text of null"],
    "Kräutertee ☕": ["not ascii"],
    "": ["empty"],
    2**40: ["large"],
    2**70: ["larger"],
    7: [],
}


def test_filters_compare_json_values(store: MemoryStore) -> None:
    """Both databases compare alike. A value of another JSON type never matches, even where a cast would."""
    with store.transaction():
        for name, field in VALUES.items():
            store.commit(Fact(type="note", payload={"content": name, "x": field}))
        store.commit(Fact(type="note", payload={"content": "absent"}))
    assert {value: contents(store, filters={"x": value}) for value in FOUND} == FOUND
    # These are equal to each other in Python, so one dict cannot have them all.
    for value, names in [(5.0, ["int"]), (1, ["one"]), (True, ["true"]), (0, ["zero"]), (False, ["false"])]:
        assert contents(store, filters={"x": value}) == names
        hits = store.search("anything", limit=20, filters={"x": value})
        assert [hit.fact.payload["content"] for hit in hits] == names


def test_filters_take_any_field_name(store: MemoryStore) -> None:
    """Some names need quotes in a JSON path. Several filters can be combined."""
    odd = ['a"b', "a.b", "$", "a'b", "[0]", "ä", "", "%s", ":x"]
    for name in odd:
        store.commit(Fact(type="note", payload={"content": name, name: 1, "both": 2}))
    for name in odd:
        assert contents(store, filters={name: 1, "both": 2}) == [name]
    assert contents(store, filters={'a"b': 1, "both": 3}) == []


def test_filters_that_no_payload_can_hold_are_refused(store: MemoryStore) -> None:
    """The error is ours, not the driver's."""
    for value in ([1], {"a": 1}, b"x", float("nan"), float("inf"), "a\x00b", "\ud800"):
        with pytest.raises(MemstateError, match=r"Cannot filter by '?x"):
            store.query(filters={"x": value})
    for name in ("a\x00b", "\ud800", 5):
        with pytest.raises(MemstateError, match="filter by"):
            store.query(filters={name: 1})  # type: ignore[dict-item]


def test_query_filters_by_type_session_and_payload(store: MemoryStore) -> None:
    """The criteria can be combined. The oldest fact comes first."""
    for n, (kind, session_id) in enumerate([("note", "s1"), ("note", "s2"), ("tip", "s1"), ("note", "s1")]):
        store.commit(Fact(type=kind, payload={"content": f"c{n}", "even": n % 2 == 0}), session_id=session_id)
    assert contents(store) == ["c0", "c1", "c2", "c3"]
    assert contents(store, type="note") == ["c0", "c1", "c3"]
    assert contents(store, session_id="s1") == ["c0", "c2", "c3"]
    assert contents(store, type="note", session_id="s1", filters={"even": False}) == ["c3"]
    assert contents(store, type="other") == []


def test_search_returns_the_nearest_facts_within_its_filters(store: MemoryStore) -> None:
    """The nearest fact comes first. Type, session, payload and distance limit the hits. "fresh" is the default."""
    store.commit(note("green tea every morning", user="u1"), session_id="s1")
    store.commit(note("green tea", user="u2"), session_id="s2")
    store.commit(Fact(type="tip", payload={"content": "green tea is healthy", "user": "u1"}))
    store.commit(note("a blue bicycle", user="u1"))

    def found(query: str, **options: Any) -> list[str]:
        return [hit.fact.payload["content"] for hit in store.search(query, **options)]

    store.memory.relay(store.engine).drain()
    everything = found("green tea", limit=10)
    assert everything[0] == "green tea" and everything[-1] == "a blue bicycle"
    assert found("green tea", limit=1) == ["green tea"]
    assert found("green tea", type="tip") == ["green tea is healthy"]
    assert found("green tea", session_id="s1") == ["green tea every morning"]
    assert (
        found("green tea", filters={"user": "u1"}, limit=2) == [near for near in everything if near != "green tea"][:2]
    )
    distances = [hit.distance for hit in store.search("green tea", limit=10)]
    assert distances == sorted(distances)
    assert found("green tea", limit=10, max_distance=distances[1]) == everything[:2]

    store.commit(note("purple zebra"))
    assert found("purple zebra", limit=1) == ["purple zebra"]
    assert "purple zebra" not in found("purple zebra", limit=10, consistency="eventual")


def test_search_sees_the_open_transaction(store: MemoryStore) -> None:
    """It finds the new facts of the transaction, and not the deleted ones. After a rollback, it finds the old facts."""
    kept = store.commit(note("old tea"))
    with pytest.raises(RuntimeError), store.transaction():
        store.commit(note("new tea"))
        store.delete(kept)
        assert [hit.fact.payload["content"] for hit in store.search("tea")] == ["new tea"]
        raise RuntimeError
    assert [hit.fact.payload["content"] for hit in store.search("tea")] == ["old tea"]


# -- undo -------------------------------------------------------------------------------------------------------------


def test_each_rollback_undoes_one_more_transaction(store: MemoryStore) -> None:
    """The newest transaction is undone first. A second call undoes the one before it."""
    a = store.commit(note("a1"))
    with store.transaction():
        store.update(a, {"payload": {"content": "a2"}})
        b = store.commit(note("b1"))
    store.delete(a)
    assert_holds(store, {b: "content: b1"})
    assert [(c.op, c.key) for c in store.rollback()] == [("insert", a)]
    assert_holds(store, {a: "content: a2", b: "content: b1"})
    assert sorted((c.op, c.key) for c in store.rollback(2)) == sorted([("delete", b), ("update", a), ("delete", a)])
    assert_holds(store, {})
    assert store.rollback() == []


def test_rollback_of_a_session_undoes_only_its_transactions(store: MemoryStore) -> None:
    """Only the session's transactions count. Nothing is undone if another session changed one of the facts since."""
    a = store.commit(note("a"), session_id="s1")
    b = store.commit(note("b"), session_id="s2")
    store.update(a, {"payload": {"content": "a by s2"}}, session_id="s2")
    with pytest.raises(ConflictError) as caught:
        store.rollback(session_id="s1")
    assert [(c.key, c.session_id) for c in caught.value.changes] == [(a, "s2")]
    assert_holds(store, {a: "content: a by s2", b: "content: b"})
    store.rollback(2, session_id="s2")
    assert_holds(store, {a: "content: a"})
    store.rollback(session_id="s1")
    assert_holds(store, {})


def test_promoted_facts_outlive_their_session(store: MemoryStore) -> None:
    """The selector chooses the facts that outlive the session. The other ephemeral facts are deleted with it."""
    ids = [store.commit(note(f"n{n}"), session_id="s1", ephemeral=True) for n in range(3)]
    durable = store.commit(note("durable"), session_id="s1")
    other = store.commit(note("other"), session_id="s2", ephemeral=True)
    assert store.promote_session("s1", lambda fact: fact.payload["content"] == "n1") == [ids[1]]
    assert store.discard_session("s1") == [ids[0], ids[2]]
    assert_holds(store, {ids[1]: "content: n1", durable: "content: durable", other: "content: other"})
    assert store.promote_session("s2") == [other]
    assert store.discard_session("s2") == []
    assert [fact.ephemeral for fact in store.query()] == [False, False, False]


def test_ephemeral_fact_needs_a_session(store: MemoryStore) -> None:
    """No session could promote or discard it. A label of the fact itself is enough."""
    calls: list[Callable[[], str]] = [
        lambda: store.commit(note("a"), ephemeral=True),
        lambda: store.commit(Fact(type="note", payload={}, ephemeral=True), actor="ana"),
    ]
    for call in calls:
        with pytest.raises(MemstateError, match="Cannot commit an ephemeral fact without session_id="):
            call()
    assert_holds(store, {})
    id_ = store.commit(Fact(type="note", payload={}, session_id="s1", ephemeral=True))
    assert store.discard_session("s1") == [id_]


def test_time_without_a_zone_is_refused(store: MemoryStore) -> None:
    """The message fits each argument that takes a moment."""
    id_, naive = store.commit(note("a")), datetime(2026, 1, 2)
    calls: list[Callable[[], Any]] = [
        lambda: store.search("a", as_of=naive),
        lambda: store.as_of(id_, naive),
        lambda: store.diff(naive),
        lambda: store.rollback(to=naive),
    ]
    for call in calls:
        with pytest.raises(MemstateError, match=r"^The time datetime.datetime\(2026.* has no time zone. Give an aware"):
            call()


def test_misspelt_session_id_is_named(store: MemoryStore) -> None:
    calls: list[Callable[..., Any]] = [store.revoke, store.rollback, partial(store.search, "tea")]
    for call in calls:
        with pytest.raises(TypeError, match=r"has no option 'session'. Did you mean 'session_id'\?"):
            call(session="t")


def test_discard_session_can_be_undone(store: MemoryStore) -> None:
    """It is an ordinary transaction. Its undo brings back facts and vectors, and the facts are ephemeral again."""
    a = store.commit(note("a"), session_id="s1", ephemeral=True)
    b = store.commit(note("b"), session_id="s1", ephemeral=True)
    assert store.discard_session("s1") == [a, b]
    assert_holds(store, {})
    store.rollback()
    assert_holds(store, {a: "content: a", b: "content: b"})
    assert store.discard_session("s1") == [a, b]


# -- transactions -----------------------------------------------------------------------------------------------------


def test_a_transaction_is_all_or_nothing(store: MemoryStore) -> None:
    """Calls of every kind join it. rollback undoes it as one step. If it fails, nothing of it is there."""
    a = store.commit(note("a"))
    e = store.commit(note("e"), session_id="s1", ephemeral=True)
    before = [c.id for c in store.history(a) + store.history(e)]

    def work() -> str:
        store.update(a, {"payload": {"content": "a2"}})
        new = store.commit(note("new"))
        store.discard_session("s1")
        with store.transaction():
            store.update(new, {"payload": {"more": 1}})
        assert contents(store) == ["a2", "new"]
        return new

    with pytest.raises(RuntimeError, match="late"), store.transaction():
        work()
        raise RuntimeError("late")
    assert_holds(store, {a: "content: a", e: "content: e"})
    assert [c.id for c in store.history(a) + store.history(e)] == before

    with store.transaction(actor="ada"):
        new = work()
    assert_holds(store, {a: "content: a2", new: "content: new\nmore: 1"})
    assert {(c.tx, c.actor) for c in store.history(new)} == {(store.history(a)[-1].tx, "ada")}
    store.rollback()
    assert_holds(store, {a: "content: a", e: "content: e"})


def test_a_refused_call_leaves_the_others(store: MemoryStore) -> None:
    """When its error is caught, the same transaction goes on without the changes of that call."""
    store.register_schema("preference", Preference, immutable=True)
    store.register_schema("profile", Profile, unique_by="user")
    fixed = store.commit(Fact(type="preference", payload={"content": "tea"}))
    u1, u2 = (store.commit(Fact(type="profile", payload={"user": user})) for user in ("u1", "u2"))
    with store.transaction():
        first = store.commit(note("first"))
        with pytest.raises(ConflictError, match="immutable"):
            store.update(fixed, {"payload": {"content": "coffee"}})
        with pytest.raises(ConflictError, match="unique"):
            store.update(u2, {"payload": {"user": "u1"}})
        with pytest.raises(ValidationFailed):
            store.update(u2, {"payload": {"user": 7}})
        with pytest.raises(NotFound):
            store.delete("nope")
        with pytest.raises(RuntimeError), store.transaction():
            store.commit(note("inner"))
            raise RuntimeError
        last = store.commit(note("last"))
    assert_holds(
        store,
        {fixed: "content: tea", u1: "user: u1", u2: "user: u2", first: "content: first", last: "content: last"},
    )


def test_a_call_that_failed_leaves_neither_facts_nor_labels(store: MemoryStore) -> None:
    """When its error is caught, the other calls of the transaction go on."""
    with store.transaction(actor="ada"):
        with pytest.raises(RuntimeError), store.transaction(actor="bob", reason="try"):
            store.commit(note("bob's"))
            raise RuntimeError
        a = store.commit(note("ada's"))
    assert_holds(store, {a: "content: ada's"})
    assert [(c.actor, c.reason) for c in store.history(a)] == [("ada", None)]


def test_threads_have_transactions_of_their_own(store: MemoryStore) -> None:
    """A call in another thread does not join this thread's transaction, and does not see its facts."""
    seen: list[Any] = []

    def other(work: Callable[[], Any]) -> None:
        assert in_threads(1, lambda _: seen.append(work())) == []

    with pytest.raises(RuntimeError), store.transaction():
        other(lambda: store.commit(note("theirs")))
        mine = store.commit(note("mine"))
        other(lambda: (store.get(mine), contents(store)))
        raise RuntimeError
    theirs, (invisible, what_they_saw) = seen
    assert (invisible, what_they_saw) == (None, ["theirs"])
    assert_holds(store, {theirs: "content: theirs"})


async def test_a_transaction_across_an_await_belongs_to_its_task(store: MemoryStore) -> None:
    """A call of another task is refused: its fact would roll back with the block. In another thread, it waits."""
    begun, refused = asyncio.Event(), asyncio.Event()

    async def fails() -> None:
        with store.transaction():
            store.commit(note("rolled back"))
            begun.set()
            await refused.wait()
            assert contents(store) == ["rolled back"]
            raise RuntimeError

    async def other() -> str:
        await begun.wait()
        try:
            for call in (lambda: store.commit(note("other")), store.query):
                with pytest.raises(MemstateError, match="it belongs to another asyncio task"):
                    call()
            waiting = asyncio.create_task(asyncio.to_thread(store.commit, note("waited")))
        finally:
            refused.set()
        return await waiting

    failed, waited = await asyncio.gather(fails(), other(), return_exceptions=True)
    assert isinstance(failed, RuntimeError) and isinstance(waited, str)
    again = store.commit(note("again"))
    assert_holds(store, {waited: "content: waited", again: "content: again"})


def test_tasks_join_the_transaction_around_their_loop(store: MemoryStore) -> None:
    """The transaction belongs to the thread, and no task began it."""

    async def commit(content: str) -> str:
        return store.commit(note(content))

    async def main() -> list[str]:
        return await asyncio.gather(commit("a"), commit("b"))

    with pytest.raises(RuntimeError), store.transaction():
        asyncio.run(main())
        assert contents(store) == ["a", "b"]
        raise RuntimeError
    assert_holds(store, {})


async def test_transactions_of_two_stores_end_in_any_order(engine: Engine, tmp_path: Path) -> None:
    """The calls of each task join its own transaction. No call joins a transaction that is over."""
    with opened(engine) as one, opened(f"sqlite:///{tmp_path / 'other.db'}") as two:
        second, first_ended = asyncio.Event(), asyncio.Event()

        async def first() -> None:
            with one.transaction():
                await second.wait()
            first_ended.set()

        async def other() -> None:
            with two.transaction():
                second.set()
                await first_ended.wait()
                two.commit(note("joined"))
                raise RuntimeError

        with pytest.raises(RuntimeError):
            await asyncio.gather(first(), other())
        kept = one.commit(note("kept"))
        assert_holds(one, {kept: "content: kept"})
        assert_holds(two, {})


def test_thread_joins_no_transaction_that_another_ended(store: MemoryStore) -> None:
    """Frameworks end generators in other threads. The thread that began the transaction does not join it any more."""
    around = store.transaction()
    around.__enter__()
    first = store.commit(note("first"))
    assert in_threads(1, lambda _: around.__exit__(None, None, None)) == []
    second = store.commit(note("second"))
    assert_holds(store, {first: "content: first", second: "content: second"})


# -- schemas ----------------------------------------------------------------------------------------------------------


def test_validation_errors_are_pydantics(store: MemoryStore) -> None:
    """The list of errors has field and rule. No call writes anything, and the old fact stays."""
    store.register_schema("preference", Preference)
    id_ = store.commit(Fact(type="preference", payload={"content": "tea", "strength": 3}))
    broken = Preference.model_construct(content="x", strength=11)
    calls: list[Callable[[], Any]] = [
        lambda: store.commit(Fact(type="preference", payload={"content": "x", "strength": 11})),
        lambda: store.update(id_, {"payload": {"content": "x", "strength": 11}}),
        lambda: store.commit_model(broken),
        lambda: store.commit_model(broken, fact_id=id_),
    ]
    for call in calls:
        with pytest.raises(ValidationFailed, match="Cannot save this Fact: content: ") as caught:
            call()
        assert [(e["type"], e["loc"]) for e in caught.value.errors] == [
            ("string_too_short", ("content",)),
            ("less_than_equal", ("strength",)),
        ]
        assert isinstance(caught.value.__cause__, ValidationError)
    assert ops(store, id_) == ["insert"]
    assert_holds(store, {id_: "content: tea\nstrength: 3"})


def test_nothing_is_sent_for_an_invalid_fact(store: MemoryStore) -> None:
    """Log and outbox stay empty too."""
    store.register_schema("preference", Preference)
    with pytest.raises(ValidationFailed):
        store.commit(Fact(type="preference", payload={}))
    with store.engine.connect() as connection:
        for table in (Fact.__table__, log, outbox, unique):
            assert connection.execute(select(table)).all() == []


WRONG: list[tuple[str, dict[str, Any]]] = [
    ("type", {"type": ""}),
    ("type", {"type": "x" * 129}),
    ("type", {"type": 5}),
    ("type", {"type": None}),
    ("type", {"type": "a\x00b"}),
    ("payload", {"payload": None}),
    ("payload", {"payload": [1]}),
    ("payload", {"payload": "x"}),
    ("payload", {"payload": {"x": object()}}),
    ("payload", {"payload": {"x": float("nan")}}),
    ("id", {"id": "x" * 65}),
    ("id", {"id": 5}),
    ("id", {"id": ""}),
    ("session_id", {"session_id": 5}),
    ("session_id", {"session_id": "a\x00"}),
]


def test_facts_of_wrong_shape_are_refused(store: MemoryStore) -> None:
    """Both databases refuse them alike. The error names the field."""
    for field, values in WRONG:
        with pytest.raises(ValidationFailed) as caught:
            store.commit(Fact(**{"type": "note", "payload": {}, **values}))
        assert [e["loc"] for e in caught.value.errors] == [(field,)]
    assert_holds(store, {})


def test_strict_types_refuse_unknown_fact_types(engine: Engine) -> None:
    """With strict_types, a fact needs a registered type. Without it, any type is allowed."""
    with opened(engine, strict_types=True) as store:
        store.register_schema("preference", Preference)
        known = store.commit(Fact(type="preference", payload={"content": "tea"}))
        with pytest.raises(ValidationFailed, match=r"Unknown fact type 'note'\. Declare it with register_schema\(\)"):
            store.commit(note("tea"))
        assert_holds(store, {known: "content: tea"})
    with opened(engine) as store:
        unknown = store.commit(note("tea"))
        assert_holds(store, {known: "content: tea", unknown: "content: tea"})


def test_immutable_fact_cannot_be_changed(store: MemoryStore) -> None:
    """Such a fact can be added, promoted, deleted and restored, but not changed."""
    store.register_schema("preference", Preference, immutable=True)
    id_ = store.commit(Fact(type="preference", payload={"content": "tea"}), session_id="s1", ephemeral=True)
    with pytest.raises(ConflictError, match=r"it is immutable\. Delete it and add another"):
        store.update(id_, {"payload": {"content": "coffee"}})
    with pytest.raises(ConflictError, match="immutable"):
        store.commit_model(Preference(content="coffee"), fact_id=id_)
    assert store.promote_session("s1") == [id_]
    with pytest.raises(ConflictError, match="immutable"):
        store.update(id_, {"payload": {"content": "coffee"}})
    store.delete(id_)
    store.rollback()
    assert ops(store, id_) == ["insert", "update", "delete", "insert"]
    assert_holds(store, {id_: "content: tea"})


def test_register_schema_says_what_is_wrong(store: MemoryStore) -> None:
    """The model must be a class, must have the fields, and the type must be text that both databases hold."""
    for wrong in (dict, Preference(content="tea"), None, "Preference"):
        with pytest.raises(MemstateError, match="not a Pydantic model class"):
            store.register_schema("preference", wrong)  # type: ignore[arg-type]
    with pytest.raises(MemstateError, match="unique_by='nope' is not a field of Preference"):
        store.register_schema("preference", Preference, unique_by=("content", "nope"))
    with pytest.raises(MemstateError, match="type=5 is not valid"):
        store.register_schema(5, Preference)  # type: ignore[arg-type]


# -- unique facts -----------------------------------------------------------------------------------------------------


def test_committing_what_exists_updates_it(store: MemoryStore) -> None:
    """The unique fields decide together. A fact with None in one of them is never the same as another."""
    store.register_schema("profile", Profile, unique_by="user")
    store.register_schema("event", Event, unique_by=("on", "where"))
    first = store.commit(Fact(type="profile", payload={"user": "u1", "city": "Graz"}))
    assert store.commit(Fact(type="profile", payload={"user": "u1", "city": "Linz"}), actor="bob") == first
    assert store.commit_model(Profile(user="u1", city="Wien")) == first
    other = store.commit(Fact(type="profile", payload={"user": "u2"}))
    untyped = store.commit(Fact(type="note", payload={"user": "u1"}))
    assert [(c.op, c.actor) for c in store.history(first)] == [("insert", None), ("update", "bob"), ("update", None)]
    event = store.commit_model(Event(on=date(2026, 1, 2), location="Graz"))
    assert store.commit_model(Event(on=date(2026, 1, 2), location="Graz")) == event
    elsewhere = store.commit_model(Event(on=date(2026, 1, 2), location="Linz"))
    assert ops(store, event) == ["insert"]
    assert_holds(
        store,
        {
            first: "user: u1\ncity: Wien",
            other: "user: u2",
            untyped: "user: u1",
            event: "on: 2026-01-02\nlocation: Graz",
            elsewhere: "on: 2026-01-02\nlocation: Linz",
        },
    )


def test_sixteen_writers_of_one_unique_value_share_one_fact(store: MemoryStore) -> None:
    """One writer inserts the fact, and the others update it. No call fails, and all get its id."""
    store.register_schema("profile", Profile, unique_by="user")
    ids: list[str] = []

    def write(n: int) -> None:
        ids.append(store.commit(Fact(type="profile", payload={"user": "u1", "city": f"city {n}"})))

    assert in_threads(16, write) == []
    assert len(ids) == 16
    changes = store.history(ids[0])
    assert [c.op for c in changes] == ["insert"] + ["update"] * 15
    assert sorted(c.after["payload"]["city"] for c in changes if c.after) == sorted(f"city {n}" for n in range(16))
    (fact,) = store.query("profile")
    assert {*ids} == {fact.id}
    assert changes[-1].after is not None and fact.payload == changes[-1].after["payload"]
    assert_holds(store, {fact.id: f"user: u1\ncity: {fact.payload['city']}"})


def test_a_deleted_value_is_free_and_rollback_takes_it_again(store: MemoryStore) -> None:
    """The undo of the delete takes the value again. It is a conflict while another fact has the value."""
    store.register_schema("profile", Profile, unique_by="user")
    first = store.commit(Fact(type="profile", payload={"user": "u1", "city": "Graz"}))
    store.delete(first)
    store.rollback()
    assert store.commit(Fact(type="profile", payload={"user": "u1", "city": "Linz"})) == first

    store.delete(first)
    deleted = store.history(first)[-1].tx
    second = store.commit(Fact(type="profile", payload={"user": "u1", "city": "Wien"}))
    assert second != first
    with pytest.raises(ConflictError), store.transaction() as session:
        store.memory.rollback(session, tx=deleted)
    assert_holds(store, {second: "user: u1\ncity: Wien"})
    store.rollback(2)
    assert_holds(store, {first: "user: u1\ncity: Linz"})
    assert store.commit(Fact(type="profile", payload={"user": "u1"})) == first


def test_update_into_a_taken_value_is_a_conflict(store: MemoryStore) -> None:
    """The two facts are not merged. Both stay as they were."""
    store.register_schema("profile", Profile, unique_by="user")
    u1, u2 = (store.commit(Fact(type="profile", payload={"user": user})) for user in ("u1", "u2"))
    with pytest.raises(ConflictError, match="same value of unique_by"):
        store.update(u2, {"payload": {"user": "u1"}})
    assert_holds(store, {u1: "user: u1", u2: "user: u2"})
    store.update(u2, {"payload": {"user": "u3"}})
    assert store.commit(Fact(type="profile", payload={"user": "u2"})) not in (u1, u2)


def shortly(value: Any) -> str:
    return repr(value)[:12]


LONG = "".join(chr(0x4E00 + n * 7919 % 20000) for n in range(9000))  # no compression makes it fit an index


@pytest.mark.parametrize(
    "value", [1e16, 1e300, -0.0, 0.1 + 0.2, 2**70, True, "ä☕", LONG, [1.0, {"b": 2e20}]], ids=shortly
)
def test_unique_values_of_any_kind_stay_unique(store: MemoryStore, value: Any) -> None:
    """JSONB writes some numbers differently, and a database index takes no long text. Each value still has one fact."""

    class Anything(BaseModel):
        x: Any

    store.register_schema("any", Anything, unique_by="x")
    first = store.commit(Fact(type="any", payload={"x": value, "n": 1}))
    assert store.commit(Fact(type="any", payload={"x": value, "n": 2})) == first
    other = store.commit(Fact(type="any", payload={"x": "other"}))
    assert [fact.id for fact in store.query()] == [first, other]
    assert store.query(filters={"n": 2})[0].id == first


def test_a_durable_fact_takes_over_an_ephemeral_one(store: MemoryStore) -> None:
    """It belongs to the session that committed it last. It stays when the ephemeral session is discarded."""
    store.register_schema("profile", Profile, unique_by="user", immutable=True)
    mine, nobodys = Fact(type="profile", payload={"user": "u1"}), Fact(type="profile", payload={"user": "u2"})
    ids = [store.commit(fact, session_id="s1", ephemeral=True) for fact in (mine, nobodys)]
    assert [store.commit(mine, session_id="s2"), store.commit(nobodys)] == ids
    assert store.discard_session("s1") == store.discard_session("s2") == store.query(session_id="s1") == []
    assert [fact.id for fact in store.query(session_id="s2")] == ids[:1]
    assert_holds(store, {ids[0]: "user: u1", ids[1]: "user: u2"})


@pytest.mark.parametrize("holder", ["durable", "ephemeral in session 's1'"])
@pytest.mark.parametrize("ttl", [None, timedelta(minutes=1)])
def test_an_ephemeral_fact_replaces_its_own_kind_alone(store: MemoryStore, holder: str, ttl: timedelta | None) -> None:
    """A durable fact, and one of another session, keep payload, session and expiry."""
    store.register_schema("profile", Profile, unique_by="user")
    ephemeral = holder != "durable"
    held = Fact(type="profile", payload={"user": "u1", "city": "Rome"})
    id_ = store.commit(held, session_id="s1", ephemeral=ephemeral)
    other = Fact(type="profile", payload={"user": "u1", "city": "Oslo"})
    with pytest.raises(ConflictError, match=f"has the same unique values, and is {holder}"):
        store.commit(other, session_id="s2", ephemeral=True, ttl=ttl)
    [found] = store.query("profile")
    assert (found.payload["city"], found.session_id, found.expires_at) == ("Rome", "s1", None)
    if ephemeral:
        assert store.commit(other, session_id="s1", ephemeral=True, ttl=ttl) == id_
        assert store.discard_session("s1") == [id_]


@pytest.mark.parametrize("ephemeral", [False, True])
def test_expired_fact_does_not_block_its_unique_value(store: MemoryStore, ephemeral: bool) -> None:
    """The new fact has another id, whether the old one is swept or not. This holds for immutable types too."""
    store.register_schema("profile", Profile, unique_by="user", immutable=True)
    past = datetime(2000, 1, 1, tzinfo=UTC)
    old = store.commit(Fact(type="profile", payload={"user": "u1"}, expires_at=past), session_id="s1")
    new = store.commit(Fact(type="profile", payload={"user": "u1"}), session_id="s2", ephemeral=ephemeral)
    assert old != new and ops(store, old) == ["insert", "delete"]
    assert [(fact.id, fact.session_id, fact.ephemeral) for fact in store.query()] == [(new, "s2", ephemeral)]
    assert_holds(store, {new: "user: u1"})


def test_the_last_commit_says_how_long_a_fact_lives(store: MemoryStore) -> None:
    """A durable fact can shorten or prolong the life of a durable fact."""
    store.register_schema("profile", Profile, unique_by="user")
    for ttl in (None, timedelta(minutes=1), None):
        store.commit(Fact(type="profile", payload={"user": "u1"}), ttl=ttl)
        [fact] = store.query()
        assert (fact.expires_at is None) == (ttl is None)


# -- life -------------------------------------------------------------------------------------------------------------


def test_facts_are_usable_after_close(engine: Engine) -> None:
    """Facts are detached and complete: those of get() and query(), those of a transaction, and those of hits."""
    with opened(engine) as store:
        id_ = store.commit(note("likes tea"), session_id="s1")
        with store.transaction():
            joined = store.get(id_)
            store.update(id_, {"payload": {"cups": 2}})
        facts = [store.get(id_), store.query()[0], store.search("tea")[0].fact, joined]
        changes = store.history(id_)
    for fact in facts:
        assert fact is not None
        assert fact.payload == {"content": "likes tea", "cups": 2}
        assert (fact.id, fact.type, fact.session_id, fact.ephemeral) == (id_, "note", "s1", False)
        assert fact.updated_at >= fact.created_at
        assert fact not in Session(engine)
    assert [c.op for c in changes] == ["insert", "update"]


def test_a_closed_store_says_so(engine: Engine) -> None:
    """Closing twice does no harm. The caller's engine stays open."""
    store = opened(engine)
    id_ = store.commit(note("likes tea"))
    store.close()
    store.close()
    for call in (lambda: store.commit(note("x")), lambda: store.get(id_), store.query, lambda: store.search("tea")):
        with pytest.raises(MemstateError, match="This MemoryStore is closed"):
            call()
    with engine.connect() as connection:
        assert connection.scalars(select(Fact.id)).all() == [id_]


def relay_threads() -> set[threading.Thread]:
    return {thread for thread in threading.enumerate() if thread.name == "memstate-relay-memory"}


def test_a_relay_runs_in_the_background(engine: Engine) -> None:
    """A URL is enough. Committed facts reach the index by themselves, and close() ends the thread."""
    url = engine.url.render_as_string(hide_password=False)
    index, before = InMemoryIndex(), relay_threads()
    with MemoryStore(url, index, embedder=HashEmbedder()) as store:
        assert len(relay_threads() - before) == 1
        id_ = store.commit(note("likes tea"))
        point = point_of(id_)
        eventually(lambda: [entry.id for entry in index.scan(None, 5)] == [point])
        store.update(id_, {"payload": {"content": "likes coffee"}})
        embedded = HashEmbedder().embed(["content: likes coffee"])[0]
        eventually(lambda: bool((abs(index.get([point])[0].vector - embedded) < 1e-5).all()))
        hits = store.search("coffee")
        assert [hit.fact.payload["content"] for hit in hits] == ["likes coffee"]
        eventually(lambda: store.search("coffee").complete)
    assert not relay_threads() - before


def test_facts_outlive_the_store(engine: Engine) -> None:
    """The next store delivers the pending facts, knows their unique values, and undoes their transactions."""
    with opened(engine) as store:
        store.register_schema("profile", Profile, unique_by="user")
        id_ = store.commit(Fact(type="profile", payload={"user": "u1", "city": "Graz"}))
    with opened(engine) as store:
        store.register_schema("profile", Profile, unique_by="user")
        assert_holds(store, {id_: "user: u1\ncity: Graz"})
        assert store.commit(Fact(type="profile", payload={"user": "u1", "city": "Linz"})) == id_
        store.rollback(2)
        assert_holds(store, {})


def test_postgresql_url_without_driver_uses_psycopg(postgres_engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every PostgreSQL scheme uses psycopg. When it is not installed, the error names the extra."""
    url = postgres_engine.url.render_as_string(hide_password=False).partition("://")[2]
    for scheme in ("postgresql", "postgres", "postgresql+psycopg"):
        with opened(f"{scheme}://{url}") as store:
            assert store.engine.url.drivername == "postgresql+psycopg"
            id_ = store.commit(note(scheme))
            assert_holds(store, {id_: f"content: {scheme}"})
            store.delete(id_)
    for name in [name for name in sys.modules if name.partition(".")[0] == "psycopg"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "psycopg", None)
    with pytest.raises(MissingExtra, match=r"memstate-sa\[postgres\]"):
        opened(f"postgresql://{url}")


def test_store_takes_an_async_engine(engine: Engine) -> None:
    """The store is synchronous. It uses a sync engine of its own, on the same database."""
    asyncio = pytest.importorskip("sqlalchemy.ext.asyncio")
    driver = {"sqlite": "sqlite+aiosqlite", "postgresql": "postgresql+psycopg"}[engine.dialect.name]
    with opened(asyncio.create_async_engine(engine.url.set(drivername=driver))) as store:
        with pytest.raises(RuntimeError), store.transaction():
            store.commit(note("lost"))
            raise RuntimeError
        id_ = store.commit(note("likes tea"))
        assert_holds(store, {id_: "content: likes tea"})


# -- an in-memory SQLite ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("url", ["sqlite://", "sqlite:///:memory:"])
def test_in_memory_drains_after_each_commit(url: str) -> None:
    """There is no thread. The index has the fact when the call returns, or when the transaction ends."""
    index, before = InMemoryIndex(), relay_threads()
    with MemoryStore(url, index, embedder=HashEmbedder()) as store:

        def delivered() -> list[str]:
            return [entry.id for entry in index.scan(None, 9)]

        assert not relay_threads() - before
        id_ = store.commit(note("likes tea"))
        point = point_of(id_)
        assert delivered() == [point]
        with store.transaction():
            store.delete(id_)
            store.commit(note("likes coffee"))
            assert delivered() == [point]
        assert len(delivered()) == 1 and point not in delivered()
        store.rollback()
        assert delivered() == [point]
        with pytest.raises(RuntimeError), store.transaction():
            store.delete(id_)
            raise RuntimeError
        assert_holds(store, {id_: "content: likes tea"})


def test_in_memory_store_without_background_delivers_nothing() -> None:
    """Only a relay of the caller delivers."""
    index = InMemoryIndex()
    with opened("sqlite://", index) as store:
        id_ = store.commit(note("likes tea"))
        assert index.scan(None, 5) == []
        assert_holds(store, {id_: "content: likes tea"})


@pytest.mark.deep
def test_in_memory_is_thread_safe() -> None:
    """All threads share one connection. Each waits for the transactions of the others, and fails alone."""
    with opened("sqlite://", background=True) as store:

        def work(n: int) -> None:
            for round in range(5):
                try:
                    with store.transaction():
                        store.commit(note(f"{n} {round} a"))
                        contents(store)
                        store.commit(note(f"{n} {round} b"))
                        if (n + round) % 2:
                            raise KeyError
                except KeyError:
                    pass
                store.search(f"{n} {round}")

        assert in_threads(6, work) == []
        kept = {f"{n} {r} {half}" for n in range(6) for r in range(5) for half in "ab" if (n + r) % 2 == 0}
        facts = store.query()
        assert sorted(fact.payload["content"] for fact in facts) == sorted(kept)
        assert_holds(store, {fact.id: f"content: {fact.payload['content']}" for fact in facts})


def test_in_memory_commit_stands_while_the_index_is_down(monkeypatch: pytest.MonkeyPatch, caplog: Any) -> None:
    """A log line tells that the fact is not delivered. The next commit delivers both facts."""
    monkeypatch.setattr(parts, "DRAIN_TIMEOUT_S", 0.0)
    index = FlakyIndex(InMemoryIndex(), rate=0, partial=False)
    with opened("sqlite://", index, background=True) as store:
        index.rate = 1
        with caplog.at_level(logging.WARNING, "memstate_sa.store"):
            first = store.commit(note("likes tea"))
        assert "not delivered yet" in caplog.text
        index.rate = 0
        monkeypatch.undo()
        assert contents(store) == ["likes tea"]
        second = store.commit(note("likes rain"))
        assert_index_holds(
            index,
            HashEmbedder(),
            {point_of(first): "content: likes tea", point_of(second): "content: likes rain"},
        )


def test_in_memory_commit_stands_while_a_table_is_missing(caplog: Any) -> None:
    """The fact is committed. It is delivered as soon as all tracked tables can be read."""
    index = InMemoryIndex()
    with opened("sqlite://", index, background=True) as store:
        store.memory.track(Tag, text="meaning")
        with caplog.at_level(logging.WARNING, "memstate_sa.store"):
            first = store.commit(note("likes tea"))
        assert "not delivered yet: OperationalError" in caplog.text
        assert contents(store) == ["likes tea"]
        Base.metadata.create_all(store.engine)
        second = store.commit(note("likes rain"))
        expected = {point_of(first): "content: likes tea", point_of(second): "content: likes rain"}
        assert_index_holds(index, HashEmbedder(), expected)


@pytest.mark.filterwarnings("ignore::memstate_sa.db.sqlite.SavepointWarning")
def test_plain_sqlite_engine_has_whole_transactions(tmp_path: Path) -> None:
    """Even without sqlite.configure(), a transaction is all or nothing."""
    engine = create_engine(f"sqlite:///{tmp_path / 'plain.db'}")
    with opened(engine) as store:
        store.register_schema("profile", Profile, unique_by="user")
        with pytest.raises(RuntimeError), store.transaction():
            store.commit(Fact(type="profile", payload={"user": "u1"}))
            raise RuntimeError
        id_ = store.commit(Fact(type="profile", payload={"user": "u1"}))
        assert store.commit(Fact(type="profile", payload={"user": "u1", "city": "Graz"})) == id_
        assert_holds(store, {id_: "user: u1\ncity: Graz"})
        with engine.connect() as connection:
            assert connection.execute(text("SELECT count(*) FROM memstate_unique")).scalar_one() == 1
    engine.dispose()


@pytest.mark.parametrize(
    ("payload", "told"),
    [
        ({"a": {"b": [1, np.int64(2)]}}, "a.b.1 is a numpy.int64"),
        ({"a": np.array([1.0])}, "a is a numpy.ndarray"),
        ({"a": [object()]}, "a.0 is a object"),
        ({"a": {"b": float("nan")}}, "a.b is a float"),
        ({"a": {np.int64(1): 2}}, "a is a dict"),
    ],
    ids=["in a list", "array", "object", "nan", "as a name"],
)
def test_payload_that_is_no_json_is_named(store: MemoryStore, payload: dict[str, Any], told: str) -> None:
    """The error has its path and its type, for a commit and for an update.

    The test has one case of each kind, and a payload that contains itself.
    """
    kept = store.commit(Fact(type="note", payload={"content": "x"}))
    for change in (
        lambda: store.commit(Fact(type="note", payload=payload)),
        lambda: store.update(kept, {"payload": payload}),
    ):
        with pytest.raises(ValidationFailed, match=re.escape(told)):
            change()
    itself: dict[str, Any] = {}
    itself["a"] = itself
    with pytest.raises(ValidationFailed, match="is a dict"):
        store.commit(Fact(type="note", payload=itself))
    assert contents(store) == ["x"]


def test_payload_takes_what_pydantic_takes_as_json(store: MemoryStore) -> None:
    """A date becomes ISO text, a Decimal its digits, a set a list. Filters and updates take the same values."""
    at = datetime(2026, 1, 2, 3, tzinfo=UTC)
    given = {"content": "x", "at": at, "price": Decimal("1.50"), "tags": {"a"}, "id": UUID(int=1), "n": np.float64(0.5)}
    kept = store.commit(Fact(type="note", payload=given))
    store.update(kept, {"payload": {"day": at.date()}})
    [fact] = store.query(filters={"at": at, "price": Decimal("1.50"), "day": at.date(), "id": UUID(int=1), "n": 0.5})
    assert fact.payload == {
        "content": "x",
        "at": "2026-01-02T03:00:00Z",
        "price": "1.50",
        "tags": ["a"],
        "id": str(UUID(int=1)),
        "n": 0.5,
        "day": "2026-01-02",
    }
