"""Bulk INSERT, UPDATE and DELETE behave as they do without memstate_sa, and the log has the changes."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from contextlib import suppress
from typing import Any, ClassVar

import pytest
import sqlalchemy as sa
from sqlalchemy import Engine, bindparam, delete, event, func, insert, lambda_stmt, select, text, update
from sqlalchemy.orm import DeclarativeBase, Mapped, Session, aliased, mapped_column, with_loader_criteria

from memstate_sa import ConflictError, UntrackedWrite
from memstate_sa.db.dialects import database_of
from memstate_sa.log.changes import replay
from tests.support.apps import App, make_app

pytestmark = [pytest.mark.sa20, pytest.mark.each_pair_once]


class Base(DeclarativeBase):
    pass


class User(Base):
    __tablename__ = "user"
    id: Mapped[int] = mapped_column(primary_key=True)
    name: Mapped[str] = mapped_column(sa.String(40), unique=True)
    text: Mapped[str] = mapped_column(server_default="said nothing")


class Topic(Base):
    """The number of posts, which are not tracked."""

    __tablename__ = "topic"
    id: Mapped[int] = mapped_column(primary_key=True)
    text: Mapped[str]
    posts: Mapped[int] = mapped_column(default=0)


class Post(Base):
    __tablename__ = "post"
    id: Mapped[int] = mapped_column(primary_key=True)
    topic_id: Mapped[int]


class Person(Base):
    __tablename__ = "person"
    id: Mapped[int] = mapped_column(primary_key=True)
    kind: Mapped[str]
    text: Mapped[str]
    __mapper_args__: ClassVar[dict[str, Any]] = {"polymorphic_on": "kind", "polymorphic_identity": "person"}


class Engineer(Person):
    __tablename__ = "engineer"
    engineer_id: Mapped[int] = mapped_column(sa.ForeignKey("person.id"), primary_key=True)
    tool: Mapped[str]
    __mapper_args__: ClassVar[dict[str, Any]] = {"polymorphic_identity": "engineer"}


USERS: Any = User.__table__


def users_of(engine: Engine, **options: Any) -> App:
    app = make_app(engine, User, **options)
    app.write(*(User(id=n, name=f"u{n}", text=f"text {n}") for n in range(1, 6)))
    return app


# -- when pending changes are flushed ----------------------------------------------------------------------------------


def _hand_over(session: Session, take: Callable[[], Any]) -> list[Any]:
    """Give a new user the name that a statement takes from another user before the flush."""
    session.add(User(id=9, name="u1"))
    take()
    session.commit()
    return list(session.execute(select(User.id, User.name).where(User.id.in_([1, 9])).order_by(User.id)))


@pytest.mark.parametrize("way", ["option of execute", "option of the statement", "no_autoflush", "autoflush=False"])
def test_autoflush_false_is_heeded(engine: Engine, way: str) -> None:
    app = users_of(engine)
    taking: Any = update(User).where(User.id == 1).values(name="old")

    def take() -> None:
        if way == "option of execute":
            session.execute(taking, execution_options={"autoflush": False})
        elif way == "option of the statement":
            session.execute(taking.execution_options(autoflush=False))
        elif way == "no_autoflush":
            with session.no_autoflush:
                session.execute(taking)
        else:
            session.autoflush = False
            session.execute(taking)

    with app.session() as session:
        assert _hand_over(session, take) == [(1, "old"), (9, "u1")]
    app.assert_log_is_truth()


def test_a_pending_change_survives_an_attempt_that_is_undone(engine: Engine) -> None:
    """Another listener turns the statement to other rows, so it runs twice. Unflushed changes survive this."""
    app = users_of(engine)
    event.listen(app.sessions, "do_orm_execute", _to_user_3)
    with app.session() as session:
        pending = session.get_one(User, 2)
        pending.text = "pending"
        session.execute(update(User).where(User.id == 1).values(text="x"), execution_options={"autoflush": False})
        assert pending.text == "pending"
        session.commit()
    assert {id_: row["text"] for id_, row in app.rows(User).items()} == {
        1: "text 1",
        2: "pending",
        3: "x",
        4: "text 4",
        5: "text 5",
    }
    app.assert_log_is_truth()


@pytest.mark.parametrize("capture", ["session", "trigger"])
@pytest.mark.parametrize("name", ["before_flush", "after_flush", "after_flush_postexec", "after_insert"])
def test_a_statement_may_run_within_a_flush(engine: Engine, name: str, capture: str) -> None:
    """Applications maintain counters like this."""
    app = make_app(engine, Topic, capture=capture)
    app.write(Topic(id=1, text="t"))
    done: list[bool] = []

    def count(*arguments: Any) -> None:
        if not done and (name == "after_insert" or not session.info.get("counted")):
            done.append(True)
            session.execute(update(Topic).where(Topic.id == 1).values(posts=Topic.posts + 1))

    with app.session() as session:
        target: Any = Post if name == "after_insert" else session
        event.listen(target, name, count)
        session.add(Post(topic_id=1))
        session.get_one(Topic, 1).text = "changed by the same flush"
        session.commit()
        event.remove(target, name, count)
    assert app.rows(Topic)[1] == {"id": 1, "text": "changed by the same flush", "posts": 1}
    app.assert_log_is_truth()


# -- kinds of statements -----------------------------------------------------------------------------------------------


def _from_statement(session: Session, dml: Any) -> list[str]:
    statement: Any = select(User).from_statement(dml.returning(User))
    found = session.scalars(statement, execution_options={"populate_existing": True})
    return sorted(user.text for user in found)


def _upserted(session: Session) -> list[str]:
    statement = database_of(session.get_bind()).upsert(USERS).values([{"id": 1, "name": "u1", "text": "merged"}])
    statement = statement.on_conflict_do_update(index_elements=["id"], set_={"text": statement.excluded.text})
    return _from_statement(session, statement)


def _by_lambda(session: Session) -> list[int]:
    counts = []
    for number in (1, 2):
        statement: Any = lambda_stmt(lambda: update(User).where(User.id == number).values(text="by lambda"))  # noqa: B023
        counts.append(session.execute(statement).rowcount)
    return counts


ALIAS = aliased(User)
STATEMENTS: dict[str, Callable[[Session], Any]] = {
    "insert, from_statement": lambda s: _from_statement(s, insert(User).values(id=8, name="new", text="inserted")),
    "update, from_statement": lambda s: _from_statement(s, update(User).where(User.id < 3).values(text="updated")),
    "delete, from_statement": lambda s: _from_statement(s, delete(User).where(User.id < 3)),
    "upsert, from_statement": _upserted,
    "update of an alias": lambda s: s.execute(update(ALIAS).where(ALIAS.name == "u2").values(text="x")).rowcount,
    "update of an alias, RETURNING": lambda s: s.execute(
        update(ALIAS).where(ALIAS.name == "u2").values(text="x").returning(ALIAS.text)
    ).all(),
    "delete of an alias": lambda s: s.execute(delete(ALIAS).where(ALIAS.name == "u2")).rowcount,
    "lambda_stmt": _by_lambda,
    "Core, an attribute in WHERE": lambda s: s.execute(USERS.update().where(User.id == 3).values(text="c")).rowcount,
    "Core, an ORM subquery in WHERE": lambda s: (
        s.execute(USERS.delete().where(USERS.c.id.in_(select(User.id).where(User.id == 4)))).rowcount
    ),
    "Core, a Query in WHERE": lambda s: (
        s.execute(USERS.update().where(USERS.c.id.in_(s.query(User.id).filter_by(id=5))).values(text="q")).rowcount
    ),
    "Core, a subquery of another class": lambda s: (
        s.execute(USERS.update().where(~USERS.c.id.in_(select(Topic.id))).values(text="another")).rowcount
    ),
    "Core, from an ORM select": lambda s: (
        s.execute(
            USERS.insert().from_select(["id", "name"], select(User.id + 100, User.name + "!").where(User.id == 1))
        ).is_insert
    ),
    "synchronize_session='fetch'": lambda s: (
        s.execute(
            update(User).where(func.length(User.name) == 2).values(text="fetched"),
            execution_options={"synchronize_session": "fetch"},
        ).rowcount
    ),
    "delete, synchronize_session='fetch'": lambda s: (
        s.execute(
            delete(User).where(func.length(User.name) == 2, User.id > 2),
            execution_options={"synchronize_session": "fetch"},
        ).rowcount
    ),
    "fetch and RETURNING": lambda s: sorted(
        s.execute(
            update(User).where(User.id > 3).values(text="fetched").returning(User.id, User.text),
            execution_options={"synchronize_session": "fetch"},
        )
    ),
    "UPDATE ... FROM": lambda s: (
        s.execute(update(User).where(User.id == ALIAS.id + 1, ALIAS.name == "u1").values(text="joined")).rowcount
    ),
    "Query.update": lambda s: s.query(User).filter(User.id > 3).update({"text": "queried"}),
    "Query.delete": lambda s: s.query(User).filter(User.id > 3).delete(synchronize_session="fetch"),
    "return_defaults() of an UPDATE": lambda s: [
        s.execute(USERS.update().where(USERS.c.id == 1).values(text="d").return_defaults(USERS.c.text)).rowcount
    ],
}


@pytest.mark.parametrize("name", STATEMENTS)
def test_a_statement_answers_as_it_does_untracked(engine: Engine, name: str) -> None:
    """The rows are the same too, and the log has them."""
    app = users_of(engine)
    held = []
    with Session(engine) as plain:
        Base.metadata.create_all(engine)
        plain.add(Topic(id=1, text="of user 1"))
        plain.commit()
        held.append(plain.scalars(select(User)).all())
        expected = STATEMENTS[name](plain)
        expected_texts = {user.id: user.text for user in plain.scalars(select(User))}
        expected_rows = app.rows(User, plain)
        plain.rollback()
    with app.session() as session:
        held.append(session.scalars(select(User)).all())
        assert STATEMENTS[name](session) == expected
        assert {user.id: user.text for user in session.scalars(select(User))} == expected_texts
        session.commit()
    assert app.rows(User) == expected_rows
    app.assert_log_is_truth()


def test_rows_without_their_primary_key_are_refused_by_sqlalchemy(engine: Engine) -> None:
    app = users_of(engine)
    with app.session() as session:
        with pytest.raises(sa.exc.InvalidRequestError, match="primary key"):
            session.execute(update(User), [{"name": "a"}])
        session.execute(update(User), [{"id": 1, "text": "by key"}])
        session.commit()
    app.assert_log_is_truth()


def test_rows_of_a_joined_subclass_whose_key_has_its_own_name(engine: Engine) -> None:
    app = make_app(engine, Person)
    with app.session() as session:
        session.execute(insert(Engineer), [{"text": "a", "tool": "t"}, {"text": "b", "tool": "u"}])
        rows = [{"text": "c", "tool": "v"}, {"text": "d", "tool": "w"}]
        keyed: Any = insert(Engineer).returning(Engineer.tool, Engineer.text, Engineer.engineer_id)
        returned = [row[:2] for row in session.execute(keyed, rows)]
        session.commit()
        expected = {(("person", key),): text_ for key, text_ in session.execute(select(Engineer.id, Engineer.text))}
        logged = {(fact,): row["text"] for fact, row in replay(app.memory.history(session, Person)).items()}
    assert sorted(returned) == [("v", "c"), ("w", "d")]
    assert logged == expected and sorted(expected.values()) == ["a", "b", "c", "d"]


# -- changed rows ------------------------------------------------------------------------------------------------------

SOFT_DELETE = """
    CREATE FUNCTION soft() RETURNS trigger LANGUAGE plpgsql AS $$
    BEGIN UPDATE "user" SET text = 'gone' WHERE id = OLD.id; RETURN NULL; END $$
