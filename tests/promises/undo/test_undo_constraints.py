"""Undo where foreign keys and unique values allow few orders of writing, or none."""

from __future__ import annotations

import enum
import io
import threading
import uuid
from collections.abc import Sequence
from datetime import UTC, date, datetime
from decimal import Decimal
from pathlib import Path
from typing import Any, ClassVar

import pytest
import sqlalchemy as sa
from sqlalchemy import Engine, ForeignKey, create_engine, event
from sqlalchemy.dialects.postgresql import ARRAY, INT4RANGE, ExcludeConstraint
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column

from memstate_sa import ConflictError, sqlite
from tests.support import apps
from tests.support.relays import eventually

pytestmark = pytest.mark.sa20


class App(apps.App):
    """Tracks the classes of one Base with their options, and leaves some out."""

    def __init__(self, engine: Engine, base: Any, *untracked: Any, **tracked: dict[str, Any]) -> None:
        models = [mapper.class_ for mapper in base.registry.mappers if mapper.class_ not in untracked]
        super().__init__(engine, *models, tracking=tracked, foreign_keys=True, text=None)
        self.base = base

    def tables(self) -> dict[str, list[tuple[Any, ...]]]:
        with self.engine.connect() as connection:
            return {
                table.name: [tuple(row) for row in connection.execute(sa.select(table).order_by(*table.primary_key))]
                for table in self.base.metadata.sorted_tables
            }

    def check(self) -> None:
        """Assert that the log equals the tables."""
        report = self.memory.doctor(self.engine)
        assert report.healthy, report


@pytest.fixture
def statements(engine: Engine) -> list[str]:
    """The statements of this thread. Another thread wakes the relays."""
    sent: list[str] = []
    here = threading.get_ident()

    def listen(*args: Any) -> None:
        if threading.get_ident() == here:
            sent.append(args[2])

    event.listen(engine, "before_cursor_execute", listen)
    return sent


# -- tables that refer to each other -----------------------------------------------------------------------------------


def mutual(*, nullable: bool = True, **options: Any) -> tuple[Any, Any, Any]:
    class Base(DeclarativeBase):
        pass

    class User(Base):
        __tablename__ = "user_"
        id: Mapped[int] = mapped_column(primary_key=True)
        primary_id: Mapped[int | None] = mapped_column(
            ForeignKey("address.id", name="fk_primary", **({} if nullable else options)), nullable=nullable
        )

    class Address(Base):
        __tablename__ = "address"
        id: Mapped[int] = mapped_column(primary_key=True)
        user_id: Mapped[int] = mapped_column(ForeignKey("user_.id", name="fk_user", **options))

    return Base, User, Address


@pytest.mark.parametrize("use_alter", [False, True])
@pytest.mark.filterwarnings("ignore:Can't sort tables:sqlalchemy.exc.SAWarning")
@pytest.mark.filterwarnings("ignore:Cannot correctly sort tables:sqlalchemy.exc.SAWarning")
def test_nullable_foreign_key_of_a_circle_is_written_last(engine: Engine, tmp_path: Path, *, use_alter: bool) -> None:
    """The other foreign key orders the tables, for deletes, inserts and an import."""
    base, user, address = mutual(use_alter=use_alter)
    app = App(engine, base)
    with app.sessions() as session:
        session.add(user(id=1))
        session.flush()
        session.add(address(id=1, user_id=1))
        session.commit()
        app.memory.rollback(session)
        session.flush()
        assert session.get(user, 1) is None and session.get(address, 1) is None
        session.rollback()
        session.get_one(user, 1).primary_id = 1
        session.commit()
        before = app.tables()
        session.get_one(user, 1).primary_id = None
        session.flush()
        session.delete(session.get_one(address, 1))
        session.flush()
        session.delete(session.get_one(user, 1))
        session.commit()
        app.memory.rollback(session)
        session.commit()
        assert app.tables() == before
    app.check()
    file = io.StringIO()
    app.memory.export_facts(engine, file)
    copy = create_engine(f"sqlite:///{tmp_path / 'other.db'}")
    sqlite.configure(copy)
    other = App(copy, base)
    file.seek(0)
    other.memory.import_facts(copy, file)
    assert other.tables() == before
    other.check()
    copy.dispose()


