"""Keys that no row can have: in the outbox, the log, an index and the bookkeeping. They do not stop other keys."""

from __future__ import annotations

from collections.abc import Iterator
from datetime import date
from typing import Any
from uuid import UUID

import pytest
from sqlalchemy import BigInteger, Date, Engine, Enum, Integer, SmallInteger, String, Uuid, insert, select, text
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column

from memstate_sa import HistoryMissing, Incomplete
from memstate_sa.db.codec import decode_key, decoded, encode_key
from memstate_sa.db.tables import backfill, log, outbox, refill, utcnow
from memstate_sa.indexes import InMemoryIndex
from memstate_sa.testing import HashEmbedder
from tests.support import Person, World, assert_index_holds, make_due
from tests.support.apps import App, make_app

IMPOSSIBLE = {
    "a word": "not json",
    "an object": '{"a": 1}',
    "a text": '"5"',
    "too large": "[99999999999999999999999]",
    "too many digits": f"[{'9' * 5000}]",
    "too many": "[1, 2]",
    "none": "[]",
    "an unknown tag": '[{"$": "x"}]',
    "a broken tag": '[{"$uuid": 5}]',
    "two tags": '[{"$uuid": "00", "$text": "00"}]',
    "a boolean": "[true]",
    "a list": "[[1]]",
    "deep": "[" * 3000 + "1" + "]" * 3000,
    "a NUL": '["a\\u0000b"]',
    "half a character": '["\\ud800"]',
    "not a number": '[{"$decimal": "NaN"}]',
    "infinity": '[{"$float": "inf"}]',
}
_REFUSED_BY_POSTGRESQL = {"letters": '["abc"]', "null": "[null]", "bytes": '[{"$bytes": "00"}]'}
_TAKEN_BY_SQLITE = {"infinity"}
"""Any column of SQLite may hold this value. No row has it, and no statement is refused."""


def announce(engine: Engine, entity: str, *keys: str) -> None:
    """Write outbox rows as if a change of these keys had been committed."""
    entry = {"slot": 1, "entity": entity, "tx": "x", "created_at": utcnow(), "intent": False}
    with engine.begin() as connection:
        connection.execute(insert(outbox), [{**entry, "key": key} for key in keys])


def log_entry(engine: Engine, entity: str, *keys: str) -> None:
    entry = {"tx": "poison", "entity": entity, "op": "insert", "version": 1, "step": True, "at": utcnow()}
    with engine.begin() as connection:
        connection.execute(insert(log), [{**entry, "key": key, "image": {"id": 1}} for key in keys])


def impossible(engine: Engine) -> dict[str, str]:
    if engine.dialect.name == "postgresql":
        return {**IMPOSSIBLE, **_REFUSED_BY_POSTGRESQL}
    return {name: key for name, key in IMPOSSIBLE.items() if name not in {"a NUL", *_TAKEN_BY_SQLITE}}


def people(world: World, *ids: int) -> None:
    with world.session() as session:
        session.add_all([Person(id=id_, name="p", about=f"about {id_}") for id_ in ids])
        session.commit()


def test_relay_parks_impossible_keys_alone(world: World) -> None:
    """The other keys of their page are delivered. Impossible keys are reported, and die like any key that is refused.

    The same kind: keys from before the primary key got another column, keys that another program wrote.
    """
    poison = impossible(world.engine)
    people(world, 1)
    world.relay.drain()
    announce(world.engine, "person", *poison.values())
    people(world, 2)
    world.relay.drain()
    assert_index_holds(world.index, world.embedder, {f"person[{n}]": f"about {n}" for n in (1, 2)})
    status = world.memory.status(world.engine)["memory"]
    assert (status.pending, status.parked) == (0, len(poison))
    for _ in range(8):
        make_due(world.engine)
        world.relay.drain()
    dead = {letter.key: letter.error for letter in world.relay.dead()}
    assert dead.keys() == set(poison.values())
    assert {"No row of person can have this key" in error for error in dead.values()} == {True}
    people(world, 3)
    world.relay.drain()
    assert world.memory.verify(world.engine).clean


def test_search_finds_rows_beside_impossible_keys(world: World) -> None:
    """The rows are found beside undelivered, parked or dead impossible keys. The answer is marked incomplete."""
    people(world, 1)
    world.relay.drain()
    announce(world.engine, "person", *impossible(world.engine).values())
    people(world, 2)
    for _ in range(2):
        with world.session() as session:
            hits = world.memory.search(session, "about 2", select(Person).where(Person.id > 0))
            assert [hit.fact.id for hit in hits] == [2, 1]
            assert hits.reasons == [Incomplete.IMPOSSIBLE_KEY]
        world.relay.drain()
    make_due(world.engine)
    for _ in range(8):
        make_due(world.engine)
        world.relay.drain()
    world.relay.drop_dead()
    with world.session() as session:
        assert world.memory.search(session, "about 2", Person).complete


