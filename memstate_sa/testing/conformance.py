"""The pytest suite that every vector index must pass. Inherit it for your own index. Needs pytest."""

from __future__ import annotations

import json
import random
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from memstate_sa.errors import DeliveryError, DeliveryRejected, DeliveryRetryable, IndexMismatch, MemstateError
from memstate_sa.indexes import canonical, matches
from memstate_sa.indexes.base import (
    Entry,
    FencedIndex,
    Filter,
    Match,
    PurgeableIndex,
    Stored,
    VectorIndex,
    keeps_mark,
)
from memstate_sa.indexes.memory import InMemoryIndex
from memstate_sa.testing import churn
from memstate_sa.testing.points import X, Y, Z, contents, fingerprints, ids_where, point, vector

EMBEDDER = churn.EMBEDDER
_MOST = 20_000
"""The largest batch in these tests."""
_ERASED = "XYZZY-erased-text"

Make = Callable[[], VectorIndex]


class IndexConformance:
    """Inherit this class, override the fixture `make`, and declare the abilities of your index by class attributes.

    The tests check the default values too. If ``fenced`` is False, the index must not be a `FencedIndex`. If
    ``persistent`` is False, a new object must be empty and have another incarnation. No test is skipped.

    Example::

        class TestMyIndex(IndexConformance):
            persistent = True

            @pytest.fixture
            def make(self, tmp_path):
                return lambda: MyIndex(tmp_path / "index")

            @pytest.fixture
            def program(self, tmp_path):
                return f"from my_index import MyIndex; index = MyIndex({str(tmp_path / 'index')!r})"
    """

    recall: float = 1.0
    """The share of the true nearest points that a query finds, with and without a filter. 1.0 means exact.

    In an exact index, an answer shorter than the limit holds all points that match.
    """
    tolerance: float = 1e-4
    """The largest difference between a distance and the distance that NumPy computes in double precision."""
    persistent: bool = False
    """Acknowledged writes outlive the process, even after a ``kill -9``. Override the fixture `program`."""
    shared: bool = False
    """Several objects on one storage may be open at once, and see each other's writes."""
    remote: bool = False
    """The index is behind a connection, which `outage` breaks. Otherwise it has ``in_process = True``."""
    fenced: bool = False
    """The index is a `FencedIndex`."""
    purgeable: bool = False
    """``purge()`` works as in `PurgeableIndex`. Override the fixture `files` if the index has files."""
    marked: bool = False
    """The index is a `MarkedIndex`."""
    atomic: bool = True
    """Fingerprint and distance of a match come from one write, even during another write."""

    # -- to override ---------------------------------------------------------------------------------------------------

    @pytest.fixture
    def make(self) -> Make:
        """A function that returns a new index object, not yet open. All objects of one test share one storage."""
        raise NotImplementedError("Cannot create the index: override the fixture `make`.")

    @pytest.fixture
    def program(self) -> str | None:
        """Python source that defines ``index`` in another process, on the storage of this test."""
        return None

    @pytest.fixture
    def files(self) -> Path | None:
        """The folder with all files of the index that `make` returns."""
        return None

    def outage(self) -> AbstractContextManager[object]:
        """A context manager. Inside it the index cannot be reached, and afterwards it can."""
        raise NotImplementedError("Cannot break the connection: a remote index must override the fixture `outage`.")

    # -- fixtures ------------------------------------------------------------------------------------------------------

    @pytest.fixture
    def another(self, make: Make) -> Iterator[Make]:
        """`make`, with all its indexes closed at the end."""
        indexes: list[VectorIndex] = []

        def make_and_keep() -> VectorIndex:
            indexes.append(make())
            return indexes[-1]

        yield make_and_keep
        for index in indexes:
            index.close()

    @pytest.fixture
    def closed(self, another: Make) -> VectorIndex:
        """A new index object that was never opened."""
        return another()

    @pytest.fixture
    def index(self, closed: VectorIndex) -> VectorIndex:
        """A new, empty index, open for EMBEDDER and 3 dimensions."""
        closed.open(embedder=EMBEDDER, dimension=3)
        return closed

    # -- the port ------------------------------------------------------------------------------------------------------

    def test_index_has_exactly_the_declared_parts(self, index: VectorIndex) -> None:
        """The index has all names of the port, and the optional parts exactly as declared."""
        assert isinstance(index, VectorIndex)
        assert isinstance(index.incarnation, str)
        assert index.incarnation
        assert index.max_batch >= 1
        assert isinstance(index, FencedIndex) is self.fenced
        assert getattr(index, "fences", False) is self.fenced
        assert getattr(index, "in_process", False) is not self.remote
        assert isinstance(index, PurgeableIndex) or not self.purgeable
        assert keeps_mark(index) is self.marked

    def test_open_comes_first(self, closed: VectorIndex) -> None:
        """Before `open`, every call raises an error that names it."""
        calls: list[Callable[[], object]] = [
            lambda: closed.upsert([point("a")]),
            lambda: closed.query(vector(*X), 1),
        ]
        for call in calls:
            with pytest.raises(MemstateError, match=r"open\(\) first"):
                call()

    def test_open_is_idempotent(self, index: VectorIndex) -> None:
        """Opening an open index again keeps its content and its incarnation."""
        index.upsert([point("a")])
        before = index.incarnation
        index.open(embedder=EMBEDDER, dimension=3)
        assert (index.incarnation, fingerprints(index)) == (before, {"a": "f"})

    def test_a_closed_index_can_be_closed_and_opened(self, index: VectorIndex) -> None:
        """`close` is idempotent. After another `open`, the same object has the same content."""
        index.upsert([point("a", Y)])
        before = index.incarnation
        index.close()
        index.close()
        index.open(embedder=EMBEDDER, dimension=3)
        assert (index.incarnation, contents(index, ["a"])) == (before, {"a": ("f", [0, 1, 0])})

    # -- its mark ------------------------------------------------------------------------------------------------------

    def test_the_mark_is_the_last_one(self, index: VectorIndex, another: Make) -> None:
        """The mark is None at first. It lives as long as the points, and changes neither them nor the incarnation."""
        if not keeps_mark(index):
            return
        index.upsert([point("a", Y)])
        before = index.incarnation
        assert index.read_mark() is None
        index.write_mark("1.a")
        index.write_mark("2." + "b" * 98)
        assert index.read_mark() == "2." + "b" * 98
        assert (index.incarnation, contents(index, ["a"])) == (before, {"a": ("f", [0, 1, 0])})
        assert [entry.id for entry in index.scan(None, 10)] == ["a"]
        assert [match.id for match in index.query(vector(*Y), 10)] == ["a"]
        index.close()
        second = another()
        second.open(embedder=EMBEDDER, dimension=3)
        assert keeps_mark(second)
        kept = self.persistent or self.shared
        assert second.read_mark() == ("2." + "b" * 98 if kept else None)

    def test_the_mark_of_another_object_is_read(self, index: VectorIndex, another: Make) -> None:
        """If several objects share a storage, each reads the mark of another one."""
        if not keeps_mark(index) or not self.shared:
            return
        index.write_mark("1.a")
        second = another()
        second.open(embedder=EMBEDDER, dimension=3)
        assert keeps_mark(second)
        second.write_mark("2.b")
        assert index.read_mark() == "2.b"

    # -- lifetimes -----------------------------------------------------------------------------------------------------

    def test_object_after_the_first_finds_content_as_declared(self, index: VectorIndex, another: Make) -> None:
        """A second object finds content and incarnation if they outlive the first. Otherwise it is empty and new."""
        index.upsert([point("a", Y, fingerprint="fa", metadata={"role": "tip"})])
        before = index.incarnation
        index.close()
        second = another()
        second.open(embedder=EMBEDDER, dimension=3)
        kept = self.persistent or self.shared
        assert (second.incarnation == before) is kept
        assert contents(second, ["a"]) == ({"a": ("fa", [0, 1, 0])} if kept else {})
        assert fingerprints(second) == ({"a": "fa"} if kept else {})
        assert ids_where(second, {"role": {"$eq": "tip"}}) == ({"a"} if kept else set())

    def test_object_beside_the_first_shares_content_as_declared(self, index: VectorIndex, another: Make) -> None:
        """If shared, each object sees the other's writes. Otherwise the second is another index, or is refused."""
        index.upsert([point("a")])
        second = another()
        if self.persistent and not self.shared:
            with pytest.raises(MemstateError):
                second.open(embedder=EMBEDDER, dimension=3)
            assert fingerprints(index) == {"a": "f"}
            return
        second.open(embedder=EMBEDDER, dimension=3)
        second.upsert([point("b", Y)])
        assert fingerprints(index) == ({"a": "f", "b": "f"} if self.shared else {"a": "f"})
        assert fingerprints(second) == ({"a": "f", "b": "f"} if self.shared else {"b": "f"})
        index.delete(["b"])
        assert set(contents(second, ["a", "b"])) == ({"a"} if self.shared else {"b"})

    def test_acknowledged_writes_outlive_a_kill(self, program: str | None) -> None:
        """After a kill, each point is in the state of the last call that returned, or of the interrupted call."""
        assert (program is not None) is self.persistent, "a persistent index must override the fixture `program`"
        if program is None:
            return
        chance, done = random.Random(5), 0
        incarnation, content = _killed(program, done, lines=chance.randint(3, 12))
        assert content.points == {}
        for lines in (chance.randint(3, 12), None):
            done = content.done
            before = incarnation
            incarnation, content = _killed(program, done, lines=lines)
            assert incarnation == before
            sure, possible = churn.state(done), churn.state(done + 1)
            for id_ in {*sure, *possible, *content.points}:
                assert content.points.get(id_) in (sure.get(id_), possible.get(id_)), id_

    # -- writes --------------------------------------------------------------------------------------------------------

    def test_stored_points_come_back(self, index: VectorIndex) -> None:
        """`get` returns vectors at their full length, leaves absent ids out, and accepts duplicate ids."""
        index.upsert([point("a", (3, 4, 0), fingerprint="fa"), point("b", Y, fingerprint="fb")])
        assert contents(index, ["b", "a", "nope", "a"]) == {"a": ("fa", [3, 4, 0]), "b": ("fb", [0, 1, 0])}
        assert all(isinstance(s, Stored) and s.vector.dtype == np.float32 for s in index.get(["a", "b"]))
        assert index.get([]) == []

    def test_upsert_replaces_everything(self, index: VectorIndex) -> None:
        """Vector, fingerprint and all metadata come from the last write. Keys missing in it are removed."""
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
        """An id that occurs twice in one upsert is stored once, with the last values."""
        index.upsert([point("a", X, fingerprint="f1"), point("a", Y, fingerprint="f2")])
        assert contents(index, ["a"]) == {"a": ("f2", [0, 1, 0])}

    def test_empty_writes_do_nothing(self, index: VectorIndex) -> None:
        """An empty upsert, an empty delete and the delete of an absent id raise no error."""
        index.upsert([])
        index.delete([])
        index.delete(["absent", "absent"])
        assert fingerprints(index) == {}

    def test_deleted_points_are_gone(self, index: VectorIndex) -> None:
        """`get`, `scan` and `query` do not return deleted points. The others stay."""
        index.upsert([point(id_, fingerprint=id_) for id_ in "abcd"])
        index.delete(["a", "c", "absent"])
        assert fingerprints(index) == {"b": "b", "d": "d"}
        assert {match.id for match in index.query(vector(*X), 10)} == {"b", "d"}
        assert set(contents(index, list("abcd"))) == {"b", "d"}

    def test_a_deleted_point_can_come_back(self, index: VectorIndex) -> None:
        """A point that comes back has only its new values, and none from before."""
        index.upsert([point("a", X, fingerprint="f1", metadata={"old": 1})])
        index.delete(["a"])
        index.upsert([point("a", Y, fingerprint="f2")])
        assert contents(index, ["a"]) == {"a": ("f2", [0, 1, 0])}
        assert ids_where(index, {"old": {"$eq": 1}}) == set()

    def test_replays_change_nothing(self, index: VectorIndex) -> None:
        """Repeated calls leave the same content. A relay repeats a call when it got no answer."""
        chance = random.Random(3)
        for number in range(12):
            upserted, deleted = churn.round_of(number)
            for _ in range(chance.randint(1, 3)):
                index.upsert([point(id_, values, fingerprint=f) for id_, (f, values) in upserted.items()])
            for _ in range(chance.randint(1, 3)):
                index.delete(deleted)
        expected = churn.state(12)
        assert contents(index, list(expected)) == expected
        assert fingerprints(index) == {id_: fingerprint for id_, (fingerprint, _) in expected.items()}

    def test_large_batch_is_written_read_and_deleted(self, index: VectorIndex) -> None:
        """One call writes, reads or deletes hundreds of points."""
        ids = [f"p{n}" for n in range(min(index.max_batch, 300))]
        index.upsert([point(id_) for id_ in ids])
        assert set(contents(index, ids)) == set(ids)
        index.delete(ids)
        assert fingerprints(index) == {}

    def test_batch_over_the_maximum_is_never_taken_in_part(self, index: VectorIndex) -> None:
        """A batch over the maximum is stored as a whole, or refused as a whole."""
        size = min(index.max_batch, _MOST)
        points = [point(f"p{n:05}") for n in range(size + 1)]
        ids = [p.id for p in points]
        try:
            index.upsert(points)
            expected = dict.fromkeys(ids, "f")
        except DeliveryError:
            expected = {}
        assert fingerprints(index, page=size) == expected
        if not expected:
            index.upsert(points[:size])
        for batch in (ids[:size], ids[size:]):
            assert {stored.id for stored in index.get(batch)} == set(batch) & (set(expected) or set(ids[:size]))
            index.delete(batch)
        assert fingerprints(index) == {}

    def test_random_histories_agree_with_a_dict(self, index: VectorIndex) -> None:
        """After random upserts and deletes, the index has the same content as a dict."""
        rng = random.Random(2)
        expected: dict[str, tuple[str, list[float]]] = {}
        names = [f"n{n}" for n in range(12)]
        for number in range(20):
            ids = rng.sample(names, 4)
            if rng.random() < 0.6:
                batch = [point(n, [rng.randint(-3, 3) for _ in range(3)], fingerprint=f"{number}") for n in ids]
                index.upsert(batch)
                expected.update({p.id: (p.fingerprint, p.vector.tolist()) for p in batch})
            else:
                index.delete(ids)
                expected = {id_: value for id_, value in expected.items() if id_ not in ids}
        assert contents(index, names) == expected
        assert fingerprints(index) == {id_: fingerprint for id_, (fingerprint, _) in expected.items()}
        assert {match.id for match in index.query(vector(*X), 100)} == set(expected)

    def test_text_of_every_kind_is_stored_and_found(self, index: VectorIndex) -> None:
        """Ids, metadata names and values may have any script, quotes, control characters and 64 KB."""
        odd = ["é", "e\u0301", "🙂", "ﬀ", "السلام", "a'b\"c\\d", "%s {x} $1 :p", "tab\tline\n", "\x7f", "[1]", " "]
        odd.append("long" * 16384)
        ids = [f"note[{json.dumps(text, ensure_ascii=False)}]" for text in odd]
        points = [
            point(id_, fingerprint=f"f{n}", metadata={"value": text, text[:40].strip() or "blank": n})
            for n, (id_, text) in enumerate(zip(ids, odd, strict=True))
        ]
        index.upsert(points)
        assert fingerprints(index, page=5) == {p.id: p.fingerprint for p in points}
        assert set(contents(index, ids)) == set(ids)
        for n, (id_, text) in enumerate(zip(ids, odd, strict=True)):
            assert ids_where(index, {"value": {"$eq": text}}) == {id_}
            assert ids_where(index, {text[:40].strip() or "blank": {"$eq": n}}) == {id_}
            assert [match.id for match in index.query(vector(*X), 3, ids=[id_])] == [id_]
        assert ids_where(index, {"value": {"$in": odd}}) == set(ids)
        index.delete(ids[1:])
        assert fingerprints(index) == {ids[0]: "f0"}

    @pytest.mark.parametrize("bad", [(1, float("nan"), 0), (1, float("inf"), 0), (1, 0)], ids=str)
    def test_a_bad_vector_is_rejected(self, index: VectorIndex, bad: tuple[float, ...]) -> None:
        """A vector with NaN, infinity or another dimension is refused by name. Nothing of its batch is stored."""
        with pytest.raises(DeliveryRejected, match="bad-one"):
            index.upsert([point("good"), point("bad-one", bad)])
        assert fingerprints(index) == {}
        with pytest.raises(DeliveryRejected, match="query"):
            index.query(vector(*bad), 1)

    # -- the fence -----------------------------------------------------------------------------------------------------

    def test_overtaken_write_leaves_one_whole_write(self, index: VectorIndex) -> None:
        """In a fenced index, the write with the higher epoch stays. Otherwise one of the two is there, as a whole."""
        index.upsert([point("a", X, fingerprint="five", epoch=5), point("b", X, fingerprint="five", epoch=5)])
        index.upsert([point("a", Y, fingerprint="four", epoch=4), point("c", Y, fingerprint="four", epoch=4)])
        stored = contents(index, ["a", "b", "c"])
        assert stored["a"] in [("five", [1, 0, 0]), ("four", [0, 1, 0])][: 1 if self.fenced else 2]
        assert (stored["b"], stored["c"]) == (("five", [1, 0, 0]), ("four", [0, 1, 0]))
        index.upsert([point("a", Z, fingerprint="five again", epoch=5), point("b", Z, fingerprint="six", epoch=6)])
        assert fingerprints(index) == {"a": "five again", "b": "six", "c": "four"}
        index.upsert([point("b", X, fingerprint="any")])  # epoch 0 means no epoch, and is not remembered
        assert fingerprints(index)["b"] == "any"
        index.upsert([point("b", Y, fingerprint="five", epoch=5)])
        assert fingerprints(index)["b"] in ["any", "five"][: 1 if self.fenced else 2]

    def test_overtaken_delete_leaves_newer_points_alone(self, index: VectorIndex, another: Make) -> None:
        """In a fenced index, a delete leaves newer points alone. Every object remembers the delete's epoch."""
        if not isinstance(index, FencedIndex):
            assert not self.fenced
            return
        index.upsert([point("a", epoch=5), point("b", epoch=5)])
        index.delete(["a"], epoch=4)
        index.delete(["b", "absent"], epoch=6)
        assert fingerprints(index) == {"a": "f"}
        index.upsert([point("b", epoch=5), point("absent", epoch=5)])
        assert fingerprints(index) == {"a": "f"}
        if self.shared:
            second = another()
            second.open(embedder=EMBEDDER, dimension=3)
            second.upsert([point("b", epoch=5)])
            assert fingerprints(second) == {"a": "f"}
        index.upsert([point("b", Y, epoch=6), point("absent", epoch=7)])
        assert contents(index, ["b"]) == {"b": ("f", [0, 1, 0])}
        index.delete(["absent", "a"])  # epoch 0 means no epoch
        assert fingerprints(index) == {"b": "f"}

    def test_reordered_writes_end_with_the_highest_epoch(self, index: VectorIndex) -> None:
        """In a fenced index, the write with the highest epoch wins, in any order and with repetitions."""
        if not isinstance(index, FencedIndex):
            assert not self.fenced
            return
        chance = random.Random(4)
        for round_ in range(5):
            names = [f"r{round_}-{n}" for n in range(5)]
            last = {id_: chance.randint(1, 6) for id_ in names}
            writes = [(id_, epoch) for id_ in names for epoch in range(1, last[id_] + 1)] * 2
            chance.shuffle(writes)
            for id_, epoch in writes:
                if epoch % 3:
                    index.upsert([point(id_, (epoch, 1, 0), fingerprint=f"{epoch}", epoch=epoch)])
                else:
                    index.delete([id_], epoch=epoch)
            expected = {id_: (f"{epoch}", [epoch, 1, 0]) for id_, epoch in last.items() if epoch % 3}
            assert contents(index, names) == expected

    # -- queries -------------------------------------------------------------------------------------------------------

    def test_query_returns_the_nearest_first(self, index: VectorIndex) -> None:
        """Distances are cosine: 0 in the same direction at any length, 1 at a right angle, 2 in the opposite one."""
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
        """A zero vector has distance 1, as a point and as a query."""
        index.upsert([point("zero", (0, 0, 0)), point("x", X)])
        assert {m.id: m.distance for m in index.query(vector(*X), 5)} == pytest.approx({"x": 0, "zero": 1}, abs=1e-6)
        assert {m.id: m.distance for m in index.query(vector(0, 0, 0), 5)} == pytest.approx({"x": 1, "zero": 1})

    def test_an_empty_index_answers(self, index: VectorIndex) -> None:
        """An empty index returns empty answers, with any restriction."""
        assert index.query(vector(*X), 5) == []
        assert index.query(vector(*X), 5, where={"a": {"$eq": 1}}) == []
        assert index.query(vector(*X), 5, ids=["a"]) == []
        assert index.scan(None, 10) == []
        assert index.get(["a"]) == []

    def test_nearest_are_those_of_numpy(self, closed: VectorIndex) -> None:
        """Distances are within the tolerance, and queries find the declared share, also with restrictions.

        The points were added, replaced and deleted before, because that damages a graph.
        """
        rng = np.random.default_rng(7)
        vectors = (rng.standard_normal((500, 32)) * rng.uniform(0.1, 10, (500, 1))).astype(np.float32)
        closed.open(embedder=EMBEDDER, dimension=32)
        ids = [f"p{n}" for n in range(500)]
        metadata: list[dict[str, Any]] = [{"group": n % 7, "name": f"n{n % 5}"} for n in range(500)]
        for version in (vectors[::-1], vectors):
            for start in range(0, 500, min(closed.max_batch, 250)):
                numbers = range(start, min(start + min(closed.max_batch, 250), 500))
                closed.upsert([point(ids[n], version[n].tolist(), metadata=metadata[n]) for n in numbers])
            if version is not vectors:
                closed.delete(ids[100:200][: closed.max_batch])
        restrictions: list[tuple[Filter | None, list[str] | None]] = [
            (None, None),
            ({"group": {"$eq": 3}}, None),
            ({"$or": [{"group": {"$gt": 5}}, {"name": {"$in": ["n1", "n2"]}}]}, None),
            (None, ids[40:80]),
            ({"name": {"$eq": "n0"}}, ids[::3]),
        ]
        hits = expected = 0
        for query in rng.standard_normal((6, 32)).astype(np.float32):
            exact = _distances(vectors, query)
            for where, among in restrictions:
                condition = canonical(where or {})
                assert condition is not None
                named = [n for n in range(500) if among is None or ids[n] in among]
                allowed = [n for n in named if matches(condition, metadata[n])]
                nearest = sorted(exact[allowed])[:10]
                answer = closed.query(query, 10, where=where, ids=among)
                self._assert_true(answer, {ids[n]: exact[n] for n in allowed})
                hits += sum(match.distance <= nearest[-1] + self.tolerance for match in answer)
                expected += len(nearest)
            everything = closed.query(query, 600)
            self._assert_true(everything, dict(zip(ids, exact, strict=True)))
            hits += len(everything)
            expected += len(vectors)
        assert self.recall <= hits / expected <= 1

    def _assert_true(self, answer: list[Match], exact: dict[str, Any]) -> None:
        distances = [match.distance for match in answer]
        assert len({match.id for match in answer}) == len(answer)
        assert {match.id for match in answer} <= exact.keys()
        assert distances == pytest.approx([exact[match.id] for match in answer], abs=self.tolerance)
        assert distances == sorted(distances)

    def test_ids_restrict_the_query(self, index: VectorIndex) -> None:
        """Absent and repeated ids do no harm. An empty list of ids means no matches."""
        index.upsert([point(f"p{n}", (1, n, 0), metadata={"n": n}) for n in range(6)])
        assert [m.id for m in index.query(vector(*X), 2, ids=["p5", "p3", "absent", "p3", "p4"])] == ["p3", "p4"]
        assert [m.id for m in index.query(vector(*X), 9, ids=["absent", "p1"])] == ["p1"]
        assert index.query(vector(*X), 2, ids=["absent"]) == []
        assert index.query(vector(*X), 2, ids=[]) == []
        answer = index.query(vector(*X), 9, ids=["p1", "p2", "p3"], where={"n": {"$gt": 1}})
        assert [m.id for m in answer] == ["p2", "p3"]

    def test_a_thousand_ids_restrict_the_query(self, index: VectorIndex) -> None:
        """A query accepts a thousand ids. A search passes a thousand if its criteria cannot become a filter."""
        size = min(index.max_batch, 1100)
        ids = [f"p{n}" for n in range(size)]
        index.upsert([point(id_, (1, 1 + n, 0)) for n, id_ in enumerate(ids)])
        assert [match.id for match in index.query(vector(*X), 3, ids=ids[5:][::-1])] == ["p5", "p6", "p7"]

    def test_filters_match_exactly_their_values(self, index: VectorIndex) -> None:
        """Each operator matches only the right values: no None, no other type, no rounded fraction."""
        index.upsert([point(id_, metadata={"v": value}) for id_, value in _VALUES.items()] + [point("missing")])
        answers = {str(where): ids_where(index, where) for where, _ in _FILTERS}
        assert answers == {str(where): set(expected.split()) for where, expected in _FILTERS}

    def test_random_filters_agree_with_python(self, index: VectorIndex) -> None:
        """For random metadata and nested filters, every index gives the same answers as InMemoryIndex."""
        rng = random.Random(1)
        points = [point(f"p{n}", metadata={key: rng.choice(_OPERANDS) for key in "ab"}) for n in range(40)]
        exact = InMemoryIndex()
        exact.open(embedder=EMBEDDER, dimension=3)
        for target in (index, exact):
            target.upsert(points)
        filters = [_random_filter(rng, 2) for _ in range(30)]
        assert [ids_where(index, where) for where in filters] == [ids_where(exact, where) for where in filters]

    def test_an_invalid_filter_is_rejected(self, index: VectorIndex) -> None:
        """An unknown operator or operand raises an error. It is not an empty answer."""
        for condition in (1, {}, {"$ne": 1}, {"$gt": "a"}, {"$gt": True}, {"$lt": float("inf")}, {"$eq": b"x"}):
            with pytest.raises(DeliveryRejected):
                index.query(vector(*X), 1, where={"v": condition})
        invalid_filters: list[Filter] = [{"$not": []}, {"$and": {}}, {"$or": [1]}]
        for where in invalid_filters:
            with pytest.raises(DeliveryRejected):
                index.query(vector(*X), 1, where=where)

    # -- listing -------------------------------------------------------------------------------------------------------

    def test_scan_lists_in_id_order(self, index: VectorIndex) -> None:
        """`scan` lists ids by code point, page by page, with fingerprints. *after* may be an id that is not stored."""
        ids = ["b", "a", "Z", "é", "z", "aa", "10", "9", "🙂", "ﬀ"]
        index.upsert([point(id_, fingerprint=f"f{id_}") for id_ in ids])
        everything = [Entry(id_, f"f{id_}") for id_ in sorted(ids)]
        assert list(fingerprints(index, page=3).items()) == [tuple(entry) for entry in everything]
        assert index.scan("ab", 2) == [Entry("b", "fb"), Entry("z", "fz")]
        assert index.scan("🙂", 5) == []

    def test_long_ids_are_listed_in_order(self, index: VectorIndex) -> None:
        """The order is right even for ids that differ only after thousands of characters."""
        ids = [f"{'a' * 3000}{n}" for n in range(5)] + ["a" * 2999, "b"]
        index.upsert([point(id_, fingerprint=f"f{n}") for n, id_ in enumerate(ids)])
        assert list(fingerprints(index, page=2)) == sorted(ids)

    def test_scan_goes_on_while_points_change(self, index: VectorIndex) -> None:
        """A point that stays during the whole scan is listed once, with its fingerprint at the time of its page."""
        index.upsert([point(f"p{n}", fingerprint="old") for n in range(8)])
        first = index.scan(None, 3)
        index.delete(["p0", "p4", "p5"])
        index.upsert([point("p6", fingerprint="new"), point("p1", fingerprint="new")])
        second = index.scan(first[-1].id, 10)
        assert [entry.id for entry in first] == ["p0", "p1", "p2"]
        assert second == [Entry("p3", "old"), Entry("p6", "new"), Entry("p7", "old")]
        assert index.scan("p7", 10) == []
        assert fingerprints(index) == {"p1": "new", "p2": "old", "p3": "old", "p6": "new", "p7": "old"}

    def test_a_new_scan_sees_new_points(self, index: VectorIndex) -> None:
        """A new scan does not use the list of an unfinished one."""
        index.upsert([point("b"), point("d")])
        assert index.scan(None, 1) == [Entry("b", "f")]
        index.upsert([point("a"), point("c")])
        assert list(fingerprints(index)) == ["a", "b", "c", "d"]

    # -- several callers -----------------------------------------------------------------------------------------------

    def test_concurrent_writers_of_different_points_lose_nothing(self, index: VectorIndex) -> None:
        """Concurrent writers of different ids lose no writes, and readers at the same time do not fail."""

        def work(worker: int) -> None:
            ids = [f"w{worker}-{n}" for n in range(6)]
            for number in range(2):
                index.upsert([point(id_, fingerprint=f"{number}") for id_ in ids])
                index.delete(ids[:2])
                index.query(vector(*X), 5)
                index.get(ids)
                index.scan(None, 5)

        with ThreadPoolExecutor(4) as pool:
            list(pool.map(work, range(4)))
        assert fingerprints(index) == {f"w{worker}-{n}": "1" for worker in range(4) for n in range(2, 6)}

    def test_concurrent_writers_of_the_same_points_do_not_fail(self, index: VectorIndex) -> None:
        """Overlapping batches in different orders raise no error, and each point comes from one of the writes."""
        names = [f"n{n}" for n in range(8)]

        def work(worker: int) -> None:
            chance = random.Random(worker)
            for number in range(6):
                ids = chance.sample(names, 5)
                index.upsert([point(id_, (worker + 1, number, 1), fingerprint=f"{worker}-{number}") for id_ in ids])
                index.delete(chance.sample(names, 1))

        with ThreadPoolExecutor(4) as pool:
            list(pool.map(work, range(4)))
        index.upsert([point(names[0], (9, 9, 9), fingerprint="last")])
        stored = contents(index, names)
        assert stored[names[0]] == ("last", [9, 9, 9])
        assert fingerprints(index) == {id_: fingerprint for id_, (fingerprint, _) in stored.items()}
        for fingerprint, values in stored.values():
            if fingerprint != "last":
                worker, number = map(int, fingerprint.split("-"))
                assert values == [worker + 1, number, 1]

    def test_scan_beside_a_writer_lists_each_point_once(self, index: VectorIndex) -> None:
        """Each point that stays during the scan is listed once, in order, while other points come and go."""
        stable = [f"p{n:03}" for n in range(0, 60, 2)]
        moving = [f"p{n:03}" for n in range(1, 60, 2)]
        index.upsert([point(id_, fingerprint="stable") for id_ in stable])

        def passes() -> None:
            for _ in range(4):
                listed = fingerprints(index, page=7)
                assert [id_ for id_, fingerprint in listed.items() if fingerprint == "stable"] == stable
                assert set(listed) <= {*stable, *moving}

        self._beside(passes, lambda: self._move(index, moving))

    @staticmethod
    def _move(index: VectorIndex, moving: list[str]) -> None:
        index.upsert([point(id_, fingerprint="moving") for id_ in moving])
        index.delete(moving)

    def test_query_beside_a_writer_matches_written_points(self, index: VectorIndex) -> None:
        """A match's fingerprint and distance come from one write, or from two writes if the index is not ``atomic``."""
        versions = {"x": X, "y": Y}
        answers = [("x", 0), ("y", 1)] if self.atomic else [("x", 0), ("x", 1), ("y", 0), ("y", 1)]
        index.upsert([point("a", X, fingerprint="x"), point("b", Z, fingerprint="b")])

        def ask() -> None:
            for n in range(60):
                among = ["a", "b"] if n % 2 else None
                answer = {match.id: match for match in index.query(vector(*X), 5, ids=among)}
                assert set(answer) == {"a", "b"}
                fingerprint, distance = answer["a"].fingerprint, round(answer["a"].distance, 3)
                assert (fingerprint, distance) in answers

        def write() -> None:
            for fingerprint in ("y", "x"):
                index.upsert([point("a", versions[fingerprint], fingerprint=fingerprint)])

        self._beside(ask, write)

    @staticmethod
    def _beside(work: Callable[[], None], noise: Callable[[], None]) -> None:
        """Run *work* while another thread repeats *noise*."""
        stop, failures = threading.Event(), []

        def repeat() -> None:
            try:
                while not stop.is_set():
                    noise()
            except Exception as error:  # noqa: BLE001  # the thread of the test raises it below
                failures.append(error)

        thread = threading.Thread(target=repeat)
        thread.start()
        try:
            work()
        finally:
            stop.set()
            thread.join()
        if failures:
            raise failures[0]

    # -- mismatches and failures ---------------------------------------------------------------------------------------

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

    def test_another_object_is_refused_another_embedder(self, index: VectorIndex, another: Make) -> None:
        """If content outlives the object, so do its embedder and dimension. A refusal leaves the content unchanged."""
        index.upsert([point("a")])
        index.close()
        second = another()
        if self.persistent or self.shared:
            for embedder, dimension, named in (("other:3", 3, "'suite:3'.*'other:3'"), (EMBEDDER, 4, "3 dim.*4 dim")):
                with pytest.raises(IndexMismatch, match=named):
                    second.open(embedder=embedder, dimension=dimension)
            second.open(embedder=EMBEDDER, dimension=3)
            assert fingerprints(second) == {"a": "f"}
        else:
            second.open(embedder="other:3", dimension=4)
            assert fingerprints(second) == {}

    def test_an_outage_is_retryable(self, index: VectorIndex) -> None:
        """In an outage, every call raises DeliveryRetryable from the vendor's error. Later the same object works again.

        An index that loses its content in an outage has another incarnation afterwards.
        """
        if not self.remote:
            return  # test_index_has_exactly_the_declared_parts checks `in_process`
        index.upsert([point("a")])
        before = index.incarnation
        calls: list[Callable[[], object]] = [
            lambda: index.upsert([point("b")]),
            lambda: index.delete(["a"]),
            lambda: index.query(vector(*X), 1),
            lambda: index.get(["a"]),
            lambda: index.scan(None, 1),
            lambda: index.open(embedder=EMBEDDER, dimension=3),
        ]
        with self.outage():
            for call in calls:
                with pytest.raises(DeliveryRetryable) as caught:
                    call()
                assert caught.value.__cause__ is not None
        for attempt in range(20):
            try:
                index.open(embedder=EMBEDDER, dimension=3)
                index.upsert([point("b")])
                break
            except DeliveryRetryable:  # the connection may be older than the outage
                assert attempt < 19
        kept = index.incarnation == before
        assert kept or not self.persistent
        assert fingerprints(index) == ({"a": "f", "b": "f"} if kept else {"b": "f"})

    # -- erasure -------------------------------------------------------------------------------------------------------

    def test_purge_removes_deleted_points_from_the_files(self, index: VectorIndex, files: Path | None) -> None:
        """`purge` removes deleted and replaced points from the files, and nothing else, or it is refused."""
        kept = [point(f"k{n}", (1, n, 0), fingerprint=f"f{n}", metadata={"n": n}) for n in range(20)]
        index.upsert(kept)
        index.upsert([point("gone", Y, metadata={"secret": _ERASED}), point("k3", Y, metadata={"secret": _ERASED})])
        index.upsert([kept[3]])
        index.delete(["gone"])
        if not isinstance(index, PurgeableIndex):
            return
        if self.purgeable:
            index.purge()
        else:
            with pytest.raises(MemstateError):
                index.purge()
        assert contents(index, ["gone", *(p.id for p in kept)]) == {f"k{n}": (f"f{n}", [1, n, 0]) for n in range(20)}
        assert fingerprints(index) == {p.id: p.fingerprint for p in kept}
        assert ids_where(index, {"n": {"$gte": 18}}) == {"k18", "k19"}
        index.upsert([point("new", Z)])
        assert [match.id for match in index.query(vector(*Z), 1)] == ["new"]
        if self.purgeable and files is not None:
            index.close()
            leaks = [path for path in files.rglob("*") if path.is_file() and _ERASED.encode() in path.read_bytes()]
            assert leaks == []