@pytest.mark.filterwarnings("ignore:Can't sort tables:sqlalchemy.exc.SAWarning")
@pytest.mark.filterwarnings("ignore:Cannot correctly sort tables:sqlalchemy.exc.SAWarning")
def test_deferred_foreign_keys_of_a_circle_take_any_order(engine: Engine) -> None:
    """No foreign key of the circle may be NULL, not even for a moment."""
    base, user, address = mutual(nullable=False, deferrable=True, initially="DEFERRED")
    app = App(engine, base)
    with app.sessions() as session:
        session.add(user(id=1, primary_id=1))
        session.flush()
        session.add(address(id=1, user_id=1))
        session.commit()
        before = app.tables()
        app.memory.rollback(session)
        session.commit()
        assert app.tables() == {"user_": [], "address": []}
        app.memory.rollback(session, tx=app.memory.history(session, user, 1)[-1].tx)
        session.commit()
    assert app.tables() == before
    app.check()


# -- values that move between rows -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("type_", "values"),
    [
        (sa.Date, [date(2024, 1, n) for n in (1, 2, 3)]),
        (sa.DateTime, [datetime(2024, 1, n) for n in (1, 2, 3)]),
        (sa.DateTime(timezone=True), [datetime(2024, 1, n, tzinfo=UTC) for n in (1, 2, 3)]),
        (sa.Uuid, [uuid.UUID(int=n) for n in (1, 2, 3)]),
        (sa.Uuid(as_uuid=False), [str(uuid.UUID(int=n)) for n in (1, 2, 3)]),
        (sa.Numeric(3, 2), [Decimal("1.50"), Decimal("2.50"), Decimal("3.50")]),
        (sa.Float, [1.5, 2.5, 3.5]),
        (sa.LargeBinary(4), [b"1", b"2", b"3"]),
        (sa.String(5), ["a", "b", "c"]),
    ],
    ids=lambda value: None if isinstance(value, list) else repr(value),
)
@pytest.mark.filterwarnings("ignore:Dialect sqlite.*does \\*not\\* support Decimal:sqlalchemy.exc.SAWarning")
def test_swapped_values_of_any_type_are_undone(engine: Engine, type_: Any, values: Sequence[Any]) -> None:
    """One row gets an unused value for a moment, also where the column is unique together with a foreign key."""

    class Base(DeclarativeBase):
        pass

    class Owner(Base):
        __tablename__ = "owner"
        id: Mapped[int] = mapped_column(primary_key=True)

    class Thing(Base):
        __tablename__ = "thing"
        id: Mapped[int] = mapped_column(primary_key=True)
        one: Mapped[Any] = mapped_column(type_, unique=True)
        two: Mapped[Any] = mapped_column(type_)
        owner_id: Mapped[int] = mapped_column(ForeignKey("owner.id"))
        __table_args__ = (sa.UniqueConstraint("owner_id", "two"),)

    app = App(engine, Base)
    a, b, c = values
    with app.sessions() as session:
        session.add(Owner(id=1))
        session.flush()
        session.add_all([Thing(id=1, one=a, two=b, owner_id=1), Thing(id=2, one=b, two=a, owner_id=1)])
        session.commit()
        before = app.tables()
        for key, one, two in ((1, c, c), (2, a, b), (1, b, a)):
            thing = session.get_one(Thing, key)
            thing.one, thing.two = one, two
            session.flush()
        session.commit()
        app.memory.rollback(session)
        session.commit()
    assert app.tables() == before
    app.check()


