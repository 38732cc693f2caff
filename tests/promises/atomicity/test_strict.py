"""delivery="strict": the index is written before COMMIT, and equals the tables in the end, after any failure."""

from __future__ import annotations

import asyncio
import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import Engine, String, create_engine, event, insert, select, text
from sqlalchemy.exc import PendingRollbackError
from sqlalchemy.ext.asyncio import async_sessionmaker, create_async_engine
from sqlalchemy.orm import DeclarativeBase, Mapped, Session, mapped_column
from sqlalchemy.pool import StaticPool

from memstate_sa import DeliveryError, DeliveryRejected, DeliveryRetryable, DriftReport, Memory, sqlite
from memstate_sa.db.tables import cursor, outbox
from memstate_sa.indexes import InMemoryIndex, Point, VectorIndex
from memstate_sa.relay import strict
from memstate_sa.relay.intents import read_complete_lines
from memstate_sa.relay.points import ENTITY
from memstate_sa.relay.strict import Strict
from memstate_sa.testing import HashEmbedder
from tests.support import apps, assert_index_holds, make_due
from tests.support.relays import eventually


class Base(DeclarativeBase):
    pass


class Tip(Base):
    __tablename__ = "tip"
    name: Mapped[str] = mapped_column(String(40), primary_key=True)
    content: Mapped[str | None]


class Memo(Base):
    __tablename__ = "memo"
    id: Mapped[int] = mapped_column(primary_key=True)
    content: Mapped[str]


class Plain(Base):
    """Not tracked."""

    __tablename__ = "plain"
    id: Mapped[int] = mapped_column(primary_key=True)


class App(apps.App):
    def __init__(self, engine: Engine, index: Any = None, *also: type[Memo], capture: str = "session") -> None:
        options = {"memory": {"delivery": "strict"}, "tracking": {Tip: {"capture": capture}}, "text": "content"}
        super().__init__(engine, Tip, *also, index=index, **options)
        self.relay = self.memory.relay(engine)

    def say(self, **contents: str | None) -> None:
        with self.sessions() as session:
            for name, content in contents.items():
                session.merge(Tip(name=name, content=content))
            session.commit()

    def contents(self) -> dict[str, str | None]:
        with self.engine.connect() as connection:
            return {name: content for name, content in connection.execute(select(Tip.name, Tip.content)).all()}  # noqa: C416

    def assert_holds(self, index: Any = None, **contents: str) -> None:
        expected = {f'tip["{name}"]': content for name, content in contents.items()}
        assert_index_holds(self.index if index is None else index, self.embedder, expected)

    def assert_in_step(self) -> None:
        self.relay.drain()
        self.assert_holds(**{name: content for name, content in self.contents().items() if content and content.strip()})


@pytest.fixture
def app(engine: Engine) -> Iterator[App]:
    made = App(engine)
    yield made
    made.memory.close()


class Hooked:
    """An index that calls *before* and *after* around every write."""

    in_process = True

    def __init__(self, *, before: Callable[[], None] = lambda: None, after: Callable[[], None] = lambda: None) -> None:
        self.inner = InMemoryIndex()
        self.before, self.after = before, after

    def __getattr__(self, name: str) -> Any:
        return getattr(self.inner, name)

    def upsert(self, points: Sequence[Point]) -> None:
        self.before()
        self.inner.upsert(points)
        self.after()

    def delete(self, ids: Sequence[str], *, epoch: int = 0) -> None:
        self.before()
        self.inner.delete(ids, epoch=epoch)
        self.after()


class Crash(BaseException):
    """The process has ended."""


def count_intents(engine: Engine) -> int:
    """The number of transactions with an intent beside a SQLite file."""
    if engine.dialect.name != "sqlite":
        return 0
    folder = Path(f"{engine.url.database}.memstate-intents")
    return len(list(folder.iterdir())) if folder.exists() else 0


def fail(error: BaseException) -> Callable[[], None]:
    def raise_it() -> None:
        raise error

    return raise_it


# -- the promise -------------------------------------------------------------------------------------------------------


