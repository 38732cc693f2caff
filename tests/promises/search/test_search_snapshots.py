"""A transaction may have an older snapshot than the index. Its search says that hits may be missing."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import pytest
from sqlalchemy import Engine, create_engine, event, select

from memstate_sa import sqlite
from tests.support import Person, World


def begins_by_event(path: Path) -> Engine:
    """An engine with the SAVEPOINT recipe of SQLAlchemy's documentation."""
    engine = create_engine(f"sqlite:///{path}")

    @event.listens_for(engine, "connect")
    def connected(driver: Any, record: Any) -> None:
        driver.isolation_level = None
        driver.execute("PRAGMA journal_mode = WAL")

    @event.listens_for(engine, "begin")
    def began(connection: Any) -> None:
        connection.exec_driver_sql("BEGIN")

    return engine


def configured(path: Path) -> Engine:
    return sqlite.configure(create_engine(f"sqlite:///{path}"))  # type: ignore[no-any-return]


def change(world: World, about: str) -> None:
    with world.session() as session:
        session.get_one(Person, 1).about = about
        session.commit()
    world.relay.drain()


@pytest.mark.parametrize("consistency", ["fresh", "eventual"])
@pytest.mark.parametrize("make", [begins_by_event, configured])
def test_search_in_an_old_snapshot_is_not_complete(
    make: Callable[[Path], Engine], tmp_path: Path, consistency: Literal["fresh", "eventual"]
) -> None:
    """SQLite with a write-ahead log: the transaction began with a read, and another one has committed since.

    The same kind: the application's own BEGIN, Python's autocommit=False, a Session that reads and waits.
    """
    engine = make(tmp_path / "facts.db")
    world = World(engine)
    with world.session() as session:
        session.add_all([Person(id=1, name="p", about="tea"), Person(id=2, name="p", about="coffee")])
        session.commit()
    world.relay.drain()

    def found(session: Any) -> tuple[list[int], bool]:
        hits = world.memory.search(session, "tea", Person, limit=1, consistency=consistency)
        return [hit.fact.id for hit in hits], hits.complete

    with world.session() as session:
        if make is configured:
            session.connection().exec_driver_sql("BEGIN")
        assert session.scalars(select(Person.about).order_by(Person.id)).all() == ["tea", "coffee"]
        assert found(session) == ([1], True)
        change(world, "nothing of the kind")
        assert session.scalar(select(Person.about).where(Person.id == 1)) == "tea"
        assert found(session)[1] is False
        session.rollback()
        assert found(session)[1] is True
        session.get_one(Person, 2).about = "green tea"
        session.flush()
        assert found(session)[1] is True  # the single writer sees the latest rows
    world.memory.close()
    engine.dispose()


def test_search_in_repeatable_read_is_not_complete(postgres_engine: Engine) -> None:
    """PostgreSQL's isolation level decides this, whether or not there was a commit since."""
    world = World(postgres_engine.execution_options(isolation_level="REPEATABLE READ"))
    with world.session() as session:
        session.add(Person(id=1, name="p", about="tea"))
        session.commit()
        world.relay.drain()
        for consistency in ("fresh", "eventual"):
            assert not world.memory.search(session, "tea", Person, consistency=consistency).complete
    world.memory.close()
