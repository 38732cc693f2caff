"""Relays that meet others: shared indexes, lost leases, open transactions, constant writers."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator, Sequence
from itertools import pairwise
from typing import Any

import pytest
from sqlalchemy import Engine, create_engine, event, select, update
from sqlalchemy.orm import Session
from sqlalchemy.pool import StaticPool

from memstate_sa import DeliveryRejected, DeliveryRetryable, MemstateError, sqlite
from memstate_sa.db.tables import cursor, parked, utcnow
from memstate_sa.indexes import InMemoryIndex, Point, VectorIndex
from memstate_sa.relay import RetryPolicy
from memstate_sa.testing import HashEmbedder
from tests.support import Person, Tag, World, assert_index_holds, expire_leases, make_due, overtake
from tests.support.apps import App
from tests.support.relays import Interrupted, Spy, Waits, eventually, holds, say

pytestmark = pytest.mark.sa20


TEXTS: dict[type[Any], str] = {Person: "about", Tag: "meaning"}


class Application(App):
    """A Memory of some classes, beside others with the same index and database."""

    def __init__(self, engine: Engine, index: VectorIndex | dict[str, VectorIndex], *models: type[Any]) -> None:
        super().__init__(engine, *models, index=index, tracking={model: {"text": TEXTS[model]} for model in models})

    def write(self, *instances: Any) -> None:
        with self.sessions() as session:
            for instance in instances:
                session.merge(instance)
            session.commit()

    def forget(self, model: type[Any], key: Any) -> None:
        with self.sessions() as session:
            session.delete(session.get_one(model, key))
            session.commit()


def tag(name: str, meaning: str) -> Tag:
    return Tag(name=name, meaning=meaning)


def person(key: int, about: str) -> Person:
    return Person(id=key, name="someone", about=about)


def test_two_memories_share_an_index(engine: Engine) -> None:
    """Each delivers the classes that the other does not track."""
    index = InMemoryIndex()
    people, tags = Application(engine, index, Person), Application(engine, index, Tag)
    people.memory.relay(engine).drain()
    tags.memory.relay(engine).drain()
    people.write(person(1, "likes tea"))
    tags.write(tag("a", "a first meaning"), tag("b", "another"))
    people.memory.relay(engine).drain()
    assert_index_holds(index, HashEmbedder(), {"person[1]": "likes tea"})
    assert people.memory.status(engine)["memory"].pending == 0
    tags.memory.relay(engine).drain()
    everything = {"person[1]": "likes tea", 'tag["a"]': "a first meaning", 'tag["b"]': "another"}
    assert_index_holds(index, HashEmbedder(), everything)

    tags.write(tag("a", "a second meaning"))
    people.write(person(1, "likes coffee"))
    tags.memory.relay(engine).drain()
    people.memory.relay(engine).drain()
    everything |= {"person[1]": "likes coffee", 'tag["a"]': "a second meaning"}
    assert_index_holds(index, HashEmbedder(), everything)
    assert tags.memory.verify(engine).clean and people.memory.verify(engine).clean


@pytest.mark.parametrize("fenced", [False, True])
@pytest.mark.parametrize("meanwhile", ["changed", "deleted"])
def test_the_late_write_of_an_overtaken_relay_is_put_right(engine: Engine, meanwhile: str, fenced: bool) -> None:
    """The new owner delivers the row, then a stale write of the old owner lands. The new owner delivers it again.

    An index with fencing refuses the stale write.
    """
    index = Interrupted(fenced=fenced)
    world = World(engine, index)
    late, current = world.memory.relay(engine), world.relay
    say(world, a="at first")
    current.drain()
    say(world, a="read by the late one", b="always the same")

    def overtake() -> None:
        expire_leases(engine)
        if meanwhile == "changed":
            say(world, a="the truth")
        else:
            with world.session() as session:
                session.delete(session.get_one(Tag, "a"))
                session.commit()
        assert current.run_once() >= 2
        assert holds(index, truth)

    truth = {'tag["b"]': "b means always the same"}
    if meanwhile == "changed":
        truth['tag["a"]'] = "a means the truth"
    index.during, index.meddle = "before upsert", overtake
    assert late.run_once() == 0
    stale = {'tag["a"]': "a means read by the late one", 'tag["b"]': "b means always the same"}
    assert_index_holds(index, world.embedder, truth if fenced else stale)
    assert world.memory.status(engine)["memory"].due == 2
    assert late.run_once() == 0  # another relay owns the index
    assert current.run_once() == 2
    assert_index_holds(index, world.embedder, truth)
    world.assert_in_step()


def test_an_overtaken_relay_stops_between_two_batches(engine: Engine) -> None:
    """Before each batch it checks that it still owns the index. If not, it leaves the rest to the new owner."""
    index = Spy(max_batch=2)
    world = World(engine, index)
    late = world.memory.relay(engine)
    world.relay.drain()
    say(world, a="x", b="x", c="x", d="x")

    def meddle(point: Point) -> None:
        index.refuse = lambda point: None
        late._workers[0].delivery.slot_worker._renew_at = 0.0  # the write took longer than half of the lease
        overtake(engine)

    index.refuse = meddle
    assert late.run_once() == 0
    assert index.batches == [['tag["a"]', 'tag["b"]']]
    expire_leases(engine)
    world.assert_in_step()


def test_two_relays_claim_a_new_index_at_once(postgres_engine: Engine) -> None:
    """PostgreSQL: both find no cursor and register the index. In the end each has half of its slots."""
    earlier = World(postgres_engine)
    say(earlier, a="x", b="y")
    earlier.relay.run_once()
    earlier.relay.stop()  # the next relays remove its rows, because that index is gone
    world = World(postgres_engine)
    both = threading.Barrier(2, timeout=60)
    relays = [world.memory.relay(postgres_engine) for _ in range(2)]
    outcomes: list[object] = [None, None]

    def meet(connection: Any, dbapi_cursor: Any, statement: str, *rest: Any) -> None:
        if statement.startswith("DELETE FROM memstate_index"):
            both.wait()

    def claim(n: int) -> None:
        try:
            outcomes[n] = relays[n].run_once()
        except BaseException as error:
            outcomes[n] = error

    event.listen(postgres_engine, "before_cursor_execute", meet)
    threads = [threading.Thread(target=claim, args=(n,)) for n in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    event.remove(postgres_engine, "before_cursor_execute", meet)
    assert not [outcome for outcome in outcomes if not isinstance(outcome, int)]
    for relay in relays * 2:
        relay.run_once()
    deliveries = [relay._workers[0].delivery for relay in relays]
    with postgres_engine.connect() as connection:
        owners = dict(connection.execute(select(cursor.c.slot, cursor.c.owner)).all())
    assert [set(delivery.slot_worker.epochs) for delivery in deliveries] == [
        {slot for slot, owner in owners.items() if owner == delivery._owner} for delivery in deliveries
    ]
    assert [len(delivery.slot_worker.epochs) for delivery in deliveries] == [32, 32]
    say(world, c="z")
    eventually(lambda: sum(relay.run_once() for relay in relays) == 0)
    expected = {'tag["a"]': "a means x", 'tag["b"]': "b means y", 'tag["c"]': "c means z"}
    assert_index_holds(world.index, world.embedder, expected)
    for relay in relays:
        relay.stop()
    world.assert_in_step()


def test_parked_key_of_an_untracked_class_stays_parked(engine: Engine) -> None:
    """The key waits without blocking others until the class is tracked again."""
    index = Spy()
    index.refuse = lambda point: DeliveryRejected("too odd") if point.id == 'tag["a"]' else None
    both = Application(engine, index, Person, Tag)
    both.write(tag("a", "odd"), person(1, "likes tea"))
    both.memory.relay(engine).drain()
    with engine.begin() as connection:
        connection.execute(update(parked).values(next_at=utcnow()))
    assert both.memory.status(engine)["memory"].due == 1
    index.refuse = lambda point: None

    people = Application(engine, index, Person)
    people.write(person(2, "likes coffee"))
    relay = people.memory.relay(engine)
    relay.run_once()
    relay.drain()
    status = people.memory.status(engine)["memory"]
    assert (status.pending, status.parked, status.due, status.dead) == (0, 0, 0, 0)
    likes = {"person[1]": "likes tea", "person[2]": "likes coffee"}
    assert_index_holds(index, HashEmbedder(), likes)
    nothing = Application(engine, index)
    nothing.memory.relay(engine).drain()
    assert nothing.memory.status(engine)["memory"].parked == 0
    with engine.connect() as connection:
        assert connection.execute(select(parked.c.entity, parked.c.key)).all() == [("tag", '["a"]')]

    again = Application(engine, index, Person, Tag)
    again.memory.relay(engine).drain()
    assert_index_holds(index, HashEmbedder(), {**likes, 'tag["a"]': "odd"})


@pytest.fixture(params=["StaticPool", "SingletonThreadPool"])
def in_memory_engine(request: pytest.FixtureRequest) -> Iterator[Engine]:
    """Both kinds of engine whose threads share one connection."""
    options: dict[str, Any] = {}
    if request.param == "StaticPool":
        options = {"poolclass": StaticPool, "connect_args": {"check_same_thread": False}}
    engine = sqlite.configure(create_engine("sqlite://", **options))
    yield engine
    engine.dispose()


def test_an_open_transaction_in_memory_is_left_alone(in_memory_engine: Engine) -> None:
    """The only connection is in the application's transaction. Each call raises a clear error, and the transaction goes
    on.
    """
    world = World(in_memory_engine)
    say(world, a="x")
    world.relay.drain()
    asked: list[Callable[[], object]] = [
        lambda: world.memory.status(in_memory_engine),
        lambda: world.memory.verify(in_memory_engine, repair=True),
        lambda: world.memory.backfill(in_memory_engine, Tag),
        world.relay.run_once,
    ]
    with world.session() as session:
        session.add(tag("b", "y"))
        session.flush()
        for ask in asked:
            with pytest.raises(MemstateError, match="a transaction is open"):
                ask()
        session.commit()
    for ask in asked:
        ask()
    with world.session() as session:
        assert world.rows(Tag, session).keys() == {"a", "b"}
    world.assert_in_step()


@pytest.mark.parametrize("end", ["commit", "rollback"])
def test_stopping_a_relay_leaves_an_open_transaction_alone(in_memory_engine: Engine, end: str) -> None:
    """The lease is not released, because that would end the application's transaction."""
    world = World(in_memory_engine)
    say(world, a="x")
    world.relay.run_once()
    with world.session() as session:
        session.add(tag("b", "y"))
        session.flush()
        world.relay.stop()
        getattr(session, end)()
    with world.session() as session:
        assert world.rows(Tag, session).keys() == ({"a", "b"} if end == "commit" else {"a"})
    world.assert_in_step()