"""
SUPPRESS = 'CREATE TRIGGER z BEFORE UPDATE ON "user" FOR EACH ROW EXECUTE FUNCTION suppress_redundant_updates_trigger()'
BY_DATABASE = {
    "a trigger keeps the row": (
        [SOFT_DELETE, 'CREATE TRIGGER z BEFORE DELETE ON "user" FOR EACH ROW EXECUTE FUNCTION soft()'],
        delete(User).where(User.id < 3),
    ),
    "a rule keeps the row": (
        ['CREATE RULE z AS ON DELETE TO "user" DO INSTEAD UPDATE "user" SET text = \'gone\' WHERE id = OLD.id'],
        delete(User).where(User.id < 3),
    ),
    "a trigger skips unchanged rows": ([SUPPRESS], update(User).where(User.id < 3).values(text="text 1")),
}


@pytest.mark.parametrize("name", BY_DATABASE)
def test_the_database_may_change_fewer_rows(postgres_engine: Engine, name: str) -> None:
    """Soft deletes: the log has the rows as they are afterwards."""
    app = users_of(postgres_engine)
    ddl, statement = BY_DATABASE[name]
    with postgres_engine.begin() as connection:
        for command in ddl:
            connection.execute(text(command))
    with app.session() as session:
        session.execute(statement)
        session.commit()
        changed = [(change.op, change.key) for change in app.memory.history(session, User)][5:]
    assert changed == ([("update", 2)] if "unchanged" in name else [("update", 1), ("update", 2)])
    app.assert_log_is_truth()
    assert app.memory.doctor(postgres_engine).healthy


def test_a_trigger_of_sqlite_may_keep_rows(sqlite_engine: Engine) -> None:
    app = users_of(sqlite_engine)
    with sqlite_engine.begin() as connection:
        connection.execute(
            text('CREATE TRIGGER z BEFORE DELETE ON "user" WHEN OLD.id < 3 BEGIN SELECT RAISE(IGNORE); END')
        )
    with app.session() as session:
        assert session.execute(delete(User).where(User.id < 5)).rowcount == 2
        session.commit()
    assert sorted(app.rows(User)) == [1, 2, 5]
    app.assert_log_is_truth()


def _to_user_3(state: Any) -> None:
    """Replace the statement, and keep its RETURNING."""
    if state.is_update or state.is_delete:
        dml: Any = delete(User) if state.is_delete else update(User).values(text="x")
        state.statement = dml.where(User.id == 3).returning(*state.statement._returning)


def _hide_some(state: Any) -> None:
    if state.is_update or state.is_delete:
        state.statement = state.statement.options(with_loader_criteria(User, User.id > 3))


def _narrow(state: Any) -> None:
    if state.is_update or state.is_delete:
        state.statement = state.statement.where(User.id > 3)


def _replace(state: Any) -> None:
    if state.is_update:
        state.statement = update(User).where(User.id == 4).values(text="other")


LISTENERS: dict[str, Any] = {
    "none": None,
    "another WHERE": _to_user_3,
    "loader criteria": _hide_some,
    "a narrower WHERE": _narrow,
}


@pytest.mark.parametrize("statement", ["update", "delete"])
@pytest.mark.parametrize("name", LISTENERS)
def test_a_later_listener_may_change_the_statement(engine: Engine, name: str, statement: str) -> None:
    """The application's listener runs after ours. The log has the changes of the final statement."""
    app = users_of(engine)
    if LISTENERS[name] is not None:
        event.listen(app.sessions, "do_orm_execute", LISTENERS[name])
    dml: Any = delete(User) if statement == "delete" else update(User).values(text="changed")
    with app.session() as session:
        session.execute(
            dml.where(User.id != bindparam("i")), {"i": 1}, execution_options={"synchronize_session": False}
        )
        session.commit()
        changed = {change.key for change in app.memory.history(session, User)[5:]}
    assert changed == {"none": {2, 3, 4, 5}, "another WHERE": {3}}.get(name, {4, 5})
    app.assert_log_is_truth()


