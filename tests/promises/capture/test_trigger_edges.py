"""Our triggers beside other features of a database: cascades, other triggers, odd names, other databases."""

from __future__ import annotations

from pathlib import Path
from typing import Any, ClassVar

import pytest
import sqlalchemy as sa
from sqlalchemy import Engine, ForeignKey, create_engine, insert, select, text, update
from sqlalchemy.exc import DBAPIError, IntegrityError
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column, relationship, sessionmaker

from memstate_sa import ConflictError, MemstateError, UntrackedWrite, sqlite
from memstate_sa.db.dialects import database_of
from memstate_sa.db.tables import log, trigger_context
from tests.support import apps

pytestmark = pytest.mark.sa20


class App(apps.App):
    """Captures its models by triggers, unless told otherwise."""

    def __init__(self, engine: Engine, *models: Any, session: tuple[Any, ...] = (), **options: Any) -> None:
        tracking = {model: {"capture": "session"} for model in session}
        options |= {"tracking": tracking, "foreign_keys": True, "capture": "trigger"}
        super().__init__(engine, *models, *session, **options)

    def run(self, *statements: str) -> None:
        with self.engine.begin() as connection:
            for statement in statements:
                connection.exec_driver_sql(statement, execution_options={"no_parameters": True})

    def ops(self, model: Any) -> list[tuple[str, Any]]:
        with self.sessions() as session:
            return [(change.op, change.key) for change in self.memory.history(session, model)]

    def check(self) -> None:
        """Assert that the log replays to the tables, and that no trigger context is left."""
        self.assert_log_is_truth()
        with self.sessions() as session:
            assert session.execute(select(trigger_context)).all() == []
        assert self.memory.doctor(self.engine).healthy


class Base(DeclarativeBase):
    pass


class Top(Base):
    __tablename__ = "top"
    id: Mapped[int] = mapped_column(primary_key=True, autoincrement=False)
    text: Mapped[str] = mapped_column(default="top")


class Below(Base):
    """Refers to one table several times."""

    __tablename__ = "below"
    id: Mapped[int] = mapped_column(primary_key=True, autoincrement=False)
    text: Mapped[str] = mapped_column(default="below")
    one: Mapped[int | None] = mapped_column(ForeignKey("top.id", ondelete="SET NULL"))
    two: Mapped[int | None] = mapped_column(ForeignKey("top.id", ondelete="SET NULL"))
    three: Mapped[int | None] = mapped_column(ForeignKey("top.id", ondelete="SET NULL"))


class Owned(Base):
    __tablename__ = "owned"
    id: Mapped[int] = mapped_column(primary_key=True, autoincrement=False)
    text: Mapped[str] = mapped_column(default="owned")
    top_id: Mapped[int] = mapped_column(ForeignKey("top.id", ondelete="CASCADE"))


class Node(Base):
    """Refers to itself."""

    __tablename__ = "node"
    id: Mapped[int] = mapped_column(primary_key=True, autoincrement=False)
    text: Mapped[str] = mapped_column(default="node")
    parent_id: Mapped[int | None] = mapped_column(ForeignKey("node.id", onupdate="CASCADE", ondelete="CASCADE"))
    parent: Mapped[Node | None] = relationship(remote_side="Node.id")


