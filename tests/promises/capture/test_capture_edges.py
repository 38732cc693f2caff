"""Capture and undo at their edges: failed flushes, subclasses, renamed columns, several engines, shared connections."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import (
    Column,
    Engine,
    Identity,
    Integer,
    MetaData,
    Table,
    Text,
    column,
    create_engine,
    delete,
    event,
    insert,
    inspect,
    select,
    table,
    text,
    update,
)
from sqlalchemy.orm import DeclarativeBase, Mapped, Session, mapped_column

from memstate_sa import ConflictError, MemstateError, UntrackedWrite, ValidationFailed, sqlite
from memstate_sa.db.codec import encode_key
from memstate_sa.db.tables import log, outbox, transaction, unique
from memstate_sa.log.changes import replay
from tests.support import Person, Tag, World, apps
from tests.support.preferences import Base as PreferenceBase, Preference, PreferenceSchema
from tests.support.tags import say, tags

pytestmark = pytest.mark.sa20


class App(apps.App):
    """An application with one tracked model, its memory and its database."""

    def __init__(self, engine: Engine, model: type[Any], **tracking: Any) -> None:
        super().__init__(engine, model, **{"text": "content", **tracking})
        self.model = model

    def stored(self) -> dict[Any, dict[str, Any]]:
        """The rows of the table, by primary key. The key is the first column."""
        with self.engine.connect() as connection:
            found = connection.execute(text(f"SELECT * FROM {self.model.__table__.name}")).mappings()
            return {next(iter(row.values())): dict(row) for row in found}

    def ops(self) -> list[tuple[str, Any]]:
        with self.sessions() as session:
            return [(change.op, change.key) for change in self.memory.history(session, self.model)]

    def assert_log_is_truth(self) -> None:
        with self.sessions() as session:
            changes = self.memory.history(session, self.model)
        assert {key: dict(row) for (_, key), row in replay(changes).items()} == self.stored()

    def assert_unique_is_truth(self) -> None:
        """Assert that memstate_unique holds the value of every row, and nothing else."""
        with self.engine.connect() as connection:
            held = {row.key: row.value for row in connection.execute(select(unique))}
        assert held == {encode_key([id_]): encode_key([row["content"]]) for id_, row in self.stored().items()}


# -- failed validation -----------------------------------------------------------------------------------------------

BULK: list[Callable[[Session], Any]] = [
    lambda s: s.bulk_insert_mappings(inspect(Preference), [{"content": "smuggled"}]),
    lambda s: s.bulk_save_objects([Preference(content="smuggled")]),
]


@pytest.mark.parametrize("invalid", [{"content": "x"}, {"content": "fine", "strength": 0}], ids=["before", "after"])
def test_bulk_methods_are_refused_after_a_flush_that_failed_validation(engine: Engine, invalid: dict[str, Any]) -> None:
    """The flush is over, whether it failed before any SQL or on a value that the database computed."""
    app = App(engine, Preference, schema=PreferenceSchema)
    with app.sessions() as session:
        session.add(Preference(content="valid"))
        session.commit()
        for smuggle in BULK:
            savepoint = session.begin_nested()
            session.add(Preference(**invalid))
            with pytest.raises(ValidationFailed):
                session.flush()
            if not savepoint.is_active:  # SQL was sent, and the flush has rolled it back
                savepoint.rollback()
            with pytest.raises(UntrackedWrite, match="INSERT on preference would bypass the log of Preference"):
                smuggle(session)
            session.rollback()
    assert app.stored() == {1: {"id": 1, "content": "valid", "strength": 5, "low": 1}}
    app.assert_log_is_truth()


@pytest.mark.parametrize("synchronize", ["evaluate", "fetch"])
def test_instances_show_the_database_after_a_bulk_update_that_failed(engine: Engine, synchronize: str) -> None:
    """The update reached the objects before it was undone, so they are loaded again."""
    app = App(engine, Preference, schema=PreferenceSchema)
    with app.sessions() as session:
        first, second = Preference(content="first"), Preference(content="second", strength=9)
        session.add_all([first, second])
        session.commit()
        assert [first.strength, second.strength] == [5, 9]
        statement = update(Preference).values(strength=Preference.strength + 4)
        with pytest.raises(ValidationFailed):
            session.execute(statement, execution_options={"synchronize_session": synchronize})
        assert [first.strength, second.strength] == [5, 9]
        first.content = "still mine to change"
        session.commit()
    assert {id_: (row["content"], row["strength"]) for id_, row in app.stored().items()} == {
        1: ("still mine to change", 5),
        2: ("second", 9),
    }
    app.assert_log_is_truth()


# -- single-table inheritance ----------------------------------------------------------------------------------------


class Base(DeclarativeBase):
    pass


class Animal(Base):
    __tablename__ = "animal"
    id: Mapped[int] = mapped_column(primary_key=True)
    kind: Mapped[str]
    content: Mapped[str]
    __mapper_args__ = {"polymorphic_on": "kind", "polymorphic_identity": "animal"}  # noqa: RUF012


class Cat(Animal):
    __mapper_args__ = {"polymorphic_identity": "cat"}  # noqa: RUF012


class Dog(Animal):
    __mapper_args__ = {"polymorphic_identity": "dog"}  # noqa: RUF012


class Puppy(Dog):
    __mapper_args__ = {"polymorphic_identity": "puppy"}  # noqa: RUF012


@pytest.fixture
def zoo(engine: Engine) -> App:
    """Rows of every class that are older than tracking."""
    app = App(engine, Animal)
    with engine.begin() as connection:
        kinds = ["animal", "cat", "dog", "puppy"]
        rows = [{"id": n, "kind": kind, "content": "old"} for n, kind in enumerate(kinds, 1)]
        connection.execute(insert(Animal), rows)
    return app


def test_a_bulk_update_of_a_subclass_touches_its_rows_alone(zoo: App) -> None:
    """Subclasses of the subclass are included. Rows of other classes get neither baselines nor updates."""
    with zoo.sessions() as session:
        session.execute(update(Dog).values(content="new"))
        session.execute(update(Puppy).where(Puppy.content == "new").values(content="newest"))
        session.execute(update(Cat).where(Cat.id == 3).values(content="no cat has this id"))
        session.commit()
    assert {id_: row["content"] for id_, row in zoo.stored().items()} == {1: "old", 2: "old", 3: "new", 4: "newest"}
    assert sorted(zoo.ops()) == [("baseline", 3), ("baseline", 4), ("update", 3), ("update", 4), ("update", 4)]
    zoo.memory.backfill(zoo.engine, Animal)
    zoo.assert_log_is_truth()


def test_a_bulk_delete_of_a_subclass_touches_its_rows_alone(zoo: App) -> None:
    """Undoing the delete brings back exactly these rows."""
    before = zoo.stored()
    with zoo.sessions() as session:
        session.execute(delete(Dog))
        session.query(Cat).filter(Cat.content == "new").delete()
        session.commit()
        assert {id_: row["kind"] for id_, row in zoo.stored().items()} == {1: "animal", 2: "cat"}
        assert sorted(zoo.ops()) == [("baseline", 3), ("baseline", 4), ("delete", 3), ("delete", 4)]
        zoo.memory.backfill(zoo.engine, Animal)
        zoo.assert_log_is_truth()
        zoo.memory.rollback(session)
        session.commit()
    assert zoo.stored() == before
    zoo.assert_log_is_truth()


# -- redo ------------------------------------------------------------------------------------------------------------


def test_redoing_over_an_older_undo_of_others_is_a_conflict(world: World) -> None:
    """Bob's change was undone, then Ada's older one. Redoing only Bob's would update a row that is gone."""
    say(world, actor="ada", a="1", b="1")
    say(world, actor="bob", a="2")
    with world.session() as session:
        bobs = world.memory.rollback(session, actor="bob")[0].tx
        session.commit()
        adas = world.memory.rollback(session, actor="ada")[0].tx
        session.commit()
        before = world.memory.history(session, Tag)
        with pytest.raises(ConflictError, match="tag 'a'") as caught:
            world.memory.rollback(session, tx=bobs)
        assert [(change.tx, change.key, change.op) for change in caught.value.changes] == [(adas, "a", "delete")]
        session.commit()
        assert world.memory.history(session, Tag) == before
        assert tags(world) == {}
        world.memory.rollback(session, tx=adas)
        session.commit()
        assert tags(world) == {"a": "1", "b": "1"}
        world.memory.rollback(session, tx=bobs)
        session.commit()
    assert tags(world) == {"a": "2", "b": "1"}
    world.assert_in_step()