def test_points_of_impossible_keys_are_ghosts(world: World) -> None:
    """Searches skip them. verify reports and removes them."""
    people(world, 1)
    world.relay.drain()
    keys = [key for key in impossible(world.engine).values() if key.startswith("[") and key.endswith("]")]
    for key in keys:
        [point] = world.index.get(["person[1]"])
        world.index.upsert([_like(point, f"person{key}")])
    with world.session() as session:
        assert [hit.fact.id for hit in world.memory.search(session, "about 1", Person, limit=1)] == [1]
    shown = {("person", _shown(key)) for key in keys}
    report = world.memory.verify(world.engine, repair=True)
    assert {(entity, repr(key)) for entity, key in report.ghost} == shown
    world.relay.drain()
    assert world.memory.verify(world.engine).clean
    assert world.memory.status(world.engine)["memory"].parked == 0
    assert_index_holds(world.index, world.embedder, {"person[1]": "about 1"})


def _like(point: Any, id_: str) -> Any:
    from memstate_sa.indexes import Point

    return Point(id_, point.vector, "another")


def _shown(key: str) -> str:
    values = decoded(key) or (key,)
    return repr(values[0] if len(values) == 1 else values)


def test_maintenance_works_beside_impossible_keys(world: World) -> None:
    """doctor, history, undo, past sessions and backfill work with them in the log, or explain in our words why not."""
    people(world, 1)
    poison = impossible(world.engine)
    log_entry(world.engine, "person", *poison.values())
    memory, engine = world.memory, world.engine
    assert {repr(key) for _, key in memory.doctor(engine).gone} == {_shown(key) for key in poison.values()}
    with world.session() as session:
        assert len(memory.history(session, Person)) == 1 + len(poison)
        assert memory.as_of(session, Person, 10**30, utcnow()) is None
        with pytest.raises(HistoryMissing, match="no row of person can have the key"):
            memory.rollback(session, dry_run=True)
        session.rollback()
    with memory.as_of_session(engine, utcnow()) as session:
        assert session.scalars(select(Person.id)).all() == [1]
    memory.doctor(engine, repair=True)
    assert memory.doctor(engine).gone == []
    with world.session() as session:
        memory.rollback(session, tx=memory.history(session, Person, 1)[0].tx)
        session.commit()
        assert session.scalars(select(Person.id)).all() == []


@pytest.mark.parametrize("key", ["not json", '[{"$": "x"}]', "[99999999999999999999999]"])
def test_progress_at_an_impossible_key_begins_again(world: World, key: str) -> None:
    """The progress of a refill or a backfill is stored as a key, which may not fit the current type."""
    with world.engine.begin() as connection:
        connection.execute(insert(Person), [{"name": "p", "about": f"about {n}"} for n in (1, 2)])
    assert world.memory.backfill(world.engine, Person, limit=1) == 1
    with world.engine.begin() as connection:
        connection.execute(backfill.update().values(position=key))
    world.memory.backfill(world.engine, Person)
    world.relay.run_once()
    with world.engine.begin() as connection:
        connection.execute(refill.update().where(refill.c.entity == "person").values(position=key, done=False))
    world.relay.stop()
    world.memory.relay(world.engine).drain()
    assert world.memory.doctor(world.engine).unlogged == 0
    assert_index_holds(world.index, world.embedder, {f"person[{n}]": f"about {n}" for n in (1, 2)})


# -- the type of the key changes --------------------------------------------------------------------------------------


class Before(DeclarativeBase):
    pass


class Numbered(Before):
    __tablename__ = "thing"
    id: Mapped[int] = mapped_column(primary_key=True)
    content: Mapped[str]


class After(DeclarativeBase):
    pass


class Lettered(After):
    __tablename__ = "thing"
    id: Mapped[str] = mapped_column(primary_key=True)
    content: Mapped[str]


_CHANGE = {
    "postgresql": ["ALTER TABLE thing ALTER id DROP DEFAULT, ALTER id TYPE text USING id::text"],
    "sqlite": [
        "CREATE TABLE other (id VARCHAR PRIMARY KEY NOT NULL, content VARCHAR NOT NULL)",
        "INSERT INTO other SELECT CAST(id AS TEXT), content FROM thing",
        "DROP TABLE thing",
        "ALTER TABLE other RENAME TO thing",
    ],
}


