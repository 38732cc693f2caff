"""Decisions that need two looks: each test lets another thread act exactly between the two."""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from datetime import timedelta
from itertools import count
from pathlib import Path
from typing import Any

import pytest
from pydantic import BaseModel
from sqlalchemy import Connection, Engine, create_engine, insert, select
from sqlalchemy.ext.asyncio import create_async_engine
from sqlalchemy.orm import DeclarativeBase, Mapped, Session, mapped_column, sessionmaker

from memstate_sa import DeliveryRejected, Fact, HistoryMissing, Memory, MemoryStore, UntrackedWrite, sqlite
from memstate_sa.db import sync_engines
from memstate_sa.db.tables import parked
from memstate_sa.indexes import ChromaIndex, InMemoryIndex, Point
from memstate_sa.maintenance import doctor, erase
from memstate_sa.maintenance.verify import Verify
from memstate_sa.relay import RetryPolicy, ledger, waiting
from memstate_sa.relay.index_key import IndexKey
from memstate_sa.relay.plan import Parked, ParkedState
from memstate_sa.relay.retention import fold_log
from memstate_sa.runtime import watching
from memstate_sa.search.search import Search
from memstate_sa.testing import HashEmbedder
from memstate_sa.undo import selection
from memstate_sa.undo.undo import Undoing
from tests.support import Person, Tag, World, in_threads
from tests.support.relays import Spy, say

pytestmark = pytest.mark.sa20


@contextmanager
def switching_often() -> Iterator[None]:
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        yield
    finally:
        sys.setswitchinterval(before)


# -- threads of one process --------------------------------------------------------------------------------------------


@pytest.mark.deep
def test_commit_succeeds_while_a_relay_is_made(sqlite_engine: Engine) -> None:
    """The commit walks a set to which another thread adds. This used to raise an error after the COMMIT."""
    world = World(sqlite_engine)
    held, until = [world.memory.relay(sqlite_engine) for _ in range(3)], time.monotonic() + 2.0

    def work(number: int) -> None:
        while time.monotonic() < until:
            if number:
                world.memory._relays.wake()
            else:
                world.memory.relay(sqlite_engine)

    with switching_often():
        assert in_threads(2, work) == []
    assert len(held) == 3


def test_track_succeeds_while_a_transaction_begins(engine: Engine) -> None:
    """A class is tracked while the transaction walks the tracked classes."""

    class Late(DeclarativeBase):
        pass

    class Row(Late):
        __tablename__ = "late"
        id: Mapped[int] = mapped_column(primary_key=True)
        content: Mapped[str]

    Late.metadata.create_all(engine)
    world = World(engine, capture="trigger")

    class Tracking(Session):
        def get_bind(self, mapper: Any = None, **options: Any) -> Any:
            if getattr(mapper, "class_", None) is Person and world.memory._registry.by_entity.get("late") is None:
                world.memory.track(Row, text="content")
            return super().get_bind(mapper, **options)

    sessions = sessionmaker(class_=Tracking, binds={Tag: engine})
    world.memory.attach(sessions)
    with sessions() as session:
        session.add(Tag(name="a"))
        session.commit()
    assert "late" in world.memory._registry.by_entity
    world.assert_in_step()


def test_relay_started_while_a_drain_ends_keeps_running(world: World) -> None:
    """A drain releases its claims only if the relay is not running. Here the relay starts just before the release."""
    relay, stop = world.relay, world.relay.stop
    starting = threading.Thread(target=relay.start)

    def start_first() -> None:
        if not starting.ident:
            starting.start()
            starting.join(0.5)
        stop()

    relay.stop = start_first  # type: ignore[method-assign]
    relay.drain()
    relay.stop = stop  # type: ignore[method-assign]
    starting.join()
    assert relay.is_running
    say(world, a="x")
    with world.session() as session:
        session.get_one(Tag, "a").meaning = "y"
        session.commit()
        world.memory.wait(session, timeout=10)
    relay.stop()


