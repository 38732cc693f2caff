"""Flushes that write to a tracked table through an untracked class: refused, never silent."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar

import pytest
from sqlalchemy import Engine, ForeignKey, event, insert, inspect
from sqlalchemy.ext.automap import automap_base
from sqlalchemy.orm import DeclarativeBase, Mapped, Session, mapped_column

from memstate_sa import UntrackedWrite
from memstate_sa.capture.guard import UntrackedWriteWarning
from tests.support.apps import App, make_app

pytestmark = pytest.mark.sa20


class Base(DeclarativeBase):
    pass


class Note(Base):
    __tablename__ = "note"
    id: Mapped[int] = mapped_column(primary_key=True)
    text: Mapped[str]
    more: Mapped[str | None]


class LightNote(Base):
    """A second, smaller mapping of the same table."""

    __table__ = Note.__table__
    __mapper_args__: ClassVar[dict[str, Any]] = {"include_properties": ["id", "text"]}


class Person(Base):
    """A row does not show whether it is a clerk."""

    __tablename__ = "person"
    id: Mapped[int] = mapped_column(primary_key=True)
    name: Mapped[str]


class Clerk(Person):
    __tablename__ = "clerk"
    id: Mapped[int] = mapped_column(ForeignKey("person.id"), primary_key=True)
    text: Mapped[str]


class Animal(Base):
    __tablename__ = "animal"
    id: Mapped[int] = mapped_column(primary_key=True)
    kind: Mapped[str]
    name: Mapped[str | None]
    __mapper_args__: ClassVar[dict[str, Any]] = {"polymorphic_on": "kind", "polymorphic_identity": "animal"}


class Dog(Animal):
    __tablename__ = "dog"
    id: Mapped[int] = mapped_column(ForeignKey("animal.id"), primary_key=True)
    text: Mapped[str]
    __mapper_args__: ClassVar[dict[str, Any]] = {"polymorphic_identity": "dog"}


@pytest.fixture
def app(engine: Engine) -> App:
    app = make_app(engine, Note, Clerk, Dog)
    app.write(Note(id=1, text="one"), Clerk(id=1, name="ann", text="clerk"), Dog(id=1, text="dog"))
    return app


def _automapped(session: Session) -> Any:
    base: Any = automap_base()
    base.prepare(autoload_with=session.get_bind())
    return base.classes.note


BY_OTHER_CLASSES: dict[str, Callable[[Session], Any]] = {
    "insert": lambda s: s.add(LightNote(id=2, text="light")),
    "update": lambda s: setattr(s.get_one(LightNote, 1), "text", "light"),
    "delete": lambda s: s.delete(s.get_one(LightNote, 1)),
    "automap": lambda s: s.add(_automapped(s)(id=2, text="automapped")),
    "base class, update": lambda s: setattr(s.get_one(Person, 1), "name", "bob"),
}


@pytest.mark.each_pair_once
@pytest.mark.parametrize("name", BY_OTHER_CLASSES)
def test_another_class_on_a_tracked_table_is_refused(app: App, name: str) -> None:
    """The flush fails before the row is written."""
    with app.session() as session:
        BY_OTHER_CLASSES[name](session)
        with pytest.raises(UntrackedWrite, match=r"through a class that is not tracked\. Use the tracked class"):
            session.commit()
        session.rollback()
    app.assert_log_is_truth(Note)
    assert app.memory.doctor(app.engine).healthy


def test_another_class_is_warned_of_on_request(engine: Engine) -> None:
    app = make_app(engine, Note, on_untracked="warn")
    with app.session() as session:
        session.add(LightNote(id=2, text="light"))
        with pytest.warns(UntrackedWriteWarning, match="through a class that is not tracked"):
            session.commit()


def test_rows_of_a_base_class_may_be_written(app: App) -> None:
    """New rows belong to no subclass, and a discriminator shows the class of each row."""
    with app.session() as session:
        session.add_all([Person(id=2, name="new"), Animal(id=2)])
        session.commit()
        session.get_one(Animal, 2).name = "animal"
        session.get_one(Clerk, 1).name = "eve"
        session.get_one(Animal, 1).name = "rex"
        session.commit()
        session.delete(session.get_one(Animal, 2))
        session.commit()
        assert app.memory.history(session, Clerk, 1)[-1].after["name"] == "eve"  # type: ignore[index]
        assert app.memory.history(session, Dog, 1)[-1].after["name"] == "rex"  # type: ignore[index]
    assert app.memory.doctor(app.engine).healthy


BULK: dict[str, Callable[[Session], Any]] = {
    "insert": lambda s: s.bulk_insert_mappings(inspect(Note), [{"id": 7, "text": "bulk"}]),
    "update": lambda s: s.bulk_update_mappings(inspect(Note), [{"id": 1, "text": "bulk"}]),
    "objects": lambda s: s.bulk_save_objects([Note(id=7, text="bulk")]),
    "a cache of its own": lambda s: (
        s.connection()
        .execution_options(compiled_cache={})
        .execute(insert(Note.__table__), {"id": 7, "text": "connection"})
    ),
}


@pytest.mark.each_pair_once
@pytest.mark.parametrize("name", BULK)
@pytest.mark.parametrize("when", ["before_flush", "after_flush", "after_insert", "before_update"])
def test_bulk_methods_in_an_event_of_a_flush_are_refused(app: App, when: str, name: str) -> None:
    with app.session() as session:
        session.get_one(Note, 1).text = "uno"
        session.add(Note(id=2, text="two"))
        target: Any = session if when.endswith("flush") else Note

        def write(*arguments: Any) -> None:
            if not session.info:
                session.info["written"] = True
                BULK[name](session)

        event.listen(target, when, write)
        try:
            with pytest.raises(UntrackedWrite, match=r"would bypass the log of Note\. "):
                session.commit()
        finally:
            event.remove(target, when, write)
        session.rollback()
    app.assert_log_is_truth(Note)
    assert app.rows(Note)[1]["text"] == "one"
