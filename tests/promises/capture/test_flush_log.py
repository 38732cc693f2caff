"""The entries that the database itself writes for a flush: their keys, their values, and the number of statements."""

from __future__ import annotations

import json
import sqlite3
import threading
import uuid
import warnings
from collections.abc import Callable
from datetime import datetime
from decimal import Decimal
from typing import Any

import pytest
import sqlalchemy as sa
from pydantic import BaseModel
from sqlalchemy import Engine, event, insert, select, update
from sqlalchemy.dialects import postgresql
from sqlalchemy.orm import DeclarativeBase, Mapped, Session, make_transient_to_detached, mapped_column
from sqlalchemy.types import CHAR, TypeDecorator

from memstate_sa import UntrackedWrite
from memstate_sa.capture import table_log
from memstate_sa.db.tables import log, outbox
from memstate_sa.log.changes import replay
from tests.support import Note, Person, Tag, World
from tests.support.apps import make_app
from tests.support.statements import statements


class Guid(TypeDecorator[Any]):
    """A type that many applications define: a UUID in Python, a string for the driver, PostgreSQL's own type in the
    table.
    """

    impl = CHAR
    cache_ok = True

    def load_dialect_impl(self, dialect: Any) -> Any:
        return dialect.type_descriptor(postgresql.UUID() if dialect.name == "postgresql" else CHAR(36))

    def process_bind_param(self, value: Any, dialect: Any) -> Any:
        return None if value is None else str(value)

    def process_result_value(self, value: Any, dialect: Any) -> Any:
        return value if value is None or isinstance(value, uuid.UUID) else uuid.UUID(str(value))


ID = uuid.UUID("326dfa92-0449-4c3a-be8f-4440229a0ce0")
KEYS: dict[str, tuple[Any, Any]] = {
    "uuid": (sa.Uuid(), ID),
    "uuid as text": (sa.Uuid(as_uuid=False), str(ID)),
    "decorated uuid": (Guid(), ID),
    "padded": (sa.CHAR(5), "ab"),
    "number": (sa.Numeric(10, 2), Decimal("1.5")),
    "number as float": (sa.Numeric(10, 2, asdecimal=False), 1.5),
    "bytes": (sa.LargeBinary(16), b"\x00\xff"),
}


def model_of(type_: Any) -> Any:
    class Base(DeclarativeBase):
        pass

    class Fact(Base):
        __tablename__ = "fact"
        id: Mapped[Any] = mapped_column(type_, primary_key=True)
        text: Mapped[str]

    return Fact


def ops(engine: Engine) -> list[tuple[str, str]]:
    with engine.connect() as connection:
        return [(op, key) for op, key in connection.execute(select(log.c.op, log.c.key).order_by(log.c.id))]


@pytest.mark.each_pair_once
@pytest.mark.parametrize("capture", ["session", "trigger"])
@pytest.mark.parametrize("kind", KEYS)
def test_a_fact_has_the_key_that_the_database_holds(engine: Engine, kind: str, capture: str) -> None:
    """This holds from insert to undo, for keys of any Python type."""
    type_, key = KEYS[kind]
    if "number" in kind and engine.dialect.name == "sqlite" and capture == "trigger":
        pytest.skip("SQLite stores it as a float, which triggers refuse as a key")
    model = model_of(type_)
    app = make_app(engine, model, capture=capture)
    app.write(model(id=key, text="one"))
    with app.session() as session:
        session.get_one(model, key).text = "two"
        session.commit()
    app.relay.drain()
    with app.session() as session:
        session.delete(session.get_one(model, key))
        session.commit()
    logged = ops(engine)
    assert [op for op, _ in logged] == ["insert", "update", "delete"]
    assert len({stored for _, stored in logged}) == 1
    app.relay.drain()
    assert app.index.scan(None, 10) == []
    with app.session() as session:
        assert [change.op for change in app.memory.history(session, model, key)] == ["insert", "update", "delete"]
        app.memory.rollback(session)
        session.commit()
        assert session.get_one(model, key).text == "two"
    assert app.memory.doctor(engine).healthy


