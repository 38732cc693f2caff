"""sqlite.configure(): transactions that begin when, and as strongly as, they must."""

from __future__ import annotations

from pathlib import Path

import pytest
from sqlalchemy import Engine, create_engine, insert, select, text
from sqlalchemy.exc import OperationalError
from sqlalchemy.orm import Session

from memstate_sa import MemstateError, sqlite
from tests.support import Base, Tag

pytestmark = pytest.mark.sa20


@pytest.fixture
def configured(tmp_path: Path) -> Engine:
    engine: Engine = sqlite.configure(create_engine(f"sqlite:///{tmp_path / 'x.db'}"), busy_timeout_s=0.2)
    Base.metadata.create_all(engine)
    return engine


def test_a_savepoint_first_does_not_leak(configured: Engine) -> None:
    """In the driver's own mode these rows survive the rollback."""
    with Session(configured) as session:
        with session.begin_nested():
            session.add(Tag(name="t"))
        session.rollback()
        assert session.scalars(select(Tag)).all() == []


def test_a_transaction_that_reads_first_can_write_beside_another_writer(configured: Engine) -> None:
    """A deferred BEGIN fails here with 'database is locked' whatever the timeout."""
    with configured.connect() as reader, configured.connect() as writer:
        reader.execute(select(Tag)).all()
        writer.execute(insert(Tag), {"name": "w"})
        writer.commit()
        reader.execute(insert(Tag), {"name": "r"})
        reader.commit()
        assert sorted(writer.scalars(select(Tag.name))) == ["r", "w"]


def test_readers_do_not_hold_the_write_lock(configured: Engine) -> None:
    """Two may read at once; the second writer waits, and is told after the timeout."""
    with configured.connect() as one, configured.connect() as two:
        one.execute(select(Tag)).all()
        two.execute(insert(Tag), {"name": "w"})
        with pytest.raises(OperationalError, match="locked"):
            one.execute(insert(Tag), {"name": "r"})


def test_wal_and_idempotence(configured: Engine) -> None:
    """Configured once, however often it is called; only for SQLite."""
    assert sqlite.configure(configured) is configured
    with configured.connect() as connection:
        assert connection.scalar(text("PRAGMA journal_mode")) == "wal"
        assert connection.scalar(text("PRAGMA busy_timeout")) == 200
    with pytest.raises(MemstateError, match="for SQLite engines, not postgresql"):
        sqlite.configure(create_engine("postgresql+psycopg://nowhere/x"))


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
    """By their URL or their pool."""
    assert sqlite.is_in_memory(create_engine(url)) is expected
