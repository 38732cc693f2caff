"""Foreign keys whose actions change tracked rows inside the database, where no Session sees it."""

from __future__ import annotations

import re
import warnings
from typing import Any

import pytest
from sqlalchemy import Engine, ForeignKey, text
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column, relationship, sessionmaker

from memstate_sa import Memory
from memstate_sa.capture.guard import UntrackedWriteWarning
from memstate_sa.indexes import InMemoryIndex
from memstate_sa.maintenance.doctor import Risk
from memstate_sa.testing import HashEmbedder

pytestmark = pytest.mark.sa20


def models(*, ondelete: str | None = None, onupdate: str | None = None, **options: Any) -> tuple[Any, Any]:
    """A parent and its child. *options* belong to the parent's relationship, and without options there is none."""

    class Base(DeclarativeBase):
        pass

    class Owner(Base):
        __tablename__ = "owner"
        id: Mapped[int] = mapped_column(primary_key=True, autoincrement=False)
        text: Mapped[str] = mapped_column(default="owner")

    class Leaf(Base):
        __tablename__ = "leaf"
        id: Mapped[int] = mapped_column(primary_key=True, autoincrement=False)
        text: Mapped[str] = mapped_column(default="leaf")
        owner_id: Mapped[int | None] = mapped_column(ForeignKey("owner.id", ondelete=ondelete, onupdate=onupdate))

    if options:
        Owner.leaves = relationship(Leaf, **options)
    return Owner, Leaf


def start(engine: Engine, *tracked: Any, capture: Any = "session") -> tuple[Memory, list[str]]:
    """A Memory after its first Session, and the warnings until then."""
    memory = Memory(InMemoryIndex(), embedder=HashEmbedder())
    for model in tracked:
        memory.track(model, text="text", capture=capture)
    sessions = sessionmaker(engine)
    memory.attach(sessions)
    tracked[0].metadata.create_all(engine)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        memory.create_tables(engine)
        for _ in range(2):
            with sessions() as session:
                session.add(tracked[0](id=1))
                session.flush()
    assert all(each.category is UntrackedWriteWarning and each.filename == __file__ for each in caught)
    return memory, [str(each.message) for each in caught]


def diagnose(memory: Memory, engine: Engine) -> list[Any]:
    return [each for each in memory.doctor(engine).problems if "foreign key" in each.message]


UNSEEN: dict[str, tuple[dict[str, Any], bool, str]] = {
    "deletes, parent not tracked": (
        {"ondelete": "CASCADE"},
        False,
        "ON DELETE CASCADE.*Or track owner, with a",
    ),
    "set null, parent not tracked": ({"ondelete": "SET NULL"}, False, "ON DELETE SET NULL.*Or track owner"),
    "set default, in small letters": ({"ondelete": "set default"}, False, "ON DELETE SET DEFAULT"),
    "updates, parent not tracked": ({"onupdate": "CASCADE"}, False, "ON UPDATE CASCADE.*Or track owner"),
    "a Session's deletes only": ({"ondelete": "CASCADE", "cascade": "all"}, False, "Or track owner"),
    "no relationship": ({"ondelete": "CASCADE"}, True, "Or give Owner a relationship to Leaf without passive_deletes"),
    "passive": ({"ondelete": "CASCADE", "passive_deletes": True}, True, "define Owner.leaves without passive_deletes"),
    "passive, all": ({"ondelete": "SET NULL", "passive_deletes": "all"}, True, "define Owner.leaves without passive"),
    "view": ({"ondelete": "CASCADE", "viewonly": True}, True, "Or give Owner a relationship"),
    "keys": ({"onupdate": "CASCADE", "cascade": "all"}, True, "Owner.leaves with passive_updates=False"),
}
SEEN: dict[str, dict[str, Any]] = {
    "nothing": {},
    "restrict": {"ondelete": "RESTRICT", "onupdate": "NO ACTION"},
    "the unit of work deletes": {"ondelete": "CASCADE", "cascade": "all, delete-orphan"},
    "the unit of work sets null": {"ondelete": "SET NULL", "cascade": "save-update"},
    "the unit of work changes keys": {"onupdate": "CASCADE", "passive_updates": False},
}


@pytest.mark.parametrize("name", UNSEEN)
def test_a_cascade_that_no_session_sees_is_warned_of_and_diagnosed(engine: Engine, name: str) -> None:
    """The warning comes once, and points to the application's line. The same kind: composite keys, other schemas."""
    options, is_parent_tracked, message = UNSEEN[name]
    owner, leaf = models(**options)
    memory, warned = start(engine, *([owner] if is_parent_tracked else []), leaf)
    [problem] = diagnose(memory, engine)
    assert problem.subject == "leaf" and isinstance(problem, Risk)
    assert warned == [problem.message]
    assert re.search(message, problem.message) and "capture='trigger'" in problem.message
    memory.close()


@pytest.mark.parametrize("name", SEEN)
def test_cascade_that_sessions_see_is_not_warned_of(engine: Engine, name: str) -> None:
    """The unit of work does the same before the database would."""
    owner, leaf = models(**SEEN[name])
    memory, warned = start(engine, owner, leaf)
    assert warned == [] and diagnose(memory, engine) == []
    memory.close()


def test_triggers_see_every_cascade(engine: Engine) -> None:
    """This includes the cascade from a parent that is not tracked."""
    _, leaf = models(ondelete="CASCADE", onupdate="CASCADE")
    memory, warned = start(engine, leaf, capture="trigger")
    assert warned == [] and diagnose(memory, engine) == []
    memory.close()


def test_a_chain_names_where_it_begins(engine: Engine) -> None:
    """A row can also go with its parent's parent. A table that refers to itself ends the chain."""

    class Base(DeclarativeBase):
        pass

    class Root(Base):
        __tablename__ = "root"
        id: Mapped[int] = mapped_column(primary_key=True)
        root_id: Mapped[int | None] = mapped_column(ForeignKey("root.id", ondelete="CASCADE"))

    class Branch(Base):
        __tablename__ = "branch"
        id: Mapped[int] = mapped_column(primary_key=True)
        root_id: Mapped[int] = mapped_column(ForeignKey("root.id", ondelete="CASCADE"))

    class Leaf(Base):
        __tablename__ = "leaf"
        id: Mapped[int] = mapped_column(primary_key=True)
        text: Mapped[str] = mapped_column(default="leaf")
        branch_id: Mapped[int | None] = mapped_column(ForeignKey("branch.id", ondelete="CASCADE"))
        leaf_id: Mapped[int | None] = mapped_column(ForeignKey("leaf.id", ondelete="SET NULL"))

    memory, warned = start(engine, Leaf)
    assert sorted(each.partition("(")[2].partition(")")[0] for each in warned) == ["branch_id", "leaf_id"]
    assert [each for each in warned if "Rows of branch are deleted with those of root." in each]
    memory.close()


def test_the_doctor_reads_foreign_keys_of_the_database(engine: Engine) -> None:
    """A migration has given the key an action that the mapping does not have."""
    _, mapped = models()
    memory, warned = start(engine, mapped)
    with engine.begin() as connection:
        connection.execute(text("DROP TABLE leaf"))
        connection.execute(
            text(
                "CREATE TABLE leaf (id INTEGER PRIMARY KEY, text VARCHAR NOT NULL, "
                "owner_id INTEGER REFERENCES owner (id) ON DELETE CASCADE)"
            )
        )
    assert warned == []
    [problem] = diagnose(memory, engine)
    assert problem.subject == "leaf" and "ON DELETE CASCADE" in problem.message
    memory.close()
