"""Wrong input raises an error that helps, and does no other damage."""

from __future__ import annotations

import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from sqlalchemy import Engine, ForeignKey, Text, insert, make_url, select
from sqlalchemy.exc import DBAPIError, InvalidRequestError, OperationalError
from sqlalchemy.orm import DeclarativeBase, Mapped, Session, mapped_column, relationship, sessionmaker

from memstate_sa import (
    DeliveryRejected,
    Fact,
    Incomplete,
    IndexMismatch,
    Memory,
    MemoryStore,
    MemstateError,
    NotFound,
    ValidationFailed,
)
from memstate_sa.db import engines
from memstate_sa.db.tables import log, outbox, parked
from memstate_sa.indexes import ChromaIndex, InMemoryIndex
from memstate_sa.relay import RetryPolicy
from memstate_sa.testing import HashEmbedder
from tests.support import Note, Person, Tag, World, assert_index_holds
from tests.support.apps import App
from tests.support.chroma import persistent
from tests.support.relays import eventually


def say(world: World, **tags: str) -> None:
    with world.session() as session:
        session.add_all([Tag(name=name, meaning=meaning) for name, meaning in tags.items()])
        session.commit()


def untracked() -> Memory:
    return Memory(InMemoryIndex(), embedder=HashEmbedder())


class Base(DeclarativeBase):
    pass


class Page(Base):
    """A fact with a key of any length, and a relationship."""

    __tablename__ = "page"
    path: Mapped[str] = mapped_column(Text, primary_key=True)
    content: Mapped[str]
    parent_path: Mapped[str | None] = mapped_column(ForeignKey("page.path"))
    parent: Mapped[Page | None] = relationship(remote_side=path)


class PageWorld(App):
    """An application with pages, its memory and its database."""

    def __init__(self, engine: Engine, **tracking: Any) -> None:
        super().__init__(engine, Page, **{"text": "content", **tracking})
        self.relay = self.memory.relay(engine, policy=RetryPolicy(delay_s=0.001))


@pytest.fixture
def pages(engine: Engine) -> Iterator[PageWorld]:
    world = PageWorld(engine)
    yield world
    world.memory.close()


# -- tracking --------------------------------------------------------------------------------------------------------


class Plain:
    name = "not mapped"


class Reserved(DeclarativeBase):
    """A separate base, because other tests create the tables of theirs."""


class ReservedName(Reserved):
    __tablename__ = "reserved_name"
    id: Mapped[int] = mapped_column(primary_key=True)
    memstate_x: Mapped[str]


TRACKING: dict[str, tuple[Callable[[Memory], Any], str]] = {
    "an unmapped class": (lambda m: m.track(Plain, text="name"), "Plain'>: it is not a mapped class"),
    "an instance": (lambda m: m.track(Person(), text="about"), "is not a mapped class"),
    "a table": (lambda m: m.track(Person.__table__, text="about"), "is not a mapped class"),
    "no column": (
        lambda m: m.track(Person, text="abuot"),
        r"Person has no column attribute 'abuot'\. Choose from: about, id",
    ),
    "a relationship": (lambda m: m.track(Person, text="notes"), "no column attribute 'notes'"),
    "text of another kind": (lambda m: m.track(Person, text=3), "the text comes from one column or from a function"),
    "no such metadata": (lambda m: m.track(Person, text="about", metadata=("naem",)), "no column attribute 'naem'"),
    "metadata as a string": (lambda m: m.track(Person, text="about", metadata="name"), r"for example \('name',\)"),
    "unique_by as a string": (lambda m: m.track(Person, text="about", unique_by="name"), r"for example \('name',\)"),
    "a reserved name": (lambda m: m.track(ReservedName, text="id", metadata=("memstate_x",)), "memstate_ are ours"),
    "no such unique": (lambda m: m.track(Person, text="about", unique_by=("naem",)), "no column attribute 'naem'"),
    "entity with a bracket": (lambda m: m.track(Person, text="about", entity="a[b"), r"without '\['"),
    "entity that is no name": (lambda m: m.track(Person, text="about", entity=5), "entity=5. Give a name"),
    "empty entity": (lambda m: m.track(Person, text="about", entity=""), "1 to 128 characters"),
    "long entity": (lambda m: m.track(Person, text="about", entity="x" * 129), "1 to 128 characters"),
    "no such index": (lambda m: m.track(Person, text="about", index="other"), "this Memory has memory"),
    "no index": (lambda m: m.track(Person, text="about", index=()), "this Memory has memory"),
    "no schema": (lambda m: m.track(Person, text="about", schema=5), "not a Pydantic model class"),
    "no such way": (lambda m: m.track(Person, text="about", on_untracked="log"), "Choose 'raise' or 'warn'"),
}