def test_an_index_in_its_backoff_is_left_alone_while_others_are_served(engine: Engine) -> None:
    """In the background each index has its own backoff."""
    attempts: list[str] = []

    def down(point: Point) -> Exception:
        attempts.append(point.id)
        return DeliveryRetryable("down", retry_after_s=3600.0)

    away, up = Spy(), InMemoryIndex()
    away.refuse = down
    app = Application(engine, {"away": away, "up": up}, Tag)
    expected: dict[str, str] = {}
    with app.memory.relay(engine, policy=RetryPolicy(max_delay_s=3600.0)):
        for n in range(3):
            app.write(tag(f"t{n}", f"meaning {n}"))
            expected[f'tag["t{n}"]'] = f"meaning {n}"
            eventually(lambda: holds(up, expected) and bool(attempts))
    assert attempts == ['tag["t0"]']
    away.refuse = lambda point: None
    app.memory.relay(engine).drain()
    assert_index_holds(away, HashEmbedder(), expected)


def test_an_index_is_tried_again_when_its_backoff_is_over(engine: Engine) -> None:
    """It is not tried earlier, even when commits wake the relay. Then it is tried long before the next idle poll."""
    attempts: list[float] = []

    def down(point: Point) -> Exception | None:
        attempts.append(time.monotonic())
        return DeliveryRetryable("busy", retry_after_s=0.3) if len(attempts) < 3 else None

    index = Spy()
    index.refuse = down
    app = Application(engine, index, Tag)
    app.memory.relay(engine).drain()
    with app.memory.relay(engine, policy=RetryPolicy(delay_s=0.001), poll_s=(600.0, 600.0), lease_s=1200.0) as relay:
        app.write(tag("a", "x"))
        eventually(lambda: len(attempts) == 1)
        relay.wake()
        eventually(lambda: holds(index, {'tag["a"]': "x"}))
    assert [later - earlier >= 0.3 for earlier, later in pairwise(attempts)] == [True, True]


