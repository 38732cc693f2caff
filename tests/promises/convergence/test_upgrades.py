"""Data of an older version: rows in old shapes, and a database whose tables had other names."""

from __future__ import annotations

from typing import Any, Literal

import pytest
from sqlalchemy import JSON, Boolean, Column, Engine, Integer, String, Table, TypeDecorator, inspect, select, text
from sqlalchemy.orm import DeclarativeBase

from memstate_sa import Memory
from memstate_sa.db.tables import trigger_context
from memstate_sa.indexes import InMemoryIndex
from memstate_sa.testing import HashEmbedder
from tests.adapters.alembic.application import contents, routines
from tests.support import Person, Tag, World
from tests.support.apps import make_app
from tests.support.older import NEW, OLD, make_older, migrate
from tests.support.roles import Role, role, values  # noqa: F401  # a fixture

pytestmark = pytest.mark.sa20


class Money(TypeDecorator[int]):
    """An amount in whole coins, stored as a hundred times the number."""

    impl = Integer
    cache_ok = True

    def process_bind_param(self, value: int | None, dialect: Any) -> int | None:
        return None if value is None else value * 100

    def process_result_value(self, value: int | None, dialect: Any) -> int | None:
        return None if value is None else value // 100


class YesNo(TypeDecorator[bool]):
    """A truth value, stored as a letter."""

    impl = String(1)
    cache_ok = True

    def process_bind_param(self, value: bool | None, dialect: Any) -> str | None:
        return None if value is None else "Y" if value else "N"

    def process_result_value(self, value: str | None, dialect: Any) -> bool | None:
        return None if value is None else value == "Y"


class Not(TypeDecorator[bool]):
    """A truth value, stored as its opposite."""

    impl = Boolean(create_constraint=False)
    cache_ok = True

    def process_bind_param(self, value: bool | None, dialect: Any) -> bool | None:
        return None if value is None else not value

    process_result_value = process_bind_param


WAS = (
    Column("count", Integer),
    Column("word", String(9)),
    Column("flag", Boolean(create_constraint=False)),
    Column("data", JSON),
)
IS = (Column("price", Money), Column("other", JSON), Column("yes", YesNo), Column("closed", Not))


def thing(*columns: Column[Any]) -> Any:
    """A mapped class of the table "thing" with *columns*."""

    class Base(DeclarativeBase):
        pass

    class Thing(Base):
        __table__ = Table(
            "thing", Base.metadata, Column("id", Integer, primary_key=True), *(c._copy() for c in columns)
        )

    return Thing


def upgraded(engine: Engine, was: list[dict[str, Any]], upgrade: Any, *, before: Any = WAS, after: Any = IS) -> Any:
    """The rows of the old shape as history shows them in the new one. Undo must write the same."""
    old = thing(*before)
    app = make_app(engine, old, text=None, entity="thing")
    with app.session() as session:
        session.add_all(old(**values) for values in was)
        session.commit()
        for values in was:
            session.delete(session.get(old, values["id"]))
        session.commit()
    app.memory.close()
    old.metadata.drop_all(engine)
    new = thing(*after)
    app = make_app(engine, new, text=None, entity="thing", version=2, upgrade={1: upgrade})
    names = [column.name for column in after]
    with app.session() as session:
        shown = {
            c.key: {n: c.after.get(n) for n in names} for c in app.memory.history(session, new) if c.after is not None
        }
        app.memory.rollback(session)
        session.commit()
        there = session.execute(select(new.__table__)).mappings()
        assert {row["id"]: {name: row[name] for name in names} for row in there} == shown
    app.memory.close()
    return shown


def test_upgrade_makes_values_as_the_orm_takes_them(engine: Engine) -> None:
    """This holds for any other values in the row. (Python shares small numbers, short texts and truth values.)"""
    was = [
        {"id": 4, "count": 5, "word": "Y", "flag": True, "data": 5},
        {"id": 5, "count": 6, "word": "", "flag": False, "data": "x"},
    ]
    made = {"price": 5, "other": "x", "yes": True, "closed": True}
    assert upgraded(engine, was, lambda row: {"id": row["id"], **made}) == {4: made, 5: made}