def test_swapped_values_that_others_refer_to_are_undone(engine: Engine) -> None:
    """A child that refers to one of them, and is part of the undo, first drops its reference."""

    class Base(DeclarativeBase):
        pass

    class Parent(Base):
        __tablename__ = "parent"
        id: Mapped[int] = mapped_column(primary_key=True)
        code: Mapped[str] = mapped_column(unique=True)

    class Child(Base):
        __tablename__ = "child"
        id: Mapped[int] = mapped_column(primary_key=True)
        code: Mapped[str | None] = mapped_column(ForeignKey("parent.code"))

    app = App(engine, Base)
    with app.sessions() as session:
        session.add_all([Parent(id=1, code="x"), Parent(id=2, code="y")])
        session.flush()
        session.add(Child(id=1, code="x"))
        session.commit()
        before = app.tables()
        for model, key, code in (
            (Child, 1, None), (Parent, 1, "t"), (Parent, 2, "x"), (Parent, 1, "y"), (Child, 1, "y")
        ):  # fmt: skip
            session.get_one(model, key).code = code
            session.flush()
        session.commit()
        app.memory.rollback(session)
        session.commit()
    assert app.tables() == before
    app.check()


# -- conflicts ---------------------------------------------------------------------------------------------------------


def test_taken_value_of_unique_by_is_a_conflict(engine: Engine) -> None:
    """The error names the present holder, and revoke skips only this fact. An undone holder does not conflict."""

    class Base(DeclarativeBase):
        pass

    class Contact(Base):
        __tablename__ = "contact"
        id: Mapped[int] = mapped_column(primary_key=True)
        email: Mapped[str]

    app = App(engine, Base, Contact={"unique_by": ("email",)})
    with app.session() as session:
        session.add_all([Contact(id=1, email="x"), Contact(id=3, email="y")])
        session.commit()
        app.memory.annotate(session, actor="me")
        session.delete(session.get_one(Contact, 1))
        session.get_one(Contact, 3).email = "z"
        session.commit()
        app.memory.annotate(session, actor="you")
        session.add(Contact(id=2, email="x"))
        session.commit()
        with pytest.raises(ConflictError) as refused:
            app.memory.rollback(session, actor="me")
        assert [(change.key, change.actor) for change in refused.value.changes] == [(2, "you")]
        result = app.memory.revoke(session, actor="me")
        session.commit()
        assert [change.key for change in result.reverted] == [3]
        assert [change.key for change in result.kept] == [1]
        assert [(change.key, change.actor) for change in result.conflicts] == [(2, "you")]
        app.memory.annotate(session, actor="me")
        session.get_one(Contact, 2).email, session.get_one(Contact, 3).email = "swap", "x"
        session.flush()
        session.get_one(Contact, 2).email = "y"
        session.commit()
        app.memory.rollback(session)
        session.commit()
        assert app.tables()["contact"] == [(2, "x"), (3, "y")]
    app.check()


@pytest.mark.parametrize("on_conflict", ["skip", "force"])
def test_returned_row_does_not_block_its_own_unique_value(engine: Engine, on_conflict: Any) -> None:
    """Undoing the delete becomes an update of the new row, which owns the unique value."""

    class Base(DeclarativeBase):
        pass

    class Contact(Base):
        __tablename__ = "contact"
        id: Mapped[int] = mapped_column(primary_key=True)
        email: Mapped[str]

    app = App(engine, Base, Contact={"unique_by": ("email",)})
    with app.session() as session:
        session.add(Contact(id=1, email="x"))
        session.commit()
        app.memory.annotate(session, actor="me")
        session.delete(session.get_one(Contact, 1))
        session.commit()
        app.memory.annotate(session, actor="you")
        session.add(Contact(id=1, email="x"))
        session.commit()
        changes = app.memory.rollback(session, actor="me", on_conflict=on_conflict)
        session.commit()
        assert [(change.op, change.before, change.after) for change in changes] == [
            ("update", {"id": 1, "email": "x"}, {"id": 1, "email": "x"})
        ]
        session.add(Contact(id=2, email="x"))
        with pytest.raises(ConflictError):
            session.commit()
    app.check()