def test_row_touched_several_times_by_one_statement_is_logged(engine: Engine) -> None:
    """Three foreign keys change it at once, and another foreign key cascades within its table."""
    app = App(engine, Top, Below, Owned, Node)
    app.run(
        "INSERT INTO top (id, text) VALUES (1, 'a'), (2, 'b')",
        "INSERT INTO below (id, text, one, two, three) VALUES (1, 'x', 1, 1, 1), (2, 'y', 1, 2, 1)",
        "INSERT INTO node (id, text, parent_id) VALUES (1, 'a', NULL), (2, 'b', 1), (3, 'c', 2)",
    )
    with app.sessions() as session:
        session.execute(text("DELETE FROM top WHERE id = 1"))
        session.execute(text("UPDATE node SET id = id + 100 WHERE id = 1"))
        session.commit()
    app.check()
    if engine.dialect.name == "postgresql":
        assert app.ops(Below) == [("insert", 1), ("insert", 2), ("update", 1), ("update", 2)]
    with app.sessions() as session:
        app.memory.rollback(session)
        session.commit()
        assert session.scalars(select(Node.id).order_by(Node.id)).all() == [1, 2, 3]
        assert [(b.one, b.two, b.three) for b in session.scalars(select(Below).order_by(Below.id))] == [
            (1, 1, 1),
            (1, 2, 1),
        ]
    app.check()


def test_older_row_touched_several_times_gets_one_baseline(engine: Engine) -> None:
    """Its one baseline has the original values."""
    Base.metadata.create_all(engine)
    with engine.begin() as connection:
        connection.execute(insert(Top.__table__), [{"id": 1, "text": "a"}])
        connection.execute(insert(Below.__table__), [{"id": 1, "text": "x", "one": 1, "two": 1, "three": 1}])
    app = App(engine, Top, Below)
    app.run("DELETE FROM top")
    app.check()
    with app.sessions() as session:
        [first, *_] = app.memory.history(session, Below)
        assert (first.op, first.after) == ("baseline", {"id": 1, "text": "x", "one": 1, "two": 1, "three": 1})


def test_an_undo_does_not_delete_a_row_with_children(engine: Engine) -> None:
    """The inserted row has children by now, and the database would delete them too."""
    app = App(engine, Top, Owned)
    with app.sessions() as session:
        session.add(Top(id=1))
        session.commit()
        made = app.memory.token(session)
        session.add(Owned(id=1, top_id=1))
        session.commit()
        with pytest.raises(ConflictError) as refused:
            app.memory.rollback(session, tx=made)
        assert [(change.entity, change.key, change.op) for change in refused.value.changes] == [("owned", 1, "insert")]
        app.memory.rollback(session, steps=2)
        session.commit()
        assert session.scalars(select(Top.id)).all() == []
    app.check()


class Kept(Base):
    """No foreign key: a trigger of the application deletes it."""

    __tablename__ = "kept"
    id: Mapped[int] = mapped_column(primary_key=True, autoincrement=False)
    text: Mapped[str] = mapped_column(default="kept")
    top_id: Mapped[int]


def test_undo_includes_changes_by_application_triggers(engine: Engine) -> None:
    """A trigger of the application deletes another row with the undone one. Redoing brings it back."""
    app = App(engine, Top, Kept)
    with engine.begin() as connection:
        for statement in KEEPS[engine.dialect.name]:
            connection.exec_driver_sql(statement)
    with app.sessions() as session:
        session.add(Top(id=1))
        session.commit()
        made = app.memory.token(session)
        session.add(Kept(id=1, top_id=1))
        session.commit()
        undone = app.memory.rollback(session, tx=made)
        session.commit()
        assert {(change.entity, change.op) for change in undone} == {("top", "delete"), ("kept", "delete")}
        app.check()
        app.memory.rollback(session, tx=undone[0].tx)
        session.commit()
        assert session.scalars(select(Kept.id)).all() == [1]
    app.check()


KEEPS = {
    "sqlite": ["CREATE TRIGGER keep AFTER DELETE ON top BEGIN DELETE FROM kept WHERE top_id = OLD.id; END"],
    "postgresql": [
        """CREATE OR REPLACE FUNCTION keep() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN
        DELETE FROM kept WHERE top_id = OLD.id; RETURN OLD; END $$""",
        "CREATE TRIGGER keep AFTER DELETE ON top FOR EACH ROW EXECUTE FUNCTION keep()",
    ],
}


class Shouted(Base):
    __tablename__ = "shouted"
    id: Mapped[int] = mapped_column(primary_key=True)
    text: Mapped[str]


