"""A small application whose facts are tracked, and the comparison that ends every test."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from datetime import timedelta
from typing import Any, Literal

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from sqlalchemy import JSON, Engine, ForeignKey, String, delete, event, insert, select, text, update
from sqlalchemy.ext.mutable import MutableDict
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column, relationship

from memstate_sa.db.statements import take_write_lock
from memstate_sa.db.tables import cursor, holder, parked, utcnow
from memstate_sa.indexes import VectorIndex
from memstate_sa.relay import Relay
from tests.support.apps import App

PATIENCE_S = 3600
"""The time limit of a search. It is for hangs, not for slow machines."""

_TIMES = int(os.environ.get("MEMSTATE_PROGRAMS", "1"))


def sizes(small: int, deep: int) -> list[Any]:
    """Parameters of a search: its small size in `make test`, its large one in `make test-deep`."""
    return [pytest.param(small, id="small"), pytest.param(deep, id="deep", marks=pytest.mark.deep)]


def explore(examples: int, **strategies: Any) -> Callable[[Callable[..., None]], None]:
    """Run the decorated property at once, on *examples* examples. `make fuzz` multiplies them."""

    def run(holds: Callable[..., None]) -> None:
        checks = list(HealthCheck)
        settings(max_examples=examples * _TIMES, deadline=None, suppress_health_check=checks)(
            given(**strategies)(holds)
        )()

    return run


WAITING_FOR_A_LOCK = "FROM pg_stat_activity WHERE datname = current_database() AND wait_event_type = 'Lock'"
"""Sessions that wait for a lock in PostgreSQL. Other databases of the server may belong to other tests."""


class Base(DeclarativeBase):
    pass


class Person(Base):
    """A parent whose children are deleted with it, or when they are removed from it."""

    __tablename__ = "person"
    id: Mapped[int] = mapped_column(primary_key=True)
    name: Mapped[str]
    about: Mapped[str | None]
    notes: Mapped[list[Note]] = relationship(back_populates="person", cascade="all, delete-orphan")


class Note(Base):
    """A child with a composite key."""

    __tablename__ = "note"
    topic: Mapped[str] = mapped_column(String(40), primary_key=True)
    number: Mapped[int] = mapped_column(primary_key=True, autoincrement=False)
    person_id: Mapped[int] = mapped_column(ForeignKey("person.id"))
    content: Mapped[str]
    data: Mapped[dict[str, Any] | None] = mapped_column(MutableDict.as_mutable(JSON))
    person: Mapped[Person] = relationship(back_populates="notes")


class Tag(Base):
    """A fact with a string key. Its foreign key becomes NULL when the person is deleted."""

    __tablename__ = "tag"
    name: Mapped[str] = mapped_column(String(40), primary_key=True)
    meaning: Mapped[str] = mapped_column(default="unsaid")
    person_id: Mapped[int | None] = mapped_column(ForeignKey("person.id"))
    person: Mapped[Person | None] = relationship(backref="tags")


class World(App):
    """An application of people, their notes, and tags."""

    def __init__(
        self, engine: Engine, index: VectorIndex | None = None, *, capture: Literal["session", "trigger"] = "session"
    ) -> None:
        tracking: dict[Any, dict[str, Any]] = {
            Person: {"text": "about", "metadata": ("name",)},
            Note: {"text": "content", "metadata": ("topic", "number")},
            Tag: {"text": lambda tag: f"{tag.name} means {tag.meaning}", "metadata": ("name",)},
        }
        super().__init__(engine, *tracking, index=index, tracking=tracking, capture=capture)
        self.relay = self.memory.relay(engine)

    def assert_in_step(self) -> None:
        """Assert replay(log) == tables, and index == f(tables), by content."""
        self.assert_log_is_truth()
        self.relay.drain()
        with self.session() as session:
            expected = {
                **texts("person", session.scalars(select(Person)), lambda p: [p.id], lambda p: p.about),
                **texts("note", session.scalars(select(Note)), lambda n: [n.topic, n.number], lambda n: n.content),
                **texts(
                    "tag", session.scalars(select(Tag)), lambda t: [t.name], lambda t: f"{t.name} means {t.meaning}"
                ),
            }
        assert_index_holds(self.index, self.embedder, expected)


_OTHERS_WAIT = (
    "SELECT count(*) FROM pg_stat_activity WHERE datname = current_database() AND pid <> pg_backend_pid() "
    "AND (wait_event_type = 'Lock' OR wait_event = 'PgSleep')"
)


@contextmanager
def beside(engine: Engine, work: Callable[[], Any]) -> Iterator[Future[Any]]:
    """Run *work* in a thread. The block begins when it waits for another transaction, or has ended."""
    with ThreadPoolExecutor(1) as pool:
        future = pool.submit(work)
        deadline = time.monotonic() + 60
        with engine.connect().execution_options(isolation_level="AUTOCOMMIT") as watching:
            while not future.done() and not watching.execute(text(_OTHERS_WAIT)).scalar_one():
                assert time.monotonic() < deadline
                threading.Event().wait(0.01)
        yield future


def in_threads(count: int, work: Callable[[int], None]) -> list[BaseException]:
    """Run *work* in *count* threads that start together. Returns their errors."""
    barrier, errors = threading.Barrier(count), []

    def run(number: int) -> None:
        try:
            barrier.wait(30)
            work(number)
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=run, args=(number,)) for number in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return errors


def overtake(engine: Engine) -> None:
    """Let another owner take every slot of every index, as if ours had been stopped for longer than its lease."""
    other = {"owner": "elsewhere 1 x", "lease_until": utcnow() + timedelta(minutes=1)}
    with engine.begin() as connection:
        indexes = connection.execute(select(cursor.c.index, cursor.c.incarnation).distinct()).mappings().all()
        connection.execute(delete(holder))
        connection.execute(insert(holder), [{**index, **other} for index in indexes])
        connection.execute(update(cursor).values(epoch=cursor.c.epoch + 1, owner=other["owner"]))


def expire_leases(engine: Engine) -> None:
    with engine.begin() as connection:
        connection.execute(update(holder).values(lease_until=utcnow()))


def grow_older(engine: Engine, relay: Relay, by: timedelta) -> None:
    """Act as if *by* had passed since *relay* last renewed its lease."""
    delivery = relay._workers[0].delivery
    delivery.slot_worker._renew_at -= by.total_seconds()
    its = holder.c.owner == delivery._owner
    with engine.begin() as connection:
        take_write_lock(connection)
        for lease_until in connection.scalars(select(holder.c.lease_until).where(its).with_for_update()).all():
            connection.execute(update(holder).where(its).values(lease_until=lease_until - by))


def make_due(engine: Engine) -> None:
    """Act as if all parked keys had waited long enough."""
    with engine.begin() as connection:
        connection.execute(update(parked).values(next_at=utcnow() - timedelta(seconds=1)))


def connections_of_this_thread(engine: Engine) -> set[Any]:
    """The connections in use. A thread that wakes other relays also has one for a moment, which does not count."""
    held, me = set[Any](), threading.get_ident()

    def checked_out(driver: Any, record: Any, proxy: Any) -> None:
        if threading.get_ident() == me:
            held.add(record)

    event.listen(engine, "checkout", checked_out)
    event.listen(engine, "checkin", lambda driver, record: held.discard(record))
    return held


def texts(entity: str, rows: Iterable[Any], key: Any, text: Any) -> dict[str, str]:
    from memstate_sa.db.codec import encode_key

    return {entity + encode_key(key(row)): text(row) for row in rows if text(row) and text(row).strip()}


def assert_index_holds(index: VectorIndex, embedder: Any, expected: dict[str, str]) -> None:
    """Assert that *index* holds exactly these texts (by point id), each as its own vector."""
    ids: list[str] = []
    while entries := index.scan(ids[-1] if ids else None, 100):
        ids += [entry.id for entry in entries]
    assert sorted(ids) == sorted(expected)
    stored = {point.id: point.vector for point in index.get(ids)}
    wrong = [
        id_ for id_, text in expected.items() if not np.allclose(stored[id_], embedder.embed([text])[0], atol=1e-5)
    ]
    assert wrong == []
