"""Keys whose entries a process remembers: their rows change without a look before."""

from __future__ import annotations

from collections.abc import Iterator
from datetime import timedelta

import pytest
from sqlalchemy import Engine, delete, insert, select

from memstate_sa import ConflictError, metadata
from memstate_sa.capture.append_only import rewriting
from memstate_sa.capture.known_keys import KnownKeys
from memstate_sa.db.tables import log
from memstate_sa.log.changes import replay
from memstate_sa.relay.retention import fold_log
from tests.support import Person, World
from tests.support.engines import make_engine
from tests.support.statements import statements


def looks(sent: list[str]) -> list[str]:
    return [statement for statement in sent if statement.startswith("SELECT") and "memstate_log" in statement]


def change(world: World, about: str, key: int = 1) -> list[str]:
    """Change a row in its own transaction. Returns the looks that were sent."""
    with world.session() as session:
        person = session.get_one(Person, key)
        person.about = about
        seen = statements(world.engine)
        session.commit()
    return looks(seen)


@pytest.fixture
def hot(world: World) -> World:
    """A world that remembers row 1: a look found its entry, and that transaction committed."""
    world.write(Person(id=1, name="ada", about="one"))
    assert change(world, "two")
    return world


def test_a_row_whose_entry_is_known_needs_no_look(hot: World) -> None:
    """Its changes are logged as before. This test counts the statements."""
    assert change(hot, "three") == []
    with hot.session() as session:
        session.delete(session.get_one(Person, 1))
        session.flush()  # SQLAlchemy looks for rows that refer to it
        session.rollback()
        person = session.get_one(Person, 1)
        seen = statements(hot.engine)
        person.about = "three"  # its current value
        session.commit()
        assert seen == []
        session.delete(session.get_one(Person, 1))
        seen = statements(hot.engine)
        session.commit()
        assert looks(seen) == []
        assert len([s for s in seen if "memstate_" in s]) == (1 if hot.engine.dialect.name == "postgresql" else 2)
        changes = hot.memory.history(session, Person)
    assert [(c.op, c.after and c.after["about"]) for c in changes] == [
        ("insert", "one"),
        ("update", "two"),
        ("update", "three"),
        ("delete", None),
    ]


def test_uncommitted_entries_are_not_remembered(world: World) -> None:
    """A look sees entries of its own transaction. They are gone if it or a SAVEPOINT of it rolls back."""
    with world.engine.begin() as connection:
        connection.execute(insert(Person.__table__), {"id": 1, "name": "ada", "about": "old"})
    with world.session() as session:
        person = session.get_one(Person, 1)
        with pytest.raises(RuntimeError), session.begin_nested():
            person.about = "first"
            session.flush()
            person.about = "second"
            session.flush()
            raise RuntimeError
        session.add(Person(id=2, name="bob", about="x"))
        session.commit()
        person = session.get_one(Person, 1)
        person.about = "first"
        session.flush()
        person.about = "second"
        session.flush()
        session.rollback()
    assert change(world, "new")
    with world.session() as session:
        assert [c.op for c in world.memory.history(session, Person, 1)] == ["baseline", "update"]


def test_a_part_of_the_applications_own_transaction_is_not_remembered(world: World) -> None:
    """The Session uses a connection whose transaction the application ends. Test suites do this, and roll it back."""
    with world.engine.begin() as connection:
        connection.execute(insert(Person.__table__), {"id": 1, "name": "ada", "about": "old"})
    with world.engine.connect() as connection, connection.begin() as outer:
        with world.sessions(bind=connection, join_transaction_mode="create_savepoint") as session:
            for about in ("first", "second"):
                session.get_one(Person, 1).about = about
                session.commit()
        outer.rollback()
    assert change(world, "new")
    with world.session() as session:
        assert [c.op for c in world.memory.history(session, Person, 1)] == ["baseline", "update"]


def test_a_log_that_this_engine_drops_is_a_new_one(hot: World) -> None:
    """Test suites do this. The row is older than the new log, so it gets a baseline."""
    with hot.engine.begin() as connection:
        metadata.drop_all(connection)
    hot.memory.create_tables(hot.engine)
    assert change(hot, "three")
    with hot.session() as session:
        assert [c.op for c in hot.memory.history(session, Person, 1)] == ["baseline", "update"]


@pytest.fixture
def elsewhere(world: World) -> Iterator[Engine]:
    """The engine of another process, as far as this world can tell."""
    engine = make_engine(world.engine.url)
    yield engine
    engine.dispose()


def require_one_refusal(world: World, about: str, ops: list[str]) -> None:
    with pytest.raises(ConflictError, match=r"The log has lost entries of person.*Run the transaction again"):
        change(world, about)
    change(world, about)
    with world.session() as session:
        changes = world.memory.history(session, Person, 1)
    assert [c.op for c in changes] == ops
    assert {key: dict(row) for (_, key), row in replay(changes).items()} == world.rows(Person)


def test_a_log_that_lost_entries_refuses_one_transaction(hot: World, elsewhere: Engine) -> None:
    """The log was emptied or restored by another program. Every change is logged after its baseline."""
    with elsewhere.begin() as connection, rewriting(connection):
        connection.execute(delete(log))
    require_one_refusal(hot, "three", ["baseline", "update"])


def test_a_row_without_entries_left_refuses_one_transaction(hot: World, elsewhere: Engine) -> None:
    """The row was deleted and its entries folded away. Then a program added it again without the log."""
    with hot.session() as session:
        session.delete(session.get_one(Person, 1))
        session.commit()
    with elsewhere.begin() as connection:
        fold_log(connection, timedelta(0), 0)
        assert connection.scalars(select(log.c.id)).all() == []
        connection.execute(insert(Person.__table__), {"id": 1, "name": "ada", "about": "again"})
    require_one_refusal(hot, "three", ["baseline", "update"])


def test_a_memory_that_was_closed_remembers_nothing(hot: World) -> None:
    """It cannot notice that the log was emptied while it was closed. An attached Session opens it again."""
    hot.memory.close()
    with hot.engine.begin() as connection, rewriting(connection):
        connection.execute(delete(log))
    assert change(hot, "three")
    with hot.session() as session:
        assert [c.op for c in hot.memory.history(session, Person, 1)] == ["baseline", "update"]


def test_an_erased_row_that_comes_back_is_logged(hot: World) -> None:
    with hot.session() as session:
        hot.memory.erase(session, Person, 1)
        session.commit()
    hot.write(Person(id=1, name="eve", about="new"))
    assert change(hot, "newer") == []
    with hot.session() as session:
        assert [c.op for c in hot.memory.history(session, Person, 1)][-2:] == ["insert", "update"]


def test_keys_are_bounded() -> None:
    """The most recently used keys are kept."""
    known = KnownKeys(limit=3)
    known.add({("e", (n,)): f"[{n}]" for n in range(3)})
    assert known.find("e", [(0,)]) == {(0,): "[0]"}
    known.add({("e", (3,)): "[3]"})
    assert known.find("e", [(0,), (2,), (3,)]) == {(0,): "[0]", (2,): "[2]", (3,): "[3]"}
    assert known.find("e", [(1,)]) is None
    assert known.find("e", [(0,), (1,)]) is None
    assert known.find("other", [(0,)]) is None
    known.clear()
    assert known.find("e", [(0,)]) is None
