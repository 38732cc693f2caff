"""Every method refuses a config without a thread, before anything is read or written."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from enum import Enum, StrEnum
from typing import Any
from uuid import UUID

import pytest
from sqlalchemy import Engine, func, select

pytest.importorskip("langgraph.graph")

from langgraph.graph import START, MessagesState, StateGraph
from langgraph.store.base import GetOp, InvalidNamespaceError, ListNamespacesOp, MatchCondition, PutOp, SearchOp

from memstate_sa import MemoryStore, MemstateError
from memstate_sa.indexes import InMemoryIndex
from memstate_sa.integrations.langgraph import MemStateCheckpointer, MemStateStore, checkpoint_rows
from memstate_sa.integrations.langgraph.thread_ids import InvalidThread
from memstate_sa.testing import HashEmbedder

MISSING = object()
CHECKPOINT: Any = {
    "v": 4,
    "id": "1",
    "ts": "",
    "channel_values": {},
    "channel_versions": {},
    "versions_seen": {},
}


def config(thread_id: Any, **more: Any) -> Any:
    return {"configurable": {**({} if thread_id is MISSING else {"thread_id": thread_id}), "checkpoint_ns": "", **more}}


def graph(saver: MemStateCheckpointer) -> Any:
    builder = StateGraph(MessagesState).add_node("a", lambda state: {"messages": ["noted"]}).add_edge(START, "a")
    return builder.compile(checkpointer=saver)


@pytest.fixture
def saver(engine: Engine) -> MemStateCheckpointer:
    made = MemStateCheckpointer(engine)
    made.setup()
    return made


def in_run(saver: MemStateCheckpointer, thread_id: Any) -> None:
    with saver.run(config(thread_id)):
        pass


async def listed(saver: MemStateCheckpointer, thread_id: Any) -> list[Any]:
    return [found async for found in saver.alist(config(thread_id))]


CALLS: dict[str, Callable[[MemStateCheckpointer, Any], Any]] = {
    "invoke": lambda saver, id_: graph(saver).invoke({"messages": ["my PIN is 1234"]}, config(id_)),
    "ainvoke": lambda saver, id_: asyncio.run(graph(saver).ainvoke({"messages": ["x"]}, config(id_))),
    "get_state": lambda saver, id_: graph(saver).get_state(config(id_)),
    "get_state_history": lambda saver, id_: list(graph(saver).get_state_history(config(id_))),
    "update_state": lambda saver, id_: graph(saver).update_state(config(id_), {"messages": ["x"]}),
    "put": lambda saver, id_: saver.put(config(id_), CHECKPOINT, {}, {}),
    "put_writes": lambda saver, id_: saver.put_writes(config(id_, checkpoint_id="1"), [("a", 1)], "task"),
    "aput_writes": lambda saver, id_: asyncio.run(saver.aput_writes(config(id_, checkpoint_id="1"), [("a", 1)], "t")),
    "get_tuple": lambda saver, id_: saver.get_tuple(config(id_)),
    "list": lambda saver, id_: list(saver.list(config(id_))),
    "alist": lambda saver, id_: asyncio.run(listed(saver, id_)),
    "delta history": lambda saver, id_: saver.get_delta_channel_history(config=config(id_), channels=["a"]),
    "run": in_run,
}
OF_IDS: dict[str, Callable[[MemStateCheckpointer, Any], Any]] = {
    "delete_thread": lambda saver, id_: saver.delete_thread(id_),
    "adelete_thread": lambda saver, id_: asyncio.run(saver.adelete_thread(id_)),
    "copy_thread from": lambda saver, id_: saver.copy_thread(id_, "other"),
    "copy_thread to": lambda saver, id_: saver.copy_thread("theirs", id_),
    "prune": lambda saver, id_: saver.prune(["theirs", id_]),
    "prune all": lambda saver, id_: saver.prune(["theirs", id_], strategy="delete"),
}
NO_THREADS = [MISSING, None, "", " \t", "a\0b", "\ud800"]
NO_IDS = [b"bytes", True, 1.5, ["t"], object()]
"""Ids that a graph's methods turn into text before our code sees them."""
OF_GRAPHS = ("invoke", "ainvoke", "get_state", "get_state_history", "update_state")


