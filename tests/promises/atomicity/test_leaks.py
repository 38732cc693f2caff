"""Closed objects release their resources, and dropped objects are not kept."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Any, Literal

import pytest
from sqlalchemy import Engine, create_engine, event, insert, select
from sqlalchemy.ext.asyncio import AsyncSession, async_sessionmaker, create_async_engine
from sqlalchemy.orm import Session, sessionmaker

from memstate_sa import Fact, Memory, MemoryStore, sqlite
from memstate_sa.indexes import InMemoryIndex
from memstate_sa.testing import HashEmbedder
from tests.support import Base, Note, Person, Tag, World

pytestmark = pytest.mark.sa20


def listeners(target: Any, *names: str) -> int:
    return sum(len(list(getattr(target.dispatch, name))) for name in names)


def open_store(engine: Engine) -> weakref.ref[Any]:
    with MemoryStore(engine, InMemoryIndex(), embedder=HashEmbedder()) as store:
        store.commit(Fact(type="n", payload={"text": "x"}))
        store.search("x")
    return weakref.ref(store.memory)


def open_memory(engine: Engine, capture: Literal["session", "trigger"] = "session") -> weakref.ref[Any]:
    """Open a Memory on classes that stay, with its own relay, Session class and strict delivery."""
    memory = Memory(InMemoryIndex(), embedder=HashEmbedder(), delivery="strict")
    memory.track(Tag, text="meaning", capture=capture)
    sessions = sessionmaker(engine)
    memory.attach(sessions)
    memory.attach(shared)
    memory.create_tables(engine)
    with memory.relay(engine), sessions() as session:
        session.add(Tag(name="a", meaning="b"))
        session.flush()
        session.rollback()
    memory.close()
    return weakref.ref(memory)


class shared(Session):  # noqa: N801
    """A Session class that outlives the Memories."""


def open_triggers(engine: Engine) -> weakref.ref[Any]:
    return open_memory(engine, "trigger")


@pytest.mark.deep_on("open_store")
@pytest.mark.deep_on("open_memory")
@pytest.mark.deep_on("postgres")
@pytest.mark.parametrize("opened", [open_store, open_memory, open_triggers])
def test_closed_memory_is_collected(engine: Engine, opened: Callable[[Engine], weakref.ref[Any]]) -> None:
    """Engine, mapped classes and Session class stay, and the number of listeners does not grow.

    The same kind: everything that a Memory adds to foreign objects, and threads, hooks and registries that refer to it.
    """
    Base.metadata.create_all(engine)
    events = ("before_cursor_execute", "commit", "rollback", "rollback_savepoint", "engine_connect")
    opened(engine)
    before = listeners(engine, *events)
    found = []
    for _ in range(3):
        gc.collect()
        found.append(opened(engine))
    gc.collect()
    assert [each() for each in found] == [None] * 3
    assert listeners(engine, *events) == before
    assert listeners(shared(), "after_flush", "do_orm_execute") <= 2, "one for each event"


def test_closed_checkpointer_and_store_are_collected(engine: Engine) -> None:
    """The facts' Memory stays alive."""
    pytest.importorskip("langgraph.graph")
    langgraph = import_module("memstate_sa.integrations.langgraph.checkpointer")
    stores = import_module("memstate_sa.integrations.langgraph.store")
    if engine.dialect.name == "sqlite":
        sqlite.configure(engine)
    with MemoryStore(engine, InMemoryIndex(), embedder=HashEmbedder(), background=False) as facts:

        def opened() -> list[weakref.ref[Any]]:
            store = stores.MemStateStore(facts)
            store.setup()
            store.put(("a",), "b", {"c": "d"})
            with langgraph.MemStateCheckpointer(facts) as checkpointer:
                checkpointer.get_tuple({"configurable": {"thread_id": "1"}})
            return [weakref.ref(store), weakref.ref(checkpointer)]

        found = opened()
        gc.collect()
        assert [each() for each in found] == [None, None]


def add(session: Session) -> None:
    session.add(Tag(name="seen", meaning="x"))


def execute(session: Session) -> None:
    session.execute(insert(Tag).values(name="seen", meaning="x"))


def change(session: Session) -> None:
    session.get_one(Tag, "old").meaning = "seen"