def test_a_provider_that_asks_for_too_much_patience_is_asked_again(engine: Engine) -> None:
    """Retry-After counts up to the policy's longest delay, so the relay does not wait an hour."""
    failures = iter([DeliveryRetryable("busy", retry_after_s=3600.0)] * 3)
    index = Spy()
    index.refuse = lambda point: next(failures, None)
    app = Application(engine, index, Tag)
    app.write(tag("a", "x"))
    app.memory.relay(engine, policy=RetryPolicy(max_delay_s=0.02)).drain(timeout=60.0)
    assert index.batches == [['tag["a"]']] * 4
    assert_index_holds(index, HashEmbedder(), {'tag["a"]': "x"})


def test_an_idle_relay_looks_less_and_less_often(postgres_engine: Engine) -> None:
    """On PostgreSQL each look costs three statements. A commit in this process is still seen at once."""
    world = World(postgres_engine)
    say(world, a="x")
    world.relay.drain()
    looks: list[str] = []

    def note(connection: Any, dbapi_cursor: Any, statement: str, *rest: Any) -> None:
        if statement.startswith("SELECT CAST(pg_current_snapshot()"):
            looks.append(statement)

    event.listen(postgres_engine, "before_cursor_execute", note)
    relay = world.memory.relay(postgres_engine, poll_s=(0.01, 600.0), lease_s=3600.0)
    relay._workers[0].woken = waits = Waits(short_s=2.0)
    with relay:
        eventually(lambda: bool(waits.asked) and waits.asked[-1] >= waits.short_s)
        assert 0 < len(looks) <= len(waits.asked) + 2
        for earlier, later in pairwise(waits.asked):  # each wait is half as long again, unless a commit woke it
            assert later == pytest.approx(1.5 * earlier) or later == 0.01
        say(world, b="y")
        expected = {'tag["a"]': "a means x", 'tag["b"]': "b means y"}
        eventually(lambda: holds(world.index, expected))
    world.assert_in_step()


