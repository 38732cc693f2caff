"""Capture by triggers: log and outbox have the writes of every program."""

from __future__ import annotations

from typing import Any

import pytest
from sqlalchemy import Engine, create_engine, select, text
from sqlalchemy.exc import IntegrityError

from memstate_sa.db.tables import trigger_context
from tests.support import Person, Tag, World

pytestmark = pytest.mark.sa20


@pytest.fixture
def world(engine: Engine) -> Any:
    made = World(engine, capture="trigger")
    yield made
    with engine.connect() as connection:
        assert connection.execute(select(trigger_context)).all() == []
    made.memory.close()


def ops(world: World, model: Any) -> list[tuple[str, Any]]:
    with world.session() as session:
        return [(change.op, change.key) for change in world.memory.history(session, model)]


def outside(world: World, *statements: str) -> None:
    """Run statements as another program, which does not know memstate_sa."""
    engine = create_engine(world.engine.url)
    with engine.begin() as connection:
        if engine.dialect.name == "sqlite":
            connection.execute(text("PRAGMA foreign_keys = ON"))
        for statement in statements:
            connection.execute(text(statement))
    engine.dispose()


def test_objects_are_logged_with_their_labels(world: World) -> None:
    """The unit of work inserts, updates and deletes. The entries have the labels of their transaction."""
    with world.session() as session:
        world.memory.annotate(session, actor="planner", session_id="s1")
        ada = Person(name="ada", about="likes tea")
        session.add_all([ada, Tag(name="t", person=ada)])
        session.commit()
        ada.about = "likes coffee"
        session.commit()
        session.delete(ada)
        session.commit()
        changes = world.memory.history(session, Person)
    assert [(change.op, change.after and change.after["about"]) for change in changes] == [
        ("insert", "likes tea"),
        ("update", "likes coffee"),
        ("delete", None),
    ]
    assert [(change.actor, change.session_id) for change in changes] == [("planner", "s1"), (None, None), (None, None)]
    world.assert_in_step()


def test_text_sql_of_a_session_has_its_labels(world: World) -> None:
    """Every writing statement on its connection has them."""
    with world.session() as session:
        world.memory.annotate(session, actor="planner")
        session.execute(text("INSERT INTO tag (name, meaning) VALUES ('a', 'one'), ('b', 'two')"))
        session.connection().execute(text("UPDATE tag SET meaning = 'three' WHERE name = 'a'"))
        session.commit()
        changes = world.memory.history(session, Tag)
        assert {change.actor for change in changes} == {"planner"}
        assert len({change.tx for change in changes}) == 1
        assert world.memory.token(session) == changes[0].tx
        assert len(world.memory.rollback(session)) == 3
        session.commit()
        assert session.scalars(select(Tag)).all() == []
    world.assert_in_step()


def test_writes_of_other_programs_are_logged(world: World) -> None:
    """Another program sends SQL directly to the database."""
    outside(
        world,
        "INSERT INTO person (id, name, about) VALUES (1, 'ada', 'likes tea'), (2, 'bob', 'it''s')",
        "UPDATE person SET about = 'likes coffee' WHERE id = 1",
        "DELETE FROM person WHERE id = 2",
    )
    assert ops(world, Person) == [("insert", 1), ("insert", 2), ("update", 1), ("delete", 2)]
    world.assert_in_step()
    with world.session() as session:
        world.memory.rollback(session, steps=10)
        session.commit()
        assert session.scalars(select(Person)).all() == []
    world.assert_in_step()


def test_writes_after_a_rolled_back_savepoint_keep_their_labels(world: World) -> None:
    """Later writes belong to the same transaction and have its labels."""
    with world.session() as session:
        world.memory.annotate(session, actor="planner")
        for end in ("rollback", "connection", "close"):
            savepoint = session.connection().begin_nested() if end == "connection" else session.begin_nested()
            session.execute(text("INSERT INTO tag (name, meaning) VALUES ('undone', 'x')"))
            savepoint.close() if end == "close" else savepoint.rollback()
            session.execute(text("INSERT INTO tag (name, meaning) VALUES (:name, 'x')"), {"name": end})
        session.commit()
        changes = world.memory.history(session, Tag)
    assert [(change.key, change.actor) for change in changes] == [
        ("rollback", "planner"),
        ("connection", "planner"),
        ("close", "planner"),
    ]
    world.assert_in_step()


def test_failed_statement_leaves_no_trigger_context(world: World) -> None:
    """On SQLite the transaction goes on. The next writer is not mistaken for the failed statement."""
    with world.session() as session:
        session.add(Tag(name="a"))
        session.commit()
        savepoint = session.begin_nested()
        with pytest.raises(IntegrityError):
            session.execute(text("INSERT INTO tag (name, meaning) VALUES ('a', 'twice')"))
        savepoint.rollback()
        session.execute(text("INSERT INTO tag (name, meaning) VALUES ('b', 'x')"))
        session.commit()
    outside(world, "INSERT INTO tag (name, meaning) VALUES ('c', 'x')")
    with world.session() as session:
        changes = world.memory.history(session, Tag)
    assert len({change.tx for change in changes}) == 3
    world.assert_in_step()