def test_key_of_another_type_stops_nothing(engine: Engine) -> None:
    """An entry is undelivered, and there are points and a log. Rows of the new type are served.

    The same kind: int to UUID, one column to two, a narrower integer.
    """
    index = InMemoryIndex()
    app = make_app(engine, Numbered, index=index, text="content")
    with app.session() as session:
        session.add_all([Numbered(id=1, content="one"), Numbered(id=2, content="two")])
        session.commit()
    app.memory.relay(engine).drain()
    with app.session() as session:
        session.add(Numbered(id=3, content="three"))
        session.commit()
    app.memory.close()
    with engine.begin() as connection:
        for statement in _CHANGE[engine.dialect.name]:
            connection.execute(text(statement))
    app = make_app(engine, Lettered, index=index, text="content")
    relay = app.memory.relay(engine)
    with app.session() as session:
        session.add(Lettered(id="new", content="four"))
        session.commit()
        hits = app.memory.search(session, "four", Lettered)
        assert ("new", False) in {(hit.fact.id, hits.complete) for hit in hits}
    relay.drain()
    assert set(app.memory.verify(engine, repair=True).ghost) == {("thing", 1), ("thing", 2)}
    app.memory.backfill(engine, Lettered)
    relay.drain()
    assert app.memory.verify(engine).clean
    expected = {"1": "one", "2": "two", "3": "three", "new": "four"}
    assert_index_holds(index, HashEmbedder(), {f"thing{encode_key([k])}": content for k, content in expected.items()})
    with app.memory.as_of_session(engine, utcnow()) as past:
        assert set(past.scalars(select(Lettered.id))) == set(expected)
    app.memory.close()


def with_key(type_: Any) -> Any:
    """A class whose key has *type_*. The table's name is always the same."""

    class Base(DeclarativeBase):
        pass

    class Thing(Base):
        __tablename__ = "thing"
        id: Mapped[Any] = mapped_column(type_, primary_key=True, autoincrement=False)
        content: Mapped[str]

    return Thing


KEYS = {
    "a word to an integer": (String(), ["1", "x"], Integer(), 7),
    "an integer to a UUID": (Integer(), [1, 2], Uuid(), UUID(int=7)),
    "a word to an enum": (String(), ["gone", "red"], Enum("red", "blue", name="colour", native_enum=False), "blue"),
    "a word to a date": (String(), ["x", "9999999-01-01"], Date(), date(2026, 1, 1)),
    "to fewer bits": (BigInteger(), [1, 2**40], SmallInteger(), 7),
}


@pytest.mark.parametrize("change", KEYS)
def test_key_of_an_older_type_is_shown_compared_and_erased(engine: Engine, change: str) -> None:
    """A value that the current type refuses is shown in its stored form.

    The same kind: intervals, types of the application, other columns whose type has changed.
    """
    old, keys, new, key = KEYS[change]
    before, after = with_key(old), with_key(new)
    app = make_app(engine, before, text="content")
    with app.session() as session:
        session.add_all(before(id=each, content=f"of {each}") for each in keys)
        session.commit()
        moment = app.memory.token(session)
    app.memory.close()
    before.metadata.drop_all(engine)
    app = make_app(engine, after, text="content")
    with app.session() as session:
        session.add(after(id=key, content="new"))
        session.commit()
        *first, last = (change.key for change in app.memory.history(session, after))
        assert sorted(first, key=str) == sorted(keys, key=str)  # one transaction has them in any order
        assert last == key
    with app.memory.as_of_session(engine, moment) as past:
        assert set(past.scalars(select(after.content))) <= {f"of {each}" for each in keys}
    app.memory.doctor(engine, repair=True)
    assert app.memory.doctor(engine).healthy
    with app.session() as session:
        for each in keys:
            assert app.memory.erase(session, after, each) > 0
        session.commit()
        assert [fact.id for fact in session.scalars(select(after))] == [key]
    app.memory.close()


# -- keys that only the database can refuse ----------------------------------------------------------------------------


class Labelled(Before):
    __tablename__ = "labelled"
    id: Mapped[str] = mapped_column(Enum("a", "b", "gone", name="letters"), primary_key=True)
    content: Mapped[str]


@pytest.fixture
def labelled(postgres_engine: Engine) -> Iterator[App]:
    with postgres_engine.begin() as connection:
        connection.execute(text("CREATE TYPE letters AS ENUM ('a', 'b')"))
        connection.execute(text("CREATE TABLE labelled (id letters PRIMARY KEY, content varchar)"))
    app = make_app(postgres_engine, Labelled, text="content")
    yield app
    app.memory.close()


def test_database_tells_which_keys_it_refuses(postgres_engine: Engine, labelled: App) -> None:
    """An enum whose labels are others than the model's: the caller's transaction goes on.

    The same kind: a domain, an address, a type of an extension.
    """
    labelled.memory.relay(postgres_engine).drain()
    announce(postgres_engine, "labelled", '["gone"]', '["other"]', "[5]")
    with labelled.session() as session:
        session.add_all([Labelled(id="a", content="one"), Labelled(id="b", content="two")])
        session.flush()
        hits = labelled.memory.search(session, "one", Labelled)
        assert ([hit.fact.id for hit in hits], hits.complete) == (["a", "b"], False)
        session.commit()
    labelled.memory.relay(postgres_engine).drain()
    assert labelled.memory.status(postgres_engine)["memory"].parked == 3
    assert labelled.memory.verify(postgres_engine).clean


def test_key_is_a_json_array_and_nothing_else() -> None:
    """The short form of a number is a JSON array as well."""
    assert decode_key("[7]") == (7,)
    for text_ in ('"7"', "x7y", '{"a": 7}', '"ab"', "7"):
        assert decoded(text_) is None
