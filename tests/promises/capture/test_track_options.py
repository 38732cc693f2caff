"""Unusual arguments of `track` and of a Memory's methods."""

from __future__ import annotations

from typing import Any, ClassVar

import pytest
from sqlalchemy import Column, Engine, ForeignKey, Table, select
from sqlalchemy.orm import DeclarativeBase, Mapped, column_property, mapped_column, relationship, scoped_session

from memstate_sa import Memory, MemstateError, UntrackedWrite
from memstate_sa.capture.captured_tables import captured_in
from memstate_sa.indexes import InMemoryIndex
from memstate_sa.testing import HashEmbedder
from memstate_sa.tracking.tracked import TRACKED
from tests.support import Tag, World
from tests.support.apps import make_app


class Base(DeclarativeBase):
    pass


class Label(Base):
    __tablename__ = "label"
    id: Mapped[int] = mapped_column(primary_key=True)
    name: Mapped[str]


link = Table(
    "link",
    Base.metadata,
    Column("page_id", ForeignKey("page.id"), primary_key=True),
    Column("label_id", ForeignKey("label.id"), primary_key=True),
)


class Page(Base):
    __tablename__ = "page"
    id: Mapped[int] = mapped_column(primary_key=True)
    body: Mapped[str]
    labels: Mapped[list[Label]] = relationship(secondary=link)


class Link(Base):
    """The relationship's table, mapped so that it can be tracked."""

    __table__ = link


def test_facts_without_text_have_history_and_undo(engine: Engine) -> None:
    """With `text=None`, no index gets or awaits them."""
    app = make_app(engine, Page, text=None, metadata=("body",))
    with app.session() as session:
        session.add(Page(id=1, body="one"))
        session.commit()
        session.get_one(Page, 1).body = "two"
        session.commit()
        assert app.memory.search(session, "two", Page) == []
        app.memory.relay(engine).drain()
        assert app.memory.verify(engine).clean and app.memory.status(engine)["memory"].pending == 0
        assert app.memory.indexes["memory"].scan(None, 10) == []
        app.memory.rollback(session)
        session.commit()
        assert session.scalars(select(Page.body)).all() == ["one"]
        assert [change.op for change in app.memory.history(session, Page, 1)] == ["insert", "update", "update"]


def test_secondary_table_is_captured_by_triggers(engine: Engine) -> None:
    """Writes by the relationship are refused, and the error names the alternative. With triggers, undo brings the rows
    back.
    """
    for capture in ("session", "trigger"):
        app = make_app(engine, Page, Link, tracking={Page: {"text": "body"}, Link: {"text": None, "capture": capture}})
        with app.session() as session:
            session.add(page := Page(id=1, body="b", labels=[Label(id=1, name="l")]))
            if capture == "session":
                with pytest.raises(UntrackedWrite, match=r"capture='trigger' or an association object"):
                    session.commit()
                continue
            session.commit()
            session.delete(page)
            session.commit()
            app.memory.rollback(session)
            session.commit()
            assert [label.name for label in session.get_one(Page, 1).labels] == ["l"]


def test_a_scoped_session_is_the_session_of_its_thread(world: World) -> None:
    """All methods accept it, like `attach`."""
    memory, db = world.memory, scoped_session(world.sessions)
    memory.annotate(db, actor="ada")
    db.add(Tag(name="a", meaning="tea"))
    db.commit()
    tx = memory.token(db)
    assert tx is not None
    assert [hit.fact.name for hit in memory.search(db, "tea", Tag)] == ["a"]
    assert [change.actor for change in memory.history(db, Tag, "a")] == ["ada"]
    assert memory.as_of(db, Tag, "a", tx) is not None
    memory.rollback(db)
    db.commit()
    memory.revoke(db, tx=[tx], dry_run=True)
    memory.erase(db, Tag, "a")
    db.commit()
    assert [change.op for change in memory.history(db, Tag, "a")][-1] == "delete"
    db.remove()


