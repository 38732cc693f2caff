"""`StoreParts`: the parts that the methods of `MemoryStore` share, its transactions and its reads."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Unpack

from sqlalchemy.engine import Engine
from sqlalchemy.exc import DBAPIError, SQLAlchemyError
from sqlalchemy.orm import Session, sessionmaker

from memstate_sa.db.engines import connection_failure
from memstate_sa.db.joined_session import current_session, use_session
from memstate_sa.errors import DeliveryError, MemstateError
from memstate_sa.memory import Memory
from memstate_sa.options import Labels, require_options
from memstate_sa.relay import Relay
from memstate_sa.runtime import forks
from memstate_sa.runtime.printable import printable_logger
from memstate_sa.tracking.fact_types import FactTypes, check_texts

logger = printable_logger("memstate_sa.store")

DRAIN_TIMEOUT_S = 30.0


class StoreParts:
    """The parts of a `MemoryStore`, which makes them. Its methods are in one class for each kind of work."""

    memory: Memory
    engine: Engine
    relay: Relay
    _types: FactTypes
    _sessions: sessionmaker[Session]
    _lock: threading.RLock
    _is_shared: bool
    _is_connected: bool
    _background: bool
    _drains: bool
    _closed: bool

    @contextmanager
    def transaction(self, **labels: Unpack[Labels]) -> Iterator[Session]:
        """Make several calls one SQL transaction: all of them take effect, or none.

        Calls in the same thread join the transaction. A call that raises writes nothing. Catch its error to go on with
        the other calls.

        ::

            with store.transaction(actor="ada"):
                store.delete(old_id)
                store.commit(Fact(type="note", payload={"content": "likes tea"}))

        In a coroutine, use `AsyncMemoryStore`. If this transaction is open across an ``await``, it belongs to its
        asyncio task. Other tasks of the same thread get MemstateError until it ends.
        """
        require_options(StoreParts.transaction, labels, Labels)
        check_texts(**labels)
        open_session = current_session(self.memory, self.engine)
        if open_session is not None:
            with open_session.begin_nested():
                yield open_session
                open_session.flush()  # a call that fails leaves no labels, and wrong labels leave no changes
                self.memory.annotate(open_session, **labels)
            return
        self._open()
        with self._alone():
            with self._sessions() as session, use_session(self.memory, self.engine, session):
                self.memory.annotate(session, **labels)
                with session.begin():
                    yield session
            if self._drains:
                self._deliver()

    @contextmanager
    def _reading(self) -> Iterator[Session]:
        open_session = current_session(self.memory, self.engine)
        if open_session is not None:
            yield open_session
        else:
            self._open()
            with self._alone(), self._sessions() as session:
                yield session
                session.expunge_all()

    @contextmanager
    def _using_engine(self) -> Iterator[Engine]:
        """The engine, for calls that open connections of their own."""
        if current_session(self.memory, self.engine) is not None:
            raise MemstateError(
                "Cannot call this inside a transaction: its own connections would not see the facts of the "
                "transaction, or would wait for its locks. Call it after the block."
            )
        self._open()
        with self._alone():
            yield self.engine

    @contextmanager
    def _changing_by_engine(self) -> Iterator[Engine]:
        """The engine, for calls that commit transactions of their own."""
        with self._using_engine() as engine:
            yield engine
            if self._drains:
                self._deliver()

    @contextmanager
    def _alone(self) -> Iterator[None]:
        """On an in-memory SQLite, keep other threads out: all share one connection, and so one transaction."""
        if self._is_shared:
            with self._lock, forks.uninterrupted():  # a forked child has a copy of the connection
                yield
        else:
            yield

    def _deliver(self) -> None:
        try:
            self.relay.drain(DRAIN_TIMEOUT_S)
        except (DeliveryError, SQLAlchemyError) as error:  # the facts are committed, and stay pending
            logger.warning("not delivered yet: %s", error if isinstance(error, DeliveryError) else type(error).__name__)

    def _open(self) -> None:
        """Connect at the first call. Raises MemstateError after `close`."""
        if self._closed:
            raise MemstateError("This MemoryStore is closed. Make another one.")
        if not self._is_connected:
            with self._lock:
                if not self._is_connected:
                    self._connect()
                    self._is_connected = True

    def _connect(self) -> None:
        """Create the tables, and begin to deliver."""
        try:
            self.memory.create_tables(self.engine)
        except DBAPIError as error:
            raise connection_failure(self.engine.url, error) from error
        if self._drains:
            self._deliver()
        elif self._background:
            self.relay.start()