def test_a_listener_that_replaces_the_statement_is_refused(engine: Engine) -> None:
    app = users_of(engine)
    event.listen(app.sessions, "do_orm_execute", _replace)
    with app.session() as session:
        with pytest.raises(UntrackedWrite, match="listener replaced the statement"):
            session.execute(update(User).where(User.id == 1).values(text="x"))
        session.rollback()
    app.assert_log_is_truth()


def test_options_of_a_statement_may_hide_rows(engine: Engine) -> None:
    app = users_of(engine)
    with app.session() as session:
        hiding: Any = update(User).values(text="x").options(with_loader_criteria(User, User.id > 3))
        assert session.execute(hiding).rowcount == 2
        session.commit()
        assert [change.key for change in app.memory.history(session, User)][5:] == [4, 5]
    app.assert_log_is_truth()


@pytest.mark.parametrize("statement", ["update", "delete"])
def test_a_where_that_matches_other_rows_each_time_is_refused_on_sqlite(sqlite_engine: Engine, statement: str) -> None:
    """There is no other writer, so the WHERE itself must be the cause. Nothing has changed."""
    numbers = itertools.count(1)
    event.listen(
        sqlite_engine, "connect", lambda dbapi, record: dbapi.create_function("draw", 0, lambda: next(numbers))
    )
    sqlite_engine.dispose()
    app = users_of(sqlite_engine)
    dml: Any = delete(User) if statement == "delete" else update(User).values(text="drawn")
    with app.session() as session:
        before = app.rows(User, session)
        drawn = select(func.draw()).scalar_subquery()
        with pytest.raises(UntrackedWrite, match=r"matches other rows each time it is evaluated\. Select the primary"):
            session.execute(dml.where(User.id == drawn))
        session.commit()
    assert app.rows(User) == before
    app.assert_log_is_truth()