# -- unique values ---------------------------------------------------------------------------------------------------


def hand_over(app: App, *, transactions: int) -> list[str]:
    """Move "x" from fact 1 (which takes "w", then "y") to fact 2. Returns the ids of the transactions."""
    with app.sessions() as session:
        session.add_all([Preference(id=1, content="x"), Preference(id=2, content="z")])
        session.commit()
        session.get_one(Preference, 1).content = "w"
        session.flush()
        session.get_one(Preference, 1).content = "y"
        session.flush()
        if transactions == 2:
            session.commit()
        session.get_one(Preference, 2).content = "x"
        session.commit()
        app.assert_unique_is_truth()
        txs = session.scalars(select(log.c.tx).where(log.c.op == "update").order_by(log.c.id))
        return list(dict.fromkeys(txs))


def contents(app: App) -> dict[int, str]:
    return {id_: row["content"] for id_, row in app.stored().items()}


@pytest.mark.parametrize("transactions", [1, 2])
def test_undo_gives_a_moved_unique_value_back(engine: Engine, transactions: int) -> None:
    """Each fact has its value back after one step or two. Redoing moves it again."""
    app = App(engine, Preference, unique_by=("content",))
    assert len(hand_over(app, transactions=transactions)) == transactions
    with app.sessions() as session:
        undo = app.memory.rollback(session, transactions)[0].tx
        session.commit()
        assert contents(app) == {1: "x", 2: "z"}
        app.assert_unique_is_truth()
        app.memory.rollback(session, tx=undo)
        session.commit()
    assert contents(app) == {1: "y", 2: "x"}
    app.assert_unique_is_truth()
    app.assert_log_is_truth()


