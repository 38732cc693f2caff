"""A task while LangGraph executes it: where it is, and how it ends.

LangGraph gives a checkpointer what a task has written. It reports no task that ends without writes: one that leaves
its graph by a Command to a parent, that is cancelled, or that is tried again. Only its own objects know.
This module reads them, and it alone. They are those of LangGraph 1.2.
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
"""The function by which a node calls a ``@task``: it knows the node's task, and its graph."""


class Execution(StepLifetime):
    """A running task, by the *configurable* part of its config."""

    def __init__(self, conf: Mapping[str, Any]) -> None:
        try:
            call = conf[_CALL]
            keywords = call.keywords
            graph, self._task, self._futures = keywords["schedule_task"].__self__, call.args[0], keywords["futures"]
            ns = graph.config["configurable"].get("checkpoint_ns") or ""
            checkpoint = CheckpointKey(thread_id_of(conf["thread_id"]), ns, graph.checkpoint["id"])
        except (AttributeError, KeyError, IndexError) as error:
            raise MemstateError(
                "Cannot find the graph that runs this task: this version of LangGraph is not known. Use langgraph 1.2"
            ) from error
        super().__init__(graph)
        self.loop = keywords.get("loop")
        info = getattr(conf.get("__pregel_runtime"), "execution_info", None)
        # A new task has a new scratchpad.
        run, number = conf.get("__pregel_scratchpad"), getattr(info, "node_attempt", 1)
        self.task = Task(checkpoint, str(conf["__pregel_task_id"]), run, number, str(conf.get("checkpoint_ns", "")))
        self._future: Callable[[], Any] | None = None

    @property
    def saves_nothing(self) -> bool:
        """Whether the graph has no checkpointer."""
        return not self.graph.checkpointer

    @property
    def around(self) -> Execution | None:
        """The task that has called the graph."""
        conf = self.graph.config["configurable"]
        return Execution(conf) if _CALL in conf else None

    # -- waiting ---------------------------------------------------------------------------------------------------

    @contextmanager
    def waiting(self) -> Iterator[None]:
        """Lend a thread to each graph that this one keeps waiting: what it waits for may need one."""
        with ExitStack() as stack:
            for execution in self._chain():
                if isinstance(executor := execution.executor, ThreadPoolExecutor):
                    stack.enter_context(_lend_thread(executor))
                if (limit := execution.limit) is not None:
                    stack.enter_context(_lend_permit(limit, execution.loop))
            yield

    @asynccontextmanager
    async def awaiting(self) -> AsyncIterator[None]:
        """Do as `waiting` does, in a coroutine."""
        limits = [execution.limit for execution in self._chain() if execution.limit is not None]
        for limit in limits:
            limit.release()
        yield
        for limit in limits:  # not of a coroutine that has failed: it does nothing more
            await limit.acquire()

    def _chain(self) -> Iterator[Execution]:
        """This task, and those around it."""
        execution: Execution | None = self
        while execution is not None:
            yield execution
            execution = execution.around

    @property
    def limit(self) -> asyncio.Semaphore | None:
        """The semaphore of a graph of coroutines: ``max_concurrency`` of its nodes and saves run at a time."""
        return getattr(self.graph.submit.__self__, "semaphore", None)

    @property
    def executor(self) -> Any:
        """The threads of the graph's functions: its own, or, if it runs coroutines, those of their event loop."""
        return getattr(self.graph.submit.__self__, "executor", None) or getattr(self.loop, "_default_executor", None)

    # -- how it ends -----------------------------------------------------------------------------------------------

    def watch(self, steps: StepCoordinator, task: Task) -> None:
        """Report to *steps* how this execution ends: *task* is its own, or one that it has called and that has left."""
        manager = self._task().config.get("callbacks")
        if manager is not None:
            manager.add_handler(_NextAttempt(self.task.path, partial(steps.drop, task)), inherit=False)
        if (future := self._known_future()) is not None:
            future.add_done_callback(partial(_future_ends, steps, task, self.task.checkpoint.ns))
        elif (futures := self._futures()) is not None:
            _Endings.of(futures).listen(self.task.id, partial(self._ends_unseen, steps, task))
        self.graph.stack.push(partial(self._graph_ends, steps, task))

    def _known_future(self) -> Any:
        """The future that LangGraph waits for. None: it runs the task itself, or has not stored the future yet."""
        futures, task = self._futures(), self._task()
        if self._future is None and futures is not None:
            future = next((future for future, other in list(futures.items()) if other is task), None)
            self._future = None if future is None else weakref.ref(future)
        return None if self._future is None else self._future()

    def _ends_unseen(self, steps: StepCoordinator, task: Task, future: Any) -> None:
        """Keep the *future* of a task that had none when its step began. LangGraph drops it before the graph ends."""
        self._future = lambda: future
        _future_ends(steps, task, self.task.checkpoint.ns, future)

    def _graph_ends(self, steps: StepCoordinator, task: Task, _: Any, error: BaseException | None, __: Any) -> None:
        """Give up the writes that LangGraph will not save, or hand them over to the parent."""
        if error is None or self._is_saved() or steps.find(task) is None:
            return
        future = self._known_future()
        if future is not None and not future.done():
            return  # it is saved when it has ended
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
                "Cannot save what this step wrote: its node left by a Command to a graph that saves no checkpoints as "
                "it goes. Compile the parent with the same checkpointer, and run it with durability='async' or 'sync'"
            ) from error
        steps.hand_over(task, parent.task, parent)
        parent.watch(steps, task)

    def _is_saved(self) -> bool:
        """Whether LangGraph has saved what the task wrote, or will."""
        graph, task = self.graph, self.task
        saved_tasks = {task_id for task_id, *_ in graph.checkpoint_pending_writes}
        return graph.checkpoint["id"] != task.checkpoint.id or task.id in saved_tasks