def test_an_address_is_a_key(postgres_engine: Engine) -> None:
    """The driver reads this type as its own object. Our code reads the server's text."""
    model = model_of(postgresql.INET())
    app = make_app(postgres_engine, model)
    app.write(model(id="10.0.0.1", text="one"))
    with app.session() as session:
        for text in ("two", "three"):
            session.get_one(model, "10.0.0.1").text = text
            session.commit()
        assert [c.op for c in app.memory.history(session, model, "10.0.0.1")] == ["insert", "update", "update"]
        session.delete(session.get_one(model, "10.0.0.1"))
        session.commit()
        app.memory.rollback(session)
        session.commit()
    assert ops(postgres_engine)[-2:] == [("delete", '["10.0.0.1/32"]'), ("insert", '["10.0.0.1/32"]')]
    assert app.memory.doctor(postgres_engine).healthy


class Partial(DeclarativeBase):
    pass


class Part(Partial):
    __tablename__ = "part"
    a: Mapped[str] = mapped_column(primary_key=True)
    b: Mapped[str | None] = mapped_column(primary_key=True, nullable=True)
    text: Mapped[str]


@pytest.mark.parametrize("capture", ["session", "trigger"])
def test_a_part_of_a_key_may_be_null(sqlite_engine: Engine, capture: str) -> None:
    """SQLite allows such rows, and SQLAlchemy finds them."""
    app = make_app(sqlite_engine, Part, capture=capture)
    app.write(Part(a="x", b=None, text="one"), Part(a="x", b="y", text="other"))
    with app.session() as session:
        session.execute(update(Part).where(Part.b.is_(None)).values(text="two"))  # objects cannot be changed
        session.commit()
        app.memory.rollback(session)
        session.commit()
        assert app.rows(Part)["x", None]["text"] == "one"
        app.memory.rollback(session)
        session.commit()
    assert app.rows(Part) == {}
    assert [op for op, _ in ops(sqlite_engine)] == ["insert", "insert", "update", "update", "delete", "delete"]
    assert app.memory.doctor(sqlite_engine).healthy


def test_a_key_in_another_form_is_the_same_fact(engine: Engine) -> None:
    """A web form sends ids as text: in a detached object, in merge() and in an update of many rows."""
    model = model_of(sa.Integer())
    app = make_app(engine, model)
    app.write(model(id=7, text="before"))
    with app.session() as session:
        detached = model(id="7")
        make_transient_to_detached(detached)
        session.add(detached)
        detached.text = "after"
        session.commit()
    with app.session() as session:
        session.merge(model(id="7", text="merged"))
        session.commit()
    with app.session() as session:
        session.execute(update(model), [{"id": "7", "text": "one of many"}])
        session.commit()
    assert ops(engine) == [("insert", "[7]"), ("update", "[7]"), ("update", "[7]"), ("update", "[7]")]
    app.assert_log_is_truth()


class Exact(TypeDecorator[Any]):
    """Distinguishes True from 1, which are equal in Python."""

    impl = sa.Text
    cache_ok = True

    def process_bind_param(self, value: Any, dialect: Any) -> Any:
        return json.dumps(value)

    def process_result_value(self, value: Any, dialect: Any) -> Any:
        return json.loads(value)

    def compare_values(self, x: Any, y: Any) -> bool:
        return json.dumps(x) == json.dumps(y)


class Base(DeclarativeBase):
    pass


class Setting(Base):
    __tablename__ = "setting"
    id: Mapped[int] = mapped_column(primary_key=True)
    text: Mapped[str]
    saves: Mapped[int] = mapped_column(default=0)
    data: Mapped[Any] = mapped_column(Exact, default=None)


def change_by_its_type(session: Session) -> None:
    session.get_one(Setting, 1).data = {"on": True}


def stamp(mapper: Any, connection: Any, setting: Any) -> None:
    setting.saves = Setting.saves + 1


def stamp_without_a_net_change(session: Session) -> None:
    """Change the row in a listener of the application, which runs after ours."""
    event.listen(Setting, "before_update", stamp)
    try:
        session.get_one(Setting, 1).text = "t"
        session.flush()
    finally:
        event.remove(Setting, "before_update", stamp)


