"""The relay: the index converges to the committed rows after any failure."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from contextlib import nullcontext
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import Engine, create_engine, func, insert, select, text

from memstate_sa import DeliveryError, DeliveryRejected, DeliveryRetryable, IndexMismatch, Memory, MemstateError, sqlite
from memstate_sa.db.tables import cursor, ledger, outbox, parked
from memstate_sa.indexes import InMemoryIndex, VectorIndex
from memstate_sa.relay import RetryPolicy, loop
from memstate_sa.relay.requests import Upsert
from memstate_sa.testing import FlakyIndex, HashEmbedder
from tests.support import (
    Person,
    Tag,
    World,
    assert_index_holds,
    connections_of_this_thread,
    expire_leases,
    grow_older,
    make_due,
    overtake,
)
from tests.support.apps import make_app
from tests.support.relays import Spy, eventually, say

pytestmark = pytest.mark.sa20


@pytest.fixture
def spy() -> Spy:
    return Spy(max_batch=10)


@pytest.fixture
def spied(engine: Engine, spy: Spy) -> World:
    return World(engine, spy)


@pytest.mark.parametrize("in_background", [False, True])
def test_class_tracked_later_is_delivered(engine: Engine, in_background: bool) -> None:
    """A running relay delivers the class: its existing rows, and new commits."""
    app = make_app(engine, Tag, text="meaning")
    with app.relay if in_background else nullcontext(), app.session() as session:
        session.add_all([Tag(name="a", meaning="known"), Person(id=1, name="b", about="there before")])
        session.commit()
        app.memory.wait(session) if in_background else app.relay.drain()
        app.memory.track(Person, text="about")
        session.add(Person(id=2, name="c", about="from then on"))
        session.commit()
        app.relay.drain()
    expected = {'tag["a"]': "known", "person[1]": "there before", "person[2]": "from then on"}
    assert_index_holds(app.index, app.embedder, expected)


def test_many_changes_of_one_key_are_one_delivery(spied: World, spy: Spy) -> None:
    """The relay delivers the current row, not the operations before it."""
    spied.relay.drain()
    for n in range(5):
        say(spied, a=f"meaning {n}")
    say(spied, b="never delivered")
    with spied.session() as session:
        session.delete(session.get_one(Tag, "b"))
        session.commit()
    assert spied.relay.drain() == 2
    assert spy.batches == [['tag["a"]']]
    spied.assert_in_step()


def test_unchanged_projection_is_not_written_again(spied: World, spy: Spy) -> None:
    """Equal fingerprints cost nothing. A column that is neither text nor metadata does not reach the index."""
    with spied.session() as session:
        session.add(Person(name="ada", about="likes tea"))
        session.add(Tag(name="a", person_id=None))
        session.commit()
        spied.relay.drain()
        spy.batches.clear()
        session.get_one(Tag, "a").person_id = 1
        session.commit()
    spied.relay.drain()
    assert spy.batches == []


def test_metadata_alone_needs_no_embedding(spied: World, spy: Spy) -> None:
    """The text is equal and the metadata is not, so the existing vector is written again."""
    with spied.session() as session:
        session.add(Person(name="ada", about="likes tea"))
        session.commit()
        spied.relay.drain()
        spied.embedder.embed = None  # type: ignore[assignment,method-assign]
        session.get_one(Person, 1).name = "ada l."
        session.commit()
        spied.relay.drain()
    del spied.embedder.embed
    assert spy.query(spied.embedder.embed(["tea"])[0], 1, where={"name": {"$eq": "ada l."}})[0].id == "person[1]"
    spied.assert_in_step()


def test_batches_are_no_larger_than_the_index_takes(spied: World, spy: Spy) -> None:
    """The index declares how many points it takes in one call."""
    say(spied, **{f"t{n:02}": f"meaning {n}" for n in range(25)})
    spied.relay.drain()
    assert [len(batch) for batch in spy.batches] == [10, 10, 5]
    spied.assert_in_step()


def test_blank_text_has_no_vector(spied: World) -> None:
    """Rows whose text is None or blank have no vector. Text that becomes blank loses its vector."""
    with spied.session() as session:
        people = [Person(name="a", about=None), Person(name="b", about=" \n"), Person(name="c", about="tea")]
        session.add_all(people)
        session.commit()
        spied.assert_in_step()
        people[2].about = ""
        session.commit()
    spied.assert_in_step()
    assert spied.index.scan(None, 10) == []


def test_a_long_backlog_is_delivered_in_pages(engine: Engine) -> None:
    """Pages are smaller than the backlog, and windows open while others commit."""
    world = World(engine)
    relay = world.memory.relay(engine, page_size=7)
    for round in range(3):
        say(world, **{f"t{n}": f"round {round} meaning {n}" for n in range(20)})
        relay.run_once()
    relay.drain()
    relay.stop()
    world.assert_in_step()


def test_a_late_commit_is_not_skipped(postgres_engine: Engine) -> None:
    """PostgreSQL: a transaction took its ids before others that were delivered first."""
    world = World(postgres_engine)
    late = world.session()
    late.add(Tag(name="late"))
    late.flush()
    for n in range(3):
        say(world, **{f"early{n}": "x"})
        assert world.relay.drain() == 1
    late.commit()
    late.close()
    assert world.relay.drain() == 1
    world.assert_in_step()


@pytest.mark.deep_on("postgres")
def test_index_converges_through_random_failures(engine: Engine) -> None:
    """Calls fail before, after, or half way. Nothing is lost, and nothing stays stale."""
    inner = InMemoryIndex(max_batch=5)
    flaky = FlakyIndex(inner, rate=0.4, seed=3)
    world = World(engine, flaky)
    world.relay = world.memory.relay(engine, policy=RetryPolicy(delay_s=0.001))
    for round in range(8):
        say(world, **{f"t{n}": f"round {(round * n) % 3}" for n in range(12)})
        with world.session() as session:
            for tag in session.scalars(select(Tag).where(Tag.name.in_([f"t{round}", f"t{round + 3}"]))):
                session.delete(tag)
            session.commit()
        world.relay.drain()
    flaky.rate = 0
    world.assert_in_step()


def test_an_unavailable_index_is_waited_for(spied: World, spy: Spy) -> None:
    """run_once reports it, drain waits until its timeout, nothing is lost, and no key is blamed."""
    spied.relay.drain()
    spy.refuse = lambda point: DeliveryRetryable("down", may_land=False)
    say(spied, a="x", b="y")
    with pytest.raises(DeliveryRetryable, match="down"):
        spied.relay.run_once()
    with pytest.raises(DeliveryError, match=r"not drained within 0.2 s: down") as caught:
        spied.relay.drain(timeout=0.2)
    assert isinstance(caught.value.__cause__, DeliveryRetryable)
    spy.refuse = lambda point: None
    spied.relay.drain()
    with spied.engine.connect() as connection:
        assert connection.execute(select(parked)).all() == []
    spied.assert_in_step()


def test_a_refused_key_is_parked_and_the_others_go_on(spied: World, spy: Spy) -> None:
    """Bisection finds the refused key. Only this key waits, and it is delivered once the index accepts it."""
    spied.relay = spied.memory.relay(spied.engine, policy=RetryPolicy(delay_s=300))
    spy.refuse = lambda point: DeliveryRejected("too odd") if point.id == 'tag["t3"]' else None
    say(spied, **{f"t{n}": f"secret {n}" for n in range(9)})
    assert spied.relay.drain() == 8
    assert [entry.id for entry in spy.scan(None, 20)] == [f'tag["t{n}"]' for n in range(9) if n != 3]
    with spied.engine.connect() as connection:
        row = connection.execute(select(parked)).one()
    assert (row.key, row.attempts, row.state) == ('["t3"]', 1, "parked")
    assert "secret" not in row.error
    assert spied.memory.status(spied.engine)["memory"].parked == 1
    spy.refuse = lambda point: None
    assert spied.relay.run_once() == 0
    make_due(spied.engine)
    assert spied.relay.run_once() == 1
    spied.assert_in_step()


def test_a_vendor_text_never_reaches_the_error_column(spied: World, spy: Spy) -> None:
    """A client library's message may quote the fact, so only its type is stored."""
    spy.refuse = lambda point: RuntimeError(f"cannot take {point}: my secret diary")
    say(spied, a="my secret diary")
    spied.relay.drain()
    with spied.engine.connect() as connection:
        error = connection.execute(select(parked.c.error)).scalar_one()
    assert "RuntimeError" in error
    assert "diary" not in error