@pytest.mark.parametrize("first", ["ours", "theirs"])
def test_log_shows_the_result_of_application_triggers(engine: Engine, first: str) -> None:
    """The trigger changes the new row. The last image in the log has the final values."""
    if first == "theirs":
        Base.metadata.create_all(engine)
        shout(engine)
    app = App(engine, Shouted)
    if first == "ours":
        shout(engine)
    app.run("INSERT INTO shouted (id, text) VALUES (1, 'tea')", "INSERT INTO shouted (id, text) VALUES (2, 'rain')")
    app.run("UPDATE shouted SET text = 'snow' WHERE id = 1")
    app.check()
    with engine.connect() as connection:
        assert sorted(connection.scalars(select(Shouted.text))) == ["RAIN", "SNOW"]


def shout(engine: Engine) -> None:
    if engine.dialect.name == "sqlite":
        statements = [
            f"CREATE TRIGGER shout_{event} AFTER {event} ON shouted WHEN NEW.text <> upper(NEW.text) BEGIN "
            "UPDATE shouted SET text = upper(text) WHERE id = NEW.id; END"
            for event in ("INSERT", "UPDATE")
        ]
    else:
        statements = [
            """CREATE OR REPLACE FUNCTION shout() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN
            UPDATE shouted SET text = upper(text) WHERE id = NEW.id; RETURN NEW; END $$""",
            """CREATE TRIGGER shout AFTER INSERT OR UPDATE ON shouted FOR EACH ROW WHEN (NEW.text <> upper(NEW.text))
            EXECUTE FUNCTION shout()""",
        ]
    with engine.begin() as connection:
        for statement in statements:
            connection.exec_driver_sql(statement)


def test_both_captures_log_their_rows_in_one_flush(engine: Engine) -> None:
    """The rows are older than tracking. Each has its baseline before its change."""
    Base.metadata.create_all(engine)
    with engine.begin() as connection:
        for model in (Top, Shouted):
            connection.execute(insert(model.__table__), [{"id": 1, "text": "old"}])
    app = App(engine, Top, session=(Shouted,))
    with app.sessions() as session:
        session.get_one(Top, 1).text = session.get_one(Shouted, 1).text = "new"
        session.commit()
    assert app.ops(Top) == app.ops(Shouted) == [("baseline", 1), ("update", 1)]
    app.check()


def test_session_may_write_to_another_database(engine: Engine, tmp_path: Path) -> None:
    """The other database has none of our tables."""

    class Other(DeclarativeBase):
        pass

    class Else(Other):
        __tablename__ = "else_where"
        id: Mapped[int] = mapped_column(primary_key=True)

    other = sqlite.configure(create_engine(f"sqlite:///{tmp_path / 'other.db'}"))
    Other.metadata.create_all(other)
    app = App(engine, Top)
    sessions = sessionmaker(binds={Base: engine, Other: other})
    app.memory.attach(sessions)
    with sessions() as session:
        app.memory.annotate(session, actor="planner")
        session.add(Else())
        session.flush()
        session.add(Top(id=1))
        session.commit()
        session.add(Else())
        session.commit()
    with app.sessions() as session:
        assert [change.actor for change in app.memory.history(session, Top)] == ["planner"]
    app.check()
    other.dispose()


# -- names and types ---------------------------------------------------------------------------------------------------