@pytest.mark.parametrize("kind", TRACKING)
def test_class_that_cannot_be_tracked_is_refused(kind: str) -> None:
    """The error names the mistake and the choices. Afterwards the class can be tracked correctly."""
    memory = untracked()
    track, message = TRACKING[kind]
    with pytest.raises(MemstateError, match=message):
        track(memory)
    assert memory.track(Person, text="about", metadata=("name",)) is Person


def test_tracking_twice_is_refused() -> None:
    """A class, an entity or a table cannot be tracked twice. The first one stays as it was."""
    memory = untracked()
    memory.track(Tag, text="meaning", entity="word")
    with pytest.raises(MemstateError, match="Tag has the entity 'word' already"):
        memory.track(Tag, text="name", entity="word")
    with pytest.raises(MemstateError, match="Tag tracks table tag already"):
        memory.track(Tag, text="name")
    with pytest.raises(MemstateError, match="Tag has the entity 'word' already"):
        memory.track(Person, text="about", entity="word")
    memory.track(Person, text="about")


def test_memory_without_its_parts_is_refused() -> None:
    """The index or the embedder has a wrong type, or the delivery is unknown."""
    for index in ("chroma", {"memory": None}, {1: InMemoryIndex()}, InMemoryIndex):
        with pytest.raises(MemstateError, match="Give a VectorIndex"):
            Memory(index, embedder=HashEmbedder())  # type: ignore[arg-type]
    with pytest.raises(MemstateError, match=r"embedder=5\. Give an Embedder"):
        Memory(InMemoryIndex(), embedder=5)  # type: ignore[arg-type]
    with pytest.raises(MemstateError, match="delivery='soon'"):
        Memory(InMemoryIndex(), embedder=HashEmbedder(), delivery="soon")  # type: ignore[arg-type]


@pytest.mark.parametrize("wrong", [None, "sqlite://", 5, Session])
def test_argument_that_is_no_engine_is_refused(wrong: Any) -> None:
    """Every method that takes an engine explains how to make one."""
    memory = untracked()
    memory.track(Tag, text="meaning")
    calls: list[Callable[[Any], Any]] = [
        memory.create_tables,
        memory.relay,
        memory.verify,
        memory.status,
        lambda engine: memory.backfill(engine, Tag),
    ]
    for call in calls:
        with pytest.raises(MemstateError, match=r"is not an Engine\. Create one with sqlalchemy.create_engine\(url\)"):
            call(wrong)


def test_calls_on_an_untracked_class_are_refused(world: World) -> None:
    """Search, history and backfill name the call that is missing."""
    with world.session() as session:
        for call in (
            lambda: world.memory.search(session, "tea", Page),
            lambda: world.memory.search(session, "tea", select(Page)),
            lambda: world.memory.history(session, Page),
            lambda: world.memory.history(session, Page(path="x", content="y")),
            lambda: world.memory.backfill(world.engine, Page),
        ):
            with pytest.raises(MemstateError, match=r"not tracked by this Memory\. Call memory.track\(Page, text="):
                call()
        for wrong in (int, 5, "tag"):
            with pytest.raises(MemstateError, match="is not tracked by this Memory"):
                world.memory.history(session, wrong)


