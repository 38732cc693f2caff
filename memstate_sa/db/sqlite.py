"""The configuration of SQLite engines: WAL, and transactions that begin with BEGIN IMMEDIATE at the first write.

Other ways to begin do not work:

- The driver begins at the first INSERT. A SAVEPOINT before it is then outside of the transaction, and its rows survive
  a rollback.
- A deferred BEGIN fails with "database is locked" when a reader begins to write beside another writer.
- BEGIN IMMEDIATE at the first read makes other writers wait for readers.

So BEGIN IMMEDIATE runs before the first statement that is not a SELECT. Each read before it sees the latest commit.
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
    """A hook that runs before each transaction that will write. It refuses the transaction by raising."""

    def before_begin(self, connection: Connection) -> None: ...


_watchers: tuple[weakref.ref[Watcher], ...] = ()
_watching = threading.Lock()


def watch(watcher: Watcher) -> None:
    """Call *watcher* when a transaction begins on a configured engine, until it is collected or `unwatch` is called.

    *watcher* is called for every configured engine, because several engines may use the same file.
    """
    global _watchers  # noqa: PLW0603  # the tuple is replaced as a whole, because readers take no lock
    with _watching:
        _watchers = (*(reference for reference in _watchers if reference() is not None), weakref.ref(watcher))


def unwatch(watcher: Watcher) -> None:
    global _watchers  # noqa: PLW0603
    with _watching:
        _watchers = tuple(reference for reference in _watchers if reference() not in (None, watcher))


def configure(engine: Any, *, busy_timeout_s: float = 30.0) -> Any:
    """Give *engine* (or an AsyncEngine) explicit transactions and WAL, and return it. Idempotent.

    Call it before the engine's first connection. Writers wait up to *busy_timeout_s* seconds for each other. An engine
    of another database is left as it is, so that the database can be a matter of configuration.
    """
    sync: Engine = getattr(engine, "sync_engine", engine)
    if find_database(sync) is not SQLITE or getattr(sync, _CONFIGURED, False):
        return engine
    setattr(sync, _CONFIGURED, True)

    @event.listens_for(sync, "connect")
    def _connect(dbapi_connection: Any, record: Any) -> None:
        dbapi_connection.isolation_level = None  # the driver must not begin transactions itself
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
    """Begin as the one writer, if the engine is configured and no transaction has begun. Returns whether one began."""
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
    """End the transaction of a connection before it is closed.

    An interrupted or cancelled statement leaves its cursor in a traceback. While a cursor lives, SQLite closes the
    connection only in part. Its transaction then keeps the write lock until the garbage collector runs.
    """
    with suppress(Exception):  # the connection may belong to another thread, or be closed already
        worker = getattr(dbapi_connection, "_connection", None)
        if worker is None:
            dbapi_connection.rollback()
        else:
            # aiosqlite closes in a thread of its own, which works through a queue. The garbage collector may be the
            # caller, so nothing can be awaited here.
            worker._tx.put_nowait((_future(), worker._conn.rollback))


def _future() -> Any:
    try:
        return asyncio.get_running_loop().create_future()
    except RuntimeError:  # no loop runs in this thread
        return None


def _reads(statement: str, context: Any) -> bool:
    """Whether *statement* needs no transaction, judged by its first word. Some, such as VACUUM, must not be in one.

    After WITH there may be a read or a write. Only a compiled statement tells which.
    """
    first = statement.lstrip()[:8].upper()
    if first.startswith("WITH"):
        return isinstance(getattr(context.compiled, "statement", None), SelectBase)
    return first.startswith(_NO_TRANSACTION)


def _begin_immediate(connection: Connection) -> None:
    """Run BEGIN IMMEDIATE by the driver, because `exec_driver_sql` takes longer than a small INSERT.

    So no event and no echo shows this BEGIN. Its errors are the same as SQLAlchemy's.
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
    """Switch to WAL, and try again while busy: this pragma ignores the timeout when others open or close the file."""
    while True:
        try:
            cursor.execute("PRAGMA journal_mode = WAL")
            return
        except sqlite3.OperationalError as error:
            # The low byte is the error itself. The higher bytes give the reason.
            if error.sqlite_errorcode & 0xFF != sqlite3.SQLITE_BUSY or time.monotonic() > deadline:
                raise
            time.sleep(0.005)


class SavepointWarning(UserWarning):
    """Rows that a SAVEPOINT writes on this engine survive the ROLLBACK of its transaction."""


def warn_of_savepoints(connection: Connection) -> None:
    """Warn (SavepointWarning) if the driver itself begins transactions: at the first INSERT, and not at a SAVEPOINT."""
    driver = connection.connection.driver_connection
    legacy = getattr(driver, "autocommit", -1) == -1  # Python 3.12 has other modes
    if not getattr(connection.engine, _CONFIGURED, False) and legacy and driver.isolation_level is not None:  # type: ignore[union-attr]
        warn(
            f"Rows of a SAVEPOINT may survive a rollback on {connection.engine!r}: pysqlite begins transactions too "
            "late. Call memstate_sa.sqlite.configure(engine).",
            SavepointWarning,
        )


def leaks_savepoints(engine: Engine) -> bool:
    """Whether rows of a SAVEPOINT survive the ROLLBACK of its transaction. This is tested on a temporary table."""
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
    """Whether *error* says that another connection kept the database busy for longer than the timeout."""
    # The low byte is the error itself. The higher bytes give the reason.
    return getattr(error.orig, "sqlite_errorcode", 0) & 0xFF == sqlite3.SQLITE_BUSY


def may_write(connection: Connection) -> bool:
    """Whether the transaction certainly has the write lock. Without `configure`, it may have only read."""
    return bool(getattr(connection.engine, _CONFIGURED, False)) and in_transaction(connection)


def is_in_memory(engine: Engine) -> bool:
    """Whether all users of *engine* share one connection, because the database lives in it."""
    if not database_of(engine).runs_in_process:
        return False
    database = engine.url.database or ":memory:"
    in_memory = ":memory:" in database or "mode=memory" in str(engine.url)
    return in_memory or isinstance(engine.pool, (StaticPool, SingletonThreadPool))


def require_no_transaction(engine: Engine) -> None:
    """Raise if our connection would be the application's own connection, in the middle of its transaction."""
    if is_in_memory(engine) and open_transaction(engine):
        raise MemstateError(
            "Cannot use this in-memory SQLite now: a transaction is open on its only connection. End it first, or use "
            "a file."
        )


def open_transaction(engine: Engine) -> bool:
    """Whether a transaction is open on the only connection of an in-memory database."""
    if isinstance(engine.pool, StaticPool):
        # Do not check the connection out: its return would roll back the application's transaction.
        return bool(getattr(engine.pool.connection.dbapi_connection, "in_transaction", False))
    with engine.connect() as connection:
        return in_transaction(connection)
