"""A process with a relay that forks workers, like gunicorn --preload: ``fork_master.py <scenario> <url>``.

It prints its observations as JSON. It is a separate process because a fork of the tests would copy pytest's threads.
"""

from __future__ import annotations

import asyncio
import json
import os
import select
import sys
import threading
from collections.abc import Callable
from typing import Any

from sqlalchemy import create_engine, select as sql_select

from memstate_sa import Fact, MemoryStore, sqlite
from memstate_sa.db.tables import holder
from memstate_sa.indexes import InMemoryIndex
from memstate_sa.testing import HashEmbedder
from tests.support import Tag, World


def child(work: Callable[[], Any]) -> Any:
    """The result or the error of *work* in a forked child."""
    reading, writing = os.pipe()
    pid = os.fork()
    if pid == 0:
        try:
            answer = work()
        except BaseException as error:
            answer = f"{type(error).__name__}: {error}"
        os.write(writing, json.dumps(answer).encode())
        os._exit(0)
    os.close(writing)
    os.waitpid(pid, 0)
    with os.fdopen(reading) as stream:
        return json.load(stream)


def say(world: World, name: str) -> None:
    with world.session() as session:
        session.add(Tag(name=name, meaning="x"))
        session.commit()
        world.memory.wait(session) if world.relay.is_running else None


def relay(url: str) -> dict[str, Any]:
    """A worker writes, and closes its copy of the memory."""
    engine = sqlite.configure(create_engine(url))
    world = World(engine)
    with world.relay:
        say(world, "before")
        with engine.connect() as connection:
            owners = connection.scalars(sql_select(holder.c.owner)).all()
        listener = world.relay._listener

        def work() -> str:
            engine.dispose(close=False)  # SQLAlchemy asks a child to do this for the application's engines
            say(world, "in the child")
            world.memory.close()
            return world.memory._notifier.name

        name = child(work)
        with engine.connect() as connection:
            left = connection.scalars(sql_select(holder.c.owner)).all()
        heard = (
            []
            if listener is None or listener._thread is None
            else select.select([listener._stop_receiver], [], [], 0)[0]
        )
        say(world, "after")
        world.relay.drain()
        return {
            "the lease stays": owners == left,
            "the listener was not woken": heard == [],
            "the child has another name": name != world.memory._notifier.name,
            "slots lost": world.relay.counters()["memory"].lost,
            "indexed": sorted(entry.id for entry in world.index.scan(None, 10)),
        }


def store(url: str) -> dict[str, Any]:
    """Workers use an engine that memstate_sa made before the fork."""
    with MemoryStore(url, InMemoryIndex(), embedder=HashEmbedder()) as facts:
        facts.commit(Fact(type="n", payload={"of": "the parent"}))

        def work() -> list[Any]:
            ids = [facts.commit(Fact(type="n", payload={"of": os.getpid(), "n": n})) for n in range(5)]
            found = [facts.get(id_) for id_ in ids]
            return [fact is not None and fact.payload["n"] for fact in found]

        answers = [child(work) for _ in range(2)]
        return {"children": answers, "parent": len(facts.query("n"))}


def memory(_: str) -> dict[str, Any]:
    """A thread of the parent is inside a call, and holds the lock of an in-memory database."""
    waiting, go = threading.Event(), threading.Event()
    with MemoryStore("sqlite://", InMemoryIndex(), embedder=HashEmbedder()) as facts:

        def write() -> None:
            with facts._lock:
                waiting.set()
                go.wait()

        thread = threading.Thread(target=write)
        thread.start()
        waiting.wait()
        found = child(lambda: [facts.commit(Fact(type="n", payload={})) != "", len(facts.query("n"))])
        go.set()
        thread.join()
        return {"child": found, "parent": len(facts.query("n"))}


def graph(url: str) -> dict[str, Any]:
    """The parent's checkpointer has threads and an open step."""
    from langgraph.graph import START, StateGraph

    from memstate_sa.integrations.langgraph import MemStateCheckpointer

    forked: list[Any] = []
    with MemoryStore(url, InMemoryIndex(), embedder=HashEmbedder(), background=False) as facts:
        saver = MemStateCheckpointer(facts)
        saver.setup()

        async def node(state: dict[str, Any]) -> dict[str, Any]:
            name = state["name"]
            await saver.astep(lambda _: facts.commit(Fact(type="n", payload={"name": name})))
            return state

        compiled: Any = StateGraph(dict).add_node("node", node).add_edge(START, "node").compile(checkpointer=saver)

        def run(name: str) -> list[str]:
            asyncio.run(compiled.ainvoke({"name": name}, {"configurable": {"thread_id": name}}))
            return sorted(fact.payload["name"] for fact in facts.query("n"))

        run("before")
        saver._steps._changed.acquire()  # as if another thread of the parent held it
        forked.append(child(lambda: run("child")))
        saver._steps._changed.release()
        found = {"child": forked[0], "parent": run("parent")}
        saver.close()
        return found


def search(url: str) -> dict[str, Any]:
    """The parent's deliveries after the fork do not reach the child's copy of an in-memory index."""
    told, tell = os.pipe()
    done, finish = os.pipe()
    engine = sqlite.configure(create_engine(url))
    world = World(engine)
    with world.relay:
        say(world, "early")
        if os.fork() == 0:
            engine.dispose(close=False)
            os.read(told, 1)
            with world.session() as session:
                hits = world.memory.search(session, "late means x", Tag, limit=5)
                answer = {"complete": hits.complete, "found": sorted(hit.fact.name for hit in hits)}
            os.write(finish, json.dumps(answer).encode())
            os._exit(0)
        say(world, "late")
        os.write(tell, b"!")
        answer: dict[str, Any] = json.loads(os.read(done, 1000))
        return answer


def wal(url: str) -> dict[str, Any]:
    """The parent closes an SQLite database that a child has open. The child's WAL file must stay."""
    told, tell = os.pipe()
    done, finish = os.pipe()
    facts = MemoryStore(url, InMemoryIndex(), embedder=HashEmbedder(), background=False)
    facts.commit(Fact(type="n", payload={"n": 0}))
    if os.fork() == 0:
        facts.commit(Fact(type="n", payload={"n": 1}))
        os.write(finish, b"!")
        os.read(told, 1)
        facts.commit(Fact(type="n", payload={"n": 2}))
        os.write(finish, b"!")
        os.read(told, 1)
        os._exit(0)
    os.read(done, 1)
    facts.close()
    os.write(tell, b"!")
    os.read(done, 1)
    with MemoryStore(url, InMemoryIndex(), embedder=HashEmbedder(), background=False) as again:
        found = sorted(fact.payload["n"] for fact in again.query("n"))
    os.write(tell, b"!")
    return {"found": found}


if __name__ == "__main__":
    scenarios = {each.__name__: each for each in (relay, store, memory, graph, search, wal)}
    print(json.dumps(scenarios[sys.argv[1]](sys.argv[2])))
    sys.stdout.flush()
    os._exit(0)
