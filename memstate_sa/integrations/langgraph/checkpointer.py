"""LangGraph's checkpoints beside the facts: one database, and where it is asked for, one transaction.

``pip install 'memstate-sa[langgraph]'``. The tables are made by `setup`, or by Alembic.
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from datetime import datetime
from typing import TYPE_CHECKING, Any, Self, TypeVar, cast

from sqlalchemy.engine import URL, Connection, Engine
from sqlalchemy.orm import Session

from memstate_sa.db import sqlite
from memstate_sa.db.creation import create
from memstate_sa.db.dialects import database_of
from memstate_sa.db.engines import is_same_database
from memstate_sa.db.joined_session import use_session
from memstate_sa.db.leases import owner_id
from memstate_sa.errors import MemstateError, MissingExtra
from memstate_sa.integrations.langgraph import checkpoint_queries, thread_leases
from memstate_sa.integrations.langgraph.checkpoint_rows import TABLES, CheckpointKey
from memstate_sa.integrations.langgraph.sync_engines import sync_engine
from memstate_sa.integrations.langgraph.tables import lease
from memstate_sa.integrations.langgraph.thread_ids import graph_of
from memstate_sa.log.history import Moment
from memstate_sa.memory import Memory
from memstate_sa.store import MemoryStore

try:
    from langchain_core.runnables import RunnableConfig
    from langchain_core.runnables.config import var_child_runnable_config
    from langgraph.checkpoint.serde.base import SerializerProtocol

    from memstate_sa.integrations.langgraph.checkpoint_codec import POSITION, moment_of
    from memstate_sa.integrations.langgraph.checkpoint_saver import AS_OF, CheckpointSaver
    from memstate_sa.integrations.langgraph.executions import execution_of, node_config
    from memstate_sa.integrations.langgraph.node_transactions import NodeTransaction
    from memstate_sa.integrations.langgraph.state_classes import StateSerializer
except ImportError as error:
    raise MissingExtra("langgraph", "langgraph") from error

if TYPE_CHECKING:
    from sqlalchemy.ext.asyncio import AsyncEngine

T = TypeVar("T")


class MemStateCheckpointer(CheckpointSaver):
    """Saves a graph's checkpoints in the database of the facts: PostgreSQL, or SQLite in a file.

    *where* is a `MemoryStore`, an Engine (or AsyncEngine) or a URL. With a MemoryStore, or *memory* (a `Memory` whose
    facts are in that database), every checkpoint also records how far the log of facts was, and `step` commits facts
    with the state. Checkpoints themselves are no facts: they have no history and are in no index.

    Values are stored as msgpack, never as pickle. Reading builds plain types, LangChain's messages, LangGraph's own
    classes, those that the schemas of a graph name, and those in *allow*. Whoever can write to the database cannot have
    this process build anything else: a value of another class is a MemstateError. *allow* takes classes, and schemas,
    which stand for all classes that their fields name. *serde* replaces the serializer, to encrypt for example.

    All methods may be called from any thread; those of asyncio run the same code in threads.

    ::

        with MemStateCheckpointer("postgresql://app@db/shop") as checkpointer:
            checkpointer.setup()
            graph = builder.compile(checkpointer=checkpointer)
    """

    def __init__(
        self,
        where: MemoryStore | Engine | AsyncEngine | URL | str,
        *,
        memory: Memory | None = None,
        serde: SerializerProtocol | None = None,
        allow: Iterable[Any] = (),
        step_timeout_s: float = 60.0,
    ) -> None:
        allow = tuple(allow)
        if serde is not None and allow:
            raise MemstateError("Cannot use allow= with serde=: that serializer decides alone. Tell it what to allow.")
        if isinstance(where, MemoryStore):
            memory = where.memory
        engine = sync_engine(where, memory)
        if sqlite.is_in_memory(engine):
            raise MemstateError(
                "an in-memory SQLite has one connection, which a graph's threads cannot share: use a file"
            )
        super().__init__(engine, memory, serde or StateSerializer(allow), step_timeout_s)
        self._owns_engine = isinstance(where, (str, URL)) or (memory is None and engine is not where)
        if database_of(engine).has_one_writer:
            sqlite.watch(self)

    def setup(self) -> None:
        """Create the tables that are not there yet. With Alembic, a migration does it."""
        if self.memory is not None:
            self.memory.create_tables(self.engine)
        else:
            create(self.engine, [*TABLES, lease])

    async def asetup(self) -> None:
        await self._in_thread("save", self.setup)

    def close(self) -> None:
        """End its threads, and an engine that it has made of a URL itself; nothing is lost that was saved."""
        sqlite.unwatch(self)
        for threads in self._threads.values():
            threads.shutdown()
        if self._owns_engine:
            self.engine.dispose()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    # -- steps -----------------------------------------------------------------------------------------------------

    @contextmanager
    def step(self, config: RunnableConfig | None = None) -> Iterator[Session]:
        """In a node, a Session whose changes commit in the transaction that saves what the node writes to the state.

        Whatever kills the process, both are there afterwards, or neither; a node that fails, is retried, or waits for
        an answer leaves none. All blocks of one node share the Session; it is closed when the node's writes are saved,
        and is not to be committed by hand. Calls of the MemoryStore, and of a MemStateStore of this memory, join it
        inside the block. What it changes is labelled with the thread as session_id
        (``memory.rollback(session, session_id=thread_id)``), and the node as reason.

        A node that leaves its graph by a Command to a parent commits with the task of the parent that called the graph.

        Write late: rows stay locked until the node returns, on SQLite the database. A write outside of the step, and a
        subgraph that is called after it, raise MemstateError there. A node that begins a step sees what the steps
        before it wrote. Others may run before that is committed, unless the graph runs with ``durability="sync"``.
        With "exit" nothing is saved until the run is over, so there are no steps.

        Of many nodes that run at a time, as many begin a step as the engine's pool has room for, on SQLite one. Others
        wait until a node returns, without a connection. Raises MemstateError when none does for *step_timeout_s*.

        Raises MemstateError outside of a node, and in a coroutine, where `astep` is to be used.
        """
        try:
            asyncio.get_running_loop()
        except RuntimeError:
            pass
        else:
            raise MemstateError("a coroutine must not wait for the database: await checkpointer.astep(function)")
        config = config or node_config()
        execution = execution_of(config)
        task = execution.task
        with self._steps.step(task, self._is_saved, execution) as (session, is_first):
            if is_first and self.memory is not None:
                node = config.get("metadata", {}).get("langgraph_node")
                self.memory.annotate(session, session_id=task.checkpoint.thread_id, reason=node and f"node {node}")
            with use_session(self.memory, self.engine, session):
                yield session

    async def astep(self, work: Callable[[Session], T], config: RunnableConfig | None = None) -> T:
        """Call *work* with the Session of `step`, in a thread, and return what it does."""
        config = config or node_config()
        execution, cancelled = execution_of(config), threading.Event()
        task = execution.task

        def begin() -> NodeTransaction:
            transaction = self._steps.begin(task, self._is_saved, execution)
            if cancelled.is_set():  # before there was a transaction
                self._steps.give_up(task)
            return transaction

        def enter() -> T:
            try:
                with self.step(config) as session:
                    return work(session)
            finally:
                if cancelled.is_set():  # before this made another one
                    self._steps.give_up(task)

        def when_done(node: asyncio.Task[Any]) -> None:
            if node.cancelled():
                cancelled.set()
                self._steps.give_up(task)

        node = asyncio.current_task()
        assert node is not None
        node.add_done_callback(when_done)
        # Threads apart: those in which steps begin may all wait for saves, and these for a step that goes on.
        transaction = self._steps.find(task)
        if transaction is None or not transaction.permit.done():
            async with execution.awaiting():
                if transaction is None:
                    transaction = await self._in_thread("begin", begin)
                await self._steps.wait_for_permit(transaction)
        return await self._in_thread("step", enter)

    def before_begin(self, connection: Connection) -> None:
        """Raise where a node writes beside its own step, which SQLite would have it wait for in vain."""
        config = var_child_runnable_config.get() if self._steps.is_any_open else None
        if config is not None and is_same_database(connection.engine, self.engine):
            conf = config.get("configurable", {})
            self._steps.check_around(str(conf.get("thread_id")), conf.get("checkpoint_ns") or "")

    def _is_saved(self, key: CheckpointKey) -> bool:
        with self._autocommit.connect() as connection:
            return checkpoint_queries.is_stored(connection, key)

    # -- the past --------------------------------------------------------------------------------------------------

    def position(self, checkpoint: Any) -> Moment:
        """Where the log of facts was when a checkpoint was saved, as `Memory` takes it (``to=``, ``as_of=``, …).

        *checkpoint* is a config, a StateSnapshot or a CheckpointTuple. ``memory.rollback(session, to=…)`` takes the
        facts back to where the state was; with ``session_id=thread_id``, those that this thread's steps have changed.
        """
        metadata: Any = getattr(checkpoint, "metadata", None)
        if metadata is None:
            stored = self.get_tuple(checkpoint)
            if stored is None:
                raise MemstateError("no such checkpoint")
            metadata = stored.metadata
        if POSITION not in metadata:
            raise MemstateError("this checkpoint was saved by a checkpointer without memory=")
        return moment_of(metadata[POSITION])

    def at(self, checkpoint: Any) -> RunnableConfig:
        """A config to run the graph from *checkpoint* with the facts as they were then: nodes ask `as_of` for it.

        Without it, a replay works with the facts of today.
        """
        config = checkpoint if isinstance(checkpoint, dict) else checkpoint.config
        position = self.position(checkpoint)
        as_of = position.isoformat() if isinstance(position, datetime) else position
        return cast("RunnableConfig", {**config, "configurable": {**config["configurable"], AS_OF: as_of}})

    def as_of(self, config: RunnableConfig | None = None) -> Moment | None:
        """In a node: the moment that its run reads facts of, as ``memory.search`` takes it; None is the present."""
        as_of = (config or node_config())["configurable"].get(AS_OF)
        return None if as_of is None else moment_of(as_of)

    # -- runs ------------------------------------------------------------------------------------------------------

    @contextmanager
    def run(
        self, config: RunnableConfig, *, lease_s: float = 300.0, take_over: bool = False
    ) -> Iterator[RunnableConfig]:
        """Have a thread alone: ``with checkpointer.run(config) as config: graph.invoke(input, config)``.

        Raises StaleRun while another run has it, unless that run's process (on this machine) has ended or *take_over*
        is given; who was taken over is refused from then on, whatever it writes. The lease lasts *lease_s* seconds
        from each save on: longer than the longest node takes. Runs without a lease are not held up, and hold up none.
        """
        (thread_id, _), owner = graph_of(config), owner_id()
        with self._read_committed.begin() as connection:
            thread_leases.acquire(connection, thread_id, owner, lease_s, take_over=take_over)
        try:
            yield thread_leases.leased(config, owner, lease_s)
        finally:
            with self._read_committed.begin() as connection:
                thread_leases.release(connection, thread_id, owner)
