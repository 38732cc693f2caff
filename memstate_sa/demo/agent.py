"""An agent's memory, written twice: by hand, and with memstate_sa.

Each side runs in a separate process (``python -m memstate_sa.demo.agent``), so that the demo can really kill it.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import random
import signal
import time
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import chromadb
from chromadb.api import ClientAPI
from sqlalchemy import Engine, create_engine, func, select
from sqlalchemy.orm import DeclarativeBase, Mapped, Session, mapped_column, sessionmaker

from memstate_sa import Memory
from memstate_sa.db import sqlite
from memstate_sa.demo.inputs import Correct, Forget, Remember, Turn, parse
from memstate_sa.embedders import WordLlamaEmbedder
from memstate_sa.indexes import ChromaIndex, VectorIndex
from memstate_sa.testing import FlakyIndex

logger = logging.getLogger("app")

FAILURE_RATE = 0.1
THINKING_S = 3.0
"""The sum of all pauses. Without pauses, a few calls of the relay would deliver the whole conversation."""


# -- the application before it used memstate_sa ----------------------------------------------------------------------


class Base(DeclarativeBase):
    pass


class Note(Base):
    """A fact that the assistant knows about a user."""

    __tablename__ = "note"

    id: Mapped[str] = mapped_column(primary_key=True)
    user_id: Mapped[str]
    role: Mapped[str]
    text: Mapped[str]


class Played(Base):
    """A committed turn. After a crash, the agent continues after the last one."""

    __tablename__ = "played"

    turn: Mapped[int] = mapped_column(primary_key=True)


def write(session: Session, turn: Turn) -> None:
    for action in turn.actions:
        match action:
            case Remember():
                session.add(Note(id=action.fact, user_id=action.user, role=action.role, text=action.text))
            case Correct():
                session.get_one(Note, action.fact).text = action.text
            case Forget():
                session.delete(session.get_one(Note, action.fact))
        session.flush()  # a later action of this turn may be about the same note
    session.add(Played(turn=turn.number))


def database(home: Path) -> Engine:
    home.mkdir(exist_ok=True)
    engine: Engine = sqlite.configure(create_engine(f"sqlite:///{home / 'notes.sqlite3'}"))
    Base.metadata.create_all(engine)
    return engine


def chroma(home: Path) -> ClientAPI:
    return chromadb.PersistentClient(home / "chroma")


# -- by hand: two writes in a row ------------------------------------------------------------------------------------


def play_by_hand(home: Path, turns: Iterable[Turn], crash_at: int | None, seed: int) -> None:
    network = Network(seed)
    embedder = WordLlamaEmbedder()
    collection = chroma(home).get_or_create_collection("notes", configuration={"hnsw": {"space": "cosine"}})
    sessions = sessionmaker(database(home))

    for turn in turns:
        with sessions() as session:
            write(session, turn)
            session.commit()
            if turn.number == crash_at:
                die()
            touched_ids = {action.fact for action in turn.actions}
            notes = session.scalars(select(Note).where(Note.id.in_(touched_ids))).all()
            try:
                if notes:
                    network.call()
                    collection.upsert(
                        ids=[note.id for note in notes],
                        embeddings=embedder.embed([note.text for note in notes]),
                        metadatas=[{"user_id": note.user_id, "role": note.role} for note in notes],
                    )
                if gone_ids := touched_ids - {note.id for note in notes}:
                    network.call()
                    collection.delete(ids=list(gone_ids))
            except ConnectionError:
                logger.exception("Could not update the vector index in turn %d", turn.number)
        report(turn=turn.number, calls=network.calls, failed=network.failed)


class Network:
    """The network to the index. One call in ten fails."""

    def __init__(self, seed: int) -> None:
        self._random = random.Random(seed)
        self.calls = self.failed = 0

    def call(self) -> None:
        self.calls += 1
        if self._random.random() < FAILURE_RATE:
            self.failed += 1
            raise ConnectionError("The vector index did not answer.")


# -- with memstate_sa: one transaction -------------------------------------------------------------------------------


def adopt(engine: Engine, index: VectorIndex, sessions: sessionmaker[Session]) -> Memory:
    """Add memstate_sa to the application. `Memory.relay` must also run somewhere."""
    memory = Memory(index, embedder=WordLlamaEmbedder())
    memory.track(Note, text="text", metadata=("user_id", "role"))
    memory.create_tables(engine)
    memory.attach(sessions)
    return memory


def play_with_memstate(home: Path, turns: Iterable[Turn], crash_at: int | None, seed: int) -> None:
    network = CountingIndex(ChromaIndex(chroma(home), "notes"), rate=FAILURE_RATE, seed=seed)
    engine = database(home)
    sessions = sessionmaker(engine)
    memory = adopt(engine, network, sessions)

    report(waiting=sum(index.pending for index in memory.status(engine).values()))

    with memory.relay(engine) as relay:
        for turn in turns:
            with sessions() as session:
                write(session, turn)
                memory.annotate(session, actor="assistant", reason=f"turn {turn.number}, {turn.day}")
                session.commit()
                if turn.number == crash_at:
                    die()
            report(turn=turn.number, calls=network.calls, failed=network.failed)
        relay.drain(timeout=60)
    report(calls=network.calls, failed=network.failed)


class CountingIndex(FlakyIndex):
    """A failing index that counts its calls and failures."""

    calls = failed = 0

    def _moment(self) -> str | None:
        moment = super()._moment()
        self.calls += 1
        self.failed += moment is not None
        return moment


# -- the process -----------------------------------------------------------------------------------------------------


def think_between(turns: Sequence[Turn], done: int) -> Iterator[Turn]:
    """The turns after *done*, with pauses in between, as an assistant would make."""
    for turn in turns:
        if turn.number > done:
            time.sleep(THINKING_S / len(turns))
            yield turn


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def report(**figures: int) -> None:
    print(json.dumps(figures), flush=True)


SIDES = {"by-hand": play_by_hand, "memstate": play_with_memstate}


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("side", choices=SIDES)
    parser.add_argument("input", type=Path)
    parser.add_argument("home", type=Path)
    parser.add_argument("--crash-at", type=int)
    parser.add_argument("--seed", type=int, required=True)
    options = parser.parse_args()

    turns = parse(options.input.read_text("utf-8-sig"))
    with database(options.home).connect() as connection:
        done = connection.scalar(select(func.max(Played.turn))) or 0
    logging.basicConfig(format="%(asctime)s %(levelname)s %(name)s: %(message)s")
    SIDES[options.side](options.home, think_between(turns, done), options.crash_at, options.seed * 31 + done)


if __name__ == "__main__":
    main()
