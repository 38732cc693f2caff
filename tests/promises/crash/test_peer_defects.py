"""Defects of MemState 0.5.1, one by one. None of them happens here."""

from __future__ import annotations

import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import Connection, Engine, ForeignKey, event, select
from sqlalchemy.exc import IntegrityError
from sqlalchemy.orm import DeclarativeBase, Mapped, Session, mapped_column

from memstate_sa import ConflictError, DeliveryRetryable, Fact, MemoryStore
from memstate_sa.db.codec import encode_key
from memstate_sa.db.tables import log, outbox
from memstate_sa.indexes import ChromaIndex, InMemoryIndex, Point, VectorIndex
from memstate_sa.log.changes import replay
from memstate_sa.relay import RetryPolicy
from memstate_sa.testing import FlakyIndex, HashEmbedder
from tests.support import Tag, World, assert_index_holds
from tests.support.apps import make_app
from tests.support.chroma import persistent
from tests.support.statements import statements


class Failing(FlakyIndex):
    """A FlakyIndex whose next calls fail as told: "before", "half" way, or "after" the write (its answer is lost)."""

    def __init__(self, inner: VectorIndex) -> None:
        super().__init__(inner, rate=0)
        self.moments: list[str] = []

    def _moment(self) -> str | None:
        return self.moments.pop(0) if self.moments else None


@pytest.fixture
def chroma(tmp_path: Path) -> Iterator[ChromaIndex]:
    with persistent(tmp_path / "chroma") as client:
        yield ChromaIndex(client, "memory")


@pytest.fixture
def failing(chroma: ChromaIndex) -> Failing:
    return Failing(chroma)


@pytest.fixture
def store(engine: Engine, failing: Failing) -> Iterator[MemoryStore]:
    with MemoryStore(engine, failing, embedder=HashEmbedder(), background=False) as made:
        made.memory.relay(engine).drain()
        yield made


def note(text: str) -> Fact:
    return Fact(type="note", payload={"text": text})


def in_index(expected: dict[str, str]) -> dict[str, str]:
    return {Fact.__tablename__ + encode_key([id_]): f"text: {text}" for id_, text in expected.items()}


def assert_agree(store: MemoryStore, expected: dict[str, str]) -> None:
    """Assert that rows, replayed log and index hold exactly these facts."""
    store.memory.relay(store.engine).drain()
    rows = {fact.id: fact.payload["text"] for fact in store.query()}
    with Session(store.engine) as session:
        images = replay(store.memory.history(session, Fact))
    logged = {key: image["payload"]["text"] for (_, key), image in images.items()}
    assert rows == logged == expected
    assert_index_holds(store.memory.indexes["memory"], HashEmbedder(), in_index(expected))


def found(store: MemoryStore, query: str, **options: Any) -> list[str]:
    return [hit.fact.payload["text"] for hit in store.search(query, **options)]


def deliver_once(store: MemoryStore) -> None:
    """Run a relay once. It fails, and releases the lease."""
    relay = store.memory.relay(store.engine)
    try:
        with pytest.raises(DeliveryRetryable):
            relay.run_once()
    finally:
        relay.stop()


# -- 1 ---------------------------------------------------------------------------------------------------------------


class Library(DeclarativeBase):
    pass


class Book(Library):
    __tablename__ = "book"
    id: Mapped[int] = mapped_column(primary_key=True)


class Chapter(Library):
    __tablename__ = "chapter"
    id: Mapped[int] = mapped_column(primary_key=True)
    content: Mapped[str]
    book_id: Mapped[int] = mapped_column(ForeignKey("book.id", deferrable=True, initially="DEFERRED"))


