"""Entries for a key without a row, beside a transaction that adds the row: the log ends like the table."""

from __future__ import annotations

import io
from collections.abc import Callable
from typing import Any

import pytest
from sqlalchemy import Engine, create_engine, delete, insert, select, text, update
from sqlalchemy.exc import DBAPIError

from memstate_sa import ConflictError
from memstate_sa.db.tables import log
from memstate_sa.log import absent_keys
from tests.support import Person, Tag, World, beside

pytestmark = pytest.mark.sa20
both_ways = pytest.mark.parametrize("capture", ["session", "trigger"])
any_isolation = pytest.mark.parametrize("isolation", ["READ COMMITTED", "REPEATABLE READ"])


@pytest.fixture
def patience(monkeypatch: pytest.MonkeyPatch) -> None:
    """Wait long, because a busy machine may end the other transaction late."""
    monkeypatch.setattr(absent_keys, "LOCK_WAIT_S", 60.0)


def is_erased(world: World, content: str = "secret") -> bool:
    with world.session() as session:
        images = session.connection().scalars(select(log.c.image)).all()
        return content not in str(images) and content not in str(world.rows(Person, session))


def add(world: World, key: int = 5, about: str = "secret") -> None:
    with world.session() as session:
        session.add(Person(id=key, name="n", about=about))
        session.commit()


def remove(world: World, key: int = 5) -> None:
    with world.session() as session:
        session.delete(session.get_one(Person, key))
        session.commit()


def erasing(world: World, isolation: str) -> Callable[[], bool]:
    """A function that erases person 5 under a snapshot taken now. It returns False if it was refused."""
    session = world.sessions(bind=world.engine.execution_options(isolation_level=isolation))
    session.execute(select(Tag)).all()

    def erase() -> bool:
        with session:
            try:
                world.memory.erase(session, Person, 5)
                session.commit()
            except (ConflictError, DBAPIError):
                return False
            return True

    return erase


@both_ways
@any_isolation
@pytest.mark.parametrize("ending", ["commit", "rollback"])
def test_erase_waits_for_a_row_that_is_being_added(
    postgres_engine: Engine, capture: Any, isolation: str, ending: str, patience: None
) -> None:
    """The same kind: upserts, COPY, text SQL that triggers log, and an undo that brings the row back."""
    world = World(postgres_engine, capture=capture)
    add(world, about="old")
    remove(world)
    with world.session() as other:
        other.add(Person(id=5, name="n", about="new"))
        other.flush()
        with beside(postgres_engine, erasing(world, isolation)) as erased:
            assert not erased.done(), erased.exception()
            getattr(other, ending)()
            done = erased.result(60)
    assert done is (isolation == "READ COMMITTED" or ending == "rollback")
    assert not done or (is_erased(world, "old") and is_erased(world, "new"))
    world.assert_in_step()


@pytest.mark.parametrize("isolation", ["REPEATABLE READ", "SERIALIZABLE"])
@pytest.mark.parametrize("stays", [True, False])
def test_erase_in_an_old_snapshot_is_refused(
    postgres_engine: Engine, isolation: str, stays: bool, patience: None
) -> None:
    """It could not redact a row that was added after the snapshot, or the history of such a row."""
    world = World(postgres_engine)
    add(world, about="old")
    remove(world)
    erase = erasing(world, isolation)
    add(world)
    if not stays:
        remove(world)
    assert not erase()
    world.assert_in_step()


@any_isolation
def test_erase_after_its_own_delete_waits_for_no_writer(
    postgres_engine: Engine, isolation: str, patience: None
) -> None:
    """No other transaction can add the row before the end, so other writers of the table are not waited for."""
    world = World(postgres_engine)
    add(world)
    with (
        world.session() as other,
        world.sessions(bind=postgres_engine.execution_options(isolation_level=isolation)) as session,
    ):
        other.add(Person(id=6, name="other"))
        other.flush()
        session.execute(delete(Person).where(Person.id == 5))
        world.memory.erase(session, Person, 5)
        session.commit()
        other.commit()
    assert is_erased(world)
    world.assert_in_step()


