"""LangGraph's checkpointer interface: save, read, copy and delete checkpoints, with sync and async methods."""

from __future__ import annotations

import asyncio
import random
from collections.abc import AsyncIterator, Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, nullcontext
from contextvars import copy_context
from functools import partial
from typing import Any, ParamSpec, TypeVar

from langchain_core.runnables import RunnableConfig
from langgraph.checkpoint.base import (
    WRITES_IDX_MAP,
    BaseCheckpointSaver,
    ChannelVersions,
    Checkpoint,
    CheckpointMetadata,
    CheckpointTuple,
    DeltaChannelHistory,
)
from langgraph.checkpoint.serde.base import SerializerProtocol
from langgraph.checkpoint.serde.types import ERROR, INTERRUPT
from sqlalchemy.engine import Connection, Engine
from sqlalchemy.orm import sessionmaker

from memstate_sa.db.dialects import database_of
from memstate_sa.errors import ConflictError, MemstateError
from memstate_sa.integrations.langgraph import (
    checkpoint_inserts,
    checkpoint_pruning,
    checkpoint_queries,
    thread_leases,
    thread_rows,
)
from memstate_sa.integrations.langgraph.checkpoint_codec import EncodedCheckpoint, config_of, decoded, encoded_writes
from memstate_sa.integrations.langgraph.checkpoint_queries import CheckpointQuery
from memstate_sa.integrations.langgraph.checkpoint_rows import CheckpointKey, NewCheckpoint, TaskWrite
from memstate_sa.integrations.langgraph.delta_history import delta_history
from memstate_sa.integrations.langgraph.node_transactions import StepSession
from memstate_sa.integrations.langgraph.step_coordinator import StepCoordinator
from memstate_sa.integrations.langgraph.sync_engines import room_for_steps
from memstate_sa.integrations.langgraph.thread_ids import checkpoint_id_of, configured, graph_of, thread_id_of
from memstate_sa.memory import Memory
from memstate_sa.runtime import forks

P = ParamSpec("P")
T = TypeVar("T")

AS_OF = "memstate_as_of"
"""The name, in a config, of the moment for which a run reads facts."""
_RUNTIME = "__pregel_runtime"
"""The name, in a config, of an object that identifies a run. All saves of the run have the same object."""
_PAGE = 50
_THREADS = {"read": 8, "save": 16, "begin": 32, "step": 32, "settle": 16}
"""The number of threads for asyncio's calls, by kind of call."""


