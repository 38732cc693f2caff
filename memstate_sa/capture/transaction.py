"""The open transactions of Sessions, and their running flushes."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from enum import Enum
from typing import Any
from weakref import WeakKeyDictionary, WeakSet, ref

from sqlalchemy import Table
from sqlalchemy.engine import Connection
from sqlalchemy.orm import Session

from memstate_sa.capture.known_keys import KnownKey
from memstate_sa.capture.looks import Look
from memstate_sa.log.changes import new_tx
from memstate_sa.tracking.tracked import Tracked


class _WeakReference:
    """An attribute that does not keep its value alive. A dropped Session gives its connection back to the pool."""

    def __set_name__(self, owner: type[Any], name: str) -> None:
        self._name = f"_{name}"

    def __get__(self, instance: Any, owner: type[Any]) -> Any:
        reference: ref[Any] | None = None if instance is None else getattr(instance, self._name)
        return None if reference is None else reference()

    def __set__(self, instance: Any, value: Any) -> None:
        setattr(instance, self._name, None if value is None else ref(value))


class Status(Enum):
    """How far a transaction has come.

    - OPEN → LOGGED: the first entry is logged, by us or by a trigger.
    - LOGGED → COMMITTING: the header is written. Next come strict delivery and the COMMIT, perhaps with a flush before.
    - COMMITTING → LOGGED: the COMMIT failed, or a SAVEPOINT or a flush was rolled back.
    - LOGGED → OPEN: all entries are rolled back (`OpenTransaction.back_to`).

    A transaction that has ended is forgotten, so it has no status.
    """

    OPEN = "open"
    LOGGED = "logged"
    COMMITTING = "committing"


@dataclass
class OpenTransaction:
    """The open transaction of one Session."""

    tx: str = field(default_factory=new_tx)
    actor: str | None = None
    reason: str | None = None
    session_id: str | None = None
    thread_id: str | None = None  # the thread of a graph; `session_id` must stay equal to it
    step: bool = True  # whether undo counts this transaction
    status: Status = Status.OPEN
    flush: Flush | None = None
    own_writes: int = 0  # the number of open `writing` blocks
    seal: Callable[[OpenTransaction], None] | None = None  # set when its commit has begun
    has_header: bool = False  # its labels are written, and survive until the whole transaction is rolled back
    has_intents: bool = False  # an index may hold uncommitted points
    txs: dict[str, None] = field(default_factory=dict)  # the `tx` values of its entries, undos included, in order
    seen: dict[KnownKey, str] = field(default_factory=dict)  # keys with entries, for `Recorder.remember`
    connections: WeakSet[Connection] = field(default_factory=WeakSet)
    trigger_connections: WeakSet[Connection] = field(default_factory=WeakSet)  # those to databases with our triggers
    context_on: _WeakReference = _WeakReference()  # the Connection whose trigger context names it, or has named it
    written_on: _WeakReference = _WeakReference()  # the Connection where its entries are logged
    statement_on: _WeakReference = _WeakReference()  # the Connection of a running bulk statement whose rows are logged

    @property
    def labels(self) -> dict[str, str | None]:
        return {"actor": self.actor, "reason": self.reason, "session_id": self.session_id}

    @property
    def is_logged(self) -> bool:
        """Whether the log has an entry of this transaction."""
        return self.status is not Status.OPEN

    @property
    def logged_under(self) -> list[str]:
        """The `tx` values of its entries, the newest last."""
        return list(self.txs if self.context_on is None else {self.tx: None, **self.txs})

    def note_entries(self, connection: Connection, tx: str) -> None:
        """Note that entries are logged under *tx* on *connection*."""
        self.written_on = connection
        self.txs[tx] = None
        if self.status is Status.OPEN:
            self.status = Status.LOGGED
        if self.seal is not None:
            self.seal(self)

    @property
    def log_state(self) -> tuple[Status, Connection | None, dict[str, None]]:
        """The state to hand to `back_to` when later entries are rolled back."""
        return self.status, self.written_on, dict(self.txs)

    def back_to(self, state: tuple[Status, Connection | None, dict[str, None]]) -> None:
        self.status, self.written_on, self.txs = state

    @contextmanager
    def writing(self) -> Iterator[None]:
        """Let the guard pass the statements in this block, because they are our own."""
        self.own_writes += 1
        try:
            yield
        finally:
            self.own_writes -= 1


@dataclass
class Flush:
    """A running flush, and the rows that it touches."""

    transaction: OpenTransaction
    # SQLAlchemy's UOWTransaction. A weak reference, because an error of another listener leaves this Flush behind.
    context: _WeakReference = _WeakReference()
    inserted: list[Any] = field(default_factory=list)  # the InstanceStates of new rows
    updated: list[Any] = field(default_factory=list)  # the InstanceStates of rows that may have changed
    checked: bool = False
    within: int = 0  # the `own_writes` around it, because a listener may flush while our own statement runs
    unseen: dict[Tracked, list[Any]] = field(default_factory=dict)  # identities of rows that still need a look
    looks: dict[Tracked, list[Look]] = field(default_factory=dict)  # the rows before their change
    written_on: _WeakReference = _WeakReference()  # the Connection of its statements on tracked tables
    look: Callable[[Connection, Flush, Table], None] | None = None  # looks at the `unseen` rows of a table
    # Identities of facts in several tables, by class and "is deleted", until their first rows are locked.
    parts: dict[tuple[Tracked, bool], list[Any]] = field(default_factory=dict)

    def before_change(self, connection: Connection, table: Table) -> None:
        """Look at rows of *table* before the unit of work changes or deletes them."""
        if self.look is not None and (self.unseen or not self.checked):
            self.look(connection, self, table)


class OpenTransactions:
    """The open transactions of the Sessions of one Memory. They keep no Session and no connection alive."""

    def __init__(self) -> None:
        self._by_session: WeakKeyDictionary[Session, OpenTransaction] = WeakKeyDictionary()
        # Weak references, because a transaction refers to its connections, which are the keys here.
        self._by_connection: WeakKeyDictionary[Connection, list[ref[OpenTransaction]]] = WeakKeyDictionary()

    def of(self, session: Session) -> OpenTransaction:
        """The transaction of *session*. It begins here if the Session has none."""
        transaction = self._by_session.get(session)
        if transaction is None:
            transaction = self._by_session[session] = OpenTransaction()
        return transaction

    def find(self, session: Session) -> OpenTransaction | None:
        """The open transaction of *session*, or None."""
        return self._by_session.get(session)

    def on(self, connection: Connection) -> list[OpenTransaction]:
        """The transactions that *connection* serves now, without those of dropped Sessions."""
        references = self._by_connection.get(connection, ())
        return [transaction for reference in references if (transaction := reference()) is not None]

    def add_connection(self, transaction: OpenTransaction, connection: Connection) -> bool:
        """Note that *transaction* uses *connection*, which Sessions may share. Returns False if this was known."""
        if connection in transaction.connections:
            return False
        transaction.connections.add(connection)
        self._by_connection.setdefault(connection, []).append(ref(transaction))
        return True

    def remove(self, session: Session) -> OpenTransaction | None:
        """Forget the ended transaction of *session*, and return it."""
        transaction = self._by_session.pop(session, None)
        for connection in () if transaction is None else transaction.connections:
            others = (other for other in self.on(connection) if other is not transaction)
            self._by_connection[connection] = [ref(other) for other in others]
        return transaction