def test_a_chain_is_looked_at_once(engine: Engine, statements: list[str]) -> None:
    """Each node keeps the one above it in place. Even thousands of them cost no extra statement."""

    class Base(DeclarativeBase):
        pass

    class Node(Base):
        __tablename__ = "node"
        id: Mapped[int] = mapped_column(primary_key=True, autoincrement=False)
        up: Mapped[int | None] = mapped_column(ForeignKey("node.id"))

    app = App(engine, Base)
    costs = []
    for first, length in ((1, 3), (1000, 300)):
        with app.session(session_id=f"run {first}") as session:
            session.add_all(Node(id=first + n, up=first + n - 1 if n else None) for n in range(length))
            session.add(Node(id=first + length))
            session.commit()
        with app.session(actor="you") as session:
            session.add(Node(id=first + length + 1, up=first + length - 1))
            session.commit()
            statements.clear()
            result = app.memory.revoke(session, session_id=f"run {first}")
            costs.append(len(statements))
            session.commit()
        assert [change.key for change in result.reverted] == [first + length]
        assert {change.key for change in result.kept} == set(range(first, first + length))
        assert [(change.key, change.actor) for change in result.conflicts] == [(first + length + 1, "you")]
    assert costs[0] == costs[1]
    app.check()


def test_parents_that_are_gone_are_looked_for_together(engine: Engine, statements: list[str]) -> None:
    """Hundreds of them cost no more statements than one."""

    class Base(DeclarativeBase):
        pass

    class Parent(Base):
        __tablename__ = "parent"
        id: Mapped[int] = mapped_column(primary_key=True, autoincrement=False)

    class Child(Base):
        __tablename__ = "child"
        id: Mapped[int] = mapped_column(primary_key=True, autoincrement=False)
        parent_id: Mapped[int] = mapped_column(ForeignKey("parent.id"))

    app = App(engine, Base)
    costs = []
    for first, count in ((1, 1), (1000, 200)):
        ids = range(first, first + count)
        with app.sessions() as session:
            session.add_all(Parent(id=n) for n in ids)
            session.flush()
            session.add_all(Child(id=n, parent_id=n) for n in ids)
            session.commit()
            for actor, model in ((f"me {first}", Child), ("you", Parent)):
                app.memory.annotate(session, actor=actor)
                for fact in session.scalars(sa.select(model)):
                    session.delete(fact)
                session.commit()
            statements.clear()
            result = app.memory.revoke(session, actor=f"me {first}")
            costs.append(len(statements))
        assert result.reverted == []
        assert {change.key for change in result.kept} == set(ids)
        assert {(change.entity, change.key, change.actor) for change in result.conflicts} == {
            ("parent", n, "you") for n in ids
        }
    assert costs[0] == costs[1]
    app.check()


def test_parent_is_found_by_its_collation(sqlite_engine: Engine) -> None:
    """The collation decides, so the child comes back. (The PostgreSQL of the tests has no such collation.)"""

    class Base(DeclarativeBase):
        pass

    class Word(Base):
        __tablename__ = "word"
        text: Mapped[str] = mapped_column(sa.String(20, collation="NOCASE"), primary_key=True)

    class Use(Base):
        __tablename__ = "use"
        id: Mapped[int] = mapped_column(primary_key=True)
        word: Mapped[str] = mapped_column(sa.String(20, collation="NOCASE"), ForeignKey("word.text"))

    app = App(sqlite_engine, Base)
    with app.sessions() as session:
        session.add_all([Word(text="one"), Word(text="two")])
        session.flush()
        session.add_all([Use(id=1, word="ONE"), Use(id=2, word="two"), Use(id=3, word="Two")])
        session.commit()
        before = app.tables()
        for fact in session.scalars(sa.select(Use)):
            session.delete(fact)
        session.commit()
        app.memory.rollback(session)
        session.commit()
        assert app.tables() == before
        app.memory.annotate(session, actor="you")
        session.add(Use(id=4, word="TWO"))
        session.commit()
        first = app.memory.history(session, Word)[0].tx
        result = app.memory.revoke(session, tx=[first])
        assert {change.key for change in result.kept} == {"two"}
        assert [(change.key, change.actor) for change in result.conflicts] == [(4, "you")]
    app.check()