def test_the_index_holds_the_row_right_after_commit(app: App) -> None:
    """There is no relay. The changes are inserts, updates, deletes, and texts that become blank."""
    app.say(a="one", b="two", c="three")
    app.assert_holds(a="one", b="two", c="three")
    with app.sessions() as session:
        session.get_one(Tip, "a").content = "uno"
        session.get_one(Tip, "b").content = "  "
        session.delete(session.get_one(Tip, "c"))
        session.add(Tip(name="d", content="four"))
        app.assert_holds(a="one", b="two", c="three")
        session.commit()
    app.assert_holds(a="uno", d="four")
    assert count_intents(app.engine) == 0
    app.assert_in_step()


def test_failed_vector_write_rolls_the_transaction_back(engine: Engine) -> None:
    """The vendor's error is chained. The transaction ends at once, and the Session needs its rollback()."""
    vendor = OSError("the vector database is away")
    index = Hooked()
    app = App(engine, index)
    app.say(a="before")
    index.before = fail(vendor)
    with app.sessions() as session:
        session.get_one(Tip, "a").content = "secret"
        session.add(Tip(name="b", content="new"))
        with pytest.raises(DeliveryRetryable) as caught:
            session.commit()
        assert caught.value.__cause__ is vendor
        assert "secret" not in str(caught.value)
        assert app.contents() == {"a": "before"}
        with engine.begin() as connection:  # no lock is held
            connection.execute(text("UPDATE tip SET content = 'before' WHERE name = 'a'"))
        with pytest.raises(PendingRollbackError):
            session.execute(select(Tip))
        session.rollback()
        index.before = lambda: None
        assert session.get_one(Tip, "a").content == "before"
        session.add(Tip(name="c", content="after all"))
        session.commit()
    app.assert_holds(index, a="before", c="after all")
    app.assert_in_step()
    app.memory.close()


def test_refused_vector_vetoes_the_transaction(engine: Engine) -> None:
    index = Hooked(before=fail(ValueError("no")))
    app = App(engine, index)
    with app.sessions.begin() as session, pytest.raises(DeliveryRejected) as caught:
        session.add(Tip(name="a", content="x"))
        session.commit()
    assert isinstance(caught.value.__cause__, ValueError)
    assert app.contents() == {}
    app.memory.close()


def test_an_embedder_that_fails_vetoes_and_leaves_no_trace(app: App, monkeypatch: pytest.MonkeyPatch) -> None:
    def embed(texts: Sequence[str]) -> Any:
        raise OSError("away")

    app.say(a="one")
    app.relay.drain()
    monkeypatch.setattr(app.embedder, "embed", embed)
    with pytest.raises(DeliveryRetryable):
        app.say(b="two")
    monkeypatch.undo()
    assert app.contents() == {"a": "one"}
    with app.engine.connect() as connection:
        assert set(connection.scalars(select(outbox.c.key).where(outbox.c.intent))) == {'["a"]'}
    assert count_intents(app.engine) == 0


def test_write_to_one_index_is_taken_back_when_another_fails(engine: Engine) -> None:
    good, bad = InMemoryIndex(), Hooked()
    app = App(engine, {"good": good, "bad": bad})
    app.say(a="one")
    app.relay.drain()
    bad.before = fail(OSError())
    with pytest.raises(DeliveryError):
        app.say(a="uno", b="two")
    app.assert_holds(good, a="uno", b="two")
    bad.before = lambda: None
    app.relay.drain()
    app.assert_holds(good, a="one")
    app.assert_holds(bad, a="one")
    app.memory.close()