def test_two_threads_share_the_engine_of_an_async_engine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Otherwise each would make an engine, and the database of a token would be ambiguous."""
    pytest.importorskip("aiosqlite")
    made, together = sync_engines.blocking_engine, threading.Barrier(2)

    def make_together(url: Any) -> Engine:
        with suppress(threading.BrokenBarrierError):
            together.wait(1)
        return made(url)

    monkeypatch.setattr(sync_engines, "blocking_engine", make_together)
    engine = create_async_engine(f"sqlite+aiosqlite:///{tmp_path / 'facts.db'}")
    ours = Memory(InMemoryIndex(), embedder=HashEmbedder())
    relays = list[Any]()
    assert in_threads(2, lambda _: relays.append(ours.relay(engine))) == []
    assert relays[0]._engine is relays[1]._engine
    assert ours._only_engine() is relays[0]._engine
    ours.close()


# -- rows --------------------------------------------------------------------------------------------------------------


class Resident(BaseModel):
    name: str
    city: str


def test_commit_spares_a_fact_that_gets_other_unique_values(
    postgres_engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The fact changes between the look for its unique values and its lock. The commit used to overwrite it."""
    with MemoryStore(postgres_engine, InMemoryIndex(), embedder=HashEmbedder(), background=False) as store:
        store.register_schema("person", Resident, unique_by="name")
        first = store.commit(Fact(type="person", payload={"name": "Ann", "city": "Rome"}))
        locked, renamed = MemoryStore._locked, threading.Event()

        def rename_first(session: Session, id: str) -> Fact | None:
            if not renamed.is_set():
                renamed.set()
                in_a_thread(lambda: store.update(first, {"payload": {"name": "Bob"}}))
            return locked(session, id)

        monkeypatch.setattr(MemoryStore, "_locked", staticmethod(rename_first))
        second = store.commit(Fact(type="person", payload={"name": "Ann", "city": "Oslo"}))
        found = [(fact.id, fact.payload) for fact in store.query("person")]
        assert found == [(first, {"name": "Bob", "city": "Rome"}), (second, {"name": "Ann", "city": "Oslo"})]


def in_a_thread(work: Callable[[], object]) -> None:
    assert in_threads(1, lambda _: work()) == []