@pytest.mark.parametrize("change", [change_by_its_type, stamp_without_a_net_change])
def test_an_update_that_python_does_not_see_is_logged(engine: Engine, change: Callable[[Session], None]) -> None:
    """The database compares the updated row with the log."""
    app = make_app(engine, Setting)
    app.write(Setting(id=1, text="t", data={"on": 1}))
    with app.session() as session:
        change(session)
        session.commit()
    assert ops(engine) == [("insert", "[1]"), ("update", "[1]")]
    app.assert_log_is_truth()


def test_a_flush_without_changes_sends_no_statement_of_ours(world: World) -> None:
    """It locks no row either, so no other transaction waits for it. Here the log does not know the row yet."""
    world.write(Person(id=2, name="bob", about="new"))  # PostgreSQL is asked once for the column types
    with world.engine.begin() as connection:
        connection.execute(insert(Person.__table__), {"id": 1, "name": "ada", "about": "old"})
    with world.session() as session:
        session.merge(Person(id=1, name="ada", about="old"))
        seen = statements(world.engine)
        session.flush()
        assert seen == []
        session.commit()
    assert ops(world.engine) == [("insert", "[2]")]


OURS = {
    # Our statements in a commit of one row, beside the application's own statement.
    ("postgresql", "insert"): ["log and outbox"],
    ("postgresql", "update"): ["look", "log and outbox"],
    ("postgresql", "delete"): ["look", "log and outbox"],
    ("sqlite", "insert"): ["log", "outbox"],
    ("sqlite", "update"): ["look", "log", "outbox"],
    ("sqlite", "delete"): ["look", "log", "outbox"],
}


def of_ours(sent: list[str]) -> list[str]:
    named = []
    for statement in sent:
        into = [table for table in ("log", "outbox") if f"INSERT INTO memstate_{table}" in statement]
        if "memstate_" in statement:
            named.append(" and ".join(into) or ("look" if statement.startswith("SELECT") else statement))
    return named


@pytest.mark.parametrize("kind", ["insert", "update", "delete"])
def test_a_commit_of_one_row_sends_few_statements(world: World, kind: str) -> None:
    """Each statement is a round trip to a database that may be far away."""
    with world.session() as session:
        session.add(Person(id=1, name="ada", about="one"))
        session.commit()
        person = session.get_one(Person, 1)
        if kind == "insert":
            session.add(Person(id=2, name="bob", about="two"))
        elif kind == "update":
            person.about = "two"
        else:
            session.delete(person)
            session.flush()  # SQLAlchemy looks for the rows that refer to it
            session.rollback()
            session.delete(session.get_one(Person, 1))
        seen = statements(world.engine)
        session.commit()
    assert of_ours(seen) == OURS[world.engine.dialect.name, kind]


class Named(BaseModel):
    text: str


@pytest.mark.parametrize("kind", ["insert", "update"])
def test_a_class_with_a_schema_sends_few_statements(engine: Engine, kind: str) -> None:
    """Python validates the logged values. The logging statement returns them; on SQLite a SELECT reads them."""
    app = make_app(engine, Setting, schema=Named)
    app.write(Setting(id=1, text="one"))
    with app.session() as session:
        if kind == "insert":
            session.add(Setting(id=2, text="two"))
        else:
            session.get_one(Setting, 1).text = "two"
        seen = statements(engine)
        session.commit()
    read_back = [] if engine.dialect.name == "postgresql" else ["look"]
    assert of_ours(seen) == [*OURS[engine.dialect.name, kind], *read_back]


