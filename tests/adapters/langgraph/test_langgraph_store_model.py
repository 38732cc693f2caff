"""Random operations on a LangGraph store, compared with a dict."""

from __future__ import annotations

import itertools
import time
from datetime import datetime, timedelta
from typing import Any

import pytest
from hypothesis import HealthCheck, settings, strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule, run_state_machine_as_test
from sqlalchemy import Engine

pytest.importorskip("langgraph.store.base")

from langgraph.store.base import GetOp, PutOp, SearchOp

from tests.support import sizes
from tests.support.shelf import Shelf

LABELS = st.sampled_from(["a", "ab", "b", "A", "%", "_"])
NAMESPACES = st.lists(LABELS, min_size=1, max_size=3).map(tuple)
KEYS = st.sampled_from(["k", "K", "k.1"])
VALUES = st.sampled_from(
    [
        {},
        {"v": 1},
        {"v": True},
        {"v": "1", "text": "sweet red apple"},
        {"v": None, "more": ["green pear", "sweet red apple", "leek"]},
        {"v": [1, {"w": 2}], "more": ["leek"]},
        {"v": {"w": 2}, "text": "leek", "more": ["green pear"]},
    ]
)
TTLS = st.sampled_from([None, None, 1, 5.5])
INDEXES = st.sampled_from([None, None, False, ["more[1]"]])
FILTERS: list[tuple[Any, Any]] = [
    (None, lambda value: True),
    ({"v": 1}, lambda value: value.get("v") == 1 and value["v"] is not True),
    ({"v": True}, lambda value: value.get("v") is True),
    ({"v": None}, lambda value: value.get("v") is None),
    ({"v": {"$ne": "1"}}, lambda value: value.get("v") != "1"),
    ({"v": {"w": 2}}, lambda value: isinstance(value.get("v"), dict)),
    ({"v": {"$gte": 1}}, lambda value: value.get("v") == 1 and value["v"] is not True),
    ({"v": [1, {"w": {"$lt": 3}}]}, lambda value: isinstance(value.get("v"), list)),
]


class Held:
    """An item as the model knows it."""

    def __init__(
        self, value: dict[str, Any], texts: list[str], ttl: float | None, now: datetime, was: Held | None
    ) -> None:
        self.value, self.texts, self.ttl = value, texts, ttl
        same = was is not None and (was.value, was.texts, was.ttl) == (value, texts, ttl) and _is(was.value, value)
        self.created_at = now if was is None else was.created_at
        self.updated_at = was.updated_at if was is not None and same else now
        self.ends = None if ttl is None else now + timedelta(minutes=ttl)

    def read(self, now: datetime) -> None:
        if self.ttl is not None:
            self.ends = now + timedelta(minutes=self.ttl)


def _is(one: Any, other: Any) -> bool:
    return repr(one) == repr(other)  # True is not 1


def _texts(value: dict[str, Any], index: Any) -> list[str]:
    if index is False:
        return []
    if index is not None:
        return value.get("more", [])[1:2]
    return [*([value["text"]] if "text" in value else []), *value.get("more", [])]


