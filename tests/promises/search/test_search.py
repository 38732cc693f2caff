"""Search tells the truth. Every hit is a row that the caller sees, by its current content, and no nearer row is
missing.
"""

from __future__ import annotations

import sys
from typing import Any

import numpy as np
import pytest
from hypothesis import strategies as st
from sqlalchemy import Engine, func, insert, or_, select, text
from sqlalchemy.orm import joinedload

from memstate_sa import DeliveryError, DeliveryRejected, DeliveryRetryable, Incomplete, Memory, MemstateError
from memstate_sa.indexes import InMemoryIndex, Match, Point
from memstate_sa.search import search as search_module
from memstate_sa.search.comparable import Comparable
from memstate_sa.search.hits import cosine_distance
from memstate_sa.search.overlay import OVERLAY_LIMIT
from memstate_sa.search.pushdown import push_down
from memstate_sa.testing import HashEmbedder
from tests.support import Note, Person, Tag, World, explore, sizes
from tests.support.apps import App, make_app

pytestmark = pytest.mark.sa20

WORDS = ["tea", "green tea", "coffee", "rain in may", "may", "blue bicycle", "bicycle", "snow", "sushi", "noodles"]


class Meddling(InMemoryIndex):
    """An exact index that calls *during* in each query."""

    def __init__(self) -> None:
        super().__init__()
        self.during: Any = None
        self.queries: list[dict[str, Any]] = []

    def query(self, vector: Any, limit: int, *, where: Any = None, ids: Any = None) -> list[Match]:
        self.queries.append({"limit": limit, "where": where, "ids": ids})
        meddle, self.during = self.during, None
        if meddle is not None:
            meddle()
        return super().query(vector, limit, where=where, ids=ids)


@pytest.fixture
def index() -> Meddling:
    return Meddling()


@pytest.fixture
def meddled(engine: Engine, index: Meddling) -> World:
    return World(engine, index)


def people(world: World, *about: str, **more: Any) -> None:
    with world.session() as session:
        session.add_all([Person(name=f"p{n % 3}", about=words, **more) for n, words in enumerate(about)])
        session.commit()


def brute_force(world: World, session: Any, query: str, statement: Any) -> list[float]:
    """The distances of all rows that the statement selects, ascending, computed from the rows."""
    vector = world.embedder.embed([query])[0]
    rows = session.execute(statement.with_only_columns(Person.about).order_by(None))
    texts = [about for (about,) in rows if about and about.strip()]
    return sorted(cosine_distance(vector, world.embedder.embed([text])[0]) for text in texts)


def assert_exact(world: World, session: Any, query: str, statement: Any, limit: int = 5) -> None:
    hits = world.memory.search(session, query, statement, limit=limit)
    assert hits.complete
    expected = brute_force(world, session, query, statement)[:limit]
    np.testing.assert_allclose([hit.distance for hit in hits], expected, atol=1e-5)
    vector = world.embedder.embed([query])[0]
    for hit in hits:
        session.refresh(hit.fact)
        np.testing.assert_allclose(
            hit.distance, cosine_distance(vector, world.embedder.embed([hit.fact.about])[0]), atol=1e-5
        )


STATEMENTS = {
    "all": select(Person),
    "metadata": select(Person).where(Person.name == "p1"),
    "metadata in": select(Person).where(Person.name.in_(["p0", "p2"])),
    "other column": select(Person).where(Person.id % 2 == 0),
    "mixed": select(Person).where((Person.name == "p1") | (Person.id > 4)),
    "join": select(Person).join(Person.notes).where(Note.number < 2),
    "subquery": select(Person).where(Person.id.in_(select(func.max(Person.id)))),
    "none": select(Person).where(Person.name == "nobody"),
}
change = st.one_of(
    st.tuples(st.just("add"), st.sampled_from(WORDS)),
    st.tuples(st.just("edit"), st.integers(0, 9), st.sampled_from(WORDS)),
    st.tuples(st.just("rename"), st.integers(0, 9), st.sampled_from(["p0", "p1"])),
    st.tuples(st.just("delete"), st.integers(0, 9)),
    st.tuples(st.just("commit")),
    st.tuples(st.just("deliver")),
)