class Mood(enum.Enum):
    GOOD = "good"
    BAD = "bad"


def test_unique_arrays_are_compared_like_other_values(postgres_engine: Engine) -> None:
    """The error names the row that has the needed value."""

    class Base(DeclarativeBase):
        pass

    class Parent(Base):
        __tablename__ = "parent"
        id: Mapped[int] = mapped_column(primary_key=True)
        path: Mapped[list[int]] = mapped_column(ARRAY(sa.BigInteger), unique=True)
        moods: Mapped[list[Mood]] = mapped_column(ARRAY(sa.Enum(Mood)))
        ids: Mapped[list[uuid.UUID]] = mapped_column(ARRAY(sa.Uuid))
        __table_args__ = (sa.UniqueConstraint("moods", "ids"),)

    class Child(Base):
        __tablename__ = "child"
        id: Mapped[int] = mapped_column(primary_key=True)
        path: Mapped[list[int]] = mapped_column(ARRAY(sa.BigInteger), ForeignKey("parent.path"))

    app = App(postgres_engine, Base)
    moods, ids = [Mood.GOOD, Mood.BAD], [uuid.UUID(int=1)]
    with app.session() as session:
        session.add(Parent(id=1, path=[1, 2], moods=moods, ids=ids))
        session.commit()
        before = app.tables()
        session.get_one(Parent, 1).path, session.get_one(Parent, 1).ids = [3], []
        session.commit()
        app.memory.rollback(session)
        session.commit()
        assert app.tables() == before
        app.memory.annotate(session, actor="me")
        session.get_one(Parent, 1).ids = []
        session.commit()
        app.memory.annotate(session, actor="me")
        session.delete(session.get_one(Parent, 1))
        session.commit()
        app.memory.annotate(session, actor="you")
        session.add(Parent(id=2, path=[1, 2], moods=[Mood.BAD], ids=[]))
        session.add(Parent(id=3, path=[], moods=moods, ids=ids))
        session.flush()
        session.add(Child(id=1, path=[1, 2]))
        session.commit()
        for scope, entity, key in (({"actor": "me"}, "parent", 2), ({"actor": "you", "model": Parent}, "child", 1)):
            with pytest.raises(ConflictError) as refused:
                app.memory.rollback(session, **scope)
            assert [(change.entity, change.key) for change in refused.value.changes] == [(entity, key)]
        with pytest.raises(ConflictError) as refused:
            app.memory.rollback(session, 2, actor="me")
        assert {change.key for change in refused.value.changes} <= {2, 3}
    app.check()


@pytest.mark.parametrize("capture", ["session", "trigger"])
def test_constraints_that_only_the_database_knows_refuse_the_whole_undo(engine: Engine, capture: str) -> None:
    """A partial index and an untracked row: nothing is written, even with on_conflict="skip"."""
    here = sa.text("NOT gone")

    class Base(DeclarativeBase):
        pass

    class Parent(Base):
        __tablename__ = "parent"
        id: Mapped[int] = mapped_column(primary_key=True, autoincrement=False)
        slot: Mapped[int]
        gone: Mapped[bool] = mapped_column(default=False)
        __table_args__ = (sa.Index("slot_taken", "slot", unique=True, postgresql_where=here, sqlite_where=here),)

    class Stranger(Base):
        __tablename__ = "stranger"
        id: Mapped[int] = mapped_column(primary_key=True)
        parent_id: Mapped[int] = mapped_column(ForeignKey("parent.id"))

    app = App(engine, Base, Stranger, Parent={"capture": capture})
    with app.session(actor="me") as session:
        session.add_all(Parent(id=n, slot=n) for n in (1, 2))
        session.commit()
        app.memory.annotate(session, actor="hider")
        for parent in session.scalars(sa.select(Parent)):
            parent.gone = True
        session.commit()
        app.memory.annotate(session, actor="adder")
        session.add_all(Parent(id=n, slot=n) for n in (3, 4))
        session.commit()
        app.memory.annotate(session, actor="you")
        session.add(Parent(id=5, slot=1))
        session.add(Stranger(parent_id=3))
        session.commit()
        before = app.tables()
        for actor, reason in (("hider", "slot"), ("adder", "stranger|FOREIGN KEY")):
            with pytest.raises(ConflictError, match=reason):
                app.memory.revoke(session, actor=actor, on_conflict="skip")
            session.commit()
            assert app.tables() == before
    app.check()


