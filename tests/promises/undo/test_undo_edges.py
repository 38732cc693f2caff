"""Undo and time travel with unusual types, unusual mappings and concurrent transactions."""

from __future__ import annotations

import enum
import threading
import warnings
from datetime import datetime, timedelta
from functools import partial
from typing import Any, ClassVar

import pytest
import sqlalchemy as sa
from sqlalchemy import Engine, ForeignKey, create_engine, event, func, insert, literal, select, type_coerce, update
from sqlalchemy.orm import DeclarativeBase, Mapped, Session, mapped_column, relationship, sessionmaker
from sqlalchemy.orm.exc import StaleDataError

from memstate_sa import Memory, MemstateError, UntrackedWriteWarning
from memstate_sa.db import sqlite
from memstate_sa.db.tables import log, transaction, utcnow
from memstate_sa.indexes import InMemoryIndex
from memstate_sa.testing import HashEmbedder
from memstate_sa.undo.selection import undone
from tests.support import Tag, World, assert_index_holds
from tests.support.apps import make_app

pytestmark = pytest.mark.sa20


class Prefixed(sa.TypeDecorator[str]):
    """SQL expressions store the value in one form and read it in another."""

    impl = sa.String
    cache_ok = True

    def bind_expression(self, bindparam: Any) -> Any:
        return literal("x:", sa.String) + type_coerce(bindparam, sa.String)

    def column_expression(self, column: Any) -> Any:
        return func.substr(type_coerce(column, sa.String), 3)


class Colour(enum.Enum):
    RED = "red"
    BLUE = "blue"
    GREEN = "green"


class Base(DeclarativeBase):
    pass


class Thing(Base):
    __tablename__ = "thing"
    id: Mapped[int] = mapped_column(primary_key=True, autoincrement=False)
    text: Mapped[str] = mapped_column(default="thing")
    secret: Mapped[str | None] = mapped_column(Prefixed)
    small: Mapped[int] = mapped_column(sa.SmallInteger, unique=True)
    colour: Mapped[Colour] = mapped_column(unique=True)


def test_type_with_sql_expressions_is_undone_in_its_stored_form(engine: Engine) -> None:
    """The stored form is logged and written back. The past shows the same form as the present."""
    app = make_app(engine, Thing)
    with app.sessions() as session:
        session.add(Thing(id=1, small=1, colour=Colour.RED, secret="one"))
        session.commit()
        first = app.memory.token(session) or ""
        session.get_one(Thing, 1).secret = "two"
        session.commit()
        with app.memory.as_of_session(engine, first) as past:
            assert past.get_one(Thing, 1).secret == "one"
        app.memory.rollback(session)
        session.commit()
        assert session.get_one(Thing, 1).secret == "one"
        assert session.execute(sa.text("SELECT secret FROM thing")).scalar_one() == "x:one"


def test_swapped_small_integers_and_enums_are_undone(engine: Engine) -> None:
    """The undo does not use a temporary value that the type would refuse."""
    app = make_app(engine, Thing)
    with app.sessions() as session:
        session.add_all([Thing(id=1, small=1, colour=Colour.RED), Thing(id=2, small=2, colour=Colour.BLUE)])
        session.commit()
        one, two = session.get_one(Thing, 1), session.get_one(Thing, 2)
        one.small = -5
        session.flush()
        two.small = 1
        session.flush()
        one.small = 2
        session.commit()
        app.memory.rollback(session)
        session.commit()
        assert (one.small, two.small) == (1, 2)


class Versioned(DeclarativeBase):
    pass


class Employee(Versioned):
    __tablename__ = "employee"
    id: Mapped[int] = mapped_column(primary_key=True)
    kind: Mapped[str] = mapped_column(sa.String(20))
    text: Mapped[str] = mapped_column(default="employee")
    version: Mapped[int] = mapped_column()
    __mapper_args__: ClassVar[dict[str, Any]] = {
        "polymorphic_on": "kind",
        "polymorphic_identity": "employee",
        "version_id_col": version,
    }


class Engineer(Employee):
    __tablename__ = "engineer"
    id: Mapped[int] = mapped_column(ForeignKey("employee.id"), primary_key=True)
    skill: Mapped[str]
    __mapper_args__: ClassVar[dict[str, Any]] = {"polymorphic_identity": "engineer"}