def test_a_where_that_matches_other_rows_each_time_is_never_silent(engine: Engine) -> None:
    """ORDER BY random() LIMIT 1 is captured when both runs choose the same row. Otherwise it is refused."""
    app = users_of(engine)
    for _ in range(5):
        with app.session() as session:
            one = select(User.id).order_by(func.random()).limit(1).scalar_subquery()
            with suppress(UntrackedWrite, ConflictError):
                session.execute(update(User).where(User.id == one).values(text=User.text + "!"))
            session.commit()
    app.assert_log_is_truth()


# -- results -----------------------------------------------------------------------------------------------------------


def _of_result(call: Callable[[], Any]) -> Any:
    try:
        return call()
    except Exception as error:
        return type(error).__name__


def _describe(result: Any) -> dict[str, Any]:
    names = ("lastrowid", "is_insert", "inserted_primary_key", "inserted_primary_key_rows")
    described = {name: _of_result(lambda: getattr(result, name)) for name in names}  # noqa: B023
    for name in ("last_inserted_params", "supports_sane_rowcount", "lastrow_has_defaults", "prefetch_cols", "all"):
        described[name] = _of_result(lambda: getattr(result, name)())  # noqa: B023
    return {**described, "is a CursorResult": isinstance(result, sa.CursorResult)}