def apply(world: World, session: Any, change: tuple[Any, ...]) -> None:
    kind, *args = change
    found = session.scalars(select(Person).order_by(Person.id)).all()
    if kind == "add":
        session.add(Person(name="p1", about=args[0], notes=[]))
    elif kind == "commit":
        session.commit()
    elif kind == "deliver":
        session.commit()
        world.relay.drain()
    elif found:
        person = found[args[0] % len(found)]
        if kind == "edit":
            person.about = args[1]
        elif kind == "rename":
            person.name = args[1]
        else:
            session.delete(person)


@pytest.mark.parametrize("examples", sizes(4, 50))
def test_search_equals_brute_force(engine: Engine, examples: int) -> None:
    """The relay lags, vectors are stale, the transaction is open, and a delivery lands between the search's steps."""
    world = World(engine, Meddling())
    index: Any = world.index

    @explore(
        examples,
        changes=st.lists(change, max_size=15),
        query=st.sampled_from(WORDS),
        which=st.sampled_from(sorted(STATEMENTS)),
        limit=st.integers(1, 6),
        midway=st.lists(change, max_size=4),
    )
    def agrees(changes: Any, query: str, which: str, limit: int, midway: list[tuple[Any, ...]]) -> None:
        index.during = None  # left by an earlier search that did not query the index
        world.relay.drain()
        with world.session() as session:
            for person in session.scalars(select(Person)):
                session.delete(person)
            for n in range(5):
                notes = [Note(topic=f"t{n}", number=n, content="x")]
                session.add(Person(name=f"p{n % 3}", about=WORDS[n], notes=notes))
            session.commit()
            for step in changes:
                apply(world, session, step)
            if midway:
                session.commit()
                for step in midway:
                    apply(world, session, step)
                session.commit()
                index.during = world.relay.drain
            assert_exact(world, session, query, STATEMENTS[which], limit)
            session.rollback()
            world.relay.drain()
            assert_exact(world, session, query, STATEMENTS[which], limit)


# -- the fence --------------------------------------------------------------------------------------------------------


def test_ghosts_ten_to_one_leave_the_top_k_full(meddled: World, index: Meddling) -> None:
    """Vectors without rows crowd the query. The hits are still the live rows."""
    people(meddled, *WORDS)
    meddled.relay.drain()
    ghosts = [f"tea ghost {n}" for n in range(100)]
    vectors = meddled.embedder.embed(ghosts)
    index.upsert([Point(f"person[{1000 + n}]", vectors[n], "0" * 32) for n in range(100)])
    with meddled.session() as session:
        assert_exact(meddled, session, "tea", select(Person))


def test_stale_vectors_are_embedded_again(meddled: World, index: Meddling) -> None:
    """The index may have a stale vector. The row counts with its current text."""
    people(meddled, *WORDS)
    meddled.relay.drain()
    snow = meddled.embedder.embed(["snow"])[0]
    index.upsert([Point("person[1]", snow, "f" * 32)])
    with meddled.session() as session:
        hits = meddled.memory.search(session, "snow", Person, limit=10)
        found = {hit.fact.id: hit.distance for hit in hits}
        tea = cosine_distance(snow, meddled.embedder.embed(["tea"])[0])
        assert found[1] == pytest.approx(tea, abs=1e-5)


def test_an_uncommitted_write_is_found_and_an_uncommitted_delete_is_not(world: World) -> None:
    """This holds inside the open transaction. Other transactions see no change."""
    people(world, "tea", "coffee")
    world.relay.drain()
    with world.session() as session, world.session() as other:
        session.add(Person(name="new", about="oolong tea"))
        session.delete(session.get_one(Person, 1))
        assert [h.fact.about for h in world.memory.search(session, "tea", Person, limit=1)] == ["oolong tea"]
        assert [h.fact.about for h in world.memory.search(other, "tea", Person, limit=1)] == ["tea"]
        session.rollback()
        assert [h.fact.about for h in world.memory.search(session, "tea", Person, limit=1)] == ["tea"]


def test_pending_edits_are_neither_lost_nor_searched(world: World) -> None:
    """With autoflush off, the search uses the row, and the edit stays in the instance."""
    people(world, "tea", "coffee")
    world.relay.drain()
    with world.session() as session, session.no_autoflush:
        person = session.get_one(Person, 1)
        person.about = "snow"
        hit = world.memory.search(session, "tea", Person, limit=1)[0]
        assert hit.fact is person
        assert hit.distance == pytest.approx(0, abs=1e-5)
        assert person.about == "snow"


