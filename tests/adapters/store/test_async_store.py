"""AsyncMemoryStore: the methods of MemoryStore in asyncio, its transactions, and cancellation."""

from __future__ import annotations

import asyncio
import inspect
import threading
from collections.abc import AsyncIterator, Awaitable, Callable
from contextvars import ContextVar
from pathlib import Path
from typing import Any

import pytest
from pydantic import BaseModel
from sqlalchemy import Engine, event, make_url

from memstate_sa import AsyncMemoryStore, ConflictError, Fact, Hit, MemoryStore, MemstateError, ValidationFailed
from memstate_sa.indexes import InMemoryIndex
from memstate_sa.testing import HashEmbedder
from tests.adapters.store.facts import contents, note, opened_async

pytestmark = pytest.mark.sa20


class Profile(BaseModel):
    user: str
    city: str | None = None


@pytest.fixture
async def store(engine: Engine) -> AsyncIterator[AsyncMemoryStore]:
    async with opened_async(engine) as made:
        yield made


@pytest.mark.parametrize("driver", ["sqlite+aiosqlite", "postgresql+asyncpg", "postgresql+psycopg_async"])
async def test_url_with_a_driver_for_asyncio_opens_the_same_database(
    driver: str, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    """The store takes a driver for threads. The options of asyncpg are translated."""
    pytest.importorskip(driver.partition("+")[2].removesuffix("_async"))
    url = make_url(f"sqlite:///{tmp_path / 'facts.db'}")
    if driver.startswith("postgresql"):
        url = request.getfixturevalue("postgres_engine").url
    with MemoryStore(url, background=False) as store:
        store.commit(note("Ada likes tea"))
    query = {"ssl": "disable"} if driver.endswith("asyncpg") else {}
    async with AsyncMemoryStore(url.set(drivername=driver).update_query_dict(query), background=False) as again:
        assert await all_contents(again) == ["Ada likes tea"]


async def test_url_of_an_in_memory_database_may_name_a_driver_for_asyncio() -> None:
    pytest.importorskip("aiosqlite")
    async with AsyncMemoryStore("sqlite+aiosqlite://", background=False) as store:
        await store.commit(note("Ada likes tea"))
        assert await all_contents(store) == ["Ada likes tea"]


async def all_contents(store: AsyncMemoryStore) -> list[str]:
    return await store.run_sync(contents)


def before_commit(store: MemoryStore, work: Callable[[], None]) -> None:
    """Do *work* when the transaction that is open now commits; its SAVEPOINTs do not count."""
    with store.transaction() as session:
        event.listen(session, "before_commit", lambda one: None if one.in_nested_transaction() else work())


class Latch:
    """A call that waits in its thread until the test lets it go on."""

    def __init__(self) -> None:
        self.entered = asyncio.Event()
        self.released = threading.Event()
        self._loop = asyncio.get_running_loop()

    def commit(self, store: MemoryStore, content: str) -> str:
        """Wait, then commit."""
        self.wait()
        return store.commit(note(content))

    def wait(self) -> None:
        self._loop.call_soon_threadsafe(self.entered.set)
        assert self.released.wait(30)

    async def time_out(self, call: Awaitable[Any]) -> None:
        """Await *call*, and time out when `commit` waits in its thread. The thread then goes on."""

        def expire(_: object) -> None:
            timeout.reschedule(0)
            self._loop.call_soon(self.released.set)

        entered = asyncio.ensure_future(self.entered.wait())
        entered.add_done_callback(expire)
        async with asyncio.timeout(None) as timeout:
            await call


# -- methods -----------------------------------------------------------------------------------------------------------


async def test_facts_are_committed_found_and_undone(store: AsyncMemoryStore) -> None:
    id_ = await store.commit(note("green tea"), actor="ada", session_id="s1")
    fact = await store.get(id_)
    assert fact is not None and fact.payload == {"content": "green tea"}
    hits = await store.search("green tea", limit=1)
    assert [hit.fact.id for hit in hits] == [id_] and isinstance(hits[0], Hit)
    await store.update(id_, {"payload": {"content": "black tea"}})
    assert [change.actor for change in await store.history(id_)] == ["ada", None]
    await store.rollback()
    assert await all_contents(store) == ["green tea"]
    await store.delete(id_)
    assert await store.query() == []
    assert [change.op for change in await store.diff((await store.history(id_))[0].tx)] == ["delete"]


async def test_every_public_method_is_there(store: AsyncMemoryStore) -> None:
    """With the parameters and the docstring of MemoryStore's. All but register_schema are awaited."""
    own = {"run_sync"}
    for name, method in inspect.getmembers(MemoryStore, inspect.isfunction):
        if name.startswith("_"):
            continue
        twin = getattr(AsyncMemoryStore, name)
        if name not in ("close", "transaction"):
            assert inspect.signature(twin) == inspect.signature(method)
            assert inspect.getdoc(twin) == inspect.getdoc(method)
            assert inspect.iscoroutinefunction(twin) == (name != "register_schema"), name
        own.add(name)
    public = {name for name, _ in inspect.getmembers(AsyncMemoryStore, inspect.isfunction) if not name.startswith("_")}
    assert public == own


async def test_errors_are_those_of_the_sync_store(store: AsyncMemoryStore) -> None:
    store.register_schema("profile", Profile, unique_by="user")
    with pytest.raises(ValidationFailed):
        await store.commit(Fact(type="profile", payload={"user": 7}))
    id_ = await store.commit_model(Profile(user="u1"))
    assert await store.commit_model(Profile(user="u1", city="Graz")) == id_
    await store.commit(Fact(id="a", type="note", payload={}))
    with pytest.raises(ConflictError):
        await store.commit(Fact(id="a", type="note", payload={}))


async def test_relay_delivers_in_the_background(engine: Engine) -> None:
    async with opened_async(engine, background=True) as store:
        assert store.relay.is_running
        id_ = await store.commit(note("green tea"))
        await store.wait(await store.token(id_))
        assert [hit.fact.id for hit in await store.search("green tea", consistency="eventual")] == [id_]
        assert (await store.status())["memory"].pending == 0
        assert (await store.verify()).clean and (await store.doctor()).healthy


async def test_calls_of_many_tasks_run_at_once(store: AsyncMemoryStore) -> None:
    ids = await asyncio.gather(*(store.commit(note(f"n{n}")) for n in range(20)))
    assert sorted(await all_contents(store)) == sorted(f"n{n}" for n in range(20))
    assert len(set(ids)) == 20


async def test_the_event_loop_goes_on_during_a_call(store: AsyncMemoryStore) -> None:
    latch = Latch()
    call = asyncio.create_task(store.run_sync(latch.commit, "tea"))
    await latch.entered.wait()
    latch.released.set()
    assert await store.get(await call) is not None


async def test_context_variables_reach_the_thread(store: AsyncMemoryStore) -> None:
    request: ContextVar[str] = ContextVar("request")
    request.set("r1")
    assert await store.run_sync(lambda _: request.get()) == "r1"
    async with store.transaction():
        assert await store.run_sync(lambda _: request.get()) == "r1"


async def test_langgraph_takes_the_async_store(engine: Engine) -> None:
    """Items are in the same log as facts, so the rollback of the store undoes them too."""
    pytest.importorskip("langgraph")
    from memstate_sa.integrations import langgraph

    async with opened_async(engine) as store:
        with langgraph.MemStateCheckpointer(store) as checkpointer:
            assert (checkpointer.memory, checkpointer.engine) == (store.memory, store.engine)
        items = langgraph.MemStateStore(store)
        await items.asetup()
        await items.aput(("notes",), "a", {"text": "green tea"})
        assert (await items.aget(("notes",), "a")).value == {"text": "green tea"}
        await store.rollback()
        assert await items.aget(("notes",), "a") is None


# -- opening and closing -----------------------------------------------------------------------------------------------


async def test_nothing_is_connected_before_the_first_call(tmp_path: Path) -> None:
    """A store at module level costs nothing, and needs no ``async with``."""
    file = tmp_path / "facts.db"
    store = AsyncMemoryStore(f"sqlite:///{file}", InMemoryIndex(), embedder=HashEmbedder())
    store.register_schema("profile", Profile)
    assert repr(store) == f"<AsyncMemoryStore [sqlite:///{file} | index: memory | relay: stopped]>"
    assert not file.exists()
    assert await store.query() == []
    assert repr(store) == f"<AsyncMemoryStore [sqlite:///{file} | index: memory | relay: running]>"
    await store.close()


async def test_a_database_that_was_away_is_tried_again(tmp_path: Path) -> None:
    store = opened_async(f"sqlite:///{tmp_path / 'later' / 'facts.db'}")
    with pytest.raises(MemstateError, match="Cannot open"):
        await store.query()
    (tmp_path / "later").mkdir()
    assert await store.query() == []
    await store.close()


async def test_async_with_raises_for_a_database_that_is_not_there(tmp_path: Path) -> None:
    store = opened_async(f"sqlite:///{tmp_path / 'nowhere' / 'facts.db'}")
    with pytest.raises(MemstateError, match="Cannot open"):
        async with store:
            pass
    with pytest.raises(MemstateError, match="closed"):
        await store.query()


async def test_close_waits_for_calls_under_way(engine: Engine) -> None:
    """Later calls raise MemstateError. Closing twice does no harm."""
    store, latch = opened_async(engine), Latch()
    call = asyncio.create_task(store.run_sync(latch.commit, "tea"))
    await latch.entered.wait()
    closing = asyncio.create_task(store.close())
    await asyncio.sleep(0)
    with pytest.raises(MemstateError, match="This AsyncMemoryStore is closed"):
        await store.query()
    assert await asyncio.wait([closing], timeout=0.2) == (set(), {closing})
    latch.released.set()
    await closing
    assert isinstance(await call, str)
    await store.close()
    with pytest.raises(MemstateError, match="closed"):
        async with store.transaction():
            pass


async def test_in_memory_store_delivers_after_each_commit() -> None:
    index = InMemoryIndex()
    async with opened_async("sqlite://", index, background=True) as store:
        await asyncio.gather(*(store.commit(note(f"n{n}")) for n in range(5)))
        assert len(index.scan(None, 9)) == 5
        async with store.transaction():
            await store.commit(note("last"))
            assert len(index.scan(None, 9)) == 5
        assert len(index.scan(None, 9)) == 6


# -- transactions ------------------------------------------------------------------------------------------------------


async def test_a_transaction_is_all_or_nothing(store: AsyncMemoryStore) -> None:
    """Its calls see each other, and commit together, with its labels."""
    old = await store.commit(note("old"))
    with pytest.raises(RuntimeError, match="late"):
        async with store.transaction():
            await store.delete(old)
            await store.commit(note("new"))
            assert await all_contents(store) == ["new"]
            raise RuntimeError("late")
    assert await all_contents(store) == ["old"]
    async with store.transaction(actor="ada", reason="test"):
        await store.delete(old)
        new = await store.commit(note("new"))
    assert await all_contents(store) == ["new"]
    [change] = await store.history(new)
    assert (change.actor, change.reason, change.tx) == ("ada", "test", await store.token(old))


async def test_a_block_inside_rolls_back_alone(store: AsyncMemoryStore) -> None:
    async with store.transaction():
        await store.commit(note("outer"))
        with pytest.raises(RuntimeError):
            async with store.transaction():
                await store.commit(note("inner"))
                raise RuntimeError
        async with store.transaction():
            await store.commit(note("second"))
    assert await all_contents(store) == ["outer", "second"]
    assert len({change.tx for change in await store.history()}) == 1


async def test_a_commit_that_fails_raises_at_the_end(store: AsyncMemoryStore) -> None:
    def refuse() -> None:
        raise ConflictError("refused at COMMIT")

    with pytest.raises(ConflictError, match="refused at COMMIT"):
        async with store.transaction():
            await store.commit(note("lost"))
            await store.run_sync(before_commit, refuse)
            await store.commit(note("lost, too"))
    assert await all_contents(store) == []


async def test_transactions_of_tasks_are_their_own(engine: Engine) -> None:
    """A transaction that fails rolls back only its own facts."""
    async with opened_async(engine) as store:

        async def work(n: int) -> None:
            try:
                async with store.transaction():
                    await store.commit(note(f"{n} a"))
                    await asyncio.sleep(0)
                    await store.commit(note(f"{n} b"))
                    assert {f"{n} a", f"{n} b"} <= set(await all_contents(store))
                    if n % 2:
                        raise KeyError
            except KeyError:
                pass

        await asyncio.gather(*map(work, range(6)))
        assert sorted(await all_contents(store)) == ["0 a", "0 b", "2 a", "2 b", "4 a", "4 b"]


async def test_a_task_created_inside_is_refused(store: AsyncMemoryStore) -> None:
    """It would be told that its fact is committed, though the block might still roll back."""
    async with store.transaction():
        await store.commit(note("kept"))
        for call in (store.commit(note("other")), store.query()):
            with pytest.raises(MemstateError, match="Cannot use a transaction of another task"):
                await asyncio.create_task(call)
    assert await all_contents(store) == ["kept"]


async def test_a_task_that_outlives_the_block_has_its_own_transaction(store: AsyncMemoryStore) -> None:
    ended = asyncio.Event()

    async def later() -> str:
        await ended.wait()
        return await store.commit(note("later"))

    with pytest.raises(RuntimeError):
        async with store.transaction():
            task = asyncio.create_task(later())
            await store.commit(note("lost"))
            raise RuntimeError
    ended.set()
    await task
    assert await all_contents(store) == ["later"]


async def test_transactions_of_two_stores_do_not_mix(engine: Engine, tmp_path: Path) -> None:
    async with opened_async(engine) as one, opened_async(f"sqlite:///{tmp_path / 'other.db'}") as two:
        with pytest.raises(RuntimeError):
            async with one.transaction(), two.transaction():
                await one.commit(note("lost"))
                async with one.transaction():
                    await two.commit(note("lost"))
                raise RuntimeError
        async with one.transaction():
            await two.commit(note("two"))
        assert (await all_contents(one), await all_contents(two)) == ([], ["two"])


async def test_models_of_the_application_join_the_transaction(store: AsyncMemoryStore) -> None:
    """run_sync gives the MemoryStore in the thread of the transaction, and that gives the Session."""

    def label(facts: MemoryStore) -> bool:
        with facts.transaction(reason="by session") as session:
            return session.get(Fact, id_) is not None

    async with store.transaction():
        id_ = await store.commit(note("tea"))
        assert await store.run_sync(label)
    assert [change.reason for change in await store.history(id_)] == ["by session"]


# -- cancellation ------------------------------------------------------------------------------------------------------


async def test_a_cancelled_block_rolls_back_after_its_call(store: AsyncMemoryStore) -> None:
    """The call in work cannot be stopped. The block waits for it, and nothing of both is committed."""
    latch = Latch()

    async def work() -> None:
        async with store.transaction():
            await store.commit(note("first"))
            await store.run_sync(latch.commit, "second")

    task = asyncio.create_task(work())
    await latch.entered.wait()
    task.cancel()
    await asyncio.sleep(0)
    assert not task.done()
    latch.released.set()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert await all_contents(store) == []
    assert await store.history() == []


async def test_a_call_cancelled_in_the_block_dooms_it(store: AsyncMemoryStore) -> None:
    """Its caller believes that it did not happen. So the block must not commit it, nor a part of its own work."""
    latch = Latch()
    with pytest.raises(MemstateError, match="One of its calls was cancelled"):
        async with store.transaction():
            await store.commit(note("first"))
            with pytest.raises(TimeoutError):
                await latch.time_out(store.run_sync(latch.commit, "second"))
            with pytest.raises(MemstateError, match="One of its calls was cancelled"):
                await store.commit(note("third"))
    assert await all_contents(store) == []


async def test_a_block_inside_is_doomed_alone(store: AsyncMemoryStore) -> None:
    latch = Latch()

    async def inner() -> None:
        async with store.transaction():
            await store.run_sync(latch.commit, "inner")

    async with store.transaction():
        await store.commit(note("outer"))
        with pytest.raises(TimeoutError):
            await latch.time_out(inner())
        await store.commit(note("after"))
    assert await all_contents(store) == ["outer", "after"]


async def test_a_block_cancelled_while_it_begins_leaves_no_transaction() -> None:
    """All calls of an in-memory SQLite wait for the one transaction. A cancelled one must not begin later, and stay."""
    async with opened_async("sqlite://", background=True) as store:

        async def waits() -> None:
            async with store.transaction():
                raise AssertionError("it was cancelled before")

        async with store.transaction():
            await store.commit(note("first"))
        begun, end = asyncio.Event(), asyncio.Event()

        async def holds() -> None:
            async with store.transaction():
                begun.set()
                await end.wait()

        holder = asyncio.create_task(holds())
        await begun.wait()
        waiter = asyncio.create_task(waits())
        await asyncio.sleep(0.05)
        waiter.cancel()
        await asyncio.sleep(0)
        end.set()
        await holder
        with pytest.raises(asyncio.CancelledError):
            await waiter
        await store.commit(note("second"))
        assert await all_contents(store) == ["first", "second"]


async def test_a_block_cancelled_while_it_commits_waits_for_that(store: AsyncMemoryStore) -> None:
    """A commit that has begun is finished, and then the task is cancelled."""
    latch = Latch()

    async def work() -> None:
        async with store.transaction():
            await store.commit(note("tea"))
            await store.run_sync(before_commit, latch.wait)

    task = asyncio.create_task(work())
    await latch.entered.wait()
    task.cancel()
    assert await asyncio.wait([task], timeout=0.2) == (set(), {task})
    latch.released.set()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert await all_contents(store) == ["tea"]


async def test_a_cancelled_commit_is_whole_or_absent(store: AsyncMemoryStore) -> None:
    """Outside of a transaction, the thread finishes the call after its task is gone."""
    latch = Latch()
    task = asyncio.create_task(store.run_sync(latch.commit, "tea"))
    await latch.entered.wait()
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    latch.released.set()
    await store.close()
    async with opened_async(store.engine) as again:
        assert await all_contents(again) == ["tea"]
        assert [change.op for change in await again.history()] == ["insert"]
