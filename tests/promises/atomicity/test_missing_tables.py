"""A database without our tables: one sentence says what to do, whichever call meets it first."""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module
from typing import Any, Literal

import pytest
from sqlalchemy import Engine, text
from sqlalchemy.exc import DBAPIError
from sqlalchemy.orm import Session, sessionmaker

from memstate_sa import Memory
from memstate_sa.errors import MemstateError
from memstate_sa.indexes import InMemoryIndex
from memstate_sa.testing import HashEmbedder
from tests.support import Base, Tag

pytestmark = pytest.mark.sa20
MESSAGE = r"The table memstate_\w+ is not in this database\. Create .*memory\.create_tables\(engine\).*memstate-sa init"


def commit(memory: Memory, session: Session) -> None:
    session.add(Tag(name="a", meaning="b"))
    session.commit()


IN_A_SESSION: dict[str, Callable[[Memory, Session], Any]] = {
    "commit": commit,
    "search": lambda memory, session: memory.search(session, "x", Tag),
    "history": lambda memory, session: memory.history(session, Tag),
    "rollback": lambda memory, session: memory.rollback(session),
    "revoke": lambda memory, session: memory.revoke(session, actor="a"),
    "erase": lambda memory, session: memory.erase(session, Tag, "a"),
    "as_of": lambda memory, session: memory.as_of(session, Tag, "a", "x"),
    "diff": lambda memory, session: memory.diff(session, "x"),
}
ON_AN_ENGINE: dict[str, Callable[[Memory, Engine], Any]] = {
    "relay": lambda memory, engine: memory.relay(engine).run_once(),
    "drain": lambda memory, engine: memory.relay(engine).drain(),
    "status": lambda memory, engine: memory.status(engine),
    "backfill": lambda memory, engine: memory.backfill(engine),
    "wait": lambda memory, engine: memory.wait("a", engine=engine),
    "purge": lambda memory, engine: memory.purge(engine),
    "dead": lambda memory, engine: memory.relay(engine).dead(),
}


@pytest.mark.parametrize("capture", ["session", "trigger"])
@pytest.mark.parametrize("call", [*IN_A_SESSION, *ON_AN_ENGINE])
def test_call_without_our_tables_says_what_to_do(
    engine: Engine, call: str, capture: Literal["session", "trigger"]
) -> None:
    """The same kind: an AsyncSession, the tables of the checkpointer and the store, a single missing table."""
    Base.metadata.create_all(engine)
    memory = Memory(InMemoryIndex(), embedder=HashEmbedder())
    memory.track(Tag, text="meaning", capture=capture)
    if call in IN_A_SESSION:
        sessions = sessionmaker(engine)
        memory.attach(sessions)
        with sessions() as session, pytest.raises(MemstateError, match=MESSAGE) as raised:
            IN_A_SESSION[call](memory, session)
    else:
        with pytest.raises(MemstateError, match=MESSAGE) as raised:
            ON_AN_ENGINE[call](memory, engine)
    assert isinstance(raised.value.__cause__, Exception)
    memory.close()


def test_column_of_another_version_is_reported(engine: Engine) -> None:
    """The database's version is newer or older than the program's."""
    Base.metadata.create_all(engine)
    memory = Memory(InMemoryIndex(), embedder=HashEmbedder())
    memory.track(Tag, text="meaning")
    memory.create_tables(engine)
    with engine.begin() as connection:
        connection.execute(text("ALTER TABLE memstate_index RENAME COLUMN paused TO stopped"))
    with pytest.raises(MemstateError, match=r"The table memstate_index .* of another version"):
        memory.status(engine)
    memory.close()


def test_missing_application_table_keeps_the_drivers_error(engine: Engine) -> None:
    """This holds even if the table's name has our prefix."""
    memory = Memory(InMemoryIndex(), embedder=HashEmbedder())
    memory.track(Tag, text="meaning")
    memory.create_tables(engine)
    with pytest.raises(DBAPIError) as raised, engine.connect() as connection:
        connection.execute(text("SELECT * FROM memstate_of_mine"))
    assert not isinstance(raised.value, MemstateError)
    with pytest.raises(DBAPIError), engine.connect() as connection:
        connection.execute(text("SELECT * FROM tag"))
    memory.close()


def test_checkpointer_without_its_tables_says_what_to_do(engine: Engine) -> None:
    pytest.importorskip("langgraph.graph")
    langgraph = import_module("memstate_sa.integrations.langgraph.checkpointer")
    for where in (engine.url.render_as_string(hide_password=False), engine):
        with (
            langgraph.MemStateCheckpointer(where) as checkpointer,
            pytest.raises(MemstateError, match=r"is not in this database.*setup\(\)"),
        ):
            checkpointer.get_tuple({"configurable": {"thread_id": "1"}})
