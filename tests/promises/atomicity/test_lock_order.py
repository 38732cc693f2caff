"""Tracked Sessions do not deadlock where plain SQLAlchemy does not: they take only the locks of their statements.

Each test is a deadlock that has happened. The first session holds one row. The second session needs that row and
another. It must hold no lock while it waits, so that the first session can take the other row.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from typing import Any, ClassVar

import pytest
from sqlalchemy import Engine, Enum, ForeignKey, create_engine, event, insert, select, text, update
from sqlalchemy.dialects import postgresql
from sqlalchemy.orm import DeclarativeBase, Mapped, Session, mapped_column, sessionmaker

from memstate_sa import ConflictError, Memory
from memstate_sa.indexes import InMemoryIndex
from memstate_sa.log.changes import replay
from memstate_sa.testing import HashEmbedder
from tests.support import beside, in_threads

pytestmark = pytest.mark.sa20
Sessions = Callable[..., Session]
KEYS = ("a", "b")  # the order of Python and of the unit of work


class Base(DeclarativeBase):
    pass


class Note(Base):
    __tablename__ = "lock_note"
    id: Mapped[str] = mapped_column(primary_key=True)
    content: Mapped[str]


class Animal(Base):
    """Its table is last in the alphabet, its class first in the unit of work. PostgreSQL sorts b before a."""

    __tablename__ = "lock_zoo"
    id: Mapped[str] = mapped_column(Enum("b", "a", name="lock_key"), primary_key=True)
    kind: Mapped[str]
    name: Mapped[str]
    __mapper_args__: ClassVar = {"polymorphic_on": "kind", "polymorphic_identity": "animal"}


class Dog(Animal):
    __tablename__ = "lock_dog"
    id: Mapped[str] = mapped_column(ForeignKey(Animal.id), primary_key=True)
    trick: Mapped[str]
    __mapper_args__: ClassVar = {"polymorphic_identity": "dog"}


class Email(Base):
    __tablename__ = "lock_email"
    id: Mapped[int] = mapped_column(primary_key=True)
    address: Mapped[str]


@pytest.fixture
def memory(postgres_engine: Engine) -> Iterator[Memory]:
    """A Memory with rows that are older than tracking. A look precedes their first change."""
    Base.metadata.create_all(postgres_engine)
    with Session(postgres_engine) as session:
        for key in KEYS:
            session.add_all([Note(id=key, content="x"), Dog(id=key, name="x", trick="x")])
        session.commit()
    memory = Memory(InMemoryIndex(), embedder=HashEmbedder())
    memory.track(Note, text="content")
    memory.track(Animal, text="name")
    memory.track(Email, text="address", unique_by=("address",))
    memory.create_tables(postgres_engine)
    yield memory
    memory.close()


@pytest.fixture
def sessions(memory: Memory, postgres_engine: Engine) -> Sessions:
    sessions = sessionmaker(postgres_engine, autoflush=False)
    memory.attach(sessions)
    return sessions


def change(session: Session, *items: tuple[type[Any], str, str]) -> None:
    for instance, attribute in [(session.get_one(model, key), attribute) for model, key, attribute in items]:
        setattr(instance, attribute, f"{random.random()}")
    session.flush()


def interleave(
    sessions: Sessions,
    first: Callable[[Session], None],
    both: Callable[[Session], Any],
    second: Callable[[Session], None],
) -> None:
    """Run *first* and then *second* in one session, and *both* in another session that begins in between."""

    def run() -> None:
        with sessions() as session:
            both(session)
            session.commit()

    with sessions() as session:
        engine = session.get_bind()
        first(session)
        with beside(engine, run) as future:
            assert not future.done(), future.exception()
            session.connection().execute(text("SET LOCAL lock_timeout = '500ms'"))
            second(session)
            session.commit()
            future.result(60)


def assert_logged(memory: Memory, session: Session, *models: type[Any]) -> None:
    """Assert that the log's last images equal the rows."""
    for model in models:
        replayed = {key: row for (_, key), row in replay(memory.history(session, model)).items()}
        for instance in session.scalars(select(model)):
            if instance.id not in replayed:  # it has not changed
                continue
            row = {name.rpartition(".")[2]: value for name, value in replayed[instance.id].items()}
            assert row == {name: getattr(instance, name) for name in row}


@pytest.mark.parametrize("turned", [False, True])
def test_flush_of_two_classes_locks_as_the_unit_of_work(memory: Memory, sessions: Sessions, turned: bool) -> None:
    """The order is the same for every order of changes. Rows of one class are not all locked before the other's."""
    items = [(Animal, "a", "name"), (Note, "a", "content")]
    interleave(
        sessions,
        lambda session: change(session, items[0]),
        lambda session: change(session, *(reversed(items) if turned else items)),
        lambda session: change(session, items[1]),
    )
    with sessions() as session:
        assert_logged(memory, session, Note)


@pytest.mark.parametrize(("model", "attribute"), [(Note, "content"), (Dog, "trick")])
def test_flush_locks_strings_as_python_sorts_them(
    memory: Memory, sessions: Sessions, model: type[Any], attribute: str
) -> None:
    """An enum or a collation sorts differently. The same kind: other locks by key, in undo and bulk DML of joined
    classes.
    """
    first, second = ((model, key, attribute) for key in KEYS)
    interleave(
        sessions,
        lambda session: change(session, first),
        lambda session: change(session, second, first),
        lambda session: change(session, second),
    )