def test_1_a_failed_commit_leaves_no_phantom_in_the_log(engine: Engine, chroma: ChromaIndex) -> None:
    """COMMIT itself fails after the row was logged. The next rollback(1) undoes the last real transaction."""
    app = make_app(engine, Chapter, index=chroma, foreign_keys=True, text="content")
    with app.session() as session:
        session.add_all([Book(id=1), Chapter(id=1, content="first", book_id=1)])
        session.commit()
        session.get_one(Chapter, 1).content = "second"
        session.commit()

        session.get_one(Chapter, 1).content = "third"
        session.add(Chapter(id=2, content="of no book", book_id=7))
        session.flush()
        logged = [(c.op, c.key) for c in app.memory.history(session, Chapter)]
        assert sorted(logged) == [("insert", 1), ("insert", 2), ("update", 1), ("update", 1)]
        with pytest.raises(IntegrityError):
            session.commit()
        session.rollback()

        assert [c.op for c in app.memory.history(session, Chapter)] == ["insert", "update"]
        assert [(c.op, c.key) for c in app.memory.rollback(session)] == [("update", 1)]
        session.commit()
        assert session.execute(select(Chapter.id, Chapter.content)).all() == [(1, "first")]
    app.memory.relay(engine).drain()
    assert_index_holds(chroma, HashEmbedder(), {"chapter[1]": "first"})
    app.memory.close()


@pytest.mark.filterwarnings("ignore:DELETE statement on table 'tag' expected to delete 1 row")
def test_1_deleting_what_is_gone_leaves_no_phantom_in_the_log(engine: Engine) -> None:
    """Two sessions delete one row, and SQLAlchemy lets the second pass. The next rollback(1) restores the row."""
    world = World(engine)
    with world.sessions(expire_on_commit=False) as first, world.sessions(expire_on_commit=False) as second:
        tag = Tag(name="tea", meaning="a drink")
        first.add(tag)
        first.commit()
        same = second.get_one(Tag, "tea")
        second.commit()
        first.delete(tag)
        first.commit()
        second.delete(same)
        second.commit()
        assert [c.op for c in world.memory.history(second, Tag)] == ["insert", "delete"]
        assert [(c.op, c.key) for c in world.memory.rollback(second)] == [("insert", "tea")]
        second.commit()
    world.assert_in_step()


# -- 2 ---------------------------------------------------------------------------------------------------------------


def test_2_a_lost_acknowledgement_leaves_no_newer_vector(store: MemoryStore, failing: Failing) -> None:
    """The index took the new vector, but its answer was lost. Then SQL went back, and the index follows."""
    id_ = store.commit(note("green tea"))
    assert_agree(store, {id_: "green tea"})
    store.update(id_, {"payload": {"text": "black coffee"}})
    failing.moments = ["after"]
    deliver_once(store)
    assert_index_holds(failing.inner, HashEmbedder(), in_index({id_: "black coffee"}))
    store.rollback()
    assert found(store, "black coffee") == ["green tea"]
    assert store.search("green tea")[0].distance < store.search("black coffee")[0].distance
    assert_agree(store, {id_: "green tea"})


# -- 3 ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("moment", ["before", "half", "after"])
def test_3_a_failed_delete_leaves_no_ghost(store: MemoryStore, failing: Failing, moment: str) -> None:
    """The fact leaves search at once, even if the index still has it. It leaves the index when that is up again."""
    ids = {store.commit(note(text)): text for text in ("green tea", "mint tea", "black tea", "rain")}
    assert_agree(store, ids)
    kept = {id_: text for id_, text in ids.items() if text == "rain"}
    with store.transaction():
        for id_ in ids.keys() - kept.keys():
            store.delete(id_)
    failing.moments = [moment]
    deliver_once(store)
    assert found(store, "green tea") == ["rain"]
    assert_agree(store, kept)


# -- 4 ---------------------------------------------------------------------------------------------------------------


