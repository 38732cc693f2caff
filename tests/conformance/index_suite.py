"""What every vector index must do. Inherit `IndexSuite` and provide the `index` fixture."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest

from memstate_sa.errors import DeliveryRejected, IndexMismatch, MemstateError
from memstate_sa.indexes import Entry, Filter, InMemoryIndex, Point, Stored, VectorIndex

EMBEDDER = "suite:3"
X, Y, Z = (1.0, 0.0, 0.0), (0.0, 1.0, 0.0), (0.0, 0.0, 1.0)


def vector(*values: float) -> np.ndarray[Any, np.dtype[np.float32]]:
    return np.array(values, dtype=np.float32)


def point(
    id_: str,
    values: Sequence[float] = X,
    *,
    fingerprint: str = "f",
    text: str | None = None,
    metadata: Mapping[str, Any] | None = None,
) -> Point:
    return Point(id_, vector(*values), fingerprint, metadata=metadata or {}, text=text)


def fingerprints(index: VectorIndex, page: int = 100) -> dict[str, str]:
    """Everything *index* lists, by id."""
    listed: dict[str, str] = {}
    after: str | None = None
    while entries := index.scan(after, page):
        assert [entry.id for entry in entries] == sorted(entry.id for entry in entries)
        assert after is None or entries[0].id > after
        listed.update(entries)
        after = entries[-1].id
    return listed


def contents(index: VectorIndex, ids: Sequence[str]) -> dict[str, tuple[str, list[float]]]:
    """Fingerprint and vector of what is stored of *ids*; rounded, as Chroma loses the last bit."""
    return {stored.id: (stored.fingerprint, stored.vector.round(5).tolist()) for stored in index.get(ids)}


def ids_where(index: VectorIndex, where: Filter) -> set[str]:
    return {match.id for match in index.query(vector(*X), 100, where=where)}


VALUES: dict[str, Any] = {
    "zero": 0,
    "one": 1,
    "one-float": 1.0,
    "half": 0.5,
    "minus-half": -0.5,
    "minus-one": -1,
    "true": True,
    "false": False,
    "text-one": "1",
    "tip": "tip",
    "upper-tip": "TIP",
    "empty": "",
    "nul": "ti\0p",
    "none": None,
    "nan": float("nan"),
    "infinity": float("inf"),
    "snowflake": 2**60 + 1,
    "huge": 2**70,
}
FILTERS: list[tuple[Filter, str]] = [
    ({}, " ".join([*VALUES, "missing"])),
    ({"v": {"$eq": 1}}, "one one-float"),
    ({"v": {"$eq": 1.0}}, "one one-float"),
    ({"v": {"$eq": True}}, "true"),
    ({"v": {"$eq": False}}, "false"),
    ({"v": {"$eq": "1"}}, "text-one"),
    ({"v": {"$eq": "tip"}}, "tip"),
    ({"v": {"$eq": ""}}, "empty"),
    ({"v": {"$eq": "ti\0p"}}, "nul"),
    ({"v": {"$eq": None}}, ""),
    ({"v": {"$eq": float("nan")}}, ""),
    ({"v": {"$eq": 0.5}}, "half"),
    ({"v": {"$eq": 0.25}}, ""),
    ({"v": {"$eq": 2**60}}, ""),
    ({"v": {"$eq": 2**60 + 1}}, "snowflake"),
    ({"v": {"$in": []}}, ""),
    ({"v": {"$in": [None]}}, ""),
    ({"v": {"$in": ["tip", None, "", 1, True]}}, "tip empty one one-float true"),
    ({"v": {"$in": [1, 0.5, 0.25]}}, "one one-float half"),
    ({"v": {"$in": [1.0, 0]}}, "one one-float zero"),
    ({"v": {"$gt": 0}}, "one one-float half snowflake huge"),
    ({"v": {"$gt": 0.5}}, "one one-float snowflake huge"),
    ({"v": {"$gte": 0.5}}, "one one-float half snowflake huge"),
    ({"v": {"$gte": -0.5}}, "zero one one-float half minus-half snowflake huge"),
    ({"v": {"$gt": -0.5}}, "zero one one-float half snowflake huge"),
    ({"v": {"$lt": 0.5}}, "zero minus-half minus-one"),
    ({"v": {"$lt": -0.5}}, "minus-one"),
    ({"v": {"$lte": -0.5}}, "minus-half minus-one"),
    ({"v": {"$lte": 0.5}}, "zero half minus-half minus-one"),
    ({"v": {"$lt": 2**70}}, "zero one one-float half minus-half minus-one snowflake"),
    ({"v": {"$gte": 0, "$lt": 1}}, "zero half"),
    ({"$and": [{"v": {"$gte": 0}}]}, "zero one one-float half snowflake huge"),
    ({"$and": [{"v": {"$gte": 0}}, {"v": {"$lte": 1}}]}, "zero one one-float half"),
    ({"$or": [{"v": {"$eq": "tip"}}, {"v": {"$eq": None}}, {"v": {"$eq": True}}]}, "tip true"),
    ({"$or": []}, ""),
    ({"$and": [{"v": {"$eq": "tip"}}, {"w": {"$eq": "tip"}}]}, ""),
]


class IndexSuite:
    @pytest.fixture
    def index(self) -> VectorIndex:
        """A new, empty index, open for EMBEDDER and 3 dimensions."""
        raise NotImplementedError

    def test_open_is_idempotent(self, index: VectorIndex) -> None:
        """Opening an open index again keeps its content and its incarnation."""
        index.upsert([point("a")])
        before = index.incarnation
        index.open(embedder=EMBEDDER, dimension=3)
        assert (index.incarnation, fingerprints(index)) == (before, {"a": "f"})

    def test_another_embedder_is_refused(self, index: VectorIndex) -> None:
        """The error names both embedders, and the index stays usable."""
        with pytest.raises(IndexMismatch, match=r"'suite:3'.*'other:3'"):
            index.open(embedder="other:3", dimension=3)
        index.upsert([point("a")])
        assert fingerprints(index) == {"a": "f"}

    def test_another_dimension_is_refused(self, index: VectorIndex) -> None:
        """The error names both dimensions."""
        with pytest.raises(IndexMismatch, match=r"\b3 dimensions.*\b4 dimensions"):
            index.open(embedder=EMBEDDER, dimension=4)

    def test_stored_points_come_back(self, index: VectorIndex) -> None:
        """get returns vectors unnormalised, leaves absent ids out, and minds no duplicates."""
        index.upsert([point("a", (3, 4, 0), fingerprint="fa"), point("b", Y, fingerprint="fb")])
        assert contents(index, ["b", "a", "nope", "a"]) == {"a": ("fa", [3, 4, 0]), "b": ("fb", [0, 1, 0])}
        assert all(isinstance(s, Stored) and s.vector.dtype == np.float32 for s in index.get(["a", "b"]))
        assert index.get([]) == []

    def test_upsert_replaces_everything(self, index: VectorIndex) -> None:
        """Vector, fingerprint and all metadata are the last write's: a key it does not name is gone."""
        index.upsert([point("a", X, fingerprint="f1", metadata={"role": "tip", "old": 1})])
        index.upsert([point("a", Y, fingerprint="f2", metadata={"role": None, "new": 2})])
        assert contents(index, ["a"]) == {"a": ("f2", [0, 1, 0])}
        assert ids_where(index, {"new": {"$eq": 2}}) == {"a"}
        assert ids_where(index, {"old": {"$eq": 1}}) == set()
        assert ids_where(index, {"role": {"$eq": "tip"}}) == set()
        [match] = index.query(vector(*Y), 1)
        assert (match.id, match.fingerprint) == ("a", "f2")
        assert match.distance == pytest.approx(0, abs=1e-6)

    def test_the_last_of_a_batch_wins(self, index: VectorIndex) -> None:
        """The same id twice in one upsert is stored once, as given last."""
        index.upsert([point("a", X, fingerprint="f1"), point("a", Y, fingerprint="f2")])
        assert contents(index, ["a"]) == {"a": ("f2", [0, 1, 0])}

    def test_empty_writes_do_nothing(self, index: VectorIndex) -> None:
        """An empty upsert, an empty delete and the delete of an absent id are no errors."""
        index.upsert([])
        index.delete([])
        index.delete(["absent", "absent"])
        assert fingerprints(index) == {}

    def test_deleted_points_are_gone(self, index: VectorIndex) -> None:
        """From get, scan and query alike; the others stay."""
        index.upsert([point(id_, fingerprint=id_) for id_ in "abcd"])
        index.delete(["a", "c", "absent"])
        assert fingerprints(index) == {"b": "b", "d": "d"}
        assert {match.id for match in index.query(vector(*X), 10)} == {"b", "d"}
        assert set(contents(index, list("abcd"))) == {"b", "d"}

    def test_nearest_first(self, index: VectorIndex) -> None:
        """Distances are cosine: 0 in the same direction whatever the length, 1 at a right angle, 2 opposite."""
        index.upsert(
            [point("opposite", (-2, 0, 0)), point("right", Z), point("same", (5, 0, 0)), point("near", (1, 1, 0))]
        )
        matches = index.query(vector(9, 0, 0), 10)
        assert [match.id for match in matches] == ["same", "near", "right", "opposite"]
        assert [match.distance for match in matches] == pytest.approx([0, 1 - 2**-0.5, 1, 2], abs=1e-6)
        assert all(0 <= match.distance <= 2 for match in matches)
        assert [match.id for match in index.query(vector(9, 0, 0), 2)] == ["same", "near"]
        assert index.query(vector(9, 0, 0), 0) == []

    def test_a_zero_vector_is_far_from_everything(self, index: VectorIndex) -> None:
        """Its distance is 1, on either side."""
        index.upsert([point("zero", (0, 0, 0)), point("x", X)])
        assert {m.id: m.distance for m in index.query(vector(*X), 5)} == pytest.approx({"x": 0, "zero": 1}, abs=1e-6)
        assert {m.id: m.distance for m in index.query(vector(0, 0, 0), 5)} == pytest.approx({"x": 1, "zero": 1})

    def test_an_empty_index_answers(self, index: VectorIndex) -> None:
        """Nothing stored, nothing found, with any restriction."""
        assert index.query(vector(*X), 5) == []
        assert index.query(vector(*X), 5, where={"a": {"$eq": 1}}) == []
        assert index.query(vector(*X), 5, ids=["a"]) == []
        assert index.scan(None, 10) == []
        assert index.get(["a"]) == []

    def test_ids_restrict_the_query(self, index: VectorIndex) -> None:
        """Absent ids and repeated ones among them do no harm; no ids, no matches."""
        index.upsert([point(f"p{n}", (1, n, 0), metadata={"n": n}) for n in range(6)])
        assert [m.id for m in index.query(vector(*X), 2, ids=["p5", "p3", "absent", "p3", "p4"])] == ["p3", "p4"]
        assert [m.id for m in index.query(vector(*X), 9, ids=["absent", "p1"])] == ["p1"]
        assert index.query(vector(*X), 2, ids=["absent"]) == []
        assert index.query(vector(*X), 2, ids=[]) == []
        found = index.query(vector(*X), 9, ids=["p1", "p2", "p3"], where={"n": {"$gt": 1}})
        assert [m.id for m in found] == ["p2", "p3"]

    def test_filters(self, index: VectorIndex) -> None:
        """Each operator matches exactly the values it should: no None, no other type, no rounded fraction."""
        index.upsert([point(id_, metadata={"v": value}) for id_, value in VALUES.items()] + [point("missing")])
        found = {str(where): ids_where(index, where) for where, _ in FILTERS}
        assert found == {str(where): set(expected.split()) for where, expected in FILTERS}

    def test_random_filters_agree_with_python(self, index: VectorIndex) -> None:
        """On random metadata and nested filters every index answers as the in-memory one."""
        rng = random.Random(1)
        points = [point(f"p{n}", metadata={key: rng.choice(_OPERANDS) for key in "ab"}) for n in range(40)]
        exact = InMemoryIndex()
        exact.open(embedder=EMBEDDER, dimension=3)
        for target in (index, exact):
            target.upsert(points)
        filters = [_random_filter(rng, 2) for _ in range(30)]
        assert [ids_where(index, where) for where in filters] == [ids_where(exact, where) for where in filters]

    def test_what_is_no_filter_is_rejected(self, index: VectorIndex) -> None:
        """An unknown operator or operand is an error, not an empty answer."""
        for condition in (1, {}, {"$ne": 1}, {"$gt": "a"}, {"$gt": True}, {"$lt": float("inf")}, {"$eq": b"x"}):
            with pytest.raises(DeliveryRejected):
                index.query(vector(*X), 1, where={"v": condition})
        no_filters: list[Filter] = [{"$not": []}, {"$and": {}}, {"$or": [1]}]
        for where in no_filters:
            with pytest.raises(DeliveryRejected):
                index.query(vector(*X), 1, where=where)

    @pytest.mark.parametrize("bad", [(1, float("nan"), 0), (1, float("inf"), 0), (1, 0)], ids=str)
    def test_a_bad_vector_is_rejected(self, index: VectorIndex, bad: tuple[float, ...]) -> None:
        """NaN, infinity or the wrong dimension: refused by name, and nothing of the batch is stored."""
        with pytest.raises(DeliveryRejected, match="bad-one"):
            index.upsert([point("good"), point("bad-one", bad)])
        assert fingerprints(index) == {}
        with pytest.raises(DeliveryRejected, match="query"):
            index.query(vector(*bad), 1)

    def test_scan_lists_in_id_order(self, index: VectorIndex) -> None:
        """By code point, page by page, each entry with its fingerprint; after an id that is not stored, too."""
        ids = ["b", "a", "Z", "é", "z", "aa", "10", "9", "🙂", "ﬀ"]
        index.upsert([point(id_, fingerprint=f"f{id_}") for id_ in ids])
        everything = [Entry(id_, f"f{id_}") for id_ in sorted(ids)]
        assert list(fingerprints(index, page=3).items()) == [tuple(entry) for entry in everything]
        assert index.scan("ab", 2) == [Entry("b", "fb"), Entry("z", "fz")]
        assert index.scan("🙂", 5) == []

    def test_scan_goes_on_while_points_change(self, index: VectorIndex) -> None:
        """What is there throughout the pass is listed once, with the fingerprint it has when its page is read."""
        index.upsert([point(f"p{n}", fingerprint="old") for n in range(8)])
        first = index.scan(None, 3)
        index.delete(["p0", "p4", "p5"])
        index.upsert([point("p6", fingerprint="new"), point("p1", fingerprint="new")])
        second = index.scan(first[-1].id, 10)
        assert [entry.id for entry in first] == ["p0", "p1", "p2"]
        assert second == [Entry("p3", "old"), Entry("p6", "new"), Entry("p7", "old")]
        assert index.scan("p7", 10) == []
        assert fingerprints(index) == {"p1": "new", "p2": "old", "p3": "old", "p6": "new", "p7": "old"}

    def test_a_new_pass_sees_what_is_new(self, index: VectorIndex) -> None:
        """A pass that was given up does not leave its listing to the next."""
        index.upsert([point("b"), point("d")])
        assert index.scan(None, 1) == [Entry("b", "f")]
        index.upsert([point("a"), point("c")])
        assert list(fingerprints(index)) == ["a", "b", "c", "d"]

    def test_random_histories_agree_with_a_dict(self, index: VectorIndex) -> None:
        """After random upserts and deletes the content is what a dict would hold."""
        rng = random.Random(2)
        held: dict[str, tuple[str, list[float]]] = {}
        names = [f"n{n}" for n in range(12)]
        for step in range(20):
            some = rng.sample(names, 4)
            if rng.random() < 0.6:
                batch = [point(n, [rng.randint(-3, 3) for _ in range(3)], fingerprint=f"{step}") for n in some]
                index.upsert(batch)
                held.update({p.id: (p.fingerprint, p.vector.tolist()) for p in batch})
            else:
                index.delete(some)
                held = {id_: value for id_, value in held.items() if id_ not in some}
        assert contents(index, names) == held
        assert fingerprints(index) == {id_: fingerprint for id_, (fingerprint, _) in held.items()}
        assert {match.id for match in index.query(vector(*X), 100)} == set(held)

    def test_many_threads(self, index: VectorIndex) -> None:
        """Concurrent writers of different ids lose nothing, and readers meanwhile do not fail."""

        def work(worker: int) -> None:
            mine = [f"w{worker}-{n}" for n in range(6)]
            for step in range(2):
                index.upsert([point(id_, fingerprint=f"{step}") for id_ in mine])
                index.delete(mine[:2])
                index.query(vector(*X), 5)
                index.get(mine)
                index.scan(None, 5)

        with ThreadPoolExecutor(4) as pool:
            list(pool.map(work, range(4)))
        assert fingerprints(index) == {f"w{worker}-{n}": "1" for worker in range(4) for n in range(2, 6)}

    def test_a_large_batch(self, index: VectorIndex) -> None:
        """Hundreds of points go in, come back and go out in one call each."""
        ids = [f"p{n}" for n in range(min(index.max_batch, 300))]
        index.upsert([point(id_) for id_ in ids])
        assert set(contents(index, ids)) == set(ids)
        index.delete(ids)
        assert fingerprints(index) == {}

    def test_a_closed_index_can_be_closed(self, index: VectorIndex) -> None:
        """close is idempotent."""
        index.close()
        index.close()


