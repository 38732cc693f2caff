"""Unique values, immutable facts and expiry, also with sixteen concurrent writers."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
import sqlalchemy as sa
from pydantic import BaseModel
from sqlalchemy import Engine, ForeignKey, event, insert, select
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column, sessionmaker

from memstate_sa import ConflictError, Fact, Memory, MemoryStore, MemstateError
from memstate_sa.db.tables import UTCDateTime, unique, utcnow
from memstate_sa.indexes import InMemoryIndex
from memstate_sa.testing import HashEmbedder
from tests.support import apps, assert_index_holds, in_threads

pytestmark = pytest.mark.sa20

WRITERS = 16


class Base(DeclarativeBase):
    pass


class Seat(Base):
    __tablename__ = "seat"
    id: Mapped[int] = mapped_column(primary_key=True)
    row: Mapped[int]
    letter: Mapped[str] = mapped_column(sa.String(1))
    text: Mapped[str] = mapped_column(default="a seat")


class Note(Base):
    __tablename__ = "note"
    id: Mapped[int] = mapped_column(primary_key=True)
    text: Mapped[str]
    expires_at: Mapped[datetime | None] = mapped_column(UTCDateTime)


class Reply(Base):
    __tablename__ = "reply"
    id: Mapped[int] = mapped_column(primary_key=True)
    text: Mapped[str] = mapped_column(default="a reply")
    note_id: Mapped[int] = mapped_column(ForeignKey("note.id"))


class App(apps.App):
    def __init__(self, engine: Engine, *, capture: Any = "session") -> None:
        unique = {"unique_by": ("row", "letter"), "immutable": lambda seat: seat["row"] == 1, "capture": "session"}
        tracking = {Seat: unique, Note: {"expires": "expires_at"}}
        super().__init__(engine, Seat, Note, Reply, tracking=tracking, foreign_keys=True, capture=capture)

    def check(self) -> None:
        self.assert_log_is_truth()
        with self.engine.connect() as connection:
            seats = connection.execute(select(Seat.id, Seat.row, Seat.letter)).all()
            held = {row.key: row.value for row in connection.execute(select(unique))}
        assert held == {f"[{id_}]": f'[{row},"{letter}"]' for id_, row, letter in seats}


def test_only_one_of_sixteen_writers_gets_a_unique_value(engine: Engine) -> None:
    app = App(engine)

    def take(number: int) -> None:
        with app.sessions() as session:
            session.add(Seat(row=7, letter="A", text=f"taken by {number}"))
            session.commit()

    errors = in_threads(WRITERS, take)
    assert [type(error) for error in errors] == [ConflictError] * (WRITERS - 1)
    app.check()
    with app.sessions() as session:
        assert len(session.scalars(select(Seat)).all()) == 1


def test_only_one_of_sixteen_writers_moves_to_a_unique_value(engine: Engine) -> None:
    """Writers use an update, a bulk update, and a delete that frees the value."""
    app = App(engine)
    with app.sessions() as session:
        session.add_all([Seat(id=n, row=n + 100, letter="A") for n in range(1, WRITERS + 1)])
        session.commit()

    def move(number: int) -> None:
        with app.sessions() as session:
            if number % 2:
                session.get_one(Seat, number + 1).row = 7
            else:
                session.execute(sa.update(Seat).where(Seat.id == number + 1).values(row=7))
            session.commit()

    errors = in_threads(WRITERS, move)
    assert [type(error) for error in errors] == [ConflictError] * (WRITERS - 1)
    app.check()
    with app.sessions() as session:
        (winner,) = session.scalars(select(Seat).where(Seat.row == 7)).all()
        session.delete(winner)
        session.add(Seat(id=99, row=7, letter="A", text="in its place"))
        session.commit()
    app.check()


def test_sixteen_writers_cannot_change_an_immutable_fact(engine: Engine) -> None:
    app = App(engine)
    with app.sessions() as session:
        session.add(Seat(id=1, row=1, letter="A", text="first"))
        session.commit()

    def change(number: int) -> None:
        with app.sessions() as session:
            if number % 2:
                session.get_one(Seat, 1).text = f"changed by {number}"
            else:
                session.execute(sa.update(Seat).values(text=f"changed by {number}"))
            session.commit()

    errors = in_threads(WRITERS, change)
    assert [type(error) for error in errors] == [ConflictError] * WRITERS
    with app.sessions() as session:
        assert session.get_one(Seat, 1).text == "first"
    app.check()


def test_undo_ignores_the_unique_value_of_the_row_itself(engine: Engine) -> None:
    """The row's key has a unique value already. It is the row's own, so it does not block the undo."""
    app = App(engine)
    with app.sessions() as session:
        session.add(Seat(id=1, row=7, letter="A"))
        session.commit()
        for letter in "AC":
            app.memory.annotate(session, actor=f"deletes {letter}")
            session.delete(session.get_one(Seat, 1))
            session.commit()
            session.add(Seat(id=1, row=7, letter=letter, text="another"))
            session.commit()
            app.memory.rollback(session, actor=f"deletes {letter}", on_conflict="force")
            assert session.get_one(Seat, 1).letter == "A"
            session.commit()
            app.check()


class Setting(BaseModel):
    name: str
    value: int


def test_sixteen_writers_of_one_unique_fact_update_it(engine: Engine) -> None:
    """MemoryStore updates the existing fact. An immutable type refuses this."""
    with MemoryStore(engine, InMemoryIndex(), embedder=HashEmbedder(), background=False) as store:
        store.register_schema("setting", Setting, unique_by="name")
        store.register_schema("oath", Setting, unique_by="name", immutable=True)
        ids: list[str] = []

        def put(number: int) -> None:
            ids.append(store.commit(Fact(type="setting", payload={"name": "theme", "value": number})))

        assert in_threads(WRITERS, put) == []
        assert len(set(ids)) == 1
        assert len(store.query("setting")) == 1
        assert [change.op for change in store.history(ids[0])] == ["insert"] + ["update"] * (WRITERS - 1)

        def swear(number: int) -> None:
            store.commit(Fact(type="oath", payload={"name": "o", "value": number}))

        errors = in_threads(WRITERS, swear)
        assert [type(error) for error in errors] == [ConflictError] * (WRITERS - 1)
        assert len(store.query("oath")) == 1


# -- expiry ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("capture", ["session", "trigger"])
def test_sweep_deletes_expired_facts_and_logs_them(engine: Engine, capture: str) -> None:
    app = App(engine, capture=capture)
    now = utcnow()
    with app.sessions() as session:
        session.add_all([Note(id=n, text=f"note {n}", expires_at=now + timedelta(hours=n - 3)) for n in range(1, 5)])
        session.add(Note(id=5, text="for ever"))
        session.commit()
    assert app.memory.sweep(engine) == 3
    assert app.memory.sweep(engine) == 0
    app.check()
    app.memory.relay(engine).drain()
    assert_index_holds(app.index, app.embedder, {"note[4]": "note 4", "note[5]": "for ever"})
    with app.sessions() as session:
        last = app.memory.history(session, Note, 1)[-1]
        assert (last.op, last.reason) == ("delete", "expired")
        app.memory.rollback(session)  # a sweep is not a step
        session.commit()
        assert session.scalars(select(Note.id)).all() == []
        app.memory.rollback(session, tx=last.tx, on_conflict="force")
        session.commit()
        assert sorted(session.scalars(select(Note.id))) == [1, 2, 3]
    app.check()


def test_sweep_leaves_facts_that_others_refer_to(engine: Engine, caplog: pytest.LogCaptureFixture) -> None:
    app = App(engine)
    with app.sessions() as session:
        session.add_all([Note(id=n, text=f"note {n}", expires_at=utcnow() - timedelta(1)) for n in range(1, 4)])
        session.flush()
        session.add(Reply(note_id=2))
        session.commit()
    assert app.memory.sweep(engine) == 2
    assert "Cannot delete expired note [2] (IntegrityError)." in caplog.text
    with app.sessions() as session:
        assert session.scalars(select(Note.id)).all() == [2]
    app.check()


@pytest.mark.deep_on("postgres")
@pytest.mark.parametrize("referred", [1, 700, 1000])
def test_sweep_passes_referenced_facts_in_few_statements(engine: Engine, referred: int) -> None:
    """The page is bisected, so this costs a few more pages, not a page for each fact."""
    app = App(engine)
    statements: list[str] = []
    event.listen(engine, "before_cursor_execute", lambda *args: statements.append(args[2]))

    def sweep() -> int:
        with app.sessions() as session:
            times = {"text": "note", "expires_at": utcnow() - timedelta(1)}
            session.execute(insert(Note), [{"id": n, **times} for n in range(1, 1001) if session.get(Note, n) is None])
            session.commit()
        statements.clear()
        assert app.memory.sweep(engine) == 1000 - len(held)
        return len(statements)

    held: list[int] = []
    page = sweep() / 3
    with app.sessions() as session:
        session.add(Note(id=referred, text="note", expires_at=utcnow() - timedelta(1)))
        session.flush()
        session.add(Reply(note_id=referred))
        session.commit()
    held.append(referred)
    assert sweep() < 25 * page
    with app.sessions() as session:
        assert session.scalars(select(Note.id)).all() == held
    app.check()


def test_sweep_deletes_facts_between_many_referenced_ones(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    """A whole page is referenced, or every second fact. All other facts are deleted."""
    monkeypatch.setattr("memstate_sa.maintenance.expiry._PAGE", 8)
    app = App(engine)
    with app.sessions() as session:
        session.add_all([Note(id=n, text=f"note {n}", expires_at=utcnow() - timedelta(1)) for n in range(40)])
        session.flush()
        held = [*range(0, 20, 2), *range(25, 40)]
        session.add_all([Reply(note_id=n) for n in held])
        session.commit()
    assert app.memory.sweep(engine) == 40 - len(held)
    with app.sessions() as session:
        assert session.scalars(select(Note.id).order_by(Note.id)).all() == held
    app.check()


def test_sweep_does_not_count_facts_that_it_leaves(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    """One fact of a page is refused, and pages are full."""
    monkeypatch.setattr("memstate_sa.maintenance.expiry._PAGE", 5)
    app = App(engine)
    with app.sessions() as session:
        session.add_all([Note(id=n, text=f"note {n}", expires_at=utcnow() - timedelta(1)) for n in range(1, 13)])
        session.flush()
        session.add(Reply(note_id=2))
        session.commit()
    assert app.memory.sweep(engine) == 11
    with app.sessions() as session:
        assert session.scalars(select(Note.id)).all() == [2]
    app.check()


def test_a_relay_sweeps(engine: Engine) -> None:
    app = App(engine)
    with app.sessions() as session:
        session.add(Note(id=1, text="old", expires_at=utcnow() - timedelta(1)))
        session.commit()
    relay = app.memory.relay(engine)
    relay.drain()
    relay.drain()
    with app.sessions() as session:
        assert session.get(Note, 1) is None
    relay.drain()
    assert_index_holds(app.index, app.embedder, {})
    app.check()


def test_relay_older_than_the_class_sweeps_it(engine: Engine) -> None:
    index = InMemoryIndex()
    memory = Memory(index, embedder=HashEmbedder())
    relay = memory.relay(engine)
    memory.track(Note, text="text", expires="expires_at")
    Base.metadata.create_all(engine)
    memory.create_tables(engine)
    memory.attach(sessions := sessionmaker(engine))
    with sessions() as session:
        session.add_all([Note(id=1, text="old", expires_at=utcnow() - timedelta(1)), Note(id=2, text="young")])
        session.commit()
    relay.drain()
    with sessions() as session:
        assert session.scalars(select(Note.id)).all() == [2]
        assert [change.op for change in memory.history(session, Note, 1)] == ["insert", "delete"]
    relay.drain()
    assert_index_holds(index, HashEmbedder(), {"note[2]": "young"})


def test_concurrent_sweepers_delete_each_fact_once(engine: Engine) -> None:
    app = App(engine)
    with engine.begin() as connection:
        rows = [{"text": "old", "expires_at": utcnow() - timedelta(1)} for _ in range(1200)]
        connection.execute(insert(Note), rows)
    counts: list[int] = []
    assert in_threads(4, lambda _: counts.append(app.memory.sweep(engine))) == []
    assert sum(counts) == 1200
    app.check()


def test_fact_with_a_ttl_expires(engine: Engine) -> None:
    with MemoryStore(engine, InMemoryIndex(), embedder=HashEmbedder(), background=False) as store:
        gone = store.commit(Fact(type="n", payload={"a": 1}, expires_at=datetime(2020, 1, 1, tzinfo=UTC)))
        kept = store.commit(Fact(type="n", payload={"a": 2}), ttl=timedelta(days=1))
        for ttl in (timedelta(), timedelta(days=-1), 60):
            with pytest.raises(MemstateError, match="ttl"):
                store.commit(Fact(type="n", payload={}), ttl=ttl)  # type: ignore[arg-type]
        assert store.memory.sweep(engine) == 1
        assert (store.get(gone), [fact.id for fact in store.query()]) == (None, [kept])


def test_expires_must_be_a_column_of_times() -> None:
    memory = Memory(InMemoryIndex(), embedder=HashEmbedder())
    with pytest.raises(MemstateError, match="holds no times"):
        memory.track(Note, text="text", expires="text")
    with pytest.raises(MemstateError, match="has no column attribute"):
        memory.track(Note, text="text", expires="nothing")