def test_a_stale_copy_notices_an_undo_in_another_table(engine: Engine) -> None:
    app = make_app(engine, Employee)
    with app.sessions() as session, app.sessions() as other:
        session.add(Engineer(id=1, skill="one"))
        session.commit()
        session.get_one(Engineer, 1).skill = "two"
        session.commit()
        stale = other.get_one(Engineer, 1)
        other.commit()
        other.expire_on_commit = False
        assert (stale.skill, stale.version) == ("two", stale.version)
        other.commit()
        app.memory.rollback(session)
        session.commit()
        stale.skill = "three"
        with pytest.raises(StaleDataError):
            other.commit()
        other.rollback()
        with pytest.raises(MemstateError, match="tracked together with Employee"):
            app.memory.rollback(session, model=Engineer)


def test_a_renamed_json_column_is_upgraded_as_it_is(engine: Engine) -> None:
    class Old(DeclarativeBase):
        pass

    class Doc(Old):
        __table__ = sa.Table(
            "doc", Old.metadata, sa.Column("id", sa.Integer, primary_key=True), sa.Column("data", sa.JSON)
        )

    app = make_app(engine, Doc, text="id")
    with app.sessions() as session:
        session.add(Doc(id=1, data={"a": [1]}))
        session.commit()
        session.delete(session.get_one(Doc, 1))
        session.commit()
    with engine.begin() as connection:
        connection.execute(sa.text("ALTER TABLE doc RENAME COLUMN data TO content"))

    class New(DeclarativeBase):
        pass

    class Renamed(New):
        __table__ = sa.Table(
            "doc", New.metadata, sa.Column("id", sa.Integer, primary_key=True), sa.Column("content", sa.JSON)
        )

    def rename(old: dict[str, Any]) -> dict[str, Any]:
        return {"id": old["id"], "content": old["data"]}

    app = make_app(engine, Renamed, text="id", version=2, upgrade={1: rename})
    with app.sessions() as session:
        assert app.memory.history(session, Renamed, 1)[0].after == {"id": 1, "content": {"a": [1]}}
        app.memory.rollback(session)
        session.commit()
        assert session.get_one(Renamed, 1).content == {"a": [1]}

    def fail(old: dict[str, Any]) -> dict[str, Any]:
        return {"id": old["id"], "content": old["contents"]}

    app = make_app(engine, Renamed, text="id", version=2, upgrade={1: fail})
    message = r"image of doc: upgrade\[1\] raised KeyError\. It got the columns id, data\. "
    with app.sessions() as session, pytest.raises(MemstateError, match=message) as caught:
        app.memory.history(session, Renamed, 1)
    assert isinstance(caught.value.__cause__, KeyError)


# -- other transactions ------------------------------------------------------------------------------------------------


class Family(DeclarativeBase):
    pass


class Parent(Family):
    __tablename__ = "parent"
    id: Mapped[int] = mapped_column(primary_key=True, autoincrement=False)
    text: Mapped[str] = mapped_column(default="parent")
    count: Mapped[int] = mapped_column(default=0)
    children: Mapped[list[Child]] = relationship(lazy="joined")


class Child(Family):
    __tablename__ = "child"
    id: Mapped[int] = mapped_column(primary_key=True, autoincrement=False)
    text: Mapped[str] = mapped_column(default="child")
    parent_id: Mapped[int] = mapped_column(ForeignKey("parent.id"))
    expires_at: Mapped[datetime | None] = mapped_column(sa.DateTime(timezone=False))