def test_undo_reverses_a_swap_of_unique_values(engine: Engine) -> None:
    """Both facts take the other's value in one flush."""
    app = App(engine, Preference, unique_by=("content",))
    with app.sessions() as session:
        session.add_all([Preference(id=1, content="x"), Preference(id=2, content="y")])
        session.commit()
        first, second = session.scalars(select(Preference).order_by(Preference.id))
        first.content, second.content = "y", "x"
        session.commit()
        assert contents(app) == {1: "y", 2: "x"}
        app.assert_unique_is_truth()
        app.memory.rollback(session)
        session.commit()
    assert contents(app) == {1: "x", 2: "y"}
    app.assert_unique_is_truth()
    app.assert_log_is_truth()


def test_a_unique_value_that_is_taken_cannot_be_brought_back(engine: Engine) -> None:
    """Undoing the transaction that gave the value up is a conflict. Nothing changes, and the caller's work is kept."""
    app = App(engine, Preference, unique_by=("content",))
    gave_up, took = hand_over(app, transactions=2)
    with app.sessions() as session:
        session.add(Preference(id=3, content="mine"))
        before = app.memory.history(session, Preference)
        with pytest.raises(ConflictError, match=r"a unique value is taken.*: preference 2 \(update"):
            app.memory.rollback(session, tx=gave_up)
        session.commit()
        assert app.memory.history(session, Preference) == before
        assert contents(app) == {1: "y", 2: "x", 3: "mine"}
        app.assert_unique_is_truth()
        app.memory.rollback(session, tx=took)
        app.memory.rollback(session, tx=gave_up)
        session.commit()
    assert contents(app) == {1: "x", 2: "z", 3: "mine"}
    app.assert_unique_is_truth()
    app.assert_log_is_truth()


