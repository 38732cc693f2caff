"""A LangGraph agent that commits its memory and its state together. It survives a kill, can go back, and can forget.

``python examples/langgraph_agent.py [--url sqlite:///agent.db]``. A script takes the place of a model, so no network is
needed.

The agent's memories are facts of a `MemoryStore`. Its conversation and its next nodes are LangGraph's checkpoints. A
`checkpointer.step()` commits both together. Needs ``pip install 'memstate-sa[langgraph,wordllama]'``.
"""

from __future__ import annotations

import argparse
import os
import signal
import subprocess
import sys
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from langchain_core.language_models import BaseChatModel
from langchain_core.messages import AIMessage, BaseMessage, HumanMessage, ToolMessage
from langchain_core.outputs import ChatGeneration, ChatResult
from langgraph.graph import END, START, MessagesState, StateGraph
from sqlalchemy import select

from memstate_sa import Fact, MemoryStore
from memstate_sa.indexes import InMemoryIndex
from memstate_sa.integrations.langgraph import MemStateCheckpointer


class ScriptedModel(BaseChatModel):
    """Calls "remember" for a statement and "recall" for a question, and repeats the answer of the tool."""

    @property
    def _llm_type(self) -> str:
        return "scripted"

    def _generate(self, messages: list[BaseMessage], *_: Any, **__: Any) -> ChatResult:
        last = messages[-1]
        reply = AIMessage(last.text)
        if isinstance(last, HumanMessage):
            tool = "recall" if last.text.endswith("?") else "remember"
            reply = AIMessage(
                "", tool_calls=[{"name": tool, "args": {"text": last.text}, "id": f"call-{len(messages)}"}]
            )
        return ChatResult(generations=[ChatGeneration(message=reply)])


class Agent:
    def __init__(self, url: str, thread: str = "ana", *, dies: bool = False) -> None:
        self.store = MemoryStore(url, InMemoryIndex())
        self.checkpointer = MemStateCheckpointer(self.store)
        self.checkpointer.setup()
        self.thread, self.config = thread, {"configurable": {"thread_id": thread}}
        self._model, self._dies = ScriptedModel(), dies
        builder = StateGraph(MessagesState)
        builder.add_node("model", self.model).add_node("tools", self.tools)
        builder.add_edge(START, "model").add_edge("tools", "model")
        builder.add_conditional_edges("model", lambda state: "tools" if state["messages"][-1].tool_calls else END)
        self.graph = builder.compile(checkpointer=self.checkpointer)

    # -- its nodes -------------------------------------------------------------------------------------------------

    def model(self, state: MessagesState) -> dict[str, Any]:
        return {"messages": [self._model.invoke(state["messages"])]}

    def tools(self, state: MessagesState) -> dict[str, Any]:
        replies = []
        for call in state["messages"][-1].tool_calls:
            said = {"remember": self.remember, "recall": self.recall}[call["name"]](call["args"]["text"])
            replies.append(ToolMessage(said, tool_call_id=call["id"]))
        return {"messages": replies}

    def remember(self, text: str) -> str:
        with self.checkpointer.step():  # this commits with the node's writes to the state, or not at all
            self.store.commit(Fact(type="note", payload={"text": text}), actor="assistant")
            if self._dies:
                os.kill(os.getpid(), signal.SIGKILL)
        return f"I shall remember: {text}"

    def recall(self, text: str) -> str:
        with self.checkpointer.step() as session:  # a step sees the writes of earlier steps
            hits = self.store.memory.search(session, text, select(Fact), limit=2, as_of=self.checkpointer.as_of())
        return "; ".join(str(hit.fact.payload["text"]) for hit in hits) or "I do not know."

    # -- questions to it -----------------------------------------------------------------------------------------------

    def say(self, text: str) -> str:
        return self._answer({"messages": [HumanMessage(text)]}, self.config)

    def resume(self, config: Any = None) -> str:
        """Continue from the checkpoint in *config*, by default from the latest."""
        return self._answer(None, config or self.config)

    def _answer(self, given: Any, config: Any) -> str:
        return str(self.graph.invoke(given, config)["messages"][-1].text)

    def before_the_answer_to(self, text: str) -> Any:
        """The checkpoint after the question *text*, before the tools ran."""
        asked = (s for s in self.graph.get_state_history(self.config) if s.next == ("tools",))
        return next(snapshot for snapshot in asked if snapshot.values["messages"][-2].text == text)

    def notes(self) -> list[str]:
        return [fact.payload["text"] for fact in self.store.query("note")]


def crash_and_resume(agent: Agent, url: str, text: str) -> list[str]:
    """Tell *text* to another process, kill it before it commits, and resume. Return the notes each time."""
    seen = [str(agent.notes())]
    killed = subprocess.run([sys.executable, __file__, "--url", url, "--die-of", text], check=False)  # noqa: S603
    assert killed.returncode == -signal.SIGKILL
    seen.append(str(agent.notes()))
    agent.resume()
    return [*seen, str(agent.notes())]


def tell_the_story(url: str) -> list[str]:
    """Play the story, and return its lines."""
    agent = Agent(url)
    try:
        lines = [agent.say("I live in Paris."), agent.say("I am allergic to nuts."), agent.say("Where do I live?")]
        before, killed, resumed = crash_and_resume(agent, url, "I have moved from Paris to Berlin.")
        assert before == killed != resumed
        lines += [f"killed: {killed}", f"resumed: {resumed}", agent.say("Which city do I live in?")]

        then = agent.before_the_answer_to("Where do I live?")
        lines.append(f"asked again today: {agent.resume(then.config)}")
        lines.append(f"asked again then: {agent.resume(agent.checkpointer.at(then))}")

        agent.store.rollback(to=agent.checkpointer.position(then), session_id=agent.thread)
        lines.append(f"gone back: {agent.notes()}")
        agent.checkpointer.delete_thread(agent.thread, facts=True)
        lines.append(f"forgotten: {agent.notes()}, {agent.graph.get_state(agent.config).values}")
    finally:
        agent.store.close()
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--url", help="a database (default: a SQLite file that is removed again)")
    parser.add_argument("--die-of", metavar="TEXT", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.die_of:
        Agent(given.url, dies=True).say(given.die_of)
    with TemporaryDirectory() as folder:
        for line in tell_the_story(given.url or f"sqlite:///{Path(folder) / 'agent.db'}"):
            print(line)


if __name__ == "__main__":
    main()
