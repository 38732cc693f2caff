"""Sessions and searches of a moment, compared with the rows of that moment."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Any, ClassVar

import pytest
from hypothesis import strategies as st
from sqlalchemy import JSON, Engine, FetchedValue, ForeignKey, create_engine, event, func, insert, select, update
from sqlalchemy.orm import (
    DeclarativeBase,
    Mapped,
    ORMExecuteState,
    Session,
    mapped_column,
    sessionmaker,
    with_loader_criteria,
)
from sqlalchemy.types import UserDefinedType

from memstate_sa import MemstateError, NotFound, sqlite
from memstate_sa.search.hits import cosine_distance
from tests.support import PATIENCE_S, Note, Person, Tag, World, explore, sizes
from tests.support.apps import make_app

pytestmark = pytest.mark.sa20


def commit(world: World, session: Session) -> str:
    session.commit()
    return world.memory.token(session) or ""


def everything(session: Session) -> dict[str, Any]:
    """All rows through the mapper, with relationships."""
    people = session.scalars(select(Person).order_by(Person.id)).all()
    tags = session.scalars(select(Tag).order_by(Tag.name)).all()
    return {
        "people": [
            (p.id, p.name, p.about, [(n.number, n.content, dict(n.data or {})) for n in p.notes]) for p in people
        ],
        "tags": [(t.name, t.meaning, t.person.name if t.person else None) for t in tags],
        "count": session.scalar(select(func.count()).select_from(Note)),
    }


def test_every_moment_is_as_it_was(world: World) -> None:
    moments: list[tuple[str, datetime, dict[str, Any]]] = []
    with world.session() as session:

        def remember() -> None:
            tx = commit(world, session)
            moments.append((tx, datetime.now(UTC), everything(session)))

        session.add(
            Person(id=1, name="ann", about="tea", notes=[Note(topic="t", number=1, content="x", data={"a": 1})])
        )
        session.add(Tag(name="red", person_id=None))
        remember()
        person = session.get_one(Person, 1)
        person.notes[0].data = {"a": [1, None]}
        person.tags.append(session.get_one(Tag, "red"))
        session.add(Person(id=2, name="ben\x00" if world.engine.dialect.name == "sqlite" else "ben", about=None))
        remember()
        session.execute(update(Person).values(about="bulk"))
        remember()
        session.delete(person)
        remember()
    for tx, at, content in moments:
        for moment in (tx, at):
            with world.memory.as_of_session(world.engine, moment) as past:
                assert everything(past) == content
    with world.session() as session:
        assert everything(session) == moments[-1][2]
    world.assert_in_step()


def test_rows_older_than_their_history_are_there(world: World) -> None:
    with world.engine.begin() as connection:
        connection.execute(insert(Tag.__table__), [{"name": n, "meaning": "old"} for n in ("changed", "never")])
    before = datetime.now(UTC)
    with world.session() as session:
        session.get_one(Tag, "changed").meaning = "new"
        session.commit()
    with world.memory.as_of_session(world.engine, before) as past:
        assert dict(past.execute(select(Tag.name, Tag.meaning)).all()) == {"changed": "old", "never": "old"}


def test_the_past_is_read_only(world: World) -> None:
    with world.session() as session:
        session.add(Tag(name="red"))
        tx = commit(world, session)
    with world.memory.as_of_session(world.engine, tx) as past:
        past.get_one(Tag, "red").meaning = "changed"
        with pytest.raises(MemstateError, match="this Session shows the past"):
            past.commit()
        past.expire_all()
        with pytest.raises(MemstateError, match="this Session shows the past"):
            past.execute(update(Tag).values(meaning="x"), execution_options={"synchronize_session": False})
    world.assert_in_step()


def test_writers_are_not_waited_for(world: World) -> None:
    with world.session() as session:
        session.add(Tag(name="red", meaning="first"))
        tx = commit(world, session)
        with world.memory.as_of_session(world.engine, tx) as past:
            assert past.get_one(Tag, "red").meaning == "first"
            session.get_one(Tag, "red").meaning = "second"
            session.commit()
            past.expire_all()
            assert past.get_one(Tag, "red").meaning == "first"
        assert session.get_one(Tag, "red").meaning == "second"
    world.assert_in_step()


def test_past_session_shows_only_the_named_classes(world: World) -> None:
    with world.session() as session:
        session.add_all([Tag(name="red"), Person(id=1, name="ann")])
        tx = commit(world, session)
        session.add_all([Tag(name="blue"), Person(id=2, name="ben")])
        session.commit()
    with world.memory.as_of_session(world.engine, tx, [Tag]) as past:
        assert past.scalars(select(Tag.name)).all() == ["red"]
        assert sorted(past.scalars(select(Person.id))) == [1, 2]


def test_invalid_moments_are_refused(world: World) -> None:
    with pytest.raises(NotFound), world.memory.as_of_session(world.engine, "nothing"):
        pass
    with pytest.raises(MemstateError, match="aware"), world.memory.as_of_session(world.engine, datetime.now()):  # noqa: DTZ005
        pass
    with (
        pytest.raises(MemstateError, match="not tracked"),
        world.memory.as_of_session(world.engine, datetime.now(UTC), [World]),
    ):
        pass


@pytest.mark.parametrize("on", ["the application's class", "every Session"])
def test_the_applications_criteria_hold_in_the_past(world: World, on: str) -> None:
    """A listener shows each tenant its own rows. Hidden rows take no places among the hits."""

    class Scoped(Session):
        pass

    def scope(state: ORMExecuteState) -> None:
        if "tenant" in state.session.info:
            own = with_loader_criteria(Person, Person.name == state.session.info["tenant"])
            state.statement = state.statement.options(own)

    sessions = sessionmaker(world.engine, class_=Scoped)
    world.memory.attach(sessions)
    with sessions() as session:
        session.add_all([Person(name=name, about=f"tea {n}") for n in range(4) for name in ("ann", "ben")])
        tx = commit(world, session)
    target = Session if on == "every Session" else Scoped
    event.listen(target, "do_orm_execute", scope)
    try:
        with sessions(info={"tenant": "ben"}) as session:
            for moment in (None, tx):
                hits = world.memory.search(session, "tea", Person, limit=3, as_of=moment)
                assert [hit.fact.name for hit in hits] == ["ben"] * 3
    finally:
        event.remove(target, "do_orm_execute", scope)


def test_a_search_in_the_past_takes_no_connection_of_the_applications(world: World) -> None:
    """The searching Session holds one connection. If it waited for a second, a full pool of such Sessions would wait
    for ever.
    """
    narrow = sqlite.configure(create_engine(world.engine.url, pool_size=1, max_overflow=0))
    with world.sessions(bind=narrow) as session:
        session.add(Person(id=1, name="ann", about="tea"))
        tx = commit(world, session)
        session.get_one(Person, 1).about = "coffee"
        session.flush()
        assert [hit.fact.about for hit in world.memory.search(session, "tea", Person, as_of=tx)] == ["tea"]
    narrow.dispose()


words = st.sampled_from(["tea in the morning", "rain at night", "a blue bicycle", "sushi at noon", "", "  "])
steps_of_people = st.lists(st.tuples(st.integers(1, 5), words | st.none()), min_size=1, max_size=8)


@pytest.mark.timeout(PATIENCE_S)
@pytest.mark.parametrize("examples", sizes(5, 40))
def test_search_as_of_is_brute_force_over_the_replayed_rows(world: World, examples: int) -> None:
    @explore(examples, steps=steps_of_people, query=words)
    def _holds(steps: Any, query: str) -> None:
        with world.session() as session:
            for person in session.scalars(select(Person)).all():
                session.delete(person)
            session.commit()
            moments = []
            for key, about in steps:
                found = session.get(Person, key)
                if found is None:
                    session.add(Person(id=key, name="p", about=about))
                elif about is None:
                    session.delete(found)
                else:
                    found.about = about
                tx = commit(world, session)
                rows = session.execute(select(Person.id, Person.about)).all()
                moments.append((tx, {id_: about for id_, about in rows if about and about.strip()}))
            vector = world.embedder.embed([query])[0]
            for tx, texts in moments:
                expected = {
                    key: cosine_distance(vector, world.embedder.embed([words])[0]) for key, words in texts.items()
                }
                hits = world.memory.search(session, query, Person, limit=3, as_of=tx)
                assert [hit.fact.about for hit in hits] == [texts[hit.fact.id] for hit in hits]
                assert [round(hit.distance, 6) for hit in hits] == [round(d, 6) for d in sorted(expected.values())[:3]]
                some = world.memory.search(session, query, select(Person).where(Person.id > 2), as_of=tx)
                assert {hit.fact.id for hit in some} == {key for key in texts if key > 2}


def test_rows_of_other_classes_are_as_they_are_now(engine: Engine) -> None:
    """Single-table inheritance and a joined base class have the present rows of untracked classes."""

    class Local(DeclarativeBase):
        pass

    class Animal(Local):
        __tablename__ = "animal"
        id: Mapped[int] = mapped_column(primary_key=True)
        kind: Mapped[str | None]
        data: Mapped[dict[str, Any] | None] = mapped_column(JSON)
        __mapper_args__: ClassVar[dict[str, Any]] = {"polymorphic_on": "kind", "polymorphic_identity": "animal"}

    class Cat(Animal):
        __mapper_args__: ClassVar[dict[str, Any]] = {"polymorphic_identity": "cat"}

    class Dog(Animal):
        __tablename__ = "dog"
        id: Mapped[int] = mapped_column(ForeignKey("animal.id"), primary_key=True)
        trick: Mapped[str]
        __mapper_args__: ClassVar[dict[str, Any]] = {"polymorphic_identity": "dog"}

    class Poodle(Dog):
        __mapper_args__: ClassVar[dict[str, Any]] = {"polymorphic_identity": "poodle"}

    Local.metadata.create_all(engine)
    with engine.begin() as connection:
        connection.execute(insert(Animal.__table__).values(id=9))  # of no class
    for model in (Cat, Dog, Poodle):
        app = make_app(engine, model, text=None, entity=model.__name__)

        def rows(session: Session) -> dict[str, Any]:
            found = {one.id: (one.data, type(one)) for one in session.scalars(select(Animal).where(Animal.id < 9))}
            tricks = dict(session.execute(select(Dog.id, Dog.trick)).all())
            return {"animals": found, "tricks": tricks, "all": session.scalar(select(func.count(Animal.id)))}

        with app.session() as session:
            session.add(Animal(id=1, data={"a": [1]}))
            session.add(Cat(id=2, data={"b": "'"}))
            session.add_all([Dog(id=3, trick="sits"), Poodle(id=4, trick="lies")])
            session.flush()
            then = max(app.memory.history(session, model), key=lambda change: change.id).tx
            before = rows(session)
            session.commit()
            session.expunge_all()
            for one in session.scalars(select(model)):
                session.delete(one)
            session.commit()
        with app.memory.as_of_session(engine, then) as past:
            assert rows(past) == before
        with app.session() as session:
            for one in session.scalars(select(Animal).where(Animal.id < 9)):
                session.delete(one)
            session.commit()
        app.memory.close()


def test_row_of_another_class_now_is_shown_as_it_was(engine: Engine) -> None:
    """It was of the tracked class then, so it appears once, with its old values."""

    class Local(DeclarativeBase):
        pass

    class Animal(Local):
        __tablename__ = "animal"
        id: Mapped[int] = mapped_column(primary_key=True)
        kind: Mapped[str]
        __mapper_args__: ClassVar[dict[str, Any]] = {"polymorphic_on": "kind", "polymorphic_identity": "animal"}

    class Dog(Animal):
        __mapper_args__: ClassVar[dict[str, Any]] = {"polymorphic_identity": "dog"}

    app = make_app(engine, Dog, text=None)
    with app.session() as session:
        session.add(Dog(id=1))
        session.commit()
        [added] = app.memory.history(session, Dog)
    with engine.begin() as connection:
        connection.execute(update(Animal.__table__).values(kind="animal"))
    with app.memory.as_of_session(engine, added.tx) as past:
        assert [type(one) for one in past.scalars(select(Animal))] == [Dog]
    app.memory.close()


class XID(UserDefinedType[str]):
    """PostgreSQL's type of transaction ids."""

    cache_ok = True

    def get_col_spec(self, **_: Any) -> str:
        return "xid"


def test_system_column_is_shown_in_the_past(postgres_engine: Engine) -> None:
    """The past shows it as SQLAlchemy does for ``version_id_col``. A table that stands in for another has it, too."""

    class Local(DeclarativeBase):
        pass

    class Thing(Local):
        __tablename__ = "thing"
        id: Mapped[int] = mapped_column(primary_key=True)
        text: Mapped[str]
        xmin: Mapped[str] = mapped_column("xmin", XID, system=True, server_default=FetchedValue())
        __mapper_args__: ClassVar[dict[str, Any]] = {"version_id_col": xmin, "version_id_generator": False}

    app = make_app(postgres_engine, Thing)
    with app.session() as session:
        session.add(Thing(id=1, text="one"))
        session.commit()
        [added] = app.memory.history(session, Thing)
        session.get_one(Thing, 1).text = "two"
        session.commit()
    with app.memory.as_of_session(postgres_engine, added.tx) as past:
        assert past.get_one(Thing, 1).text == "one"
    app.memory.close()