def test_drain_returns_under_a_constant_writer(engine: Engine) -> None:
    """It waits for rows committed before the call. A constant writer is always ahead of the relay."""
    index = Spy()
    world = World(engine, index)
    world.relay.drain()
    say(world, a="x", b="y")
    stop, written = threading.Event(), [0]

    def write() -> None:
        while not stop.is_set():
            say(world, **{f"w{written[0] % 7}": f"meaning {written[0]}"})
            written[0] += 1

    def wait_for_the_writer(point: Point) -> None:
        before = written[0]  # one more may be committed but not counted yet
        eventually(lambda: written[0] > before + 1)

    index.refuse = wait_for_the_writer
    writer = threading.Thread(target=write)
    writer.start()
    try:
        world.relay.drain(timeout=60.0)
        assert world.memory.status(engine)["memory"].pending > 0
    finally:
        stop.set()
        writer.join()
    assert {entry.id for entry in index.scan(None, 100)} >= {'tag["a"]', 'tag["b"]'}
    index.refuse = lambda point: None
    world.assert_in_step()


def change(session: Session) -> None:
    session.get_one(Tag, "a").meaning = "changed"


def remove(session: Session) -> None:
    session.delete(session.get_one(Tag, "a"))


@pytest.mark.parametrize(
    ("moment", "edit", "delivered"),
    [
        pytest.param("after scan", change, True, id="looked stale"),
        pytest.param("after scan", remove, True, id="looked like a ghost"),
        pytest.param("before get", remove, True, id="looked missing"),
        pytest.param("after scan", change, False, id="on its way"),
    ],
)
def test_change_during_verify_is_not_drift(
    engine: Engine, moment: str, edit: Callable[[Session], None], delivered: bool
) -> None:
    """Row and vector are read at different times. Differences are read twice, or are pending."""
    index = Interrupted()
    world = World(engine, index)
    say(world, a="x", b="y")
    world.relay.drain()

    def meddle() -> None:
        with world.session() as session:
            edit(session)
            session.commit()
        if delivered:
            world.relay.drain()

    index.during, index.meddle = moment, meddle
    report = world.memory.verify(engine)
    assert index.during == ""
    assert (report.missing, report.ghost, report.stale) == ([], [], [])
    assert report.pending == ([] if delivered else [("tag", "a")])
    world.assert_in_step()


