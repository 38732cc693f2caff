"""LangGraph's checkpoints beside the facts: one database, and where it is asked for, one transaction.

``pip install 'memstate-sa[langgraph]'``. The tables are made by `setup`, or by Alembic.
"""

from __future__ import annotations

import asyncio
import math
import random
import threading
from collections.abc import AsyncIterator, Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, nullcontext
from contextvars import copy_context
from datetime import datetime
from functools import partial
from itertools import islice
from typing import TYPE_CHECKING, Any, ParamSpec, Self, TypeVar, cast

from sqlalchemy.engine import URL, Connection, Engine
from sqlalchemy.orm import Session, sessionmaker
from sqlalchemy.pool import QueuePool

from memstate_sa.db import engines, missing_tables, sqlite
from memstate_sa.db.codec import is_text
from memstate_sa.db.creation import create
from memstate_sa.db.engines import is_same_database
from memstate_sa.db.joined_session import use_session
from memstate_sa.db.leases import owner_id
from memstate_sa.errors import ConflictError, MemstateError, MissingExtra
from memstate_sa.integrations.langgraph import checkpoint_rows, thread_leases
from memstate_sa.integrations.langgraph.checkpoint_rows import Cursor, Outline, Place, Stored, Value, Write
from memstate_sa.integrations.langgraph.executions import Execution
from memstate_sa.integrations.langgraph.node_transactions import Steps
from memstate_sa.integrations.langgraph.tables import lease
from memstate_sa.integrations.langgraph.thread_ids import checkpoint_id_of, configured, graph_of, thread_id_of
from memstate_sa.log.history import SNAPSHOT_MARK, Moment
from memstate_sa.memory import Memory
from memstate_sa.runtime import forks
from memstate_sa.store import MemoryStore, engine_of

try:
    from langchain_core.runnables import RunnableConfig
    from langchain_core.runnables.config import var_child_runnable_config
    from langgraph.checkpoint.base import (
        WRITES_IDX_MAP,
        BaseCheckpointSaver,
        ChannelVersions,
        Checkpoint,
        CheckpointMetadata,
        CheckpointTuple,
        DeltaChannelHistory,
        PendingWrite,
        get_serializable_checkpoint_metadata,
    )
    from langgraph.checkpoint.serde.base import SerializerProtocol
    from langgraph.checkpoint.serde.types import ERROR, INTERRUPT

    from memstate_sa.integrations.langgraph.state_classes import StateSerializer
except ImportError as error:
    raise MissingExtra("langgraph", "langgraph") from error

if TYPE_CHECKING:
    from sqlalchemy.ext.asyncio import AsyncEngine

P = ParamSpec("P")
T = TypeVar("T")

POSITION = "memstate_position"
"""The name, in a checkpoint's metadata, of where the log of facts was."""
_AS_OF = "memstate_as_of"
# Not shown in metadata, as it begins with underscores.
_RUN, _LEASE = "__memstate_run", "__memstate_lease"
_RUNTIME = "__pregel_runtime"
"""Where LangGraph keeps an object that is the same for all saves of one run."""
_PAGE = 50
_THREADS = {"read": 8, "save": 16, "begin": 32, "step": 32, "settle": 16}
"""How many threads asyncio's calls have, for each kind of what they do."""
_SMALL = 64
_UNBOUNDED_ROOM = 64