def test_4_discarding_a_session_takes_its_vectors_and_can_be_undone(store: MemoryStore) -> None:
    """The vectors go with the facts, and come back with them."""
    kept = {store.commit(note("green tea")): "green tea"}
    draft = {store.commit(note(text), session_id="s1", ephemeral=True): text for text in ("mint tea", "black tea")}
    assert_agree(store, kept | draft)
    assert sorted(store.discard_session("s1")) == sorted(draft)
    assert found(store, "tea") == ["green tea"]
    assert_agree(store, kept)
    store.rollback()
    assert sorted(found(store, "tea")) == ["black tea", "green tea", "mint tea"]
    assert_agree(store, kept | draft)


# -- 5 ---------------------------------------------------------------------------------------------------------------

VICTIM = """
import os, signal, sys
import chromadb
from sqlalchemy import event
from memstate_sa import Fact, MemoryStore
from memstate_sa.indexes import ChromaIndex
from memstate_sa.testing import HashEmbedder

url, folder, moment, old = sys.argv[1:]

def die(*_):
    os.kill(os.getpid(), signal.SIGKILL)

class Index(ChromaIndex):
    def upsert(self, points):
        super().upsert(points)
        if moment == "written":
            die()

store = MemoryStore(url, Index(chromadb.PersistentClient(folder), "memory"), embedder=HashEmbedder(), background=False)
with store.transaction() as session:
    store.commit(Fact(id="new", type="note", payload={"text": "mint tea"}))
    store.update(old, {"payload": {"text": "black coffee"}})
    if moment == "flushed":
        die()
    if moment == "committed":
        event.listen(session, "after_commit", die)
store.memory.relay(store.engine).drain()
"""


@pytest.mark.deep_on("sqlite")
@pytest.mark.deep_on("flushed", "committed")
@pytest.mark.parametrize("moment", ["flushed", "committed", "written"])
def test_5_a_kill_loses_no_vector(engine: Engine, tmp_path: Path, moment: str) -> None:
    """SIGKILL comes before COMMIT, after it, or between the index's write and its ledger entry. After reopening, all
    agree.
    """
    folder = tmp_path / "chroma"

    def reopened(client: Any) -> MemoryStore:
        return MemoryStore(engine, ChromaIndex(client, "memory"), embedder=HashEmbedder(), background=False)

    with persistent(folder) as client, reopened(client) as store:
        old = store.commit(note("green tea"))
        assert_agree(store, {old: "green tea"})
    url = engine.url.render_as_string(hide_password=False)
    child = subprocess.run([sys.executable, "-c", VICTIM, url, str(folder), moment, old], check=False, timeout=60)
    assert child.returncode == -signal.SIGKILL
    expected = {old: "green tea"} if moment == "flushed" else {old: "black coffee", "new": "mint tea"}
    with persistent(folder) as client, reopened(client) as store:
        assert sorted(found(store, "tea")) == sorted(expected.values())
        assert_agree(store, expected)
        assert store.memory.verify(engine).clean


# -- 6 ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("order", [("good", "bad"), ("bad", "good")], ids="-".join)
def test_6_one_failing_index_leaves_no_ghost_in_another(
    engine: Engine, failing: Failing, order: tuple[str, str]
) -> None:
    """A failed transaction reaches neither index. A transaction undone while one index is down leaves both."""
    good = InMemoryIndex()
    indexes: dict[str, VectorIndex] = {"good": good, "bad": failing}
    with MemoryStore(
        engine, {name: indexes[name] for name in order}, embedder=HashEmbedder(), background=False
    ) as store:
        relay = store.memory.relay(engine, policy=RetryPolicy(delay_s=0.001))
        kept = {store.commit(note("green tea")): "green tea"}
        relay.drain()
        with pytest.raises(RuntimeError), store.transaction():
            store.commit(note("never"))
            raise RuntimeError
        failing.moments = ["half"]
        undone = {store.commit(note("mint tea")): "mint tea"}
        with pytest.raises(DeliveryRetryable):
            relay.run_once()
        store.rollback()
        assert found(store, "tea") == ["green tea"]
        relay.drain()
        for index in (good, failing):
            assert_index_holds(index, HashEmbedder(), in_index(kept))
        assert undone.keys().isdisjoint(fact.id for fact in store.query())