def test_eventual_shows_only_delivered_rows(world: World) -> None:
    """There is no overlay, and there are no ghosts either."""
    people(world, "tea", "green tea")
    world.relay.drain()
    people(world, "tea")
    with world.session() as session:
        session.delete(session.get_one(Person, 1))
        session.commit()
        hits = world.memory.search(session, "tea", Person, consistency="eventual")
        assert [hit.fact.id for hit in hits] == [2]


def test_other_entities_do_not_crowd_out_hits(meddled: World, index: Meddling) -> None:
    """The index holds several models. A filter fills the top k of a search for a rare one."""
    with meddled.session() as session:
        session.execute(insert(Tag), [{"name": f"tea{n}", "meaning": "tea"} for n in range(200)])
        session.commit()
    people(meddled, *WORDS)
    meddled.relay.drain()
    with meddled.session() as session:
        assert_exact(meddled, session, "tea", select(Person))
    assert [query["where"] for query in index.queries] == [None, {"memstate_entity": {"$eq": "person"}}]


def alone(engine: Engine, index: Meddling) -> App:
    """An application with people only, all of them in the index."""
    app = make_app(engine, Person, index=index, text="about", metadata=("name",))
    app.write(*(Person(name="p", about=words) for words in WORDS))
    app.memory.relay(engine).drain()
    return app


def test_foreign_points_do_not_crowd_out_hits(engine: Engine, index: Meddling) -> None:
    """Untracked points are all nearer. The search asks for the few rows by their ids."""
    app = alone(engine, index)
    vector = app.memory.embedder.embed(["tea"])[0]
    index.upsert([Point(f"other[{n}]", vector, "f") for n in range(200)])
    with app.session() as session:
        hits = app.memory.search(session, "tea", Person)
        assert len(hits) == 5
        assert {hit.fact.about for hit in hits} <= set(WORDS)
    assert [query["ids"] and set(query["ids"]) for query in index.queries] == [
        None,
        {f"person[{n + 1}]" for n in range(len(WORDS))},
    ]


def test_points_carry_their_entity_from_the_second_one_on(engine: Engine, index: Meddling) -> None:
    """Points from before are written again, without a second embedding."""
    app = alone(engine, index)
    vector = app.memory.embedder.embed(["tea"])[0]
    person = {"memstate_entity": {"$eq": "person"}}
    assert index.query(vector, 50, where=person) == []

    world = World(engine, index)
    embedded: list[str] = []
    embed = world.embedder.embed
    world.embedder.embed = lambda texts: embedded.extend(texts) or embed(texts)  # type: ignore[method-assign,func-returns-value]
    with world.session() as session:
        session.add(Tag(name="tea", meaning="leaves"))
        session.commit()
    world.relay.drain()
    assert embedded == ["tea means leaves"]
    assert {match.id for match in index.query(vector, 50, where=person)} == {
        f"person[{n + 1}]" for n in range(len(WORDS))
    }