class MemStateCheckpointer(BaseCheckpointSaver[str]):
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
        super().__init__(serde=serde or StateSerializer(allow))
        self.memory = where.memory if isinstance(where, MemoryStore) else memory
        self.engine = sync_engine(where, self.memory)
        self._owns_engine = isinstance(where, (str, URL)) or (self.memory is None and self.engine is not where)
        if sqlite.is_in_memory(self.engine):
            raise MemstateError(
                "an in-memory SQLite has one connection, which a graph's threads cannot share: use a file"
            )
        self._autocommit = self._read_committed = self.engine
        if self.engine.dialect.name != "sqlite":
            # For one statement, BEGIN and COMMIT are most of the time; on SQLite it would take longer to say so.
            self._autocommit = self.engine.execution_options(isolation_level="AUTOCOMMIT")
            # Whatever the application's own: who comes too late is to see that, and not to fail for having come.
            self._read_committed = self.engine.execution_options(isolation_level="READ COMMITTED")
        sessions = sessionmaker(self.engine, expire_on_commit=False)
        if self.memory is not None:
            self.memory.attach(sessions)
        self._steps = Steps(sessions, step_timeout_s, _room(self.engine))
        if self.engine.dialect.name == "sqlite":
            sqlite.watch(self)
        self._make_threads()
        forks.in_child(self, MemStateCheckpointer._make_threads)

    def _make_threads(self) -> None:
        # Apart, as those of one kind may all wait for what those of another do.
        self._threads = {kind: ThreadPoolExecutor(many, f"memstate-{kind}") for kind, many in _THREADS.items()}

    def setup(self) -> None:
        """Create the tables that are not there yet. With Alembic, a migration does it."""
        if self.memory is not None:
            self.memory.create_tables(self.engine)
        else:
            create(self.engine, [*checkpoint_rows.TABLES, lease])

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

    # -- saving ----------------------------------------------------------------------------------------------------

    def put(
        self,
        config: RunnableConfig,
        checkpoint: Checkpoint,
        metadata: CheckpointMetadata,
        new_versions: ChannelVersions,
    ) -> RunnableConfig:
        """Save a checkpoint, whose parent is the one that *config* names.

        Where tasks of its step have something to commit with their writes, when they have. Raises StaleRun when another
        run has taken over the thread.
        """
        conf = config["configurable"]
        place = Place(*graph_of(config), checkpoint["id"])
        parent_id, run = conf.get("checkpoint_id"), conf.get(_RUNTIME)
        try:
            self._steps.check_around(place.thread_id, place.ns)
            self._steps.wait_for_tasks(place.thread_id, place.ns, parent_id, run)
            job = partial(self._put, config, place, parent_id, checkpoint, metadata, new_versions)
            self._steps.save(place.thread_id, place.ns, run, job, checkpoint=True)
        except BaseException as error:
            self._steps.save_failed(place.thread_id, place.ns, error, run)
            raise
        return _config(place)

    def _put(
        self,
        config: RunnableConfig,
        place: Place,
        parent_id: str | None,
        checkpoint: Checkpoint,
        metadata: CheckpointMetadata,
        new_versions: ChannelVersions,
    ) -> None:
        # What is small is kept with the checkpoint, the rest once for each version.
        versions, values = checkpoint["channel_versions"], checkpoint["channel_values"]
        small = {name: value for name, value in values.items() if is_small(value) or name not in versions}
        channels = {name: None if name in small else str(versions[name]) for name in values}

        def blobs(names: Iterable[str]) -> dict[tuple[str, str], Value]:
            found = ((name, channels.get(name)) for name in names)
            return {(name, v): Value(*self.serde.dumps_typed(values[name])) for name, v in found if v is not None}

        payload = Value(*self.serde.dumps_typed({**checkpoint, "channel_values": small}))
        recorded = storable(get_serializable_checkpoint_metadata(config, metadata))
        position: str | bool | None = config["configurable"].get(_AS_OF) or self.memory is not None
        new = blobs(new_versions)
        with self._writing(config) as connection:
            follows = parent_id is not None
            if checkpoint_rows.put(
                connection, place, parent_id, payload, channels, new, recorded, position, follows=follows
            ):
                self._steps.checkpoint_saved(place)
                return
        # The parent was deleted, perhaps while this run went on, and the blobs of its versions with it.
        if set(recorded.get("counters_since_delta_snapshot") or ()) - set(channels):
            raise ConflictError(
                f"Cannot save a checkpoint of thread {place.thread_id!r}: the one that it follows was deleted, "
                "and its DeltaChannels need that. Run the graph again from the thread's latest checkpoint."
            )
        with self._read_committed.begin() as connection:
            self._check_run(connection, config)
            checkpoint_rows.lock_threads(connection, [place.thread_id])
            checkpoint_rows.put(connection, place, parent_id, payload, channels, blobs(channels), recorded, position)
        self._steps.checkpoint_saved(place)

    def put_writes(
        self,
        config: RunnableConfig,
        writes: Sequence[tuple[str, Any]],
        task_id: str,
        task_path: str = "",
    ) -> None:
        """Save what a task wrote, and commit what it has open of its `step` in the same transaction.

        A task that failed, or waits for an answer, will run again: what it has open is rolled back.
        """
        conf = config["configurable"]
        place = Place(*graph_of(config), str(conf["checkpoint_id"]))
        run = conf.get(_RUNTIME)
        with self._steps.settle(place, task_id, run, commits=not _runs_again(writes)) as step:
            rows = [
                Write(task_path, task_id, WRITES_IDX_MAP.get(name, n), name, Value(*self.serde.dumps_typed(value)))
                for n, (name, value) in enumerate(writes)
            ]
            # What is written again replaces what was there only of errors, interrupts and answers.
            replace = all(channel in WRITES_IDX_MAP for channel, _ in writes)
            if step is None:
                job = partial(self._put_writes, config, place, rows, replace=replace)
                self._steps.save(place.thread_id, place.ns, run, job)
            else:
                self._put_writes(config, place, rows, step, replace=replace)

    def _put_writes(
        self,
        config: RunnableConfig,
        place: Place,
        rows: Sequence[Write],
        step: Connection | None = None,
        *,
        replace: bool,
    ) -> None:
        with self._writing(config, step) as connection:
            checkpoint_rows.put_writes(connection, place, rows, replace=replace)

    @contextmanager
    def _writing(self, config: RunnableConfig, step: Connection | None = None) -> Iterator[Connection]:
        """A transaction, or that of a *step*; of one statement on PostgreSQL, unless a lease is to be looked at."""
        engine = self._read_committed if _RUN in config["configurable"] else self._autocommit
        with engine.begin() if step is None else nullcontext(step) as connection:
            self._check_run(connection, config)
            yield connection

    # -- reading ---------------------------------------------------------------------------------------------------

    def get_tuple(self, config: RunnableConfig) -> CheckpointTuple | None:
        """The checkpoint that *config* names, or the latest of its thread and graph, by one statement."""
        thread_id, ns = graph_of(config)
        self._steps.run_begins(thread_id, ns)
        with self._autocommit.connect() as connection:
            stored = checkpoint_rows.get(connection, thread_id, ns, checkpoint_id_of(config))
        if stored is None:
            return None
        self._steps.checkpoint_saved(stored.place)  # also when it is pruned before a task that runs at it begins a step
        return self._tuple(stored)

    def list(
        self,
        config: RunnableConfig | None,
        *,
        filter: dict[str, Any] | None = None,  # noqa: A002  # as LangGraph calls it
        before: RunnableConfig | None = None,
        limit: int | None = None,
    ) -> Iterator[CheckpointTuple]:
        """Checkpoints, newest first, read in pages: those of the thread, the graph and the id that *config* names.

        Without *config*, those of all threads. Raises InvalidThread for a *config* that names no thread.

        *filter* is by metadata: values are compared as JSON, and None is null or no such name.
        """
        for page in self._pages(config, filter, before, limit):
            yield from page

    def _pages(
        self,
        config: RunnableConfig | None,
        filter_: dict[str, Any] | None,
        before: RunnableConfig | None,
        limit: int | None,
    ) -> Iterator[Sequence[CheckpointTuple]]:
        thread_id, ns = (None, None) if config is None else graph_of(config)
        if "checkpoint_ns" not in configured(config):
            ns = None  # all graphs of the thread
        cursor = Cursor(thread_id, ns, checkpoint_id_of(config), checkpoint_id_of(before))
        left = limit
        while left is None or left > 0:
            size = _PAGE if left is None else min(_PAGE, left)
            with self._autocommit.connect() as connection:
                found = checkpoint_rows.page(connection, cursor, filter_ or {}, size)
            yield [self._tuple(stored) for stored in found]
            if len(found) < size:
                return
            cursor = cursor._replace(after=found[-1].place)
            left = None if left is None else left - size

    def _tuple(self, stored: Stored) -> CheckpointTuple:
        checkpoint = self.serde.loads_typed(stored.payload)
        values = {channel: self.serde.loads_typed(value) for channel, value in stored.blobs.items()}
        checkpoint["channel_values"] = {**checkpoint["channel_values"], **values}
        metadata = stored.metadata
        if self.memory is not None or stored.position is not None:
            metadata[POSITION] = stored.position or checkpoint["ts"]
        parent = None if stored.parent_id is None else _config(stored.place._replace(id=stored.parent_id))
        pending = [(w.task_id, w.channel, self.serde.loads_typed(w.value)) for w in stored.writes]
        return CheckpointTuple(
            _config(stored.place), cast("Checkpoint", checkpoint), cast("CheckpointMetadata", metadata), parent, pending
        )

    def get_delta_channel_history(
        self, *, config: RunnableConfig, channels: Sequence[str]
    ) -> Mapping[str, DeltaChannelHistory]:
        """What was written to each of *channels* on the way to a checkpoint, since its last value was stored."""
        if not channels:
            return {}
        (thread_id, ns), id_ = graph_of(config), checkpoint_id_of(config)
        seeds: dict[str, str] = {}
        paths: dict[str, Sequence[str]] = {}
        # Several statements of one state, in which nothing is pruned half-way.
        with engines.snapshot(self.engine) as connection:
            if id_ is None:
                latest = checkpoint_rows.get(connection, thread_id, ns, None)
                if latest is None:
                    return {channel: {"writes": []} for channel in channels}
                id_ = latest.place.id
            place = Place(thread_id, ns, id_)
            walked: list[str] = []
            missing = set(channels)
            for link in islice(checkpoint_rows.ancestry(connection, place), 1, None):
                walked.append(link.id)
                for channel in missing.intersection(link.channels):
                    seeds[channel], paths[channel] = link.id, walked[:]
                missing.difference_update(link.channels)
                if not missing:
                    break
            found: dict[str, DeltaChannelHistory] = {}
            for channel in channels:
                path = paths.get(channel, walked)
                written = checkpoint_rows.writes_to(connection, place, channel, path)
                found[channel] = {"writes": [self._pending(w) for id_ in reversed(path) for w in written.get(id_, ())]}
            seeding = {id_: checkpoint_rows.get(connection, thread_id, ns, id_) for id_ in set(seeds.values())}
        for channel, id_ in seeds.items():
            stored = seeding[id_]
            assert stored is not None
            found[channel]["seed"] = self._tuple(stored).checkpoint["channel_values"][channel]
        return found

    def _pending(self, write: Write) -> PendingWrite:
        return write.task_id, write.channel, self.serde.loads_typed(write.value)

    # -- threads and runs ------------------------------------------------------------------------------------------

    def delete_thread(self, thread_id: str, *, facts: bool = False) -> None:
        """Delete a thread's checkpoints; with *facts*, take back what its steps have changed, too, in one transaction.

        Facts that others have changed since stay: see `Memory.revoke`.
        """
        thread_id = thread_id_of(thread_id)
        if not facts:
            with self._read_committed.begin() as connection:
                checkpoint_rows.delete_threads(connection, [thread_id])
            return
        memory = self._need_memory()
        with self._steps.session() as session, session.begin():
            memory.revoke(session, session_id=thread_id)
            checkpoint_rows.delete_threads(session.connection(), [thread_id])

    def delete_for_runs(self, run_ids: Sequence[str]) -> None:
        """Delete the checkpoints of runs, by the ``run_id`` in their metadata; later ones become those of earlier ones.

        A DeltaChannel whose writes go with them reads back without these.
        """
        if not run_ids:
            return
        wanted = {str(id_) for id_ in run_ids}
        with self._read_committed.begin() as connection:
            for thread_id in sorted(checkpoint_rows.threads_of_runs(connection, wanted)):
                checkpoint_rows.lock_threads(connection, [thread_id])
                for ns, all_ in checkpoint_rows.outlines(connection, thread_id).items():
                    gone = {outline.id for outline in all_.values() if outline.run_id in wanted}
                    checkpoint_rows.delete_checkpoints(connection, thread_id, ns, all_, gone)

    def copy_thread(self, source_thread_id: str, target_thread_id: str) -> None:
        """Copy all of a thread, ancestors and blobs included, in the database."""
        source, target = thread_id_of(source_thread_id), thread_id_of(target_thread_id)
        with self._read_committed.begin() as connection:
            checkpoint_rows.copy_thread(connection, source, target)

    def prune(self, thread_ids: Sequence[str], *, strategy: str = "keep_latest") -> None:
        """Delete all checkpoints of threads ("delete"), or all but the latest of each graph ("keep_latest").

        Of a thread with DeltaChannels, the ancestors that the latest one is rebuilt from stay, too. A call of a
        subgraph goes with the checkpoint that it began at.
        """
        if isinstance(thread_ids, str):
            raise TypeError("thread_ids: a sequence of thread ids, not a string")
        if strategy not in ("keep_latest", "delete"):
            raise ValueError(f"strategy={strategy!r}: 'keep_latest' or 'delete'")
        thread_ids = [thread_id_of(each) for each in thread_ids]
        if strategy == "delete":
            with self._read_committed.begin() as connection:
                checkpoint_rows.delete_threads(connection, thread_ids)
            return
        for thread_id in thread_ids:
            with self._read_committed.begin() as connection:
                checkpoint_rows.lock_threads(connection, [thread_id])
                graphs = checkpoint_rows.outlines(connection, thread_id)
                kept = {ns: _kept(all_) for ns, all_ in graphs.items()}
                for ns, all_ in graphs.items():
                    if ns and _ended(ns, all_, graphs.get("", {}), kept.get("", set())):
                        checkpoint_rows.delete_graph(connection, thread_id, ns)
                    else:
                        checkpoint_rows.delete_checkpoints(connection, thread_id, ns, all_, set(all_) - kept[ns])

    def get_next_version(self, current: str | None, channel: None) -> str:  # noqa: ARG002
        """Greater than *current*, and no fork's next version: blobs are stored by it."""
        number = 0 if current is None else int(str(current).split(".")[0])
        return f"{number + 1:08}.{random.getrandbits(48):012x}"

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
        config = config or _node_config()
        execution = _execution(config)
        task = execution.task
        with self._steps.step(task, self._is_saved, execution) as (session, first):
            if first and self.memory is not None:
                node = config.get("metadata", {}).get("langgraph_node")
                self.memory.annotate(session, session_id=task.at.thread_id, reason=node and f"node {node}")
            with use_session(self.memory, self.engine, session):
                yield session

    async def astep(self, work: Callable[[Session], T], config: RunnableConfig | None = None) -> T:
        """Call *work* with the Session of `step`, in a thread, and return what it does."""
        config = config or _node_config()
        execution, cancelled = _execution(config), threading.Event()
        task = execution.task

        def begin() -> Any:
            step = self._steps.begin(task, self._is_saved, execution)
            if cancelled.is_set():  # before there was a step
                self._steps.give_up(task)
            return step

        def enter() -> T:
            try:
                with self.step(config) as session:
                    return work(session)
            finally:
                if cancelled.is_set():  # before this made another one
                    self._steps.give_up(task)

        def done(node: asyncio.Task[Any]) -> None:
            if node.cancelled():
                cancelled.set()
                self._steps.give_up(task)

        node = asyncio.current_task()
        assert node is not None
        node.add_done_callback(done)
        # Threads apart: those in which steps begin may all wait for saves, and these for a step that goes on.
        step = self._steps.begun(task)
        if step is None or not step.turn.done():
            async with execution.awaiting():
                await self._steps.turn(await self._in_thread("begin", begin) if step is None else step)
        return await self._in_thread("step", enter)

    def before_begin(self, connection: Connection) -> None:
        """Raise where a node writes beside its own step, which SQLite would have it wait for in vain."""
        config = var_child_runnable_config.get() if self._steps.are_open else None
        if config is not None and is_same_database(connection.engine, self.engine):
            conf = config.get("configurable", {})
            self._steps.check_around(str(conf.get("thread_id")), conf.get("checkpoint_ns") or "")

    def _is_saved(self, place: Place) -> bool:
        with self._autocommit.connect() as connection:
            return checkpoint_rows.is_there(connection, place)

    # -- the past --------------------------------------------------------------------------------------------------

    def position(self, checkpoint: Any) -> Moment:
        """Where the log of facts was when a checkpoint was saved, as `Memory` takes it (``to=``, ``as_of=``, …).

        *checkpoint* is a config, a StateSnapshot or a CheckpointTuple. ``memory.rollback(session, to=…)`` takes the
        facts back to where the state was; with ``session_id=thread_id``, those that this thread's steps have changed.
        """
        metadata: Any = getattr(checkpoint, "metadata", None)
        if metadata is None:
            found = self.get_tuple(checkpoint)
            if found is None:
                raise MemstateError("no such checkpoint")
            metadata = found.metadata
        if POSITION not in metadata:
            raise MemstateError("this checkpoint was saved by a checkpointer without memory=")
        return _moment(metadata[POSITION])

    def at(self, checkpoint: Any) -> RunnableConfig:
        """A config to run the graph from *checkpoint* with the facts as they were then: nodes ask `as_of` for it.

        Without it, a replay works with the facts of today.
        """
        config = checkpoint if isinstance(checkpoint, dict) else checkpoint.config
        position = self.position(checkpoint)
        as_of = position.isoformat() if isinstance(position, datetime) else position
        return cast("RunnableConfig", {**config, "configurable": {**config["configurable"], _AS_OF: as_of}})

    def as_of(self, config: RunnableConfig | None = None) -> Moment | None:
        """In a node: the moment that its run reads facts of, as ``memory.search`` takes it; None is the present."""
        found = (config or _node_config())["configurable"].get(_AS_OF)
        return None if found is None else _moment(found)

    def _need_memory(self) -> Memory:
        if self.memory is None:
            raise MemstateError("this checkpointer knows no facts: give it a MemoryStore, or memory=")
        return self.memory

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
            leased = {**config["configurable"], _RUN: owner, _LEASE: lease_s}
            yield cast("RunnableConfig", {**config, "configurable": leased})
        finally:
            with self._read_committed.begin() as connection:
                thread_leases.release(connection, thread_id, owner)

    @staticmethod
    def _check_run(connection: Connection, config: RunnableConfig) -> None:
        conf = config["configurable"]
        if _RUN in conf:
            thread_leases.renew(connection, thread_id_of(conf["thread_id"]), conf[_RUN], conf[_LEASE])

    # -- asyncio: the same, in threads -----------------------------------------------------------------------------
    # Not in asyncio's own: nodes that are no coroutines run there, and wait for the saves.

    async def _in_thread(self, kind: str, function: Callable[P, T], /, *args: P.args, **kwargs: P.kwargs) -> T:
        call = partial(copy_context().run, function, *args, **kwargs)
        return await asyncio.get_running_loop().run_in_executor(self._threads[kind], call)

    async def aput(
        self,
        config: RunnableConfig,
        checkpoint: Checkpoint,
        metadata: CheckpointMetadata,
        new_versions: ChannelVersions,
    ) -> RunnableConfig:
        return await self._in_thread("save", self.put, config, checkpoint, metadata, new_versions)

    async def aput_writes(
        self, config: RunnableConfig, writes: Sequence[tuple[str, Any]], task_id: str, task_path: str = ""
    ) -> None:
        thread_id, ns = graph_of(config)
        # What ends a step never waits behind what waits for one.
        if _runs_again(writes) and self._steps.is_open(thread_id, task_id):
            await self._in_thread("settle", self._steps.roll_back, thread_id, task_id)
        ends_a_step = self._steps.is_open(thread_id, task_id) or self._steps.is_in_the_way(thread_id, ns)
        with self._steps.saving(thread_id):
            kind = "settle" if ends_a_step else "save"
            await self._in_thread(kind, self.put_writes, config, writes, task_id, task_path)

    async def aget_tuple(self, config: RunnableConfig) -> CheckpointTuple | None:
        return await self._in_thread("read", self.get_tuple, config)

    async def alist(
        self,
        config: RunnableConfig | None,
        *,
        filter: dict[str, Any] | None = None,  # noqa: A002  # as LangGraph calls it
        before: RunnableConfig | None = None,
        limit: int | None = None,
    ) -> AsyncIterator[CheckpointTuple]:
        pages = self._pages(config, filter, before, limit)
        while (page := await self._in_thread("read", next, pages, None)) is not None:
            for found in page:
                yield found

    async def adelete_thread(self, thread_id: str, *, facts: bool = False) -> None:
        await self._in_thread("save", self.delete_thread, thread_id, facts=facts)

    async def adelete_for_runs(self, run_ids: Sequence[str]) -> None:
        await self._in_thread("save", self.delete_for_runs, run_ids)

    async def acopy_thread(self, source_thread_id: str, target_thread_id: str) -> None:
        await self._in_thread("save", self.copy_thread, source_thread_id, target_thread_id)

    async def aprune(self, thread_ids: Sequence[str], *, strategy: str = "keep_latest") -> None:
        await self._in_thread("save", self.prune, thread_ids, strategy=strategy)

    async def aget_delta_channel_history(
        self, *, config: RunnableConfig, channels: Sequence[str]
    ) -> Mapping[str, DeltaChannelHistory]:
        return await self._in_thread("read", self.get_delta_channel_history, config=config, channels=channels)