@pytest.mark.parametrize("kind", ["functional index", "collation"])
@pytest.mark.parametrize("is_renamed", [False, True])
def test_value_in_another_form_is_handed_back(engine: Engine, kind: str, *, is_renamed: bool) -> None:
    """Only the database knows that the two forms are equal. The row that holds the value goes, or changes, first."""
    if kind == "collation" and engine.dialect.name == "postgresql":
        pytest.skip("NOCASE is SQLite's")

    class Base(DeclarativeBase):
        pass

    class Account(Base):
        __tablename__ = "account"
        id: Mapped[int] = mapped_column(primary_key=True)
        name: Mapped[str] = mapped_column(
            sa.String(collation="NOCASE" if kind == "collation" else None), unique=kind == "collation"
        )
        if kind == "functional index":
            __table_args__ = (sa.Index("name_taken", sa.text("lower(name)"), unique=True),)

    app = App(engine, Base)
    with app.sessions() as session:
        session.add(Account(id=1, name="Ana"))
        session.commit()
        before = app.tables()
        account = session.get_one(Account, 1)
        if is_renamed:
            account.name = "Bea"
        else:
            session.delete(account)
        session.flush()
        session.add(Account(id=2, name="ana"))
        session.commit()
        after = app.tables()
        app.memory.rollback(session)
        session.commit()
        assert app.tables() == before
        app.memory.rollback(session, tx=app.memory.history(session, Account, 2)[-1].tx)
        session.commit()
    assert app.tables() == after
    app.check()


def test_rows_that_need_opposite_orders_are_undone_together(engine: Engine) -> None:
    """One deleted row must make room first, and one new row must exist first."""

    class Base(DeclarativeBase):
        pass

    class Single(Base):
        __tablename__ = "single"
        id: Mapped[int] = mapped_column(primary_key=True)
        kind: Mapped[str] = mapped_column(sa.Enum("only", name="kind"), unique=True)  # so no temporary value exists

    class Parent(Base):
        __tablename__ = "parent"
        id: Mapped[int] = mapped_column(primary_key=True)

    class Child(Base):
        __tablename__ = "child"
        id: Mapped[int] = mapped_column(primary_key=True)
        parent_id: Mapped[int] = mapped_column(ForeignKey("parent.id"))

    app = App(engine, Base)
    with app.sessions() as session:
        session.add_all([Single(id=1, kind="only"), Parent(id=1)])
        session.flush()
        session.add(Child(id=1, parent_id=1))
        session.commit()
        before = app.tables()
        session.delete(session.get_one(Single, 1))
        session.add(Parent(id=2))
        session.flush()
        session.add(Single(id=2, kind="only"))
        session.get_one(Child, 1).parent_id = 2
        session.flush()
        session.delete(session.get_one(Parent, 1))
        session.commit()
        app.memory.rollback(session)
        session.commit()
    assert app.tables() == before
    app.check()


