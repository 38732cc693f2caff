"""A search with criteria finds the rows that SQL selects, for all types, and for columns that the database changes."""

from __future__ import annotations

import enum
import sqlite3
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import Engine, Integer, String, insert, select, text
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column

from memstate_sa import Fact, MemoryStore
from memstate_sa.indexes import InMemoryIndex, VectorIndex
from memstate_sa.testing import HashEmbedder
from tests.support.apps import make_app
from tests.support.criteria import Everything, OddRole, OldRole, Rank, Role, Words, assert_agrees_with_sql


@pytest.fixture(params=["memory", "faiss", "qdrant"])
def index(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[VectorIndex]:
    if request.param == "memory":
        yield InMemoryIndex()
    elif request.param == "faiss":
        pytest.importorskip("faiss")
        from memstate_sa.indexes import FaissIndex

        yield FaissIndex(tmp_path / "faiss")
    else:
        client = pytest.importorskip("qdrant_client").QdrantClient(":memory:")
        from memstate_sa.indexes import QdrantIndex

        yield QdrantIndex(client, "everything")
        client.close()


@pytest.mark.deep_on("qdrant")
def test_criteria_by_any_type_find_what_sql_finds(engine: Engine, index: VectorIndex) -> None:
    """This covers each type with a bind processor, and each subclass of str, int and float.

    The same kind: a Flag, a NewType, a parameter with its own type, an ORM comparator, a value in a list.

    The tests of the other indexes are in tests/adapters/indexes.
    """
    numbers = [Everything.whole.in_([True])] if engine.dialect.name == "sqlite" else []
    assert_agrees_with_sql(engine, index, numbers)


def test_criteria_by_an_adapted_value_find_what_the_driver_sends(sqlite_engine: Engine) -> None:
    """An application may register an adapter for a class with its driver. On PostgreSQL a dumper does this."""
    sqlite3.register_adapter(OddRole, lambda _: "note")
    try:
        assert_agrees_with_sql(sqlite_engine, InMemoryIndex())
    finally:
        sqlite3.adapters.pop((OddRole, sqlite3.PrepareProtocol))


# -- facts that the model does not show --------------------------------------------------------------------------------


class Base(DeclarativeBase):
    pass


class Named(Base):
    __tablename__ = "named"
    id: Mapped[int] = mapped_column(primary_key=True)
    content: Mapped[str]
    name: Mapped[str] = mapped_column(String(10))
    number: Mapped[int] = mapped_column(Integer)


_SQLITE = {
    "a collation": "name VARCHAR COLLATE NOCASE, number INTEGER",
    "a quoted collation": 'name VARCHAR collate "nocase", number INTEGER',
    "a trimming collation": "name VARCHAR COLLATE RTRIM, number INTEGER",
    "numbers": "name INTEGER, number INTEGER",
    "texts": "name VARCHAR, number TEXT",
}
_POSTGRESQL = {
    "a padded text": "name CHAR(10), number INTEGER",
    "a domain": "name folded, number INTEGER",
    "numbers": "name VARCHAR, number NUMERIC(5, 2)",
}


@pytest.mark.parametrize(
    ("database", "columns"),
    [("sqlite", columns) for columns in _SQLITE.values()] + [("postgres", columns) for columns in _POSTGRESQL.values()],
    ids=[*_SQLITE, *_POSTGRESQL],
)
def test_columns_that_are_stored_otherwise_are_compared_by_sql(
    request: pytest.FixtureRequest, database: str, columns: str
) -> None:
    """The model says String and Integer. The table has a collation, or another type.

    The same kind: CITEXT, a view, a partition, a column that a migration changed while a process runs.
    """
    engine: Engine = request.getfixturevalue(f"{database}_engine")
    with engine.begin() as connection:
        if "folded" in columns:
            connection.execute(text("CREATE DOMAIN folded AS CHAR(10)"))
        connection.execute(text(f"CREATE TABLE named (id INTEGER PRIMARY KEY, content VARCHAR, {columns})"))
    app = make_app(engine, Named, text="content", metadata=("name", "number"))
    with app.session() as session:
        names = ["7", "007"] if columns.startswith("name INTEGER") else ["Tip", "tip", "tip "]
        rows = [{"id": n, "content": f"c{n}", "name": name, "number": 7} for n, name in enumerate(names, start=1)]
        session.execute(insert(Named), rows)
        session.commit()
        app.memory.relay(engine).drain()
        for criterion in (*(Named.name == name for name in names), Named.name.in_(names[:1]), Named.number == 7):
            hits = app.memory.search(session, "c1", select(Named).where(criterion))
            assert sorted(hit.fact.id for hit in hits) == sorted(session.scalars(select(Named.id).where(criterion)))
            assert hits.complete
    app.memory.close()


# -- the ready-made store ---------------------------------------------------------------------------------------------


class Plain(enum.Enum):
    TIP = "tip"


@pytest.mark.parametrize("kind", [Role.TIP, OldRole.TIP, Words("tip")], ids=["StrEnum", "str and Enum", "str"])
def test_store_takes_enums_wherever_it_takes_text(engine: Engine, kind: Any) -> None:
    """An enum may be a type, a filter, a session, or part of a payload.

    The same kind: np.str_, IntEnum, a date in a payload, a str subclass with its own __str__.
    """
    with MemoryStore(engine, InMemoryIndex(), embedder=HashEmbedder(), background=False) as store:
        id_ = store.commit(Fact(type=kind, payload={"kind": kind, "rank": Rank.LOW, "text": "one"}), session_id=kind)
        store.memory.relay(engine).drain()
        asked: list[Callable[[], Any]] = [
            lambda: store.query(type=kind),
            lambda: store.query(filters={"kind": kind, "rank": Rank.LOW}),
            lambda: store.query("tip", {"kind": "tip", "rank": 1}, "tip"),
            lambda: store.query(filters={"kind": Plain.TIP}),
            lambda: [hit.fact for hit in store.search("one", type=kind, session_id=kind)],
            lambda: [hit.fact for hit in store.search("one", filters={"kind": kind, "rank": Rank.LOW})],
        ]
        assert [[fact.id for fact in ask()] for ask in asked] == [[id_]] * len(asked)
