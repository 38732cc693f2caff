"""The behaviour of a LangGraph store, tested on LangGraph's InMemoryStore and on ours, on both databases.

Our store follows PostgresStore or JSON if LangGraph's stores differ. Tests of such behaviour run on ours only, and say
so.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable
from typing import Any

import pytest

pytest.importorskip("langgraph.store.base")

from langgraph.store.base import (
    BaseStore,
    GetOp,
    InvalidNamespaceError,
    ListNamespacesOp,
    MatchCondition,
    PutOp,
    SearchItem,
    SearchOp,
)
from langgraph.store.memory import InMemoryStore

from memstate_sa import Memory
from memstate_sa.indexes import InMemoryIndex
from memstate_sa.integrations.langgraph import MemStateStore, store as langgraph_store
from memstate_sa.testing import HashEmbedder

Make = Callable[..., BaseStore]
PEOPLE = ("people",)


def ours(engine: Any) -> Make:
    def make(fields: list[str] | None = None) -> BaseStore:
        memory = Memory(InMemoryIndex(), embedder=HashEmbedder())
        store = MemStateStore(engine, memory=memory, index={"fields": fields} if fields else False)
        store.setup()
        return store

    return make


def theirs(fields: list[str] | None = None) -> BaseStore:
    def embed(texts: Any) -> list[list[float]]:
        return [vector.tolist() for vector in HashEmbedder().embed(list(texts))]

    return InMemoryStore(index={"dims": 64, "embed": embed, "fields": fields} if fields else None)


@pytest.fixture(params=["reference", "sqlite", "postgres"])
def make(request: pytest.FixtureRequest) -> Make:
    if request.param == "reference":
        return theirs
    return ours(request.getfixturevalue(f"{request.param}_engine"))


@pytest.fixture
def store(make: Make) -> BaseStore:
    return make()


@pytest.fixture(params=["sqlite", "postgres"])
def our_store(request: pytest.FixtureRequest) -> BaseStore:
    return ours(request.getfixturevalue(f"{request.param}_engine"))()


def keys(found: Any) -> list[str]:
    return [item.key for item in found]


# -- items -------------------------------------------------------------------------------------------------------------

VALUES: list[Any] = [
    {},
    {"text": "", "unicode": "Grüße, 世界 \U0001f9e0", "escapes": 'a"b\\c\n\t/\u2028'},
    {"n": 0, "negative": -1, "float": 1.5, "small": 1e-9, "big": 2**53, "yes": True, "no": False, "nothing": None},
    {"nested": {"list": [1, "2", None, [True, {}], {"deep": {"er": []}}]}},
    {"": "no name", "a.b": 1, "$x": 2, 'quo"te': 3, "[0]": 4, "*": 5, "ключ": 6},
]


def test_get_returns_the_value_that_was_put(store: BaseStore) -> None:
    for n, value in enumerate(VALUES):
        store.put(PEOPLE, str(n), value)
        item = store.get(PEOPLE, str(n))
        assert item is not None
        assert (item.namespace, item.key, item.value) == (PEOPLE, str(n), value)
        assert repr(dict(sorted(item.value.items()))) == repr(dict(sorted(value.items())))  # 1 is neither True nor 1.0
        assert item.created_at <= item.updated_at
        assert item.created_at.tzinfo is not None


KEYS = ["", " ", "a/b", "a.b", "*", "%", "_", "'; DROP TABLE memstate_item; --", "k" * 5000]


def test_any_text_is_a_key(store: BaseStore) -> None:
    for n, key in enumerate(KEYS):
        store.put(PEOPLE, key, {"n": n})
    assert [store.get(PEOPLE, key).value for key in KEYS] == [{"n": n} for n in range(len(KEYS))]  # type: ignore[union-attr]
    assert [store.get(PEOPLE, key + "x") for key in KEYS] == [None] * len(KEYS)
    assert sorted(keys(store.search(PEOPLE))) == sorted(KEYS)


def test_a_key_is_within_its_namespace(store: BaseStore) -> None:
    store.put(("a", "b"), "k", {"n": 1})
    for namespace, key in ((("a",), "k"), (("a", "b", "c"), "k"), (("b",), "k"), (("ab",), "k"), (("a",), "b\x00k")):
        assert store.get(namespace, key) is None
    for key in ("k\x00", "\x00k", "b\x00\x00k"):
        assert store.get(("a", "b"), key) is None
        assert store.get(("a",), key) is None


def test_a_later_put_replaces_the_whole_value(store: BaseStore) -> None:
    store.put(PEOPLE, "ann", {"a": 1, "b": {"c": 2}})
    first = store.get(PEOPLE, "ann")
    store.put(PEOPLE, "ann", {"b": {"d": 3}})
    second = store.get(PEOPLE, "ann")
    assert first is not None and second is not None
    assert second.value == {"b": {"d": 3}}
    assert second.updated_at > first.updated_at


def test_put_replaces_a_value_that_python_finds_equal(store: BaseStore) -> None:
    for one, other in [(1, True), (0, False), ("1", 1), (None, False), ([], {}), ([1], [True])]:
        store.put(PEOPLE, "ann", {"v": one})
        store.put(PEOPLE, "ann", {"v": other})
        assert repr(store.get(PEOPLE, "ann").value) == repr({"v": other})  # type: ignore[union-attr]


def test_delete_removes_one_item(store: BaseStore) -> None:
    store.put(PEOPLE, "ann", {"n": 1})
    store.put(PEOPLE, "bob", {"n": 2})
    store.delete(PEOPLE, "ann")
    store.delete(PEOPLE, "nobody")
    assert store.get(PEOPLE, "ann") is None
    assert keys(store.search(())) == ["bob"]


def test_put_and_get_copy_the_value(our_store: BaseStore) -> None:
    """InMemoryStore returns its own object."""
    value = {"list": [1]}
    our_store.put(PEOPLE, "ann", value)
    value["list"].append(2)
    found = our_store.get(PEOPLE, "ann")
    assert found is not None and found.value == {"list": [1]}
    found.value["list"].append(3)
    assert our_store.get(PEOPLE, "ann").value == {"list": [1]}  # type: ignore[union-attr]


def test_a_replaced_item_keeps_the_time_of_its_creation(our_store: BaseStore) -> None:
    """PostgresStore does the same. InMemoryStore and SqliteStore treat each put as a creation."""
    our_store.put(PEOPLE, "ann", {"n": 1})
    first = our_store.get(PEOPLE, "ann")
    our_store.put(PEOPLE, "ann", {"n": 2})
    second = our_store.get(PEOPLE, "ann")
    assert first is not None and second is not None
    assert second.created_at == first.created_at < second.updated_at


# -- batches -----------------------------------------------------------------------------------------------------------


def test_reads_of_a_batch_see_the_items_before_it(store: BaseStore) -> None:
    store.put(PEOPLE, "ann", {"n": 1})
    results = store.batch(
        [
            PutOp(PEOPLE, "ann", {"n": 2}),
            GetOp(PEOPLE, "ann"),
            PutOp(("new",), "bob", {"n": 3}),
            ListNamespacesOp(),
            SearchOp(()),
            GetOp(("new",), "bob"),
            PutOp(PEOPLE, "ann", None),
        ]
    )
    assert [results[n] for n in (0, 2, 5, 6)] == [None] * 4
    assert results[1].value == {"n": 1}  # type: ignore[union-attr]
    assert [item.value for item in results[4]] == [{"n": 1}]  # type: ignore[union-attr]
    assert results[3] == [PEOPLE]
    assert store.get(PEOPLE, "ann") is None
    assert store.get(("new",), "bob").value == {"n": 3}  # type: ignore[union-attr]


def test_the_last_put_of_a_key_counts(store: BaseStore) -> None:
    for values in [[{"n": 1}, {"n": 2}], [{"n": 1}, None], [None, {"n": 1}], [None, {"n": 1}, None]]:
        store.put(PEOPLE, "ann", {"n": 0})
        store.batch([PutOp(PEOPLE, "ann", value) for value in values])
        found = store.get(PEOPLE, "ann")
        assert (None if found is None else found.value) == values[-1]


async def test_async_methods_agree_with_sync_ones(store: BaseStore) -> None:
    await store.aput(PEOPLE, "ann", {"n": 1})
    await store.aput(("x", "y"), "bob", {"n": 2})
    assert (await store.aget(PEOPLE, "ann")).value == {"n": 1}  # type: ignore[union-attr]
    assert keys(await store.asearch(("x",), filter={"n": 2})) == ["bob"]
    assert await store.alist_namespaces(max_depth=1) == [("people",), ("x",)]
    await store.adelete(PEOPLE, "ann")
    results = await store.abatch([GetOp(PEOPLE, "ann"), GetOp(("x", "y"), "bob")])
    assert [None if item is None else item.value for item in results] == [None, {"n": 2}]  # type: ignore[union-attr]


def test_empty_batch_returns_nothing(store: BaseStore) -> None:
    assert store.batch([]) == []


# -- namespaces --------------------------------------------------------------------------------------------------------


def test_a_bad_namespace_is_refused(store: BaseStore) -> None:
    bad: list[Any] = [(), ("",), ("a", ""), ("a.b",), ("langgraph",), ("langgraph", "x"), ("a", 1), ("a\x00",)]
    for namespace in bad:
        with pytest.raises(InvalidNamespaceError):
            store.put(namespace, "k", {"n": 1})
    assert store.search(()) == []


def test_a_bad_namespace_in_a_batch_is_refused(our_store: BaseStore) -> None:
    """Otherwise ("a.b",) would be another name for ("a", "b"). InMemoryStore checks only put() and get()."""
    bad: list[Any] = [("a.b",), ("a", ""), ("a\x00",)]
    for namespace in bad:
        for op in (
            PutOp(namespace, "k", {"n": 1}),
            GetOp(namespace, "k"),
            SearchOp(namespace),
            ListNamespacesOp((MatchCondition("prefix", namespace),)),
        ):
            with pytest.raises(InvalidNamespaceError):
                our_store.batch([PutOp(PEOPLE, "ann", {"n": 1}), op])
    with pytest.raises(InvalidNamespaceError):
        our_store.batch([PutOp((), "k", {"n": 1})])
    assert our_store.search(()) == []


def test_nul_in_a_label_is_refused(our_store: BaseStore, monkeypatch: pytest.MonkeyPatch) -> None:
    """Our own code refuses it: langgraph-checkpoint 4.3.0 lets it pass, and history() has no such check."""
    assert isinstance(our_store, MemStateStore)
    our_store.put(("mem", "ann", "private"), "k", {"n": 1})
    monkeypatch.setattr(langgraph_store, "validate_op_namespace", lambda op: None)
    other = ("mem", "ann\x00private")
    for op in (PutOp(other, "k", {"n": 2}), PutOp(other, "k", None), GetOp(other, "k"), SearchOp(other)):
        with pytest.raises(InvalidNamespaceError):
            our_store.batch([op])
    for ask in (our_store.history, our_store.erase):
        with pytest.raises(InvalidNamespaceError):
            ask(other, "k")
    assert [item.value for item in our_store.search(())] == [{"n": 1}]


NAMESPACES: list[tuple[str, ...]] = [
    ("foo",),
    ("foo", "bar"),
    ("foo", "bar", "baz"),
    ("foobar",),
    ("foo bar",),
    ("foo-bar", "x"),
    ("Foo",),
    ("FOO", "bar"),
    ("fo",),
    ("f%o", "bar"),
    ("f_o",),
    ("fô", "bar"),
    ("bar", "foo"),
    ("a", "foo", "bar"),
    ("langgraphs",),
    ("*", "b"),
    ("世界", "bar"),
    ("\U0001f9e0",),
]


@pytest.fixture
def many(store: BaseStore) -> BaseStore:
    store.batch([PutOp(namespace, "k", {"of": list(namespace)}) for namespace in NAMESPACES])
    return store


def test_a_search_is_within_a_namespace(many: BaseStore) -> None:
    """`LIKE 'foo%'` would find foobar, F% would find foo, and a collation may treat ô as o."""
    for prefix in [(), *NAMESPACES, ("f",), ("bar",), ("foo", "ba"), ("foo", "bar", "baz", "x"), ("%",)]:
        found = many.search(prefix, limit=100)
        expected = sorted(namespace for namespace in NAMESPACES if namespace[: len(prefix)] == prefix)
        assert sorted(item.namespace for item in found) == expected
        assert sorted(tuple(item.value["of"]) for item in found) == expected


CONDITIONS: list[dict[str, Any]] = [
    {},
    *({"prefix": namespace} for namespace in NAMESPACES),
    *({"suffix": namespace} for namespace in NAMESPACES),
    {"prefix": ("foo", "*")},
    {"prefix": ("*", "bar")},
    {"prefix": ("*", "*", "*")},
    {"suffix": ("*", "bar")},
    {"suffix": ("foo", "*")},
    {"suffix": ("bar",), "prefix": ("foo",)},
    {"suffix": ("foo",), "prefix": ("foo",)},
    {"prefix": ("nothing",)},
]


def test_list_namespaces_matches_prefix_suffix_and_depth(many: BaseStore) -> None:
    """Namespaces are sorted by labels, cut to the depth, and unique."""
    for given, depth in itertools.product(CONDITIONS, [None, 1, 2, 3]):
        prefix, suffix = given.get("prefix", ()), given.get("suffix", ())

        def fits(namespace: tuple[str, ...], prefix: Any = prefix, suffix: Any = suffix) -> bool:
            if len(namespace) < max(len(prefix), len(suffix)):
                return False
            pairs = [*zip(namespace, prefix, strict=False), *zip(reversed(namespace), reversed(suffix), strict=False)]
            return all(wanted in ("*", label) for label, wanted in pairs)

        expected = sorted({namespace[:depth] for namespace in NAMESPACES if fits(namespace)})
        assert many.list_namespaces(**given, max_depth=depth) == expected
        windows = range(0, len(expected) + 4, 4) if depth in (None, 2) else ()
        pages = [many.list_namespaces(**given, max_depth=depth, limit=4, offset=n) for n in windows]
        assert not windows or [namespace for page in pages for namespace in page] == expected


def test_several_conditions_of_a_kind_must_all_hold(many: BaseStore) -> None:
    conditions = (
        MatchCondition("prefix", ("foo",)),
        MatchCondition("prefix", ("*", "bar")),
        MatchCondition("suffix", ("baz",)),
    )
    assert many.batch([ListNamespacesOp(conditions)]) == [[("foo", "bar", "baz")]]
    assert many.batch([ListNamespacesOp((MatchCondition("prefix", ()),), limit=2)]) == [sorted(NAMESPACES)[:2]]


def test_namespace_without_items_is_not_listed(our_store: BaseStore) -> None:
    """Stores in databases do the same. InMemoryStore still lists it."""
    our_store.put(("a", "b"), "k", {"n": 1})
    our_store.put(("c",), "k", {"n": 1})
    our_store.delete(("a", "b"), "k")
    assert our_store.list_namespaces() == [("c",)]


# -- filters -----------------------------------------------------------------------------------------------------------

DOCUMENTS: dict[str, Any] = {
    "empty": {},
    "null": {"v": None, "w": 1},
    "one": {"v": 1, "w": 2},
    "float": {"v": 1.5},
    "ten": {"v": 10},
    "negative": {"v": -3},
    "text": {"v": "b"},
    "quote": {"v": 'it\'s "b"'},
    "digits": {"v": "10"},
    "true": {"v": True},
    "false": {"v": False},
    "list": {"v": [1, "b", None]},
    "no items": {"v": []},
    "object": {"v": {"a": 1, "b": {"c": [1, {"d": 2}]}}},
    "nothing": {"v": {}},
    "a null inside": {"v": {"a": None}},
    "names": {"a.b": 1, 'quo"te': 2, "$.v": 3, "v": {"0": "zero"}, "": 4},
}


def matching(store: BaseStore, wanted: dict[str, Any]) -> list[str]:
    return sorted(keys(store.search((), filter=wanted, limit=100)))


@pytest.fixture
def documents(store: BaseStore) -> BaseStore:
    store.batch([PutOp(("docs",), key, value) for key, value in DOCUMENTS.items()])
    return store


FILTERS: list[tuple[Any, list[str]]] = [
    ({"v": 10}, ["ten"]),
    ({"v": 10.0}, ["ten"]),
    ({"v": 1.5}, ["float"]),
    ({"v": "b"}, ["text"]),
    ({"v": "10"}, ["digits"]),
    ({"v": 'it\'s "b"'}, ["quote"]),
    ({"v": None}, ["empty", "null"]),
    ({"v": {"$eq": None}}, ["empty", "null"]),
    ({"v": {"$ne": None}}, sorted(set(DOCUMENTS) - {"empty", "null"})),
    ({"v": {"$ne": "b"}}, sorted(set(DOCUMENTS) - {"text"})),
    ({"v": {"$ne": 10}, "w": 2}, ["one"]),
    ({"v": {"$eq": "b"}}, ["text"]),
    ({"v": [1, "b", None]}, ["list"]),
    ({"v": []}, ["no items"]),
    ({"v": [1, "b"]}, []),
    ({"v": [None]}, []),
    ({"v": {"a": 1}}, ["object"]),
    ({"v": {"b": {"c": [1, {"d": 2}]}}}, ["object"]),
    ({"v": {"b": {"c": [1, {}]}}}, ["object"]),
    ({"v": {"b": {"c": [1, {"d": 3}]}}}, []),
    ({"v": {"a": None}}, ["a null inside", "names", "nothing"]),
    ({"v": {}}, ["a null inside", "names", "nothing", "object"]),
    ({"v": {"$eq": {}}}, ["nothing"]),
    ({"v": {"$eq": {"a": 1}}}, []),
    ({"v": {"$eq": {"a": 1, "b": {"c": [1, {"d": 2}]}}}}, ["object"]),
    ({"v": {"$eq": {"a": None}}}, ["a null inside"]),
    ({"v": {"0": "zero"}}, ["names"]),
    ({"a.b": 1}, ["names"]),
    ({'quo"te': 2}, ["names"]),
    ({"": 4}, ["names"]),
    ({"v'); DROP TABLE memstate_item; --": 1}, []),
    ({"w": 1, "v": None}, ["null"]),
    ({}, sorted(DOCUMENTS)),
]


def test_filters_match_their_documents(documents: BaseStore) -> None:
    for wanted, expected in FILTERS:
        assert matching(documents, wanted) == expected, wanted


@pytest.fixture
def our_documents(our_store: BaseStore) -> BaseStore:
    our_store.batch([PutOp(("docs",), key, value) for key, value in DOCUMENTS.items()])
    return our_store


ORDERINGS: list[tuple[Any, list[str]]] = [
    ({"v": {"$gt": 1}}, ["float", "ten"]),
    ({"v": {"a": {"$gt": 0}}}, ["object"]),
    ({"w": {"$gt": 1}}, ["one"]),
    ({"v": {"$gte": 1}}, ["float", "one", "ten"]),
    ({"v": {"$lt": 1.5}}, ["negative", "one"]),
    ({"v": {"$lte": 1.5}}, ["float", "negative", "one"]),
    ({"v": {"$gt": 1, "$lt": 10}}, ["float"]),
    ({"v": {"$gt": "1"}}, ["digits", "quote", "text"]),
    ({"v": {"$gte": "b", "$ne": 'it\'s "b"'}}, ["text"]),
    ({"v": {"$lt": "B"}}, ["digits"]),
    ({"v": {"$gt": 10**30}}, []),
    ({"v": {"$lt": 10**30, "$gt": 2}}, ["ten"]),
    # JSON's own types. In Python, True equals 1.
    ({"v": 1}, ["one"]),
    ({"v": True}, ["true"]),
    ({"v": 0}, []),
    ({"v": False}, ["false"]),
    ({"v": {"$eq": [True, "b", None]}}, []),
    ({"v": {"$ne": True}}, sorted(set(DOCUMENTS) - {"true"})),
]


def test_an_ordering_compares_like_with_like(our_documents: BaseStore) -> None:
    """Ours only: "10" < "9" in PostgresStore, and InMemoryStore raises if a document has no number there."""
    for wanted, expected in ORDERINGS:
        assert matching(our_documents, wanted) == expected, wanted


def test_other_operators_are_refused(documents: BaseStore) -> None:
    for wanted in ({"$in": [1]}, {"$exists": True}, {"$ne": 7, "$nope": 2}, {"$ne": 7, "plain": 2}):
        with pytest.raises(ValueError, match=r"(Unknown|nsupported) operator"):
            documents.search(("docs",), filter={"w": wanted})


def test_comparison_with_an_unordered_value_is_refused(our_documents: BaseStore) -> None:
    for wanted in (None, True, [1], {"a": 1}):
        with pytest.raises(ValueError, match="needs a number or a string"):
            our_documents.search(("docs",), filter={"v": {"$gt": wanted}})


def test_a_filter_that_is_no_json_is_refused(our_documents: BaseStore) -> None:
    bad: list[Any] = [{"v": float("nan")}, {"v": "\x00"}, {"v": "\ud800"}, {"v": object()}, {1: 1}, [1], {"v": 10**400}]
    for wanted in bad:
        with pytest.raises(ValueError, match="filter"):
            our_documents.search(("docs",), filter=wanted)


# -- pages -------------------------------------------------------------------------------------------------------------


def test_pages_show_each_item_once(store: BaseStore) -> None:
    store.batch([PutOp(("p", str(n % 3)), f"k{n}", {"n": n, "even": n % 2 == 0}) for n in range(25)])
    for wanted, expected in (({}, range(25)), ({"even": True}, range(0, 25, 2))):
        pages = [store.search(("p",), filter=wanted, limit=4, offset=n) for n in range(0, 28, 4)]
        assert sorted(item.value["n"] for page in pages for item in page) == list(expected)
        assert all(len(page) == 4 for page in pages[: len(expected) // 4])
    assert len(store.search(("p",))) == 10
    assert store.search(("p",), limit=0) == []
    assert store.search(("p",), offset=30) == []


def test_the_latest_come_first(our_store: BaseStore) -> None:
    """Stores in databases do the same. InMemoryStore sorts by namespace, then by first put."""
    for key in ("a", "b", "c", "a"):
        our_store.put(PEOPLE, key, {"at": key, "again": len(our_store.search(()))})
    assert keys(our_store.search(())) == ["a", "c", "b"]


def test_negative_limits_and_offsets_are_refused(our_store: BaseStore) -> None:
    windows: list[dict[str, Any]] = [{"limit": -1}, {"offset": -1}]
    for given in windows:
        with pytest.raises(ValueError, match="at least 0"):
            our_store.search((), **given)
        with pytest.raises(ValueError, match="at least 0"):
            our_store.list_namespaces(**given)
    with pytest.raises(ValueError, match="at least 1"):
        our_store.list_namespaces(max_depth=0)


# -- by meaning --------------------------------------------------------------------------------------------------------

FOODS = {
    "apple": {"text": "a sweet red apple", "note": "fruit", "kind": "fruit"},
    "pear": {"text": "a green pear", "note": "fruit", "kind": "fruit"},
    "leek": {"text": "leek and potato", "note": "vegetable", "kind": "vegetable"},
    "other apple": {"text": "the sweetest red apples", "note": "apples", "kind": "fruit"},
    "none": {"kind": "fruit"},
}


def expected_scores(query: str, texts: dict[str, list[str]]) -> dict[str, float]:
    """The best score of each item, by the embedder itself."""
    embed = HashEmbedder().embed
    wanted = embed([query])[0]
    return {key: max(float(vector @ wanted) for vector in embed(words)) for key, words in texts.items() if words}


def put_all(store: BaseStore, namespace: tuple[str, ...] = ("food",), **options: Any) -> None:
    for key, value in FOODS.items():
        store.put(namespace, key, value, **options)


@pytest.mark.parametrize("fields", [["text"], ["text", "note"], ["$"], ["missing", "note"]])
def test_the_nearest_come_first(make: Make, fields: list[str]) -> None:
    """The score is that of the item's nearest field. Items without fields come last, without a score."""
    store = make(fields)
    put_all(store)
    texts = {
        key: [json.dumps(value, sort_keys=True)] if fields == ["$"] else [value[f] for f in fields if f in value]
        for key, value in FOODS.items()
    }
    scores = expected_scores("sweet red apples", texts)
    found = store.search(("food",), query="sweet red apples")
    assert all(isinstance(item, SearchItem) for item in found)
    ranked, others = found[: len(scores)], found[len(scores) :]
    assert {item.key: item.score for item in ranked} == pytest.approx(scores, abs=1e-5)
    assert [item.score for item in ranked] == sorted((item.score for item in ranked), reverse=True)  # type: ignore[type-var]
    assert {item.key: item.score for item in others} == dict.fromkeys(set(FOODS) - set(scores))
    assert {item.key: item.value for item in found} == FOODS


