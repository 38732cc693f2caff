"""A statement is interrupted or cancelled: its SQLite connection is closed, and its write lock is free at once."""

from __future__ import annotations

import asyncio
import gc
import sqlite3
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import aiosqlite.core
import pytest
from sqlalchemy import Engine, create_engine, event, text
from sqlalchemy.ext.asyncio import create_async_engine
from sqlalchemy.orm import Session

from memstate_sa import sqlite
from memstate_sa.db.tables import log
from tests.support import Tag, World
from tests.support.tags import tags

pytestmark = pytest.mark.sa20
WRITE, READ = text("INSERT INTO t VALUES (1)"), text("SELECT n FROM t")


@pytest.fixture
def file(tmp_path: Path) -> Iterator[Path]:
    """A database with one table. The garbage collector is off."""
    path = tmp_path / "a.db"
    with sqlite3.connect(path) as connection:
        connection.execute("CREATE TABLE t (n INTEGER)")
    connection.close()
    gc.disable()
    yield path
    gc.enable()


def write_at_once(path: Path) -> None:
    """Write. Raises OperationalError if another connection has the write lock."""
    connection = sqlite3.connect(path, timeout=0, isolation_level=None)
    try:
        connection.execute("BEGIN IMMEDIATE")
        connection.execute("ROLLBACK")
    finally:
        connection.close()


@pytest.mark.parametrize("how", ["connection", "session"])
@pytest.mark.parametrize("error", [KeyboardInterrupt, SystemExit])
def test_interrupted_statement_leaves_no_write_lock(file: Path, how: str, error: type[BaseException]) -> None:
    """The traceback still refers to the cursor.

    The same kind: an exception of a signal handler, gevent's GreenletExit, a timeout raised into a thread.

    Also an interrupted COMMIT, and an invalidated or detached connection.
    """
    engine: Engine = sqlite.configure(create_engine(f"sqlite:///{file}"))

    @event.listens_for(engine, "after_cursor_execute")
    def _interrupt(connection: Any, cursor: Any, statement: str, *_: Any) -> None:
        if statement.startswith("SELECT"):
            raise error

    opened = engine.connect() if how == "connection" else Session(engine)
    opened.execute(WRITE)
    with pytest.raises(error) as raised:
        opened.execute(READ)
    write_at_once(file)
    assert raised.traceback  # this reference keeps the exception and its cursor alive
    opened.close()
    engine.dispose()


@pytest.mark.parametrize("end", ["invalidate", "detach"])
def test_connection_that_is_given_up_leaves_no_write_lock(file: Path, end: str) -> None:
    """The cursor is still in use, like that of a partly read result."""
    engine: Engine = sqlite.configure(create_engine(f"sqlite:///{file}"))
    connection = engine.connect()
    connection.execute(WRITE)
    connection.execute(WRITE)
    result = connection.execute(READ)
    if end == "detach":
        connection.detach()
        connection.connection.close()
    else:
        connection.invalidate()
    write_at_once(file)
    assert result is not None
    engine.dispose()


@pytest.mark.parametrize("error", [KeyboardInterrupt, SystemExit])
def test_interrupted_look_at_a_row_raises_the_interrupt(world: World, error: type[BaseException]) -> None:
    """The interrupt comes in a statement of ours. The application's unused cursor is closed with the connection."""
    with Session(world.engine) as unattached:
        unattached.add(Tag(name="t", meaning="old"))
        unattached.commit()

    def interrupt(connection: Any, cursor: Any, statement: str, *_: Any) -> None:
        if log.name in statement:
            raise error

    with world.session() as session:
        session.get_one(Tag, "t").meaning = "new"
        event.listen(world.engine, "before_cursor_execute", interrupt)
        with pytest.raises(error):
            session.commit()
    event.remove(world.engine, "before_cursor_execute", interrupt)
    assert tags(world) == {"t": "old"}


async def test_cancelled_statement_leaves_no_write_lock(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same kind: wait_for() and asyncio.timeout(), a TaskGroup that fails, a client that closes its request."""
    engine = sqlite.configure(create_async_engine(f"sqlite+aiosqlite:///{file}"))
    execute = aiosqlite.core.Connection._execute

    async def cancelling(self: Any, function: Any, *arguments: Any, **options: Any) -> Any:
        if arguments and str(arguments[0]).startswith("SELECT"):
            asyncio.get_running_loop().call_soon(task.cancel)
        return await execute(self, function, *arguments, **options)

    async def work() -> None:
        async with engine.connect() as connection:
            await connection.execute(WRITE)
            monkeypatch.setattr(aiosqlite.core.Connection, "_execute", cancelling)
            await connection.execute(READ)

    task = asyncio.create_task(work())
    await asyncio.wait([task])
    assert task.cancelled()
    write_at_once(file)
    await engine.dispose()
