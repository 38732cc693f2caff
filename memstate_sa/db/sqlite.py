"""SQLite as memstate_sa wants it: WAL, and transactions that begin when, and as strongly as, they must.

The driver's own transactions begin at the first INSERT, too late for a SAVEPOINT before it, whose rows then survive a
rollback. A deferred BEGIN fails with "database is locked" when it turns from reading to writing beside another writer;
BEGIN IMMEDIATE from the first read starves that other writer. So: BEGIN IMMEDIATE before the first statement that is
not a SELECT. Reads before it see each the latest commit.
"""

from __future__ import annotations

import asyncio
import sqlite3
import threading
import time
import weakref
from contextlib import suppress
from typing import Any, Protocol

from sqlalchemy import SelectBase, event, text
from sqlalchemy.engine import Connection, Engine
from sqlalchemy.exc import DBAPIError
from sqlalchemy.pool import SingletonThreadPool, StaticPool

from memstate_sa.db.dialects import SQLITE, database_of, find_database
from memstate_sa.db.sqlite_database import in_transaction
from memstate_sa.errors import MemstateError
from memstate_sa.runtime.warn import warn

_NO_TRANSACTION = ("SELECT", "PRAGMA", "EXPLAIN", "VALUES", "BEGIN", "VACUUM", "ATTACH", "DETACH")
_BEGIN = "BEGIN IMMEDIATE"
_CONFIGURED = "memstate_configured"


class Watcher(Protocol):
    """Looks at each transaction that is about to write, and may refuse it."""

    def before_begin(self, connection: Connection) -> None: ...


_watchers: tuple[weakref.ref[Watcher], ...] = ()
_watching = threading.Lock()


def watch(watcher: Watcher) -> None:
    """Have *watcher* look at what begins on engines that are configured, until it is collected or `unwatch` is called.

    It may be that of another engine on the same file.
    """
    global _watchers  # noqa: PLW0603  # replaced as a whole: it is read without the lock
    with _watching:
        _watchers = (*(reference for reference in _watchers if reference() is not None), weakref.ref(watcher))


def unwatch(watcher: Watcher) -> None:
    global _watchers  # noqa: PLW0603
    with _watching:
        _watchers = tuple(reference for reference in _watchers if reference() not in (None, watcher))


def configure(engine: Any, *, busy_timeout_s: float = 30.0) -> Any:
    """Give *engine* (or an AsyncEngine) explicit transactions and WAL; returns it. Idempotent.

    Call it before the engine's first connection. Writers wait up to *busy_timeout_s* seconds for each other. An engine
    of another database is left as it is: which one it is may be configuration.
    """
    sync: Engine = getattr(engine, "sync_engine", engine)
    if find_database(sync) is not SQLITE or getattr(sync, _CONFIGURED, False):
        return engine
    setattr(sync, _CONFIGURED, True)

    @event.listens_for(sync, "connect")
    def _connect(dbapi_connection: Any, record: Any) -> None:
        dbapi_connection.isolation_level = None  # the driver begins nothing by itself
        cursor = dbapi_connection.cursor()
        cursor.execute(f"PRAGMA busy_timeout = {int(busy_timeout_s * 1000)}")
        _use_wal(cursor, time.monotonic() + busy_timeout_s)
        cursor.close()

    event.listen(sync, "close", _roll_back)
    event.listen(sync, "close_detached", _roll_back)

    @event.listens_for(sync, "before_cursor_execute")
    def _begin(
        connection: Connection, cursor: Any, statement: str, parameters: Any, context: Any, executemany: bool
    ) -> None:
        if not _reads(statement, context):
            _begin_to_write(connection)

    return engine


def begin_to_write(connection: Connection) -> bool:
    """Begin as the one writer, where the engine is configured and has not begun. Returns whether it did."""
    return bool(getattr(connection.engine, _CONFIGURED, False)) and _begin_to_write(connection)


def _begin_to_write(connection: Connection) -> bool:
    if in_transaction(connection) or connection._is_autocommit_isolation():
        return False
    for reference in _watchers:
        if (watcher := reference()) is not None:
            watcher.before_begin(connection)
    _begin_immediate(connection)
    return True


def _roll_back(dbapi_connection: Any, *_: Any) -> None:
    """Before a connection is closed: end its transaction.

    An interrupted or cancelled statement leaves its cursor in a traceback. While a cursor lives, SQLite only closes
    the connection in part, and its transaction keeps the write lock until the garbage collector comes.
    """
    with suppress(Exception):  # of another thread, or closed already
        worker = getattr(dbapi_connection, "_connection", None)
        if worker is None:
            dbapi_connection.rollback()
        else:
            # aiosqlite closes in a thread of its own, which takes its orders one by one. The garbage collector may be
            # the caller, so nothing can be awaited here.
            worker._tx.put_nowait((_future(), worker._conn.rollback))


