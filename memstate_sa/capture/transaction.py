"""The open transactions of Sessions, and the flush that each of them is in."""

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
    """An attribute that keeps nothing alive: a Session that was dropped gives its connection back to the pool."""

    def __set_name__(self, owner: type[Any], name: str) -> None:
        self._name = f"_{name}"

    def __get__(self, instance: Any, owner: type[Any]) -> Any:
        reference: ref[Any] | None = None if instance is None else getattr(instance, self._name)
        return None if reference is None else reference()

    def __set__(self, instance: Any, value: Any) -> None:
        setattr(instance, self._name, None if value is None else ref(value))


class Status(Enum):
    """How far a transaction has come.

    - OPEN → LOGGED: it logs its first entry, or triggers have logged one.
    - LOGGED → COMMITTING: its header and the indexes are written; its COMMIT comes next, or the flush before it.
    - COMMITTING → LOGGED: the COMMIT failed, or a SAVEPOINT or a flush was rolled back.
    - LOGGED → OPEN: `OpenTransaction.back_to`, when the entries that made it LOGGED are rolled back.

    The transaction is forgotten when it has ended, so there is no status for that.
    """

    OPEN = "open"
    LOGGED = "logged"
    COMMITTING = "committing"


@dataclass
class OpenTransaction:
    """What we know of one Session's open transaction."""

    tx: str = field(default_factory=new_tx)
    actor: str | None = None
    reason: str | None = None
    session_id: str | None = None
    step: bool = True  # whether undo counts this transaction
    status: Status = Status.OPEN
    flush: Flush | None = None
    own_writes: int = 0  # how many `writing` blocks are open
    seal: Callable[[OpenTransaction], None] | None = None  # once its commit has begun
    has_header: bool = False  # its labels are written; no rollback takes them back but that of the whole transaction
    has_intents: bool = False  # an index may hold what is not committed yet
    txs: dict[str, None] = field(default_factory=dict)  # it logged under these, an undo's own among them, in order
    seen: dict[KnownKey, str] = field(default_factory=dict)  # keys that the log has: to be remembered
    connections: WeakSet[Connection] = field(default_factory=WeakSet)
    trigger_connections: WeakSet[Connection] = field(default_factory=WeakSet)  # to databases with triggers of ours
    context_on: _WeakReference = _WeakReference()  # the Connection where the trigger context names it, or named it
    written_on: _WeakReference = _WeakReference()  # the Connection where its entries are logged
    statement_on: _WeakReference = _WeakReference()  # the Connection whose rows are logged of a statement that runs

    @property
    def labels(self) -> dict[str, str | None]:
        return {"actor": self.actor, "reason": self.reason, "session_id": self.session_id}

    @property
    def is_logged(self) -> bool:
        """Whether the log has an entry of it."""
        return self.status is not Status.OPEN

    @property
    def logged_under(self) -> list[str]:
        """The transactions that its entries are of, the last one last."""
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
    def mark(self) -> tuple[Status, Connection | None, dict[str, None]]:
        """The state that `back_to` takes when the entries logged since are rolled back."""
        return self.status, self.written_on, dict(self.txs)

    def back_to(self, mark: tuple[Status, Connection | None, dict[str, None]]) -> None:
        self.status, self.written_on, self.txs = mark

    @contextmanager
    def writing(self) -> Iterator[None]:
        """Statements in here are ours: the guard lets them pass."""
        self.own_writes += 1
        try:
            yield
        finally:
            self.own_writes -= 1


@dataclass
class Flush:
    """What one flush touches, while it runs."""

    transaction: OpenTransaction
    # Of SQLAlchemy, and the Session's; another listener's error leaves a Flush behind.
    context: _WeakReference = _WeakReference()
    inserted: list[Any] = field(default_factory=list)  # states of objects
    updated: list[Any] = field(default_factory=list)  # the same; no UPDATE may have been sent for some
    checked: bool = False
    within: int = 0  # the `own_writes` around it: a listener may flush while a statement of ours runs
    # Identities of rows that may change, until a statement is about to change their tables; the rows as they were then.
    unseen: dict[Tracked, list[Any]] = field(default_factory=dict)
    looks: dict[Tracked, list[Look]] = field(default_factory=dict)
    written_on: _WeakReference = _WeakReference()  # the Connection of its statements on tracked tables
    look: Callable[[Connection, Flush, Table], None] | None = None  # at the rows of a table that are `unseen`

    # Of facts in several tables: their identities, by whether they are to go, until their first rows are locked.
    parts: dict[tuple[Tracked, bool], list[Any]] = field(default_factory=dict)

    def before_change(self, connection: Connection, table: Table) -> None:
        """The unit of work is about to change, or delete, rows of *table*."""
        if self.look is not None and (self.unseen or not self.checked):
            self.look(connection, self, table)


class OpenTransactions:
    """The open transactions of the Sessions of one Memory. It keeps no Session and no connection alive."""

    def __init__(self) -> None:
        self._by_session: WeakKeyDictionary[Session, OpenTransaction] = WeakKeyDictionary()
        # By reference: a transaction has its connections, and would keep the key of its own item alive.
        self._by_connection: WeakKeyDictionary[Connection, list[ref[OpenTransaction]]] = WeakKeyDictionary()

    def of(self, session: Session) -> OpenTransaction:
        """The transaction of *session*, which begins here if it has none."""
        transaction = self._by_session.get(session)
        if transaction is None:
            transaction = self._by_session[session] = OpenTransaction()
        return transaction

    def find(self, session: Session) -> OpenTransaction | None:
        """The transaction that *session* has open, or None."""
        return self._by_session.get(session)

    def on(self, connection: Connection) -> list[OpenTransaction]:
        """The transactions that *connection* serves now. A Session that was dropped has none any more."""
        references = self._by_connection.get(connection, ())
        return [transaction for reference in references if (transaction := reference()) is not None]

    def add_connection(self, transaction: OpenTransaction, connection: Connection) -> bool:
        """Note that *transaction* is on *connection*, which several Sessions may share. False if it is known."""
        if connection in transaction.connections:
            return False
        transaction.connections.add(connection)
        self._by_connection.setdefault(connection, []).append(ref(transaction))
        return True

    def remove(self, session: Session) -> OpenTransaction | None:
        """Forget the transaction of *session*, which has ended."""
        transaction = self._by_session.pop(session, None)
        for connection in () if transaction is None else transaction.connections:
            others = (other for other in self.on(connection) if other is not transaction)
            self._by_connection[connection] = [ref(other) for other in others]
        return transaction