def test_unusual_names_are_captured(engine: Engine) -> None:
    """Percent signs, quotes and capitals in tables, columns and identities."""

    class Local(DeclarativeBase):
        pass

    class Odd(Local):
        __tablename__ = "Or der's %%"
        id: Mapped[int] = mapped_column('the "50%" id', primary_key=True)
        text: Mapped[str] = mapped_column("select")
        kind: Mapped[str] = mapped_column("it's")
        __mapper_args__: ClassVar[dict[str, Any]] = {"polymorphic_on": "kind", "polymorphic_identity": "plain"}

    class Special(Odd):
        __mapper_args__: ClassVar[dict[str, Any]] = {"polymorphic_identity": "50% o'"}

    app = App(engine, Special, entity="an 'entity' of 50%")
    with app.sessions() as session:
        session.add_all([Odd(text="not tracked"), Special(text="tracked")])
        session.commit()
        session.scalars(select(Special)).one().text = "changed"
        session.commit()
        changes = app.memory.history(session, Special)
        assert [(c.op, c.after and c.after["select"]) for c in changes] == [
            ("insert", "tracked"),
            ("update", "changed"),
        ]
    assert app.memory.doctor(engine).healthy


def test_columns_named_like_trigger_variables_are_captured(engine: Engine) -> None:
    """The names of the function's own variables, and of PostgreSQL's."""

    class Local(DeclarativeBase):
        pass

    names = ("counts", "undoes", "its_tx", "its_time", "found", "tg_op", "new", "old", "key", "image", "n", "ours")

    class Odd(Local):
        __table__ = sa.Table(
            "odd",
            Local.metadata,
            *(sa.Column(name, sa.Integer, primary_key=True, autoincrement=False) for name in names),
            sa.Column("text", sa.Text),
        )

    app = App(engine, Odd)
    with app.sessions() as session:
        session.add_all(Odd(**dict.fromkeys(names, n), text="one") for n in (1, 2))
        session.commit()
        session.get_one(Odd, (1,) * len(names)).text = "two"
        session.delete(session.get_one(Odd, (2,) * len(names)))
        session.commit()
        assert [(c.op, c.key[0]) for c in app.memory.history(session, Odd)] == [
            ("insert", 1), ("insert", 2), ("update", 1), ("delete", 2),
        ]  # fmt: skip
        app.memory.rollback(session)
        session.commit()
        assert session.scalars(select(Odd.text)).all() == ["one", "one"]
    assert app.memory.doctor(engine).healthy


def test_computed_columns_are_captured(engine: Engine) -> None:
    """Stored or virtual. On PostgreSQL 18 a transition table lacks virtual columns."""

    class Local(DeclarativeBase):
        pass

    class Computed(Local):
        __tablename__ = "computed"
        id: Mapped[int] = mapped_column(primary_key=True)
        text: Mapped[str]
        stored: Mapped[str] = mapped_column(sa.Computed("upper(text)", persisted=True))

    columns = [sa.Column("id", sa.Integer, primary_key=True), sa.Column("text", sa.Text)]
    with engine.connect() as connection:
        version = connection.dialect.server_version_info or (0,)
    if engine.dialect.name == "sqlite" or (version >= (18,) and not sa.__version__.startswith("2.0.")):
        columns.append(sa.Column("virtual", sa.Text, sa.Computed("lower(text)", persisted=False)))

    class Virtual(Local):
        __table__ = sa.Table("virtual_one", Local.metadata, *columns)

    app = App(engine, Computed, Virtual)
    for table in ("computed", "virtual_one"):
        app.run(f"INSERT INTO {table} (id, text) VALUES (1, 'Tea')", f"UPDATE {table} SET text = 'Rain'")
    app.check()
    app.run("DELETE FROM computed", "DELETE FROM virtual_one")
    app.check()


def test_case_insensitive_column_logs_a_change_of_case(sqlite_engine: Engine) -> None:
    """A change of case is a change. A key of that type is refused."""

    class Local(DeclarativeBase):
        pass

    class Word(Local):
        __tablename__ = "word"
        id: Mapped[int] = mapped_column(primary_key=True)
        text: Mapped[str] = mapped_column(sa.String(collation="NOCASE"))

    class Key(Local):
        __tablename__ = "key"
        text: Mapped[str] = mapped_column(sa.String(collation="NOCASE"), primary_key=True)

    app = App(sqlite_engine, Word)
    app.run("INSERT INTO word (text) VALUES ('Tea')", "UPDATE word SET text = 'tea'")
    app.check()
    with pytest.raises(MemstateError, match="cannot log a primary key"):
        App(sqlite_engine, Key)


