"""Threads that LangGraph's own savers have stored continue with ours."""

from __future__ import annotations

import operator
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, TypedDict

import pytest
from sqlalchemy import Engine, text

pytest.importorskip("langgraph.checkpoint.sqlite")
pytest.importorskip("langgraph.checkpoint.postgres")

from langchain_core.messages import HumanMessage
from langgraph.channels.delta import DeltaChannel
from langgraph.checkpoint.postgres import PostgresSaver
from langgraph.checkpoint.serde.jsonplus import JsonPlusSerializer
from langgraph.checkpoint.serde.types import TASKS
from langgraph.checkpoint.sqlite import SqliteSaver
from langgraph.graph import START, StateGraph
from langgraph.types import Command, Send, interrupt

from memstate_sa import Memory, MemstateError
from memstate_sa.indexes import InMemoryIndex
from memstate_sa.integrations.langgraph import MemStateCheckpointer
from memstate_sa.integrations.langgraph.import_checkpoints import import_checkpoints
from memstate_sa.testing import HashEmbedder


@dataclass
class Plan:
    goal: str


MEMORY = Memory(InMemoryIndex(), embedder=HashEmbedder())


def append(have: list[str], writes: list[list[str]]) -> list[str]:
    return [*have, *(word for written in writes for word in written)]


class State(TypedDict, total=False):
    trail: Annotated[list[str], operator.add]
    words: Annotated[list[str], DeltaChannel(append)]
    messages: Annotated[list[Any], operator.add]
    plan: Any


class Plain(TypedDict, total=False):
    trail: Annotated[list[str], operator.add]


@contextmanager
def own_saver(engine: Engine) -> Iterator[Any]:
    """LangGraph's own saver in the same database."""
    url = engine.url.render_as_string(hide_password=False)
    serde = JsonPlusSerializer(allowed_msgpack_modules=[(Plan.__module__, "Plan")])
    if engine.dialect.name == "sqlite":
        with SqliteSaver.from_conn_string(str(engine.url.database)) as saver:
            saver.serde = serde
            yield saver
    else:
        with PostgresSaver.from_conn_string(url.replace("+psycopg", "")) as saver:
            saver.serde = serde
            saver.setup()
            yield saver


def build(saver: Any) -> Any:
    def plan(state: State) -> State:
        return {"trail": ["plan"], "plan": Plan("g" * 100), "messages": [HumanMessage("hi", id="1")], "words": ["a"]}

    def inside(state: State) -> State:
        return {"trail": ["inside"], "words": ["b"]}

    def ask(state: State) -> State:
        return {"trail": [interrupt("sure?")], "words": ["c"]}

    inner = StateGraph(State).add_node("inside", inside).add_edge(START, "inside").compile()
    builder = StateGraph(State).add_node("plan", plan).add_node("inner", inner).add_node("ask", ask)
    builder.add_node("ask too", lambda state: {"trail": ["sent"]})
    builder.add_edge(START, "plan").add_edge("plan", "inner").add_edge("inner", "ask")
    builder.add_conditional_edges("plan", lambda state: [Send("ask too", {})], ["ask too"])
    return builder.compile(checkpointer=saver)


def config(thread: str) -> Any:
    return {"configurable": {"thread_id": thread}}


def shown(saver: Any, thread: str) -> list[Any]:
    """All checkpoints and writes of a thread, newest first."""
    return [
        (
            found.config,
            found.checkpoint,
            {name: value for name, value in found.metadata.items() if name != "memstate_position"},
            found.parent_config,
            found.pending_writes,
        )
        for found in saver.list(config(thread))
    ]


@pytest.fixture
def saver(engine: Engine) -> MemStateCheckpointer:
    made = MemStateCheckpointer(engine, allow=[Plan])
    made.setup()
    return made


def test_a_thread_goes_on_where_it_was(engine: Engine, saver: MemStateCheckpointer) -> None:
    """All of its checkpoints are equal, with subgraphs, delta channels and interrupts."""
    with own_saver(engine) as old:
        for thread in ("1", "2"):
            build(old).invoke({"trail": ["in"], "words": ["in"]}, config(thread))
        before = {thread: shown(old, thread) for thread in ("1", "2")}
        state = build(old).get_state(config("1"))
        lines: list[tuple[int, int | None]] = []
        count = import_checkpoints(engine, saver, progress=lambda *line: lines.append(line))
    assert count == len(before["1"]) + len(before["2"]) > 8 and lines[-1] == (count, count)
    assert {thread: shown(saver, thread) for thread in ("1", "2")} == before
    graph = build(saver)
    again = graph.get_state(config("1"))
    assert (again.values, again.next) == (state.values, state.next) and again.values["plan"] == Plan("g" * 100)
    result = graph.invoke(Command(resume="yes"), config("1"))
    assert result["trail"][-1] == "yes" and result["words"] == [*state.values["words"], "c"]
    saver.prune(["1"])
    assert graph.get_state(config("1")).values == result


