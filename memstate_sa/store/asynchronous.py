"""`AsyncMemoryStore`: the methods of `MemoryStore` for asyncio, in threads."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Mapping
from concurrent.futures import Executor, ThreadPoolExecutor
from contextlib import ExitStack, asynccontextmanager
from contextvars import ContextVar, copy_context
from dataclasses import dataclass
from functools import partial, wraps
from types import TracebackType
from typing import TYPE_CHECKING, Any, Concatenate, ParamSpec, Self, TypeVar, Unpack

from sqlalchemy.engine import URL, Engine

from memstate_sa.errors import MemstateError
from memstate_sa.indexes.base import VectorIndex
from memstate_sa.memory import Memory
from memstate_sa.options import Labels, StoreOptions
from memstate_sa.relay import Relay
from memstate_sa.relay.loop import STOP_TIMEOUT_S
from memstate_sa.store.store import MemoryStore

if TYPE_CHECKING:
    from sqlalchemy.ext.asyncio import AsyncEngine

P = ParamSpec("P")
R = TypeVar("R")

_THREADS = 8
"""The most calls outside of transactions that run at once. Each may need a connection of the engine's pool."""


def in_thread(
    method: Callable[Concatenate[MemoryStore, P], R],
) -> Callable[Concatenate[AsyncMemoryStore, P], Coroutine[Any, Any, R]]:
    """The coroutine method that runs *method* in a thread."""

    @wraps(method)
    async def call(self: AsyncMemoryStore, /, *args: P.args, **kwargs: P.kwargs) -> R:
        return await self.run_sync(method, *args, **kwargs)

    return call


def directly(method: Callable[Concatenate[MemoryStore, P], R]) -> Callable[Concatenate[AsyncMemoryStore, P], R]:
    """The method that calls *method*, which does not block."""

    @wraps(method)
    def call(self: AsyncMemoryStore, /, *args: P.args, **kwargs: P.kwargs) -> R:
        return method(self.sync_store, *args, **kwargs)

    return call


class AsyncMemoryStore:
    """A `MemoryStore` for asyncio. It has the same options and the same methods, but callers await them.

    Only `register_schema` is not awaited, because it does not block.

    The first call connects and creates the tables, as ``async with`` does. All work runs in threads, so the event loop
    goes on. ``.sync_store`` is the `MemoryStore` itself, for LangGraph's checkpointer and store, for example.

    A call that is cancelled goes on in its thread, and may still commit. In a `transaction`, a cancelled call is never
    committed.

    ::

        async with AsyncMemoryStore("sqlite:///facts.db", InMemoryIndex()) as store:
            await store.commit(Fact(type="note", payload={"content": "Ada likes tea"}))
            hits = await store.search("what does Ada drink?")
            print(hits[0].fact.payload)
    """

    def __init__(
        self,
        url_or_engine: str | URL | Engine | AsyncEngine,
        index: VectorIndex | Mapping[str, VectorIndex] | None = None,
        **options: Unpack[StoreOptions],
    ) -> None:
        self.sync_store: MemoryStore = _LateStore(url_or_engine, index, **options)
        self._threads = ThreadPoolExecutor(_THREADS, "memstate-store")
        self._closed = False

    @property
    def memory(self) -> Memory:
        return self.sync_store.memory

    @property
    def engine(self) -> Engine:
        return self.sync_store.engine

    @property
    def relay(self) -> Relay:
        return self.sync_store.relay

    register_schema = directly(MemoryStore.register_schema)

    commit = in_thread(MemoryStore.commit)
    commit_model = in_thread(MemoryStore.commit_model)
    update = in_thread(MemoryStore.update)
    delete = in_thread(MemoryStore.delete)
    promote_session = in_thread(MemoryStore.promote_session)
    discard_session = in_thread(MemoryStore.discard_session)

    get = in_thread(MemoryStore.get)
    query = in_thread(MemoryStore.query)
    search = in_thread(MemoryStore.search)
    history = in_thread(MemoryStore.history)
    as_of = in_thread(MemoryStore.as_of)
    diff = in_thread(MemoryStore.diff)
    token = in_thread(MemoryStore.token)

    rollback = in_thread(MemoryStore.rollback)
    revoke = in_thread(MemoryStore.revoke)
    erase = in_thread(MemoryStore.erase)
    purge = in_thread(MemoryStore.purge)
    sweep = in_thread(MemoryStore.sweep)
    wait = in_thread(MemoryStore.wait)
    status = in_thread(MemoryStore.status)
    verify = in_thread(MemoryStore.verify)
    doctor = in_thread(MemoryStore.doctor)
    backfill = in_thread(MemoryStore.backfill)
    reindex = in_thread(MemoryStore.reindex)
    reindex_back = in_thread(MemoryStore.reindex_back)
    export_facts = in_thread(MemoryStore.export_facts)
    import_facts = in_thread(MemoryStore.import_facts)

    async def run_sync(
        self, function: Callable[Concatenate[MemoryStore, P], R], /, *args: P.args, **kwargs: P.kwargs
    ) -> R:
        """Call *function* with the `MemoryStore` in a thread, and return its result.

        The call joins the open transaction of this task, if there is one.

        ::

            facts = await store.run_sync(lambda store: [store.get(id) for id in ids])
        """

        def call() -> R:
            return function(self.sync_store, *args, **kwargs)

        block = _block_of(self)
        if block is not None:
            return await block.run(call)
        if self._closed:
            raise MemstateError("This AsyncMemoryStore is closed. Make another one.")
        return await _in(self._threads, call)

    @asynccontextmanager
    async def transaction(self, **labels: Unpack[Labels]) -> AsyncIterator[None]:
        """Make several calls of this task one SQL transaction: all of them take effect, or none.

        ::

            async with store.transaction(actor="ada"):
                await store.delete(old_id)
                await store.commit(Fact(type="note", payload={"content": "likes tea"}))

        The transaction belongs to the task that began it. Calls in tasks that the block creates raise MemstateError
        until the block ends. ``asyncio.gather`` creates such tasks too. If a call in the block is cancelled, by
        ``asyncio.timeout`` for example, the whole transaction rolls back. The block then raises MemstateError, unless
        it raises another error.
        """
        outer, blocks = _block_of(self), _blocks.get()
        thread = ThreadPoolExecutor(1, "memstate-transaction") if outer is None else outer.thread
        block = _TransactionBlock(self, asyncio.current_task(), thread)
        session = ExitStack()
        try:
            await block.run(lambda: session.enter_context(self.sync_store.transaction(**labels)))
            _blocks.set((*blocks, block))
            yield
            block.require_whole()
        except BaseException as error:
            await _to_the_end(_in(thread, session.__exit__, type(error), error, error.__traceback__))
            raise
        else:
            await _to_the_end(_in(thread, session.close))
        finally:
            block.is_over = True
            _blocks.set(blocks)
            if outer is None:
                thread.shutdown(wait=False)

    async def close(self, timeout: float = STOP_TIMEOUT_S) -> None:  # noqa: ASYNC109  # as MemoryStore has it
        """Wait for the calls under way, stop the relay and close the index; see `MemoryStore.close`."""
        self._closed = True
        await _to_the_end(asyncio.to_thread(self._close, timeout))

    def _close(self, timeout: float) -> None:
        self._threads.shutdown()
        self.sync_store.close(timeout)

    async def __aenter__(self) -> Self:
        try:
            await self.run_sync(MemoryStore._open)  # noqa: SLF001  # of the same package
        except BaseException:
            await self.close()
            raise
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        await self.close()

    def __repr__(self) -> str:
        return repr(self.sync_store).replace("<", "<Async", 1)