@pytest.mark.parametrize("text", [("body", "id"), ["body"], 5, Label.name], ids=["tuple", "list", "number", "foreign"])
def test_track_refuses_a_text_that_is_none(text: object) -> None:
    """The error suggests a function that joins columns. The same kind: a set, a Column, another class's attribute."""
    memory = Memory(InMemoryIndex(), embedder=HashEmbedder())
    with pytest.raises(MemstateError, match="give a function: text=lambda row"):
        memory.track(Page, text=text)  # type: ignore[call-overload]
    memory.track(Page, text="body")


class Name(Base):
    __tablename__ = "name"
    id: Mapped[int] = mapped_column(primary_key=True)
    first: Mapped[str] = mapped_column()
    last: Mapped[str] = mapped_column()
    full = column_property(first + " " + last)


@pytest.mark.parametrize("options", [{"text": "full"}, {"text": Name.full}, {"text": "first", "metadata": ("full",)}])
def test_track_refuses_an_expression_for_a_column(options: Any) -> None:
    """A column_property has no column of its own, like a hybrid."""
    memory = Memory(InMemoryIndex(), embedder=HashEmbedder())
    with pytest.raises(MemstateError, match=r"Name has no column attribute 'full'\. Choose from: first, id, last"):
        memory.track(Name, **options)
    memory.track(Name, text="first")


class Document(Base):
    __tablename__ = "document"
    id: Mapped[int] = mapped_column(primary_key=True)
    title: Mapped[str]


class Draft(Document):
    __tablename__ = "draft"
    id: Mapped[int] = mapped_column(primary_key=True)
    title: Mapped[str]
    __mapper_args__: ClassVar[dict[str, Any]] = {"concrete": True}


class OldDocument(Document):
    """Has no title."""

    __tablename__ = "old_document"
    id: Mapped[int] = mapped_column(primary_key=True)
    words: Mapped[str]
    __mapper_args__: ClassVar[dict[str, Any]] = {"concrete": True}


@pytest.mark.parametrize("capture", ["session", "trigger"])
def test_track_that_raises_leaves_nothing_tracked(engine: Engine, capture: str) -> None:
    """Neither the class nor its concrete subclasses stay tracked."""
    app = make_app(engine, Page, text="body")
    with pytest.raises(MemstateError, match="OldDocument has no column attribute 'title'"):
        app.memory.track(Document, text="title", capture=capture)
    assert captured_in(Document.__table__) == {}
    app.memory.create_tables(engine)
    app.write(Document(title="not tracked"), Draft(title="not tracked"))
    with app.session() as session, pytest.raises(MemstateError, match="not tracked by this Memory"):
        app.memory.history(session, Document)
    app.memory.track(Document, text=None, capture=capture)
    app.memory.create_tables(engine)
    app.write(Document(id=9, title="tracked"), Draft(id=8, title="tracked"), OldDocument(id=7, words="tracked"))
    with app.session() as session:
        kinds: list[Any] = [Document, Draft, OldDocument]
        assert [[change.key for change in app.memory.history(session, kind)] for kind in kinds] == [[9], [8], [7]]
    Document.metadata.info.pop(TRACKED, None)


@pytest.mark.parametrize("capture", ["session", "trigger"])
def test_track_refuses_a_mapper_with_another_primary_key(capture: str) -> None:
    """Class and database would disagree on the key, so a delete would be logged for another row."""

    class Other(DeclarativeBase):
        pass

    class Item(Other):
        __tablename__ = "item"
        id: Mapped[int] = mapped_column(primary_key=True)
        code: Mapped[int] = mapped_column(unique=True)
        __mapper_args__: ClassVar[dict[str, Any]] = {"primary_key": [code]}

    memory = Memory(InMemoryIndex(), embedder=HashEmbedder())
    with pytest.raises(MemstateError, match=r"its mapper has the primary key \(code\), but table item has \(id\)"):
        memory.track(Item, text=None, capture=capture)  # type: ignore[arg-type]


def test_track_takes_the_attribute_itself(engine: Engine) -> None:
    """`text=Page.body` means the same as `text="body"`."""
    app = make_app(engine, Page, text=Page.body)
    with app.session() as session:
        session.add(Page(id=1, body="one"))
        session.commit()
        assert [hit.fact.id for hit in app.memory.search(session, "one", Page)] == [1]
    app.memory.close()