def test_second_import_adds_only_new_checkpoints(engine: Engine, saver: MemStateCheckpointer) -> None:
    """It adds the newer ones. Checkpoints that were made here stay."""
    with own_saver(engine) as old:
        build(old).invoke({"trail": ["in"]}, config("1"))
        import_checkpoints(engine.url, saver, threads=["1"])
        build(saver).invoke(Command(resume="here"), config("1"))
        build(old).invoke({"trail": ["in"]}, config("2"))
        assert import_checkpoints(engine, saver, threads=["2"]) == len(shown(old, "2"))
        import_checkpoints(engine, saver)
    assert build(saver).get_state(config("1")).values["trail"][-1] == "here"
    assert build(saver).get_state(config("2")).next == ("ask",)


def test_import_leaves_existing_checkpoints_alone(engine: Engine, saver: MemStateCheckpointer) -> None:
    """After pruning, a thread's checkpoint has another parent, or none."""
    plain = StateGraph(Plain).add_node("a", lambda state: {"trail": ["a"]}).add_edge(START, "a")
    with own_saver(engine) as old:
        plain.compile(checkpointer=old).invoke({"trail": ["in"]}, config("1"))
        import_checkpoints(engine, saver)
        saver.prune(["1"])
        pruned = shown(saver, "1")
        assert [parent for _, _, _, parent, _ in pruned] == [None]
        import_checkpoints(engine, saver)
    again = {str(found[0]): found for found in shown(saver, "1")}
    assert [again[str(found[0])] for found in pruned] == pruned


def test_command_imports_the_named_threads(
    engine: Engine, saver: MemStateCheckpointer, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """It imports only the named threads. A wrong URL shows no password, and creates no database."""
    pytest.importorskip("typer")
    from typer.testing import CliRunner

    from memstate_sa import cli

    url = engine.url.render_as_string(hide_password=False)
    monkeypatch.setenv("MEMSTATE_URL", url)
    monkeypatch.setenv("MEMSTATE_APP", f"{__name__}:MEMORY")
    MEMORY.create_tables(engine)

    def run(*arguments: str) -> str:
        result = CliRunner().invoke(cli.application(), ["import-checkpoints", *arguments])
        return f"{result.exit_code} {result.output}"

    with own_saver(engine) as old:
        for thread in ("1", "2"):
            build(old).invoke({"trail": ["in"]}, config(thread))
        before = {thread: shown(old, thread) for thread in ("1", "2")}
        assert run(url, "--thread", "2").startswith("0 ")
        assert (shown(saver, "1"), shown(saver, "2")) == ([], before["2"])
        shown_count = f"{len(before['1']) + len(before['2'])} checkpoints"
        assert shown_count in run(url)
        assert {thread: shown(saver, thread) for thread in ("1", "2")} == before
    wrong = run("nothing at all:secret")
    assert wrong.startswith("1 ") and "not a database URL" in wrong and "secret" not in wrong
    nowhere = tmp_path / "nowhere.db"
    assert "no such database" in run(f"sqlite:///{nowhere}") and not nowhere.exists()


def test_tasks_sent_before_version_4_are_imported(engine: Engine, saver: MemStateCheckpointer) -> None:
    """They were not in the checkpoint, but in the writes at its parent."""
    with own_saver(engine) as old:
        empty: Any = {"ts": "2025-01-01T00:00:00+00:00", "channel_values": {}, "versions_seen": {}}
        parent = old.put(
            {"configurable": {"thread_id": "old", "checkpoint_ns": ""}},
            {"v": 3, "id": "1", "channel_versions": {"a": "1"}, **empty},
            {"source": "loop", "step": 0},
            {},
        )
        old.put_writes(parent, [(TASKS, Send("node", {"x": 1})), (TASKS, Send("node", {"x": 2}))], "task")
        old.put(parent, {"v": 3, "id": "2", "channel_versions": {"a": "2"}, **empty}, {"source": "loop", "step": 1}, {})
        import_checkpoints(engine, saver)
    found = saver.get_tuple(config("old"))
    assert found is not None
    assert found.checkpoint["channel_values"] == {TASKS: [Send("node", {"x": 1}), Send("node", {"x": 2})]}


def test_nothing_is_unpickled(engine: Engine, saver: MemStateCheckpointer) -> None:
    """The caller can pass a serializer that does it. The message names the checkpoint, not the value."""
    with own_saver(engine) as old:
        old.serde = JsonPlusSerializer(pickle_fallback=True)
        graph = StateGraph(State).add_node("a", lambda state: {"plan": Unknown("secret")}).add_edge(START, "a")
        graph.compile(checkpointer=old).invoke({"trail": []}, config("1"))
        with pytest.raises(MemstateError, match="serde=") as raised:
            import_checkpoints(engine, saver)
        assert "secret" not in str(raised.value)
        assert list(saver.list(None)) == []
        saver.serde = old.serde
        import_checkpoints(engine, saver, serde=old.serde)
    found = saver.get_tuple(config("1"))
    assert found is not None and found.checkpoint["channel_values"]["plan"].name == "secret"


class Unknown:
    """msgpack cannot encode it."""

    def __init__(self, name: str) -> None:
        self.name = name


def test_import_refuses_missing_checkpoint_tables(engine: Engine, saver: MemStateCheckpointer, tmp_path: Path) -> None:
    with pytest.raises(MemstateError, match="no table checkpoint"):
        import_checkpoints(engine, saver)
    with engine.begin() as connection:
        connection.execute(text("CREATE TABLE checkpoints (thread_id TEXT)"))
    with pytest.raises(MemstateError, match="writes"):
        import_checkpoints(engine, saver)