def test_6_an_index_that_is_down_does_not_hold_up_the_others(engine: Engine, failing: Failing) -> None:
    """The index that is up is served, in any order of the two."""
    good = InMemoryIndex()
    with MemoryStore(engine, {"bad": failing, "good": good}, embedder=HashEmbedder(), background=False) as store:
        store.memory.relay(engine).drain()
        failing.moments = ["before"] * 100
        expected = in_index({store.commit(note("green tea")): "green tea"})
        deliver_once(store)
        assert_index_holds(good, HashEmbedder(), expected)


# -- 7 ---------------------------------------------------------------------------------------------------------------


def everything(store: MemoryStore) -> list[Any]:
    """All rows of facts and log, and the keys that await delivery."""
    with store.engine.connect() as connection:
        return [
            connection.execute(select(Fact.__table__).order_by(Fact.id)).all(),
            connection.execute(select(log).order_by(log.c.id)).all(),
            connection.execute(select(outbox.c.id, outbox.c.key).order_by(outbox.c.id)).all(),
        ]


def test_7_a_refused_rollback_changes_nothing(store: MemoryStore) -> None:
    """Another actor changed one fact of several since, so none is undone."""
    with store.transaction(session_id="s1"):
        ids = {store.commit(note(text)): text for text in ("green tea", "mint tea", "black tea")}
    last = list(ids)[-1]
    store.update(last, {"payload": {"text": "earl grey"}}, session_id="s2")
    before = everything(store)
    with store.transaction():
        with pytest.raises(ConflictError) as caught:
            store.rollback(session_id="s1")
        assert [c.key for c in caught.value.changes] == [last]
    assert everything(store) == before
    assert_agree(store, ids | {last: "earl grey"})


def test_7_a_rollback_that_fails_half_way_changes_nothing(store: MemoryStore) -> None:
    """The database fails while the rows are written. An application that swallows the error and commits keeps nothing
    of it.
    """
    with store.transaction():
        ids = {store.commit(note(text)): text for text in ("green tea", "mint tea", "black tea")}
    with store.transaction():
        for id_ in ids:
            store.update(id_, {"payload": {"text": "coffee"}})
    before, sent = everything(store), []

    def fail(connection: Any, cursor: Any, statement: str, *rest: Any) -> None:
        if statement.startswith("UPDATE memstate_fact") or "INSERT INTO memstate_log" in statement:
            sent.append(statement)
            if len(sent) == 2:
                raise ConnectionError("gone")

    event.listen(store.engine, "before_cursor_execute", fail)
    with Session(store.engine) as session:
        store.memory.attach(session)
        with pytest.raises(ConnectionError):
            store.memory.rollback(session)
        session.commit()
    event.remove(store.engine, "before_cursor_execute", fail)
    assert len(sent) == 2
    assert everything(store) == before
    store.rollback()
    assert_agree(store, ids)


# -- 8 ---------------------------------------------------------------------------------------------------------------


def test_8_search_refills_the_top_k_when_it_drops_ghosts(store: MemoryStore) -> None:
    """Twenty nearer vectors have no row any more. The three facts that exist are found."""
    real = ["tea in the garden", "tea at noon with milk", "tea for two people"]
    with store.transaction():
        for text in real:
            store.commit(note(text))
        ghosts = [store.commit(note(f"tea {'!' * n}")) for n in range(20)]
    store.memory.relay(store.engine).drain()
    with Session(store.engine) as session:  # an unattached Session deletes without the log
        for id_ in ghosts:
            session.delete(session.get_one(Fact, id_))
        session.commit()
    assert sorted(found(store, "tea", limit=3)) == sorted(real)
    assert sorted(found(store, "tea", limit=3, consistency="eventual")) == sorted(real)


# -- 9 ---------------------------------------------------------------------------------------------------------------