def test_too_many_rejections_make_a_key_dead_until_it_changes(engine: Engine, spy: Spy) -> None:
    """A dead key is not tried again until its next change."""
    world = World(engine, spy)
    world.relay = world.memory.relay(engine, policy=RetryPolicy(max_attempts=3, delay_s=0.001))
    spy.refuse = lambda point: DeliveryRejected("no") if "t3" in point.id else None
    say(world, t3="x", t4="y")
    world.relay.drain()
    eventually(lambda: world.relay.run_once() == 0 and world.memory.status(engine)["memory"].dead == 1)
    tries = len(spy.batches)
    world.relay.run_once()
    assert len(spy.batches) == tries
    spy.refuse = lambda point: None
    say(world, t3="z")
    world.relay.drain()
    assert world.memory.status(engine)["memory"].dead == 0
    world.assert_in_step()


def test_a_text_callable_that_raises_parks_its_row_alone(engine: Engine) -> None:
    """The application's own code may fail for one row."""

    def picky(tag: Tag) -> str:
        if tag.name == "bad":
            raise KeyError("private words")
        return tag.meaning

    app = make_app(engine, Tag, text=picky)
    with app.session() as session:
        session.add_all([Tag(name="bad"), Tag(name="good")])
        session.commit()
    app.memory.relay(engine).drain()
    with engine.connect() as connection:
        row = connection.execute(select(parked)).one()
    assert row.key == '["bad"]' and "KeyError" in row.error and "private" not in row.error