def test_stored_values_stay_the_drivers_under_any_name(engine: Engine) -> None:
    """Columns are kept, renamed, swapped, or moved. An equal value that was computed is not a stored value."""

    def upgrade(row: dict[str, Any]) -> dict[str, Any]:
        return {
            "id": row["id"], "price": row["cost"], "cost": row["price"], "other": row["data"], "yes": row["yes"],
            "closed": row["closed"], "count": row["count"], "more": int(row["count"]),
        }  # fmt: skip

    before = (*IS, Column("data", JSON), Column("cost", Money), Column("count", Integer))
    after = (*IS, Column("cost", Money), Column("count", Money), Column("more", Money))
    was = {"price": 1, "cost": 2, "data": "text", "yes": True, "closed": True, "count": 3}
    is_ = {"price": 2, "cost": 1, "other": "text", "yes": True, "closed": True, "count": 0, "more": 3}
    assert upgraded(engine, [{"id": 1, **was}], upgrade, before=before, after=after) == {1: is_}


def test_none_is_null(engine: Engine) -> None:
    """A JSON column would otherwise turn None into 'null'."""
    upgraded(engine, [{"id": 1}, {"id": 2, "word": "w"}], lambda row: {"id": row["id"], "price": 1, "other": None})
    with engine.connect() as connection:
        assert connection.execute(text("SELECT id FROM thing WHERE other IS NULL ORDER BY id")).scalars().all() == [
            1,
            2,
        ]


# -- a database of an earlier version ----------------------------------------------------------------------------------


def open_with_create_tables(world: World) -> None:
    world.memory.create_tables(world.engine)


def open_with_another_memory(world: World) -> None:
    """Open the database with a Memory that tracks nothing. The triggers belong to another service's classes."""
    memory = Memory(InMemoryIndex(), embedder=HashEmbedder())
    memory.create_tables(world.engine)
    memory.close()


def open_with_our_migrations(world: World) -> None:
    migrate(world.engine, "stamp", "memstate_0006")
    migrate(world.engine, "upgrade", "head")


WAYS = [open_with_create_tables, open_with_another_memory, open_with_our_migrations]


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("capture", ["session", "trigger"])
def test_database_of_the_version_before_opens_and_goes_on(
    engine: Engine, capture: Literal["session", "trigger"], way: Any
) -> None:
    """The table is renamed with its rows, and every trigger equals a new one."""
    world = World(engine, capture=capture)
    with world.session() as session:
        session.add(Tag(name="a", meaning="one"))
        session.commit()
    before = (contents(engine, ours=True), routines(engine))
    make_older(engine)
    with engine.begin() as connection:
        connection.execute(text(f"INSERT INTO {OLD} (name, value) VALUES ('left', 'here')"))
    way(world)
    with engine.begin() as connection:
        assert connection.execute(text(f"SELECT name, value FROM {NEW}")).all() == [("left", "here")]
        connection.execute(text(f"DELETE FROM {NEW}"))
    after = (contents(engine, ours=True), routines(engine))
    after[0].pop("memstate_version", None)
    assert after == before
    assert world.memory.doctor(engine).healthy

    with world.session() as session:
        world.memory.annotate(session, actor="ada")
        session.get_one(Tag, "a").meaning = "two"
        session.add(Person(id=1, name="p", about="new"))
        session.commit()
        actors = [change.actor for change in world.memory.history(session, Tag, "a")]
        assert actors == [None, "ada"]
        world.memory.rollback(session)
        session.commit()
        assert session.get_one(Tag, "a").meaning == "one" and session.get(Person, 1) is None
    if capture == "trigger":
        with engine.begin() as connection:
            connection.execute(text("UPDATE tag SET meaning = 'three'"))
    world.assert_in_step()
    world.memory.close()


@pytest.mark.deep_on("sqlite")
def test_create_tables_drops_the_old_table_beside_the_new_one(engine: Engine) -> None:
    """A process of the older version has created it again."""
    world = World(engine, capture="trigger")
    before = (contents(engine, ours=True), routines(engine))
    make_older(engine)
    trigger_context.create(engine)
    world.memory.create_tables(engine)
    assert OLD not in inspect(engine).get_table_names()
    assert (contents(engine, ours=True), routines(engine)) == before
    world.memory.close()


def test_renamed_table_keeps_its_rights(postgres_engine: Engine, role: Role) -> None:  # noqa: F811
    """The functions keep theirs too: PUBLIC may not execute them."""
    world = World(postgres_engine, capture="trigger")
    make_older(postgres_engine)
    app = role(f"SELECT, INSERT, DELETE ON {OLD}")
    world.memory.create_tables(postgres_engine)
    assert values(app, f"SELECT has_table_privilege('{NEW}', 'INSERT')") == [True]
    closed = "SELECT bool_and(NOT has_function_privilege('public', oid, 'EXECUTE')) FROM pg_proc WHERE proname LIKE "
    assert values(postgres_engine, closed + "'memstate\\_%'") == [True]
    world.memory.close()