def test_key_refused_during_a_search_is_found(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    """The key is undelivered at the first look. At the second it is parked, without its outbox entry."""
    people(world, "green tea")
    world.relay.drain()
    people(world, "tea")
    inner = search_module.read_entity_coverage

    def then_refuse(*arguments: Any) -> Any:
        coverage = inner(*arguments)
        with monkeypatch.context() as patch:
            patch.setattr(type(world.index), "upsert", refuse)
            world.relay.run_once()
        world.relay._clean_up()
        return coverage

    def refuse(self: Any, points: Any) -> None:
        raise DeliveryRejected("not this one")

    monkeypatch.setattr(search_module, "read_entity_coverage", then_refuse)
    with world.session() as session:
        hits = world.memory.search(session, "tea", Person)
    assert [hit.fact.about for hit in hits] == ["tea", "green tea"]


def test_facts_of_another_user_are_never_returned(world: World) -> None:
    """SQL applies the select's criteria, even if the index ignores them."""
    people(world, *WORDS, *WORDS)
    world.relay.drain()
    with world.session() as session:
        for name in ("p0", "p1", "p2"):
            hits = world.memory.search(session, "tea", select(Person).where(Person.name == name), limit=20)
            assert {hit.fact.name for hit in hits} == {name}


# -- push-down --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("criterion", "pushed"),
    [
        (Note.topic == "a", {"topic": {"$eq": "a"}}),
        ("a" == Note.topic, {"topic": {"$eq": "a"}}),
        (Note.number > 3, {"number": {"$gt": 3}}),
        (Note.number.in_([1, 2]), {"number": {"$in": [1, 2]}}),
        ((Note.topic == "a") & (Note.number <= 3), {"$and": [{"topic": {"$eq": "a"}}, {"number": {"$lte": 3}}]}),
        ((Note.topic == "a") | (Note.number == 3), {"$or": [{"topic": {"$eq": "a"}}, {"number": {"$eq": 3}}]}),
        (Note.topic > "a", None),
        (Note.topic.ilike("a"), None),
        (Note.topic != "a", None),
        (func.lower(Note.topic) == "a", None),
        (Note.content == "a", None),
        (Note.number == 2**70, None),
        (Note.topic == Note.content, None),
        (Tag.name == "a", None),
        (Note.topic.in_([]), None),
        (Note.number.in_([*range(100)]), {"number": {"$in": [*range(100)]}}),
        (Note.number.in_([*range(101)]), None),
        (Note.number.in_([*range(60)]) & or_(*(Note.topic == str(n) for n in range(60))), None),
        (text("1 = 1"), None),
    ],
)
def test_only_exact_criteria_are_pushed_down(world: World, criterion: Any, pushed: Any) -> None:
    """SQL and the index must agree exactly."""
    with world.engine.connect() as connection:
        comparable = Comparable(connection, Note.__table__)
        assert push_down(world.memory._registry.of(Note), [criterion], comparable) == pushed


def test_criteria_are_pushed_down_or_become_ids(meddled: World, index: Meddling) -> None:
    """The search asks the index for the fewest points that can answer."""
    people(meddled, *WORDS)
    meddled.relay.drain()
    with meddled.session() as session:
        meddled.memory.search(session, "tea", select(Person).where(Person.name == "p1"))
        assert index.queries[-1]["where"] == {"name": {"$eq": "p1"}}
        meddled.memory.search(session, "tea", select(Person).where(Person.about == "tea"))
        assert index.queries[-1]["ids"] == ["person[1]"]
        meddled.memory.search(session, "tea", Person)
        assert (index.queries[-1]["where"], index.queries[-1]["ids"]) == (None, None)


def test_criteria_with_thousands_of_values_are_left_to_sql(meddled: World, index: Meddling) -> None:
    """No index takes this many values, so SQL lists the matching rows, as for criteria that cannot be pushed down."""
    people(meddled, *WORDS)
    meddled.relay.drain()
    names = [f"p{n}" for n in range(1, 3000)]
    with meddled.session() as session:
        hits = meddled.memory.search(session, "tea", select(Person).where(Person.name.in_(names)), limit=20)
        assert index.queries[-1]["where"] is None
        assert sorted(hit.fact.id for hit in hits) == [2, 3, 5, 6, 8, 9]


def test_one_select_hydrates(meddled: World) -> None:
    """One statement loads all facts."""
    from tests.support.statements import statements

    people(meddled, *WORDS)
    meddled.relay.drain()
    with meddled.session() as session:
        seen = statements(meddled.engine)
        assert len(meddled.memory.search(session, "tea", Person, limit=20)) == len(WORDS)
        assert len([s for s in seen if "FROM person" in s]) == 1


# -- options and bounds -----------------------------------------------------------------------------------------------


def test_max_distance_excludes_farther_facts(world: World) -> None:
    """No hit is farther, and the index is asked for no more points than necessary."""
    people(world, *WORDS)
    world.relay.drain()
    with world.session() as session:
        hits = world.memory.search(session, "green tea", Person, limit=10, max_distance=0.5)
        assert hits and all(hit.distance <= 0.5 for hit in hits)
        assert hits[0].score == 1 - hits[0].distance
        everything = world.memory.search(session, "green tea", Person, limit=10)
        assert [h.fact.id for h in everything if h.distance <= 0.5] == [h.fact.id for h in hits]


def test_eager_loading_of_collections_works(world: World) -> None:
    """A joined collection repeats rows. There is still one hit per fact."""
    people(world, "tea")
    with world.session() as session:
        person = session.get_one(Person, 1)
        person.notes = [Note(topic="t", number=n, content="x") for n in range(3)]
        session.commit()
        hits = world.memory.search(session, "tea", select(Person).options(joinedload(Person.notes)))
        assert [len(hit.fact.notes) for hit in hits] == [3]