def test_backfilled_rows_have_their_unique_values(engine: Engine) -> None:
    """Values from before tracking block a later duplicate."""
    app = App(engine, Preference, unique_by=("content",))
    with Session(engine) as session:
        session.add_all([Preference(content="tea"), Preference(content="jam"), Preference(content="rye")])
        session.commit()
    app.memory.backfill(engine, Preference, batch_size=2)
    app.assert_unique_is_truth()
    with app.sessions() as session:
        session.add(Preference(content="tea"))
        with pytest.raises(ConflictError, match="same value of unique_by"):
            session.commit()
        session.rollback()
        session.get_one(Preference, 2).content = "rye"
        with pytest.raises(ConflictError, match="same value of unique_by"):
            session.commit()
        session.rollback()
        session.get_one(Preference, 1).content = "oolong"
        session.commit()
        session.add(Preference(content="tea"))
        session.commit()
    assert sorted(contents(app).values()) == ["jam", "oolong", "rye", "tea"]
    app.assert_unique_is_truth()
    app.assert_log_is_truth()


# -- columns with other names than their attributes --------------------------------------------------------------------


class Renamed(Base):
    """Attributes whose names differ from their columns' names."""

    __tablename__ = "renamed"
    id: Mapped[int] = mapped_column("note_no", primary_key=True)
    content: Mapped[str] = mapped_column("body")
    owner: Mapped[str] = mapped_column("user_name")


class Crossed(Base):
    """Two attributes, each with the name of the other's column."""

    __tablename__ = "crossed"
    id: Mapped[int] = mapped_column("note_no", primary_key=True)
    content: Mapped[str] = mapped_column("owner")
    owner: Mapped[str] = mapped_column("content")


class Keyed(Base):
    """Columns with keys of their own in the Table."""

    __table__ = Table(
        "keyed",
        Base.metadata,
        Column("note_no", Integer, key="id", primary_key=True),
        Column("body", Text, key="content", nullable=False),
        Column("user_name", Text, key="owner", nullable=False),
    )


@pytest.mark.parametrize("model", [Renamed, Crossed, Keyed])
def test_columns_named_unlike_their_attributes_are_captured(engine: Engine, model: Any) -> None:
    """They are captured, found, shown and undone under their own names, by objects and by bulk statements."""
    app = App(engine, model, metadata=("owner",), unique_by=("owner", "content"))
    _, body, user = (column.name for column in model.__table__.columns)
    with Session(engine) as session:
        session.add(model(id=4, content="black coffee", owner="bob"))
        session.commit()
    with app.sessions() as session:
        session.add_all(
            [
                model(id=1, content="green tea", owner="ada"),
                model(id=2, content="black tea", owner="bob"),
                model(id=3, content="rain", owner="ada"),
            ]
        )
        session.commit()
        app.memory.backfill(engine, model)
        start = app.stored()
        app.assert_log_is_truth()
        session.get_one(model, 1).content = "white tea"
        session.commit()
        session.execute(update(model).where(model.owner == "bob").values(content=model.content + " with milk"))
        session.execute(update(model), [{"id": 3, "owner": "eve"}])
        session.execute(insert(model), [{"id": 5, "content": "snow", "owner": "eve"}])
        session.commit()
        session.delete(session.get_one(model, 1))
        session.execute(delete(model).where(model.owner == "eve"))
        session.commit()
        app.assert_log_is_truth()
        assert {id_: (row[body], row[user]) for id_, row in app.stored().items()} == {
            2: ("black tea with milk", "bob"),
            4: ("black coffee with milk", "bob"),
        }
        told = app.memory.history(session, model, 1)
        assert [(change.op, change.after) for change in told] == [
            ("insert", {"note_no": 1, body: "green tea", user: "ada"}),
            ("update", {"note_no": 1, body: "white tea", user: "ada"}),
            ("delete", None),
        ]
        app.memory.rollback(session, 3)
        session.commit()
        assert app.stored() == start
        app.assert_log_is_truth()
        app.memory.rollback(session)
        session.commit()
        assert app.stored() == {4: start[4]}
        app.assert_log_is_truth()