@pytest.mark.parametrize("write", [add, execute, change])
@pytest.mark.parametrize("is_open", [False, True])
def test_closed_memory_captures_writes_of_attached_sessions(
    world: World, write: Callable[[Session], None], is_open: bool
) -> None:
    """No write is lost silently: the next use of an attached Session opens the Memory again.

    The same kind: an application that closes its Memory at shutdown or in a fixture, and goes on. Also a transaction
    that
    is open when the Memory is closed, and a service that starts again in the same process.
    """
    world.write(Tag(name="old", meaning="x"))
    with world.session() as session:
        if is_open:
            session.add(Tag(name="before", meaning="x"))
            session.flush()
        world.memory.close()
        write(session)
        session.commit()
    world.assert_in_step()
    with world.session() as session:
        keys = [change.key for change in world.memory.history(session, Tag)]
    assert keys == ["old", *["before"] * is_open, "old" if write is change else "seen"]


def test_closed_memories_do_not_capture_beside_a_later_one(engine: Engine) -> None:
    """Fixtures make Memories on one sessionmaker, one after the other. They are closed, but maybe not collected yet."""
    Base.metadata.create_all(engine)
    sessions, closed = sessionmaker(engine), []
    for number in range(3):
        memory = Memory(InMemoryIndex(), embedder=HashEmbedder())
        memory.track(Tag, text="meaning")
        memory.attach(sessions)
        memory.create_tables(engine)
        with sessions.begin() as session:
            session.add(Tag(name=f"open{number}", meaning="x"))
        memory.close()
        closed.append(memory)
    for number, write in enumerate((add, execute)):
        with sessions.begin() as session:
            write(session)
        with sessions() as session:
            assert [change.key for change in closed[0].history(session, Tag)] == [
                *("open0", "open1", "open2"), *["seen"] * (2 * number + 1)
            ]  # fmt: skip
        with sessions.begin() as session:
            session.delete(session.get_one(Tag, "seen"))


def read(session: Session) -> None:
    session.scalars(select(Person)).all()


def write(session: Session) -> None:
    session.add(Person(id=1, name="Ada", about="x"))
    session.flush()


def fail_in_another_listener(session: Session) -> None:
    """Fail in a listener that runs after ours. No other event shows that there will be no flush."""

    def refuse(*_: Any) -> None:
        raise ZeroDivisionError

    session.connection()
    event.listen(session, "before_flush", refuse)
    session.add(Person(id=1, name="Ada", about="x"))
    with pytest.raises(ZeroDivisionError):
        session.flush()


@pytest.mark.deep_on("postgres")
@pytest.mark.parametrize("capture", ["session", "trigger"])
@pytest.mark.parametrize("use", [read, write, fail_in_another_listener])
def test_dropped_session_gives_its_connection_back(
    engine: Engine, capture: Literal["session", "trigger"], use: Callable[[Session], None]
) -> None:
    """The connection returns at the garbage collector's first run, as without memstate_sa.

    The same kind: scoped_session, a Session in a failed flush, an AsyncSession, several Sessions on one connection.
    """
    world = World(engine, capture=capture)
    before = engine.pool.checkedout()  # type: ignore[attr-defined]
    for _ in range(3):
        session = world.session()
        use(session)
        reference = weakref.ref(session)
        del session
        gc.collect()
        assert reference() is None
        assert engine.pool.checkedout() == before  # type: ignore[attr-defined]
    world.memory.close()


async def test_dropped_async_session_is_collected(tmp_path: Path) -> None:
    url = f"{tmp_path / 'a.db'}"
    engine = sqlite.configure(create_async_engine(f"sqlite+aiosqlite:///{url}"))
    sync = sqlite.configure(create_engine(f"sqlite:///{url}"))
    Base.metadata.create_all(sync)
    memory = Memory(InMemoryIndex(), embedder=HashEmbedder())
    memory.track(Note, text="content")
    sessions = async_sessionmaker(engine)
    memory.attach(sessions)
    memory.create_tables(sync)
    session: AsyncSession = sessions()
    await session.scalars(select(Note))
    await session.close()
    reference = weakref.ref(session.sync_session)
    del session
    gc.collect()
    assert reference() is None
    memory.close()
    await engine.dispose()
    sync.dispose()