def test_key_of_the_wrong_shape_is_refused(world: World) -> None:
    """A composite key that is incomplete, and an instance without a key."""
    with world.session() as session:
        with pytest.raises(MemstateError, match=r"key='a': the primary key of note is topic, number"):
            world.memory.history(session, Note, "a")
        with pytest.raises(MemstateError, match=r"the primary key of person is id"):
            world.memory.history(session, Person, (1, 2))
        with pytest.raises(MemstateError, match="has no history: it was never flushed"):
            world.memory.history(session, Person(name="x"))
        assert world.memory.history(session, Note, ("a", 1)) == []


# -- sessions --------------------------------------------------------------------------------------------------------


def test_unattached_session_may_only_read(world: World) -> None:
    """It may search and read history. Writes that need capture are refused, and nothing is written."""
    say(world, tea="a drink")
    with Session(world.engine) as session:
        assert [hit.fact.name for hit in world.memory.search(session, "drink", Tag)] == ["tea"]
        assert [c.op for c in world.memory.history(session, Tag)] == ["insert"]
        for call in (
            lambda: world.memory.annotate(session, actor="ada"),
            lambda: world.memory.rollback(session),
            lambda: world.memory.rollback(session, tx="x"),
        ):
            with pytest.raises(MemstateError, match=r"not attached\. Call memory\.attach\(\) with its sessionmaker"):
                call()
        session.commit()
    world.assert_in_step()


def test_closed_session_starts_again_without_labels(world: World) -> None:
    """The Session starts again, like in SQLAlchemy. Its labels from before the close are gone."""
    say(world, tea="a drink")
    session = world.session()
    session.scalars(select(Tag)).all()
    world.memory.annotate(session, actor="ada")
    session.close()
    assert [hit.fact.name for hit in world.memory.search(session, "drink", Tag)] == ["tea"]
    session.close()
    assert [(c.op, c.actor) for c in world.memory.rollback(session)] == [("delete", None)]
    session.close()  # without a commit
    session.add(Tag(name="rain"))
    session.commit()
    assert [(c.op, c.key, c.actor) for c in world.memory.history(session, Tag)] == [
        ("insert", "tea", None),
        ("insert", "rain", None),
    ]
    session.close()
    world.assert_in_step()


def test_session_closed_for_good_raises_sqlalchemys_error(world: World) -> None:
    """SQLAlchemy raises its own error, and nothing is written."""
    say(world, tea="a drink")
    session = sessionmaker(world.engine, class_=world.sessions.class_, close_resets_only=False)()
    session.close()
    for call in (
        lambda: world.memory.search(session, "drink", Tag),
        lambda: world.memory.rollback(session),
        lambda: world.memory.history(session, Tag),
    ):
        with pytest.raises(InvalidRequestError, match="closed"):
            call()
    world.assert_in_step()


@pytest.mark.parametrize("call", ["search", "history", "annotate", "rollback"])
def test_argument_that_is_no_session_is_refused(world: World, call: str) -> None:
    """Every method that takes a Session says so."""
    calls: dict[str, Callable[[Any], Any]] = {
        "search": lambda wrong: world.memory.search(wrong, "tea", Tag),
        "history": lambda wrong: world.memory.history(wrong, Tag),
        "annotate": lambda wrong: world.memory.annotate(wrong, actor="ada"),
        "rollback": world.memory.rollback,
    }
    for wrong in (None, 5, "session", world.engine):
        with pytest.raises(MemstateError, match="Session"):
            calls[call](wrong)


@pytest.mark.parametrize("name", ["actor", "reason", "session_id"])
def test_labels_that_are_no_text_are_refused(world: World, name: str) -> None:
    """They are refused when they are set, not at COMMIT, which would lose the facts."""
    with world.session() as session:
        for label in (5, object(), "a\x00b", "\ud800"):
            with pytest.raises(MemstateError, match=name):
                world.memory.annotate(session, **{name: label})  # type: ignore[arg-type]
        session.add(Tag(name="tea"))
        session.commit()
    world.assert_in_step()