def _future() -> Any:
    try:
        return asyncio.get_running_loop().create_future()
    except RuntimeError:  # no loop runs in this thread
        return None


def _reads(statement: str, context: Any) -> bool:
    """By its first word; after WITH there may be anything, which only a compiled statement tells.

    Some do more than read, and fail in a transaction.
    """
    first = statement.lstrip()[:8].upper()
    if first.startswith("WITH"):
        return isinstance(getattr(context.compiled, "statement", None), SelectBase)
    return first.startswith(_NO_TRANSACTION)


def _begin_immediate(connection: Connection) -> None:
    """By the driver, as `exec_driver_sql` takes longer for it than a small INSERT; so no event and no echo tells of it.

    What it raises is what SQLAlchemy would raise.
    """
    dbapi: Any = connection.dialect.loaded_dbapi
    cursor = connection.connection.cursor()
    try:
        cursor.execute(_BEGIN)
    except dbapi.Error as error:
        raise DBAPIError.instance(_BEGIN, (), error, dbapi.Error, dialect=connection.dialect) from error
    finally:
        cursor.close()


def _use_wal(cursor: Any, deadline: float) -> None:
    """This pragma does not wait for another connection that opens or closes the file just now, whatever the timeout."""
    while True:
        try:
            cursor.execute("PRAGMA journal_mode = WAL")
            return
        except sqlite3.OperationalError as error:
            # The low byte: what follows it tells why it is busy.
            if error.sqlite_errorcode & 0xFF != sqlite3.SQLITE_BUSY or time.monotonic() > deadline:
                raise
            time.sleep(0.005)


class SavepointWarning(UserWarning):
    """What a SAVEPOINT writes on this engine survives the ROLLBACK around it."""


def warn_of_savepoints(connection: Connection) -> None:
    """SavepointWarning, where the driver begins transactions by itself: at the first INSERT, not at a SAVEPOINT."""
    driver = connection.connection.driver_connection
    legacy = getattr(driver, "autocommit", -1) == -1  # Python 3.12 has other modes
    if not getattr(connection.engine, _CONFIGURED, False) and legacy and driver.isolation_level is not None:  # type: ignore[union-attr]
        warn(
            f"{connection.engine!r}: a SAVEPOINT that is rolled back with its transaction may keep its rows, as "
            "pysqlite begins too late; memstate_sa.sqlite.configure(engine) mends it",
            SavepointWarning,
        )


def leaks_savepoints(engine: Engine) -> bool:
    """Whether what a SAVEPOINT wrote survives the ROLLBACK around it, because the driver had not begun. Tried out."""
    probe = text("SELECT count(*) FROM memstate_probe")
    with engine.connect() as connection:
        connection.exec_driver_sql("CREATE TEMP TABLE memstate_probe (n INTEGER)")
        connection.commit()
        try:
            with connection.begin_nested():
                connection.exec_driver_sql("INSERT INTO memstate_probe VALUES (1)")
            connection.rollback()
            leaked = bool(connection.execute(probe).scalar_one())
            connection.rollback()
        finally:
            connection.exec_driver_sql("DROP TABLE temp.memstate_probe")
            connection.commit()
    return leaked


def is_busy(error: DBAPIError) -> bool:
    """Whether the driver says that another connection has the database, for longer than it waits."""
    # The low byte: what follows it tells why it is busy.
    return getattr(error.orig, "sqlite_errorcode", 0) & 0xFF == sqlite3.SQLITE_BUSY


def may_write(connection: Connection) -> bool:
    """Whether the transaction is the one writer already. That of an engine which is not configured may only read."""
    return bool(getattr(connection.engine, _CONFIGURED, False)) and in_transaction(connection)


def is_in_memory(engine: Engine) -> bool:
    """Whether all of *engine*'s users share one connection, because the database lives and dies with it."""
    if not database_of(engine).runs_in_process:
        return False
    database = engine.url.database or ":memory:"
    in_memory = ":memory:" in database or "mode=memory" in str(engine.url)
    return in_memory or isinstance(engine.pool, (StaticPool, SingletonThreadPool))


def require_no_transaction(engine: Engine) -> None:
    """Raise where a connection of ours would be the application's own, in the middle of its transaction."""
    if is_in_memory(engine) and open_transaction(engine):
        raise MemstateError(
            "a transaction is open on the only connection of this in-memory SQLite: end it first, or use a file"
        )


def open_transaction(engine: Engine) -> bool:
    """Whether the only connection of an in-memory database has begun."""
    if isinstance(engine.pool, StaticPool):
        # Looked at, not checked out: giving it back would roll the application's transaction back.
        return bool(getattr(engine.pool.connection.dbapi_connection, "in_transaction", False))
    with engine.connect() as connection:
        return in_transaction(connection)