def node_config() -> RunnableConfig:
    """The config of the node that runs here."""
    try:
        return get_config()
    except RuntimeError as error:
        raise MemstateError("not in a node of a graph: give the config that it was called with") from error


def execution_of(config: RunnableConfig) -> Execution:
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


class _Endings:
    """A replacement for the callback that LangGraph calls when a task has ended. It calls our listeners, too.

    LangGraph starts a task's thread before it stores the task's future. A step that begins in between finds no future.
    """

    def __init__(self, callback: Callable[[], Callable[[Any, BaseException | None], None] | None]) -> None:
        self._callback = callback
        self._listeners: dict[str, list[Callable[[Future[None]], None]]] = {}

    @classmethod
    def of(cls, futures: Any) -> _Endings:
        """The replacement in *futures*. Several threads may ask for it at once, and get the same one."""
        endings: _Endings = vars(futures).setdefault("memstate_endings", cls(futures.callback))
        futures.callback = endings
        return endings

    def listen(self, task_id: str, listener: Callable[[Future[None]], None]) -> None:
        self._listeners.setdefault(task_id, []).append(listener)

    def __call__(self) -> Callable[[Any, BaseException | None], None]:
        """The callback. LangGraph keeps a weak reference to it, and calls that first."""
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
    """Calls a function when LangGraph tries the task of a *path* again. LangGraph reports that in no other way.

    Functions under ``@task`` share the callbacks of the node that calls them. So this hears when others begin, too.
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
    """Let one more coroutine run, as one only waits."""
    loop.call_soon_threadsafe(limit.release)
    yield
    asyncio.run_coroutine_threadsafe(limit.acquire(), loop).result()


@contextmanager
def _lend_thread(executor: Any) -> Iterator[None]:
    """Let a ThreadPoolExecutor have one thread more, as one of its own only waits."""
    # Nothing public changes how many it has.
    with executor._shutdown_lock:
        executor._max_workers += 1
        # It starts none while it believes that one is idle. That may be wrong: it counts those as idle that went on.
        while not executor._shutdown and len(executor._threads) < executor._max_workers:
            executor._adjust_thread_count()
    try:
        yield
    finally:
        with executor._shutdown_lock:
            executor._max_workers -= 1
