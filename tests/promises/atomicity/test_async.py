"""AsyncSession: captured by the same listeners, without any effect on other Sessions."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from datetime import UTC, datetime
from inspect import iscoroutinefunction
from typing import Any

import pytest
from sqlalchemy import Engine, create_engine, event, insert, inspect, select, text, update
from sqlalchemy.ext.asyncio import (
    AsyncEngine,
    AsyncSession,
    async_scoped_session,
    async_sessionmaker,
    create_async_engine,
)
from sqlalchemy.orm import Session

from memstate_sa import MemstateError, UntrackedWrite
from memstate_sa.db import engines, sqlite
from tests.support import Note, Person, Tag, World

pytestmark = pytest.mark.sa20


@pytest.fixture
async def async_engine(engine: Engine) -> AsyncIterator[AsyncEngine]:
    url = engine.url.set(drivername="sqlite+aiosqlite") if engine.dialect.name == "sqlite" else engine.url
    made = create_async_engine(url)
    if engine.dialect.name == "sqlite":
        sqlite.configure(made)
    yield made
    await made.dispose()


@pytest.fixture
def sessions(world: World, async_engine: AsyncEngine) -> async_sessionmaker[AsyncSession]:
    maker = async_sessionmaker(async_engine, expire_on_commit=False)
    world.memory.attach(maker)
    world.memory.attach(maker)
    return maker


async def test_blocking_call_with_an_async_session_names_the_async_method(
    world: World, sessions: async_sessionmaker[AsyncSession]
) -> None:
    """The error names the async method, which then works. With a Session it names the blocking method."""
    memory = world.memory
    async with sessions() as session:
        session.add(Person(id=1, name="p", about="green tea"))
        await session.commit()
        calls: list[tuple[Any, ...]] = [
            (memory.history, Person, 1),
            (memory.as_of, Person, 1, memory.token(session)),
            (memory.diff, datetime(2020, 1, 1, tzinfo=UTC)),
            (memory.search, "tea", Person),
            (memory.rollback,),
            (memory.revoke,),
            (memory.erase, Person, 1),
        ]
        for method, *arguments in calls:
            options = {"actor": "ann"} if method == memory.revoke else {}
            name = method.__name__
            with pytest.raises(MemstateError, match=rf"this call blocks\. Use `await memory\.a{name}\("):
                method(session, *arguments, **options)
            awaited = getattr(memory, f"a{name}")
            with pytest.raises(MemstateError, match=rf"for an AsyncSession\. Use `memory\.{name}\("):
                await awaited(session.sync_session, *arguments, **options)
            assert await awaited(session, *arguments, **options), name
            assert iscoroutinefunction(awaited)
            assert awaited.__doc__.startswith(f"`{name}` for an AsyncSession.")


async def test_sync_engine_uses_the_applications_own_engine(world: World, async_engine: AsyncEngine) -> None:
    """It has settings that the URL lacks. An engine that was derived is closed with the memory."""
    own = create_engine(world.engine.url)
    assert world.memory.sync_engine(async_engine, use=own) is own
    assert world.memory.sync_engine(async_engine) is own
    other = World(world.engine)
    derived = other.memory.sync_engine(async_engine)
    with derived.connect():
        pass
    pool = derived.pool
    other.memory.close()
    assert derived.pool is not pool, "dispose() replaces the pool"
    own.dispose()


async def test_async_session_is_captured_searched_and_undone(
    world: World, sessions: async_sessionmaker[AsyncSession]
) -> None:
    """The whole cycle, on aiosqlite and on psycopg's async driver."""
    async with sessions() as session:
        world.memory.annotate(session, actor="ada")
        session.add(Person(name="p", about="green tea", notes=[Note(topic="t", number=1, content="x")]))
        session.add(Person(name="q", about="snow"))
        await session.commit()
        hits = await world.memory.asearch(session, "green tea", Person, limit=1)
        assert [hit.fact.about for hit in hits] == ["green tea"]
        await session.execute(update(Person).where(Person.name == "q").values(about="green bicycle"))
        await session.execute(insert(Tag), [{"name": "t", "meaning": "m"}])
        await session.commit()
        await asyncio.to_thread(world.relay.drain)
        hits = await world.memory.asearch(session, "bicycle", select(Person).where(Person.name == "q"))
        assert [hit.fact.about for hit in hits] == ["green bicycle"] and hits.complete
        changes = await session.run_sync(lambda sync: world.memory.history(sync, Person))
        assert [(c.op, c.actor) for c in changes] == [("insert", "ada"), ("insert", "ada"), ("update", None)]
        await session.run_sync(lambda sync: world.memory.rollback(sync))
        await session.commit()
        assert (await session.scalars(select(Person.about).order_by(Person.id))).all() == ["green tea", "snow"]
    await asyncio.to_thread(world.assert_in_step)


