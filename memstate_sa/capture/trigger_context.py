"""The trigger context tells triggers which transaction writes.

A Session sets the context, so that its actor, reason and session_id also label the entries of triggers. PostgreSQL has
the context in settings of the transaction. SQLite has it in a table, which is empty outside of a transaction.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any
from weakref import WeakKeyDictionary

from sqlalchemy import Executable, bindparam, delete, insert, select, text
from sqlalchemy.engine import Connection

from memstate_sa.capture.transaction import OpenTransaction
from memstate_sa.db import functions
from memstate_sa.db.dialects import POSTGRESQL, SQLITE, Database, database_of
from memstate_sa.db.json_params import as_array, unnest_strings
from memstate_sa.db.tables import log, trigger_context

SKIP = "skip {}"
"""The name of a row in the context. It makes triggers skip a fact (entity and key) that an undo logs."""

_READS = ("SELECT", "PRAGMA", "EXPLAIN", "VALUES", "BEGIN", "SAVEPOINT", "RELEASE", "ROLLBACK", "SHOW", "SET")
_DEFINES = ("CREATE", "ALTER", "DROP")
_put = insert(trigger_context).prefix_with("OR REPLACE")
_clear = delete(trigger_context)
_names = select(unnest_strings("names").c.value)
_logged: Mapping[Database, Executable] = {
    SQLITE: select(select(log.c.id).where(log.c.tx == bindparam("tx")).exists()),
    POSTGRESQL: text(
        "SELECT CASE WHEN position(:tx IN coalesce(current_setting('memstate.logged', true), '')) > 0 THEN true "
        # Triggers of an earlier version do not set memstate.logged.
        "WHEN current_setting('transaction_isolation') = 'serializable' THEN false "
        "ELSE EXISTS (SELECT FROM memstate_log WHERE tx = :tx) END"
    ),
}


def may_write(statement: str) -> bool:
    """Whether *statement* may write, judged by its first word. Every SELECT counts as a read."""
    return not statement.lstrip()[:9].upper().startswith((*_READS, *_DEFINES))


def set_trigger_context(connection: Connection, tx: str, *, counts: bool = True) -> None:
    """Make triggers log under the transaction *tx* from now on. *counts*: whether undo counts it as a step."""
    off = "off" if database_of(connection).has_transaction_settings else "0"
    _set(connection, {"tx": tx} if counts else {"tx": tx, "step": off})


def set_undo_context(connection: Connection, tx: str, facts: Collection[tuple[str, str]]) -> None:
    """Make triggers log under the undo *tx*, which is no step. They leave out *facts*, which the undo logs itself."""
    names = [SKIP.format("".join(fact)) for fact in facts]
    if database_of(connection).has_transaction_settings:
        # The facts are rows, because triggers would read a list in a setting again for every restored row.
        connection.execute(insert(trigger_context).from_select(["name"], _names), {"names": as_array(names)})
        _set(connection, {"tx": tx, "step": "off", "skip": "on"})
    else:
        _set(connection, {"tx": tx, "step": "0", **dict.fromkeys(names)})


def clear_trigger_context(connection: Connection) -> None:
    """Clear the trigger context. On SQLite this must happen before a COMMIT."""
    if database_of(connection).has_transaction_settings:
        _set(connection, dict.fromkeys(("tx", "step", "skip"), ""))
    connection.execute(_clear)


def _set(connection: Connection, settings: Mapping[str, str | None]) -> None:
    if database_of(connection).has_transaction_settings:
        for name, value in settings.items():
            functions.set_transaction_setting(connection, name, value or "")
    else:
        connection.execute(_put, [{"name": name, "value": value} for name, value in settings.items()])


def have_logged(connection: Connection, tx: str) -> bool:
    """Whether triggers have logged an entry under the transaction *tx*."""
    return bool(connection.execute(_logged[database_of(connection)], {"tx": tx}).scalar_one())


class TriggerContexts:
    """The trigger contexts that the Sessions of one Memory have set on their connections."""

    def __init__(self) -> None:
        # The tx by connection, or "" when the rollback of a SAVEPOINT may have removed the context.
        self._txs: WeakKeyDictionary[Connection, str] = WeakKeyDictionary()
        self.engine_listeners: dict[str, Callable[..., None]] = {
            "commit": self._before_connection_commits,
            "rollback_savepoint": self._after_savepoint_rollback,
            **dict.fromkeys(("rollback", "commit_twophase", "rollback_twophase"), self._after_transaction),
        }

    def name_transaction(self, connection: Connection, transactions: Sequence[OpenTransaction]) -> None:
        """Set the context to the transaction that is about to write: the one in a flush, or the last one."""
        if not transactions:
            return
        in_a_flush = (transaction for transaction in transactions if transaction.flush is not None)
        transaction = next(in_a_flush, transactions[-1])
        is_named = self._txs.get(connection) == transaction.tx
        if transaction.own_writes or is_named or connection._is_autocommit_isolation():
            return
        with transaction.writing():
            set_trigger_context(connection, transaction.tx, counts=transaction.step)
        self._txs[connection] = transaction.tx
        transaction.context_on = connection

    @contextmanager
    def undoing(self, connection: Connection, tx: str, facts: Collection[tuple[str, str]]) -> Iterator[None]:
        """Make triggers skip *facts* in this block, and log all other changes under the undo *tx*.

        If a SAVEPOINT around the block rolls back, this ends too.
        """
        self._txs[connection] = tx
        set_undo_context(connection, tx, facts)
        yield
        clear_trigger_context(connection)
        self._txs[connection] = ""

    def _before_connection_commits(self, connection: Connection) -> None:
        """On SQLite, clear the context before a COMMIT. Otherwise other connections would read it."""
        is_named = self._txs.pop(connection, None) is not None
        if is_named and not database_of(connection).has_transaction_settings:
            clear_trigger_context(connection)

    def _after_savepoint_rollback(self, connection: Connection, *_: Any) -> None:
        """Set the context again before the next write. If the SAVEPOINT set the context, the rollback removed it."""
        if connection in self._txs:
            self._txs[connection] = ""

    def _after_transaction(self, connection: Connection, *_: Any) -> None:
        self._txs.pop(connection, None)
