"""Rows that are older than tracking get one baseline and one vector each, despite kills and concurrent writes."""

from __future__ import annotations

import itertools
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any, ClassVar, Literal

import pytest
import sqlalchemy as sa
from hypothesis import strategies as st
from sqlalchemy import Engine, ForeignKey, create_engine, event, insert, select, text
from sqlalchemy.exc import OperationalError
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column, sessionmaker

from memstate_sa import MemstateError, sqlite
from memstate_sa.db.tables import backfill as ranges, log
from memstate_sa.maintenance import backfill
from tests.support import PATIENCE_S, WAITING_FOR_A_LOCK, Note, Person, Tag, World, explore, in_threads, sizes
from tests.support.apps import make_app
from tests.support.programs import wipe

pytestmark = pytest.mark.sa20

both_ways = pytest.mark.parametrize("capture", ["session", "trigger"])


def old_tags(engine: Engine, count: int) -> None:
    """Insert rows as they were before tracking. No trigger has seen them either."""
    with engine.begin() as connection:
        tags = [{"name": f"t{n:04}", "meaning": f"old {n}"} for n in range(count)]
        connection.execute(insert(Tag.__table__), tags)


@contextmanager
def before_tracking(world: World) -> Iterator[None]:
    """Run the block without triggers."""
    tables = [Person.__table__, Note.__table__, Tag.__table__]
    with world.engine.begin() as connection:
        for table in tables:
            _drop_triggers(connection, str(table))
    yield
    world.memory.create_tables(world.engine)


def _drop_triggers(connection: Any, table: str) -> None:
    from memstate_sa.capture import triggers

    for name in triggers.installed(connection, sa.table(table)):
        on = f" ON {table}" if connection.dialect.name == "postgresql" else ""
        connection.exec_driver_sql(f"DROP TRIGGER {name}{on}")


def logged(engine: Engine) -> dict[tuple[str, str], list[str]]:
    """The operations on each fact, in order."""
    found: dict[tuple[str, str], list[str]] = {}
    with engine.connect() as connection:
        for entity, key, op in connection.execute(select(log.c.entity, log.c.key, log.c.op).order_by(log.c.id)):
            found.setdefault((entity, key), []).append(op)
    return found


def assert_begins_once(engine: Engine) -> None:
    """Assert that each fact's first entry is a baseline or an insert, and that no later entry is a baseline."""
    wrong = {
        fact: ops
        for fact, ops in logged(engine).items()
        if ops[0] not in ("baseline", "insert") or "baseline" in ops[1:]
    }
    assert not wrong


class Spy:
    """Records the keys of each batch, in order of batches."""

    def __init__(self, world: World, monkeypatch: pytest.MonkeyPatch) -> None:
        self.batches: list[list[str]] = []
        self.inside: Callable[[Any], None] | None = None
        log_baselines: Any = world.memory._recorder.log_baselines

        def spied(connection: Any, tracked: Any, keys: Any) -> Any:
            self.batches.append(list(keys))
            if self.inside is not None:
                self.inside(connection)
            return log_baselines(connection, tracked, keys)

        monkeypatch.setattr(world.memory._recorder, "log_baselines", spied)

    @property
    def keys(self) -> list[str]:
        return [key for batch in self.batches for key in batch]


def tag_keys(*numbers: int) -> list[str]:
    return [f'["t{n:04}"]' for n in numbers]


# -- one worker --------------------------------------------------------------------------------------------------------


class Interrupted(Exception):
    pass


def interrupt_after(rows: int) -> Callable[[int, int | None], None]:
    def interrupt(done: int, total: int | None) -> None:
        if done >= rows:
            raise Interrupted

    return interrupt