def test_repair_sees_a_row_that_comes_again(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    """The row returns between the looks at the table and at the log. It used to be logged as deleted."""
    world = World(engine)
    say(world, a="x")
    with engine.begin() as connection:
        connection.exec_driver_sql("DELETE FROM tag")
    looks = doctor._rows

    def add_after(connection: Any, tracked: Any, keys: Any, *, for_update: bool = False) -> Any:
        found = looks(connection, tracked, keys, for_update=for_update)
        if for_update and engine.dialect.name == "postgresql":  # SQLite's one writer is the doctor
            in_a_thread(lambda: add(world, "a"))
        return found

    monkeypatch.setattr(doctor, "_rows", add_after)
    assert world.memory.doctor(engine, repair=True).gone == [("tag", "a")]
    if engine.dialect.name == "sqlite":
        add(world, "a")
    world.assert_in_step()


def add(world: World, name: str) -> None:
    with world.session() as session:
        session.add(Tag(name=name, meaning="again"))
        session.commit()


def test_erase_covers_a_row_that_comes_again(postgres_engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    """A missing row came back. It used to be logged as deleted, and stayed. Now it is erased too."""
    world = World(postgres_engine)
    say(world, a="x")
    with world.session() as session:
        session.delete(session.get_one(Tag, "a"))
        session.commit()
    looks = erase._row

    def add_after(*given: Any) -> Any:
        monkeypatch.setattr(erase, "_row", looks)
        found = looks(*given)
        in_a_thread(lambda: add(world, "a"))
        return found

    monkeypatch.setattr(erase, "_row", add_after)
    with world.session() as session:
        assert world.memory.erase(session, Tag, "a") == 3
        session.commit()
        assert session.get(Tag, "a") is None
    world.assert_in_step()


@pytest.mark.parametrize("revoked", [False, True])
def test_undo_is_right_while_its_entries_are_folded(
    revoked: bool, postgres_engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Folding happens between reading entries and their predecessors. Undo used to mistake a change for a new row."""
    world = World(postgres_engine)
    for meaning in ("one", "two", "three"):
        say(world, a=meaning)
    with world.session() as session:
        changed = world.memory.history(session, Tag)[1].tx
    execute, folded = Connection.execute, []

    def fold_first(connection: Connection, statement: Any, *given: Any, **options: Any) -> Any:
        if statement is selection._images and not folded:
            folded.append(True)

            def fold() -> None:
                with postgres_engine.begin() as other:
                    fold_log(other, timedelta(), 0)

            in_a_thread(fold)
        return execute(connection, statement, *given, **options)

    monkeypatch.setattr(Connection, "execute", fold_first)
    with world.session() as session:
        with pytest.raises(HistoryMissing, match="folded"):
            if revoked:
                world.memory.revoke(session, tx=[changed], on_conflict="force")
            else:
                world.memory.rollback(session, tx=changed, on_conflict="force")
        session.commit()
        assert session.get_one(Tag, "a").meaning == "three"
    assert folded


def test_undo_skips_a_step_that_another_undoes_first(postgres_engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    """Another undo comes between finding the steps and locking them. Its step does not count as one of the two."""
    world = World(postgres_engine)
    for name in "abcd":
        say(world, **{name: "x"})
    locks = Undoing._lock

    def undo_first(self: Undoing, *given: Any) -> Any:
        monkeypatch.setattr(Undoing, "_lock", locks)

        def undo_one() -> None:
            with world.session() as session:
                world.memory.rollback(session)
                session.commit()

        in_a_thread(undo_one)
        return locks(self, *given)

    monkeypatch.setattr(Undoing, "_lock", undo_first)
    with world.session() as session:
        assert [change.key for change in world.memory.rollback(session, steps=2)] == ["c", "b"]
        session.commit()
        assert list(session.scalars(select(Tag.name))) == ["a"]
    world.assert_in_step()


# -- an index and the tables -------------------------------------------------------------------------------------------


def test_verify_reports_no_drift_beside_a_quick_relay(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each look finds a vector that was right a moment ago. The change is delivered before the next look."""
    world = World(engine)
    say(world, a="one")
    world.relay.drain()
    looks, asked = Verify._truth, list[Any]()

    def change_and_deliver(self: Verify, facts: Any) -> Any:
        asked.append(facts)
        say(world, a=f"changed {len(asked)}")
        found = looks(self, facts)
        world.relay.drain()
        return found

    monkeypatch.setattr(Verify, "_truth", change_and_deliver)
    report = world.memory.verify(engine)
    assert report.clean and report.pending == [("tag", "a")]
    assert len(asked) > 1


def test_retry_is_not_lost_while_a_dead_key_is_refused_again(engine: Engine) -> None:
    """The relay has read the changed row. Then an operator repairs the index and retries its dead keys."""
    world = World(engine, index := Spy())
    relay = world.memory.relay(engine, policy=RetryPolicy(max_attempts=1))

    def mended_meanwhile(point: Point) -> Exception:
        index.refuse = lambda point: None
        assert relay.retry_dead() == 1
        return DeliveryRejected("no")

    index.refuse = lambda point: DeliveryRejected("no")
    say(world, a="one")
    relay.drain()
    assert len(relay.dead()) == 1
    index.refuse = mended_meanwhile
    say(world, a="two")
    relay.drain()
    relay.drain()
    assert relay.dead() == []
    world.assert_in_step()


def test_refusal_does_not_cancel_the_repeat_of_another_relay(engine: Engine) -> None:
    """A relay that lost the slot asks for one more delivery during its successor's call. The refusal must keep this
    request.
    """
    world = World(engine, index := Spy())
    relay = world.memory.relay(engine, policy=RetryPolicy(max_attempts=2, delay_s=0))
    may_land = {("tag", '["a"]'): Parked(0, 0.0, ParkedState.AGAIN, "lease lost", deliver_again=True)}

    def told_meanwhile(point: Point) -> Exception:
        index.refuse = lambda point: None
        with engine.begin() as connection:
            ledger.redirty(connection, IndexKey("memory", index.incarnation), may_land)
        return DeliveryRejected("no")

    index.refuse = told_meanwhile
    say(world, a="one")
    relay.drain()
    with engine.connect() as connection:
        left = connection.execute(select(parked.c.key, parked.c.state, parked.c.error)).all()
    assert [tuple(row) for row in left] == [('["a"]', ParkedState.AGAIN, "may land late")]


def test_wait_returns_while_the_incarnation_changes(engine: Engine) -> None:
    """A purge changes it. The ledger of the earlier incarnation is not updated any more."""
    world = World(engine, index := Spy())
    with world.session() as session:
        session.add(Tag(name="a"))
        session.commit()

    def replaced() -> None:
        time.sleep(0.2)
        index._incarnation = "another"
        world.relay.drain()

    thread = threading.Thread(target=replaced)
    thread.start()
    with world.session() as session:
        world.memory.wait(world.memory.history(session, Tag)[0].tx)
    thread.join()


@pytest.mark.deep_on("sqlite")
def test_wait_returns_although_the_key_goes_on_changing(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    """At each look the key has changed again since the awaited change was delivered."""
    world = World(engine)
    with world.session() as session:
        session.add(Tag(name="a"))
        session.commit()
        token = world.memory.token(session)
    looks, changes = waiting.project, count()

    def change_first(*given: Any) -> Any:
        world.relay.drain()
        say(world, a=f"changed {next(changes)}")
        return looks(*given)

    monkeypatch.setattr(waiting, "project", change_first)
    world.memory.wait(token, engine=engine)
    assert next(changes) > 1


@pytest.mark.deep
def test_purge_keeps_a_key_that_is_delivered_at_the_same_time(
    sqlite_engine: Engine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The key goes to a collection that a copy is replacing. A search that has seen its delivery must find it there."""
    chromadb = pytest.importorskip("chromadb")
    index = ChromaIndex(chromadb.PersistentClient(str(tmp_path / "chroma")))
    world = World(sqlite_engine, index)
    say(world, a="one")
    world.relay.drain()
    copies, looks, copied, going_on = index._copied, Search._restriction, threading.Event(), threading.Event()

    def copy_slowly(collection: Any) -> Any:
        copy = copies(collection)
        copied.set()
        assert going_on.wait(30)
        return copy

    def purge_first(self: Search) -> Any:
        going_on.set()
        purge.join()
        return looks(self)

    monkeypatch.setattr(index, "_copied", copy_slowly)
    monkeypatch.setattr(Search, "_restriction", purge_first)
    purge, delivery = threading.Thread(target=index.purge), threading.Thread(target=world.relay.drain)
    purge.start()
    assert copied.wait(30)
    say(world, b="two")
    delivery.start()
    delivery.join(2)
    with world.session() as session:
        hits = world.memory.search(session, "b means two", Tag, limit=1)
    assert [hit.fact.name for hit in hits] == ["b"]
    delivery.join()
    world.assert_in_step()
    world.memory.close()


def test_two_threads_that_use_an_engine_first_are_both_guarded(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    """The first thread was about to install the guard. The second thread's untracked write was not refused."""
    world = World(engine)
    elsewhere: Engine = sqlite.configure(create_engine(engine.url))
    sessions = sessionmaker()
    world.memory.attach(sessions)
    watch, come_in = watching.watch, list[Any]()

    def write_first(target: Any, watcher: Any) -> None:
        if not come_in:
            come_in.append(target)
            in_a_thread(write_past)
        watch(target, watcher)

    def write_past() -> None:
        with sessions(bind=elsewhere) as session, pytest.raises(UntrackedWrite):
            session.connection().execute(insert(Tag.__table__).values(name="a", meaning="x"))

    monkeypatch.setattr(watching, "watch", write_first)
    with sessions(bind=elsewhere) as session:
        session.connection()
        assert come_in
    mine = [
        each
        for each in elsewhere.dialect.execution_ctx_cls.watchers
        if each == world.memory._capture._guard.before_statement
    ]
    assert len(mine) == 1  # not twice
    elsewhere.dispose()