@pytest.mark.parametrize(("scale", "refused"), [(6, False), (8, True)])
def test_decimal_key_is_captured_or_refused_by_its_scale(postgres_engine: Engine, scale: int, refused: bool) -> None:
    """Python writes a small decimal as 1E-8."""

    class Local(DeclarativeBase):
        pass

    class Amount(Local):
        __tablename__ = "amount"
        id: Mapped[Any] = mapped_column(sa.Numeric(20, scale), primary_key=True, autoincrement=False)
        text: Mapped[str]

    if refused:
        with pytest.raises(MemstateError, match="cannot log a primary key"):
            App(postgres_engine, Amount)
        return
    app = App(postgres_engine, Amount)
    app.run("INSERT INTO amount VALUES (0, 'none'), (0.000001, 'little'), (-12345.5, 'much')")
    app.check()


def test_two_memories_of_one_table_log_their_own_entities(engine: Engine) -> None:
    """Each Memory has its own entity and its own triggers."""
    app, other = App(engine, Top, entity="first"), App(engine, Top, entity="second")
    app.run("INSERT INTO top (id, text) VALUES (1, 'x')")
    assert app.ops(Top) == other.ops(Top) == [("insert", 1)]


# -- trigger context ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("by", ["Session", "connection"])
def test_trigger_context_is_never_committed(engine: Engine, by: str) -> None:
    """It is removed after a failed statement, and on a connection that the application commits."""
    app = App(engine, Top)
    app.run("INSERT INTO top (id, text) VALUES (1, 'x')")
    with engine.connect() as connection, connection.begin() as outer, app.sessions(bind=connection) as session:
        session.add(Top(id=2))
        session.flush()
        with pytest.raises(IntegrityError), session.begin_nested():
            session.execute(text("INSERT INTO top (id, text) VALUES (1, 'twice')"))
        if by == "Session":
            session.commit()
        outer.commit()
    app.run("UPDATE top SET text = 'other' WHERE id = 2")
    app.check()
    with app.sessions() as session:
        changes = app.memory.history(session, Top)
    assert len({change.tx for change in changes}) == 3


def test_swallowed_statement_error_does_not_stop_the_commit(sqlite_engine: Engine) -> None:
    """On SQLite the transaction goes on and commits."""
    app = App(sqlite_engine, Top)
    app.run("INSERT INTO top (id, text) VALUES (1, 'x')")
    with app.sessions() as session:
        with pytest.raises(IntegrityError):
            session.connection().execute(text("INSERT INTO top (id, text) VALUES (1, 'twice')"))
        session.commit()
    app.check()


def test_triggers_leave_last_insert_rowid_and_changes_alone(sqlite_engine: Engine) -> None:
    """last_insert_rowid() and changes() count only the application's statements."""
    app = App(sqlite_engine, Shouted)
    with app.sessions() as session:
        connection = session.connection()
        connection.execute(text("INSERT INTO shouted (id, text) VALUES (42, 'a'), (43, 'b')"))
        assert connection.scalar(text("SELECT last_insert_rowid()")) == 43
        assert connection.scalar(text("SELECT changes()")) == 2
        connection.execute(text("UPDATE shouted SET text = 'c'"))
        assert connection.scalar(text("SELECT changes()")) == 2
        assert connection.scalar(text("SELECT last_insert_rowid()")) == 43
        session.commit()
    app.check()


# -- PostgreSQL --------------------------------------------------------------------------------------------------------


