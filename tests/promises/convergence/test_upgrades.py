"""Old shapes in today's: which values are the driver's, and which are as the ORM takes them."""

from __future__ import annotations

from typing import Any

import pytest
from sqlalchemy import JSON, Boolean, Column, Engine, Integer, String, Table, TypeDecorator, select, text
from sqlalchemy.orm import DeclarativeBase

from tests.support.apps import make_app

pytestmark = pytest.mark.sa20


class Money(TypeDecorator[int]):
    """Whole coins, stored as a hundred times as many."""

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
    """A class of today's shape: of what it was, and *columns*."""

    class Base(DeclarativeBase):
        pass

    class Thing(Base):
        __table__ = Table(
            "thing", Base.metadata, Column("id", Integer, primary_key=True), *(c._copy() for c in columns)
        )

    return Thing


def upgraded(engine: Engine, was: list[dict[str, Any]], upgrade: Any, *, before: Any = WAS, after: Any = IS) -> Any:
    """What history says that rows of the old shape are in the new one, and what an undo writes."""
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


def test_what_is_made_is_as_the_orm_takes_it(engine: Engine) -> None:
    """Whatever else the row holds: small numbers, short texts and truth values are one object wherever they are."""
    was = [
        {"id": 4, "count": 5, "word": "Y", "flag": True, "data": 5},
        {"id": 5, "count": 6, "word": "", "flag": False, "data": "x"},
    ]
    made = {"price": 5, "other": "x", "yes": True, "closed": True}
    assert upgraded(engine, was, lambda row: {"id": row["id"], **made}) == {4: made, 5: made}


def test_what_is_given_is_the_drivers_under_any_name(engine: Engine) -> None:
    """Kept, renamed, swapped, or put to another column; what only looks like it is not."""

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
    """Also of a JSON column, whose type would make 'null' of it."""
    upgraded(engine, [{"id": 1}, {"id": 2, "word": "w"}], lambda row: {"id": row["id"], "price": 1, "other": None})
    with engine.connect() as connection:
        assert connection.execute(text("SELECT id FROM thing WHERE other IS NULL ORDER BY id")).scalars().all() == [
            1,
            2,
        ]
