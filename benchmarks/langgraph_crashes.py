"""An agent that is killed many times. Is the fact of each step exactly once in the database?

The same graph runs in two ways. With `step`, facts commit in the steps of our checkpointer. With `apart`, LangGraph's
own saver is used, and nodes commit facts themselves.
"""

from __future__ import annotations

import itertools
import multiprocessing
import operator
import random
import signal
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple, TypeAlias, TypedDict

from langgraph.graph import START, StateGraph
from sqlalchemy import Engine, create_engine, event, make_url, select
from sqlalchemy.orm import DeclarativeBase, Mapped, Session, mapped_column, sessionmaker

from memstate_sa import Memory
from memstate_sa.db import sqlite
from memstate_sa.indexes import InMemoryIndex
from memstate_sa.integrations.langgraph.checkpointer import MemStateCheckpointer
from memstate_sa.testing import HashEmbedder

Way: TypeAlias = Literal["step", "apart"]
NODES = ("plan", "left", "right", "think", "answer")
"""`left` and `right` run at the same time. `think` writes only to the state."""


class Base(DeclarativeBase):
    pass


class Effect(Base):
    """The effect of a node outside the state. Each has a new key, so a doubled effect is two rows."""

    __tablename__ = "effect"
    id: Mapped[int] = mapped_column(primary_key=True)
    thread: Mapped[str]
    node: Mapped[str]


class State(TypedDict, total=False):
    thread: str
    trail: Annotated[list[str], operator.add]


def _engine(url: str) -> Engine:
    engine = create_engine(url)
    if engine.dialect.name == "sqlite":
        sqlite.configure(engine)
        # Only processes are killed, not machines, so there is no need to wait for the disk.
        event.listen(engine, "connect", lambda dbapi, _: dbapi.execute("PRAGMA synchronous = OFF"))
    return engine


@contextmanager
def _own_saver(url: str) -> Iterator[Any]:
    """LangGraph's own saver."""
    if url.startswith("sqlite"):
        from langgraph.checkpoint.sqlite import SqliteSaver

        with SqliteSaver.from_conn_string(f"{make_url(url).database}.checkpoints") as saver:
            yield saver
    else:
        from langgraph.checkpoint.postgres import PostgresSaver

        with PostgresSaver.from_conn_string(url.replace("+psycopg", "")) as saver:
            saver.setup()
            yield saver


class Agent:
    def __init__(self, engine: Engine, saver: Any, way: Way) -> None:
        self.memory = Memory(InMemoryIndex(), embedder=HashEmbedder())
        self.memory.track(Effect, text="node")
        self.sessions = sessionmaker(engine)
        self.memory.attach(self.sessions)
        Base.metadata.create_all(engine)
        self.memory.create_tables(engine)
        self._saver = MemStateCheckpointer(engine, memory=self.memory) if way == "step" else saver
        builder = StateGraph(State)
        for name in NODES:
            builder.add_node(name, self._node(name))
        builder.add_edge(START, "plan").add_edge("plan", "left").add_edge("plan", "right")
        builder.add_edge(["left", "right"], "think").add_edge("think", "answer")
        self.graph = builder.compile(checkpointer=self._saver)

    def _node(self, name: str) -> Any:
        def node(state: State) -> State:
            if name != "think":
                with self._session() as session:
                    session.add(Effect(thread=state["thread"], node=name))
            return {"trail": [name]}

        return node

    @contextmanager
    def _session(self) -> Iterator[Session]:
        if isinstance(self._saver, MemStateCheckpointer):
            with self._saver.step() as session:
                yield session
        else:
            with self.sessions.begin() as session:
                yield session

    def finish(self, thread: str) -> None:
        """Run a thread from its present state to its end."""
        config: Any = {"configurable": {"thread_id": thread}}
        has_begun = self._saver.get_tuple(config) is not None
        # Do not check for next tasks: a task with saved writes is none, but its writes must still be applied.
        self.graph.invoke(None if has_begun else {"thread": thread, "trail": []}, config)


class Verdict(NamedTuple):
    """The wrong effects of finished threads."""

    threads: int
    doubled: list[str]
    lost: list[str]


@contextmanager
def _agent(url: str, way: Way) -> Iterator[Agent]:
    engine = _engine(url)
    try:
        if way == "step":
            yield Agent(engine, None, way)
        else:
            with _own_saver(url) as saver:
                yield Agent(engine, saver, way)
    finally:
        engine.dispose()


def play(url: str, folder: Path, way: Way, started: Connection) -> None:
    """Finish the last thread, report it, and run one new thread after the other until the process is killed."""
    log = folder / "begun.log"
    log.touch()
    with _agent(url, way) as agent, log.open("a") as file:
        for thread in log.read_text().split()[-1:]:
            agent.finish(thread)
        for number in itertools.count():
            thread = f"t{time.time_ns()}"
            file.write(thread + "\n")
            file.flush()
            if number == 0:
                started.send("ready")
            agent.finish(thread)


def check(url: str, folder: Path, way: Way) -> Verdict:
    """Finish the last thread, and compare the effects of all threads with the expected ones."""
    threads = (folder / "begun.log").read_text().split()
    with _agent(url, way) as agent:
        for thread in threads:
            agent.finish(thread)
        with agent.sessions() as session:
            rows = session.execute(select(Effect.thread, Effect.node)).all()
    effects = Counter(f"{thread} {node}" for thread, node in rows)
    expected = {f"{thread} {node}" for thread in threads for node in NODES if node != "think"}
    doubled = sorted(name for name, count in effects.items() if count > 1)
    return Verdict(len(threads), doubled, sorted(expected - effects.keys()))


def kill_again_and_again(url: str, folder: Path, way: Way, kills: int, seed: int) -> Verdict:
    """Start an agent on the same database and kill it at a random moment, *kills* times."""
    chance = random.Random(seed)
    processes = multiprocessing.get_context("forkserver")  # this imports the modules only once for all runs
    processes.set_forkserver_preload([__name__])
    for kill in range(kills):
        receiver, sender = processes.Pipe(duplex=False)
        child = processes.Process(target=play, args=(url, folder, way, sender))
        child.start()
        sender.close()
        try:
            ready = receiver.recv()
        except EOFError:
            ready = "nothing"
        if ready != "ready":
            raise RuntimeError(f"Run {kill} did not start.")
        time.sleep(chance.uniform(0.0, 0.06))
        child.kill()
        child.join()
        if child.exitcode != -signal.SIGKILL:
            raise RuntimeError(f"Run {kill} ended by itself: {child.exitcode}.")
    return check(url, folder, way)
