"""LangGraph's checkpoints in the database of the facts. With `step`, both commit in one transaction.

``pip install 'memstate-sa[langgraph]'``. `setup` creates the tables, or use Alembic.
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from datetime import datetime
from functools import partial
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
from memstate_sa.store import AsyncMemoryStore, MemoryStore

try:
    from langchain_core.runnables import RunnableConfig
    from langchain_core.runnables.config import var_child_runnable_config
    from langgraph.checkpoint.serde.base import SerializerProtocol

    from memstate_sa.integrations.langgraph.checkpoint_codec import POSITION, moment_of
    from memstate_sa.integrations.langgraph.checkpoint_saver import AS_OF, CheckpointSaver
    from memstate_sa.integrations.langgraph.executions import Execution, execution_of, node_config
    from memstate_sa.integrations.langgraph.node_transactions import NodeTransaction
    from memstate_sa.integrations.langgraph.state_classes import StateSerializer
except ImportError as error:
    raise MissingExtra("langgraph", "langgraph") from error

if TYPE_CHECKING:
    from sqlalchemy.ext.asyncio import AsyncEngine

T = TypeVar("T")

_UNKNOWN_MEMORY = (
    "This step does not include this MemoryStore: the checkpointer does not know it, so its changes would stay when "
    "the node fails. Make the checkpointer with it: MemStateCheckpointer(store). For a Memory of your own, use memory=."
)


class MemStateCheckpointer(CheckpointSaver):
    """Saves a graph's checkpoints in the database of the facts: PostgreSQL, or SQLite in a file.

    *where* is a `MemoryStore` (or AsyncMemoryStore), an Engine (or AsyncEngine) or a URL. Pass a store, or a `Memory`
    with facts in that database as *memory*. Then each checkpoint also records the log's last transaction, and `step`
    commits facts with the state. Checkpoints themselves are not facts: they have no history, and are in no index.

    Values are stored as msgpack, never as pickle. Reading builds only plain types, LangChain's messages, LangGraph's
    own classes, classes in the graph's schemas, and classes in *allow*. A value of another class raises MemstateError.
    So an attacker who can write to the database cannot make this process build other objects. *allow* takes classes,
    and schemas, which stand for all classes in their fields. *serde* replaces the serializer, for example to encrypt.

    All methods may be called from any thread. The async methods run the same code in threads.

    ::

        facts = MemoryStore("postgresql://app@db/shop", index)
        with MemStateCheckpointer(facts) as checkpointer:
            checkpointer.setup()
            graph = builder.compile(checkpointer=checkpointer)
    """

    def __init__(
        self,
        where: MemoryStore | AsyncMemoryStore | Engine | AsyncEngine | URL | str,
        *,
        memory: Memory | None = None,
        serde: SerializerProtocol | None = None,
        allow: Iterable[Any] = (),
        step_timeout_s: float = 60.0,
    ) -> None:
        allow = tuple(allow)
        if serde is not None and allow:
            raise MemstateError(
                "Cannot use allow= with serde=. Your serializer decides which classes it reads. Configure it instead."
            )
        if isinstance(where, AsyncMemoryStore):
            where = where.sync_store
        if isinstance(where, MemoryStore):
            memory = where.memory
        engine = sync_engine(where, memory)
        if sqlite.is_in_memory(engine):
            raise MemstateError(
                "Cannot use an in-memory SQLite database. It has one connection, which a graph's threads cannot share. "
                "Use a file."
            )
        super().__init__(engine, memory, serde or StateSerializer(allow), step_timeout_s)
        self._owns_engine = isinstance(where, (str, URL)) or (memory is None and engine is not where)
        if database_of(engine).has_one_writer:
            sqlite.watch(self)

    def setup(self) -> None:
        """Create missing tables. With Alembic, a migration does this."""
        if self.memory is not None:
            self.memory.create_tables(self.engine)
        else:
            create(self.engine, [*TABLES, lease])

    async def asetup(self) -> None:
        await self._in_thread("save", self.setup)

    def close(self) -> None:
        """End the threads, and dispose of an engine that was made from a URL. Saved checkpoints stay."""
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
        """A Session for use in a node. Its changes commit in the transaction that saves the node's writes to the state.

        After a crash, both are there or neither. If the node fails, is retried or waits for an answer, its changes are
        rolled back. All blocks of a node share the Session. Only the end of the node commits it: ``session.commit()``
        raises MemstateError.

        Inside the block, calls of the checkpointer's MemoryStore, and of a MemStateStore with this memory, join the
        transaction. Calls of other stores on this database raise MemstateError.

        The log has one set of labels for all changes of a step. Its session_id is the thread, and another one raises
        MemstateError. The reason is the node, unless a call gives one. Without an actor from a call, there is none. If
        calls give several actors or reasons, the last one counts for the whole step.

        If a node leaves its graph by a Command to a parent, its step commits with the task that called the graph.

        Write late in the node: until it returns, rows stay locked, and on SQLite the whole database. On SQLite, a write
        outside the step and a subgraph that is called after it raise MemstateError. A node that begins a step sees the
        changes of earlier steps. A node without a step may run before they are committed, unless the graph runs with
        ``durability="sync"``. With ``durability="exit"`` nothing is saved until the run ends, so steps raise
        MemstateError.

        When many nodes run at the same time, the engine's pool limits the number of open steps. On SQLite the limit is
        one. Other nodes wait, without a connection, until a node returns. Raises MemstateError if none returns within
        *step_timeout_s*.

        Raises MemstateError outside a node, and in a coroutine: use `astep` there.
        """
        try:
            asyncio.get_running_loop()
        except RuntimeError:
            pass
        else:
            raise MemstateError(
                "Cannot use step() in a coroutine, because it blocks. Use `await checkpointer.astep(function)`."
            )
        config = config or node_config()
        execution = self._execution_of(config)
        task = execution.task
        with self._steps.step(task, self._is_saved, execution) as (session, is_first):
            if is_first and self.memory is not None:
                node = config.get("metadata", {}).get("langgraph_node")
                session.label = partial(_label, self.memory, session, task.checkpoint.thread_id, node)
                session.label()
            with use_session(self.memory, self.engine, session, refusal=_UNKNOWN_MEMORY):
                yield session

    async def astep(self, work: Callable[[Session], T], config: RunnableConfig | None = None) -> T:
        """Call *work* with the Session of `step`, in a thread, and return its result."""
        config = config or node_config()
        execution, cancelled = self._execution_of(config), threading.Event()
        task = execution.task

        def begin() -> NodeTransaction:
            transaction = self._steps.begin(task, self._is_saved, execution)
            if cancelled.is_set():  # the node was cancelled before its transaction began
                self._steps.give_up(task)
            return transaction

        def enter() -> T:
            try:
                with self.step(config) as session:
                    return work(session)
            finally:
                if cancelled.is_set():  # the node was cancelled, and `step` may have begun another transaction
                    self._steps.give_up(task)

        def when_done(node: asyncio.Task[Any]) -> None:
            if node.cancelled():
                cancelled.set()
                self._steps.give_up(task)

        node = asyncio.current_task()
        assert node is not None
        node.add_done_callback(when_done)
        # Use separate threads, because all "begin" threads may be waiting for saves, and the saves for a "step" thread.
        transaction = self._steps.find(task)
        if transaction is None or not transaction.permit.done():
            async with execution.awaiting():
                if transaction is None:
                    transaction = await self._in_thread("begin", begin)
                await self._steps.wait_for_permit(transaction)
        return await self._in_thread("step", enter)

    def before_begin(self, connection: Connection) -> None:
        """Raise an error if a node writes outside its own open step. On SQLite it would wait for the step forever."""
        config = var_child_runnable_config.get() if self._steps.is_any_open else None
        if config is not None and is_same_database(connection.engine, self.engine):
            conf = config.get("configurable", {})
            self._steps.check_around(str(conf.get("thread_id")), conf.get("checkpoint_ns") or "")

    def _execution_of(self, config: RunnableConfig) -> Execution:
        execution = execution_of(config)
        graph_checkpointer = execution.graph.checkpointer
        # LangGraph may give the graph a copy of this checkpointer, which has the same steps.
        if getattr(graph_checkpointer, "_steps", None) is not self._steps:
            raise MemstateError(
                "Cannot begin a step: the graph of this node has another checkpointer "
                f"({type(graph_checkpointer).__name__}). Compile the graph with this one: "
                "builder.compile(checkpointer=checkpointer)."
            )
        return execution

    def _is_saved(self, key: CheckpointKey) -> bool:
        with self._autocommit.connect() as connection:
            return checkpoint_queries.is_stored(connection, key)

    # -- earlier facts ---------------------------------------------------------------------------------------------

    def position(self, checkpoint: Any) -> Moment:
        """The moment of the log at which a checkpoint was saved. `Memory` accepts it as ``to=``, ``as_of=`` …

        *checkpoint* is a config, a StateSnapshot or a CheckpointTuple. ``memory.rollback(session, to=…)`` takes all
        facts back to that moment. With ``session_id=thread_id``, it undoes only changes of this thread's steps.
        """
        metadata: Any = getattr(checkpoint, "metadata", None)
        if metadata is None:
            _require_config(checkpoint)
            stored = self.get_tuple(checkpoint)
            if stored is None:
                raise MemstateError("Cannot find this checkpoint. It was never saved, or it was deleted.")
            metadata = stored.metadata
        if POSITION not in metadata:
            raise MemstateError(
                "This checkpoint records no moment of the log. It was saved by a checkpointer without memory=."
            )
        return moment_of(metadata[POSITION])

    def at(self, checkpoint: Any) -> RunnableConfig:
        """A config to run the graph from *checkpoint* with the facts of that time. Nodes get the moment from `as_of`.

        A replay without this config works with today's facts.
        """
        position = self.position(checkpoint)
        config = checkpoint if isinstance(checkpoint, dict) else checkpoint.config
        as_of = position.isoformat() if isinstance(position, datetime) else position
        return cast("RunnableConfig", {**config, "configurable": {**config["configurable"], AS_OF: as_of}})

    def as_of(self, config: RunnableConfig | None = None) -> Moment | None:
        """The moment for which this node's run reads facts, for ``memory.search`` and others. None is the present."""
        as_of = (config or node_config())["configurable"].get(AS_OF)
        return None if as_of is None else moment_of(as_of)

    # -- runs ------------------------------------------------------------------------------------------------------

    @contextmanager
    def run(
        self, config: RunnableConfig, *, lease_s: float = 300.0, take_over: bool = False
    ) -> Iterator[RunnableConfig]:
        """Reserve a thread for one run: ``with checkpointer.run(config) as config: graph.invoke(input, config)``.

        Raises StaleRun while another run has the thread, unless that run's process (on this machine) has ended, or
        *take_over* is True. Later writes of a run that was taken over are refused. The lease lasts *lease_s* seconds
        after each save, so choose more than the duration of the longest node. Runs without a lease do not wait for
        leases, and do not block other runs.
        """
        (thread_id, _), owner = graph_of(config), owner_id()
        with self._read_committed.begin() as connection:
            thread_leases.acquire(connection, thread_id, owner, lease_s, take_over=take_over)
        try:
            yield thread_leases.leased(config, owner, lease_s)
        finally:
            with self._read_committed.begin() as connection:
                thread_leases.release(connection, thread_id, owner)


def _label(memory: Memory, session: Session, thread_id: str, node: str | None) -> None:
    memory.annotate(session, session_id=thread_id, reason=node and f"node {node}")
    memory._transaction(session).thread_id = thread_id  # noqa: SLF001


def _require_config(checkpoint: Any) -> None:
    if not isinstance(checkpoint, dict):
        raise MemstateError(
            f"Cannot use checkpoint={checkpoint!r}. Pass a config such as {{'configurable': {{'thread_id': …}}}}, or a "
            "StateSnapshot from graph.get_state_history(config)."
        )
