"""Every way in which SQLAlchemy can write: captured by the Session's events, and by triggers, sync and async.

A cell of the matrix writes to existing rows. Then replay(log) must equal the tables. Writes that a Session cannot see
are cells of `BY_TRIGGER_ONLY`: triggers capture them. Without triggers they are refused, or `doctor` finds them.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any, ClassVar

import pytest
import sqlalchemy as sa
from sqlalchemy import Engine, ForeignKey, delete, event, func, insert, select, text, update
from sqlalchemy.ext.hybrid import hybrid_property
from sqlalchemy.ext.mutable import MutableDict, MutableList
from sqlalchemy.orm import (
    DeclarativeBase,
    Mapped,
    Session,
    column_property,
    composite,
    deferred,
    mapped_column,
    relationship,
    synonym,
)

from memstate_sa import UntrackedWrite
from memstate_sa.db.dialects import database_of
from tests.support import apps

pytestmark = [
    pytest.mark.sa20,
    # The cells show a gap: no Session sees changes that the database makes by itself.
    pytest.mark.filterwarnings("ignore:The log misses some changes"),
]


class Base(DeclarativeBase):
    pass


@dataclass
class Place:
    x: int | None
    y: int | None


class Owner(Base):
    """Has columns and relationships of every kind."""

    __tablename__ = "owner"
    id: Mapped[int] = mapped_column(primary_key=True)
    name: Mapped[str] = mapped_column(sa.String(40))
    text: Mapped[str] = mapped_column("content", default="nothing")
    status: Mapped[str] = mapped_column(sa.String(10), server_default="new")
    changes: Mapped[int] = mapped_column(default=0, onupdate=sa.text("changes + 1"))
    version: Mapped[int] = mapped_column()
    long: Mapped[str | None] = deferred(mapped_column(sa.Text))
    labels: Mapped[dict[str, Any] | None] = mapped_column(MutableDict.as_mutable(sa.JSON))
    items: Mapped[list[Any] | None] = mapped_column(MutableList.as_mutable(sa.JSON))
    plain: Mapped[Any] = mapped_column(sa.JSON, nullable=True)
    x: Mapped[int | None]
    y: Mapped[int | None]
    seen_at: Mapped[datetime | None] = mapped_column(sa.DateTime(timezone=True))
    place: Mapped[Place] = composite("x", "y")
    also_name = synonym("name")
    shout = column_property(name.column.concat("!"))
    parts: Mapped[list[Part]] = relationship(back_populates="owner", cascade="all, delete-orphan")
    leaves: Mapped[list[Leaf]] = relationship(back_populates="owner", passive_deletes="all")
    links: Mapped[list[Link]] = relationship(back_populates="owner", cascade="all, delete-orphan")
    __mapper_args__: ClassVar[dict[str, Any]] = {"version_id_col": version}

    @hybrid_property
    def title(self) -> str:
        return f"the {self.name}"

    @title.inplace.setter
    def _title(self, value: str) -> None:
        self.name = value.removeprefix("the ")

    @title.inplace.expression
    @classmethod
    def _title_expression(cls) -> Any:
        return "the " + cls.name

    @title.inplace.update_expression
    @classmethod
    def _title_update(cls, value: Any) -> Any:
        return [(cls.name, func.replace(value, "the ", ""))]


class Part(Base):
    """Has a composite key."""

    __tablename__ = "part"
    kind: Mapped[str] = mapped_column(sa.String(10), primary_key=True)
    number: Mapped[int] = mapped_column(primary_key=True, autoincrement=False)
    text: Mapped[str] = mapped_column(default="a part")
    owner_id: Mapped[int | None] = mapped_column(ForeignKey("owner.id"))
    owner: Mapped[Owner | None] = relationship(back_populates="parts")


class Leaf(Base):
    """Its rows are deleted by the database."""

    __tablename__ = "leaf"
    id: Mapped[int] = mapped_column(primary_key=True)
    text: Mapped[str] = mapped_column(default="a leaf")
    owner_id: Mapped[int | None] = mapped_column(ForeignKey("owner.id", ondelete="CASCADE"))
    owner: Mapped[Owner | None] = relationship(back_populates="leaves")


class Label(Base):
    """The other end of an association."""

    __tablename__ = "label"
    name: Mapped[str] = mapped_column(sa.String(20), primary_key=True)
    text: Mapped[str] = mapped_column(default="a label")


class Link(Base):
    """The association object."""

    __tablename__ = "link"
    owner_id: Mapped[int] = mapped_column(ForeignKey("owner.id"), primary_key=True)
    label_name: Mapped[str] = mapped_column(ForeignKey("label.name"), primary_key=True)
    text: Mapped[str] = mapped_column(default="a link")
    owner: Mapped[Owner] = relationship(back_populates="links")
    label: Mapped[Label] = relationship()


class Animal(Base):
    """Has subclasses in the same table."""

    __tablename__ = "animal"
    id: Mapped[int] = mapped_column(primary_key=True)
    kind: Mapped[str] = mapped_column(sa.String(10))
    text: Mapped[str] = mapped_column(default="an animal")
    __mapper_args__: ClassVar[dict[str, Any]] = {"polymorphic_on": "kind", "polymorphic_identity": "animal"}


class Dog(Animal):
    barks: Mapped[bool | None]
    __mapper_args__: ClassVar[dict[str, Any]] = {"polymorphic_identity": "dog"}


MODELS = (Owner, Part, Leaf, Label, Link, Animal)


class App(apps.App):
    def __init__(self, engine: Engine, capture: Any) -> None:
        super().__init__(engine, *MODELS, foreign_keys=True, capture=capture)

    def prepare(self) -> None:
        with self.sessions() as session:
            label = Label(name="red")
            owner = Owner(name="ada", text="one", labels={"a": 1}, items=[1], plain={"deep": [1]}, long="long")
            owner.parts = [Part(kind="p", number=n, text=f"part {n}") for n in (1, 2)]
            owner.leaves = [Leaf(), Leaf()]
            owner.links = [Link(label=label)]
            session.add_all([label, Label(name="blue"), owner, Owner(name="bob", text="two")])
            session.add_all([Animal(), Dog(barks=True)])
            session.commit()


def owner(session: Session, id_: int = 1) -> Owner:
    found = session.get_one(Owner, id_)
    session.info.setdefault("held", []).append(found)  # the identity map is weak
    return found


def changed(**values: Any) -> Callable[[Session], Any]:
    def change(session: Session) -> None:
        for name, value in values.items():
            setattr(owner(session), name, value)

    return change


def expired(session: Session) -> None:
    found = owner(session)
    session.expire(found)
    found.text = "after expiry"


def delete_then_insert(session: Session) -> None:
    part = session.get_one(Part, ("p", 1))
    session.delete(part)
    session.add(Part(kind="p", number=1, text="in its place"))


def row_switch(session: Session) -> None:
    session.delete(session.get_one(Label, "blue"))
    session.flush()
    session.add(Label(name="blue", text="again"))


def orphan(session: Session) -> None:
    owner(session).parts.pop()


def move(session: Session) -> None:
    owner(session, 2).parts.append(owner(session).parts[0])


def cascade(session: Session) -> None:
    session.execute(delete(Leaf))
    session.delete(owner(session))


def append_link(session: Session) -> None:
    owner(session, 2).links.append(Link(label=session.get_one(Label, "blue"), text="linked"))


def many_versions(session: Session) -> None:
    for n in range(3):
        owner(session).text = f"version {n}"
        session.flush()


def returned(session: Session) -> None:
    rows = session.execute(update(Owner).where(Owner.id > 0).values(text="same").returning(Owner.id, Owner.text)).all()
    assert sorted(rows) == [(1, "same"), (2, "same")]
    assert session.scalars(delete(Leaf).where(Leaf.id == 1).returning(Leaf.id)).all() == [1]
    assert session.scalars(insert(Label).returning(Label), [{"name": "green"}, {"name": "grey"}]).all() == [
        session.get(Label, "green"),
        session.get(Label, "grey"),
    ]


def rowcounts(session: Session) -> None:
    for synchronize in ("auto", "evaluate", "fetch", False):
        options = {"synchronize_session": synchronize}
        found: Any = session.execute(
            update(Owner).where(Owner.id == 1).values(text=f"by {synchronize}"), execution_options=options
        )
        assert found.rowcount == 1
    assert session.query(Part).filter(Part.number == 1).update({"text": "queried"}) == 1
    assert session.query(Part).filter(Part.number == 2).delete() == 1


def upsert_of(session: Session, model: Any) -> Any:
    return database_of(session.get_bind()).upsert(model)


def upserts(session: Session) -> None:
    for name, words in (("red", "redder"), ("new", "inserted")):
        statement = upsert_of(session, Label).values(name=name, text=words)
        statement = statement.on_conflict_do_update(index_elements=["name"], set_={"text": statement.excluded.text})
        session.execute(statement)
    many = upsert_of(session, Label)
    many = many.on_conflict_do_update(index_elements=["name"], set_={"text": many.excluded.text})
    session.execute(many, [{"name": "blue", "text": "bluer"}, {"name": "newer", "text": "inserted"}])
    nothing = upsert_of(session, Label).values([{"name": "red", "text": "x"}, {"name": "newest", "text": "y"}])
    found = session.scalars(nothing.on_conflict_do_nothing().returning(Label.name)).all()
    assert found == ["newest"]


def core(session: Session) -> None:
    label: Any = Label.__table__
    session.execute(insert(label), [{"name": "c1", "text": "core"}, {"name": "c2", "text": "core"}])
    assert session.execute(update(label).where(label.c.name == "c1").values(text="cored")).rowcount == 1
    session.execute(delete(label).where(label.c.name == "c2"))


def from_select(session: Session) -> None:
    named = select("n-" + Label.name, Label.text)
    session.execute(insert(Label).from_select(["name", "text"], named))


def many_by_key(session: Session) -> None:
    session.execute(update(Part), [{"kind": "p", "number": n, "text": f"by key {n}"} for n in (1, 2)])


def savepoints(session: Session) -> None:
    with session.begin_nested():
        owner(session).text = "released"
    undone = session.begin_nested()
    owner(session).text = "rolled back"
    session.flush()
    undone.rollback()
    session.begin_nested()  # left open: commit() ends it
    session.add(Label(name="leaked"))


def subclasses(session: Session) -> None:
    session.get_one(Dog, 2).barks = False
    session.add_all([Dog(id=3), Animal(id=4)])
    session.flush()
    session.execute(update(Dog).values(text="all dogs"))
    session.delete(session.get_one(Animal, 4))


def bulk_by_hand(session: Session) -> None:
    session.bulk_save_objects([Label(name="saved")])
    session.bulk_insert_mappings(Label, [{"name": "mapped", "text": "m"}])  # type: ignore[arg-type]
    session.bulk_update_mappings(Label, [{"name": "red", "text": "updated"}])  # type: ignore[arg-type]


def hybrid_update(session: Session) -> None:
    session.execute(update(Owner).where(Owner.id == 1).values({Owner.title: "the queen"}))
    assert session.scalar(select(Owner.name).where(Owner.id == 1)) == "queen"


CELLS: dict[str, Callable[[Session], Any]] = {
    "add": lambda s: s.add(Owner(name="new")),
    "merge": lambda s: s.merge(Part(kind="p", number=1, text="merged")),
    "merge of nothing": lambda s: s.merge(Part(kind="q", number=1, text="merged")),
    "delete": lambda s: s.delete(s.get_one(Label, "blue")),
    "delete-orphan": orphan,
    "cascade": cascade,
    "row switch": row_switch,
    "delete, then insert of one key": delete_then_insert,
    "primary key change": lambda s: setattr(s.get_one(Label, "blue"), "name", "navy"),
    "composite key change": lambda s: setattr(s.get_one(Part, ("p", 1)), "number", 9),
    "server default and onupdate": changed(text="updated"),
    "SQL expression": changed(name=Owner.name + " II", seen_at=func.current_timestamp()),
    "version_id_col": many_versions,
    "deferred": changed(long="longer"),
    "expired": expired,
    "MutableDict": lambda s: owner(s).labels.__setitem__("b", 2),
    "MutableList": lambda s: owner(s).items.append(2),
    "plain JSON": changed(plain={"deep": [2]}),
    "JSON null": changed(plain=None, labels=None),
    "hybrid": changed(title="the queen"),
    "hybrid in a bulk update": hybrid_update,
    "synonym": changed(also_name="other"),
    "composite attribute": changed(place=Place(3, 4)),
    "aware datetime": changed(seen_at=datetime(2024, 1, 2, 3, 4, 5, 6, tzinfo=UTC)),
    "relationship move": move,
    "association": append_link,
    "association removed": lambda s: owner(s).links.clear(),
    "single-table inheritance": subclasses,
    "insert(Model)": lambda s: s.execute(insert(Label), [{"name": f"l{n}"} for n in range(3)]),
    "update(Model)": lambda s: s.execute(update(Part).where(Part.number == 1).values(text="bulk")),
    "delete(Model)": lambda s: s.execute(delete(Part).where(Part.number == 1)),
    "RETURNING": returned,
    "rowcount": rowcounts,
    "executemany by primary key": many_by_key,
    "upsert": upserts,
    "insert from select": from_select,
    "Core statements through the Session": core,
    "savepoints": savepoints,
    "nothing changes": changed(text="one", name="ada"),
}
BY_TRIGGER_ONLY: dict[str, Callable[[Session], Any]] = {
    "ON DELETE CASCADE": lambda s: [s.execute(delete(Part)), s.execute(delete(Link)), s.delete(owner(s))],
    "bulk_*": bulk_by_hand,
    "text SQL": lambda s: s.execute(text("UPDATE label SET text = 'by text'")),
    "Core on the connection": lambda s: s.connection().execute(update(Label.__table__).values(text="connected")),
    "bulk update of keys": lambda s: s.execute(update(Label).where(Label.name == "blue").values(name="navy")),
    "executemany with a WHERE": lambda s: s.connection().execute(
        update(Label.__table__).where(Label.__table__.c.name == sa.bindparam("which")),
        [{"which": "red", "text": "many"}, {"which": "blue", "text": "many"}],
    ),
}
SEEN_BY_NOBODY = {"ON DELETE CASCADE", "text SQL"}
"""Writes that pass without triggers. doctor finds them."""


def play(app: App, cell: Callable[[Session], Any]) -> None:
    with app.sessions() as session:
        cell(session)
        session.commit()


async def play_async(app: App, cell: Callable[[Session], Any]) -> None:
    from sqlalchemy.ext.asyncio import async_sessionmaker, create_async_engine

    from memstate_sa import sqlite

    url = app.engine.url
    if url.get_backend_name() == "sqlite":
        url = url.set(drivername="sqlite+aiosqlite")
    engine = create_async_engine(url)
    if url.get_backend_name() == "sqlite":
        sqlite.configure(engine)
        enforce = "PRAGMA foreign_keys = ON"
        event.listen(engine.sync_engine, "connect", lambda dbapi, record: dbapi.cursor().execute(enforce))
    sessions = async_sessionmaker(engine)
    app.memory.attach(sessions)
    async with sessions() as session:
        await session.run_sync(cell)
        await session.commit()
    await engine.dispose()


@pytest.mark.each_pair_once
@pytest.mark.parametrize("kind", ["Session", "AsyncSession"])
@pytest.mark.parametrize(
    ("capture", "name"),
    [*(("session", name) for name in CELLS), *(("trigger", name) for name in (*CELLS, *BY_TRIGGER_ONLY))],
)
async def test_every_write_is_captured(engine: Engine, name: str, capture: str, kind: str) -> None:
    """replay(log) equals the tables after every kind of write."""
    app = App(engine, capture)
    app.prepare()
    cell = {**CELLS, **BY_TRIGGER_ONLY}[name]
    if kind == "Session":
        play(app, cell)
    else:
        pytest.importorskip("aiosqlite")
        await play_async(app, cell)
    app.assert_log_is_truth()
    assert app.memory.doctor(engine).healthy
    app.memory.close()


@pytest.mark.parametrize("name", BY_TRIGGER_ONLY)
def test_uncaptured_write_is_refused_or_found(engine: Engine, name: str) -> None:
    """Without triggers nothing is lost silently: UntrackedWrite comes first, or doctor names the difference."""
    app = App(engine, "session")
    app.prepare()
    if name not in SEEN_BY_NOBODY:
        with pytest.raises(UntrackedWrite, match="would bypass the log of Label"):
            play(app, BY_TRIGGER_ONLY[name])
        app.assert_log_is_truth()
        assert app.memory.doctor(engine).healthy
        return
    play(app, BY_TRIGGER_ONLY[name])
    expected = {
        "text SQL": ([("label", "blue"), ("label", "red")], []),
        "ON DELETE CASCADE": ([], [("leaf", 1), ("leaf", 2)]),
    }
    found = app.memory.doctor(engine, repair=True)
    assert (sorted(found.changed, key=str), sorted(found.gone, key=str)) == expected[name]
    app.assert_log_is_truth()
    assert app.memory.doctor(engine).healthy