def test_tracking_adds_no_deadlock(postgres_engine: Engine) -> None:
    """Two transactions each add a child to one parent, which locks it against deletion. Then both change it."""
    app = make_app(postgres_engine, Parent, Child)
    with app.sessions() as session:
        session.add(Parent(id=1))
        session.commit()
    barrier, errors = threading.Barrier(2), list[Exception]()

    def work(number: int) -> None:
        try:
            with app.sessions() as session:
                session.add(Child(id=number, parent_id=1))
                session.flush()
                barrier.wait(60)
                session.execute(update(Parent).where(Parent.id == 1).values(count=Parent.count + 1))
                session.commit()
        except sa.exc.SQLAlchemyError as error:
            errors.append(error)

    threads = [threading.Thread(target=work, args=(number,)) for number in (1, 2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert errors == []
    with app.sessions() as session:
        assert session.get_one(Parent, 1).count == 2
        assert [change.after["count"] for change in app.memory.history(session, Parent, 1) if change.after] == [0, 1, 2]


def test_undo_has_a_token_and_a_dry_run_has_none(engine: Engine) -> None:
    """A token names a logged transaction. A dry run leaves nothing behind, not even a label."""
    app = make_app(engine, Parent)
    with app.sessions() as session:
        session.add(Parent(id=1, text="first"))
        session.commit()
        session.get_one(Parent, 1).text = "second"
        session.commit()
        token = app.memory.token(session)
        app.memory.annotate(session, actor="me")
        app.memory.rollback(session, dry_run=True)
        session.commit()
        assert app.memory.token(session) == token
        assert session.execute(select(transaction)).all() == []
        undo = app.memory.rollback(session)[0].tx
        session.commit()
        assert app.memory.token(session) == undo
        with app.memory.relay(engine):
            app.memory.wait(session, 60)
            assert_index_holds(app.index, app.embedder, {"parent[1]": "first"})


def test_statements_of_an_undo_do_not_grow_with_earlier_undos(world: World) -> None:
    """The undo goes by steps, by transaction, or back to a moment. Each past undo and redo used to add three."""
    with world.session() as session:
        session.add(Tag(name="a", meaning="x"))
        session.commit()
        first = last = world.memory.token(session)
        counts: list[dict[str, int]] = []
        for _ in range(2):
            for _ in range(8):
                world.memory.rollback(session, tx=last)
                session.commit()
                last = world.memory.token(session)
            sent: dict[str, int] = {}
            for name, what in (("steps", {"steps": 1}), ("tx", {"tx": last}), ("first", {"tx": first})):
                statements: list[str] = []
                count = partial(_note, statements)
                event.listen(world.engine, "before_cursor_execute", count)
                world.memory.rollback(session, dry_run=True, **what)
                event.remove(world.engine, "before_cursor_execute", count)
                sent[name] = len(statements)
            session.commit()
            counts.append(sent)
    assert counts[0] == counts[1]


def _note(statements: list[str], connection: Any, cursor: Any, statement: str, *_: Any) -> None:
    statements.append(statement)


@pytest.mark.deep_on("postgres")
def test_undo_redone_very_often_is_still_followed(engine: Engine) -> None:
    app = make_app(engine, Parent)
    depth = 1500
    rows: list[dict[str, Any]] = [
        {
            "tx": f"{n:032}", "entity": "parent", "key": "[1]", "op": "delete" if n % 2 else "insert", "version": 1,
            "image": None if n % 2 else {"id": 1, "text": "x", "count": 0}, "step": n == 0, "at": utcnow(),
            "reverts": f"{n - 1:032}" if n else None,
        }
        for n in range(depth)
    ]  # fmt: skip
    with engine.begin() as connection:
        connection.execute(insert(log), rows)
        assert undone(connection, {f"{0:032}"}) == {(f"{0:032}", ("parent", "[1]"))}
        assert undone(connection, {f"{1:032}"}) == set()
    assert app.memory is not None


def test_a_time_without_a_zone_is_utc_to_the_sweeper(postgres_url: str, postgres_engine: Engine) -> None:
    """The time zone of the connection does not matter."""
    engine = create_engine(postgres_url, connect_args={"options": "-c timezone=Asia/Tokyo"})
    app = make_app(engine, Parent, Child, tracking={Child: {"expires": "expires_at"}})
    now = utcnow().replace(tzinfo=None)
    with app.sessions() as session:
        session.add(Parent(id=1))
        session.flush()
        for n, hours in ((1, -1), (2, 3)):
            session.add(Child(id=n, parent_id=1, expires_at=now + timedelta(hours=hours)))
        session.commit()
    assert app.memory.sweep(engine) == 1
    with app.sessions() as session:
        assert session.scalars(select(Child.id)).all() == [2]
    engine.dispose()


# -- the past ----------------------------------------------------------------------------------------------------------


def test_the_past_stays_the_past_after_a_rollback(engine: Engine) -> None:
    app = make_app(engine, Parent, Child)
    with app.sessions() as session:
        session.add(Parent(id=1, text="then", children=[Child(id=1), Child(id=2)]))
        session.commit()
        then = app.memory.token(session) or ""
        session.get_one(Parent, 1).text = "now"
        session.commit()
        with app.memory.as_of_session(engine, then) as past:
            assert past.get_one(Parent, 1).text == "then"
            past.rollback()
            assert past.get_one(Parent, 1).text == "then"
            past.commit()
            assert len(past.get_one(Parent, 1).children) == 2
        hits = app.memory.search(session, "then", Parent, as_of=then)
        assert [(hit.fact.text, len(hit.fact.children)) for hit in hits] == [("then", 2)]


def test_past_is_shown_on_a_hardened_search_path(postgres_url: str, postgres_engine: Engine) -> None:
    engine = create_engine(postgres_url, connect_args={"options": "-c search_path=public,pg_temp"})
    app = make_app(engine, Parent)
    with app.sessions() as session:
        session.add(Parent(id=1, text="then"))
        session.commit()
        then = app.memory.token(session) or ""
        session.add(Parent(id=2, text="now"))
        session.commit()
    with app.memory.as_of_session(engine, then) as past:
        assert past.scalars(select(Parent.text)).unique().all() == ["then"]
    engine.dispose()


def test_the_past_needs_a_connection_of_its_own() -> None:
    engine = create_engine("sqlite://", poolclass=sa.pool.StaticPool, connect_args={"check_same_thread": False})
    app = make_app(engine, Parent)
    with pytest.raises(MemstateError, match="in-memory"), app.memory.as_of_session(engine, utcnow()):
        pass
    engine.dispose()


def test_a_search_in_the_past_needs_no_other_class(engine: Engine) -> None:
    """A class that names its schema cannot be replaced by a temporary table."""

    class Other(DeclarativeBase):
        pass

    class Elsewhere(Other):
        __table__ = sa.Table("elsewhere", Other.metadata, sa.Column("id", sa.Integer, primary_key=True), schema="main")

    app = make_app(engine, Parent)
    app.memory.track(Elsewhere, text="id")
    with app.sessions() as session:
        session.add(Parent(id=1, text="then"))
        session.commit()
        then = app.memory.token(session) or ""
        assert [hit.fact.text for hit in app.memory.search(session, "then", Parent, as_of=then)] == ["then"]
        with pytest.raises(MemstateError, match="names its schema"), app.memory.as_of_session(engine, then):
            pass


# -- subclasses --------------------------------------------------------------------------------------------------------


def test_concrete_subclass_without_a_tracked_column_is_refused() -> None:
    class Own(DeclarativeBase):
        pass

    class Page(Own):
        __tablename__ = "page"
        id: Mapped[int] = mapped_column(primary_key=True)
        text: Mapped[str]
        expires_at: Mapped[datetime | None] = mapped_column(sa.DateTime(timezone=True))

    class Leaf(Page):
        __tablename__ = "leaf"
        id: Mapped[int] = mapped_column(primary_key=True)
        text: Mapped[str]
        __mapper_args__: ClassVar[dict[str, Any]] = {"concrete": True}

    for options in ({"expires": "expires_at"}, {"unique_by": ("expires_at",)}):
        memory = Memory(InMemoryIndex(), embedder=HashEmbedder())
        with pytest.raises(MemstateError, match="Leaf has no column attribute 'expires_at'"):
            memory.track(Page, text="text", **options)  # type: ignore[call-overload]


def test_a_subclass_in_the_same_table_that_comes_late_is_delivered(engine: Engine) -> None:
    class Own(DeclarativeBase):
        pass

    class Root(Own):
        __tablename__ = "root"
        id: Mapped[int] = mapped_column(primary_key=True)
        kind: Mapped[str] = mapped_column(sa.String(10))
        text: Mapped[str]
        __mapper_args__: ClassVar[dict[str, Any]] = {"polymorphic_on": "kind", "polymorphic_identity": "root"}

    class Middle(Root):
        __mapper_args__: ClassVar[dict[str, Any]] = {"polymorphic_identity": "middle"}

    app = make_app(engine, Middle)
    with app.sessions() as session:
        session.add(Middle(id=1, text="first"))
        session.commit()
    app.memory.relay(engine).drain()

    class Late(Middle):
        __mapper_args__: ClassVar[dict[str, Any]] = {"polymorphic_identity": "late"}

    with app.sessions() as session:
        session.add(Late(id=2, text="second"))
        session.commit()
    app.memory.relay(engine).drain()
    assert_index_holds(app.index, app.embedder, {"root[1]": "first", "root[2]": "second"})


class Xid(sa.types.UserDefinedType[str]):
    cache_ok = True

    def get_col_spec(self, **_: Any) -> str:
        return "xid"


@pytest.mark.parametrize("capture", ["session", "trigger"])
def test_system_column_can_be_the_version_counter(postgres_engine: Engine, capture: str) -> None:
    """xmin is neither restored nor counted as a change. A stale copy still notices the undo."""

    class Base(DeclarativeBase):
        pass

    class Thing(Base):
        __tablename__ = "thing"
        id: Mapped[int] = mapped_column(primary_key=True)
        text: Mapped[str]
        xmin: Mapped[str] = mapped_column("xmin", Xid, system=True, server_default=sa.FetchedValue())
        __mapper_args__: ClassVar[dict[str, Any]] = {"version_id_col": xmin, "version_id_generator": False}

    app = make_app(postgres_engine, Thing, capture=capture)
    with app.sessions() as session, app.sessions() as other:
        session.add(Thing(id=1, text="one"))
        session.commit()
        first = app.memory.token(session) or ""
        session.get_one(Thing, 1).text = "two"
        session.commit()
        stale = other.get_one(Thing, 1)
        app.memory.rollback(session)
        session.commit()
        stale.text = "stale"
        with pytest.raises(StaleDataError):
            other.commit()
        other.rollback()
        assert session.get_one(Thing, 1).text == "one"
        session.delete(session.get_one(Thing, 1))
        session.commit()
        app.memory.rollback(session)
        session.commit()
        assert session.get_one(Thing, 1).text == "one"
        for change in app.memory.history(session, Thing, 1):
            assert set(change.before or change.after or ()) == {"id", "text"}
        session.get_one(Thing, 1).text = "three"
        session.commit()
        assert (app.memory.as_of(session, Thing, 1, first) or {})["text"] == "one"
    assert app.memory.doctor(postgres_engine).healthy


_read_of_the_trigger_context = sa.text(
    "SELECT idx_tup_fetch + seq_tup_read FROM pg_stat_xact_user_tables WHERE relname = 'memstate_trigger_context'"
)


def test_triggers_look_up_each_fact_of_an_undo_alone(postgres_engine: Engine) -> None:
    """For each row that it writes, a statement reads one row of the trigger context, not those of the whole undo."""

    class Base(DeclarativeBase):
        pass

    class Thing(Base):
        __tablename__ = "thing"
        id: Mapped[int] = mapped_column(primary_key=True)
        text: Mapped[str]
        n: Mapped[int] = mapped_column(default=0)

    app = make_app(postgres_engine, Thing, capture="trigger")

    count = 200
    for way in (update(Thing).values(n=1), sa.delete(Thing)):
        with app.sessions() as session:
            session.execute(sa.delete(Thing))
            session.execute(insert(Thing), [{"text": str(n)} for n in range(count)])
            session.commit()
            session.execute(way)
            session.commit()
            app.memory.rollback(session)
            assert session.scalar(_read_of_the_trigger_context) <= 10 * count
            session.commit()
    app.assert_log_is_truth()


def test_undo_and_erasure_write_where_the_session_writes(engine: Engine) -> None:
    """A Session that reads from a replica is asked for its write connection."""
    replica = create_engine(engine.url)
    sqlite.configure(replica)

    @event.listens_for(replica, "connect")
    def read_only(driver: Any, record: Any) -> None:
        is_sqlite = engine.dialect.name == "sqlite"
        driver.execute("PRAGMA query_only = ON" if is_sqlite else "SET default_transaction_read_only = on")
        driver.commit()

    class RoutingSession(Session):
        def get_bind(self, mapper: Any = None, *, clause: Any = None, **options: Any) -> Any:
            is_write = self._flushing or isinstance(clause, (sa.Insert, sa.Update, sa.Delete))
            return engine if is_write else replica

    world = World(engine)
    sessions = sessionmaker(class_=RoutingSession)
    world.memory.attach(sessions)
    steps: list[Any] = [
        lambda session: session.add(Tag(name="a", meaning="one")),
        lambda session: setattr(session.get_one(Tag, "a"), "meaning", "two"),
        world.memory.rollback,
        lambda session: setattr(session.get_one(Tag, "a"), "meaning", "three"),
        lambda session: world.memory.revoke(session, tx=[world.memory.history(session, Tag, "a")[-1].tx]),
        lambda session: world.memory.erase(session, Tag, "a"),
    ]
    meanings = []
    for step in steps:
        with sessions() as session:
            step(session)
            session.commit()
            meanings.append(session.scalar(select(Tag.meaning)))
    replica.dispose()
    assert meanings == ["one", "two", "one", "three", "one", None]


@pytest.mark.parametrize("capture", ["session", "trigger"])
def test_columns_that_no_class_declares_are_named(engine: Engine, capture: str) -> None:
    """doctor names them. An undo that restores a row without them warns once."""

    class Base(DeclarativeBase):
        pass

    class Client(Base):
        __tablename__ = "client"
        id: Mapped[int] = mapped_column(primary_key=True)
        text: Mapped[str]

    app = make_app(engine, Client, capture=capture)
    assert not app.memory.doctor(engine).problems
    with engine.begin() as connection:
        connection.execute(sa.text("ALTER TABLE client ADD COLUMN iban VARCHAR(34)"))
        connection.execute(sa.text("ALTER TABLE client ADD COLUMN rank INTEGER DEFAULT 1"))
    app.write(Client(id=1, text="ana"), Client(id=2, text="bob"))
    with app.sessions() as session:
        for text in ("an", "anna"):
            session.get_one(Client, 1).text = text
            session.commit()
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            app.memory.rollback(session)
            assert not caught, "the row keeps its other columns"
            for _ in range(2):
                session.delete(session.get_one(Client, 1))
                session.commit()
                app.memory.rollback(session)
                session.commit()
    [warning] = caught
    assert warning.category is UntrackedWriteWarning and warning.filename == __file__
    diagnosis = app.memory.doctor(engine)
    [problem] = diagnosis.problems
    assert str(warning.message) == f"{problem.subject} {problem.message}"
    assert "iban, rank" in problem.message and diagnosis.healthy


class KeyLost(Exception):
    """The error of a decryption library."""


class Sealed(sa.TypeDecorator[str]):
    """Text that only *key* decrypts."""

    impl = sa.String
    cache_ok = True

    def __init__(self, key: str) -> None:
        super().__init__()
        self.key = key

    def process_bind_param(self, value: Any, dialect: Any) -> Any:
        return f"{self.key}:{value}"

    def process_result_value(self, value: Any, dialect: Any) -> Any:
        key, _, words = value.partition(":")
        if key != self.key:
            raise KeyLost(key)
        return words


@pytest.mark.parametrize("capture", ["session", "trigger"])
def test_old_values_that_a_type_refuses_are_shown_and_written_as_stored(engine: Engine, capture: str) -> None:
    """An enum has lost a member, and an encryption has lost a key."""

    def model(*states: str, key: str) -> Any:
        class Base(DeclarativeBase):
            pass

        class Task(Base):
            __tablename__ = "task"
            id: Mapped[int] = mapped_column(primary_key=True)
            text: Mapped[str]
            state: Mapped[str] = mapped_column(sa.Enum(*states, native_enum=False, length=9))
            secret: Mapped[str] = mapped_column(Sealed(key))

        return Task

    old = model("new", "stuck", "done", key="k1")
    app = make_app(engine, old, capture=capture)
    token = app.write(old(id=1, text="a", state="stuck", secret="s"), old(id=2, text="b", state="new", secret="s"))
    new = model("new", "done", key="k2")
    app = make_app(engine, new, capture=capture)
    with app.sessions() as session:
        values = {"state": "done", "secret": "s", "text": "changed"}
        session.execute(update(new).values(values))
        session.commit()
        stored = {"id": 1, "text": "a", "state": "stuck", "secret": "k1:s"}
        changed = {"id": 1, **values}
        for changes in (app.memory.history(session, new), app.memory.history(session, new, 1)):
            first = [(change.before, change.after) for change in changes if change.key == 1]
            assert first == [(None, stored), (stored, changed)]
        assert app.memory.as_of(session, new, 1, token) == stored
        assert (app.memory.diff(session, token)[0].before, app.memory.diff(session, token)[0].after) == (
            stored,
            changed,
        )
        assert {change.key: change.after for change in app.memory.rollback(session)}[1] == stored
        session.commit()
        rows = session.execute(sa.text("SELECT state, secret FROM task ORDER BY id")).all()
        assert list(map(tuple, rows)) == [("stuck", "k1:s"), ("new", "k1:s")]
