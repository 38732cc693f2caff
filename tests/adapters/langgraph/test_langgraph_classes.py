"""Values of a graph's state come back as the classes of its schemas, also in another process, or reading fails."""

from __future__ import annotations

import asyncio
import operator
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from enum import Enum, IntEnum
from typing import Annotated, Any, Generic, Literal, NamedTuple, NewType, TypedDict, TypeVar

import pytest
from pydantic import BaseModel, ConfigDict, Field, RootModel, SecretStr, dataclasses as pydantic_dataclasses
from sqlalchemy import Engine, text

pytest.importorskip("langgraph.graph")

from langchain_core.messages import AIMessage
from langgraph.checkpoint.serde.jsonplus import JsonPlusSerializer
from langgraph.func import entrypoint, task
from langgraph.graph import END, START, StateGraph
from langgraph.types import Command, Send, interrupt

from memstate_sa import MemstateError
from memstate_sa.integrations.langgraph import MemStateCheckpointer
from memstate_sa.integrations.langgraph.state_classes import StateSerializer, named_by

T = TypeVar("T")
CONFIG: Any = {"configurable": {"thread_id": "t"}}


class Status(Enum):
    OPEN = "open"


class Level(IntEnum):
    HIGH = 3


class Part(BaseModel):
    status: Status
    secret: SecretStr = SecretStr("hidden")


class Ticket(BaseModel):
    number: int
    parts: list[Part] = []


class Tree(BaseModel):
    children: list[Tree] = []


class Box(BaseModel, Generic[T]):
    content: T


class Names(RootModel[list[str]]):
    pass


class Aliased(BaseModel):
    model_config = ConfigDict(extra="forbid")
    number: int = Field(alias="n")


class Place(NamedTuple):
    x: int
    status: Status


@dataclass
class Point:
    x: int
    place: Place | None = None
    length: int = field(init=False, default=0)


@dataclass(frozen=True, slots=True)
class Fixed:
    status: Status
    twice: int = field(init=False, default=2)


@pydantic_dataclasses.dataclass
class Checked:
    status: Status


class Inner(TypedDict):
    point: Point


class Day(datetime):
    """A class of ours must not be mistaken for a type that LangGraph builds itself."""


TicketId = NewType("TicketId", Ticket)
TICKET = Ticket(number=1, parts=[Part(status=Status.OPEN)])
SCHEMAS: dict[str, tuple[Any, Any]] = {
    "model": (Ticket, TICKET),
    "enum": (Status, Status.OPEN),
    "int enum": (Level, Level.HIGH),
    "named tuple": (Place, Place(1, Status.OPEN)),
    "dataclass": (Point, Point(1, Place(1, Status.OPEN))),
    "frozen dataclass": (Fixed, Fixed(Status.OPEN)),
    "Pydantic's dataclass": (Checked, Checked(Status.OPEN)),
    "secret": (SecretStr, SecretStr("s")),
    "list": (list[Ticket], [TICKET]),
    "Sequence": (Sequence[Ticket], [TICKET]),
    "Mapping": (Mapping[str, Status], {"a": Status.OPEN}),
    "dict of lists": (dict[str, list[Place]], {"a": [Place(1, Status.OPEN)]}),
    "tuple": (tuple[Ticket, ...], [TICKET]),
    "optional": (Ticket | None, TICKET),
    "union": (str | Ticket | Status, Status.OPEN),
    "Literal": (Literal[Status.OPEN], Status.OPEN),
    "Annotated": (Annotated[list[Ticket], operator.add], [TICKET]),
    "NewType": (TicketId, TICKET),
    "TypedDict of a dataclass": (Inner, {"point": Point(1)}),
    "recursive": (Tree, Tree(children=[Tree()])),
    "generic": (Box[Status], Box[Status](content=Status.OPEN)),
    "root model": (Names, Names(["a"])),
    "alias": (Aliased, Aliased(n=1)),
}


def asking_graph(schema: Any, value: Any, **schemas: Any) -> StateGraph[Any, Any]:
    """A graph that stores *value*, asks, and goes on with the value that it reads back."""

    def ask(state: Any) -> Any:
        interrupt("go on?")
        return {"seen": [f"{type(state['value']).__name__} {state['value']!r}"]}

    state: Any = TypedDict("state", {"value": schema, "seen": list[str]})  # type: ignore[misc]
    builder = StateGraph(state, **schemas).add_node("make", lambda _: {"value": value}).add_node("ask", ask)
    return builder.add_edge(START, "make").add_edge("make", "ask").add_edge("ask", END)


def opened(engine: Engine, **options: Any) -> MemStateCheckpointer:
    """A checkpointer that knows no graph yet, as in another process."""
    made = MemStateCheckpointer(engine, **options)
    made.setup()
    return made


