"""A graph goes back to a checkpoint. The facts of that moment are read, searched, or restored."""

from __future__ import annotations

import operator
from typing import Annotated, Any, TypedDict

import pytest
from sqlalchemy import Engine, select

pytest.importorskip("langgraph.graph")

from langgraph.graph import START, StateGraph

from memstate_sa import MemstateError
from memstate_sa.integrations.langgraph import MemStateCheckpointer
from tests.support import Tag, World

CONFIG: Any = {"configurable": {"thread_id": "t"}}


class State(TypedDict, total=False):
    city: str
    trail: Annotated[list[str], operator.add]


class Traveller:
    """An agent that remembers a person's home, and is asked for it."""

    def __init__(self, world: World) -> None:
        self.world, self.memory = world, world.memory
        self.saver = MemStateCheckpointer(world.engine, memory=world.memory)
        self.saver.setup()
        builder = StateGraph(State)
        builder.add_node("learn", self.learn).add_node("think", lambda state: {}).add_node("answer", self.answer)
        builder.add_edge(START, "learn").add_edge("learn", "think").add_edge("think", "answer")
        self.graph = builder.compile(checkpointer=self.saver)

    def learn(self, state: State) -> State:
        with self.saver.step() as session:
            home = session.get(Tag, "home") or Tag(name="home")
            home.meaning = state["city"]
            session.add(home)
        return {}

    def answer(self, state: State) -> State:
        at = self.saver.as_of()
        with self.saver.step() as session:
            found = session.get(Tag, "home") if at is None else self.memory.as_of(session, Tag, "home", at)
            meaning = found["meaning"] if isinstance(found, dict) else found.meaning if found else "nowhere"
            hits = self.memory.search(session, f"home means {meaning}", Tag, as_of=at)
            assert [hit.fact.meaning for hit in hits][:1] == ([] if found is None else [meaning])
        return {"trail": [meaning]}

    def say(self, city: str) -> str:
        self.graph.invoke({"city": city}, CONFIG)
        return str(self.graph.get_state(CONFIG).values["trail"][-1])

    def before(self, node: str, nth: int = 0) -> Any:
        """The *nth* last checkpoint at which *node* was next."""
        return [snapshot for snapshot in self.graph.get_state_history(CONFIG) if snapshot.next == (node,)][nth]

    def home(self) -> str:
        with self.world.session() as session:
            return str(session.scalars(select(Tag.meaning)).one())


@pytest.fixture
def traveller(world: World) -> Traveller:
    made = Traveller(world)
    assert [made.say("Paris"), made.say("Berlin")] == ["Paris", "Berlin"]
    return made


def test_a_replay_reads_the_present_unless_asked_otherwise(traveller: Traveller) -> None:
    """A replay from before the first answer says Berlin with the present facts, and Paris with the facts of that
    moment.
    """
    then = traveller.before("answer", 1)
    assert traveller.graph.invoke(None, then.config)["trail"][-1] == "Berlin"
    assert traveller.graph.invoke(None, traveller.saver.at(then))["trail"][-1] == "Paris"
    assert traveller.home() == "Berlin"  # nothing has changed


def test_all_of_a_replay_is_at_one_moment(traveller: Traveller) -> None:
    """Its later nodes have new checkpoints, and read the same moment. Runs that continue from them do so too."""
    then = traveller.before("think", 1)
    assert traveller.graph.invoke(None, traveller.saver.at(then))["trail"][-1] == "Paris"
    state = traveller.graph.get_state(CONFIG)
    assert traveller.saver.position(state) == traveller.saver.position(then)


def test_memory_goes_back_with_the_graph(traveller: Traveller) -> None:
    """The application can undo facts and vectors to the checkpoint, by new entries of the log."""
    then = traveller.before("answer", 1)
    with traveller.world.session() as session:
        session.add(Tag(name="unrelated", meaning="of somebody else"))
        session.commit()
    with traveller.world.session() as session:
        traveller.memory.rollback(session, to=traveller.saver.position(then), session_id="t")
        session.commit()
    assert traveller.graph.invoke(None, then.config)["trail"][-1] == "Paris"
    with traveller.world.session() as session:
        assert dict(session.execute(select(Tag.name, Tag.meaning)).all()) == {
            "home": "Paris",
            "unrelated": "of somebody else",
        }
    traveller.world.assert_in_step()


def test_empty_log_has_a_position_to_return_to(traveller: Traveller) -> None:
    """The log was empty, so a time replaces its last transaction."""
    first = list(traveller.graph.get_state_history(CONFIG))[-1]
    at = traveller.saver.position(first)
    with traveller.world.session() as session:
        assert traveller.memory.as_of(session, Tag, "home", at) is None
        traveller.memory.rollback(session, to=at)
        session.commit()
        assert session.scalars(select(Tag)).all() == []
    again = traveller.saver.at(first)
    assert isinstance(traveller.saver.as_of(again), type(at))


def test_snapshots_tuples_and_configs_have_one_position(traveller: Traveller) -> None:
    snapshot = traveller.before("answer")
    found = traveller.saver.get_tuple(snapshot.config)
    position = traveller.saver.position(snapshot)
    assert traveller.saver.position(found) == traveller.saver.position(snapshot.config) == position
    with traveller.world.session() as session:
        assert str(position).partition("@")[0] == traveller.memory.history(session, Tag)[-1].tx
    with pytest.raises(MemstateError, match="Cannot find this checkpoint"):
        traveller.saver.position({"configurable": {"thread_id": "nobody"}})


def test_copies_and_forks_know_their_moment(traveller: Traveller) -> None:
    then = traveller.before("answer", 1)
    traveller.saver.copy_thread("t", "copy")
    copied = {**then.config, "configurable": {**then.config["configurable"], "thread_id": "copy"}}
    assert traveller.saver.position(copied) == traveller.saver.position(then)
    forked = traveller.graph.update_state(then.config, {"trail": ["forked"]})
    assert traveller.saver.position(forked) == traveller.saver.position(traveller.before("answer"))


def test_without_facts_there_is_no_position(engine: Engine) -> None:
    saver = MemStateCheckpointer(engine)
    saver.setup()
    graph = StateGraph(State).add_node("a", lambda state: {"trail": ["a"]}).add_edge(START, "a")
    graph.compile(checkpointer=saver).invoke({"trail": []}, CONFIG)
    with pytest.raises(MemstateError, match="without memory="):
        saver.position(CONFIG)
