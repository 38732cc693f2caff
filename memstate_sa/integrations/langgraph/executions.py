"""A task that LangGraph is running: its place in the graphs, and its end.

LangGraph gives a checkpointer the writes of a task. It does not report a task that ends without writes. Such a task
leaves its graph by a Command to a parent, is cancelled, or is tried again. Only LangGraph's internal objects know it,
and only this module reads these objects. It supports LangGraph 1.2.
"""

from __future__ import annotations

import asyncio
import weakref
from collections.abc import AsyncIterator, Callable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, asynccontextmanager, contextmanager
from functools import partial
from typing import Any

from langchain_core.callbacks import BaseCallbackHandler
from langchain_core.runnables import RunnableConfig
from langgraph.config import get_config
from langgraph.errors import ParentCommand

from memstate_sa.errors import MemstateError
from memstate_sa.integrations.langgraph.checkpoint_rows import CheckpointKey
from memstate_sa.integrations.langgraph.node_transactions import StepLifetime, Task
from memstate_sa.integrations.langgraph.step_coordinator import StepCoordinator
from memstate_sa.integrations.langgraph.thread_ids import thread_id_of

_CALL = "__pregel_call"
"""The name, in a config, of the function that calls a ``@task`` in a node. It refers to the node's task and graph."""


class Execution(StepLifetime):
    """A running task, found by the *configurable* part of its config."""

    def __init__(self, conf: Mapping[str, Any]) -> None:
        try:
            call = conf[_CALL]
            keywords = call.keywords
            graph, self._task, self._futures = keywords["schedule_task"].__self__, call.args[0], keywords["futures"]
            if not graph.checkpointer:
                raise MemstateError(
                    "Cannot begin a step: the graph of this node has no checkpointer, so LangGraph saves nothing when "
                    "the node returns. Compile the graph with checkpointer=checkpointer, and its subgraphs without "
                    "checkpointer=False."
                )
            ns = graph.config["configurable"].get("checkpoint_ns") or ""
            checkpoint = CheckpointKey(thread_id_of(conf["thread_id"]), ns, graph.checkpoint["id"])
        except (AttributeError, KeyError, IndexError) as error:
            raise MemstateError(
                "Cannot find the graph that runs this task. This version of LangGraph is not supported. Use langgraph "
                "1.2."
            ) from error
        super().__init__(graph)
        self.loop = keywords.get("loop")
        info = getattr(conf.get("__pregel_runtime"), "execution_info", None)
        # All attempts of a task have the same scratchpad. A new task has a new one.
        run, number = conf.get("__pregel_scratchpad"), getattr(info, "node_attempt", 1)
        self.task = Task(checkpoint, str(conf["__pregel_task_id"]), run, number, str(conf.get("checkpoint_ns", "")))
        self._future: Callable[[], Any] | None = None

    @property
    def around(self) -> Execution | None:
        """The task that called the graph."""
        conf = self.graph.config["configurable"]
        return Execution(conf) if _CALL in conf else None

    # -- waiting ---------------------------------------------------------------------------------------------------

    @contextmanager
    def waiting(self) -> Iterator[None]:
        """Lend a thread to this graph, and to the graphs around it, while this one waits. Other nodes may need it."""
        with ExitStack() as stack:
            for execution in self._chain():
                if isinstance(executor := execution.executor, ThreadPoolExecutor):
                    stack.enter_context(_lend_thread(executor))
                if (limit := execution.limit) is not None:
                    stack.enter_context(_lend_permit(limit, execution.loop))
            yield

    @asynccontextmanager
    async def awaiting(self) -> AsyncIterator[None]:
        """Do the same as `waiting`, in a coroutine."""
        limits = [execution.limit for execution in self._chain() if execution.limit is not None]
        for limit in limits:
            limit.release()
        yield
        for limit in limits:  # an error skips this, because the coroutine ends
            await limit.acquire()

    def _chain(self) -> Iterator[Execution]:
        """This task, and the tasks around it."""
        execution: Execution | None = self
        while execution is not None:
            yield execution
            execution = execution.around

    @property
    def limit(self) -> asyncio.Semaphore | None:
        """The semaphore of an async graph, which limits its nodes and saves to ``max_concurrency`` at a time."""
        return getattr(self.graph.submit.__self__, "semaphore", None)

    @property
    def executor(self) -> Any:
        """The thread pool for the graph's sync nodes: its own, or the event loop's for an async graph."""
        return getattr(self.graph.submit.__self__, "executor", None) or getattr(self.loop, "_default_executor", None)

    # -- its end ---------------------------------------------------------------------------------------------------

    def watch(self, steps: StepCoordinator, task: Task) -> None:
        """Report the end of this execution to *steps*.

        *task* is its own task, or a task inside it that left its graph by a Command to this one.
        """
        manager = self._task().config.get("callbacks")
        if manager is not None:
            manager.add_handler(_NextAttempt(self.task.path, partial(steps.drop, task)), inherit=False)
        if (future := self._known_future()) is not None:
            future.add_done_callback(partial(_future_ends, steps, task, self.task.checkpoint.ns))
        elif (futures := self._futures()) is not None:
            _Endings.of(futures).listen(self.task.id, partial(self._ends_unseen, steps, task))
        self.graph.stack.push(partial(self._graph_ends, steps, task))

    def _known_future(self) -> Any:
        """The task's future. None if LangGraph runs the task itself, or has not stored the future yet."""
        futures, task = self._futures(), self._task()
        if self._future is None and futures is not None:
            future = next((future for future, other in list(futures.items()) if other is task), None)
            self._future = None if future is None else weakref.ref(future)
        return None if self._future is None else self._future()

    def _ends_unseen(self, steps: StepCoordinator, task: Task, future: Any) -> None:
        """Keep the *future* of a task whose step began before the task had a future. LangGraph drops it too early."""
        self._future = lambda: future
        _future_ends(steps, task, self.task.checkpoint.ns, future)

    def _graph_ends(self, steps: StepCoordinator, task: Task, _: Any, error: BaseException | None, __: Any) -> None:
        """Hand the step over to the parent's task, or give it up if LangGraph will not save its task."""
        if error is None or self._is_saved() or steps.find(task) is None:
            return
        future = self._known_future()
        if future is not None and not future.done():
            return  # LangGraph saves the task when it ends
        task_error = error if future is None else _error(future)
        if task_error is not error or not isinstance(error, ParentCommand):
            steps.give_up(task)
            return
        parent = self.around
        if (
            parent is None
            or parent.graph.checkpointer is not self.graph.checkpointer
            or parent.graph.durability == "exit"
        ):
            steps.give_up(task)
            raise MemstateError(
                "Cannot save the changes of this step. Its node left by a Command to a parent that does not save "
                "checkpoints during the run. Compile the parent with the same checkpointer, and run it with "
                "durability='async' or 'sync'."
            ) from error
        steps.hand_over(task, parent.task, parent)
        parent.watch(steps, task)

    def _is_saved(self) -> bool:
        """Whether LangGraph has saved the writes of the task, or will do so."""
        graph, task = self.graph, self.task
        saved_tasks = {task_id for task_id, *_ in graph.checkpoint_pending_writes}
        return graph.checkpoint["id"] != task.checkpoint.id or task.id in saved_tasks