def test_scopes_that_are_no_text_are_refused(world: World) -> None:
    """A transaction, session or actor of another type raises the same error on both databases."""
    say(world, tea="a drink")
    with world.session() as session:
        for scope in ({"tx": 5}, {"session_id": 5}, {"actor": 5}):
            with pytest.raises((MemstateError, NotFound), match="5"):
                world.memory.rollback(session, **scope)  # type: ignore[arg-type]
            session.rollback()
    world.assert_in_step()


# -- texts -----------------------------------------------------------------------------------------------------------


@pytest.mark.deep
@pytest.mark.deep_on("postgres")
def test_text_of_ten_megabytes_is_delivered_and_found(world: World) -> None:
    """It is delivered and found, and history has its old and its new value."""
    embed = world.embedder.embed  # like models, which read only the beginning
    world.embedder.embed = lambda texts: embed([text[:200] for text in texts])  # type: ignore[method-assign]
    long = "mint tea " + "x" * 10_000_000
    with world.session() as session:
        session.add_all([Person(id=1, name="ada", about=long), Person(id=2, name="bob", about="rain")])
        session.commit()
        assert [hit.fact.id for hit in world.memory.search(session, "mint tea", Person, limit=1)] == [1]
        world.assert_in_step()
        assert [hit.fact.id for hit in world.memory.search(session, "mint tea", Person, limit=1)] == [1]
        session.get_one(Person, 1).about = long + "!"
        session.commit()
        changes = world.memory.history(session, Person, 1)
        assert [c.after and c.after["about"][9_999_990:] for c in changes] == [long[9_999_990:], long[9_999_990:] + "!"]
        world.memory.rollback(session)
        session.commit()
        assert session.get_one(Person, 1).about == long
    world.assert_in_step()


def test_nul_byte_in_a_text_loses_nothing_else(world: World) -> None:
    """SQLite stores it, so it is delivered, found and logged. PostgreSQL cannot, and nothing else is lost."""
    say(world, tea="a drink")
    with world.session() as session:
        session.add(Person(id=1, name="ada", about="mint\x00tea"))
        if world.engine.dialect.name == "postgresql":
            with pytest.raises(DBAPIError, match="NUL"):
                session.commit()
            session.rollback()
            assert world.memory.history(session, Person) == []
        else:
            session.commit()
            assert [c.after["about"] for c in world.memory.history(session, Person) if c.after] == ["mint\x00tea"]
            hits = world.memory.search(session, "mint\x00tea", Person)
            assert [hit.fact.about for hit in hits] == ["mint\x00tea"]
    world.assert_in_step()


def test_lone_surrogate_in_a_text_loses_nothing_else(world: World) -> None:
    """No driver can encode it. The flush raises the driver's error, and nothing else is lost."""
    say(world, tea="a drink")
    with world.session() as session:
        session.add(Person(id=1, name="ada", about="mint \ud800 tea"))
        with pytest.raises(UnicodeEncodeError):
            session.commit()
        session.rollback()
        session.add(Person(id=1, name="ada", about="mint tea"))
        session.commit()
        assert [c.after["about"] for c in world.memory.history(session, Person) if c.after] == ["mint tea"]
        hits = world.memory.search(session, "mint \ud800 tea", Person)
        assert [hit.fact.about for hit in hits] == ["mint tea"]
    world.assert_in_step()


@pytest.mark.parametrize("bad", ["a\x00b", "\ud800"], ids=["NUL", "surrogate"])
def test_payloads_that_jsonb_cannot_hold_are_refused(engine: Engine, bad: str) -> None:
    """Such a value anywhere in the payload raises the same error on both databases, before anything is sent."""
    with MemoryStore(engine, InMemoryIndex(), embedder=HashEmbedder(), background=False) as store:
        kept = store.commit(Fact(type="note", payload={"text": "a\\u0000b, spelled out"}))
        payloads: list[Any] = [{"x": bad}, {bad: 1}, {"x": [{"y": bad}]}, {"x": ("y", bad)}, {"x": {5: bad}}]
        for payload in payloads:
            with pytest.raises(ValidationFailed, match=r"payload: (It contains a NUL character|Not JSON)") as caught:
                store.commit(Fact(type="note", payload=payload))
            assert [e["loc"] for e in caught.value.errors] == [("payload",)]
            with pytest.raises(ValidationFailed):
                store.update(kept, {"payload": payload})
        assert [fact.payload for fact in store.query()] == [{"text": "a\\u0000b, spelled out"}]
        assert [c.op for c in store.history(kept)] == ["insert"]


