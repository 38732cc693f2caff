"""Writes inside writes: listeners that flush, SAVEPOINTs in a commit, rows inserted again under an old snapshot."""

from __future__ import annotations

import uuid
from collections.abc import Callable
from typing import Any

import pytest
from sqlalchemy import Engine, event, insert, select, update
from sqlalchemy.dialects import postgresql
from sqlalchemy.exc import IntegrityError
from sqlalchemy.orm import DeclarativeBase, Mapped, Session, mapped_column, sessionmaker

from memstate_sa.db.tables import log, outbox, transaction
from memstate_sa.runtime import watching
from tests.support import Person, Tag, World
from tests.support.apps import make_app


class Base(DeclarativeBase):
    pass


class Point(Base):
    __tablename__ = "point"
    id: Mapped[int] = mapped_column(primary_key=True)
    text: Mapped[str]
    weight: Mapped[float]


class Plain(Base):
    __tablename__ = "plain"
    id: Mapped[int] = mapped_column(primary_key=True)
    text: Mapped[str]


def ops(engine: Engine) -> list[tuple[str, str]]:
    with engine.connect() as connection:
        return [(op, key) for op, key in connection.execute(select(log.c.op, log.c.key).order_by(log.c.id))]


# -- old snapshots -----------------------------------------------------------------------------------------------------


def by_upsert(session: Session) -> None:
    new = postgresql.insert(Tag).values(name="t", meaning="one")
    session.execute(new.on_conflict_do_update(index_elements=["name"], set_={"meaning": "one"}))


def by_flush(session: Session) -> None:
    session.get_one(Person, 1).about = "new"
    session.get_one(Tag, "other").meaning = "new"
    session.add(Tag(name="t", meaning="one"))


@pytest.mark.parametrize("level", ["REPEATABLE READ", "SERIALIZABLE"])
@pytest.mark.parametrize("write", [by_upsert, by_flush])
def test_a_row_inserted_again_under_an_old_snapshot_is_logged(
    postgres_engine: Engine, level: str, write: Callable[[Session], None]
) -> None:
    """Another transaction has deleted a row with the same key and content. This snapshot shows neither the delete nor
    its entry. It shows both the old and the new row.
    """
    world = World(postgres_engine)
    world.write(Person(id=1, name="ada", about="x"), Tag(name="t", meaning="one"), Tag(name="other", meaning="x"))
    old = sessionmaker(postgres_engine.execution_options(isolation_level=level))
    world.memory.attach(old)
    with old() as session:
        session.scalars(select(Tag.name)).all()
        with world.session() as other:
            other.delete(other.get_one(Tag, "t"))
            other.commit()
        with postgres_engine.connect() as connection:
            before = set(connection.scalars(select(outbox.c.id)))
        write(session)
        session.commit()
    assert [key for op, key in ops(postgres_engine)].count('["t"]') == 3
    with postgres_engine.connect() as connection:
        assert '["t"]' in connection.scalars(select(outbox.c.key).where(outbox.c.id.not_in(before))).all()
    world.assert_log_is_truth()
    assert world.memory.doctor(postgres_engine).healthy
    world.memory.close()


# -- listeners ---------------------------------------------------------------------------------------------------------


def test_a_flush_within_a_bulk_statement_is_logged(world: World) -> None:
    """A listener of the application, attached later, changes an object while the statement runs."""
    world.write(Person(id=1, name="ada", about="x"), Tag(name="t", meaning="one"))
    with world.session() as session:
        person = session.get_one(Person, 1)

        def flush(state: Any) -> None:
            if state.is_update:
                person.about = "by the listener"
                state.session.flush()

        event.listen(world.sessions.class_, "do_orm_execute", flush)
        session.execute(update(Tag).values(meaning="two"))
        session.commit()
        event.remove(world.sessions.class_, "do_orm_execute", flush)
    world.assert_log_is_truth()
    assert sorted(ops(world.engine)[2:]) == [("update", '["t"]'), ("update", "[1]")]


def test_a_listener_that_refuses_a_flush_leaves_nothing_behind(engine: Engine) -> None:
    """The application catches its own error and goes on, here with an untracked class."""
    app = make_app(engine, Point)
    app.write(Point(id=1, text="a", weight=1.5))

    def refuse(*_: Any) -> None:
        raise ValueError("not now")

    with app.session() as session:
        session.add(Plain(id=1, text="a"))
        session.commit()
        session.get_one(Point, 1).text = "b"
        event.listen(app.sessions.class_, "before_flush", refuse)
        with pytest.raises(ValueError, match="not now"):
            session.flush()
        event.remove(app.sessions.class_, "before_flush", refuse)
        session.execute(update(Plain).values(text="b"), execution_options={"autoflush": False})
        session.commit()
    assert ops(engine) == [("insert", "[1]"), ("update", "[1]")]
    app.assert_log_is_truth()