def node_config() -> RunnableConfig:
    """The config of the running node."""
    try:
        return get_config()
    except RuntimeError as error:
        raise MemstateError(
            "This code is not running in a node. Call it in a node, or pass the node's config."
        ) from error


def execution_of(config: RunnableConfig) -> Execution:
    """The running task to which *config* belongs."""
    conf: Mapping[str, Any] = config.get("configurable", {})
    if not conf.get("__pregel_task_id") or not conf.get("checkpoint_ns"):
        raise MemstateError(
            "Cannot begin a step: this config is not from a node of a graph with a checkpointer. Call step() in a node."
        )
    execution = Execution(conf)
    if conf.get("__pregel_durability") == "exit":
        raise MemstateError(
            "Cannot begin a step: with durability='exit' nothing is saved before the run ends. Run the graph with "
            "durability='async' or 'sync'."
        )
    return execution


class _Endings:
    """A replacement for LangGraph's callback at the end of a task. It also calls our listeners.

    It is needed because LangGraph starts a task's thread before it stores the task's future. A step that begins in
    between has no future to watch.
    """

    def __init__(self, callback: Callable[[], Callable[[Any, BaseException | None], None] | None]) -> None:
        self._callback = callback
        self._listeners: dict[str, list[Callable[[Future[None]], None]]] = {}

    @classmethod
    def of(cls, futures: Any) -> _Endings:
        """The replacement in *futures*. Threads that call this at the same time get the same one."""
        endings: _Endings = vars(futures).setdefault("memstate_endings", cls(futures.callback))
        futures.callback = endings
        return endings

    def listen(self, task_id: str, listener: Callable[[Future[None]], None]) -> None:
        self._listeners.setdefault(task_id, []).append(listener)

    def __call__(self) -> Callable[[Any, BaseException | None], None]:
        """The callback. LangGraph expects a weak reference here, and calls it to get the callback."""
        return self._on_end

    def _on_end(self, task: Any, error: BaseException | None) -> None:
        if (callback := self._callback()) is not None:
            callback(task, error)
        future: Future[None] = Future()
        if error is None:
            future.set_result(None)
        else:
            future.set_exception(error)
        for listener in self._listeners.pop(task.id, ()):
            listener(future)


class _NextAttempt(BaseCallbackHandler):
    """Calls a function when LangGraph tries the task at *path* again. LangGraph reports this in no other way.

    ``@task`` functions share the callbacks of the node that calls them, so events of other paths arrive here too.
    """

    run_inline = True

    def __init__(self, path: str, on_attempt: Callable[[], None]) -> None:
        self._path, self._on_attempt = path, on_attempt

    def on_chain_start(self, *_: Any, metadata: Mapping[str, Any] | None = None, **__: Any) -> None:
        if (metadata or {}).get("langgraph_checkpoint_ns") == self._path:
            self._on_attempt()


def _future_ends(steps: StepCoordinator, task: Task, ns: str, future: Any) -> None:
    if isinstance(_error(future), ParentCommand):
        steps.leave_graph(task, ns)


def _error(future: Any) -> BaseException | None:
    error: BaseException | None = None if future.cancelled() else future.exception()
    return error


@contextmanager
def _lend_permit(limit: asyncio.Semaphore, loop: asyncio.AbstractEventLoop) -> Iterator[None]:
    """Let one more coroutine run while one of them waits."""
    loop.call_soon_threadsafe(limit.release)
    yield
    asyncio.run_coroutine_threadsafe(limit.acquire(), loop).result()


@contextmanager
def _lend_thread(executor: Any) -> Iterator[None]:
    """Give a ThreadPoolExecutor one more thread while one of its threads waits."""
    # There is no public way to change the number of threads.
    with executor._shutdown_lock:
        executor._max_workers += 1
        # _adjust_thread_count starts no thread if one seems idle. The count of idle threads may be too high, so repeat.
        while not executor._shutdown and len(executor._threads) < executor._max_workers:
            executor._adjust_thread_count()
    try:
        yield
    finally:
        with executor._shutdown_lock:
            executor._max_workers -= 1