def test_9_contents_are_compared_not_counts(store: MemoryStore, failing: Failing) -> None:
    """Counts agree, although one vector has other content, one fact has no vector and one vector has no fact."""
    ids = {store.commit(note(text)): text for text in ("green tea", "mint tea", "black tea")}
    assert_agree(store, ids)
    stale, missing, _ = ids
    vector = HashEmbedder().embed(["text: something else"])[0]
    (stale_point,), (missing_point,) = in_index({stale: ""}), in_index({missing: ""})
    failing.inner.delete([missing_point])
    failing.inner.upsert([Point(id_, vector, "0" * 32) for id_ in (stale_point, 'memstate_fact["ghost"]')])
    assert len(failing.scan(None, 100)) == len(ids)

    report = store.memory.verify(store.engine)
    entity = Fact.__tablename__
    assert (report.stale, report.missing, report.ghost) == ([(entity, stale)], [(entity, missing)], [(entity, "ghost")])
    store.memory.verify(store.engine, repair=True)
    assert store.memory.verify(store.engine).clean
    assert_agree(store, ids)


# -- 10 --------------------------------------------------------------------------------------------------------------


def test_10_a_commit_calls_no_index(store: MemoryStore, failing: Failing) -> None:
    """Every call of an index or embedder would raise. Every kind of write commits, and is delivered later."""
    index, embedder = store.memory.indexes.pop("memory"), store.memory.embedder
    embed, embedder.embed = embedder.embed, None  # type: ignore[assignment]
    for name in ("open", "upsert", "delete", "query", "get", "scan"):
        setattr(failing, name, None)
    try:
        a, b = store.commit(note("green tea")), store.commit(note("mint tea"), session_id="s1", ephemeral=True)
        store.update(a, {"payload": {"text": "black tea"}})
        store.promote_session("s1")
        store.delete(b)
        store.rollback(2)
        store.discard_session("s1")
    finally:
        embedder.embed = embed  # type: ignore[method-assign]
        store.memory.indexes["memory"] = index
        for name in ("open", "upsert", "delete", "query", "get", "scan"):
            delattr(failing, name)
    assert_agree(store, {a: "black tea"})


@contextmanager
def vm_steps(connection: Connection) -> Iterator[list[int]]:
    """The cost of work without a clock: one item for every ten steps of SQLite's virtual machine."""
    ticks: list[int] = []
    if connection.dialect.name != "sqlite":
        yield ticks
        return
    driver: Any = connection.connection.driver_connection
    driver.set_progress_handler(lambda: ticks.append(1), 10)
    try:
        yield ticks
    finally:
        driver.set_progress_handler(None, 10)


@pytest.mark.deep
@pytest.mark.deep_on("postgres")
def test_10_rollback_costs_what_it_undoes(engine: Engine) -> None:
    """Undoing ten steps takes as many statements after 600 transactions as after 250, and as many steps of SQLite.

    There are at least 250, because the log is read in pages of 200.
    """
    world = World(engine)
    costs = {}
    for first, length in ((0, 250), (250, 600)):
        with world.session() as session:
            for n in range(first, length):
                session.merge(Tag(name=f"t{n % 50}", meaning=f"meaning {n}"))
                session.commit()
        sent = statements(engine)
        with engine.connect() as connection, world.sessions(bind=connection) as session:
            with vm_steps(connection) as ticks:
                changes = world.memory.rollback(session, 10)
            sends, steps = len(sent), len(ticks)
            undone = [c.before["meaning"] for c in changes if c.before]
            session.commit()
        costs[length] = (sends, steps)
        assert undone == [f"meaning {n}" for n in range(length - 1, length - 11, -1)]
        with world.session() as session:
            left = {tag.name: tag.meaning for tag in session.scalars(select(Tag))}
        assert left == {f"t{n % 50}": f"meaning {n}" for n in range(length - 10)}
    (few, few_steps), (many, many_steps) = costs.values()
    assert few == many
    assert many_steps <= few_steps * 1.1
    assert (few_steps > 0) is (engine.dialect.name == "sqlite")