def test_a_lost_acknowledgement_is_settled_by_the_next_owner(spied: World, spy: Spy) -> None:
    """The index was written, the process died, and the row changed back. The ledger cannot be trusted."""
    say(spied, a="first")
    spied.relay.drain()
    say(spied, a="second")
    dying = spied.memory.relay(spied.engine)
    spied.relay.stop()
    for delivery in (worker.delivery for worker in dying._workers):
        delivery._do_originally = delivery._do

        def write_and_die(request: Any, d: Any = delivery) -> Any:
            reply = d._do_originally(request)
            if isinstance(request, Upsert):
                raise KeyboardInterrupt
            return reply

        delivery._do = write_and_die
    with pytest.raises(KeyboardInterrupt):
        dying.run_once()
    expire_leases(spied.engine)
    say(spied, a="first")
    spied.relay.drain()
    spied.assert_in_step()


def test_a_relay_that_lost_its_lease_records_nothing(spied: World) -> None:
    """The acknowledgement of an overtaken owner is refused. Its keys are delivered again."""
    say(spied, a="x")
    spied.relay.drain()
    spied.relay.run_once()
    say(spied, a="y")
    overtake(spied.engine)
    assert spied.relay.run_once() == 0
    expire_leases(spied.engine)
    spied.relay.drain()
    with spied.engine.connect() as connection:
        [written] = connection.scalars(select(ledger.c.epoch))
        assert written == connection.scalar(select(func.max(cursor.c.epoch)))
    spied.assert_in_step()