@pytest.mark.parametrize("model", [Renamed, Crossed, Keyed])
def test_columns_named_unlike_their_attributes_are_searched(engine: Engine, model: Any) -> None:
    """Criteria on metadata and on other columns, for delivered and undelivered rows."""
    app = App(engine, model, metadata=("owner",))
    with app.sessions() as session:
        session.add(model(id=1, content="green tea", owner="ada"))
        session.add(model(id=2, content="black tea", owner="bob"))
        session.commit()
        app.memory.relay(engine).drain()
        assert app.memory.verify(engine).clean
        session.add(model(id=3, content="green tea, iced", owner="bob"))
        session.flush()
        of_bob = app.memory.search(session, "green tea", select(model).where(model.owner == "bob"))
        assert [hit.fact.content for hit in of_bob] == ["green tea, iced", "black tea"]
        green = app.memory.search(session, "green tea", select(model).where(model.content.like("green%")))
        assert [hit.fact.id for hit in green] == [1, 3]
        exactly = app.memory.search(session, "tea", select(model).where(model.content == "black tea"))
        assert [hit.fact.id for hit in exactly] == [2]
        session.rollback()


# -- generated keys that cannot be chosen ------------------------------------------------------------------------------


class Ticket(Base):
    __tablename__ = "ticket"
    id: Mapped[int] = mapped_column(Identity(always=True), primary_key=True)
    content: Mapped[str]


def test_rows_with_generated_always_keys_cannot_be_brought_back(postgres_engine: Engine) -> None:
    """The error names the column. The transaction goes on, and rows without such a key are still undone."""
    app = App(postgres_engine, Ticket)
    with app.sessions() as session:
        session.add_all([Ticket(content="first"), Ticket(content="second")])
        session.commit()
        session.get_one(Ticket, 2).content = "changed"
        session.commit()
        session.get_one(Ticket, 2).content = "again"
        session.delete(session.get_one(Ticket, 1))
        session.commit()
        before = app.memory.history(session, Ticket)
        with pytest.raises(
            MemstateError, match=r"Cannot bring back a deleted row of ticket: its column id is GENERATED ALWAYS"
        ):
            app.memory.rollback(session)
        session.commit()
        assert app.memory.history(session, Ticket) == before
        assert app.stored() == {2: {"id": 2, "content": "again"}}
        session.get_one(Ticket, 2).content = "once more"
        session.commit()
        app.memory.rollback(session)
        session.commit()
    assert app.stored() == {2: {"id": 2, "content": "again"}}
    app.assert_log_is_truth()


# -- several engines, schemas and connections ------------------------------------------------------------------------


@pytest.fixture
def other_engine(tmp_path: Path) -> Iterator[Engine]:
    engine = sqlite.configure(create_engine(f"sqlite:///{tmp_path / 'other.db'}"))
    yield engine
    engine.dispose()


@pytest.mark.parametrize("first", ["facts", "other"])
def test_labels_are_written_where_the_facts_are(engine: Engine, other_engine: Engine, first: str) -> None:
    """Header, log and outbox are in the database of the facts, whichever database the Session uses first."""
    app = App(engine, Animal)
    PreferenceBase.metadata.create_all(other_engine)
    app.memory.create_tables(other_engine)
    with app.sessions(bind=other_engine, binds={Animal: engine}) as session:
        app.memory.annotate(session, actor="ada", reason="because")
        new = [Cat(content="purrs"), Preference(content="not tracked")]
        for instance in new if first == "facts" else reversed(new):
            session.add(instance)
            session.flush()
        session.commit()
        change = app.memory.history(session, Animal)[0]
        assert (change.op, change.actor, change.reason) == ("insert", "ada", "because")
        assert session.scalars(select(Preference.content)).all() == ["not tracked"]
    with engine.connect() as here, other_engine.connect() as there:
        assert here.execute(select(transaction.c.tx, transaction.c.actor)).all() == [(change.tx, "ada")]
        assert [there.execute(select(table)).all() for table in (transaction, log, outbox)] == [[], [], []]
    app.assert_log_is_truth()