async def test_a_collection_forgets_a_fact_that_an_undo_took_back(
    world: World, sessions: async_sessionmaker[AsyncSession]
) -> None:
    async with sessions() as session:
        persons = [Person(id=n, name=f"p{n}") for n in (1, 2)]
        session.add_all(persons)
        await session.commit()
        for person in persons:
            await session.refresh(person, ["notes"])
        persons[0].notes.append(Note(topic="tea", number=1, content="green"))
        await session.commit()
        await session.run_sync(world.memory.rollback)
        await session.commit()
        assert persons[1].notes == [], "the undo did not touch it, so it needs no refresh"
        assert "notes" not in inspect(persons[0]).dict
        await session.refresh(persons[0], ["notes"])
        assert persons[0].notes == []


async def test_async_search_finds_the_past(world: World, sessions: async_sessionmaker[AsyncSession]) -> None:
    """It uses another connection of the same driver, beside the Session's."""
    async with sessions() as session:
        session.add(Person(id=1, name="p", about="green tea"))
        await session.commit()
        then = world.memory.token(session)
        (await session.get_one(Person, 1)).about = "coffee"
        await session.flush()
        hits = await world.memory.asearch(session, "tea", Person, as_of=then)
        assert [hit.fact.about for hit in hits] == ["green tea"]


async def test_an_async_scoped_session_is_used_as_it_is(world: World, async_engine: AsyncEngine) -> None:
    scoped = async_scoped_session(async_sessionmaker(async_engine), scopefunc=asyncio.current_task)
    world.memory.attach(scoped)
    world.memory.annotate(scoped, actor="ann")
    scoped.add(Person(id=1, name="p", about="green tea"))
    hits = await world.memory.asearch(scoped, "tea", Person)
    assert [hit.fact.about for hit in hits] == ["green tea"]
    await scoped.commit()
    assert world.memory.token(scoped)
    with pytest.raises(MemstateError, match=r"this call blocks. Use `await memory.ahistory\("):
        world.memory.history(scoped, Person, 1)  # type: ignore[arg-type]
    assert [change.after for change in await world.memory.ahistory(scoped, Person, 1)] == [
        {"id": 1, "name": "p", "about": "green tea"}
    ]
    await scoped.remove()
    with world.session() as session:
        assert [change.actor for change in world.memory.history(session, Person, 1)] == ["ann"]
        with pytest.raises(MemstateError, match=r"Cannot use a Session: .* Use `memory.search\("):
            await world.memory.asearch(session, "tea", Person)  # type: ignore[arg-type]


def test_options_of_asyncpg_are_translated(postgres_engine: Engine) -> None:
    """PgBouncer needs these options, because no driver may prepare statements behind it."""
    options = {"prepared_statement_cache_size": "0", "ssl": "disable", "command_timeout": "5"}
    url = postgres_engine.url.set(drivername="postgresql+asyncpg").update_query_dict(options)
    engine = engines.blocking_engine(url)
    with engine.connect() as connection:
        assert connection.scalar(select(1)) == 1
        driver: Any = connection.connection.driver_connection
        assert driver.prepare_threshold is None
        assert driver.info.get_parameters()["sslmode"] == "disable"
    engine.dispose()


async def test_no_other_session_is_touched(world: World, sessions: async_sessionmaker[AsyncSession]) -> None:
    """By default an async_sessionmaker uses SQLAlchemy's own Session class, which must get no listeners."""
    assert not event.contains(Session, "after_flush", world.memory._capture.session_listeners["after_flush"])
    other = async_sessionmaker(sessions.kw["bind"])
    for plain in (Session(world.engine), other().sync_session):
        assert not world.memory._capture.is_attached(plain)
    with Session(world.engine) as session:
        session.add(Tag(name="unseen"))
        session.commit()
    with world.session() as session:
        assert world.memory.history(session, Tag) == []


async def test_refusals_reach_the_caller(world: World, sessions: async_sessionmaker[AsyncSession]) -> None:
    """An await raises UntrackedWrite, too."""
    async with sessions() as session:
        with pytest.raises(UntrackedWrite):
            await session.run_sync(lambda sync: sync.bulk_save_objects([Tag(name="x")]))