class ClosedSuite:
    """For a new index object that was never opened."""

    @pytest.fixture
    def closed(self) -> VectorIndex:
        raise NotImplementedError

    def test_open_comes_first(self, closed: VectorIndex) -> None:
        """Before it, every call says so."""
        for call in (
            lambda: closed.upsert([point("a")]),
            lambda: closed.query(vector(*X), 1),
        ):
            with pytest.raises(MemstateError, match=r"open\(\) first"):
                call()


_OPERANDS: list[Any] = [None, 0, 1, -1, 0.5, -0.5, 1.5, 2, True, False, "a", "b", ""]


def _random_filter(rng: random.Random, depth: int) -> dict[str, Any]:
    if depth and rng.random() < 0.5:
        return {rng.choice(["$and", "$or"]): [_random_filter(rng, depth - 1) for _ in range(rng.randint(1, 3))]}
    operator = rng.choice(["$eq", "$in", "$gt", "$gte", "$lt", "$lte"])
    numbers = [value for value in _OPERANDS if isinstance(value, int | float) and not isinstance(value, bool)]
    operand: Any = rng.choice(_OPERANDS if operator == "$eq" else numbers)
    return {rng.choice("ab"): {operator: rng.sample(_OPERANDS, 3) if operator == "$in" else operand}}