def test_each_text_of_a_list_is_a_vector_of_its_own(make: Make) -> None:
    store = make(["notes[*].text"])
    values = {
        "many": {"notes": [{"text": "rain"}, {"text": "sweet red apples"}, {"text": "tax forms"}]},
        "one": {"notes": [{"text": "sweet green apples"}]},
        "no": {"notes": []},
    }
    for key, value in values.items():
        store.put(("n",), key, value)
    found = store.search(("n",), query="sweet red apples", limit=3)
    assert keys(found) == ["many", "one", "no"]
    assert found[0].score == pytest.approx(1.0, abs=1e-5)
    texts = {key: [note["text"] for note in value["notes"]] for key, value in values.items()}
    assert {i.key: i.score for i in found[:2]} == pytest.approx(expected_scores("sweet red apples", texts), abs=1e-5)


def test_many_texts_of_one_item_leave_room_for_others(make: Make) -> None:
    """An item is one result, even if several of its texts are near."""
    store = make(["notes[*]"])
    store.put(("n",), "loud", {"notes": [f"sweet red apple number {n}" for n in range(40)]})
    for n in range(6):
        store.put(("n",), f"quiet {n}", {"notes": [f"green pear number {n}"]})
    pages = [store.search(("n",), query="sweet red apple", limit=3, offset=offset) for offset in (0, 3, 6, 9)]
    assert pages[0][0].key == "loud"
    assert [item.score is None for page in pages for item in page] == [False] * 7
    assert sorted(item.key for page in pages for item in page) == ["loud", *(f"quiet {n}" for n in range(6))]