def test_too_long_primary_key_is_refused(pages: PageWorld) -> None:
    """The flush is refused with the table and the limit. The longest key that fits works, and leaves nothing behind."""
    fits = "x" * 1990
    with pages.sessions() as session:
        session.add(Page(path=fits, content="fits"))
        session.commit()
        session.add_all([Page(path="y" * 2001, content="too long"), Page(path="short", content="in the same flush")])
        with pytest.raises(MemstateError, match="its primary key has 2005 characters"):
            session.commit()
        session.rollback()
        with pytest.raises(MemstateError, match="The limit is 2000"):
            session.execute(insert(Page), [{"path": "z" * 2001, "content": "too long"}])
        session.commit()
        assert session.scalars(select(Page.path)).all() == [fits]
        assert [c.key for c in pages.memory.history(session, Page)] == [fits]
    pages.relay.drain()
    assert_index_holds(pages.index, pages.embedder, {f'page["{fits}"]': "fits"})


def test_very_long_value_is_still_unique(postgres_engine: Engine) -> None:
    """The value works at any length, or our own error refuses it."""
    world = PageWorld(postgres_engine, unique_by=("content",))
    long = "".join(chr(0x4E00 + n * 7919 % 20000) for n in range(9000))
    with world.sessions() as session:
        session.add(Page(path="a", content=long))
        session.commit()
        session.add(Page(path="b", content=long))
        with pytest.raises(MemstateError, match="unique"):
            session.commit()


# -- text callables --------------------------------------------------------------------------------------------------


def by_parent(page: Page) -> str:
    return f"{page.content} below {page.parent.content}" if page.content == "child" and page.parent else page.content


@pytest.fixture
def family(engine: Engine) -> Iterator[PageWorld]:
    """Pages whose text callable touches a relationship for one page."""
    world = PageWorld(engine, text=by_parent)
    with world.sessions() as session:
        root = Page(path="root", content="green tea")
        session.add_all([root, Page(path="child", content="child", parent=root), Page(path="other", content="rain")])
        session.commit()
    yield world
    world.memory.close()


def test_text_callable_that_touches_a_relationship_parks_its_row(family: PageWorld) -> None:
    """Only this row waits. The operator sees the reason without the fact, and a change of the row repairs it."""
    family.relay.drain()
    assert_index_holds(family.index, family.embedder, {'page["root"]': "green tea", 'page["other"]': "rain"})
    with family.engine.connect() as connection:
        row = connection.execute(select(parked)).one()
    assert row.key == '["child"]'
    assert "text callable: DetachedInstanceError" in row.error
    with family.sessions() as session:
        session.get_one(Page, "child").content = "mint tea"
        session.commit()
    family.relay.drain()
    assert_index_holds(
        family.index,
        family.embedder,
        {'page["root"]': "green tea", 'page["other"]': "rain", 'page["child"]': "mint tea"},
    )
    assert family.memory.status(family.engine)["memory"].parked == 0


@pytest.mark.parametrize("delivered", [False, True])
def test_a_text_callable_that_raises_hides_its_row_alone(family: PageWorld, delivered: bool) -> None:
    """Search finds the other rows, and is marked incomplete."""
    if delivered:
        family.relay.drain()
    with family.sessions() as session:
        hits = family.memory.search(session, "green tea", Page)
        assert [hit.fact.path for hit in hits] == ["root", "other"]
        assert Incomplete.TEXT_FAILED in hits.reasons


# -- embedders -------------------------------------------------------------------------------------------------------