class _LateStore(MemoryStore):
    """A MemoryStore that connects at its first call, not when it is made."""

    _connects_at_once = False


@dataclass(eq=False)
class _TransactionBlock:
    """An ``async with store.transaction()`` that has begun. All its calls run in one *thread*, so that they join it."""

    store: AsyncMemoryStore
    task: asyncio.Task[Any] | None
    thread: Executor
    has_cancelled_call: bool = False
    is_over: bool = False

    async def run(self, call: Callable[[], R]) -> R:
        self.require_whole()
        try:
            return await _in(self.thread, call)
        except asyncio.CancelledError:
            self.has_cancelled_call = True  # its thread goes on, and may still write
            raise

    def require_whole(self) -> None:
        if self.has_cancelled_call:
            raise MemstateError(
                "Cannot go on with this transaction. One of its calls was cancelled, so the block rolls back. Begin "
                "another transaction."
            )


_blocks: ContextVar[tuple[_TransactionBlock, ...]] = ContextVar("memstate_transaction_blocks", default=())


def _block_of(store: AsyncMemoryStore) -> _TransactionBlock | None:
    """The innermost transaction that this task began with *store*. Raises MemstateError in a task of its block."""
    for block in reversed(_blocks.get()):
        if block.store is store and not block.is_over:
            if block.task is not asyncio.current_task():
                raise MemstateError(
                    "Cannot use a transaction of another task. Only the task that began the block can use it. "
                    "Await the call in the block itself: asyncio.gather and wait_for create tasks."
                )
            return block
    return None


def _in(executor: Executor, function: Callable[P, R], /, *args: P.args, **kwargs: P.kwargs) -> asyncio.Future[R]:
    """Call *function* in a thread of *executor*, with the context variables of this task."""
    call = partial(copy_context().run, function, *args, **kwargs)
    return asyncio.get_running_loop().run_in_executor(executor, call)


async def _to_the_end(work: Awaitable[object]) -> None:
    """Wait for *work*, which goes on when this task is cancelled. The cancellation is raised afterwards."""
    future = asyncio.ensure_future(work)
    try:
        await asyncio.shield(future)
    except asyncio.CancelledError:
        await asyncio.wait([future])
        raise