def sync_engine(where: MemoryStore | Engine | AsyncEngine | URL | str, memory: Memory | None) -> Engine:
    """The engine of *where*, or one for threads on its URL."""
    engine = _sync_engine(where, memory)
    missing_tables.explain(engine)
    return engine


def _sync_engine(where: MemoryStore | Engine | AsyncEngine | URL | str, memory: Memory | None) -> Engine:
    if isinstance(where, (MemoryStore, Engine)):
        return where if isinstance(where, Engine) else where.engine
    if isinstance(where, (str, URL)):
        url: str | URL = where
    elif memory is not None:
        return memory.sync_engine(where)
    elif isinstance(getattr(where, "url", None), URL):
        url = where.url.set(drivername=where.url.get_backend_name())
    else:
        raise MemstateError(f"{where!r}: give a MemoryStore, an Engine or a URL")
    return engine_of(url if isinstance(url, str) else url.render_as_string(hide_password=False))


def _room(engine: Engine) -> int:
    """How many steps there may be at a time: one on SQLite, which has one writer, else one for each connection."""
    if engine.dialect.name == "sqlite":
        return 1
    pool: Any = engine.pool
    if not isinstance(pool, QueuePool) or pool.size() == 0 or pool._max_overflow < 0:  # noqa: SLF001  # nothing tells it
        return _UNBOUNDED_ROOM
    return pool.size() + pool._max_overflow  # noqa: SLF001