async def test_cancellation_leaves_nothing(world: World, sessions: async_sessionmaker[AsyncSession]) -> None:
    """A task is cancelled after a flush. Neither commit nor rollback fires, and all its work is gone."""
    flushed = asyncio.Event()

    async def work() -> None:
        async with sessions() as session:
            world.memory.annotate(session, actor="cancelled")
            session.add(Tag(name="t"))
            await session.flush()
            flushed.set()
            await asyncio.sleep(60)

    task = asyncio.create_task(work())
    await flushed.wait()
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    async with sessions() as session:
        session.add(Tag(name="u"))
        await session.commit()
        changes = await session.run_sync(lambda sync: world.memory.history(sync, Tag))
        assert [(c.key, c.actor) for c in changes] == [("u", None)]
    await asyncio.to_thread(world.assert_in_step)


async def test_the_event_loop_goes_on_during_a_search(world: World, sessions: async_sessionmaker[AsyncSession]) -> None:
    """The index and the embedder are called in threads."""
    import threading

    callers: list[Any] = []
    query = world.index.query

    def watched(*args: Any, **kwargs: Any) -> Any:
        callers.append(threading.current_thread())
        return query(*args, **kwargs)

    world.index.query = watched  # type: ignore[method-assign]
    async with sessions() as session:
        session.add(Person(name="p", about="green tea"))
        await session.commit()
        await world.memory.asearch(session, "green tea", Person)
    assert callers and threading.main_thread() not in callers


async def test_engine_arguments_take_an_async_engine(world: World, async_engine: AsyncEngine) -> None:
    """The relay is a thread, so it gets a sync engine for the same URL."""
    with world.session() as session:
        session.add(Person(name="p", about="green tea"))
        session.commit()
    memory = world.memory
    memory.create_tables(async_engine)
    with memory.relay(async_engine) as relay:
        await asyncio.to_thread(relay.drain)
    assert memory.verify(async_engine).clean
    assert memory.status(async_engine)["memory"].pending == 0
    memory.sync_engine(async_engine).dispose()


async def test_a_key_of_another_type_is_an_error_of_ours(postgres_engine: Engine) -> None:
    """asyncpg takes only values of the column's type. The transaction goes on."""
    pytest.importorskip("asyncpg")
    world = World(postgres_engine)
    engine = create_async_engine(postgres_engine.url.set(drivername="postgresql+asyncpg"))
    maker = async_sessionmaker(engine)
    world.memory.attach(maker)
    async with maker() as session:
        with pytest.raises(MemstateError, match=r"Cannot use key='1': the driver refused it for id of person\."):
            await world.memory.ahistory(session, Person, "1")
        assert await world.memory.ahistory(session, Person, 1) == []
    await engine.dispose()


@pytest.mark.parametrize("capture", ["session", "trigger"])
async def test_a_listener_labels_each_transaction(engine: Engine, async_engine: AsyncEngine, capture: Any) -> None:
    """The recipe of the pages about FastAPI, SQLModel, Flask and undo. Labels end with their transaction."""
    world = World(engine, capture=capture)
    maker = async_sessionmaker(async_engine, expire_on_commit=False)
    world.memory.attach(maker)

    def label(session: Session, *_: object) -> None:
        if "user" in session.info:
            world.memory.annotate(session, actor=session.info["user"])

    event.listen(Session, "after_begin", label)
    try:
        async with maker(info={"user": "ada"}) as session:
            for name in ("a", "b"):
                session.add(Tag(name=name))
                await session.commit()
            await session.rollback()
            await session.execute(insert(Tag), [{"name": "c"}])
            await session.commit()
            assert [change.actor for change in await world.memory.ahistory(session, Tag)] == ["ada"] * 3
        async with maker(info={"user": "ben"}) as session:
            await session.rollback()
            await session.commit()
            assert await world.memory.arollback(session, actor="ben") == []
    finally:
        event.remove(Session, "after_begin", label)
    await asyncio.to_thread(world.assert_in_step)


async def test_triggers_know_the_labels_of_an_async_session(engine: Engine, async_engine: AsyncEngine) -> None:
    """The labels are set on the connection that the AsyncSession writes on."""
    world = World(engine, capture="trigger")
    maker = async_sessionmaker(async_engine)
    world.memory.attach(maker)
    async with maker() as session:
        world.memory.annotate(session, actor="ada")
        await session.execute(text("INSERT INTO tag (name, meaning) VALUES ('a', 'x')"))
        session.add(Tag(name="b"))
        await session.commit()
        changes = await session.run_sync(lambda sync: world.memory.history(sync, Tag))
        assert [(change.key, change.actor) for change in changes] == [("a", "ada"), ("b", "ada")]
        assert world.memory.token(session) == changes[0].tx == changes[1].tx
    await asyncio.to_thread(world.assert_in_step)