def test_a_row_that_another_memory_deleted_leaves_no_ghost(engine: Engine) -> None:
    """One relay skips the delete, the other delivers it. A refill could not find the ghost, because its row is gone."""
    index = InMemoryIndex()
    people, tags = Application(engine, index, Person), Application(engine, index, Tag)
    people.memory.relay(engine).drain()
    tags.write(tag("a", "a first meaning"), tag("b", "another"))
    tags.memory.relay(engine).drain()
    tags.forget(Tag, "a")
    people.memory.relay(engine).drain()
    tags.memory.relay(engine).drain()
    assert_index_holds(index, HashEmbedder(), {'tag["b"]': "another"})


def test_late_write_reported_as_failed_is_put_right(engine: Engine) -> None:
    """A call times out after its lease, and lands after the new owner's write. The relay corrects it."""
    index = Interrupted(fenced=False)
    world = World(engine, index)
    late, current = world.memory.relay(engine), world.relay
    say(world, a="at first")
    current.drain()
    say(world, a="read by the late one")
    upsert = index.upsert

    def fail(points: Sequence[Point]) -> None:
        index.upsert = upsert  # type: ignore[method-assign]
        expire_leases(engine)
        say(world, a="the truth")
        assert current.run_once() >= 1
        upsert(points)
        raise DeliveryRetryable("timed out")

    index.upsert = fail  # type: ignore[method-assign]
    with pytest.raises(DeliveryRetryable):
        late.run_once()
    late.run_once()
    make_due(engine)  # no call of that lease can land any more
    assert current.run_once() >= 1
    late.stop()
    world.assert_in_step()


@pytest.mark.deep
@pytest.mark.deep_on("postgres")
def test_a_database_that_was_away_is_not_asked_all_the_time(engine: Engine) -> None:
    """After one failure outside a delivery, the background relay polls as rarely as before."""
    world = World(engine)
    say(world, a="x")
    world.relay.drain()
    statements: list[str] = []
    event.listen(engine, "before_cursor_execute", lambda *arguments: statements.append(arguments[2]))
    relay = world.memory.relay(engine, policy=RetryPolicy(delay_s=0.01), poll_s=(0.05, 5.0))
    delivery, failed = relay._workers[0].delivery, threading.Event()
    deliver = delivery.deliver

    def fail_once() -> Any:
        if not failed.is_set():
            failed.set()
            raise RuntimeError("away")
        return deliver()

    delivery.deliver = fail_once  # type: ignore[method-assign]
    with relay:
        assert failed.wait(60)
        time.sleep(0.3)
        statements.clear()
        time.sleep(1)
        assert len(statements) < 100


def test_verify_looks_again_at_rows_that_changed_between_its_looks(engine: Engine) -> None:
    """A row changes and is delivered after the scan, then changes again. It is pending, not drift."""
    index = Interrupted()
    world = World(engine, index)
    say(world, a="x", b="y")
    world.relay.drain()

    def meddle() -> None:
        say(world, a="y")
        world.relay.drain()
        index.during, index.meddle = "before get", lambda: say(world, a="z")

    index.during, index.meddle = "after scan", meddle
    assert world.memory.verify(engine).clean