@pytest.mark.parametrize("kind", SCHEMAS)
def test_a_value_comes_back_as_the_class_that_the_schema_names(engine: Engine, kind: str) -> None:
    """The same kind: a list in a model, a union in a TypedDict in a dataclass, a TypeVar's bound, a `type` alias."""
    schema, value = SCHEMAS[kind]
    asking_graph(schema, value).compile(checkpointer=opened(engine)).invoke({}, CONFIG)
    again = asking_graph(schema, value).compile(checkpointer=opened(engine))
    assert again.invoke(Command(resume="yes"), CONFIG)["seen"] == [f"{type(value).__name__} {value!r}"]
    assert [state.values["value"] for state in again.get_state_history(CONFIG) if state.values.get("value")] == [
        value
    ] * 2


def test_a_class_of_a_function_comes_back(engine: Engine) -> None:
    """No import finds the class, but the schema has it. The same kind: a class in a class, in a notebook's cell."""

    class Local(BaseModel):
        status: Status

    value = Local(status=Status.OPEN)
    graph = asking_graph(list[Local], [value]).compile(checkpointer=opened(engine))
    graph.invoke({}, CONFIG)
    assert graph.get_state(CONFIG).values["value"] == [value]
    assert type(graph.get_state(CONFIG).values["value"][0]) is Local


def test_asyncio_reads_the_same(engine: Engine) -> None:
    async def run() -> Any:
        await asking_graph(Ticket, TICKET).compile(checkpointer=opened(engine)).ainvoke({}, CONFIG)
        again = asking_graph(Ticket, TICKET).compile(checkpointer=opened(engine))
        await again.ainvoke(Command(resume="yes"), CONFIG)
        return (await again.aget_state(CONFIG)).values["value"]

    assert asyncio.run(run()) == TICKET


def test_the_schemas_of_input_output_context_and_nodes_count(engine: Engine) -> None:
    """The receiving node names the type of a Send's argument."""

    class State(TypedDict):
        seen: Annotated[list[Any], operator.add]

    class Question(TypedDict):
        ticket: Ticket

    def work(question: Ticket) -> dict[str, Any]:
        return {"seen": [interrupt(f"{type(question).__name__} {question.number}?")]}

    def build() -> Any:
        builder = StateGraph(State, input_schema=Question, context_schema=Point)
        builder.add_node("work", work, input_schema=Ticket)
        builder.add_conditional_edges(START, lambda q: [Send("work", q["ticket"])], ["work"])
        return builder.compile(checkpointer=opened(engine))

    build().invoke({"ticket": TICKET}, CONFIG)
    again = build()
    assert again.get_state(CONFIG).tasks[0].interrupts[0].value == "Ticket 1?"
    assert again.invoke(Command(resume="done"), CONFIG) == {"seen": ["done"]}


def test_subgraphs_read_classes_of_their_own_schemas(engine: Engine) -> None:
    def build() -> Any:
        outer = StateGraph(TypedDict("outer", {"seen": list[str]}))  # type: ignore[misc]
        outer.add_node("inner", asking_graph(Point, Point(7)).compile()).add_edge(START, "inner")
        return outer.compile(checkpointer=opened(engine))

    build().invoke({}, CONFIG)
    again = build()
    assert again.get_state(CONFIG, subgraphs=True).tasks[0].state.values["value"] == Point(7)
    assert again.invoke(Command(resume="yes"), CONFIG)["seen"] == ["Point " + repr(Point(7))]


def test_a_model_as_the_update_of_a_command_comes_back(engine: Engine) -> None:
    class State(BaseModel):
        ticket: Ticket | None = None

    def build() -> Any:
        builder = StateGraph(State).add_node("a", lambda _: Command(update=State(ticket=TICKET)))
        return builder.add_edge(START, "a").compile(checkpointer=opened(engine))

    build().invoke({}, CONFIG)
    assert build().get_state(CONFIG).values["ticket"] == TICKET


def test_values_of_an_entrypoint_come_back(engine: Engine) -> None:
    """The functional API has no graph of nodes. The function's annotations are the schema."""
    before: list[Any] = []

    def build(saver: MemStateCheckpointer) -> Any:
        @entrypoint(checkpointer=saver)
        def flow(number: int, *, previous: Ticket | None = None) -> entrypoint.final[Place, Ticket]:
            before.append(previous)
            return entrypoint.final(value=Place(number, Status.OPEN), save=Ticket(number=number))

        return flow

    build(opened(engine)).invoke(1, CONFIG)
    assert build(opened(engine)).invoke(2, CONFIG) == Place(2, Status.OPEN)
    assert before == [None, Ticket(number=1)]


def test_a_copied_thread_reads_the_same(engine: Engine) -> None:
    saver = opened(engine)
    graph = asking_graph(Ticket, TICKET).compile(checkpointer=saver)
    graph.invoke({}, CONFIG)
    saver.copy_thread("t", "u")
    assert graph.get_state({"configurable": {"thread_id": "u"}}).values["value"] == TICKET