class _Content:
    """The report of a killed program: the points in its index, and the number of finished rounds."""

    def __init__(self, first: str, numbers: list[str], done: int) -> None:
        self.incarnation, listed, stored, answer = json.loads(first)
        self.points = {id_: (fingerprint, values) for id_, (fingerprint, values) in stored.items()}
        assert listed == answer == {id_: fingerprint for id_, (fingerprint, _) in self.points.items()}
        self.done = int(numbers[-1]) + 1 if numbers else done


def _killed(program: str, done: int, *, lines: int | None) -> tuple[str, _Content]:
    """Run *program*, which continues after *done* rounds, and kill it after *lines* more.

    If *lines* is None, the program only prints the content of its index.
    """
    last = done if lines is None else None
    code = f"{program}\nfrom memstate_sa.testing import churn\nchurn.main(index, {done}, {last})"
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True) as process:  # noqa: S603
        assert process.stdout is not None
        first = process.stdout.readline()
        numbers = [process.stdout.readline() for _ in range(lines or 0)]
        process.kill()
        numbers += process.stdout.read().splitlines(keepends=True)
    assert first.endswith("\n"), "the program failed, and its error is above"
    content = _Content(first, [line for line in numbers if line.endswith("\n")], done)
    return content.incarnation, content


def _distances(vectors: NDArray[np.float32], query: NDArray[np.float32]) -> NDArray[np.float64]:
    wide, target = vectors.astype(np.float64), query.astype(np.float64)
    distances: NDArray[np.float64] = 1.0 - wide @ target / np.linalg.norm(wide, axis=1) / np.linalg.norm(target)
    return distances


