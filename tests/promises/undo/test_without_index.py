"""A Memory without an index: history, undo, expiry and retention work, and search says what is missing."""

from __future__ import annotations

from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
from sqlalchemy import DateTime, Engine, func, select
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column, sessionmaker

from memstate_sa import Memory, MemstateError, MissingExtra
from memstate_sa.db.tables import outbox
from memstate_sa.indexes import InMemoryIndex
from memstate_sa.testing import HashEmbedder
from tests.support.relays import eventually

pytestmark = pytest.mark.sa20


class Base(DeclarativeBase):
    pass


class Note(Base):
    __tablename__ = "note"
    id: Mapped[int] = mapped_column(primary_key=True)
    text: Mapped[str]
    expires: Mapped[datetime | None] = mapped_column(DateTime(timezone=True))


class Notes:
    """Notes in a database, and a Memory of them."""

    def __init__(self, engine: Engine, memory: Memory) -> None:
        self.engine, self.memory = engine, memory
        memory.track(Note, text="text", expires="expires")
        self.sessions = sessionmaker(engine)
        memory.attach(self.sessions)
        Base.metadata.create_all(engine)
        memory.create_tables(engine)

    def write(self, *notes: Note) -> None:
        with self.sessions.begin() as session:
            session.add_all(notes)

    def outbox_size(self) -> int:
        with self.engine.connect() as connection:
            return connection.scalar(select(func.count()).select_from(outbox)) or 0

    def texts(self) -> list[str]:
        with self.sessions() as session:
            return list(session.scalars(select(Note.text).order_by(Note.id)))


@pytest.fixture
def notes(engine: Engine) -> Iterator[Notes]:
    notes = Notes(engine, Memory())
    yield notes
    notes.memory.close()


def test_history_and_undo_work(notes: Notes) -> None:
    notes.write(Note(id=1, text="green tea"))
    with notes.sessions.begin() as session:
        session.get_one(Note, 1).text = "coffee"
    with notes.sessions.begin() as session:
        assert [change.op for change in notes.memory.history(session, Note, 1)] == ["insert", "update"]
        assert len(notes.memory.rollback(session)) == 1
    assert notes.texts() == ["green tea"]
    assert notes.memory.verify(notes.engine).clean
    assert notes.memory.doctor(notes.engine).healthy
    assert notes.memory.status(notes.engine) == {}
    with notes.sessions() as session:
        notes.memory.wait(session)


def test_search_says_that_there_is_no_index(notes: Notes) -> None:
    with notes.sessions() as session:
        for options in ({}, {"index": "other"}, {"as_of": datetime.now(UTC)}):
            with pytest.raises(
                MemstateError, match=r"Cannot search: there is no index\. Give one as index= to Memory or MemoryStore"
            ):
                notes.memory.search(session, "tea", Note, **options)
    with pytest.raises(MemstateError, match="Cannot embed: there is no index"):
        _ = notes.memory.embedder


def test_what_needs_an_index_is_refused() -> None:
    with pytest.raises(MemstateError, match="Cannot use delivery='strict' without an index"):
        Memory(delivery="strict")
    with pytest.raises(MemstateError, match="Cannot use index='other': this Memory has no index"):
        Memory().track(Note, text="text", index="other")


def test_its_relay_deletes_outbox_entries_only_where_there_is_no_index(notes: Notes) -> None:
    """Another Memory has an index of the same rows: its entries stay, and are delivered."""
    notes.write(Note(id=1, text="green tea"))
    assert notes.outbox_size()
    assert notes.memory.relay(notes.engine).run_once() == 0
    assert notes.outbox_size() == 0

    index = InMemoryIndex()
    other = Notes(notes.engine, Memory(index, embedder=HashEmbedder()))
    relay = other.memory.relay(notes.engine)
    assert relay.drain() == 1, "the row, whose entry is gone, came with the first filling"
    notes.write(Note(id=2, text="coffee"))
    notes.memory.relay(notes.engine).drain()
    assert notes.outbox_size()
    assert relay.drain() == 1
    assert {entry.id for entry in index.scan(None, 10)} == {"note[1]", "note[2]"}
    other.memory.close()


def test_its_relay_sweeps_in_the_background(notes: Notes) -> None:
    now = datetime.now(UTC)
    notes.write(Note(id=1, text="old", expires=now - timedelta(hours=1)), Note(id=2, text="new"))
    with notes.memory.relay(notes.engine) as relay:
        relay.start()
        eventually(lambda: notes.texts() == ["new"])
    relay.stop()


def test_the_default_embedder_is_made_when_first_needed(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    def find_nothing(name: str, *_: Any) -> None:
        return None

    monkeypatch.setattr("memstate_sa.embedders.find_spec", find_nothing)
    notes = Notes(engine, Memory(InMemoryIndex()))
    notes.write(Note(id=1, text="green tea"))
    with notes.sessions() as session:
        assert len(notes.memory.history(session, Note, 1)) == 1
        with pytest.raises(MissingExtra, match="wordllama"):
            notes.memory.search(session, "tea", Note)
    notes.memory.close()