def test_undo_sends_one_statement_for_each_set_of_columns(engine: Engine, statements: list[str]) -> None:
    """The order in which rows with different changed columns alternate does not matter."""

    class Base(DeclarativeBase):
        pass

    class Thing(Base):
        __tablename__ = "thing"
        id: Mapped[int] = mapped_column(primary_key=True)
        one: Mapped[int] = mapped_column(default=0)
        two: Mapped[int] = mapped_column(default=0)

    app = App(engine, Base)
    with app.sessions() as session:
        session.add_all(Thing(id=n) for n in range(200))
        session.commit()
        before = app.tables()
        costs = []
        for count in (2, 200):
            for n in range(count):
                setattr(session.get_one(Thing, n), "two" if n % 2 else "one", 1)
            session.commit()
            statements.clear()
            app.memory.rollback(session)
            costs.append(len(statements))
            session.commit()
            assert app.tables() == before
    assert costs[0] == costs[1]
    app.check()


# -- equal values ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("capture", ["session", "trigger"])
def test_values_that_others_put_back_are_compared_by_value(engine: Engine, statements: list[str], capture: str) -> None:
    """Triggers write floats in another form. Equal values need no write either."""

    class Base(DeclarativeBase):
        pass

    class Measure(Base):
        __tablename__ = "measure"
        id: Mapped[int] = mapped_column(primary_key=True)
        value: Mapped[float]

    app = App(engine, Base, Measure={"capture": capture})
    with app.session() as session:
        session.add(Measure(id=1, value=1.5))
        session.commit()
        for actor, value in (("me", 2.5), ("you", 1.5)):
            app.memory.annotate(session, actor=actor)
            session.get_one(Measure, 1).value = value
            session.commit()
        statements.clear()
        result = app.memory.revoke(session, actor="me")
        session.commit()
        assert [change.key for change in result.reverted] == [1]
        assert result.kept == result.conflicts == []
        assert not any(statement.startswith("UPDATE measure") for statement in statements)
    app.check()


def test_added_and_dropped_columns_are_no_conflict(engine: Engine) -> None:
    """Later changes of others are compared only by columns that exist now and existed then."""

    class Old(DeclarativeBase):
        pass

    class Before(Old):
        __tablename__ = "thing"
        id: Mapped[int] = mapped_column(primary_key=True)
        text: Mapped[str]
        old: Mapped[int | None]

    class New(DeclarativeBase):
        pass

    class After(New):
        __tablename__ = "thing"
        id: Mapped[int] = mapped_column(primary_key=True)
        text: Mapped[str]
        new: Mapped[int | None] = mapped_column(unique=True)

    app = App(engine, Old)
    with app.session() as session:
        session.add(Before(id=1, text="x", old=5))
        session.commit()
        for actor, words in (("me", "y"), ("you", "x"), ("she", "z")):
            app.memory.annotate(session, actor=actor)
            session.get_one(Before, 1).text = words
            session.commit()
    with engine.begin() as connection:
        connection.execute(sa.text("ALTER TABLE thing DROP COLUMN old"))
        connection.execute(sa.text("ALTER TABLE thing ADD COLUMN new INTEGER"))
        connection.execute(sa.text("CREATE UNIQUE INDEX new_is_unique ON thing (new)"))
    app = App(engine, New)
    with app.session() as session:
        session.get_one(After, 1).new = 7
        app.memory.annotate(session, actor="she")
        session.commit()
        for scope in ("she", "me"):
            result = app.memory.revoke(session, actor=scope)
            assert result.kept == result.conflicts == []
        session.commit()
    assert app.tables() == {"thing": [(1, "x", 7)]}  # the log does not know the earlier value
    app.check()


