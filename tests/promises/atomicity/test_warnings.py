"""Our warnings point to the application's line. `python -W error` and filters by module rely on it."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import create_engine, insert
from sqlalchemy.ext.asyncio import async_sessionmaker, create_async_engine
from sqlalchemy.orm import Session, sessionmaker

from memstate_sa import Memory, sqlite
from memstate_sa.capture.guard import UntrackedWriteWarning
from memstate_sa.db.sqlite import SavepointWarning
from memstate_sa.indexes import InMemoryIndex
from memstate_sa.testing import HashEmbedder
from tests.support import Base, Tag

pytestmark = pytest.mark.sa20
ROW = insert(Tag.__table__).values(name="a", meaning="b")  # type: ignore[arg-type]


def flush(session: Session) -> None:
    session.add(Tag(name="a", meaning="b"))
    session.flush()


def execute(session: Session) -> None:
    session.connection().execute(ROW)


def commit(session: Session) -> None:
    session.add(Tag(name="a", meaning="b"))
    session.commit()


def attached(sessions: Any, file: Path) -> Memory:
    engine = create_engine(f"sqlite:///{file}")
    Base.metadata.create_all(engine)
    memory = Memory(InMemoryIndex(), embedder=HashEmbedder())
    memory.track(Tag, text="meaning", on_untracked="warn")
    memory.create_tables(engine)
    memory.attach(sessions)
    engine.dispose()
    return memory


def lines(caught: list[warnings.WarningMessage], category: type[Warning]) -> list[str]:
    return [warning.filename for warning in caught if warning.category is category]


@pytest.mark.parametrize("use", [flush, execute, commit])
def test_warning_points_at_the_line_of_the_application(tmp_path: Path, use: Callable[[Session], None]) -> None:
    """The same kind: autoflush by a query, bulk statements, a scoped_session, a MemoryStore, each of our warnings."""
    engine = create_engine(f"sqlite:///{tmp_path / 'a.db'}")
    sessions = sessionmaker(engine)
    memory = attached(sessions, tmp_path / "a.db")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        with sessions() as session:
            use(session)
            session.rollback()
    assert lines(caught, SavepointWarning) == [__file__]
    assert lines(caught, UntrackedWriteWarning) == ([__file__] if use is execute else [])
    memory.close()
    engine.dispose()


async def test_warning_of_an_async_session_points_there_too(tmp_path: Path) -> None:
    """Its statements run in a greenlet, whose frames do not lead to the caller."""
    engine = sqlite.configure(create_async_engine(f"sqlite+aiosqlite:///{tmp_path / 'a.db'}"))
    sessions = async_sessionmaker(engine)
    memory = attached(sessions, tmp_path / "a.db")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        async with sessions() as session:
            await (await session.connection()).execute(ROW)
            await session.rollback()
    assert lines(caught, UntrackedWriteWarning) == [__file__]
    memory.close()
    await engine.dispose()


def test_error_filter_of_a_module_sees_our_warning(tmp_path: Path) -> None:
    engine = create_engine(f"sqlite:///{tmp_path / 'a.db'}")
    sessions = sessionmaker(engine)
    memory = attached(sessions, tmp_path / "a.db")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        warnings.filterwarnings("error", category=SavepointWarning, module=__name__)
        with sessions() as session, pytest.raises(SavepointWarning):
            flush(session)
    memory.close()
    engine.dispose()