def _config(place: Place) -> RunnableConfig:
    return {"configurable": {"thread_id": place.thread_id, "checkpoint_ns": place.ns, "checkpoint_id": place.id}}


def is_small(value: Any) -> bool:
    """Whether to keep a value with every checkpoint rather than once a version. Decided the same way at each.

    So nothing is that can be changed in place: it would be small at one checkpoint of its version, and not at the next.
    """
    if value is None or isinstance(value, (bool, int, float)):
        return True
    if isinstance(value, (str, bytes)):
        return len(value) <= _SMALL
    return type(value) is tuple and not value


def storable(metadata: Any) -> Any:
    """Without what JSONB does not hold: NUL, which LangGraph takes from the outermost strings alone, and worse."""
    if isinstance(metadata, str):
        return metadata if is_text(metadata) else metadata.replace("\x00", "").encode(errors="replace").decode()
    if isinstance(metadata, float):
        return metadata if math.isfinite(metadata) else None
    if isinstance(metadata, dict):
        return {storable(name): storable(value) for name, value in metadata.items()}
    return [storable(value) for value in metadata] if isinstance(metadata, (list, tuple)) else metadata


def _kept(all_: Mapping[str, Outline]) -> set[str]:
    """The latest checkpoint of a graph, and those that its DeltaChannels are rebuilt from."""
    latest = all_[max(all_)]
    kept = {latest.id}
    # A DeltaChannel that is not stored in full has counted what came since.
    missing = set(latest.metadata.get("counters_since_delta_snapshot") or ()) - set(latest.channels)
    parent = latest.parent_id
    while missing and parent in all_ and parent is not None:
        kept.add(parent)
        missing.difference_update(all_[parent].channels)
        parent = all_[parent].parent_id
    return kept


