"""A Session spreads the rows of one class over several databases. It is logged where it writes, or refused."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import Engine, create_engine, delete, insert, select, update
from sqlalchemy.ext.horizontal_shard import ShardedSession
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column, sessionmaker

from memstate_sa import MemstateError, sqlite
from memstate_sa.db.tables import log
from tests.support.apps import App

pytestmark = pytest.mark.sa20


class Base(DeclarativeBase):
    pass


class Note(Base):
    """Odd ids are in the shard "one", even ids in the shard "two"."""

    __tablename__ = "note"
    id: Mapped[int] = mapped_column(primary_key=True)
    text: Mapped[str]


def shard_of(key: int) -> str:
    return "one" if key % 2 else "two"


@pytest.fixture
def shards(engine: Engine, tmp_path: Path) -> Iterator[dict[str, Engine]]:
    other = sqlite.configure(create_engine(f"sqlite:///{tmp_path / 'two.db'}"))
    yield {"one": engine, "two": other}
    other.dispose()


@pytest.fixture
def sharded(shards: dict[str, Engine]) -> sessionmaker[ShardedSession]:
    """Sessions on both shards. Each shard has a row that is older than tracking."""
    app = App(shards["one"], Note)
    Base.metadata.create_all(shards["two"])
    app.memory.create_tables(shards["two"])
    for key in (1, 2):
        with shards[shard_of(key)].begin() as connection:
            connection.execute(insert(Note).values(id=key, text="old"))
    sessions = sessionmaker(
        class_=ShardedSession,
        shards=shards,
        shard_chooser=lambda mapper, instance, clause=None: "one" if instance is None else shard_of(instance.id),
        identity_chooser=lambda mapper, key, **_: [shard_of(key[0])],
        execute_chooser=lambda state: list(shards),
    )
    app.memory.attach(sessions)
    return sessions


def logged(engine: Engine) -> list[tuple[str, str]]:
    with engine.connect() as connection:
        return [tuple(row) for row in connection.execute(select(log.c.key, log.c.op).order_by(log.c.id))]


@pytest.mark.parametrize("name", ["one", "two"])
def test_a_flush_is_logged_in_the_shard_that_it_writes(
    shards: dict[str, Engine], sharded: sessionmaker[ShardedSession], name: str
) -> None:
    old, new = (1, 3) if name == "one" else (2, 4)
    with sharded() as session:
        session.add(Note(id=new, text="new"))
        session.get_one(Note, old).text = "changed"
        session.commit()
    assert sorted(logged(shards.pop(name))) == [
        (f"[{old}]", "baseline"),
        (f"[{old}]", "update"),
        (f"[{new}]", "insert"),
    ]
    assert [logged(other) for other in shards.values()] == [[]]


WRITES: dict[str, Any] = {
    "flush of new rows": lambda session: session.add_all([Note(id=3, text="a"), Note(id=4, text="b")]),
    "flush of changed rows": lambda session: [setattr(session.get_one(Note, key), "text", "x") for key in (1, 2)],
    "insert": lambda session: session.execute(insert(Note).values(id=3, text="x")),
    "update": lambda session: session.execute(update(Note).values(text="x")),
    "delete": lambda session: session.execute(delete(Note)),
}


@pytest.mark.parametrize("way", WRITES)
def test_a_write_to_two_shards_is_refused(
    shards: dict[str, Engine], sharded: sessionmaker[ShardedSession], way: str
) -> None:
    """The log of one shard does not cover the other. No row changes without an entry."""
    with sharded() as session:
        with pytest.raises(MemstateError, match="the Session writes to two databases"):
            WRITES[way](session)
            session.commit()
        session.rollback()
    for engine in shards.values():
        with engine.connect() as connection:
            assert connection.scalars(select(Note.text)).all() == ["old"]
        assert logged(engine) == []
