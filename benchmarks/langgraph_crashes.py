"""An agent that is killed again and again: does each step's fact end up in the database once?

The same graph with its facts committed in its steps (`step`), and as it is done without: LangGraph's own saver, and
nodes that commit by themselves (`apart`).
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
"""`left` and `right` run at the same time; `think` writes to the state alone."""


class Base(DeclarativeBase):
    pass


class Effect(Base):
    """What a node did, outside of the state: a key of its own each time, so that twice is two rows."""

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
        # Processes are killed, not machines: waiting for the disk would show nothing more.
        event.listen(engine, "connect", lambda dbapi, _: dbapi.execute("PRAGMA synchronous = OFF"))
    return engine


@contextmanager
def _own_saver(url: str) -> Iterator[Any]:
    """LangGraph's own."""
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
        """Run a thread from wherever it is to its end."""
        config: Any = {"configurable": {"thread_id": thread}}
        begun = self._saver.get_tuple(config) is not None
        # Not asked for what is next: a task whose writes are saved is not, and yet they are still to be applied.
        self.graph.invoke(None if begun else {"thread": thread, "trail": []}, config)


class Verdict(NamedTuple):
    """What is wrong with the effects of threads that have come to their end."""

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
    """Finish what was begun, say so, and begin one thread after the other until the process is killed."""
    begun = folder / "begun.log"
    begun.touch()
    with _agent(url, way) as agent, begun.open("a") as file:
        for thread in begun.read_text().split()[-1:]:
            agent.finish(thread)
        for number in itertools.count():
            thread = f"t{time.time_ns()}"
            file.write(thread + "\n")
            file.flush()
            if number == 0:
                started.send("ready")
            agent.finish(thread)


def check(url: str, folder: Path, way: Way) -> Verdict:
    """Finish the last thread, and compare all of them with what they should have done."""
    threads = (folder / "begun.log").read_text().split()
    with _agent(url, way) as agent:
        for thread in threads:
            agent.finish(thread)
        with agent.sessions() as session:
            rows = session.execute(select(Effect.thread, Effect.node)).all()
    found = Counter(f"{thread} {node}" for thread, node in rows)
    expected = {f"{thread} {node}" for thread in threads for node in NODES if node != "think"}
    doubled = sorted(name for name, count in found.items() if count > 1)
    return Verdict(len(threads), doubled, sorted(expected - found.keys()))


def kill_again_and_again(url: str, folder: Path, way: Way, kills: int, seed: int) -> Verdict:
    """*kills* times: start an agent on the same database, and kill it at a random moment."""
    chance = random.Random(seed)
    processes = multiprocessing.get_context("forkserver")  # imports once what every run needs
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
            raise RuntimeError(f"run {kill} did not start")
        time.sleep(chance.uniform(0.0, 0.06))
        child.kill()
        child.join()
        if child.exitcode != -signal.SIGKILL:
            raise RuntimeError(f"run {kill} ended by itself: {child.exitcode}")
    return check(url, folder, way)
