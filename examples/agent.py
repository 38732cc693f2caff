"""An agent with its own models: it remembers, recalls and corrects facts, and its turns can be undone.

``python examples/agent.py [--url sqlite:///agent.db]``

It uses plain SQLAlchemy and SQLite, real embeddings (the extra "wordllama") and no network. A few patterns decide which
tool to call, instead of a language model. The loop is the same as with a model:

- A turn is one transaction. If the model or a tool raises an error, nothing of the turn stays.
- A tool call is a SAVEPOINT. An error of the schema is handed back to the model as data, and the turn goes on.
- Each turn is labelled with the conversation, and with the words of the user. So "undo that" means a turn of this
  conversation. History can say why something is believed.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from pydantic import BaseModel, Field
from sqlalchemy import create_engine, select
from sqlalchemy.orm import DeclarativeBase, Mapped, Session, mapped_column, sessionmaker

from memstate_sa import Memory, ValidationFailed, sqlite
from memstate_sa.indexes import InMemoryIndex

# -- the application ---------------------------------------------------------------------------------------------------


class Base(DeclarativeBase):
    pass


class Belief(Base):
    """A statement that the agent believes."""

    __tablename__ = "belief"
    # Undo may need the id of a deleted row, so SQLite must not use it again.
    __table_args__ = {"sqlite_autoincrement": True}
    id: Mapped[int] = mapped_column(primary_key=True)
    content: Mapped[str]
    certainty: Mapped[float]


class Errand(Base):
    """A task that a user gave to the agent."""

    __tablename__ = "errand"
    __table_args__ = {"sqlite_autoincrement": True}
    id: Mapped[int] = mapped_column(primary_key=True)
    what: Mapped[str]
    done: Mapped[bool] = mapped_column(default=False)


class ValidBelief(BaseModel):
    content: str = Field(min_length=3)
    certainty: float = Field(ge=0, le=1)


# -- the agent ---------------------------------------------------------------------------------------------------------


@dataclass
class Call:
    """A call of a tool, as the model requests it."""

    tool: str
    arguments: dict[str, Any]


@dataclass
class Result:
    """The result of a call."""

    tool: str
    value: Any = None
    errors: Any = None


Model = Callable[[str, list[Result]], Call | str]
"""A function of the user's words and the results so far. It returns the next call, or the agent's answer."""


class Agent:
    """The loop that calls tools, and the tools themselves."""

    def __init__(self, sessions: sessionmaker[Session], memory: Memory, model: Model, conversation: str) -> None:
        self.sessions = sessions
        self.memory = memory
        self.model = model
        self.conversation = conversation
        self.tools = {
            tool.__name__: tool
            for tool in (self.remember, self.note_errand, self.correct, self.recall, self.undo, self.forget_all)
        }

    def turn(self, said: str) -> str:
        print(f"\nuser   {said}")
        results: list[Result] = []
        with self.sessions() as session:
            self.memory.annotate(session, actor="agent", session_id=self.conversation, reason=said)
            while isinstance(decision := self.model(said, results), Call):
                results.append(self.call(session, decision))
                print(f"       {decision.tool}{decision.arguments}: {results[-1].errors or results[-1].value}")
            session.commit()
        print(f"agent  {decision}")
        return decision

    def call(self, session: Session, call: Call) -> Result:
        try:
            with session.begin_nested():
                return Result(call.tool, self.tools[call.tool](session, **call.arguments))
        except ValidationFailed as error:
            return Result(call.tool, errors=[f"{each['loc'][0]}: {each['msg']}" for each in error.errors])

    def remember(self, session: Session, content: str, certainty: float) -> int:
        belief = Belief(content=content, certainty=certainty)
        session.add(belief)
        session.flush()
        return belief.id

    def note_errand(self, session: Session, what: str) -> int:
        errand = Errand(what=what)
        session.add(errand)
        session.flush()
        return errand.id

    def correct(self, session: Session, belief: int, content: str) -> str:
        found = session.get_one(Belief, belief)
        before, found.content = found.content, content
        return f"was {before!r}"

    def recall(self, session: Session, question: str) -> list[tuple[int, str]]:
        """The nearest beliefs. New beliefs of this transaction are included."""
        hits = self.memory.search(session, question, select(Belief).where(Belief.certainty > 0.3), limit=2)
        return [(hit.fact.id, hit.fact.content) for hit in hits]

    def undo(self, session: Session) -> list[str]:
        """Undo the last turn of this conversation that changed anything. The labels of the transaction select it."""
        return [f"{change.op} {change.entity} {change.key}" for change in self.memory.rollback(session)]

    def forget_all(self, session: Session) -> int:
        """Take back all changes of this conversation. Beliefs that others have changed since are left alone."""
        return len(self.memory.revoke(session, session_id=self.conversation).reverted)


def scripted(said: str, results: list[Result]) -> Call | str:
    """The decision of a scripted model, in place of a language model."""
    last = results[-1] if results else None
    if said.startswith("No, "):
        if last is None:
            return Call("recall", {"question": said[4:]})
        if last.tool == "recall":
            return Call("correct", {"belief": last.value[0][0], "content": said[4:]})
        return "I had that wrong; I know better now."
    if said.startswith("Undo"):
        return "As if it had not been said." if last else Call("undo", {})
    if said.startswith("Forget"):
        return "What were we talking about?" if last else Call("forget_all", {})
    if said.endswith("?"):
        if last is None:
            return Call("recall", {"question": said})
        return f"{last.value[0][1]}." if last.value else "I do not know."
    if said.startswith("Please "):
        return "I will." if last else Call("note_errand", {"what": said[7:]})
    if last is None:
        return Call("remember", {"content": said, "certainty": 90})  # the model uses per cent by mistake
    if last.errors:
        return Call("remember", {"content": said, "certainty": 0.9})  # it corrects its call after the error
    return "I will remember that."


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--url", help="a database (default: a temporary SQLite file)")
    given = parser.parse_args()
    with TemporaryDirectory() as folder:
        converse(given.url or f"sqlite:///{Path(folder) / 'agent.db'}")


def converse(url: str) -> None:
    engine = create_engine(url)
    if engine.dialect.name == "sqlite":
        sqlite.configure(engine)
    sessions = sessionmaker(engine)
    memory = Memory(InMemoryIndex())
    memory.track(Belief, text="content", metadata=("certainty",), schema=ValidBelief)
    memory.track(Errand, text="what")
    memory.attach(sessions)
    Base.metadata.create_all(engine)
    memory.create_tables(engine)

    with closing(memory), memory.relay(engine):
        monday = Agent(sessions, memory, scripted, "monday")
        monday.turn("Priya is a vegetarian")
        monday.turn("Priya lives in Porto")
        monday.turn("What should I cook for Priya's dinner?")

        tuesday = Agent(sessions, memory, scripted, "tuesday")
        tuesday.turn("Please buy tickets for the concert")
        tuesday.turn("No, Priya eats fish again, but no meat")
        tuesday.turn("What should I cook for Priya's dinner?")
        monday.turn("Priya plays the violin")
        tuesday.turn("Undo that")
        tuesday.turn("What should I cook for Priya's dinner?")
        tuesday.turn("Forget all that I told you today")
        monday.turn("Does Priya make music?")

        with sessions() as session:
            print("\nWhat is believed, and why:")
            for belief in session.scalars(select(Belief).order_by(Belief.id)):
                print(f"  {belief.content}")
                for change in memory.history(session, belief):
                    content = change.after and change.after["content"]
                    print(f"    {change.session_id}: {change.op} {content!r}, as was said: {change.reason!r}")
            print(f"Errands: {session.scalars(select(Errand.what)).all()}")
    engine.dispose()


if __name__ == "__main__":
    main()
