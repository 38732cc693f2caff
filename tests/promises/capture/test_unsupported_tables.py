"""Tables that cannot be tracked where they are: `create_tables` refuses them before it writes, `doctor` names them."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any, Literal

import pytest
from sqlalchemy import Engine, create_engine, event, inspect, text
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column

from memstate_sa import Memory, MemstateError
from memstate_sa.indexes import InMemoryIndex
from memstate_sa.testing import HashEmbedder

pytestmark = pytest.mark.sa20

Capture = Literal["session", "trigger"]
both_ways = pytest.mark.parametrize("capture", ["session", "trigger"])


def memory_of(capture: Capture, schema: str | None = None) -> Memory:
    """A Memory that tracks the table "note" in *schema*."""

    class Base(DeclarativeBase):
        pass

    class Note(Base):
        __tablename__ = "note"
        __table_args__ = {"schema": schema}  # noqa: RUF012  # as SQLAlchemy's documentation writes it
        id: Mapped[int] = mapped_column(primary_key=True)
        text: Mapped[str]

    memory = Memory(InMemoryIndex(), embedder=HashEmbedder())
    memory.track(Note, text="text", capture=capture)
    return memory


def execute(engine: Engine, *statements: str) -> None:
    with engine.begin() as connection:
        for statement in statements:
            connection.execute(text(statement))


def assert_refused(memory: Memory, engine: Engine, name: str, reason: str) -> None:
    with pytest.raises(MemstateError, match=re.escape(f"Cannot track {name}: it {reason}")):
        memory.create_tables(engine)
    assert not inspect(engine).has_table("memstate_log")
    assert any(subject == name and message.startswith(reason) for subject, message in memory.doctor(engine).problems)


@both_ways
@pytest.mark.parametrize("kind", ["VIEW", "MATERIALIZED VIEW"])
def test_a_view_is_refused(engine: Engine, capture: Capture, kind: str) -> None:
    if engine.dialect.name == "sqlite" and kind != "VIEW":
        pytest.skip("SQLite does not have this kind")
    execute(engine, "CREATE TABLE entry (id INTEGER PRIMARY KEY, text TEXT)")
    execute(engine, f"CREATE {kind} note AS SELECT id, text FROM entry")
    try:
        assert_refused(memory_of(capture), engine, "note", "is a view")
    finally:
        execute(engine, f"DROP {kind} note", "DROP TABLE entry")


@both_ways
@pytest.mark.parametrize("schema", ["attached", "temp"])
def test_a_table_of_an_attached_database_is_refused(tmp_path: Path, capture: Capture, schema: str) -> None:
    engine = create_engine(f"sqlite:///{tmp_path / 'main.db'}")

    @event.listens_for(engine, "connect")
    def attach(connection: Any, _: Any) -> None:
        connection.execute(f"ATTACH DATABASE '{tmp_path / 'other.db'}' AS attached")
        connection.execute("CREATE TEMP TABLE note (id INTEGER PRIMARY KEY, text TEXT)")

    execute(engine, "CREATE TABLE attached.note (id INTEGER PRIMARY KEY, text TEXT)")
    assert_refused(memory_of(capture, schema), engine, f"{schema}.note", "is in an attached database")
    engine.dispose()


@both_ways
def test_a_table_may_name_the_schema_that_it_is_in_anyway(engine: Engine, capture: Capture) -> None:
    """ "main" and "public" are the log's schemas."""
    schema = {"sqlite": "main", "postgresql": "public"}[engine.dialect.name]
    execute(engine, "CREATE TABLE note (id INTEGER PRIMARY KEY, text VARCHAR NOT NULL)")
    memory = memory_of(capture, schema)
    memory.create_tables(engine)
    assert not [subject for subject, _ in memory.doctor(engine).problems if subject.endswith("note")]


@both_ways
def test_an_engine_with_a_schema_translate_map_is_refused(engine: Engine, capture: Capture) -> None:
    """It is refused before anything is written. The message names a way out."""
    execute(engine, "CREATE TABLE note (id INTEGER PRIMARY KEY, text VARCHAR NOT NULL)")
    translated = engine.execution_options(schema_translate_map={None: "tenant"})
    with pytest.raises(MemstateError, match=r"Cannot use schema_translate_map.*search_path"):
        memory_of(capture).create_tables(translated)
    assert not inspect(engine).has_table("memstate_log")