class CheckpointSaver(BaseCheckpointSaver[str]):
    """The part of `MemStateCheckpointer` that LangGraph calls."""

    def __init__(self, engine: Engine, memory: Memory | None, serde: SerializerProtocol, step_timeout_s: float) -> None:
        super().__init__(serde=serde)
        self.memory = memory
        self.engine = engine
        self._autocommit = self._read_committed = engine
        if not database_of(engine).has_one_writer:
            # BEGIN and COMMIT take longer than the one statement between them. On SQLite, autocommit would be slower.
            self._autocommit = engine.execution_options(isolation_level="AUTOCOMMIT")
            # At a higher isolation level of the application, a late writer would fail instead of seeing new commits.
            self._read_committed = engine.execution_options(isolation_level="READ COMMITTED")
        self._sessions = sessionmaker(engine)
        step_sessions = sessionmaker(engine, class_=StepSession, expire_on_commit=False)
        if memory is not None:
            memory.attach(self._sessions)
            memory.attach(step_sessions)
        self._steps = StepCoordinator(step_sessions, step_timeout_s, room_for_steps(engine))
        self._make_threads()
        forks.in_child(self, CheckpointSaver._make_threads)

    def _make_threads(self) -> None:
        # Each kind has separate threads, because all threads of one kind may wait for threads of another kind.
        self._threads = {kind: ThreadPoolExecutor(count, f"memstate-{kind}") for kind, count in _THREADS.items()}

    # -- saving ----------------------------------------------------------------------------------------------------

    def put(
        self,
        config: RunnableConfig,
        checkpoint: Checkpoint,
        metadata: CheckpointMetadata,
        new_versions: ChannelVersions,
    ) -> RunnableConfig:
        """Save a checkpoint. Its parent is the checkpoint in *config*.

        This call waits until the tasks of the previous superstep have committed their writes. Raises StaleRun if
        another run has taken over the thread.
        """
        conf = config["configurable"]
        key = CheckpointKey(*graph_of(config), checkpoint["id"])
        parent_id, run = conf.get("checkpoint_id"), conf.get(_RUNTIME)
        try:
            self._steps.check_around(key.thread_id, key.ns)
            self._steps.wait_for_tasks(key.thread_id, key.ns, parent_id, run)
            job = partial(self._put, config, key, checkpoint, metadata, new_versions)
            self._steps.save(key.thread_id, key.ns, run, job, checkpoint=True)
        except BaseException as error:
            self._steps.save_failed(key.thread_id, key.ns, error, run)
            raise
        return config_of(key)

    def _put(
        self,
        config: RunnableConfig,
        key: CheckpointKey,
        checkpoint: Checkpoint,
        metadata: CheckpointMetadata,
        new_versions: ChannelVersions,
    ) -> None:
        conf = config["configurable"]
        encoded = EncodedCheckpoint(self.serde, config, checkpoint, metadata)
        row = encoded.row(key, conf.get("checkpoint_id"), conf.get(AS_OF) or self.memory is not None)
        new_blobs = encoded.blobs(new_versions)
        with self._writing(config) as connection:
            follows = row.parent_id is not None
            is_stored = checkpoint_inserts.put_checkpoint(connection, row, new_blobs, follows=follows)
        if not is_stored:
            self._put_without_parent(config, key, encoded, row)
        self._steps.checkpoint_saved(key)

    def _put_without_parent(
        self, config: RunnableConfig, key: CheckpointKey, encoded: EncodedCheckpoint, row: NewCheckpoint
    ) -> None:
        """Save a checkpoint with all its blobs after its parent was deleted, perhaps during this run."""
        if encoded.delta_channels:
            raise ConflictError(
                f"Cannot save a checkpoint of thread {key.thread_id!r}. Its parent was deleted, and its DeltaChannels "
                "need the parent. Run the graph again from the thread's latest checkpoint."
            )
        with self._read_committed.begin() as connection:
            thread_leases.renew_configured(connection, config)
            thread_rows.lock_threads(connection, [key.thread_id])
            checkpoint_inserts.put_checkpoint(connection, row, encoded.blobs(encoded.channels))

    def put_writes(
        self,
        config: RunnableConfig,
        writes: Sequence[tuple[str, Any]],
        task_id: str,
        task_path: str = "",
    ) -> None:
        """Save the writes of a task, and commit its open `step` in the same transaction.

        If the task failed or waits for an answer, it will run again, so its step is rolled back.
        """
        conf = config["configurable"]
        key = CheckpointKey(*graph_of(config), str(conf["checkpoint_id"]))
        run = conf.get(_RUNTIME)
        with self._steps.settle(key, task_id, run, commits=not _will_run_again(writes)) as step_connection:
            rows = encoded_writes(self.serde, writes, task_id, task_path)
            # Only errors, interrupts and answers replace existing writes.
            replace = all(channel in WRITES_IDX_MAP for channel, _ in writes)
            if step_connection is None:
                job = partial(self._put_writes, config, key, rows, replace=replace)
                self._steps.save(key.thread_id, key.ns, run, job)
            else:
                self._put_writes(config, key, rows, step_connection, replace=replace)

    def _put_writes(
        self,
        config: RunnableConfig,
        key: CheckpointKey,
        rows: Sequence[TaskWrite],
        step_connection: Connection | None = None,
        *,
        replace: bool,
    ) -> None:
        with self._writing(config, step_connection) as connection:
            checkpoint_inserts.put_writes(connection, key, rows, replace=replace)

    @contextmanager
    def _writing(self, config: RunnableConfig, step_connection: Connection | None = None) -> Iterator[Connection]:
        """*step_connection*, or a new connection. On PostgreSQL, a new one is in autocommit, unless runs use leases."""
        engine = self._read_committed if thread_leases.is_leased(config) else self._autocommit
        with engine.begin() if step_connection is None else nullcontext(step_connection) as connection:
            thread_leases.renew_configured(connection, config)
            yield connection

    # -- reading ---------------------------------------------------------------------------------------------------

    def get_tuple(self, config: RunnableConfig) -> CheckpointTuple | None:
        """The checkpoint in *config*, or the latest of its thread and graph. One statement reads it."""
        thread_id, ns = graph_of(config)
        self._steps.run_begins(thread_id, ns)
        with self._autocommit.connect() as connection:
            stored = checkpoint_queries.get_checkpoint(connection, thread_id, ns, checkpoint_id_of(config))
        if stored is None:
            return None
        # Report the checkpoint now, because it may be pruned before a task at this checkpoint begins a step.
        self._steps.checkpoint_saved(stored.key)
        return decoded(self.serde, stored, positioned=self.memory is not None)

    def list(
        self,
        config: RunnableConfig | None,
        *,
        filter: dict[str, Any] | None = None,  # noqa: A002  # as LangGraph calls it
        before: RunnableConfig | None = None,
        limit: int | None = None,
    ) -> Iterator[CheckpointTuple]:
        """The checkpoints of the thread, graph and id in *config*, newest first. They are read in pages.

        Without *config*, these are the checkpoints of all threads. Raises InvalidThread for a *config* without a
        thread.

        *filter* is a condition on metadata. Values are compared as JSON. None matches null and a missing name.
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
            ns = None  # None means all graphs of the thread
        query = CheckpointQuery(thread_id, ns, checkpoint_id_of(config), checkpoint_id_of(before))
        remaining = limit
        while remaining is None or remaining > 0:
            size = _PAGE if remaining is None else min(_PAGE, remaining)
            with self._autocommit.connect() as connection:
                page = checkpoint_queries.page(connection, query, filter_ or {}, size)
            yield [decoded(self.serde, stored, positioned=self.memory is not None) for stored in page]
            if len(page) < size:
                return
            query = query._replace(after=page[-1].key)
            remaining = None if remaining is None else remaining - size

    def get_delta_channel_history(
        self, *, config: RunnableConfig, channels: Sequence[str]
    ) -> Mapping[str, DeltaChannelHistory]:
        """The writes to each of *channels* up to a checkpoint, since the channel was last stored in full."""
        if not channels:
            return {}
        return delta_history(self.engine, self.serde, graph_of(config), checkpoint_id_of(config), channels)

    # -- threads and runs ------------------------------------------------------------------------------------------

    def delete_thread(self, thread_id: str, *, facts: bool = False) -> None:
        """Delete a thread's checkpoints. With *facts*, the same transaction also undoes the changes of its steps.

        Facts that others have changed later stay (see `Memory.revoke`).
        """
        thread_id = thread_id_of(thread_id)
        if not facts:
            with self._read_committed.begin() as connection:
                thread_rows.delete_threads(connection, [thread_id])
            return
        if self.memory is None:
            raise MemstateError(
                "Cannot use facts=True: this checkpointer knows no facts. Create it with a MemoryStore or with memory=."
            )
        with self._sessions.begin() as session:
            self.memory.revoke(session, session_id=thread_id)
            thread_rows.delete_threads(session.connection(), [thread_id])

    def delete_for_runs(self, run_ids: Sequence[str]) -> None:
        """Delete the checkpoints of runs, by the ``run_id`` in their metadata.

        Their children become children of the nearest remaining ancestor. DeltaChannels lose the deleted writes.
        """
        if not run_ids:
            return
        with self._read_committed.begin() as connection:
            checkpoint_pruning.delete_runs(connection, {str(id_) for id_ in run_ids})

    def copy_thread(self, source_thread_id: str, target_thread_id: str) -> None:
        """Copy a whole thread within the database, with ancestors and blobs."""
        source, target = thread_id_of(source_thread_id), thread_id_of(target_thread_id)
        with self._read_committed.begin() as connection:
            thread_rows.copy_thread(connection, source, target)

    def prune(self, thread_ids: Sequence[str], *, strategy: str = "keep_latest") -> None:
        """Delete all checkpoints of threads ("delete"), or all except the latest of each graph ("keep_latest").

        In a thread with DeltaChannels, the ancestors that rebuild the latest checkpoint stay too. The checkpoints of a
        subgraph's call are deleted together with the checkpoint at which the call began.
        """
        if isinstance(thread_ids, str):
            raise TypeError("Invalid thread_ids: pass a sequence of thread ids, not a string.")
        if strategy not in ("keep_latest", "delete"):
            raise ValueError(f"Invalid strategy={strategy!r}: use 'keep_latest' or 'delete'.")
        thread_ids = [thread_id_of(thread_id) for thread_id in thread_ids]
        if strategy == "delete":
            with self._read_committed.begin() as connection:
                thread_rows.delete_threads(connection, thread_ids)
            return
        for thread_id in thread_ids:
            with self._read_committed.begin() as connection:
                checkpoint_pruning.prune_thread(connection, thread_id)

    def get_next_version(self, current: str | None, channel: None) -> str:  # noqa: ARG002
        """A version greater than *current*. It is unique among forks, because blobs are stored by version."""
        number = 0 if current is None else int(str(current).split(".")[0])
        return f"{number + 1:08}.{random.getrandbits(48):012x}"

    # -- asyncio: the same methods, in threads ---------------------------------------------------------------------
    # They do not use asyncio's default threads, because sync nodes run there, and wait for the saves.

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
        # A call that ends a step has separate threads. In the others, all calls may be waiting for that step.
        if _will_run_again(writes) and self._steps.is_open(thread_id, task_id):
            await self._in_thread("settle", self._steps.roll_back, thread_id, task_id)
        ends_a_step = self._steps.is_open(thread_id, task_id) or self._steps.would_postpone(thread_id, ns)
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
            for checkpoint in page:
                yield checkpoint

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


def _will_run_again(writes: Sequence[tuple[str, Any]]) -> bool:
    """Whether *writes* come from a task that failed or waits for an answer."""
    return any(channel in (ERROR, INTERRUPT) for channel, _ in writes)