def test_facts_of_one_transaction_live_in_one_database(world: World, other_engine: Engine) -> None:
    """Writing tracked models to a second database is refused. Neither database keeps anything."""
    Person.metadata.create_all(other_engine)
    world.memory.create_tables(other_engine)
    with world.sessions(binds={Person: world.engine, Tag: other_engine}) as session:
        session.add(Person(name="p", about="here"))
        session.flush()
        session.add(Tag(name="t"))
        with pytest.raises(MemstateError, match="the Session writes to two databases"):
            session.commit()
        session.rollback()
    for engine in (world.engine, other_engine):
        with engine.connect() as connection:
            for table in (Person.__table__, Tag.__table__, log, outbox):
                assert connection.execute(select(table)).all() == []


def test_schema_translate_map_is_refused(world: World) -> None:
    """Every kind of write on such an engine raises an error that names the option. Nothing is kept."""
    writes: list[Callable[[Session], Any]] = [
        lambda s: s.add(Tag(name="b")),
        lambda s: setattr(s.get_one(Tag, "a"), "meaning", "changed"),
        lambda s: s.delete(s.get_one(Tag, "a")),
        lambda s: s.execute(insert(Tag), [{"name": "b"}]),
        lambda s: s.execute(update(Tag).values(meaning="changed")),
        lambda s: world.memory.rollback(s),
    ]
    say(world, a="1")
    schema = {"sqlite": "main", "postgresql": "public"}[world.engine.dialect.name]
    translated = world.engine.execution_options(schema_translate_map={None: schema})
    for write in writes:
        with world.sessions(bind=translated) as session:
            with pytest.raises(MemstateError, match="Cannot use schema_translate_map"):
                write(session)
                session.commit()
            session.rollback()
    assert tags(world) == {"a": "1"}
    world.assert_log_is_truth()


def test_a_reflected_table_is_the_tracked_table(world: World) -> None:
    """It is another Table object of the same name. A statement on it is refused like one on the model's table."""
    say(world, a="1")
    metadata = MetaData()
    metadata.reflect(world.engine, only=["tag"])
    reflected = metadata.tables["tag"]
    assert reflected is not Tag.__table__
    with world.session() as session:
        for statement in (
            insert(reflected).values(name="b", meaning="smuggled"),
            update(reflected).values(meaning="smuggled"),
            delete(reflected),
        ):
            with pytest.raises(UntrackedWrite, match="on tag would bypass the log of Tag"):
                session.execute(statement)
        session.commit()
    assert tags(world) == {"a": "1"}
    world.assert_in_step()


def test_two_sessions_on_one_connection_keep_their_labels(world: World) -> None:
    """Each is captured under its own labels. The guard knows both Sessions, and survives the end of the first."""
    table: Any = Tag.__table__
    with world.engine.connect() as connection:
        with connection.begin(), world.sessions(bind=connection) as ada, world.sessions(bind=connection) as bob:
            for session, actor in ((ada, "ada"), (bob, "bob")):
                world.memory.annotate(session, actor=actor)
                session.add(Tag(name=f"first of {actor}"))
                session.flush()
            for session, actor in ((ada, "ada"), (bob, "bob")):
                session.add(Tag(name=f"second of {actor}"))
                session.flush()
                session.execute(update(Tag).where(Tag.name == f"first of {actor}").values(meaning=actor))
                with pytest.raises(UntrackedWrite):
                    session.connection().execute(delete(table))
            ada.commit()
            ada.close()
            bob.add(Tag(name="third of bob"))
            bob.flush()
            for write in (bob.connection().execute, connection.execute):
                with pytest.raises(UntrackedWrite):
                    write(update(table).values(meaning="smuggled"))
            bob.commit()
        with world.session() as session:
            changes = world.memory.history(session, Tag)
            assert [(change.op, change.key, change.actor) for change in changes] == [
                ("insert", "first of ada", "ada"),
                ("insert", "first of bob", "bob"),
                ("insert", "second of ada", "ada"),
                ("update", "first of ada", "ada"),
                ("insert", "second of bob", "bob"),
                ("update", "first of bob", "bob"),
                ("insert", "third of bob", "bob"),
            ]
            assert len({(change.tx, change.actor) for change in changes}) == 2
    world.assert_in_step()