def test_erase_is_refused_while_a_writer_stays_open(postgres_engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    """The error says so, and nothing is written. The same holds for a writer that waits for the erasing transaction."""
    monkeypatch.setattr(absent_keys, "LOCK_WAIT_S", 0.1)
    world = World(postgres_engine)
    add(world)
    remove(world)
    with world.session() as other, world.session() as session:
        other.add(Person(id=6, name="other"))
        other.flush()
        with pytest.raises(ConflictError, match="Another transaction is writing to the table"):
            world.memory.erase(session, Person, 5)
        session.commit()
        other.commit()
    assert not is_erased(world)
    world.assert_in_step()


def test_erase_is_refused_when_the_writer_waits_for_it(postgres_engine: Engine, patience: None) -> None:
    world = World(postgres_engine)
    add(world)
    remove(world)
    add(world, 7, "x")
    session = world.session()
    session.execute(update(Person).where(Person.id == 7).values(about="y"))

    def write() -> None:
        with world.session() as other:
            other.execute(insert(Person).values(id=5, name="n", about="new"))
            other.execute(update(Person).where(Person.id == 7).values(about="z"))
            other.commit()

    with beside(postgres_engine, write) as written:
        with session, pytest.raises(ConflictError, match="Another transaction is writing to the table"):
            world.memory.erase(session, Person, 5)
        written.result(60)
    world.assert_in_step()


@both_ways
@any_isolation
def test_erase_waits_for_an_undo_of_the_deletion(
    postgres_engine: Engine, capture: Any, isolation: str, patience: None
) -> None:
    world = World(postgres_engine, capture=capture)
    add(world)
    remove(world)
    with world.session() as other:
        world.memory.rollback(other)
        with beside(postgres_engine, erasing(world, isolation)) as erased:
            assert not erased.done(), erased.exception()
            other.commit()
            done = erased.result(60)
    assert done is (isolation == "READ COMMITTED")
    assert not done or is_erased(world)
    world.assert_in_step()


@both_ways
@any_isolation
@pytest.mark.parametrize("on_conflict", ["raise", "force"])
@pytest.mark.parametrize("there", [True, False])
def test_undo_waits_for_an_erasure(
    postgres_engine: Engine, capture: Any, isolation: str, on_conflict: Any, there: bool, patience: None
) -> None:
    """An erased fact does not come back, even if the undo read it earlier."""
    world = World(postgres_engine, capture=capture)
    add(world)
    with world.session() as session:
        if there:
            session.get_one(Person, 5).about = "other"
            session.commit()
        else:
            session.delete(session.get_one(Person, 5))
            session.commit()
        tx = world.memory.token(session)
    undoing = world.sessions(bind=postgres_engine.execution_options(isolation_level=isolation))
    undoing.execute(select(Tag)).all()

    def undo() -> None:
        with undoing:
            try:
                world.memory.rollback(undoing, tx=tx, on_conflict=on_conflict)
                undoing.commit()
            except (ConflictError, DBAPIError):
                pass

    with world.session() as session:
        world.memory.erase(session, Person, 5)
        with beside(postgres_engine, undo) as undone:
            assert not undone.done(), undone.exception()
            session.commit()
            undone.result(60)
    assert is_erased(world)
    world.assert_in_step()


@both_ways
@pytest.mark.parametrize("isolation", ["READ COMMITTED", "REPEATABLE READ"])
def test_undo_of_an_insert_waits_for_the_next_one(
    postgres_engine: Engine, capture: Any, isolation: str, patience: None
) -> None:
    """The row is gone, so a forced undo logs a deletion. It must not be the last entry of a row that another adds."""
    world = World(postgres_engine, capture=capture)
    with world.session() as session:
        session.add(Person(id=5, name="n", about="first"))
        session.commit()
        tx = world.memory.token(session)
    remove(world)

    def undo() -> None:
        with world.sessions(bind=postgres_engine.execution_options(isolation_level=isolation)) as session:
            try:
                world.memory.rollback(session, tx=tx, on_conflict="force")
                session.commit()
            except ConflictError:
                pass

    with world.session() as other:
        other.add(Person(id=5, name="n", about="second"))
        other.flush()
        with beside(postgres_engine, undo) as undone:
            assert not undone.done(), undone.exception()
            other.commit()
            undone.result(60)
    world.assert_in_step()


@both_ways
@pytest.mark.parametrize("engine_isolation", ["READ COMMITTED", "SERIALIZABLE"])
def test_doctor_waits_for_a_row_that_is_being_added(
    postgres_engine: Engine, capture: Any, engine_isolation: str, patience: None
) -> None:
    """Two rows are gone, and one comes again. Only the other one is logged as deleted."""
    engine = create_engine(postgres_engine.url, isolation_level=engine_isolation)
    world = World(engine, capture=capture)
    add(world, 5)
    add(world, 6)
    with engine.begin() as connection:
        connection.exec_driver_sql("SET LOCAL session_replication_role = replica")
        connection.exec_driver_sql("DELETE FROM person")
    with world.sessions(bind=postgres_engine) as other:
        other.add(Person(id=5, name="n", about="new"))
        other.flush()
        with beside(engine, lambda: world.memory.doctor(engine, repair=True)) as found:
            assert not found.done(), found.exception()
            other.commit()
            assert found.result(60).gone == [("person", 5), ("person", 6)]
    world.assert_in_step()
    engine.dispose()


def test_doctor_leaves_a_key_for_later_while_a_writer_stays_open(
    postgres_engine: Engine, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(absent_keys, "LOCK_WAIT_S", 0.1)
    world = World(postgres_engine)
    add(world, 5)
    with postgres_engine.begin() as connection:
        connection.exec_driver_sql("DELETE FROM person")
    with world.session() as other:
        other.add(Person(id=5, name="n", about="new"))
        other.flush()
        assert world.memory.doctor(postgres_engine, repair=True).gone == [("person", 5)]
        other.commit()
    assert "Repair again" in caplog.text
    world.assert_in_step()


@both_ways
@pytest.mark.parametrize("ending", ["commit", "rollback"])
def test_import_waits_for_a_row_that_is_being_added(
    sqlite_engine: Engine, postgres_engine: Engine, capture: Any, ending: str, patience: None
) -> None:
    """The key is deleted at the end of the file, so the import itself would add no row."""
    source = World(sqlite_engine)
    add(source)
    remove(source)
    file = io.StringIO()
    source.memory.export_facts(sqlite_engine, file)
    file.seek(0)
    world = World(postgres_engine, capture=capture)

    def import_file() -> bool:
        try:
            world.memory.import_facts(postgres_engine, file)
        except ConflictError:
            return False
        return True

    with world.session() as other:
        other.add(Person(id=5, name="n", about="mine"))
        other.flush()
        with beside(postgres_engine, import_file) as taken:
            assert not taken.done(), taken.exception()
            getattr(other, ending)()
            assert taken.result(60) is (ending == "rollback")
    world.assert_in_step()


def test_keys_are_held_by_one_lock_where_they_are_many(
    postgres_engine: Engine, monkeypatch: pytest.MonkeyPatch, patience: None
) -> None:
    """Thousands of single locks would use up PostgreSQL's lock memory."""
    monkeypatch.setattr(absent_keys, "_MOST_KEYS", 2)
    world = World(postgres_engine)
    for key in (5, 6, 7):
        add(world, key)
    with world.session() as session:
        session.execute(delete(Person))
        session.commit()
    locks = text("SELECT objid FROM pg_locks WHERE locktype = 'advisory' AND pid = pg_backend_pid()")
    with world.session() as session:
        world.memory.rollback(session)
        assert len(session.connection().execute(locks).all()) == 1
        with beside(postgres_engine, erasing(world, "READ COMMITTED")) as erased:
            assert not erased.done(), erased.exception()
            session.commit()
            assert erased.result(60)
    world.assert_in_step()