def poison(world: World, vector: Callable[[np.ndarray[Any, Any]], Any]) -> Callable[[], None]:
    """Make the embedder return *vector(correct vector)* for texts with "poison". Returns a function that ends this."""
    embed = world.embedder.embed

    def poisoned(texts: Any) -> Any:
        vectors = embed(texts)
        for row, text in enumerate(texts):
            if "poison" in text:
                vectors[row] = vector(vectors[row])
        return vectors

    world.embedder.embed = poisoned  # type: ignore[method-assign]

    def cure() -> None:
        world.embedder.embed = embed  # type: ignore[method-assign]

    return cure


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_embedder_that_returns_nan_parks_only_that_text(world: World, value: float) -> None:
    """The bad text is parked, and all others are delivered and found. After the repair everything is in step."""
    world.relay = world.memory.relay(world.engine, policy=RetryPolicy(delay_s=0.001, max_attempts=10**6))
    cure = poison(world, lambda vector: np.full_like(vector, value))
    names = [f"t{n}" for n in range(9)]
    say(world, **{name: "poison" if name == "t4" else f"meaning {name}" for name in names})
    world.relay.drain()
    assert [entry.id for entry in world.index.scan(None, 20)] == [f'tag["{name}"]' for name in names if name != "t4"]
    with world.engine.connect() as connection:
        row = connection.execute(select(parked)).one()
    assert (row.key, "returned NaN or infinity" in row.error) == ('["t4"]', True)
    with world.session() as session:
        hits = world.memory.search(session, "t7 means meaning t7", Tag, limit=1)
        assert [hit.fact.name for hit in hits] == ["t7"]
        assert hits.reasons == [Incomplete.REFUSED]
    cure()
    eventually(lambda: world.relay.run_once() == 1)
    world.assert_in_step()


def test_one_bad_text_does_not_hide_other_undelivered_rows(world: World) -> None:
    """A fresh search finds all embeddable texts. Only the bad text is missing."""
    poison(world, lambda vector: np.full_like(vector, np.nan))
    say(world, bad="poison", good="mint tea")
    with world.session() as session:
        hits = world.memory.search(session, "mint tea", Tag)
        assert [hit.fact.name for hit in hits] == ["good"]
        assert Incomplete.REFUSED in hits.reasons


@pytest.mark.deep_on("postgres")
def test_embedder_of_wrong_dimensions_is_named_and_loses_nothing(world: World) -> None:
    """Search names the embedder and its shapes, and delivery parks the key. After the repair nothing is lost."""
    policy = RetryPolicy(delay_s=0.001, max_attempts=10**6)
    world.relay = world.memory.relay(world.engine, policy=policy)
    embed = world.embedder.embed
    say(world, tea="a drink")
    world.relay.drain()
    wrong: dict[str, Callable[[Any], Any]] = {
        "shape (1, 63)": lambda vectors: vectors[:, :-1],
        "shape (64,)": lambda vectors: vectors[0],
        "shape (0, 64)": lambda vectors: vectors[:-1],
        "shape (0,)": lambda vectors: [],
        "shape ()": lambda vectors: None,
        "not return an array of numbers": lambda vectors: "x",
    }
    for number, (told, change) in enumerate(wrong.items()):
        world.embedder.embed = lambda texts, change=change: change(embed(texts))  # type: ignore[method-assign]
        say(world, **{f"t{number}": f"meaning {number}"})
        world.relay.drain()
        with world.engine.connect() as connection:
            parking = {row.key: row.error for row in connection.execute(select(parked))}
        assert parking.keys() == {f'["t{n}"]' for n in range(number + 1)}
        assert told in parking[f'["t{number}"]']
        with world.session() as session, pytest.raises(DeliveryRejected, match="Embedder 'hash:64'") as caught:
            world.memory.search(session, "drink", Tag)
        assert told in str(caught.value)
    world.embedder.embed = embed  # type: ignore[method-assign]
    eventually(lambda: world.relay.run_once() >= 0 and world.memory.status(world.engine)["memory"].parked == 0)
    world.assert_in_step()


# -- indexes ---------------------------------------------------------------------------------------------------------