# -- searches with locks -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("delivered", [True, False])
@pytest.mark.parametrize(
    "criterion", [Person.name == "ada", Person.about.like("likes%")], ids=["in the index", "by ids"]
)
def test_search_with_for_update_locks_only_its_hits(world: World, criterion: Any, delivered: bool) -> None:
    """The hits are locked where the database can. Other rows are not."""
    with world.session() as session:
        session.add_all(
            [
                Person(name="ada", about="likes green tea"),
                Person(name="ada", about="likes rain"),
                Person(name="bob", about="hates green tea"),
            ]
        )
        session.commit()
        if delivered:
            world.relay.drain()
        target = select(Person).where(criterion).with_for_update()
        hits = world.memory.search(session, "green tea", target)
        assert [hit.fact.about for hit in hits] == ["likes green tea", "likes rain"]
        if world.engine.dialect.name == "postgresql":
            with world.engine.connect() as connection:
                unlocked = select(Person.name).with_for_update(skip_locked=True)
                assert connection.scalars(unlocked).all() == ["bob"]
        hits[0].fact.about = "likes black tea"
        session.commit()
    world.assert_in_step()


# -- ways around the guard ---------------------------------------------------------------------------------------------


def reflected(engine: Engine) -> Table:
    """The table under its full name, which is another Table object with a schema."""
    schema = {"sqlite": "main", "postgresql": "public"}[engine.dialect.name]
    found = MetaData()
    found.reflect(engine, only=["tag"], schema=schema)
    return found.tables[f"{schema}.tag"]


AROUND: dict[str, Callable[[Engine], Any]] = {
    "an alias": lambda engine: update(Tag.__table__.alias("x")).values(meaning="smuggled"),
    "the default schema by name": lambda engine: update(reflected(engine)).values(meaning="smuggled"),
    "a lightweight table": lambda engine: update(table("tag", column("meaning"))).values(meaning="smuggled"),
}


@pytest.mark.parametrize("way", AROUND)
def test_the_table_is_known_by_its_name(world: World, way: str) -> None:
    """The name is recognised in every form that Core accepts."""
    say(world, a="1")
    with world.session() as session, pytest.raises(UntrackedWrite):
        session.execute(AROUND[way](world.engine))
    world.assert_in_step()


def test_a_cte_that_writes_is_refused(postgres_engine: Engine) -> None:
    """A SELECT can carry it, and so can an INSERT into another table."""
    world = World(postgres_engine)
    say(world, a="1")
    gone = delete(Tag.__table__).returning(Tag.__table__.c.name).cte("gone")
    for statement in (select(gone.c.name), insert(Person).from_select(["name"], select(gone.c.name))):
        with world.session() as session, pytest.raises(UntrackedWrite, match="A CTE that writes"):
            session.execute(statement)
    world.assert_in_step()


@pytest.mark.parametrize("statement", [update(Tag).values(meaning="x"), insert(Tag).values(name="n", meaning="x")])
def test_schema_translate_map_of_one_statement_is_refused(world: World, statement: Any) -> None:
    """It would write to a table other than the logged one."""
    say(world, a="1")
    options = {"schema_translate_map": {None: "tenant"}}
    with world.session() as session, pytest.raises(MemstateError, match="Cannot use schema_translate_map"):
        session.execute(statement, execution_options=options)
    world.assert_in_step()