def test_every_row_gets_one_baseline_and_one_vector(world: World) -> None:
    """Running it again adds nothing, except rows that were written without the log since."""
    world.relay.drain()
    old_tags(world.engine, 25)
    progress: list[tuple[int, int | None]] = []
    assert world.memory.backfill(world.engine, Tag, batch_size=10, progress=lambda *told: progress.append(told)) == 25
    assert progress == [(0, 25), (10, 25), (20, 25), (25, 25)]
    assert world.memory.backfill(world.engine, Tag) == 0
    assert logged(world.engine) == {("tag", key): ["baseline"] for key in tag_keys(*range(25))}
    world.assert_in_step()

    with world.engine.begin() as connection:
        connection.execute(insert(Tag.__table__), {"name": "a", "meaning": "unseen"})
    assert world.memory.backfill(world.engine, Tag, restart=False) == 0  # the class is finished
    assert world.memory.backfill(world.engine, Tag) == 1
    world.assert_in_step()


def test_interrupted_backfill_does_not_read_rows_again(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    """An interrupted backfill resumes at its position, with batches of any size."""
    old_tags(world.engine, 25)
    spy = Spy(world, monkeypatch)
    with pytest.raises(Interrupted):
        world.memory.backfill(world.engine, Tag, batch_size=5, progress=interrupt_after(10))
    assert spy.batches == [tag_keys(*range(5)), tag_keys(*range(5, 10))]
    spy.batches.clear()
    progress: list[tuple[int, int | None]] = []
    assert world.memory.backfill(world.engine, Tag, batch_size=10, progress=lambda *told: progress.append(told)) == 15
    assert spy.batches == [tag_keys(*range(10, 20)), tag_keys(*range(20, 25))]
    assert progress == [(10, 25), (20, 25), (25, 25)]
    world.assert_in_step()


def test_backfill_obeys_restart_and_limit(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    """restart begins again even if the last run is unfinished. limit bounds the number of rows."""
    old_tags(world.engine, 10)
    spy = Spy(world, monkeypatch)
    assert world.memory.backfill(world.engine, Tag, batch_size=4, limit=6) == 6
    assert spy.batches == [tag_keys(0, 1, 2, 3), tag_keys(4, 5)]
    assert world.memory.backfill(world.engine, Tag, limit=0) == 0
    assert world.memory.backfill(world.engine, Tag, batch_size=20, limit=1, restart=True) == 0
    assert spy.batches[2:] == [tag_keys(0)]
    assert world.memory.backfill(world.engine, Tag, restart=False) == 4
    assert spy.batches[3:] == [tag_keys(*range(1, 10))]


def test_backfill_takes_all_classes_or_some(world: World) -> None:
    """It takes one class, several, or all."""
    with world.engine.begin() as connection:
        connection.execute(insert(Person.__table__), [{"id": n, "name": "p", "about": f"about {n}"} for n in (1, 2, 3)])
        notes = [{"topic": topic, "number": n, "person_id": 1, "content": topic} for n in (1, 2) for topic in "ab"]
        connection.execute(insert(Note.__table__), notes)
        connection.execute(insert(Tag.__table__), {"name": "t", "meaning": "m"})
    assert world.memory.backfill(world.engine, [Tag, Note], limit=2, batch_size=1) == 2
    progress: list[tuple[int, int | None]] = []
    assert world.memory.backfill(world.engine, batch_size=3, progress=lambda *told: progress.append(told)) == 6
    assert progress[0] == (2, 8) and progress[-1] == (8, 8)
    world.assert_in_step()


def test_an_untracked_class_is_refused(world: World) -> None:
    with pytest.raises(MemstateError, match="not tracked"):
        world.memory.backfill(world.engine, int)
    with pytest.raises(MemstateError, match="rate=0"):
        world.memory.backfill(world.engine, Tag, rate=0)


class Clock:
    """A clock that moves by *step* at each look, and by each pause."""

    def __init__(self, step: float) -> None:
        self.now, self.step = 0.0, step
        self.pauses: list[float] = []

    def monotonic(self) -> float:
        self.now += self.step
        return self.now

    def sleep(self, seconds: float) -> None:
        self.pauses.append(seconds)
        self.now += seconds


def test_backfill_keeps_to_its_rate(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    """The time of the batch itself counts."""
    old_tags(world.engine, 10)
    clock = Clock(0.25)
    monkeypatch.setattr(backfill, "time", clock)
    world.memory.backfill(world.engine, Tag, batch_size=4, rate=2)
    assert clock.pauses == [1.75, 1.75, 0.75]


def test_backfill_lets_others_write_to_sqlite(sqlite_engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    """It pauses between batches for as long as one batch took, so that a waiting writer gets its turn."""
    world = World(sqlite_engine)
    old_tags(sqlite_engine, 10)
    clock = Clock(0.5)
    monkeypatch.setattr(backfill, "time", clock)
    world.memory.backfill(sqlite_engine, Tag, batch_size=4, rate=100)
    assert clock.pauses == [0.5, 0.5, 0.5]


# -- beside live writes --------------------------------------------------------------------------------------------


@both_ways
def test_row_that_changes_before_its_lock_is_logged_as_it_is(
    engine: Engine, capture: Literal["session", "trigger"], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The old row is not logged, and no entry is made for a deleted row. On SQLite other writers wait for this
    transaction.
    """
    world = World(engine, capture=capture)
    with before_tracking(world):
        old_tags(engine, 3)
    spy = Spy(world, monkeypatch)

    def meddle(_: Any) -> None:
        if engine.dialect.name == "postgresql":
            with world.session() as session:
                session.get_one(Tag, "t0000").meaning = "new"
                session.delete(session.get_one(Tag, "t0002"))
                session.commit()

    spy.inside = meddle
    world.memory.backfill(engine, Tag)
    assert_begins_once(engine)
    world.assert_in_step()


def test_backfill_waits_for_a_locked_row_without_holding_others(postgres_engine: Engine) -> None:
    """It blocks no transaction while it waits, and no transaction becomes the victim of a deadlock."""
    engine = postgres_engine
    world = World(engine)
    old_tags(engine, 9)
    with world.session() as session:
        session.get_one(Tag, "t0004").meaning = "changed"
        session.flush()
        worker = threading.Thread(target=world.memory.backfill, args=(engine, Tag))
        worker.start()
        others = {("tag", key): ["baseline"] for key in tag_keys(0, 1, 2, 3, 5, 6, 7, 8)}
        _poll(lambda: logged(engine) == others)
        _poll(lambda: _waits(engine, "tag"))
        session.execute(text("SET LOCAL lock_timeout = '20s'"))
        for name in ("t0000", "t0003", "t0005", "t0008"):
            session.get_one(Tag, name).meaning = "changed, too"
        session.commit()
    worker.join(60)
    assert not worker.is_alive()
    assert_begins_once(engine)
    world.assert_in_step()


def _waits(engine: Engine, table: str) -> bool:
    """Whether a transaction waits for a row lock of *table*."""
    waiting = text(f"SELECT count(*) {WAITING_FOR_A_LOCK} AND query LIKE :query")
    with engine.connect() as connection:
        return connection.scalar(waiting, {"query": f"%FROM {table}%"}) == 1


def _poll(is_true: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 60
    while not is_true():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_a_process_that_is_stopped_does_not_hold_rows_for_ever(
    postgres_engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The server ends its transaction. It is READ COMMITTED, even if the engine has another isolation level."""
    world = World(postgres_engine.execution_options(isolation_level="REPEATABLE READ"))
    old_tags(world.engine, 1)
    spy, told = Spy(world, monkeypatch), []

    def look(connection: Any) -> None:
        names = ("idle_in_transaction_session_timeout", "transaction_isolation")
        told.extend(connection.scalar(text(f"SHOW {name}")) for name in names)

    spy.inside = look
    world.memory.backfill(world.engine, Tag)
    assert told == ["1min", "read committed"]


def test_workers_share_the_rows(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each row is read by one worker. No worker waits for the batch of another."""
    world = World(engine)
    old_tags(engine, 300)
    world.memory.backfill(engine, Tag, batch_size=5, limit=1)  # splits off a range, so that three ranges can be shared
    spy = Spy(world, monkeypatch)
    both_inside, arrivals = threading.Barrier(2), itertools.count()

    def meet(_: Any) -> None:
        if engine.dialect.name == "postgresql" and next(arrivals) < 2:
            both_inside.wait(60)  # two workers are inside a batch at the same time

    spy.inside = meet
    added: list[int] = []
    assert not in_threads(4, lambda _: added.append(world.memory.backfill(engine, Tag, batch_size=5, restart=False)))
    assert sum(added) == 299
    assert Counter(spy.keys) == dict.fromkeys(tag_keys(*range(1, 300)), 1)
    assert logged(engine) == {("tag", key): ["baseline"] for key in tag_keys(*range(300))}
    world.assert_in_step()


def test_a_worker_waits_for_ranges_of_others(postgres_engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    """It waits for one range after the other. A worker that holds a range may be killed, and the rest would be left."""
    world, engine = World(postgres_engine), postgres_engine
    old_tags(engine, 30)
    world.memory.backfill(engine, Tag, batch_size=1, limit=1)  # splits off twenty rows
    spy, added = Spy(world, monkeypatch), list[int]()
    worker = threading.Thread(target=lambda: added.append(world.memory.backfill(engine, Tag)))
    with engine.connect() as one, engine.connect() as other:
        for connection, is_rest in ((one, False), (other, True)):
            its = ranges.c.until.is_(None) if is_rest else ranges.c.until.is_not(None)
            assert len(connection.execute(select(ranges).where(its).with_for_update()).all()) == 1
        worker.start()
        _poll(lambda: _waits(engine, "memstate_backfill"))
        one.execute(sa.update(ranges).where(ranges.c.until.is_not(None)).values(done=True))
        one.commit()
        _poll(lambda: _waits(engine, "memstate_backfill") and not spy.batches)
        # Act as a worker that divides the range and finishes the first part before this worker gets the lock.
        there = tag_keys(24)[0]
        other.execute(sa.update(ranges).where(ranges.c.until.is_(None)).values(until=there, done=True))
        other.execute(insert(ranges), backfill._range("tag", there))
        other.commit()
    worker.join(60)
    assert spy.batches == [tag_keys(*range(25, 30))]
    assert added == [5]


def test_workers_that_begin_together_share_one_backfill(engine: Engine) -> None:
    """One worker begins and the others join, even if the class was finished before."""
    world = World(engine)
    old_tags(engine, 50)
    for restart in (None, True):
        assert not in_threads(4, lambda _, anew=restart: world.memory.backfill(engine, batch_size=7, restart=anew))
    assert logged(engine) == {("tag", key): ["baseline"] for key in tag_keys(*range(50))}
    world.assert_in_step()


def test_restart_leaves_no_range_of_dividing_workers(postgres_engine: Engine) -> None:
    """Two workers divide ranges during a restart: one waits for its lock, one commits before the DELETE. No range is
    left.

    A range that was left would collide with the next division there, and every later run would fail.
    """
    world, engine = World(postgres_engine), postgres_engine
    old_tags(engine, 90)
    tracked = world.memory._registry.of(Tag)
    engines = [create_engine(engine.url) for _ in range(3)]
    first, second, restarting = (
        backfill.Backfill(each, world.memory._recorder, [tracked], batch_size=1) for each in engines
    )
    world.memory.backfill(engine, Tag, batch_size=1, limit=1)  # splits off twenty rows
    divided, restarted = threading.Event(), threading.Event()
    threads = [threading.Thread(target=worker._turn, args=(1,)) for worker in (first, second)]

    def restart() -> None:
        restarting.begin(restart=True)
        restarted.set()

    def divide(_: Any, __: Any, statement: str, *___: Any) -> None:
        if statement.startswith("DELETE"):
            waiting = _waiting(engine)
            threads[1].start()
            _poll(lambda: divided.is_set() or _waiting(engine) > waiting)

    def let_it_delete(_: Any) -> None:
        divided.set()
        _poll(lambda: restarted.is_set() or _waiting(engine, "DELETE") > 0)

    event.listen(engines[1], "commit", let_it_delete)
    event.listen(engines[2], "before_cursor_execute", divide)
    threads.append(threading.Thread(target=restart))
    with engine.connect() as busy:
        in_hand = select(ranges).where(ranges.c.until.is_not(None)).with_for_update()
        assert len(busy.execute(in_hand).all()) == 1
        threads[2].start()
        _poll(lambda: _waiting(engine) == 1)
        threads[0].start()
        _poll(lambda: not threads[0].is_alive() or _waiting(engine) == 2)
    for thread in reversed(threads):
        thread.join(60)
        assert not thread.is_alive()
    world.memory.backfill(engine, Tag, batch_size=1, restart=False)
    assert logged(engine) == {("tag", key): ["baseline"] for key in tag_keys(*range(90))}
    with engine.connect() as connection:
        starts = connection.scalars(select(ranges.c.start).order_by(ranges.c.start)).all()
    assert starts == ["", *tag_keys(19, 39, 59, 79)]
    for each in engines:
        each.dispose()


def test_a_restart_waits_for_a_batch(postgres_engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    """The batch's worker records its position past the waiting restart, so the two do not wait for each other."""
    world, engine = World(postgres_engine), postgres_engine
    old_tags(engine, 5)
    spy = Spy(world, monkeypatch)
    restart = threading.Thread(target=lambda: world.memory.backfill(engine, Tag, restart=True, limit=0))

    def meet(_: Any) -> None:
        if restart.ident is None:
            restart.start()
            _poll(lambda: _waiting(engine, "LOCK TABLE") == 1)

    spy.inside = meet
    assert world.memory.backfill(engine, Tag, batch_size=2, limit=2) == 2
    restart.join(60)
    assert not restart.is_alive()
    assert world.memory.backfill(engine, Tag, restart=False) == 3
    assert spy.batches == [tag_keys(0, 1), tag_keys(*range(5))]
    assert_begins_once(engine)


def _waiting(engine: Engine, verb: str = "") -> int:
    """The number of transactions that wait for a lock of ranges."""
    waiting = text(f"SELECT count(*) {WAITING_FOR_A_LOCK} AND query LIKE :query")
    with engine.connect() as connection:
        return int(connection.scalar(waiting, {"query": f"{verb}%memstate_backfill%"}) or 0)


@both_ways
@pytest.mark.parametrize("isolation", ["REPEATABLE READ", "SERIALIZABLE"])
def test_transaction_that_misses_the_baseline_logs_another(
    postgres_engine: Engine, capture: Literal["session", "trigger"], isolation: str
) -> None:
    """Its older snapshot shows no baseline, so it logs another one. Both are equal, and history shows one."""
    world, engine = World(postgres_engine, capture=capture), postgres_engine
    with before_tracking(world):
        old_tags(engine, 3)
    sessions = sessionmaker(engine.execution_options(isolation_level=isolation))
    world.memory.attach(sessions)
    with sessions() as session:
        assert session.scalar(select(sa.func.count()).select_from(Tag)) == 3  # takes the snapshot
        world.memory.backfill(engine, Tag)
        session.get_one(Tag, "t0000").meaning = "new"
        session.delete(session.get_one(Tag, "t0001"))
        session.commit()
    with world.session() as session:
        changes = {
            name: [
                (change.op, *(image and image["meaning"] for image in (change.before, change.after)))
                for change in world.memory.history(session, Tag, name)
            ]
            for name in ("t0000", "t0001", "t0002")
        }
        assert changes == {
            "t0000": [("baseline", None, "old 0"), ("update", "old 0", "new")],
            "t0001": [("baseline", None, "old 1"), ("delete", "old 1", None)],
            "t0002": [("baseline", None, "old 2")],
        }
    world.assert_in_step()
    with world.session() as session:
        assert {change.op for change in world.memory.rollback(session)} == {"insert", "update"}
        session.commit()
    with engine.connect() as connection:
        assert set(connection.scalars(select(Tag.meaning))) == {"old 0", "old 1", "old 2"}
    world.assert_in_step()


@pytest.mark.deep_on("session")
@pytest.mark.deep_on("postgres", "trigger")
@both_ways
def test_backfill_converges_beside_busy_writers(engine: Engine, capture: Literal["session", "trigger"]) -> None:
    """Two workers run while writers change, delete and add rows, many of them in one transaction. Nothing fails."""
    world = World(engine, capture=capture)
    with before_tracking(world):
        old_tags(engine, 200)
    world.relay.drain()
    finished = threading.Event()
    written = threading.Semaphore(0)

    def write(number: int) -> None:
        for step in range(10_000):
            if finished.is_set():
                return
            with world.session() as session:
                # The writer goes in order of keys, to avoid deadlocks with its own other transactions.
                for n in sorted({(number * 50 + step * 7 + m * 13) % 100 * 2 + number for m in range(3)}):
                    tag = session.get(Tag, f"t{n:04}")
                    if tag is None:
                        session.add(Tag(name=f"t{n:04}", meaning=f"new {step}"))
                    elif (n + step) % 3:
                        tag.meaning = f"changed {step}"
                    else:
                        session.delete(tag)
                session.commit()
            written.release()

    def work(number: int) -> None:
        if number < 2:
            write(number)
            return
        try:
            for _ in range(5):
                written.acquire(timeout=60)
                world.memory.backfill(engine, Tag, batch_size=5, limit=20)
            world.memory.backfill(engine, Tag, batch_size=5, restart=False)
        finally:
            finished.set()

    assert not in_threads(4, work)
    world.memory.backfill(engine, Tag, restart=False)  # resumes the stopped run
    assert_begins_once(engine)
    world.assert_in_step()


# -- all kinds of rows -------------------------------------------------------------------------------------------------


class Base(DeclarativeBase):
    pass


class Word(Base):
    """The order of its keys differs from the order of their bytes."""

    __tablename__ = "word"
    language: Mapped[str] = mapped_column(sa.String(2), primary_key=True)
    word: Mapped[str] = mapped_column(
        sa.String(20, collation="NOCASE").with_variant(sa.String(20, collation="C"), "postgresql"),
        primary_key=True,
    )


class Kind(Base):
    __tablename__ = "kind"
    id: Mapped[str] = mapped_column(sa.String(20), primary_key=True)
    kind: Mapped[str]
    name: Mapped[str]
    __mapper_args__: ClassVar[dict[str, Any]] = {"polymorphic_on": "kind", "polymorphic_identity": "kind"}


class Single(Kind):
    """Its rows are some of the rows of a table."""

    __mapper_args__: ClassVar[dict[str, Any]] = {"polymorphic_identity": "single"}


class Joined(Kind):
    """Its rows are in two tables."""

    __tablename__ = "joined"
    id: Mapped[str] = mapped_column(ForeignKey("kind.id"), primary_key=True)
    more: Mapped[str]
    __mapper_args__: ClassVar[dict[str, Any]] = {"polymorphic_identity": "joined"}


WORDS = [(language, word) for language in ("de", "en") for word in ("Zoo", "apfel", "Birne", "älter", "b", "C", "zz")]


@pytest.mark.parametrize("model", [Word, Kind, Single, Joined])
def test_backfill_covers_all_kinds_of_rows(engine: Engine, model: Any) -> None:
    """Composite keys with a collation of their own, and single-table and joined inheritance from base and subclass."""
    Base.metadata.create_all(engine)
    with engine.begin() as connection:
        connection.execute(insert(Word.__table__), [{"language": language, "word": word} for language, word in WORDS])
        kinds = ("kind", "single", "joined")
        rows = [{"id": f"{kind} {n}", "kind": kind, "name": f"{n}"} for n in range(5) for kind in kinds]
        connection.execute(insert(Kind.__table__), rows)
        connection.execute(insert(Joined.__table__), [{"id": f"joined {n}", "more": "more"} for n in range(5)])
    app = make_app(engine, model, text="word" if model is Word else "name")
    for limit in (1, 4, 0, 3, 1):
        app.memory.backfill(engine, model, batch_size=2, limit=limit)
    app.memory.backfill(engine, model, batch_size=1, restart=False)
    with app.session() as session:
        changes = app.memory.history(session, model)
        there = {session.identity_key(instance=row)[1] for row in session.scalars(select(model))}
    keys = [change.key if isinstance(change.key, tuple) else (change.key,) for change in changes]
    assert Counter(keys) == dict.fromkeys(there, 1) and len(there) >= 5
    assert {change.op for change in changes} == {"baseline"}
    if model is Joined:
        assert {change.after["joined.more"] for change in changes if change.after} == {"more"}
    app.memory.relay(engine).drain()
    assert app.memory.verify(engine).clean
    app.memory.close()


# -- kills -------------------------------------------------------------------------------------------------------------


class Killed(Exception):
    pass


@contextmanager
def at_statement(engine: Engine, number: int, action: Callable[[], None]) -> Iterator[None]:
    """Run *action* once, before this thread's statement or COMMIT with this *number*."""
    seen, here = 0, threading.get_ident()

    def count(*_: Any) -> None:
        nonlocal seen
        if threading.get_ident() != here:  # the engine also reports commits to relays, in other threads
            return
        seen += 1
        if seen == number:
            action()

    for name in ("before_cursor_execute", "commit"):
        event.listen(engine, name, count)
    try:
        yield
    finally:
        for name in ("before_cursor_execute", "commit"):
            event.remove(engine, name, count)


def killed() -> None:
    raise Killed


few = st.integers(0, 11)
WRITES = {
    "edit": st.tuples(few),
    "delete": st.tuples(few),
    "add": st.tuples(few),
    "edit_all": st.tuples(),
    "backfill": st.tuples(st.integers(1, 5), st.integers(0, 7)),
}
one = st.one_of(*(st.tuples(st.just(name), args) for name, args in WRITES.items()))
steps = st.lists(
    st.one_of(
        one,
        st.just(("relay", ())),
        st.tuples(st.just("killed"), st.tuples(st.integers(1, 3), st.integers(1, 40))),
        st.tuples(st.just("meanwhile"), st.tuples(st.integers(1, 3), st.integers(1, 40), one)),
    ),
    min_size=1,
    max_size=12,
)


class Play:
    """Random steps on twelve rows that are older than tracking. A step inside another step waits for no lock."""

    def __init__(self, world: World, beside: Engine) -> None:
        self.world = world
        self.beside = beside  # an engine that fails soon instead of waiting for a lock

    def run(self, name: str, args: Any) -> None:
        getattr(self, name)(*args)

    def killed(self, batch_size: int, statement: int) -> None:
        with at_statement(self.world.engine, statement, killed), suppress(Killed):
            self.world.memory.backfill(self.world.engine, Tag, batch_size=batch_size, restart=False)

    def meanwhile(self, batch_size: int, statement: int, step: tuple[str, Any]) -> None:
        def act() -> None:
            with suppress(OperationalError):  # a writer of a row of the batch would have to wait, so it gives up
                self.run(*step)

        with at_statement(self.world.engine, statement, act):
            self.world.memory.backfill(self.world.engine, Tag, batch_size=batch_size, limit=5, restart=False)

    def backfill(self, batch_size: int, limit: int) -> None:
        self.world.memory.backfill(self.beside, Tag, batch_size=batch_size, limit=limit, restart=False)

    def relay(self) -> None:
        self.world.relay.run_once()

    def _write(self, change: Callable[[Any], None]) -> None:
        with self.world.sessions(bind=self.beside) as session:
            change(session)
            session.commit()

    def edit(self, n: int) -> None:
        def change(session: Any) -> None:
            if tag := session.get(Tag, f"t{n:04}"):
                tag.meaning += "!"

        self._write(change)

    def edit_all(self) -> None:
        self._write(lambda session: session.execute(sa.update(Tag).values(meaning=Tag.meaning + "?")))

    def delete(self, n: int) -> None:
        self._write(lambda session: session.execute(sa.delete(Tag).where(Tag.name == f"t{n:04}")))

    def add(self, n: int) -> None:
        def change(session: Any) -> None:
            if session.get(Tag, f"t{n:04}") is None:
                session.add(Tag(name=f"t{n:04}", meaning="new"))

        self._write(change)


@pytest.fixture
def beside(engine: Engine) -> Iterator[Engine]:
    """Another engine on the same database, which waits for no lock."""
    if engine.dialect.name == "sqlite":
        made = create_engine(engine.url)
        sqlite.configure(made, busy_timeout_s=0.0)
        event.listen(made, "connect", lambda dbapi, record: dbapi.execute("PRAGMA synchronous = OFF"))
    else:
        made = create_engine(engine.url, connect_args={"options": "-c lock_timeout=10ms"})
    yield made
    made.dispose()


@pytest.mark.timeout(PATIENCE_S)
@pytest.mark.parametrize("programs_played", sizes(3, 40))
@both_ways
def test_random_interleavings_log_one_first_entry_a_row(
    engine: Engine, beside: Engine, capture: Literal["session", "trigger"], programs_played: int
) -> None:
    """Batches, live writes, kills at any statement, nested workers: one first entry a row, and replay(log) == table."""
    world = World(engine, capture=capture)

    @explore(programs_played, steps=steps)
    def _play(steps: Any) -> None:
        world.relay.stop()
        world.index.delete([entry.id for entry in world.index.scan(None, 10_000)])
        with before_tracking(world):
            wipe(engine)
            world.memory._recorder.forget_keys()  # the other engine's keys, which this world does not see
            world.relay.drain()  # the next index gets the marked keys, and no more
            old_tags(engine, 12)
        world.memory.backfill(engine, Tag, limit=0)
        script = Play(world, beside)
        for name, args in steps:
            script.run(name, args)
        world.memory.backfill(engine, Tag, batch_size=2, restart=False)
        with engine.connect() as connection:
            assert not connection.execute(select(ranges.c.start).where(~ranges.c.done)).all()
        assert_begins_once(engine)
        with engine.connect() as connection:
            there = {("tag", f'["{name}"]') for name in connection.scalars(select(Tag.name))}
        assert there <= logged(engine).keys()
        world.assert_in_step()

    world.memory.close()


# -- plans -------------------------------------------------------------------------------------------------------------


@pytest.mark.deep_on("sqlite")
def test_a_batch_reads_by_indexes(engine: Engine) -> None:
    """Neither a range nor its boundary scans the table. The log is queried key by key, even with few statistics.

    One hash of the whole log for each batch made a backfill three times as slow after a million rows.
    """
    world = World(engine)
    with engine.begin() as connection:
        connection.execute(insert(Person.__table__), [{"id": 1, "name": "p"}])
        notes = [{"topic": f"t{n % 7}", "number": n, "person_id": 1, "content": "c"} for n in range(3000)]
        connection.execute(insert(Note.__table__), notes)
        if engine.dialect.name == "postgresql":
            connection.execute(text("ANALYZE note"))
    world.memory.backfill(engine, Note, limit=2000)
    with engine.begin() as connection:
        if engine.dialect.name == "postgresql":
            connection.execute(text("ANALYZE memstate_log"))
    sent: dict[str, Any] = {}

    def note(connection: Any, cursor: Any, statement: str, parameters: Any, context: Any, many: bool) -> None:
        if statement.startswith("SELECT") and ("note" in statement or "memstate_log" in statement):
            sent[statement] = parameters

    event.listen(engine, "before_cursor_execute", note)
    world.memory.backfill(engine, Note, batch_size=10, limit=500, restart=False)
    event.remove(engine, "before_cursor_execute", note)
    explain = "EXPLAIN QUERY PLAN " if engine.dialect.name == "sqlite" else "EXPLAIN "
    with engine.connect() as connection:
        plans = {
            statement: "\n".join(str(row[-1]) for row in connection.exec_driver_sql(explain + statement, parameters))
            for statement, parameters in sent.items()
        }
    assert len(plans) >= 4  # a boundary, a range, its rows, their entries
    for statement, plan in plans.items():
        assert "Seq Scan" not in plan and "Hash" not in plan and "SCAN note\n" not in f"{plan}\n", (
            f"{statement}\n{plan}"
        )