def test_put_can_name_its_own_index_paths(make: Make) -> None:
    """`index=` of a put applies to this put: its own paths, or False for none."""
    store = make(["text"])
    store.put(("i",), "own", {"text": "tax forms", "other": "sweet red apple"}, index=["other"])
    store.put(("i",), "default", {"text": "sweet red pear"})
    store.put(("i",), "none", {"text": "sweet red apple"}, index=False)
    found = store.search(("i",), query="sweet red apple")
    assert [(item.key, item.score is None) for item in found] == [("own", False), ("default", False), ("none", True)]


def test_reused_key_is_not_found_by_its_old_text(our_store: BaseStore) -> None:
    """langgraph#8757: in LangGraph, the old vector stays and ranks the new value."""
    engine: Any = our_store.engine  # type: ignore[attr-defined]
    store = ours(engine)(["text"])

    def scored() -> dict[str, bool]:
        return {item.key: item.score is not None for item in store.search(("i",), query="sweet red apple")}

    store.put(("i",), "a", {"text": "sweet red apple"})
    store.put(("i",), "b", {"text": "sweet red apple"})
    assert scored() == {"a": True, "b": True}
    store.put(("i",), "a", {"text": "sweet red apple"}, index=False)
    store.delete(("i",), "b")
    assert scored() == {"a": False}
    store.put(("i",), "b", {"n": 1})
    assert scored() == {"a": False, "b": False}
    store.put(("i",), "b", {"text": "tax forms"})
    [best] = [item for item in store.search(("i",), query="sweet red apple") if item.score is not None]
    assert best.score == pytest.approx(expected_scores("sweet red apple", {"b": ["tax forms"]})["b"], abs=1e-5)