_DATE = "2026-03-01T12:00:00+00:00"
_VALUES: dict[str, Any] = {
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
    "date": _DATE,  # the relay passes a datetime in this form
    "none": None,
    "nan": float("nan"),
    "infinity": float("inf"),
    "snowflake": 2**60 + 1,
    "huge": 2**70,
}
_FILTERS: list[tuple[Filter, str]] = [
    ({}, " ".join([*_VALUES, "missing"])),
    ({"v": {"$eq": 1}}, "one one-float"),
    ({"v": {"$eq": 1.0}}, "one one-float"),
    ({"v": {"$eq": True}}, "true"),
    ({"v": {"$eq": False}}, "false"),
    ({"v": {"$eq": "1"}}, "text-one"),
    ({"v": {"$eq": "tip"}}, "tip"),
    ({"v": {"$eq": ""}}, "empty"),
    ({"v": {"$eq": "ti\0p"}}, "nul"),
    ({"v": {"$in": [_DATE, "2026-03-01T12:00:00Z"]}}, "date"),
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
_OPERANDS: list[Any] = [None, 0, 1, -1, 0.5, -0.5, 1.5, 2, True, False, "a", "b", ""]


def _random_filter(rng: random.Random, depth: int) -> dict[str, Any]:
    if depth and rng.random() < 0.5:
        return {rng.choice(["$and", "$or"]): [_random_filter(rng, depth - 1) for _ in range(rng.randint(1, 3))]}
    operator = rng.choice(["$eq", "$in", "$gt", "$gte", "$lt", "$lte"])
    numbers = [value for value in _OPERANDS if isinstance(value, int | float) and not isinstance(value, bool)]
    operand: Any = rng.choice(_OPERANDS if operator == "$eq" else numbers)
    return {rng.choice("ab"): {operator: rng.sample(_OPERANDS, 3) if operator == "$in" else operand}}