def test_flush_of_a_joined_class_locks_its_rows_when_it_comes_to_them(memory: Memory, sessions: Sessions) -> None:
    """A change of another part locks the fact's first row, but not before the rows of an earlier class."""
    order: list[str] = []

    def sent(conn: Any, cursor: Any, statement: str, *_: Any) -> None:
        if statement.startswith("UPDATE lock_") or "FOR NO KEY UPDATE" in statement:
            order.append(statement.partition("lock_")[2][:3])

    with sessions() as session:
        event.listen(session.connection(), "before_cursor_execute", sent)
        change(session, (Dog, "a", "trick"), (Note, "a", "content"), (Dog, "b", "trick"))
        session.commit()
    before_dogs = order.index("dog") - 1
    assert order[before_dogs] == "zoo" and order.count("zoo") == 1 and "not" in order


def test_parts_of_one_fact_that_two_sessions_change_are_both_logged(memory: Memory, sessions: Sessions) -> None:
    """Each changes another table. Plain SQLAlchemy would let both go on, and the last image would lack one change."""

    def run() -> None:
        with sessions() as session:
            change(session, (Dog, "a", "trick"))
            session.commit()

    with sessions() as session:
        change(session, (Dog, "a", "name"))
        with beside(session.get_bind(), run) as future:
            session.commit()
            future.result(60)
    with sessions() as session:
        session.get_one(Dog, "b").name = "logged"
        session.commit()
        assert_logged(memory, session, Dog)


@pytest.mark.parametrize("many", [False, True])
def test_bulk_update_of_a_part_locks_the_first_row_first(memory: Memory, sessions: Sessions, many: bool) -> None:
    def bulk(session: Session) -> None:
        if many:
            session.execute(update(Dog), [{"id": "a", "trick": "y"}])
        else:
            session.execute(update(Dog).where(Dog.id == "a").values(trick="y"))

    interleave(
        sessions,
        lambda session: change(session, (Dog, "a", "name")),
        bulk,
        lambda session: change(session, (Dog, "a", "trick")),
    )


def test_undo_locks_classes_in_the_order_of_a_flush(memory: Memory, sessions: Sessions) -> None:
    """Parents come first, then the order is by class name, not by table name."""
    items = [(Animal, "a", "name"), (Note, "a", "content")]
    with sessions() as session:
        change(session, *items)
        session.commit()
        tx = memory.token(session)
    assert tx is not None
    interleave(
        sessions,
        lambda session: change(session, items[0]),
        lambda session: memory.rollback(session, tx=tx, on_conflict="skip"),
        lambda session: change(session, items[1]),
    )
    with sessions() as session:
        assert_logged(memory, session, Animal, Note)


def test_upsert_locks_rows_in_the_order_of_its_values(memory: Memory, sessions: Sessions) -> None:
    """This holds even if the log does not know the rows, and the statement runs twice."""

    def upsert(*keys: str) -> Callable[[Session], Any]:
        statement = postgresql.insert(Note).values([{"id": key, "content": "y"} for key in keys])
        changed = statement.on_conflict_do_update(index_elements=["id"], set_={"content": statement.excluded.content})
        return lambda session: session.execute(changed)

    interleave(sessions, upsert("b"), upsert("b", "a"), upsert("a"))


def test_unique_values_are_claimed_in_one_order(memory: Memory, sessions: Sessions) -> None:
    """The order is that of the values, not of the rows. The second session then finds one value taken."""

    def add(*rows: tuple[int, str]) -> Callable[[Session], Any]:
        return lambda session: session.execute(insert(Email), [{"id": id_, "address": a} for id_, a in rows])

    with pytest.raises(ConflictError, match="same value"):
        interleave(sessions, add((1, "a@x")), add((2, "z@x"), (3, "a@x")), add((4, "z@x")))


def test_a_row_that_another_session_logs_first_has_one_baseline(memory: Memory, sessions: Sessions) -> None:
    """The look locks nothing, so its result may be old when the statement runs."""

    def run() -> None:
        with sessions() as session:
            change(session, (Note, "a", "content"))
            session.commit()

    with sessions() as session:
        change(session, (Note, "a", "content"))
        with beside(session.get_bind(), run) as future:
            assert not future.done(), future.exception()
            session.commit()
            future.result(60)
        changes = memory.history(session, Note, "a")
    assert [change.op for change in changes] == ["baseline", "update", "update"]
    assert [change.before for change in changes[1:]] == [change.after for change in changes[:-1]]


@pytest.mark.deep_on("trigger")
@pytest.mark.parametrize("capture", ["session", "trigger"])
def test_eight_threads_do_not_deadlock(postgres_engine: Engine, capture: Any) -> None:
    """Each flush changes two classes and several keys. A DeadlockDetected would be among the errors."""
    Base.metadata.create_all(postgres_engine)
    engine = create_engine(postgres_engine.url, pool_size=8)
    memory, sessions = Memory(InMemoryIndex(), embedder=HashEmbedder()), sessionmaker(engine, autoflush=False)
    memory.track(Note, text="content", capture=capture)
    memory.track(Email, text="address", capture=capture)
    memory.attach(sessions)
    memory.create_tables(engine)
    keys = [f"{letter}{n}" for letter in "abcd" for n in range(3)]
    with Session(engine) as session:
        session.execute(insert(Note), [{"id": key, "content": "x"} for key in keys])
        session.execute(insert(Email), [{"id": n, "address": "x"} for n in range(4)])
        session.commit()

    def work(thread: int) -> None:
        chance = random.Random(thread)
        for _ in range(25):
            with sessions() as session:
                notes = [(Note, key, "content") for key in chance.sample(keys, 3)]
                items = [*notes, (Email, chance.randrange(4), "address")]
                chance.shuffle(items)
                change(session, *items)
                session.commit()

    assert in_threads(8, work) == []
    with sessions() as session:
        assert_logged(memory, session, Note, Email)
    memory.close()
    engine.dispose()