def test_trigger_functions_ignore_temporary_tables(postgres_engine: Engine) -> None:
    """The functions run as their owner. They do not write to a temporary table with our log's name."""
    app = App(postgres_engine, Top)
    with postgres_engine.begin() as connection:
        connection.execute(text("CREATE TEMP TABLE memstate_log AS SELECT * FROM memstate_log"))
        connection.execute(text("CREATE TEMP TABLE top AS SELECT * FROM public.top"))
        connection.execute(text("INSERT INTO public.top (id, text) VALUES (1, 'x')"))
        paths = connection.scalars(
            text("SELECT proconfig::text FROM pg_proc WHERE proname LIKE 'memstate%' AND prosecdef")
        ).all()
        connection.execute(text("DROP TABLE pg_temp.memstate_log, pg_temp.top"))
    assert paths and all(path.startswith('{"search_path=pg_catalog, pg_temp"') for path in paths)
    app.check()


def test_role_that_writes_a_table_needs_no_right_on_the_log(postgres_engine: Engine) -> None:
    """The role cannot read the log either."""
    app = App(postgres_engine, Top)
    with postgres_engine.begin() as connection:
        connection.execute(text("CREATE ROLE memstate_plain"))
        connection.execute(text("GRANT USAGE ON SCHEMA public TO memstate_plain"))
        connection.execute(text("GRANT INSERT, SELECT ON top TO memstate_plain"))
        connection.execute(text("SET LOCAL ROLE memstate_plain"))
        connection.execute(text("INSERT INTO top (id, text) VALUES (1, 'x')"))
        with pytest.raises(DBAPIError, match="permission denied"), connection.begin_nested():
            connection.execute(select(log.c.id))
        connection.execute(text("RESET ROLE"))
        connection.execute(text("DROP OWNED BY memstate_plain"))
        connection.execute(text("DROP ROLE memstate_plain"))
    app.check()


def test_truncate_logs_every_row_as_deleted(postgres_engine: Engine) -> None:
    """Every row is logged as deleted. It is refused if the transaction does not see all rows."""
    app = App(postgres_engine, Shouted)
    app.run("INSERT INTO shouted (id, text) VALUES (1, 'a'), (2, 'b')", "TRUNCATE shouted")
    assert app.ops(Shouted)[2:] == [("delete", 1), ("delete", 2)]
    app.check()
    with app.sessions() as session:
        app.memory.rollback(session)
        session.commit()
    repeatable = postgres_engine.execution_options(isolation_level="REPEATABLE READ")
    with repeatable.connect() as connection, pytest.raises(DBAPIError, match="TRUNCATE would remove rows"):
        connection.execute(text("TRUNCATE shouted"))
    app.check()


def test_a_partitioned_table_is_refused(postgres_engine: Engine) -> None:
    """The triggers would miss writes to a partition."""

    class Local(DeclarativeBase):
        pass

    class Part(Local):
        __tablename__ = "part"
        id: Mapped[int] = mapped_column(primary_key=True)
        text: Mapped[str]
        __table_args__: ClassVar[dict[str, Any]] = {"postgresql_partition_by": "RANGE (id)"}

    with pytest.raises(MemstateError, match="Cannot capture part by triggers: it is partitioned"):
        App(postgres_engine, Part)


# -- captured by the Session where triggers would see more -------------------------------------------------------------


def test_an_upsert_that_changes_keys_is_refused(engine: Engine) -> None:
    """It is refused like any bulk update of keys, and OR REPLACE is refused everywhere."""

    class Local(DeclarativeBase):
        pass

    class Mail(Local):
        __tablename__ = "mail"
        id: Mapped[int] = mapped_column(primary_key=True)
        text: Mapped[str] = mapped_column(unique=True)

    app = App(engine, session=(Mail,))
    with app.sessions() as session:
        session.add(Mail(id=1, text="a"))
        session.commit()
        statement: Any = database_of(engine).upsert(Mail).values(id=7, text="a")
        statement = statement.on_conflict_do_update(index_elements=["text"], set_={"id": statement.excluded.id})
        for refused in (statement, update(Mail).prefix_with("OR REPLACE").values(text="b")):
            with pytest.raises(UntrackedWrite):
                session.execute(refused)
    app.check()
