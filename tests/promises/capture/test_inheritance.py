"""Joined and concrete inheritance: a fact is a row in several tables, or in one of several tables.

The expected rows are read table by table, independently of the project's code.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any, ClassVar

import pytest
import sqlalchemy as sa
from sqlalchemy import Engine, ForeignKey, delete, insert, select, text, update
from sqlalchemy.ext.declarative import ConcreteBase
from sqlalchemy.orm import DeclarativeBase, Mapped, Session, aliased, mapped_column, sessionmaker

from memstate_sa import ConflictError, Memory, MemstateError, UntrackedWrite
from memstate_sa.capture.append_only import rewriting
from memstate_sa.indexes import InMemoryIndex
from memstate_sa.log.changes import replay
from memstate_sa.testing import HashEmbedder
from tests.support import apps, assert_index_holds

pytestmark = pytest.mark.sa20


class Base(DeclarativeBase):
    pass


class Employee(Base):
    __tablename__ = "employee"
    id: Mapped[int] = mapped_column(primary_key=True)
    kind: Mapped[str] = mapped_column(sa.String(20))
    name: Mapped[str]
    boss_id: Mapped[int | None] = mapped_column(ForeignKey("employee.id"))
    __mapper_args__: ClassVar[dict[str, Any]] = {"polymorphic_on": "kind", "polymorphic_identity": "employee"}


class Engineer(Employee):
    __tablename__ = "engineer"
    id: Mapped[int] = mapped_column(ForeignKey("employee.id"), primary_key=True)
    skill: Mapped[str]
    name_of_tool: Mapped[str | None] = mapped_column("name")  # another table has a column of this name, too
    __mapper_args__: ClassVar[dict[str, Any]] = {"polymorphic_identity": "engineer"}


class Chief(Engineer):
    """Has a third table with nothing but a key."""

    __tablename__ = "chief"
    chief_id: Mapped[int] = mapped_column(ForeignKey("engineer.id"), primary_key=True)
    __mapper_args__: ClassVar[dict[str, Any]] = {"polymorphic_identity": "chief"}


class Writer(Employee):
    __tablename__ = "writer"
    id: Mapped[int] = mapped_column(ForeignKey("employee.id", onupdate="CASCADE"), primary_key=True)
    skill: Mapped[str]
    __mapper_args__: ClassVar[dict[str, Any]] = {"polymorphic_identity": "writer"}


class Intern(Writer):
    """Uses the table of its base class."""

    months: Mapped[int | None]
    __mapper_args__: ClassVar[dict[str, Any]] = {"polymorphic_identity": "intern"}


class Paper(Base):
    __tablename__ = "paper"
    id: Mapped[int] = mapped_column(primary_key=True)
    title: Mapped[str]


class Article(Paper):
    __tablename__ = "article"
    id: Mapped[int] = mapped_column(primary_key=True)
    title: Mapped[str]
    journal: Mapped[str]
    __mapper_args__: ClassVar[dict[str, Any]] = {"concrete": True}


JOINED = tuple(model.__table__ for model in (Employee, Engineer, Chief, Writer))


def skill(employee: Any) -> str:
    words = (employee.name, getattr(employee, "skill", None), getattr(employee, "months", None))
    return " ".join(str(word) for word in words if word)


class App(apps.App):
    def __init__(self, engine: Engine, *models: Any, text: Any = skill) -> None:
        super().__init__(engine, *(models or (Employee,)), foreign_keys=True, text=text)

    def prepare(self) -> None:
        with self.sessions() as session:
            session.add_all([Employee(name="eve"), Engineer(name="ada", skill="drills", name_of_tool="hammer")])
            session.flush()
            session.add_all([Chief(name="bob", skill="welds", boss_id=1), Writer(name="cid", skill="rhymes")])
            session.flush()
            session.add(Intern(name="dan", skill="copies", months=3, boss_id=3))
            session.commit()

    def images(self, *, of: Any = None) -> dict[Any, dict[str, Any]]:
        """The expected image of each fact."""
        found: dict[Any, dict[str, Any]] = {}
        with self.engine.connect() as connection:
            for table in JOINED:
                for row in connection.execute(select(table)).mappings():
                    prefix = "" if table is Employee.__table__ else f"{table.name}."
                    key = row[next(iter(table.primary_key)).name]
                    found.setdefault(key, {}).update({prefix + name: value for name, value in row.items()})
        return found if of is None else {key: row for key, row in found.items() if f"{of}.id" in row}

    def replayed(self, model: Any = Employee) -> dict[Any, dict[str, Any]]:
        with self.sessions() as session:
            return {key: dict(row) for (_, key), row in replay(self.memory.history(session, model)).items()}

    def assert_in_step(self) -> None:
        rows = self.images()
        assert self.replayed() == rows
        assert self.memory.doctor(self.engine).healthy
        self.memory.relay(self.engine).drain()
        texts = {}
        for key, row in rows.items():
            words = [row["name"], row.get("engineer.skill") or row.get("writer.skill") or "", row.get("writer.months")]
            texts[f"employee[{key}]"] = " ".join(str(word) for word in words if word)
        assert_index_holds(self.index, self.embedder, texts)
        assert self.memory.verify(self.engine).clean


def of_all_classes(session: Session) -> None:
    for employee in session.scalars(select(Employee)).all():
        employee.name += "!"
    session.get_one(Engineer, 2).skill = "saws"
    session.get_one(Writer, 5).skill = "prints"


def bulk_insert(session: Session) -> None:
    found = session.scalars(
        insert(Engineer).returning(Engineer), [{"name": "n1", "skill": "s1"}, {"name": "n2", "skill": "s2"}]
    ).all()
    assert [engineer.skill for engineer in found] == ["s1", "s2"]
    session.execute(insert(Intern), [{"name": "n3", "skill": "s3", "months": 1}])
    session.execute(insert(Employee).values(name="n4", kind="employee"))


def bulk_update(session: Session) -> None:
    assert session.execute(update(Engineer).where(Engineer.skill == "welds").values(skill="bolts")).rowcount == 1
    session.execute(update(Employee).where(Employee.id < 3).values(name="renamed"))
    session.execute(update(Writer), [{"id": 4, "skill": "sings", "name": "by key"}, {"id": 5, "skill": "hums"}])
    session.execute(update(Writer.__table__).where(Writer.__table__.c.id == 4).values(skill="shouts"))


def bulk_delete(session: Session) -> None:
    """The part of the row that SQLAlchemy leaves is still a fact."""
    session.execute(delete(Chief))
    session.execute(delete(Engineer.__table__).where(Engineer.__table__.c.id == 3))


FETCH = {"synchronize_session": "fetch"}

CELLS: dict[str, Callable[[Session], Any]] = {
    "add": lambda s: s.add_all([Chief(name="new", skill="new"), Intern(name="new", skill="new")]),
    "change in every table": of_all_classes,
    "change in one table": lambda s: setattr(s.get_one(Engineer, 3), "skill", "rivets"),
    "delete": lambda s: [s.delete(s.get_one(Employee, key)) for key in (5, 3, 2)],
    "primary key change": lambda s: setattr(s.get_one(Writer, 4), "id", 40),
    "merge": lambda s: s.merge(Intern(id=5, name="merged", skill="merged", months=9)),
    "insert(Model)": bulk_insert,
    "update(Model)": bulk_update,
    "delete(Model)": bulk_delete,
    "delete(Model), fetched": lambda s: s.execute(delete(Chief), execution_options=FETCH),
    "update(Model), fetched": lambda s: s.execute(update(Engineer).values(skill="x"), execution_options=FETCH),
}


@pytest.mark.parametrize("kind", ["Session", "AsyncSession"])
@pytest.mark.parametrize("name", CELLS)
async def test_joined_is_captured_delivered_and_undone(engine: Engine, name: str, kind: str) -> None:
    app = App(engine)
    app.prepare()
    before = app.images()
    if kind == "Session":
        with app.sessions() as session:
            CELLS[name](session)
            session.commit()
    else:
        pytest.importorskip("aiosqlite")
        await play_async(app, CELLS[name])
    app.assert_in_step()
    assert app.images() != before
    with app.sessions() as session:
        app.memory.rollback(session)
        session.commit()
    assert app.images() == before
    app.assert_in_step()
    with app.sessions() as session:
        app.memory.rollback(session, steps=3)
        session.commit()
    assert app.images() == {}
    app.assert_in_step()


async def play_async(app: App, cell: Callable[[Session], Any]) -> None:
    from sqlalchemy.ext.asyncio import async_sessionmaker, create_async_engine

    from memstate_sa import sqlite

    url = app.engine.url
    is_sqlite = url.get_backend_name() == "sqlite"
    engine = create_async_engine(url.set(drivername="sqlite+aiosqlite") if is_sqlite else url)
    if is_sqlite:
        sqlite.configure(engine)
        apps.enforce_foreign_keys(engine.sync_engine)
    sessions = async_sessionmaker(engine)
    app.memory.attach(sessions)
    async with sessions() as session:
        await session.run_sync(cell)
        await session.commit()
    await engine.dispose()


def test_history_shows_every_table(engine: Engine) -> None:
    app = App(engine)
    app.prepare()
    with app.sessions() as session:
        (change,) = app.memory.history(session, Engineer, 2)
        assert change.entity == "employee"
        assert change.after == {
            "id": 2,
            "kind": "engineer",
            "name": "ada",
            "boss_id": None,
            "engineer.id": 2,
            "engineer.skill": "drills",
            "engineer.name": "hammer",
        }


def test_rows_older_than_tracking_get_a_baseline_of_all_tables(engine: Engine) -> None:
    App(engine).prepare()
    old = App(engine).images()
    with engine.begin() as connection, rewriting(connection):
        connection.execute(text("DELETE FROM memstate_log"))
        connection.execute(text("DELETE FROM memstate_outbox"))
    app = App(engine)
    with app.sessions() as session:
        session.get_one(Engineer, 3).skill = "later"
        session.commit()
        assert [change.op for change in app.memory.history(session, Employee, 3)] == ["baseline", "update"]
    assert app.memory.backfill(engine, Employee) == 4
    app.assert_in_step()
    with app.sessions() as session:
        app.memory.rollback(session)
        session.commit()
    assert app.images() == old


@pytest.mark.parametrize("target", ["base", "subclass", "criteria", "single"])
def test_search_finds_by_the_text_of_a_subclass(engine: Engine, target: str) -> None:
    """Delivered and undelivered facts are found: in a class, its subclass, or a select() of it."""
    app = App(engine)
    app.prepare()
    chosen: Any = {
        "base": Employee,
        "subclass": Writer,
        "criteria": select(Writer).where(Writer.skill == "rhymes", Writer.name == "cid"),
        "single": select(Intern).where(Intern.months == 3),
    }[target]
    query, key = ("dan copies 3", 5) if target == "single" else ("cid rhymes", 4)
    for deliver in (False, True):
        if deliver:
            app.memory.relay(engine).drain()
        with app.sessions() as session:
            hits = app.memory.search(session, query, chosen, limit=1)
            assert [(hit.fact.id, round(hit.distance, 5)) for hit in hits] == [(key, 0.0)]
    with app.sessions() as session:
        session.get_one(Writer, 4).skill = "rests"
        hits = app.memory.search(session, "cid rhymes", Employee)
        assert all(hit.distance > 0.01 for hit in hits)
        assert [hit.fact.id for hit in app.memory.search(session, "cid rests", Employee, limit=1)] == [4]


def test_doctor_finds_changes_in_any_table(engine: Engine) -> None:
    app = App(engine)
    app.prepare()
    with engine.begin() as connection:
        connection.execute(text("UPDATE engineer SET skill = 'by text' WHERE id = 2"))
        connection.execute(text("DELETE FROM chief"))
        connection.execute(text("DELETE FROM writer WHERE id = 4"))
        connection.execute(text("DELETE FROM employee WHERE id = 4"))
    found = app.memory.doctor(engine, repair=True)
    assert (found.changed, found.gone) == ([("employee", 2), ("employee", 3)], [("employee", 4)])
    app.assert_in_step()


def test_last_image_shows_concurrent_changes_of_two_tables(postgres_engine: Engine) -> None:
    """Only our row lock makes one transaction wait for the other. The last image must show both changes."""
    app = App(postgres_engine)
    app.prepare()
    flushed = threading.Event()

    def other() -> None:
        with app.sessions() as session:
            session.get_one(Engineer, 2).skill = "second"
            flushed.set()
            session.commit()

    with app.sessions() as session:
        session.get_one(Engineer, 2).name = "first"
        session.flush()
        thread = threading.Thread(target=other)
        thread.start()
        flushed.wait(60)
        thread.join(0.3)
        session.commit()
    thread.join(60)
    assert app.images()[2] == app.replayed()[2]
    assert (app.images()[2]["name"], app.images()[2]["engineer.skill"]) == ("first", "second")


def test_undo_refuses_what_another_changed_in_another_table(engine: Engine) -> None:
    app = App(engine)
    app.prepare()
    for actor, attribute in (("one", "name"), ("two", "skill")):
        with app.sessions() as session:
            app.memory.annotate(session, actor=actor)
            setattr(session.get_one(Engineer, 2), attribute, actor)
            session.commit()
    with app.sessions() as session, pytest.raises(ConflictError, match="update by two"):
        app.memory.rollback(session, actor="one")


def test_subclass_tracked_alone_is_captured(engine: Engine) -> None:
    """Its facts are rows in both tables. Rows of sibling classes do not matter."""
    app = App(engine, Engineer, text="name")
    app.prepare()
    with app.sessions() as session:
        session.get_one(Engineer, 2).name = "changed"
        session.get_one(Writer, 4).name = "unseen"
        session.commit()
    assert app.replayed(Engineer) == app.images(of="engineer")
    assert app.memory.doctor(engine).healthy
    app.memory.relay(engine).drain()
    assert_index_holds(app.index, app.embedder, {"engineer[2]": "changed", "engineer[3]": "bob"})
    with app.sessions() as session:
        assert [hit.fact.id for hit in app.memory.search(session, "bob", Engineer, limit=1)] == [3]
        with pytest.raises(UntrackedWrite, match="It leaves the base class' row"):
            session.execute(delete(Engineer).where(Engineer.id == 2))
        session.delete(session.get_one(Engineer, 2))
        session.commit()
        assert [change.op for change in app.memory.history(session, Engineer, 2)] == ["insert", "update", "delete"]
        redo = app.memory.rollback(session)[0].tx
        session.commit()
        app.memory.rollback(session, tx=redo)
        session.commit()
        assert session.get(Employee, 2) is None
        app.memory.rollback(session)
        session.commit()
        assert type(session.get(Employee, 2)) is Engineer
    assert app.replayed(Engineer) == app.images(of="engineer")
    with app.sessions() as session, pytest.raises(UntrackedWrite, match="bypass the log of Engineer"):
        session.execute(update(Employee).values(name="all"))


def test_a_part_of_a_row_is_not_inserted_alone(engine: Engine) -> None:
    app = App(engine)
    app.prepare()
    with app.sessions() as session, pytest.raises(UntrackedWrite, match="INSERT on engineer would bypass"):
        session.execute(insert(Engineer.__table__).values(id=1, skill="x"))
    with app.sessions() as session, pytest.raises(UntrackedWrite, match="holds several classes"):
        session.execute(update(Intern).where(Employee.id == Writer.id).values(months=1))
    app.assert_in_step()


def test_a_class_that_is_defined_after_its_base_is_tracked(engine: Engine) -> None:
    class Root(DeclarativeBase):
        pass

    memory = Memory(InMemoryIndex(), embedder=HashEmbedder())

    @memory.track(text=lambda it: f"{it.name} {getattr(it, 'extra', '')}")
    class Thing(Root):
        __tablename__ = "thing"
        id: Mapped[int] = mapped_column(primary_key=True)
        kind: Mapped[str] = mapped_column(sa.String(20))
        name: Mapped[str]
        __mapper_args__: ClassVar[dict[str, Any]] = {"polymorphic_on": "kind", "polymorphic_identity": "thing"}

    sessions = sessionmaker(engine)
    memory.attach(sessions)
    Root.metadata.create_all(engine)
    memory.create_tables(engine)
    with sessions() as session:
        session.add(Thing(name="first"))
        session.commit()

    class Special(Thing):
        __tablename__ = "special"
        id: Mapped[int] = mapped_column(ForeignKey("thing.id"), primary_key=True)
        extra: Mapped[str]
        __mapper_args__: ClassVar[dict[str, Any]] = {"polymorphic_identity": "special"}

    Root.metadata.create_all(engine)
    with sessions() as session:
        session.add(Special(name="second", extra="more"))
        session.commit()
        assert [hit.fact.id for hit in memory.search(session, "second more", Thing, limit=1)] == [2]
        assert dict(memory.history(session, Thing, 2)[0].after or {})["special.extra"] == "more"
        with pytest.raises(UntrackedWrite, match="bypass the log of Thing"):
            session.connection().execute(update(Special.__table__).values(extra="x"))


def test_concrete_subclasses_are_entities_of_their_own(engine: Engine) -> None:
    app = App(engine, Paper, text="title")
    with app.sessions() as session:
        session.add_all([Paper(id=1, title="a paper"), Article(id=1, title="an article", journal="j")])
        session.commit()
        session.get_one(Article, 1).title = "changed"
        session.execute(update(Article).values(journal="k"))
        session.commit()
        assert [(c.entity, c.op) for c in app.memory.history(session, Article)] == [
            ("article", "insert"),
            ("article", "update"),
            ("article", "update"),
        ]
        assert [c.entity for c in app.memory.history(session, Paper)] == ["paper"]
    app.memory.relay(engine).drain()
    assert_index_holds(app.index, app.embedder, {"paper[1]": "a paper", "article[1]": "changed"})
    with app.sessions() as session:
        assert [hit.fact.title for hit in app.memory.search(session, "changed", Article)] == ["changed"]
        assert [hit.fact.title for hit in app.memory.search(session, "a paper", Paper)] == ["a paper"]
        app.memory.rollback(session)
        session.commit()
        assert session.get_one(Article, 1).title == "an article"
    assert app.memory.doctor(engine).healthy


def test_a_concrete_subclass_may_have_other_options(engine: Engine) -> None:
    app = App(engine, Paper, text="title")
    app.memory.track(Article, text="journal", entity="in_journals")
    with app.sessions() as session:
        session.add(Article(title="title", journal="journal"))
        session.commit()
        assert [c.entity for c in app.memory.history(session, Article)] == ["in_journals"]
    app.memory.relay(engine).drain()
    assert_index_holds(app.index, app.embedder, {"in_journals[1]": "journal"})


def test_track_explains_its_refusals() -> None:
    class Root(DeclarativeBase):
        pass

    class Union(ConcreteBase, Root):
        __tablename__ = "union"
        id: Mapped[int] = mapped_column(primary_key=True)
        title: Mapped[str]

    class Thing(Root):
        __tablename__ = "thing"
        id: Mapped[int] = mapped_column(primary_key=True)
        title: Mapped[str]

    class Other(Thing):
        __tablename__ = "other"
        number: Mapped[int] = mapped_column(primary_key=True)
        thing_id: Mapped[int] = mapped_column(ForeignKey("thing.id"))

    memory = Memory(InMemoryIndex(), embedder=HashEmbedder())
    with pytest.raises(MemstateError, match="Cannot track Union: it is a union of tables"):
        memory.track(Union, text="title")
    with pytest.raises(MemstateError, match="Cannot track Other: its tables are not joined by their primary keys"):
        memory.track(Thing, text="title")
    with pytest.raises(MemstateError, match="Cannot capture Engineer by triggers: it is in several tables"):
        memory.track(Employee, text="name", capture="trigger")
    both = Memory(InMemoryIndex(), embedder=HashEmbedder())
    both.track(Engineer, text="name")
    with pytest.raises(MemstateError, match="Engineer tracks table employee already"):
        both.track(Employee, text="name")


def test_an_alias_of_a_subclass_is_not_a_target(engine: Engine) -> None:
    app = App(engine)
    app.prepare()
    with app.sessions() as session, pytest.raises(MemstateError, match="search"):
        app.memory.search(session, "x", select(aliased(Engineer)))
