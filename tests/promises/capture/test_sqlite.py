"""sqlite.configure(): transactions begin at the right time and with the right lock."""

from __future__ import annotations

import warnings
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from sqlalchemy import Engine, create_engine, event, insert, select, text
from sqlalchemy.exc import OperationalError
from sqlalchemy.orm import Session

from memstate_sa.db import sqlite
from tests.support import Base, Tag, World, sizes
from tests.support.apps import make_app

pytestmark = pytest.mark.sa20


@pytest.fixture
def configured(tmp_path: Path) -> Engine:
    engine: Engine = sqlite.configure(create_engine(f"sqlite:///{tmp_path / 'x.db'}"), busy_timeout_s=0.2)
    Base.metadata.create_all(engine)
    return engine


def test_a_savepoint_first_does_not_leak(configured: Engine) -> None:
    """In the driver's default mode these rows would survive the rollback."""
    with Session(configured) as session:
        with session.begin_nested():
            session.add(Tag(name="t"))
        session.rollback()
        assert session.scalars(select(Tag)).all() == []


def test_statements_that_fail_in_a_transaction_are_sent_outside_of_one(configured: Engine) -> None:
    """The driver itself sends them outside, too."""
    with configured.connect() as connection:
        for statement in ("ATTACH DATABASE ':memory:' AS other", "DETACH DATABASE other", "VACUUM", "vacuum main"):
            connection.execute(text(statement))
            assert not sqlite.in_transaction(connection)
        connection.execute(text("ANALYZE"))
        assert sqlite.in_transaction(connection)


def test_an_engine_that_would_leak_is_warned_of(tmp_path: Path) -> None:
    """It warns once, with the line that fixes it. doctor tests it and reports it. A custom recipe is accepted."""
    leaking, own = (create_engine(f"sqlite:///{tmp_path / name}.db") for name in ("leaking", "own"))
    event.listen(own, "connect", lambda dbapi, record: setattr(dbapi, "isolation_level", None))
    event.listen(own, "begin", lambda connection: connection.exec_driver_sql("BEGIN"))
    for engine, leaks in ((leaking, True), (own, False)):
        app = make_app(engine, Tag, text="meaning")
        for first in (True, False):
            with app.session() as session, warnings.catch_warnings(record=True) as caught:
                warnings.simplefilter("always")
                session.execute(select(Tag))
                assert [each.category for each in caught] == ([sqlite.SavepointWarning] if leaks and first else [])
        assert sqlite.leaks_savepoints(engine) is leaks
        problems = [problem.subject for problem in app.memory.doctor(engine).problems]
        assert problems == (["SAVEPOINTs"] if leaks else [])
        engine.dispose()


@pytest.mark.parametrize("transactions", sizes(40, 250))
def test_commits_succeed_beside_a_writing_relay(tmp_path: Path, transactions: int) -> None:
    """Four threads read and then write in each transaction. None fails."""
    engine = sqlite.configure(create_engine(f"sqlite:///{tmp_path / 'x.db'}"))
    world = World(engine)
    with world.session() as session:
        session.add_all(Tag(name=f"t{n}", meaning="0") for n in range(4))
        session.commit()

    def write(name: str) -> None:
        for _ in range(transactions):
            with world.session() as session:
                tag = session.get_one(Tag, name)
                tag.meaning = str(int(tag.meaning) + 1)
                session.commit()

    with world.memory.relay(engine), ThreadPoolExecutor(4) as pool:
        list(pool.map(write, [f"t{n}" for n in range(4)]))
    with world.session() as session:
        assert {tag.meaning for tag in session.scalars(select(Tag))} == {str(transactions)}
    world.assert_in_step()
    engine.dispose()


def test_a_transaction_that_reads_first_can_write_beside_another_writer(configured: Engine) -> None:
    """A deferred BEGIN would fail here with 'database is locked' after any timeout."""
    with configured.connect() as reader, configured.connect() as writer:
        reader.execute(select(Tag)).all()
        writer.execute(insert(Tag), {"name": "w"})
        writer.commit()
        reader.execute(insert(Tag), {"name": "r"})
        reader.commit()
        assert sorted(writer.scalars(select(Tag.name))) == ["r", "w"]


def test_readers_do_not_hold_the_write_lock(configured: Engine) -> None:
    """Two transactions may read at once. The second writer waits, and fails after the timeout."""
    with configured.connect() as one, configured.connect() as two:
        one.execute(select(Tag)).all()
        two.execute(insert(Tag), {"name": "w"})
        with pytest.raises(OperationalError, match="locked"):
            one.execute(insert(Tag), {"name": "r"})


def test_a_read_with_a_common_table_expression_is_a_read(configured: Engine) -> None:
    """Text after WITH that may be a write counts as a write."""
    names = select(Tag.name).cte("names")
    with configured.connect() as one, configured.connect() as two:
        two.execute(insert(Tag), {"name": "w"})
        assert one.scalars(select(names)).all() == []
        with pytest.raises(OperationalError, match="locked"):
            one.execute(text("WITH old AS (SELECT * FROM tag) DELETE FROM tag WHERE name IN (SELECT name FROM old)"))


@pytest.mark.parametrize("told", ["engine", "connection"])
def test_autocommit_is_left_alone(tmp_path: Path, told: str) -> None:
    """There is no commit there, so a transaction would be rolled back when the connection returns to the pool."""
    given = {"isolation_level": "AUTOCOMMIT"}
    engine = sqlite.configure(create_engine(f"sqlite:///{tmp_path / 'x.db'}", **given if told == "engine" else {}))
    Tag.metadata.create_all(engine)
    with engine.connect().execution_options(**given if told == "connection" else {}) as connection:
        connection.execute(insert(Tag), {"name": "kept"})
    with engine.connect() as connection:
        assert connection.scalars(select(Tag.name)).all() == ["kept"]
    engine.dispose()


def test_configure_sets_wal_once(configured: Engine) -> None:
    """WAL is set once, even if configure() is called often. An engine of another database is left alone."""
    assert sqlite.configure(configured) is configured
    with configured.connect() as connection:
        assert connection.scalar(text("PRAGMA journal_mode")) == "wal"
        assert connection.scalar(text("PRAGMA busy_timeout")) == 200
    other = create_engine("postgresql+psycopg://nowhere/x")
    assert sqlite.configure(other) is other and not other.dispatch.before_cursor_execute


@pytest.mark.parametrize(
    ("url", "expected"),
    [
        ("sqlite://", True),
        ("sqlite:///:memory:", True),
        ("sqlite:///x.db", False),
        ("postgresql+psycopg://nowhere/x", False),
    ],
)
def test_in_memory_databases_are_recognised(url: str, expected: bool) -> None:
    """The URL or the pool shows it."""
    assert sqlite.is_in_memory(create_engine(url)) is expected