def test_one_flush_on_two_databases_is_refused(world: World, other_engine: Engine) -> None:
    """This also holds when both databases have a row of the same key."""
    say(world, t="in one")
    Person.metadata.create_all(other_engine)
    world.memory.create_tables(other_engine)
    with Session(other_engine) as unattached:
        unattached.add(Tag(name="t", meaning="in other"))
        unattached.commit()
    with world.sessions(binds={Person: world.engine, Tag: other_engine}) as session:
        session.get_one(Tag, "t").meaning = "changed"
        session.add(Person(name="p", about="x"))
        with pytest.raises(MemstateError, match="the Session writes to two databases"):
            session.commit()
    world.assert_in_step()
    with other_engine.connect() as connection:
        assert connection.execute(select(Tag.__table__.c.meaning)).all() == [("in other",)]
        assert connection.execute(select(log.c.key)).all() == []


class Numbered(Base):
    """A column that is not the key is GENERATED ALWAYS."""

    __tablename__ = "numbered"
    id: Mapped[int] = mapped_column(primary_key=True, autoincrement=False)
    number: Mapped[int] = mapped_column(Identity(always=True))
    content: Mapped[str]


def test_an_update_beside_a_generated_always_column_is_undone(postgres_engine: Engine) -> None:
    """The column keeps its value, which cannot have changed."""
    app = App(postgres_engine, Numbered)
    with app.sessions() as session:
        session.add(Numbered(id=1, content="x"))
        session.commit()
        session.get_one(Numbered, 1).content = "y"
        session.commit()
        app.memory.rollback(session)
        session.commit()
    assert app.stored() == {1: {"id": 1, "number": 1, "content": "x"}}


def test_sqlite_knows_no_generated_always(sqlite_engine: Engine) -> None:
    """It ignores the declaration, so that the row can come back."""
    app = App(sqlite_engine, Ticket)
    with app.sessions() as session:
        session.add(Ticket(content="x"))
        session.commit()
        session.delete(session.get_one(Ticket, 1))
        session.commit()
        app.memory.rollback(session)
        session.commit()
    assert [row["content"] for row in app.stored().values()] == ["x"]


def test_listeners_of_the_application_find_the_pending_changes_of_a_commit(world: World) -> None:
    """Applications maintain search indexes in such listeners. Labels and wake-up come with the same flush."""
    noted: list[Any] = []

    def note(session: Session) -> None:
        noted.append((list(session.new), list(session.dirty), list(session.deleted)))

    event.listen(world.sessions.class_, "before_commit", note)
    first, second = Person(id=1, name="ada", about="x"), Person(id=2, name="bob", about="y")
    with world.session(actor="me") as session:
        session.add_all([first, second])
        session.commit()
        world.memory.annotate(session, actor="you")
        first.about = "z"
        session.delete(second)
        session.flush()
        first.about = "new"
        session.commit()
        changes = world.memory.history(session, Person)
    assert [tuple(map(set, each)) for each in noted] == [({first, second}, set(), set()), (set(), {first}, set())]
    assert [(c.op, c.key, c.actor) for c in changes] == [
        ("insert", 1, "me"),
        ("insert", 2, "me"),
        ("update", 1, "you"),
        ("delete", 2, "you"),
        ("update", 1, "you"),
    ]


def test_a_listener_that_writes_in_a_commit_is_labelled(world: World) -> None:
    """The listener sends its own statements in a transaction without any entry so far."""

    def write(session: Session) -> None:
        session.execute(insert(Tag).values(name="t", meaning="m"))

    event.listen(world.sessions.class_, "before_commit", write)
    with world.session(actor="me") as session:
        session.get(Person, 1)
        session.commit()
        event.remove(world.sessions.class_, "before_commit", write)
        assert world.memory.token(session) is not None
        assert [(c.op, c.key, c.actor) for c in world.memory.history(session, Tag)] == [("insert", "t", "me")]