def test_removed_text_of_a_list_is_not_found(our_store: BaseStore) -> None:
    """A text that was removed from a list is not found."""
    engine: Any = our_store.engine  # type: ignore[attr-defined]
    store = ours(engine)(["notes[*]"])
    store.put(("n",), "a", {"notes": ["rain", "sweet red apple", "tax"]})
    store.put(("n",), "a", {"notes": ["rain", "tax"]})
    [found] = store.search(("n",), query="sweet red apple")
    assert found.score == pytest.approx(expected_scores("sweet red apple", {"a": ["rain", "tax"]})["a"], abs=1e-5)
    assert found.score < 0.9  # type: ignore[operator]


def test_search_by_meaning_keeps_to_namespace_and_filter(make: Make) -> None:
    store = make(["text"])
    for namespace in (("food",), ("food", "home"), ("foods",), ("other",)):
        put_all(store, namespace)
    found = store.search(("food",), query="red apple", filter={"kind": "fruit"}, limit=100)
    assert {item.namespace for item in found} == {("food",), ("food", "home")}
    fruits = {key for key, value in FOODS.items() if value["kind"] == "fruit"}
    assert sorted(keys(found)) == sorted([*fruits, *fruits])
    assert [item.score is None for item in found] == [False] * 6 + [True] * 2