def test_one_owner_at_a_time(spied: World, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    """A second relay waits while the first holds the lease, and takes over when the first stops.

    A drain that waits logs its reason once.
    """
    say(spied, a="x")
    spied.relay.drain()
    spied.relay.run_once()  # unlike drain(), it keeps the lease for the next call
    second = spied.memory.relay(spied.engine)
    say(spied, b="y")
    assert second.run_once() == 0
    monkeypatch.setattr(loop, "_TELL_AFTER_S", 0.0)
    with pytest.raises(DeliveryError, match="another relay may hold its lease"):
        second.drain(timeout=0.1)
    told = [record.getMessage() for record in caplog.records if "Still waiting" in record.getMessage()]
    assert told == ["Still waiting: 1 keys are pending for 'memory' (another relay may hold its lease)."]
    spied.relay.stop()
    assert second.drain() >= 1
    second.stop()
    spied.assert_in_step()


@pytest.mark.deep
@pytest.mark.deep_on("sqlite")
def test_a_slow_embedder_keeps_its_lease(engine: Engine) -> None:
    """The lease is renewed between calls of the embedder, so a page that takes longer is not taken over."""
    world = World(engine)
    embedded: list[str] = []
    embed = world.embedder.embed
    relays = {f"relay {n}": world.memory.relay(engine, lease_s=60) for n in range(2)}

    def slowly(texts: Sequence[str]) -> Any:
        embedded.extend(texts)
        grow_older(engine, relays[threading.current_thread().name], timedelta(seconds=20))
        return embed(texts)

    world.embedder.embed = slowly  # type: ignore[method-assign]
    with world.session() as session:
        session.execute(insert(Tag), [{"name": f"t{n}", "meaning": "m"} for n in range(2000)])
        session.commit()
    threads = [threading.Thread(target=relay.drain, name=name) for name, relay in relays.items()]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    world.embedder.embed = embed  # type: ignore[method-assign]
    assert sorted(embedded) == sorted(f"t{n} means m" for n in range(2000))
    world.assert_in_step()


def test_another_index_under_the_same_name_is_refilled(engine: Engine) -> None:
    """A volatile index is empty after a restart, even if cursor and ledger claim otherwise."""
    world = World(engine)
    say(world, a="x", b="y")
    world.assert_in_step()
    world.relay.stop()
    restarted = World(engine)
    restarted.assert_in_step()
    assert [entry.id for entry in restarted.index.scan(None, 10)] == ['tag["a"]', 'tag["b"]']


def test_the_database_knows_which_embedder_filled_an_index(engine: Engine) -> None:
    """It refuses a second embedder for an index that does not remember its own."""

    class Lasting(InMemoryIndex):
        incarnation = "one"

        def open(self, *, embedder: str, dimension: int) -> None:
            super().open(embedder="any", dimension=dimension)

    other = HashEmbedder()
    other.fingerprint = "other:1"
    index = Lasting()
    first = World(engine, index)
    with first.session() as session:
        session.add(Tag(name="a"))
        session.commit()
    first.relay.drain()
    second = Memory(index, embedder=other)
    second.track(Tag, text="meaning")
    with pytest.raises(IndexMismatch, match=r"was filled by embedder .* not by 'other:1'"):
        second.relay(engine).drain()
    first.assert_in_step()


def test_rows_that_were_there_before_are_delivered(engine: Engine) -> None:
    """A new index gets every row of every tracked table, with or without a log entry."""
    world = World(engine)
    with engine.begin() as connection:
        connection.execute(insert(Tag.__table__), [{"name": f"t{n}", "meaning": f"m{n}"} for n in range(30)])
    relay = world.memory.relay(engine, page_size=4)
    relay.drain()
    relay.stop()
    assert len(world.index.scan(None, 100)) == 30
    assert world.memory.verify(engine).clean


def test_a_swapped_in_index_loses_its_ghosts(engine: Engine) -> None:
    """Points from another past are also compared with the rows."""
    index = InMemoryIndex()
    first = World(engine, index)
    say(first, a="x", b="y")
    first.assert_in_step()
    first.relay.stop()
    other = World(engine)
    with other.session() as session:
        session.delete(session.get_one(Tag, "a"))
        session.get_one(Tag, "b").meaning = "changed"
        session.commit()
    other.assert_in_step()
    other.relay.stop()
    again = World(engine, index)
    again.assert_in_step()


def test_a_deleted_chroma_folder_is_refilled(sqlite_engine: Engine, tmp_path: Path) -> None:
    """The cursor says delivered, but the folder is empty. Every row is delivered again."""
    chromadb = pytest.importorskip("chromadb")
    from memstate_sa.indexes import ChromaIndex

    for name in ("one", "two"):  # a client keeps a deleted folder open, so another folder stands for it
        client = chromadb.PersistentClient(str(tmp_path / name))
        world = World(sqlite_engine, ChromaIndex(client, "memory"))
        if name == "one":
            say(world, a="x", b="y")
        world.assert_in_step()
        world.relay.stop()
        world.index.close()


def test_the_thread_is_woken_by_a_commit(engine: Engine) -> None:
    """A commit in this process wakes it without polling."""
    world = World(engine)
    with world.memory.relay(engine, poll_s=(600.0, 600.0), lease_s=1200.0):
        say(world, warm="up")
        eventually(lambda: len(world.index.scan(None, 5)) == 1)
        say(world, a="x")
        eventually(lambda: len(world.index.scan(None, 5)) == 2)  # long before the next poll
    world.assert_in_step()


def test_a_commit_of_another_process_is_seen(engine: Engine) -> None:
    """Polling sees it. Another engine without our listeners stands for the other process."""
    world = World(engine)
    elsewhere = create_engine(engine.url)
    other = World(sqlite.configure(elsewhere) if engine.dialect.name == "sqlite" else elsewhere)
    with world.memory.relay(engine):
        say(other, a="x")
        eventually(lambda: len(world.index.scan(None, 5)) == 1)
    other.engine.dispose()


def test_the_thread_survives_failures(engine: Engine) -> None:
    """The index goes down and comes up again."""
    index = Spy()
    index.refuse = lambda point: DeliveryRetryable("down")
    world = World(engine, index)
    with world.memory.relay(engine, policy=RetryPolicy(delay_s=0.01)):
        say(world, a="x")
        eventually(lambda: len(index.batches) > 2)
        index.refuse = lambda point: None
        eventually(lambda: len(index.scan(None, 5)) == 1)
    world.assert_in_step()


def test_no_transaction_is_open_during_an_index_call(engine: Engine) -> None:
    """There is none during an embedding either, so other transactions can write and VACUUM."""
    index = Spy()
    world = World(engine, index)
    held, open_during = connections_of_this_thread(engine), list[int]()
    index.refuse = lambda point: open_during.append(len(held))
    say(world, a="x")
    world.relay.drain()
    assert open_during == [0]


def test_in_memory_sqlite_is_delivered_by_drain_alone(tmp_path: Path) -> None:
    """There is one connection: start() refuses, drain() works, and drain() raises while a transaction is open."""
    from sqlalchemy.pool import StaticPool

    for options in ({"poolclass": StaticPool, "connect_args": {"check_same_thread": False}}, {}):
        engine = sqlite.configure(create_engine("sqlite://", **options))
        world = World(engine)
        with pytest.raises(MemstateError, match="Call drain"):
            world.relay.start()
        say(world, a="x")
        world.assert_in_step()
        with world.session() as session:
            session.add(Tag(name="b"))
            session.flush()
            with pytest.raises(MemstateError, match="a transaction is open"):
                world.relay.drain()
            session.commit()
        world.assert_in_step()
        engine.dispose()


def test_writers_are_not_starved_and_do_not_fail(sqlite_engine: Engine) -> None:
    """SQLite: several threads write while the relay delivers, and none gets 'database is locked'."""
    world = World(sqlite_engine)
    errors: list[BaseException] = []

    def write(worker: int) -> None:
        try:
            for n in range(25):
                with world.session() as session:
                    session.scalars(select(Tag).limit(1)).all()
                    session.add(Tag(name=f"w{worker}-{n}"))
                    session.commit()
        except BaseException as error:
            errors.append(error)

    with world.memory.relay(sqlite_engine):
        threads = [threading.Thread(target=write, args=(n,)) for n in range(3)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert errors == []
    world.assert_in_step()


def test_delivered_entries_are_forgotten_and_undelivered_kept(world: World) -> None:
    """The outbox stays small, and loses nothing."""
    from memstate_sa.relay.retention import forget_delivered

    say(world, a="x", b="y")
    world.relay.drain()
    world.relay.stop()
    say(world, c="z")
    with world.engine.begin() as connection:
        forget_delivered(connection)
        assert connection.scalars(select(outbox.c.key)).all() == ['["c"]']
    world.assert_in_step()


def test_ids_are_never_given_out_again(sqlite_engine: Engine) -> None:
    """Without AUTOINCREMENT, SQLite reuses the id of a deleted last row, which is below the cursor."""
    world = World(sqlite_engine)
    say(world, a="x")
    world.relay.drain()
    with sqlite_engine.begin() as connection:
        connection.execute(text("DELETE FROM memstate_outbox"))
    say(world, b="y")
    world.assert_in_step()


def test_an_index_is_a_vector_index() -> None:
    """The protocol is checkable at run time."""
    assert isinstance(Spy(), VectorIndex)


@pytest.mark.deep_on("sqlite")
def test_an_index_that_is_down_does_not_stop_the_others(engine: Engine) -> None:
    """The first of two indexes is unavailable. The second is still brought up to date."""
    down, up = Spy(), Spy()
    down.refuse = lambda point: DeliveryRetryable("down")
    app = make_app(engine, Tag, index={"down": down, "up": up}, text="meaning")
    with app.session() as session:
        session.add(Tag(name="a"))
        session.commit()
    relay = app.memory.relay(engine, policy=RetryPolicy(delay_s=0.01))
    with pytest.raises(DeliveryError, match="down"):
        relay.drain(timeout=2)
    assert [entry.id for entry in up.scan(None, 5)] == ['tag["a"]']
    down.refuse = lambda point: None
    relay.drain()
    assert [entry.id for entry in down.scan(None, 5)] == ['tag["a"]']