def _ended(ns: str, all_: Mapping[str, Outline], root: Mapping[str, Outline], kept: set[str]) -> bool:
    """Whether a subgraph's checkpoints are of a call (there is a task's id in *ns*) that began at one that goes."""
    began_at = (all_[max(all_)].metadata.get("parents") or {}).get("")
    return ":" in ns and began_at in root and began_at not in kept


def _runs_again(writes: Sequence[tuple[str, Any]]) -> bool:
    """Whether they are those of a task that failed, or waits for an answer."""
    return any(channel in (ERROR, INTERRUPT) for channel, _ in writes)


def _moment(position: str) -> Moment:
    """A transaction, with or without a snapshot, or a time."""
    is_transaction = position.partition(SNAPSHOT_MARK)[0].isalnum()
    return position if is_transaction else datetime.fromisoformat(position)


def _node_config() -> RunnableConfig:
    from langgraph.config import get_config

    try:
        return get_config()
    except RuntimeError as error:
        raise MemstateError("not in a node of a graph: give the config that it was called with") from error


def _execution(config: RunnableConfig) -> Execution:
    """The task that *config* was made for."""
    conf: Mapping[str, Any] = config.get("configurable", {})
    if not conf.get("__pregel_task_id") or not conf.get("checkpoint_ns"):
        raise MemstateError("not in a node of a graph that has a checkpointer")
    execution = Execution(conf)
    if execution.saves_nothing:
        raise MemstateError(
            "Cannot begin a step: the graph of this node has no checkpointer, so nothing is saved when the node "
            "returns. Compile it with this checkpointer, and its subgraphs without checkpointer=False"
        )
    if conf.get("__pregel_durability") == "exit":
        raise MemstateError("durability='exit' saves nothing before the run is over: run it with 'async' or 'sync'")
    return execution