def test_baselines_and_changes_are_logged_together(world: World) -> None:
    """The rows are older than tracking. Each baseline comes before its change, and only the change is delivered."""
    with world.engine.begin() as connection:
        connection.execute(insert(Person.__table__), [{"id": n, "name": f"p{n}", "about": "old"} for n in (1, 2, 3)])
    with world.session() as session:
        first, second, third = session.scalars(select(Person).order_by(Person.id)).all()
        session.add(Person(id=4, name="p4", about="new"))
        first.about, third.about = "new", "old"
        session.delete(second)
        seen = statements(world.engine)
        session.commit()
        assert [s for s in of_ours(seen) if "log" in s] == (
            ["log and outbox"] if world.engine.dialect.name == "postgresql" else ["log"]
        )
        changes = world.memory.history(session, Person)
    by_key = {key: [change.op for change in changes if change.key == key] for key in (1, 2, 3, 4)}
    assert by_key == {1: ["baseline", "update"], 2: ["baseline", "delete"], 3: [], 4: ["insert"]}
    with world.engine.connect() as connection:
        assert sorted(connection.scalars(select(outbox.c.key))) == ["[1]", "[2]", "[4]"]
        steps = set(connection.execute(select(log.c.op, log.c.step)))
    assert steps == {("baseline", False), ("update", True), ("delete", True), ("insert", True)}
    rows = world.rows(Person)
    del rows[3]  # this row has not changed since it is tracked
    assert {key: dict(row) for (_, key), row in replay(changes).items()} == rows


def test_a_row_that_is_gone_already_is_no_change(world: World) -> None:
    """Another Session deleted and logged the row already, so the DELETE of this Session finds nothing."""
    with world.session() as session:
        session.add(Tag(name="t"))
        session.commit()
        tag = session.get_one(Tag, "t")
        with world.session() as other:
            other.delete(other.get_one(Tag, "t"))
            other.commit()
        session.delete(tag)
        with pytest.warns(sa.exc.SAWarning, match="expected to delete 1 row"):
            session.commit()
    assert [op for op, _ in ops(world.engine)] == ["insert", "delete"]


def test_many_rows_are_logged_in_batches(world: World) -> None:
    """There are more rows than one look can take, and keys that move from one batch to another."""
    with world.session() as session:
        session.add(Person(id=1, name="ada", about="x"))
        session.add_all(Note(topic="t", number=n, content="old", person_id=1) for n in range(1100))
        session.commit()
        notes = session.scalars(select(Note).order_by(Note.number)).all()
        for note in notes:
            note.content = "new"
        notes[3].number = 5000
        session.delete(notes[1050])
        session.commit()
    found = ops(world.engine)
    assert len(found) == 1101 + 1100 + 1  # all are inserted and changed; the moved one is deleted and inserted
    assert sum(op == "update" for op, _ in found) == 1098
    world.assert_log_is_truth()


def lowercase_keys(engine: Engine) -> None:
    """Change new keys in a trigger of the application."""
    if engine.dialect.name == "postgresql":
        body = "'BEGIN NEW.id := lower(NEW.id); RETURN NEW; END'"
        ddl = [
            f"CREATE FUNCTION lowered() RETURNS trigger LANGUAGE plpgsql AS {body}",
            "CREATE TRIGGER lowering BEFORE INSERT OR UPDATE ON fact FOR EACH ROW EXECUTE FUNCTION lowered()",
        ]
    else:
        lowered = "BEGIN UPDATE fact SET id = lower(id) WHERE id = NEW.id; END"
        ddl = [f"CREATE TRIGGER lowering_{event} AFTER {event} ON fact {lowered}" for event in ("INSERT", "UPDATE")]
    with engine.begin() as connection:
        for statement in ddl:
            connection.exec_driver_sql(statement)


def add(model: Any, session: Session) -> None:
    session.add(model(id="NEW", text="x"))


def add_and_delete(model: Any, session: Session) -> None:
    """The entry of the other row does not make up for the missing one."""
    session.delete(session.get_one(model, "old"))
    add(model, session)


def rename(model: Any, session: Session) -> None:
    session.get_one(model, "old").id = "NEW"


@pytest.mark.parametrize("write", [add, add_and_delete, rename])
def test_a_row_that_cannot_be_found_is_refused(engine: Engine, write: Callable[[Any, Session], None]) -> None:
    """The log would miss it."""
    model = model_of(sa.String(20))
    app = make_app(engine, model)
    app.write(model(id="old", text="x"))
    lowercase_keys(engine)
    with app.session() as session:
        write(model, session)
        with pytest.raises(UntrackedWrite, match="not found under their keys"):
            session.commit()
    assert ops(engine) == [("insert", '["old"]')]
    assert app.rows(model).keys() == {"old"}