def test_search_past_the_overlay_limit_is_incomplete(world: World) -> None:
    """The result is marked incomplete. The transaction's own keys come first."""
    world.relay.drain()
    with world.session() as session:
        session.execute(insert(Tag), [{"name": f"t{n}", "meaning": f"m{n}"} for n in range(OVERLAY_LIMIT + 50)])
        session.commit()
        session.add(Tag(name="mine", meaning="zebra crossing"))
        hits = world.memory.search(session, "mine means zebra crossing", Tag, limit=1)
        assert hits.reasons == [Incomplete.TOO_MANY]
        assert hits[0].fact.name == "mine"
        session.commit()
        world.relay.drain()
        assert world.memory.search(session, "zebra", Tag).complete


def test_a_failing_embedder_leaves_out_undelivered_rows(world: World) -> None:
    """Delivered facts are still found. The result is marked incomplete."""
    people(world, "tea")
    world.relay.drain()
    people(world, "green tea")
    embed = world.embedder.embed

    def down_for_documents(texts: Any) -> Any:
        if texts != ["tea"]:
            raise DeliveryRetryable("model is down")
        return embed(texts)

    world.embedder.embed = down_for_documents  # type: ignore[method-assign]
    with world.session() as session:
        hits = world.memory.search(session, "tea", Person)
        assert [hit.fact.about for hit in hits] == ["tea"]
        assert hits.reasons == [Incomplete.UNAVAILABLE]
        with pytest.raises(DeliveryError, match="model is down"):
            world.memory.search(session, "other", Person)


def test_search_is_incomplete_until_the_index_is_filled(engine: Engine) -> None:
    """The search cannot consider rows that no relay has ever delivered."""
    world = World(engine)
    people(world, "tea")
    with world.session() as session:
        hits = world.memory.search(session, "tea", Person)
        assert [hit.fact.about for hit in hits] == ["tea"]
        assert hits.reasons == [Incomplete.FILLING]


def test_search_finds_own_writes_while_the_index_is_filled(engine: Engine) -> None:
    """A row committed just before the first delivery is behind the cursor, but not yet in the index."""

    class Filling(InMemoryIndex):
        def scan(self, after: str | None, limit: int) -> Any:
            raise DeliveryRetryable("busy")

    world = World(engine, Filling())
    people(world, "tea")
    with pytest.raises(DeliveryRetryable, match="busy"):
        world.relay.run_once()
    people(world, "green tea")
    with world.session() as session:
        hits = world.memory.search(session, "tea", Person)
        assert sorted(hit.fact.about for hit in hits) == ["green tea", "tea"]
        assert hits.reasons == [Incomplete.FILLING]


def test_repeatable_read_cannot_promise_completeness(postgres_engine: Engine) -> None:
    """The index may be ahead of an old snapshot, so the result is marked incomplete."""
    world = World(postgres_engine)
    people(world, "tea")
    world.relay.drain()
    with world.session() as session:
        session.connection(execution_options={"isolation_level": "REPEATABLE READ"})
        hits = world.memory.search(session, "tea", Person)
        assert [hit.fact.about for hit in hits] == ["tea"]
        assert hits.reasons == [Incomplete.OLD_SNAPSHOT]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"target": "person"}, "Give a tracked class, or a select"),
        ({"target": select(Person.name)}, "select\\(\\) must have exactly one tracked class"),
        ({"target": select(Person, Tag)}, "select\\(\\) must have exactly one tracked class"),
        ({"target": select(Person).limit(3)}, "has LIMIT"),
        ({"target": select(Person).fetch(3)}, "has LIMIT"),
        ({"target": int}, "int is not tracked"),
        ({"limit": 0}, "at least 1"),
        ({"limit": "5"}, "at least 1"),
        ({"max_distance": "1"}, "max_distance='1'. Give a cosine distance"),
        ({"max_distance": float("nan")}, "max_distance=nan. Give a cosine distance"),
        ({"query": None}, "query=None. Give a string"),
        ({"consistency": "strong"}, "'fresh' or 'eventual'"),
        ({"index": "other"}, "Cannot search index 'other': Person is not delivered to it"),
    ],
)
def test_bad_arguments_get_a_clear_error(world: World, arguments: dict[str, Any], message: str) -> None:
    """The error names the mistake and the accepted values."""
    given = {"query": "tea", "target": Person, **arguments}
    with world.session() as session, pytest.raises(MemstateError, match=message):
        world.memory.search(session, given.pop("query"), given.pop("target"), **given)


