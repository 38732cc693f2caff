"""Rows of a class with ``unique_by`` that are older than tracking."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator

import pytest
from sqlalchemy import Engine, insert, select, text
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column

from memstate_sa import ConflictError
from memstate_sa.db.tables import log, outbox, unique
from tests.support import WAITING_FOR_A_LOCK
from tests.support.apps import App

pytestmark = pytest.mark.sa20


class Base(DeclarativeBase):
    pass


class Seat(Base):
    __tablename__ = "seat"
    id: Mapped[int] = mapped_column(primary_key=True)
    guest: Mapped[str | None]
    meal: Mapped[str] = mapped_column(default="")


class Hall(App):
    """Seats with one guest each. Rows that are older than tracking may share a guest."""

    def __init__(self, engine: Engine) -> None:
        super().__init__(engine, Seat, text="meal", unique_by=("guest",))

    def fill(self, *guests: str | None) -> None:
        with self.engine.begin() as connection:
            seats = [{"id": n, "guest": guest, "meal": "soup"} for n, guest in enumerate(guests, 1)]
            connection.execute(insert(Seat.__table__), seats)

    def logged(self) -> list[tuple[str, str]]:
        with self.engine.connect() as connection:
            return [tuple(row) for row in connection.execute(select(log.c.key, log.c.op).order_by(log.c.id))]

    def marked(self) -> set[str]:
        with self.engine.connect() as connection:
            return set(connection.scalars(select(outbox.c.key)))

    def holders(self) -> dict[str, str]:
        with self.engine.connect() as connection:
            return {row.value: row.key for row in connection.execute(select(unique))}


@pytest.fixture
def hall(engine: Engine) -> Iterator[Hall]:
    made = Hall(engine)
    yield made
    made.memory.close()


@pytest.fixture
def postgres_hall(postgres_engine: Engine) -> Iterator[Hall]:
    made = Hall(postgres_engine)
    yield made
    made.memory.close()


def baselines(*ids: int) -> list[tuple[str, str]]:
    return [(f"[{id_}]", "baseline") for id_ in ids]


def poll(is_true: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 60
    while not is_true():
        assert time.monotonic() < deadline
        time.sleep(0.01)


@pytest.mark.parametrize("batch_size", [1, 4, 100])
def test_first_of_equal_rows_gets_the_unique_value(
    hall: Hall, batch_size: int, caplog: pytest.LogCaptureFixture
) -> None:
    """All rows get their history. The first has the value. The warning names the other rows, but not the value."""
    hall.fill("Ann", "Bob", "Ann", None, "Cid", None, "Ann", "Bob")
    assert hall.memory.backfill(hall.engine, batch_size=batch_size) == 8
    assert hall.logged() == baselines(*range(1, 9))
    assert hall.marked() == {f"[{n}]" for n in range(1, 9)}
    assert hall.holders() == {'["Ann"]': "[1]", '["Bob"]': "[2]", '["Cid"]': "[5]"}
    warnings = [record.getMessage() for record in caplog.records if record.name == "memstate_sa.recorder"]
    named = [key for warning in warnings for key in warning.rpartition(": ")[2].split(", ")]
    assert named == ["[3]", "[7]", "[8]"]
    assert not any(name in caplog.text for name in ("Ann", "Bob", "Cid"))
    assert hall.memory.backfill(hall.engine) == 0


def test_changed_duplicate_must_become_unique(hall: Hall) -> None:
    """A changed row must be unique. A value that a row gives up is free."""
    hall.fill("Ann", "Ann", "Ann", "Ann")
    hall.memory.backfill(hall.engine)
    with hall.sessions() as session:
        session.get_one(Seat, 2).meal = "fish"
        with pytest.raises(ConflictError, match="same value of unique_by"):
            session.commit()
        session.rollback()
        session.get_one(Seat, 2).guest = "Bob"
        session.delete(session.get_one(Seat, 3))
        session.commit()
        session.get_one(Seat, 1).guest = "Cid"
        session.commit()
        session.get_one(Seat, 4).meal = "fish"
        session.commit()
    assert hall.holders() == {'["Bob"]': "[2]", '["Cid"]': "[1]", '["Ann"]': "[4]"}


@pytest.mark.parametrize("commits", [True, False])
@pytest.mark.parametrize("wanted", [1, 5, 9], ids=["the first row", "the row with that guest", "the last row"])
@pytest.mark.parametrize("batch_size", [1, 100])
def test_backfill_waits_for_a_unique_value_without_deadlock(
    postgres_hall: Hall, wanted: int, batch_size: int, commits: bool
) -> None:
    """It holds no row of the batch while it waits for the value, so there is no deadlock."""
    hall, engine = postgres_hall, postgres_hall.engine
    hall.fill(*(f"guest {n}" for n in range(1, 10)))
    added: list[int] = []
    worker = threading.Thread(target=lambda: added.append(hall.memory.backfill(engine, batch_size=batch_size)))
    with hall.sessions() as session:
        session.add(Seat(id=100, guest="guest 5", meal="fish"))
        session.flush()
        worker.start()
        poll(lambda: waits_for_value(engine))
        session.get_one(Seat, wanted).meal = "fish"
        if wanted == 5:
            session.get_one(Seat, 5).guest = "somebody else"
        session.flush()
        if commits:
            session.commit()
        else:
            session.rollback()
    worker.join(60)
    assert not worker.is_alive()
    assert added  # it ended without an error
    ops: dict[str, list[str]] = {}
    for key, op in hall.logged():
        ops.setdefault(key, []).append(op)
    expected = {f"[{n}]": ["baseline"] for n in range(1, 10)}
    holders = {f'["guest {n}"]': f"[{n}]" for n in range(1, 10)}
    if commits:
        expected |= {f"[{wanted}]": ["baseline", "update"], "[100]": ["insert"]}
        holders['["guest 5"]'] = "[100]"
        if wanted == 5:
            holders['["somebody else"]'] = "[5]"
    assert ops == expected
    assert hall.holders() == holders
    assert hall.marked() == expected.keys()


def waits_for_value(engine: Engine) -> bool:
    waiting = text(f"SELECT count(*) {WAITING_FOR_A_LOCK} AND query LIKE 'INSERT INTO memstate_unique%'")
    with engine.connect() as connection:
        return connection.scalar(waiting) == 1
