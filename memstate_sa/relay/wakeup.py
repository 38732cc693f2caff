"""Messages about commits, which wake relays before their next poll. Messages may get lost: a poll finds every commit.

On PostgreSQL, a NOTIFY inside the application's transactions would make all commits of the cluster wait for each other.
So a thread sends it on its own connection, once for all commits of the last milliseconds.
"""

from __future__ import annotations

import contextlib
import os
import selectors
import socket
import threading
from collections.abc import Callable
from typing import Any
from uuid import uuid4

from sqlalchemy import func, select, text
from sqlalchemy.engine import Connection, Engine
from sqlalchemy.exc import SQLAlchemyError

from memstate_sa.db.dialects import database_of
from memstate_sa.db.engines import with_separate_pool
from memstate_sa.runtime import forks
from memstate_sa.runtime.printable import printable_logger

logger = printable_logger("memstate_sa.relay")
CHANNEL = "memstate"
_COALESCE_S = 0.01
_IDLE_S = 5.0
_RETRY_S = 5.0


def _own_connection(engine: Engine) -> Connection:
    """A connection in autocommit mode. It is not from the application's pool, which may be exhausted."""
    connection = with_separate_pool(engine).connect()
    try:
        connection.execution_options(isolation_level="AUTOCOMMIT").detach()
    except BaseException:
        connection.close()
        raise
    return connection


class Notifier:
    """Tells relays of other processes about commits. Its thread ends after a while without commits."""

    def __init__(self) -> None:
        self._closed = False
        self._begin()
        forks.in_child(self, Notifier._begin)

    def _begin(self) -> None:
        """Begin without a thread, also in a forked child. Its new name lets the parent's relay see its messages."""
        self.name = uuid4().hex
        self._lock = threading.Lock()
        self._has_news = threading.Event()
        self._pending: set[Engine] = set()
        self._thread: threading.Thread | None = None

    def open(self) -> None:
        """Accept commits again after `close`."""
        self._closed = False

    def committed(self, engine: Engine) -> None:
        """Pass a commit on to the thread. The caller waits for no I/O."""
        if self._closed:
            return
        with self._lock:
            self._pending.add(engine)
            if self._thread is None or not self._thread.is_alive():
                self._thread = threading.Thread(target=self._run, name="memstate-notifier", daemon=True)
                self._thread.start()
        self._has_news.set()

    def close(self, timeout: float) -> None:
        """Wait *timeout* seconds at most: a database that does not answer keeps the thread."""
        self._closed = True
        self._has_news.set()
        thread = self._thread
        if thread is not None and thread is not threading.current_thread():
            thread.join(timeout)

    def _run(self) -> None:
        connections: dict[Engine, Connection] = {}
        try:
            while not self._closed:
                if not self._has_news.wait(_IDLE_S):
                    with self._lock:
                        if not self._pending:
                            self._thread = None
                            return
                self._has_news.clear()
                with self._lock:
                    pending, self._pending = self._pending, set()
                for engine in pending:
                    try:
                        if engine not in connections:
                            connections[engine] = _own_connection(engine)
                        connections[engine].execute(select(func.pg_notify(CHANNEL, self.name)))
                    except Exception as error:  # noqa: BLE001  # the relays poll anyway
                        logger.debug("Could not send NOTIFY (%s).", type(error).__name__)
                        _close(connections.pop(engine, None))
                        if self._has_news.wait(_RETRY_S) and self._closed:
                            return
                threading.Event().wait(_COALESCE_S)
        finally:
            for connection in connections.values():
                _close(connection)


def _close(connection: Connection | None) -> None:
    if connection is not None:
        with contextlib.suppress(SQLAlchemyError):
            connection.close()


class Listener:
    """Calls *wake* for every NOTIFY, except from *own_notifier*. It needs PostgreSQL and psycopg.

    LISTEN does not work through a connection pooler in transaction mode.
    """

    def __init__(self, engine: Engine, wake: Callable[[], None], own_notifier: Notifier | None = None) -> None:
        self._engine = engine
        self._wake = wake
        self._own_name = "" if own_notifier is None else own_notifier.name
        self._stopping = threading.Event()
        self._thread: threading.Thread | None = None
        if not database_of(engine).runs_in_process and engine.dialect.driver == "psycopg":
            self._stop_sender, self._stop_receiver = socket.socketpair()
            self._thread = threading.Thread(target=self._run, name="memstate-listener", daemon=True)
            self._thread.start()

    def left_to_parent(self) -> None:
        """Close the child's copies of the sockets after a fork, and listen no more."""
        if self._thread is not None:
            self._thread = None
            self._stop_sender.close()
            self._stop_receiver.close()

    def close(self, timeout: float) -> None:
        """Wait *timeout* seconds at most: a database that does not answer keeps the thread."""
        if self._thread is not None:
            self._stopping.set()
            self._stop_sender.send(b"!")
            self._thread.join(timeout)
            if not self._thread.is_alive():
                self._stop_sender.close()
                self._stop_receiver.close()

    def _run(self) -> None:
        while not self._stopping.is_set():
            try:
                with contextlib.closing(_own_connection(self._engine)) as connection:
                    connection.execute(text(f"LISTEN {CHANNEL}"))
                    self._wake()  # we got no message about commits before LISTEN
                    self._listen(connection.connection.dbapi_connection)  # a detached one has no driver_connection
            except (SQLAlchemyError, OSError, self._engine.dialect.loaded_dbapi.Error) as error:
                logger.debug("Could not LISTEN (%s).", type(error).__name__)
            self._stopping.wait(_RETRY_S)

    def _listen(self, driver: Any) -> None:
        _keep_alive(driver.fileno())
        with selectors.DefaultSelector() as selector:
            selector.register(driver.fileno(), selectors.EVENT_READ)
            selector.register(self._stop_receiver, selectors.EVENT_READ)
            while not self._stopping.is_set():
                selector.select()
                if self._stopping.is_set():
                    return
                if any(notify.payload != self._own_name for notify in list(driver.notifies(timeout=0))):
                    self._wake()


def _keep_alive(descriptor: int) -> None:
    """Make the system notice within a minute that the server is gone. A listener sends nothing that could fail."""
    with contextlib.suppress(OSError), socket.socket(fileno=os.dup(descriptor)) as peer:
        peer.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        for name, value in (("TCP_KEEPIDLE", 30), ("TCP_KEEPINTVL", 10), ("TCP_KEEPCNT", 3)):
            if hasattr(socket, name) and peer.family != socket.AF_UNIX:
                peer.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)


class Changes:
    """Tells whether another connection has committed since the last check.

    SQLite answers with PRAGMA data_version, in a few microseconds on a connection that does nothing else. PostgreSQL
    has no such check, so every poll must read the outbox.
    """

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._connection: Any = None
        self._version: int | None = None
        forks.in_child(self, Changes.close)  # SQLite would believe that the parent's locks are the child's

    def seen(self) -> bool:
        if not database_of(self._engine).runs_in_process:
            return True
        with forks.uninterrupted():
            return self._is_changed()

    def _is_changed(self) -> bool:
        try:
            if self._connection is None:
                self._connection = self._engine.connect()
                self._connection.detach()  # the connection must not count in the application's pool
            version: int = self._connection.execute(_DATA_VERSION).scalar_one()
            self._connection.rollback()
        except SQLAlchemyError:
            return True
        changed: bool = version != self._version
        self._version = version
        return changed

    def close(self) -> None:
        if self._connection is not None:
            self._connection.close()


_DATA_VERSION = text("PRAGMA data_version")