@pytest.mark.parametrize("name", [*CALLS, *OF_IDS])
def test_invalid_thread_id_is_refused(saver: MemStateCheckpointer, name: str) -> None:
    """All anonymous visitors used to share the thread "None". The same kind: "None" itself, the str() of None."""
    graph(saver).invoke({"messages": ["theirs"]}, config("theirs"))
    before = rows(saver.engine)
    for thread_id in [*NO_THREADS, *(NO_IDS if name not in OF_GRAPHS else ())]:
        if thread_id is MISSING and name in (*OF_IDS, *OF_GRAPHS[2:]):
            continue  # no id to leave out, or LangGraph itself raises KeyError
        with pytest.raises(InvalidThread, match="thread_id") as raised:
            {**CALLS, **OF_IDS}[name](saver, thread_id)
        assert isinstance(raised.value, MemstateError) and isinstance(raised.value, ValueError)
    assert rows(saver.engine) == before


def rows(engine: Engine) -> dict[str, Any]:
    with engine.connect() as connection:
        found = {
            table.name: connection.execute(select(table.c.thread_id, func.count()).group_by(table.c.thread_id)).all()
            for table in checkpoint_rows.TABLES
        }
    return {name: sorted(map(tuple, counts)) for name, counts in found.items()}


class Kind(Enum):
    A = "a"


class Chat(StrEnum):
    MAIN = "main"


class Old(str, Enum):  # noqa: UP042  # whose str() is not its value
    MAIN = "old"


@pytest.mark.parametrize(
    ("given", "stored"),
    [(7, "7"), (UUID(int=7), str(UUID(int=7))), (Chat.MAIN, "main"), (Old.MAIN, "old"), ("ключ 🎈", "ключ 🎈")],
)
def test_ids_that_are_no_strings_are_one_thread_with_their_text(
    saver: MemStateCheckpointer, given: Any, stored: str
) -> None:
    graph(saver).invoke({"messages": ["one"]}, config(given))
    graph(saver).invoke({"messages": ["two"]}, config(stored))
    said = [message.content for message in graph(saver).get_state(config(given)).values["messages"]]
    assert said == ["one", "noted", "two", "noted"]
    assert {found.config["configurable"]["thread_id"] for found in saver.list(None)} == {stored}
    saver.delete_thread(given)
    assert list(saver.list(None)) == []


def test_invalid_checkpoint_id_and_namespace_are_refused(saver: MemStateCheckpointer) -> None:
    """A NUL in an id from a URL raised the driver's error on PostgreSQL. An empty namespace is the graph itself."""
    graph(saver).invoke({"messages": ["hi"]}, config("t"))
    for bad in ("a\0", "\ud800", b"x"):
        with pytest.raises(InvalidThread, match="checkpoint_id"):
            saver.get_tuple(config("t", checkpoint_id=bad))
        with pytest.raises(InvalidThread, match="checkpoint_id"):
            list(saver.list(config("t"), before=config("t", checkpoint_id=bad)))
        with pytest.raises(InvalidThread, match="checkpoint_ns"):
            saver.get_tuple(config("t", checkpoint_ns=bad))
    assert saver.get_tuple(config("t", checkpoint_ns=None)) == saver.get_tuple(config("t"))
    assert saver.get_tuple(config("t", checkpoint_id=UUID(int=1))) is None


def test_none_is_no_label_and_no_key_of_a_store(engine: Engine) -> None:
    """The same for the store: ``("memories", user_id)`` of a visitor without an id, and a missing key."""
    with MemoryStore(engine, InMemoryIndex(), embedder=HashEmbedder(), background=False) as facts:
        store = MemStateStore(facts)
        store.put(("memories", "None"), "None", {"pin": 1234})
        path: Any = (None,)
        for bad in (("memories", None), ("memories", ""), ("memories", b"x"), ("memories", 1)):
            ops: Any = [
                GetOp(bad, "k"), PutOp(bad, "k", {}), PutOp(bad, "k", None), SearchOp(bad),
                ListNamespacesOp((MatchCondition("prefix", bad),)),
            ]  # fmt: skip
            for op in ops:
                with pytest.raises(InvalidNamespaceError):
                    store.batch([op])
            for call in (store.history, store.erase):
                with pytest.raises(InvalidNamespaceError):
                    call(bad, "k")
        with pytest.raises(InvalidNamespaceError):
            store.list_namespaces(prefix=path)
        key: Any
        for key in (None, 1, b"None", Kind.A):
            with pytest.raises(MemstateError, match="key"):
                store.batch([PutOp(("memories",), key, {})])
            assert store.batch([GetOp(("memories", "None"), key), PutOp(("memories", "None"), key, None)]) == [None] * 2
            assert store.history(("memories", "None"), key) == []
        assert [item.value for item in store.search(())] == [{"pin": 1234}]