def test_ranked_items_appear_once_across_pages(make: Make) -> None:
    """Ranked items come in order across pages. InMemoryStore returns unranked items on each page: see the next test."""
    store = make(["text"])
    store.batch([PutOp(("p",), f"k{n}", {"text": f"apple number {n}"}) for n in range(20)])
    whole = store.search(("p",), query="apple number 7", limit=20)
    pages = [store.search(("p",), query="apple number 7", limit=6, offset=n) for n in range(0, 24, 6)]
    assert [i.score for page in pages for i in page] == pytest.approx([i.score for i in whole])
    assert sorted(i.key for page in pages for i in page) == sorted(keys(whole))


def test_unranked_items_follow_ranked_ones_across_pages(our_store: BaseStore) -> None:
    """Each is on one page only, after all ranked items."""
    engine: Any = our_store.engine  # type: ignore[attr-defined]
    store = ours(engine)(["text"])
    for n in range(20):
        store.put(("p",), f"k{n}", {"text": f"apple {n}"} if n % 4 else {"n": n})
    whole = store.search(("p",), query="apple 7", limit=30)
    assert [item.score is None for item in whole] == [False] * 15 + [True] * 5
    pages = [store.search(("p",), query="apple 7", limit=6, offset=n) for n in range(0, 30, 6)]
    assert [i.key for page in pages for i in page] == keys(whole)


def test_query_without_an_index_is_ignored(store: BaseStore) -> None:
    put_all(store)
    found = store.search(("food",), query="red apple", filter={"kind": "fruit"})
    assert {item.key: item.score for item in found} == dict.fromkeys(
        k for k, v in FOODS.items() if v["kind"] == "fruit"
    )