def test_index_of_another_embedder_is_refused(engine: Engine, tmp_path: Path) -> None:
    """Each entry point names both embedders, and changes neither facts nor index. The right embedder still works."""
    text = "green tea"

    def store(client: Any, embedder: HashEmbedder, **options: Any) -> MemoryStore:
        return MemoryStore(engine, ChromaIndex(client, "memory"), embedder=embedder, **{"background": False, **options})

    with persistent(tmp_path / "chroma") as client:
        with store(client, HashEmbedder(64)) as right:
            id_ = right.commit(Fact(type="note", payload={"text": text}))
            right.memory.relay(engine).drain()
        both = r"embedder 'hash:64', 64 dimensions.* 'hash:32', 32 dimensions"
        with pytest.raises(IndexMismatch, match=both):
            store(client, HashEmbedder(32), background=True)
        with store(client, HashEmbedder(32)) as wrong:
            new = wrong.commit(Fact(type="note", payload={"text": "mint tea"}))
            relay = wrong.memory.relay(engine)
            calls: list[Callable[[], Any]] = [
                relay.start,
                relay.run_once,
                lambda: relay.drain(timeout=1),
                lambda: wrong.search("tea"),
                lambda: wrong.memory.verify(engine),
                lambda: wrong.memory.status(engine),
            ]
            for call in calls:
                with pytest.raises(IndexMismatch, match=both):
                    call()
        with store(client, HashEmbedder(64)) as right:
            assert [hit.fact.id for hit in right.search("green tea", limit=1)] == [id_]
            right.memory.relay(engine).drain()
            assert_index_holds(
                right.memory.indexes["memory"],
                HashEmbedder(64),
                {f'memstate_fact["{id_}"]': "text: green tea", f'memstate_fact["{new}"]': "text: mint tea"},
            )


def test_collection_of_another_distance_is_refused(tmp_path: Path, sqlite_engine: Engine) -> None:
    """It is refused when the store is made, also on in-memory SQLite. Nothing is written to the collection."""
    with persistent(tmp_path / "chroma") as client:
        client.create_collection("theirs", configuration={"hnsw": {"space": "l2"}}, embedding_function=None)
        for where in ("sqlite://", sqlite_engine):
            with pytest.raises(IndexMismatch, match="l2 distance"):
                MemoryStore(where, ChromaIndex(client, "theirs"), embedder=HashEmbedder())
        collection = client.get_collection("theirs", embedding_function=None)
        assert (collection.metadata, collection.get()["ids"]) == (None, [])


# -- URLs ------------------------------------------------------------------------------------------------------------

SECRET = "s3cr3t"

URLS = {
    "nobody listens": (
        f"postgresql://ada:{SECRET}@127.0.0.1:1/db",
        "Cannot open postgresql.*127.0.0.1:1/db: .*refused.* Check the URL, and that the server runs",
    ),
    "in the query": (f"postgresql://ada@127.0.0.1:1/db?password={SECRET}", "Cannot open postgresql.*127.0.0.1"),
    "no port": (f"postgresql://ada:x@127.0.0.1:{SECRET}/db", "not a database URL"),
    "no URL": (SECRET, "not a database URL"),
    "empty": ("", "not a database URL"),
    "no such dialect": (f"nosql://ada:{SECRET}@host/db", "does not support nosql. It works with PostgreSQL and SQLite"),
    "no such driver": (
        f"postgresql+nope://ada:{SECRET}@host/db",
        r"does not know the driver of postgresql\+nope://",
    ),
    "another database": (
        f"mysql://ada:{SECRET}@host/db",
        "does not support mysql. It works with PostgreSQL and SQLite",
    ),
    "no such folder": (
        "sqlite:////nowhere/at/all.db",
        "Cannot open sqlite:////nowhere/at/all.db: unable to open database file. Check the path",
    ),
}


@pytest.mark.parametrize("kind", URLS)
def test_url_that_does_not_connect_is_refused_without_password(kind: str) -> None:
    """The error comes at once. Neither its message nor the chained errors have the password."""
    url, message = URLS[kind]
    with pytest.raises(MemstateError, match=message) as caught:
        MemoryStore(url, InMemoryIndex(), embedder=HashEmbedder())
    shown = traceback.format_exception(caught.value)
    assert not [line for line in shown if SECRET in line]