@pytest.mark.parametrize("kind", ["functional index", "exclusion", "new column"])
def test_refusal_names_the_constraint_and_the_rows_in_the_way(engine: Engine, kind: str) -> None:
    """This includes a constraint that only the database understands."""
    if kind == "exclusion" and engine.dialect.name == "sqlite":
        pytest.skip("SQLite has no such constraint")
    names = {
        "functional index": {"sqlite": "index 'name_taken'", "postgresql": '"name_taken". Key (lower(text'},
        "exclusion": {
            "postgresql": '"no_overlap". Key (nights)=([1,5)) conflicts with existing key (nights)=([1,5))',
        },
        "new column": {"sqlite": "stay.needed", "postgresql": '"needed"'},
    }[kind]

    class Base(DeclarativeBase):
        pass

    class Stay(Base):
        __tablename__ = "stay"
        id: Mapped[int] = mapped_column(primary_key=True)
        text: Mapped[str]
        if kind == "functional index":
            __table_args__ = (sa.Index("name_taken", sa.text("lower(text)"), unique=True),)
        if kind == "exclusion":
            nights = mapped_column(INT4RANGE, server_default="[1,5)")
            __table_args__ = (ExcludeConstraint(("nights", "&&"), name="no_overlap"),)

    app = apps.make_app(engine, Stay)
    app.write(Stay(id=1, text="Ana"))
    with app.session(actor="me") as session:
        session.delete(session.get_one(Stay, 1))
        session.commit()
    if kind == "new column":
        with engine.begin() as connection:
            connection.execute(sa.text("DROP TABLE stay"))
            connection.execute(
                sa.text("CREATE TABLE stay (id INTEGER PRIMARY KEY, text TEXT, needed INTEGER NOT NULL)")
            )
    else:
        app.write(Stay(id=2, text="ana"), actor="you")
    way_out = "a default in the database" if kind == "new column" else "Change the rows in the way"
    for on_conflict in ("raise", "skip"):
        with app.session(actor="me") as session, pytest.raises(ConflictError) as refused:
            app.memory.rollback(session, on_conflict=on_conflict)
        message = str(refused.value)
        assert message.startswith("Cannot undo: ") and names[engine.dialect.name] in message and way_out in message
        assert isinstance(refused.value.__cause__, sa.exc.IntegrityError)


# -- concurrent transactions -------------------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore:The log misses some changes of child")
@pytest.mark.parametrize("joined", [False, True])
def test_undo_waits_for_a_child_that_arrives(postgres_engine: Engine, *, joined: bool) -> None:
    """The undo waits and then sees the child. Otherwise the database would delete it without a log entry."""

    class Base(DeclarativeBase):
        pass

    class Parent(Base):
        __tablename__ = "parent"
        id: Mapped[int] = mapped_column(primary_key=True)
        kind: Mapped[str] = mapped_column(default="plain")
        __mapper_args__: ClassVar[dict[str, Any]] = {"polymorphic_on": "kind", "polymorphic_identity": "plain"}

    class Sub(Parent):
        __tablename__ = "sub"
        id: Mapped[int] = mapped_column(ForeignKey("parent.id"), primary_key=True)
        __mapper_args__: ClassVar[dict[str, Any]] = {"polymorphic_identity": "sub"}

    class Child(Base):
        __tablename__ = "child"
        id: Mapped[int] = mapped_column(primary_key=True)
        parent_id: Mapped[int] = mapped_column(ForeignKey("sub.id" if joined else "parent.id", ondelete="CASCADE"))

    app = App(postgres_engine, Base, Sub)
    with app.sessions() as session:
        session.add(Sub(id=1))
        session.commit()
    outcome: list[Any] = []

    def undo() -> None:
        with app.sessions() as session:
            try:
                outcome.append(app.memory.rollback(session))
            except ConflictError as error:
                outcome.append(error)

    with app.session(actor="other") as other:
        other.add(Child(id=1, parent_id=1))
        other.flush()
        thread = threading.Thread(target=undo)
        thread.start()
        eventually(lambda: waiting(postgres_engine) or outcome)
        other.commit()
    thread.join()
    [refused] = outcome
    assert isinstance(refused, ConflictError)
    assert [(change.entity, change.actor) for change in refused.changes] == [("child", "other")]
    assert app.tables()["child"] == [(1, 1)]
    app.check()


def waiting(engine: Engine) -> bool:
    """Whether a transaction waits for a lock."""
    with engine.connect() as connection:
        return bool(connection.scalar(sa.text("SELECT count(*) FROM pg_locks WHERE NOT granted")))