def test_class_that_no_schema_names_is_refused(engine: Engine) -> None:
    """In the state, an interrupt or a task's result, reading fails instead of returning a dict. Messages are always
    built.

    The same kind: a subclass of a class that the schema names, a subclass of datetime.
    """
    for schema, value in ((Any, [AIMessage("x"), TICKET]), (Any, Place(1, Status.OPEN)), (datetime, Day(2026, 1, 1))):
        saver = opened(engine)
        saver.delete_thread("t")
        graph = asking_graph(schema, value).compile(checkpointer=saver)
        graph.invoke({}, CONFIG)
        with pytest.raises(MemstateError, match=r"is not allowed.*allow=\[(Status|Day)\]"):
            graph.get_state(CONFIG)
        allowed = asking_graph(schema, value).compile(checkpointer=opened(engine, allow=[Ticket, Place, Day]))
        assert repr(allowed.get_state(CONFIG).values["value"]) == repr(value)


def test_allow_takes_a_schema_for_all_that_it_names(engine: Engine) -> None:
    """No schema names the return types of tasks in the functional API."""

    @task
    def work() -> Point:
        return Point(1, Place(2, Status.OPEN))

    def build(**options: Any) -> Any:
        @entrypoint(checkpointer=opened(engine, **options))
        def flow(_: str) -> str:
            found = work().result()
            return f"{interrupt('?')} {found!r}"

        return flow

    build().invoke("go", CONFIG)
    with pytest.raises(MemstateError, match="allow="):
        build().invoke(Command(resume="yes"), CONFIG)
    point = Point(1, Place(2, Status.OPEN))
    assert build(allow=[Inner]).invoke(Command(resume="yes"), CONFIG) == f"yes {point!r}"


def test_a_missing_or_refusing_class_is_an_error(engine: Engine) -> None:
    """An enum lacks the stored member, or a class was renamed. The error shows nothing of the value."""
    serde = StateSerializer([Status, Level])
    stored = serde.dumps_typed({"a": Status.OPEN})
    by_name = StateSerializer()
    by_name.with_msgpack_allowlist([(Status.__module__, "Status"), (Status.__module__, "Statue")])
    assert by_name.loads_typed(stored) == {"a": Status.OPEN}
    with pytest.raises(MemstateError, match="Statue does not exist any more"):
        by_name.loads_typed((stored[0], stored[1].replace(b"Status", b"Statue")))
    other = StateSerializer([Enum("Status", {"CLOSED": "closed"}, module=__name__)])
    with pytest.raises(MemstateError, match=r"Status does not accept the stored value \(ValueError\)") as raised:
        other.loads_typed(stored)
    assert "open" not in str(raised.value)


def test_json_of_older_checkpoints_follows_the_same_rules(engine: Engine) -> None:
    """A checkpoint imported from LangGraph's own savers. A class that was not allowed used to come back as its
    description.
    """
    stored = b'{"lc": 2, "type": "constructor", "id": ["%s", "Point"], "kwargs": {"x": 1}}'
    stored = stored.replace(b"%s", b'", "'.join(part.encode() for part in __name__.split(".")))
    with pytest.raises(MemstateError, match=r"allow=\[Point\]"):
        StateSerializer().loads_typed(("json", stored))
    assert StateSerializer([Point]).loads_typed(("json", stored)) == Point(1)


def test_only_classes_of_data_are_taken_from_a_schema() -> None:
    """A class with side effects in its constructor must not be callable by anyone who can write to the database."""

    class Client:
        def __init__(self, url: str) -> None: ...

    named = named_by([TypedDict("S", {"a": Client, "b": list[Client | Ticket], "c": type[Ticket]})])  # type: ignore[misc]
    assert set(named.values()) == {Ticket, Part, Status, SecretStr}


def test_other_checkpointers_are_not_made_strict(engine: Engine) -> None:
    """The application's own serializer stays as it was. allow= cannot change it, so this is refused."""
    from langgraph.checkpoint.memory import InMemorySaver

    graph = asking_graph(Any, TICKET).compile(checkpointer=InMemorySaver())
    graph.invoke({}, CONFIG)
    assert graph.get_state(CONFIG).values["value"] == TICKET
    with pytest.raises(MemstateError, match="serde="):
        MemStateCheckpointer(engine, serde=JsonPlusSerializer(), allow=[Ticket])


def test_a_stored_name_imports_nothing(engine: Engine) -> None:
    """A row can name any class. It is neither imported nor called."""
    import sys

    saver = opened(engine)
    graph = asking_graph(Ticket, TICKET).compile(checkpointer=saver)
    graph.invoke({}, CONFIG)
    assert len("test_langgraph_kill_me") == len("test_langgraph_classes")
    evil = (
        StateSerializer([Ticket]).dumps_typed(TICKET)[1].replace(b"test_langgraph_classes", b"test_langgraph_kill_me")
    )
    with engine.begin() as connection:
        connection.execute(
            text("UPDATE memstate_checkpoint_blob SET value = :value WHERE channel = 'value'"), {"value": evil}
        )
    with pytest.raises(MemstateError, match=r"kill_me.* is not allowed"):
        graph.get_state(CONFIG)
    assert not [name for name in sys.modules if "kill_me" in name]