def test_missing_database_is_named_in_the_error(postgres_engine: Engine) -> None:
    with pytest.raises(MemstateError, match=r'database "nowhere" does not exist. Check the URL'):
        MemoryStore(postgres_engine.url.set(database="nowhere"))


def test_reason_of_the_driver_is_one_line_without_control_characters() -> None:
    failure = engines.connection_failure(
        make_url("sqlite:///a.db?password=pass"), OperationalError(None, None, Exception("no\x1b[2J pass\nmore"))
    )
    assert str(failure) == "Cannot open sqlite:///a.db: no\\u001b[2J …. Check the path, and the rights on its folder."


@pytest.mark.parametrize("content", [b"this is no database, but it is long enough to look like one" * 20, None])
def test_file_that_is_no_sqlite_database_is_refused(tmp_path: Path, content: bytes | None) -> None:
    """Another file or a folder raises a clear error, and is left unchanged."""
    path = tmp_path / "facts.db"
    path.mkdir() if content is None else path.write_bytes(content)
    with pytest.raises(MemstateError, match="Cannot open sqlite"):
        MemoryStore(f"sqlite:///{path}", InMemoryIndex(), embedder=HashEmbedder())
    assert path.is_dir() if content is None else path.read_bytes() == content


@pytest.mark.parametrize("wrong", [None, 5, object(), Path("x.db")], ids=lambda value: type(value).__name__)
def test_argument_that_is_neither_url_nor_engine_is_refused(wrong: Any) -> None:
    """The error names the accepted types."""
    with pytest.raises(MemstateError, match="is not an Engine"):
        MemoryStore(wrong, InMemoryIndex(), embedder=HashEmbedder())


# -- calls of the store -----------------------------------------------------------------------------------------------


def test_store_call_with_a_wrong_type_names_the_argument(engine: Engine) -> None:
    """Each error names the argument, and nothing is written."""
    with MemoryStore(engine, InMemoryIndex(), embedder=HashEmbedder(), background=False) as store:
        kept = store.commit(Fact(type="note", payload={"text": "green tea"}))
        before = everything(store)
        fact = Fact(type="note", payload={"text": "mint tea"})
        calls: dict[str, Callable[[], Any]] = {
            r"Give Fact\(type=…": lambda: store.commit({"type": "note"}),  # type: ignore[arg-type]
            "actor=5": lambda: store.commit(fact, actor=5),  # type: ignore[arg-type]
            "reason=": lambda: store.commit(fact, reason="a\x00"),
            "session_id: It must be a string": lambda: store.commit(fact, session_id=5),  # type: ignore[arg-type]
            "session_id=5": lambda: store.discard_session(5),  # type: ignore[arg-type]
            "id=5": lambda: store.delete(5),  # type: ignore[arg-type]
            "id=None": lambda: store.get(None),  # type: ignore[arg-type]
            r"id=\[\]": lambda: store.history([]),  # type: ignore[arg-type]
            "id='a": lambda: store.update("a\x00", {"payload": {}}),
            "dict is not registered": lambda: store.commit_model({}),  # type: ignore[arg-type]
            "type=5": lambda: store.query(5),  # type: ignore[arg-type]
            "query=None": lambda: store.search(None),  # type: ignore[arg-type]
            "limit=0": lambda: store.search("tea", 0),
            "consistency=": lambda: store.search("tea", consistency="strong"),  # type: ignore[arg-type]
            "steps='x'": lambda: store.rollback("x"),  # type: ignore[arg-type]
            "steps=0": lambda: store.rollback(0),
        }
        for message, call in calls.items():
            with pytest.raises(MemstateError, match=message):
                call()
        assert everything(store) == before
        assert [fact.id for fact in store.query()] == [kept]


def everything(store: MemoryStore) -> list[Any]:
    with store.engine.connect() as connection:
        return [connection.execute(select(table)).all() for table in (Fact.__table__, log, outbox)]