RESULTS: dict[str, Callable[[Session], Any]] = {
    "insert of a table": lambda s: _describe(s.execute(USERS.insert().values(id=7, name="a"))),
    "insert of a class": lambda s: _describe(s.execute(insert(User).values(id=7, name="a"))),
    "update": lambda s: [(found := s.execute(update(User).values(text="x"))).rowcount, _describe(found)],
    "inserted key by name": lambda s: s.execute(insert(User).values(id=7, name="a")).inserted_primary_key.id,
    "inserted key beside RETURNING": lambda s: _of_result(
        lambda: s.execute(USERS.insert().values(id=7, name="a").returning(USERS.c.id)).inserted_primary_key
    ),
    "return_defaults()": lambda s: (
        s.execute(USERS.insert().values(id=7, name="a").return_defaults(USERS.c.text)).returned_defaults.text
    ),
    "RETURNING by attribute": lambda s: (
        s.execute(insert(User).values(id=7, name="a").returning(User.id, User.name)).one()._mapping[User.name]
    ),
    "RETURNING by column": lambda s: (
        s.execute(USERS.update().values(text="u").returning(USERS.c.id, USERS.c.text)).first()._mapping[USERS.c.text]
    ),
    "scalars by column": lambda s: (
        s.execute(USERS.update().values(text="u").returning(USERS.c.id, USERS.c.text)).scalars(USERS.c.text).all()
    ),
    "scalar": lambda s: s.scalar(update(User).where(User.id == 2).values(text="u").returning(User.text)),
    "scalars of objects": lambda s: [
        user.id for user in s.scalars(update(User).where(User.id == 2).values(text="u").returning(User))
    ],
    "two columns of one name": lambda s: [
        tuple(row)
        for row in s.execute(update(User).where(User.id == 2).values(text="u").returning(User.name, User.name, User.id))
    ],
}


@pytest.mark.parametrize("name", RESULTS)
def test_a_result_has_all_of_a_cursor_result(engine: Engine, name: str) -> None:
    app = users_of(engine)
    with Session(engine) as plain:
        expected = RESULTS[name](plain)
    with app.session() as session:
        assert RESULTS[name](session) == expected
        session.commit()
    app.assert_log_is_truth()


def test_a_result_tells_whether_it_has_rows(engine: Engine) -> None:
    app = users_of(engine)
    with app.session() as session:
        dml: Any = update(User).where(User.id == 1).values(text="x")
        assert not session.execute(dml).returns_rows  # type: ignore[attr-defined]
        assert not session.execute(insert(User).values(id=9, name="new")).returns_rows  # type: ignore[attr-defined]
        assert session.execute(dml.returning(User.id)).returns_rows


def test_return_defaults_is_captured_where_it_tells_the_keys(engine: Engine) -> None:
    """It is captured for one row and for executemany, but not for several rows in VALUES."""
    app = users_of(engine)
    inserting: Any = USERS.insert().return_defaults(USERS.c.text)
    with app.session() as session:
        many = session.execute(inserting, [{"id": 8, "name": "u8"}, {"id": 9, "name": "u9"}])
        assert [row.text for row in many.returned_defaults_rows] == ["said nothing"] * 2  # type: ignore[attr-defined]
        session.commit()
        with pytest.raises(UntrackedWrite, match=r"return_defaults\(\) does not return the keys of all rows"):
            session.execute(inserting.values([{"id": 10, "name": "u10"}, {"id": 11, "name": "u11"}]))
        session.commit()
    assert sorted(app.rows(User)) == [1, 2, 3, 4, 5, 8, 9]
    app.assert_log_is_truth()