class StoreMachine(RuleBasedStateMachine):
    shelf: Shelf
    numbers = itertools.count()

    def __init__(self) -> None:
        super().__init__()
        self.root = f"run{next(self.numbers)}"  # each run has its own namespace
        self.model: dict[tuple[tuple[str, ...], str], Held] = {}

    @property
    def now(self) -> datetime:
        return self.shelf.now

    def alive(self) -> dict[tuple[tuple[str, ...], str], Held]:
        return {at: held for at, held in self.model.items() if held.ends is None or held.ends > self.now}

    def put_in_model(self, puts: dict[tuple[tuple[str, ...], str], Any]) -> None:
        living = self.alive()
        for at, (value, index, ttl) in puts.items():
            if value is None:
                self.model.pop(at, None)
            else:
                self.model[at] = Held(value, _texts(value, index), ttl, self.now, living.get(at))

    @rule(namespace=NAMESPACES, key=KEYS, value=VALUES, index=INDEXES, ttl=TTLS)
    def put(self, namespace: Any, key: str, value: Any, index: Any, ttl: Any) -> None:
        at = ((self.root, *namespace), key)
        self.shelf.store.put(*at, value, index=index, ttl=ttl)
        self.put_in_model({at: (value, index, ttl)})

    @rule(namespace=NAMESPACES, key=KEYS)
    def delete(self, namespace: Any, key: str) -> None:
        self.shelf.store.delete((self.root, *namespace), key)
        self.put_in_model({((self.root, *namespace), key): (None, None, None)})

    @rule(
        given=st.lists(st.tuples(NAMESPACES, KEYS, st.none() | VALUES, INDEXES, TTLS), min_size=1, max_size=5),
        get=st.tuples(NAMESPACES, KEYS),
        refresh=st.booleans(),
    )
    def batch(self, given: list[Any], get: Any, refresh: bool) -> None:
        puts = [PutOp((self.root, *namespace), key, *more) for namespace, key, *more in given]
        at = ((self.root, *get[0]), get[1])
        middle = len(puts) // 2
        reads = [GetOp(*at, refresh), SearchOp((self.root,), refresh_ttl=False)]
        results = self.shelf.store.batch([*puts[:middle], *reads, *puts[middle:]])
        before = self.alive()
        found: Any = results[middle]
        assert (None if found is None else found.value) == (before[at].value if at in before else None)
        seen: Any = results[middle + 1]
        assert len(seen) == min(len(before), 10)
        if refresh and at in before:
            before[at].read(self.now)
        self.put_in_model({((self.root, *namespace), key): tuple(more) for namespace, key, *more in given})

    @rule(minutes=st.sampled_from([0.5, 1, 4, 6]))
    def wait(self, minutes: float) -> None:
        self.shelf.later(minutes)

    @rule(namespace=NAMESPACES, key=KEYS, refresh=st.booleans())
    def get(self, namespace: Any, key: str, refresh: bool) -> None:
        at = ((self.root, *namespace), key)
        found, expected = self.shelf.store.get(*at, refresh_ttl=refresh), self.alive().get(at)
        if expected is None:
            assert found is None
            return
        assert found is not None
        assert _is(sorted(found.value.items()), sorted(expected.value.items()))
        assert (found.created_at, found.updated_at) == (expected.created_at, expected.updated_at)
        if refresh:
            expected.read(self.now)

    @rule(
        prefix=st.lists(LABELS, max_size=2).map(tuple),
        which=st.integers(0, len(FILTERS) - 1),
        query=st.sampled_from([None, "sweet red apple", "leek"]),
        refresh=st.booleans(),
    )
    def search(self, prefix: Any, which: int, query: str | None, refresh: bool) -> None:
        wanted, fits = FILTERS[which]
        within = (self.root, *prefix)
        found = self.shelf.store.search(within, query=query, filter=wanted, limit=1000, refresh_ttl=refresh)
        expected = {
            at: held for at, held in self.alive().items() if at[0][: len(within)] == within and fits(held.value)
        }
        assert {(item.namespace, item.key): item.value for item in found} == {at: h.value for at, h in expected.items()}
        assert len(found) == len(expected)
        if query is not None:
            [wanted_vector] = self.shelf.embedder.embed([query])
            scores = {
                at: max((float(v @ wanted_vector) for v in self.shelf.embedder.embed(h.texts)), default=None)
                for at, h in expected.items()
            }
            for item in found:
                assert item.score == pytest.approx(scores[item.namespace, item.key], abs=1e-5)
            ranked = [item.score for item in found if item.score is not None]
            assert ranked == sorted(ranked, reverse=True)
            assert [item.score is None for item in found] == [False] * len(ranked) + [True] * (len(found) - len(ranked))
        if refresh:
            for held in expected.values():
                held.read(self.now)

    @rule(
        depth=st.sampled_from([None, 1, 2, 3]),
        suffix=st.none() | st.lists(LABELS | st.just("*"), max_size=2).map(tuple),
    )
    def list_namespaces(self, depth: int | None, suffix: Any) -> None:
        found = self.shelf.store.list_namespaces(prefix=(self.root,), suffix=suffix, max_depth=depth, limit=1000)

        def fits(namespace: tuple[str, ...]) -> bool:
            end = suffix or ()
            pairs = zip(namespace[len(namespace) - len(end) :], end, strict=False)
            return len(namespace) >= len(end) and all(wanted in ("*", label) for label, wanted in pairs)

        assert found == sorted({namespace[:depth] for namespace, _ in self.alive() if fits(namespace)})

    @rule()
    def sweep(self) -> None:
        self.shelf.store.sweep_ttl()
        self.model = self.alive()

    @rule()
    def deliver(self) -> None:
        self.shelf.memory.relay(self.shelf.engine).drain()

    @invariant()
    def nothing_is_locked(self) -> None:
        deadline = time.monotonic() + 60  # notifying other relays takes a connection for a moment
        while self.shelf.engine.pool.checkedout():  # type: ignore[attr-defined]
            assert time.monotonic() < deadline, "a connection was not given back"
            time.sleep(0.001)

    def teardown(self) -> None:
        assert {
            (item.namespace, item.key): item.value
            for item in self.shelf.store.search((self.root,), limit=1000, refresh_ttl=False)
        } == {at: held.value for at, held in self.alive().items()}
        if next(self.numbers) % 10 == 0:  # of all runs so far
            self.shelf.assert_in_step()


@pytest.mark.deep_on("postgres")
@pytest.mark.parametrize("examples", sizes(6, 25))
def test_a_store_does_what_a_dict_would(engine: Engine, examples: int) -> None:
    made = Shelf(engine, index={"fields": ["text", "more[*]"]})
    try:
        run_state_machine_as_test(
            type("Machine", (StoreMachine,), {"shelf": made}),
            settings=settings(
                max_examples=examples,
                stateful_step_count=30,
                deadline=None,
                suppress_health_check=list(HealthCheck),
            ),
        )
        made.assert_in_step()
    finally:
        made.memory.close()