def test_huge_limit_finds_all_facts(meddled: World, index: Meddling) -> None:
    """A huge limit works as "all facts"."""
    people(meddled, "green tea", "coffee")
    meddled.relay.drain()
    with meddled.session() as session:
        hits = meddled.memory.search(session, "tea", Person, limit=sys.maxsize)
    assert sorted(hit.fact.about for hit in hits) == ["coffee", "green tea"]
    assert index.queries[-1]["limit"] == 1 << 20


def test_embedder_may_reuse_its_buffer(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    """The query's vector must survive the embedding of undelivered texts."""
    buffer, embed = np.zeros((100, world.embedder.dimension), dtype=np.float32), world.embedder.embed

    def reusing(texts: Any) -> Any:
        buffer[: len(texts)] = embed(texts)
        return buffer[: len(texts)]

    monkeypatch.setattr(world.embedder, "embed", reusing)
    people(world, "green tea", "snow")
    with world.session() as session:
        hits = world.memory.search(session, "green tea", Person)
        assert [hit.fact.about for hit in hits] == ["green tea", "snow"]
        assert hits[0].distance == pytest.approx(0, abs=1e-6)


def test_search_takes_the_first_of_several_indexes(engine: Engine) -> None:
    """A model goes to the indexes that it names. A search uses the first, unless told otherwise."""
    one, two = InMemoryIndex(), InMemoryIndex()
    memory = Memory({"one": one, "two": two}, embedder=HashEmbedder())
    memory.track(Tag, text="meaning", index="two")
    memory.track(Person, text="about")
    with pytest.raises(MemstateError, match="this Memory has one, two"):
        memory.track(Note, text="content", index="three")
    world = World(engine)
    memory.attach(world.sessions)
    with world.session() as session:
        session.add_all([Tag(name="t", meaning="tea"), Person(name="p", about="tea")])
        session.commit()
        relay = memory.relay(engine)
        relay.drain()
        assert [[e.id for e in index.scan(None, 9)] for index in (one, two)] == [
            ["person[1]"],
            ["person[1]", 'tag["t"]'],
        ]
        assert memory.search(session, "tea", Tag)[0].fact.name == "t"
        assert memory.search(session, "tea", Person, index="two")[0].fact.name == "p"
        assert memory.verify(engine).clean
        relay.stop()


def test_search_of_chroma_reaches_its_recall(sqlite_engine: Engine) -> None:
    """The index is approximate. Every hit is true, and recall is 1.0 on these 300 generated facts."""
    chromadb = pytest.importorskip("chromadb")
    from memstate_sa.indexes import ChromaIndex

    world = World(sqlite_engine, ChromaIndex(chromadb.EphemeralClient(), "recall"))
    people(world, *(f"{word} number {n}" for n in range(30) for word in WORDS))
    world.relay.drain()
    found = wanted = 0
    with world.session() as session:
        for word in WORDS:
            hits = world.memory.search(session, f"{word} number 7", Person, limit=5)
            expected = brute_force(world, session, f"{word} number 7", select(Person))[:5]
            vector = world.embedder.embed([f"{word} number 7"])[0]
            for hit in hits:
                true = cosine_distance(vector, world.embedder.embed([hit.fact.about])[0])
                assert hit.distance == pytest.approx(true, abs=1e-4)
            found += sum(hit.distance <= expected[-1] + 1e-5 for hit in hits)
            wanted += len(expected)
    print(f"recall@5 of Chroma: {found / wanted:.2f}")
    assert found / wanted > 0.8
    world.index.close()


def test_error_of_an_unavailable_index_is_retryable(world: World) -> None:
    """Any error of its client becomes a DeliveryError with the cause."""

    def away(*arguments: object, **options: object) -> list[object]:
        raise ConnectionRefusedError

    world.index.query = away  # type: ignore[method-assign,assignment]
    with world.session() as session, pytest.raises(DeliveryRetryable) as caught:
        world.memory.search(session, "tea", Tag)
    assert isinstance(caught.value.__cause__, ConnectionRefusedError)