def test_a_transaction_without_tracked_changes_calls_nothing(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    app = App(engine)
    for name in ("_embedded", "_open", "_announce"):
        monkeypatch.setattr(app.memory._strict, name, lambda *args: pytest.fail("called"))
    with app.sessions() as session:
        session.add(Plain())
        session.commit()
        with session.begin_nested() as savepoint:
            session.add(Tip(name="a", content="x"))
            session.flush()
            savepoint.rollback()
        session.commit()
    assert app.contents() == {}
    app.memory.close()


def test_a_savepoint_that_rolls_back_takes_its_keys_with_it(app: App) -> None:
    """A SAVEPOINT that is released does not write the index yet."""
    app.relay.drain()
    with app.sessions() as session:
        session.add(Tip(name="a", content="kept"))
        with session.begin_nested() as savepoint:
            session.add(Tip(name="b", content="not kept"))
            session.flush()
            savepoint.rollback()
        with session.begin_nested():
            session.execute(insert(Tip), [{"name": "c", "content": "kept too"}])
        app.assert_holds()
        session.commit()
    app.assert_holds(a="kept", c="kept too")
    with app.engine.connect() as connection:
        assert set(connection.scalars(select(outbox.c.key).where(outbox.c.intent))) == {'["a"]', '["c"]'}


def test_an_undo_is_in_the_index_when_it_is_committed(app: App) -> None:
    app.say(a="one", b="two")
    app.say(a="uno", c="three")
    with app.sessions() as session:
        app.memory.rollback(session)
        session.commit()
    app.assert_holds(a="one", b="two")
    app.assert_in_step()


def test_changes_that_triggers_capture_are_written_too(engine: Engine) -> None:
    app = App(engine, capture="trigger")
    app.say(a="one", b="two")
    with app.sessions() as session:
        session.execute(text("UPDATE tip SET content = 'uno' WHERE name = 'a'"))
        session.execute(text("DELETE FROM tip WHERE name = 'b'"))
        session.commit()
    app.assert_holds(a="uno")
    app.assert_in_step()
    app.memory.close()


def test_rows_logged_for_another_memory_are_left_to_it(engine: Engine) -> None:
    """Triggers know one transaction, the last that began on the connection."""
    app = App(engine, capture="trigger")
    other = Memory(InMemoryIndex(), embedder=app.embedder)
    other.track(Memo, text="content", capture="trigger")
    other.attach(app.sessions)
    other.create_tables(engine)
    with app.sessions() as session:
        session.execute(text("INSERT INTO memo (id, content) VALUES (1, 'first')"))
        session.add(Tip(name="a", content="one"))
        session.flush()
        session.execute(text("INSERT INTO memo (id, content) VALUES (2, 'second')"))
        session.commit()
    app.assert_in_step()
    other.relay(engine).drain()
    assert_index_holds(other.indexes["memory"], app.embedder, {"memo[1]": "first", "memo[2]": "second"})
    other.close()
    app.memory.close()


# -- points in the index that SQL does not have ------------------------------------------------------------------------


@pytest.mark.parametrize("how", ["rollback", "close"])
def test_a_transaction_that_rolls_back_after_the_write_is_taken_back(app: App, how: str) -> None:
    app.say(a="one", b="two")
    app.relay.drain()
    with app.sessions() as session:
        session.get_one(Tip, "a").content = "never committed"
        session.delete(session.get_one(Tip, "b"))
        session.add(Tip(name="c", content="never committed"))

        @event.listens_for(session, "before_commit")
        def _refuse(_: Session) -> None:
            raise ValueError

        with pytest.raises(ValueError):
            session.commit()
        app.assert_holds(a="never committed", c="never committed")
        getattr(session, how)()
    assert count_intents(app.engine) == 0
    app.relay.drain()
    app.assert_holds(a="one", b="two")


@pytest.mark.timeout(20)  # it must not wait for a lock that its own thread holds
def test_a_transaction_around_the_sessions_own_decides(app: App) -> None:
    """The Session commits, but the outer transaction does not. The intent survives this."""
    app.say(a="one")
    app.relay.drain()
    with app.engine.connect() as connection:
        outer = connection.begin()
        if app.engine.dialect.name == "sqlite":
            connection.exec_driver_sql("DELETE FROM plain")  # the driver begins
        with Session(connection, join_transaction_mode="rollback_only") as session:
            app.memory.attach(session)
            session.get_one(Tip, "a").content = "never committed"
            session.commit()
        app.assert_holds(a="never committed")
        outer.rollback()
    app.relay.drain()
    app.assert_holds(a="one")
    assert count_intents(app.engine) == 0


def test_a_call_that_lands_late_is_overwritten(engine: Engine) -> None:
    """The call timed out and vetoed the commit. The intent has the key delivered again when no call can land."""
    index = Hooked()
    app = App(engine, index)
    relay = app.memory.relay(engine)
    app.say(a="one")
    relay.drain()
    index.before = fail(TimeoutError())
    with pytest.raises(DeliveryRetryable):
        app.say(a="late")
    index.before = lambda: None
    relay.drain()
    [vector] = app.embedder.embed(["late"])
    index.inner.upsert([Point('tip["a"]', vector, "f")])
    app.assert_holds(index, a="late")
    assert not relay.run_once()
    make_due(engine)
    assert relay.run_once() == 1
    app.assert_holds(index, a="one")
    relay.stop()
    app.memory.close()


@pytest.mark.parametrize("consistency", ["fresh", "eventual"])
def test_search_never_shows_rows_that_sql_does_not_hold(engine: Engine, consistency: Any) -> None:
    """This holds between the write and COMMIT, and after a rollback until the relay has run."""
    index = Hooked()
    app = App(engine, index)
    app.say(a="green tea", b="red wine")
    app.relay.drain()
    found: list[list[tuple[str, str | None]]] = []

    def search() -> None:
        with app.sessions() as session:
            hits = app.memory.search(session, "black coffee", Tip, limit=5, consistency=consistency)
            found.append(sorted((hit.fact.name, hit.fact.content) for hit in hits))

    def look_and_fail() -> None:
        index.after = lambda: None
        thread = threading.Thread(target=search)
        thread.start()
        thread.join()
        raise OSError

    index.after = look_and_fail
    with pytest.raises(DeliveryError):
        app.say(a="black coffee", c="black coffee")
    search()
    truth = [("a", "green tea"), ("b", "red wine")]
    if consistency == "fresh":
        assert found == [truth, truth]
    assert [[hit for hit in hits if hit not in truth] for hits in found] == [[], []]
    app.relay.drain()
    app.assert_holds(index, a="green tea", b="red wine")
    app.memory.close()


# -- beside a relay ----------------------------------------------------------------------------------------------------


def test_a_relay_that_read_the_earlier_version_does_not_win(engine: Engine) -> None:
    """Its write lands after the strict transaction committed. The relay then writes again."""
    index = Hooked()
    app = App(engine, index)
    app.relay.drain()
    reading, written = threading.Event(), threading.Event()
    with app.sessions() as session:  # as another process, which has a relay
        app.memory._capture._veto = None
        session.add(Tip(name="a", content="one"))
        session.commit()
        app.memory._capture._veto = app.memory._strict

    def pause() -> None:
        if threading.current_thread() is relaying:
            reading.set()
            assert written.wait(60)

    relaying = threading.Thread(target=app.relay.run_once)
    index.before = pause
    relaying.start()
    assert reading.wait(60)
    app.say(a="two")
    app.assert_holds(index, a="two")
    written.set()
    relaying.join()
    app.assert_holds(index, a="one")
    app.relay.drain()
    app.assert_holds(index, a="two")
    app.memory.close()


@pytest.mark.deep_on("sqlite")
def test_many_threads_and_a_relay_converge(app: App) -> None:
    def write(name: str) -> None:
        for n in range(15):
            try:
                app.say(**{name: f"{name} {n}", "shared": f"shared by {name} {n}"})
            except DeliveryError:
                raise
            except Exception:  # another thread inserted "shared" first
                assert n == 0

    with app.memory.relay(app.engine):
        threads = [threading.Thread(target=write, args=(name,)) for name in ("a", "b", "c")]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    app.assert_in_step()
    assert set(app.contents()) == {"a", "b", "c", "shared"}


def test_strict_write_has_the_epoch_of_the_relays_claim(app: App) -> None:
    """It uses the epoch of the current claim, so it locks out neither this relay nor a later one."""
    app.relay.run_once()  # claims
    app.say(a="one")
    with app.engine.connect() as connection:
        claimed = connection.scalars(select(cursor.c.epoch).distinct()).all()
    assert list(app.index._epochs.values()) == claimed
    app.say(a="two")
    app.relay.drain()
    app.say(a="three")
    app.assert_in_step()


def test_a_point_carries_its_entity_where_points_do(engine: Engine) -> None:
    """The relay's points do this too, once the index has a second entity."""
    app = App(engine, None, Memo)
    app.relay.drain()
    app.say(a="one")
    vector = app.embedder.embed(["one"])[0]
    assert [match.id for match in app.index.query(vector, 5, where={ENTITY: {"$eq": "tip"}})] == ['tip["a"]']
    app.memory.close()


def test_no_relay_passes_the_intent_before_the_transaction_ends(postgres_engine: Engine) -> None:
    """Otherwise a relay between the intent and the write would leave a vector that was rolled back."""
    index = Hooked()
    app = App(postgres_engine, index)
    app.say(a="one")
    app.relay.drain()

    def deliver() -> None:
        index.before = lambda: None
        thread = threading.Thread(target=app.relay.drain)
        thread.start()
        thread.join()

    index.before, index.after = deliver, lambda: None
    with app.sessions() as session:
        session.get_one(Tip, "a").content = "never committed"

        @event.listens_for(session, "before_commit")
        def _refuse(_: Session) -> None:
            raise ValueError

        with pytest.raises(ValueError):
            session.commit()
    app.assert_holds(index, a="never committed")
    app.relay.drain()
    app.assert_holds(index, a="one")
    app.memory.close()


def test_an_intent_that_the_transaction_itself_locks_out_vetoes_it(
    postgres_engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One thread uses two connections, so the server sees no deadlock."""
    monkeypatch.setattr(strict, "LOCK_TIMEOUT_S", 0.2)
    app = App(postgres_engine)
    with app.sessions() as session:
        session.execute(text("LOCK TABLE memstate_outbox IN EXCLUSIVE MODE"))
        session.add(Tip(name="a", content="one"))
        with pytest.raises(DeliveryRetryable, match="intent"):
            session.commit()
    app.say(a="one")
    app.assert_in_step()
    app.memory.close()


def test_the_intent_is_on_the_disk_before_the_index_is_written(
    sqlite_engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The file and its folder are synced, and the parent of a new folder."""
    synced: list[int] = []
    fsync = os.fsync

    def watched(file: int) -> None:
        synced.append(os.fstat(file).st_ino)
        fsync(file)

    monkeypatch.setattr(os, "fsync", watched)
    seen: list[list[int]] = []

    def look() -> None:
        files = [*folder.iterdir()]
        assert len(files) == 1 and files[0].stat().st_size > 0
        seen.append([file.stat().st_ino for file in (*files, folder, folder.parent)])

    folder = Path(f"{sqlite_engine.url.database}.memstate-intents")
    app = App(sqlite_engine, Hooked(before=look))
    app.say(a="one")
    assert set(seen[0]) <= set(synced)
    app.memory.close()


def test_the_intent_needs_no_second_connection_of_the_applications_pool(engine: Engine) -> None:
    """Otherwise transactions that hold all connections would each wait for one more, and none would commit."""
    small = create_engine(engine.url, pool_size=1, max_overflow=0)
    if engine.dialect.name == "sqlite":
        sqlite.configure(small)
    app = App(small)
    app.say(a="one")
    app.assert_holds(a="one")
    app.memory.close()
    small.dispose()


def test_an_in_memory_database_keeps_its_intents_in_memory() -> None:
    engine = create_engine("sqlite://", poolclass=StaticPool, connect_args={"check_same_thread": False})
    sqlite.configure(engine)
    index = Hooked()
    app = App(engine, index)
    app.say(a="one")
    app.relay.drain()
    index.after = fail(OSError())
    with pytest.raises(DeliveryError):
        app.say(a="never committed", b="never committed")
    app.assert_holds(index, a="never committed", b="never committed")
    index.after = lambda: None
    app.relay.drain()
    app.assert_holds(index, a="one")
    app.memory.close()
    engine.dispose()


# -- asyncio -----------------------------------------------------------------------------------------------------------


async def test_an_async_session_is_served_and_the_loop_goes_on(engine: Engine) -> None:
    url = engine.url.set(drivername="sqlite+aiosqlite") if engine.dialect.name == "sqlite" else engine.url
    async_engine = create_async_engine(url)
    if engine.dialect.name == "sqlite":
        sqlite.configure(async_engine)
    calls: list[threading.Thread] = []
    index = Hooked(before=lambda: calls.append(threading.current_thread()))
    app = await asyncio.to_thread(App, engine, index)
    sessions = async_sessionmaker(async_engine)
    app.memory.attach(sessions)
    async with sessions() as session:
        session.add(Tip(name="a", content="one"))
        await session.commit()
        app.assert_holds(index, a="one")
        index.after = fail(OSError())
        session.add(Tip(name="b", content="never committed"))
        with pytest.raises(DeliveryError):
            await session.commit()
    index.after = lambda: None
    assert len(calls) == 2 and threading.main_thread() not in calls
    await asyncio.to_thread(app.assert_in_step)
    app.assert_holds(index, a="one")
    await async_engine.dispose()
    app.memory.close()
    for made in app.memory._engines.by_url.values():
        made.dispose()


# -- crashes -----------------------------------------------------------------------------------------------------------

POINTS = {
    "before the intent": ("_announce", "before", {"a": "one", "b": "two"}),
    "after the intent": ("_announce", "after", {"a": "one", "b": "two"}),
    "after the index was written": ("_put", "after", {"a": "new", "c": "new"}),
    "after COMMIT": ("committed", "before", {"a": "new", "c": "new"}),
}


@pytest.mark.parametrize("point", POINTS)
def test_a_crash_is_recovered(engine: Engine, point: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """In the end the index holds every committed row, and nothing else, although the ledger claims more."""
    method, moment, held = POINTS[point]
    app = App(engine)
    app.say(a="one", b="two")
    app.relay.drain()
    before = getattr(Strict, method)

    def crash(self: Strict, *args: Any) -> Any:
        if moment == "after":
            before(self, *args)
        raise Crash

    monkeypatch.setattr(Strict, "ended", lambda self, unit: None)
    monkeypatch.setattr(Strict, method, crash)
    with app.sessions() as session:
        session.get_one(Tip, "a").content = "new"
        session.delete(session.get_one(Tip, "b"))
        session.add(Tip(name="c", content="new"))
        with pytest.raises(Crash):
            session.commit()
    monkeypatch.undo()
    app.assert_holds(**held)
    assert app.contents() == ({"a": "new", "c": "new"} if point == "after COMMIT" else {"a": "one", "b": "two"})
    later = App(engine, app.index)
    later.assert_in_step()
    assert count_intents(engine) == 0
    later.memory.close()
    app.memory.close()


def die_before_commit(url: str, folder: str) -> None:
    """Run as a process that is killed after the index was written and before COMMIT."""
    app = App(_engine(url), _chroma(folder))
    app.say(a="one", b="two")
    app.relay.drain()
    put = Strict._put

    def die(self: Strict, *args: Any) -> None:
        put(self, *args)
        os.kill(os.getpid(), signal.SIGKILL)

    Strict._put = die  # type: ignore[assignment, method-assign]
    with app.sessions() as session:
        session.get_one(Tip, "a").content = "never committed"
        session.delete(session.get_one(Tip, "b"))
        session.add(Tip(name="c", content="never committed"))
        session.commit()


def _engine(url: str) -> Engine:
    engine = create_engine(url)
    if engine.dialect.name == "sqlite":
        sqlite.configure(engine)
    return engine


def _chroma(folder: str) -> VectorIndex:
    import chromadb

    from memstate_sa.indexes import ChromaIndex

    return ChromaIndex(chromadb.PersistentClient(folder), "memory")


@pytest.mark.deep
@pytest.mark.deep_on("sqlite")
def test_index_converges_after_sigkill_before_commit(engine: Engine, tmp_path: Path) -> None:
    pytest.importorskip("chromadb")
    url, folder = engine.url.render_as_string(hide_password=False), str(tmp_path / "chroma")
    child = multiprocessing.get_context("forkserver").Process(target=die_before_commit, args=(url, folder))
    child.start()
    child.join()
    assert child.exitcode == -signal.SIGKILL
    index = _chroma(folder)
    index.open(embedder=HashEmbedder().fingerprint, dimension=HashEmbedder().dimension)
    ghosts = {'tip["a"]': "never committed", 'tip["c"]': "never committed"}
    assert_index_holds(index, HashEmbedder(), ghosts)
    app = App(engine, index)
    assert app.contents() == {"a": "one", "b": "two"}
    relay = app.memory.relay(engine)

    def recovered() -> bool:  # PostgreSQL takes a moment to notice that its client is gone
        relay.drain()
        ids = [entry.id for entry in index.scan(None, 10)]
        return ids == ['tip["a"]', 'tip["b"]']

    eventually(recovered)
    app.assert_holds(a="one", b="two")
    assert count_intents(engine) == 0
    relay.stop()
    app.memory.close()


def test_an_intent_that_was_cut_off_announces_nothing(sqlite_engine: Engine, tmp_path: Path) -> None:
    """The machine stopped before the intent was on the disk, and so before the index was written."""
    (tmp_path / "intents").write_bytes(b'[["tip","[1]"]]\n[["tip","[2]"]]\n[["tip","[3')
    assert read_complete_lines(tmp_path / "intents") == [("tip", "[1]"), ("tip", "[2]")]
    app = App(sqlite_engine)
    app.say(a="one")
    folder = tmp_path / "facts.db.memstate-intents"
    (folder / "cut off").write_bytes(b"\0\0\0\0\n")
    app.assert_in_step()
    assert count_intents(sqlite_engine) == 0
    app.memory.close()


def test_running_relay_finds_intents_of_another_process(sqlite_engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    """The database is not opened again."""
    app = App(sqlite_engine)
    app.say(a="one")
    app.relay.drain()
    elsewhere = _engine(sqlite_engine.url.render_as_string())
    other = App(elsewhere, app.index)
    put = Strict._put

    def crash(self: Strict, *args: Any) -> None:
        put(self, *args)
        raise Crash

    monkeypatch.setattr(Strict, "ended", lambda self, unit: None)
    monkeypatch.setattr(Strict, "_put", crash)
    with other.relay:
        with pytest.raises(Crash):
            app.say(a="never committed")
        eventually(lambda: count_intents(sqlite_engine) == 0)
    other.assert_in_step()
    other.assert_holds(a="one")
    other.memory.close()
    elsewhere.dispose()
    app.memory.close()


@pytest.mark.parametrize("ends", ["commits", "fails"])
def test_verify_reports_no_drift_while_the_index_is_ahead(engine: Engine, ends: str) -> None:
    """The index is ahead of the commit. Its key is pending, not drifted, whether the transaction commits or fails."""
    index, reports = Hooked(), list[Any]()
    app = App(engine, index)  # type: ignore[arg-type]
    app.say(a="one")
    app.relay.drain()

    def verify() -> None:
        thread = threading.Thread(target=lambda: reports.append(app.memory.verify(engine)))
        thread.start()
        thread.join(60)
        if ends == "fails":
            raise ConnectionError("and then it is gone")

    index.after = verify
    if ends == "fails":
        with pytest.raises(DeliveryError):
            app.say(a="two")
    else:
        app.say(a="two")
    index.after = lambda: None
    reports.append(app.memory.verify(engine))
    assert reports[0].pending == [("tip", "a")]
    assert all(report.clean for report in reports)
    app.assert_in_step()
    assert app.memory.verify(engine) == DriftReport(checked=1)
    app.memory.close()