def test_a_column_of_another_type_than_declared_is_logged_as_it_is_stored(postgres_engine: Engine) -> None:
    """A migration was forgotten. Without the column's real type, an undo would shift times by the time zone."""

    class Other(DeclarativeBase):
        pass

    class Meeting(Other):
        __tablename__ = "meeting"
        id: Mapped[int] = mapped_column(primary_key=True)
        text: Mapped[str]
        begins: Mapped[datetime] = mapped_column(sa.DateTime(timezone=True))

    with postgres_engine.begin() as connection:
        connection.exec_driver_sql("CREATE TABLE meeting (id integer PRIMARY KEY, text text, begins timestamp)")
    zone = {"options": "-c timezone=Europe/Berlin"}
    engine = sa.create_engine(postgres_engine.url, connect_args=zone)
    app = make_app(engine, Meeting)
    with engine.begin() as connection:
        connection.exec_driver_sql("INSERT INTO meeting VALUES (1, 'x', '2024-01-01 13:00')")
    with app.session() as session:
        session.get_one(Meeting, 1).text = "y"
        session.commit()
    with app.session() as session:
        app.memory.rollback(session)
        session.commit()
    with engine.connect() as connection:
        begins = connection.exec_driver_sql("SELECT begins::text FROM meeting").scalar()
    assert begins == "2024-01-01 13:00:00"
    app.memory.close()
    engine.dispose()


@pytest.mark.parametrize("capture", ["session", "trigger"])
def test_a_table_of_many_columns_is_logged(engine: Engine, capture: str) -> None:
    """SQLite limits the depth of expressions to 1000. An image of many columns stays below it."""

    class Other(DeclarativeBase):
        pass

    wide = sa.Table(
        "wide",
        Other.metadata,
        sa.Column("id", sa.Integer(), primary_key=True),
        sa.Column("text", sa.Text()),
        *(sa.Column(f"c{n}", sa.Integer()) for n in range(400)),
    )

    class Wide(Other):
        __table__ = wide

    app = make_app(engine, Wide, capture=capture)
    app.write(Wide(id=1, text="x", c399=7))
    with app.session() as session:
        session.get_one(Wide, 1).c5 = 5  # type: ignore[attr-defined]
        seen = statements(engine)
        session.commit()
    if capture == "session":
        assert of_ours(seen) == OURS[engine.dialect.name, "update"]
    assert ops(engine) == [("insert", "[1]"), ("update", "[1]")]
    app.assert_log_is_truth()


def test_large_images_are_looked_at_in_parts(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    """PostgreSQL limits a parameter to 256 MB."""
    monkeypatch.setattr(table_log, "_CHARS", 500)
    with world.engine.begin() as connection:
        rows = [{"id": n, "name": f"p{n}", "about": "x" * 100} for n in range(1, 20)]
        connection.execute(insert(Person.__table__), rows)
    with world.session() as session:
        for person in session.scalars(select(Person)):
            person.about = "new"
        session.commit()
    assert [op for op, _ in sorted(ops(world.engine))] == ["baseline"] * 19 + ["update"] * 19
    world.assert_in_step()


def test_a_look_waits_for_the_writer_of_sqlite(sqlite_engine: Engine) -> None:
    """The application's own listener begins the transaction here. If the look were a plain read, it could not write
    later.
    """
    engine = sa.create_engine(sqlite_engine.url)  # without sqlite.configure()
    event.listen(engine, "connect", lambda dbapi, record: setattr(dbapi, "isolation_level", None))
    event.listen(engine, "begin", lambda connection: connection.exec_driver_sql("BEGIN"))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        app = make_app(engine, model := model_of(sa.Integer()))
        app.write(model(id=1, text="one"))
    other = sqlite3.connect(str(sqlite_engine.url.database), isolation_level=None, check_same_thread=False)
    other.execute("BEGIN IMMEDIATE")
    releasing = threading.Timer(0.2, other.rollback)
    with app.session() as session:
        fact = model(id=1, text="one")
        make_transient_to_detached(fact)
        session.add(fact)
        fact.text = "two"
        releasing.start()
        session.commit()
    releasing.join()
    other.close()
    assert ops(engine) == [("insert", "[1]"), ("update", "[1]")]
    app.memory.close()
    engine.dispose()