def test_a_savepoint_that_rolls_back_in_a_commit_keeps_the_labels(world: World) -> None:
    """A listener gets or creates a row. Labels and wake-up still belong to the transaction."""
    world.write(Tag(name="t", meaning="one"))

    def get_or_create(session: Session) -> None:
        with pytest.raises(IntegrityError), session.begin_nested():
            session.execute(insert(Tag).values(name="t", meaning="other"))
        session.add(Tag(name="new", meaning="one"))

    with world.session(actor="me") as session:
        session.get_one(Tag, "t")
        event.listen(world.sessions.class_, "before_commit", get_or_create)
        session.commit()
        event.remove(world.sessions.class_, "before_commit", get_or_create)
        assert world.memory.token(session) is not None
        assert [(c.op, c.actor) for c in world.memory.history(session, Tag, "new")] == [("insert", "me")]


def test_a_commit_with_an_open_savepoint_has_a_token(world: World) -> None:
    """The commit has a token, so that other transactions can wait for its delivery."""
    with world.session() as session:
        with session.begin():
            session.begin_nested()
            session.add(Tag(name="t", meaning="one"))
        assert world.memory.token(session) is not None
    assert ops(world.engine) == [("insert", '["t"]')]


def test_a_header_that_a_savepoint_took_back_is_written_again(world: World) -> None:
    """A listener of the commit writes in a SAVEPOINT, which rolls back after the header was written."""
    world.write(Tag(name="t", meaning="one"))

    def write(session: Session) -> None:
        savepoint = session.begin_nested()
        session.execute(update(Tag).values(meaning="two"))
        savepoint.rollback()
        session.execute(update(Tag).values(meaning="three"))

    with world.session(actor="me") as session:
        session.get_one(Tag, "t")
        event.listen(world.sessions.class_, "before_commit", write)
        session.commit()
        event.remove(world.sessions.class_, "before_commit", write)
    with world.engine.connect() as connection:
        assert connection.scalars(select(transaction.c.actor)).all() == ["me"]
    world.assert_log_is_truth()


# -- images ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("capture", ["session", "trigger"])
def test_after_an_undo_a_write_that_changes_nothing_is_no_entry(engine: Engine, capture: str) -> None:
    """Undo logs a row in the same form as a flush. A float has several forms."""
    app = make_app(engine, Point, capture=capture)
    app.write(Point(id=1, text="a", weight=1.5))
    with app.session() as session:
        session.get_one(Point, 1).weight = 2.5
        session.commit()
        app.memory.rollback(session)
        session.commit()
        session.execute(update(Point).values(weight=1.5))
        session.commit()
    assert [op for op, _ in ops(engine)] == ["insert", "update", "update"]
    app.assert_log_is_truth()


def test_a_watcher_does_not_outlive_its_memory(world: World) -> None:
    """The engine made by execution_options() is gone, but the dialect that it shared is still there."""
    sessions = sessionmaker(world.engine.execution_options(stream_results=False))
    world.memory.attach(sessions)
    with sessions() as session:
        session.get(Person, 1)
    watcher = world.memory._capture._guard.before_statement
    kind: Any = world.engine.dialect.execution_ctx_cls
    assert watcher in kind.watchers and issubclass(kind, watching._Watched)
    del sessions, session
    world.memory.close()
    assert watcher not in kind.watchers


def test_keys_are_made_for_the_database_of_their_table(sqlite_engine: Engine, postgres_engine: Engine) -> None:
    """A flush may begin with a table in another database, of an untracked class."""

    class Own(DeclarativeBase):
        pass

    class Elsewhere(Own):
        __tablename__ = "a_elsewhere"
        id: Mapped[int] = mapped_column(primary_key=True)
        text: Mapped[str]

    class Fact(Own):
        __tablename__ = "fact"
        id: Mapped[uuid.UUID] = mapped_column(primary_key=True)
        text: Mapped[str]

    app = make_app(sqlite_engine, Fact)
    Own.metadata.create_all(postgres_engine)
    key = uuid.uuid4()
    app.sessions.configure(binds={Elsewhere: postgres_engine, Fact: sqlite_engine})
    app.write(Elsewhere(id=1, text="a"), Fact(id=key, text="a"))
    with app.session() as session:
        session.get_one(Elsewhere, 1).text = session.get_one(Fact, key).text = "b"
        session.commit()
    assert [op for op, _ in ops(sqlite_engine)] == ["insert", "update"]
    app.assert_log_is_truth()
