"""The guard: it refuses statements that would change tracked rows past the log."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

from sqlalchemy.engine import Connection
from sqlalchemy.sql.dml import UpdateBase

from memstate_sa.capture.transaction import OpenTransaction, OpenTransactions
from memstate_sa.capture.trigger_context import TriggerContexts, may_write
from memstate_sa.errors import UntrackedWrite
from memstate_sa.runtime.warn import warn
from memstate_sa.tracking.registry import Registry, unaliased

_SEEN = "memstate_seen"
_IN_AUTOCOMMIT = (
    "in AUTOCOMMIT each statement is a transaction of its own, so the log cannot be in it: use an engine that begins "
    "one, or capture='trigger'"
)
_OF_NO_SESSION = (
    "use the Session's objects, or session.execute(insert/update/delete(Model)); what a relationship writes into its "
    "secondary table takes capture='trigger', or an association object in its place"
)
_IN_A_CTE = "a CTE that writes cannot be captured; execute it by itself"


class UntrackedWriteWarning(UserWarning):
    """A write to a tracked table bypassed the log (``on_untracked="warn"``)."""


class Guard:
    """Looks at all statements on the connections of Sessions: bulk_*(), Table.insert(), session.connection() too."""

    def __init__(self, registry: Registry, transactions: OpenTransactions, contexts: TriggerContexts) -> None:
        self._registry = registry
        self._transactions = transactions
        self._contexts = contexts

    def before_statement(
        self, connection: Connection, cursor: Any, statement: str, parameters: Any, context: Any, executemany: bool
    ) -> None:
        """Refuse a statement that no trigger and none of our listeners captures; name its transaction to triggers.

        Most statements only read. They leave first.
        """
        has_triggers = bool(self._registry.by_trigger)
        writes: bool = context.isinsert or context.isupdate or context.isdelete
        # A SELECT, too, may write: WITH gone AS (DELETE … RETURNING …). Only the compiled statement knows its CTEs.
        ctes = getattr(context.compiled, "ctes", None)
        if not (writes or ctes or has_triggers) or getattr(context, _SEEN, None) is self:
            return
        setattr(context, _SEEN, self)  # an INSERT of many rows may be sent in many batches
        transactions = self._transactions.on(connection)
        if not transactions:
            return
        if writes:
            self._check_autocommit(connection, context, transactions)
            self._check_origin(connection, context, transactions)
            for transaction in () if context.isinsert else transactions:
                if transaction.flush is not None and not transaction.own_writes:
                    transaction.flush.before_change(connection, context.compiled.statement.table)
        self._check_ctes(connection, ctes or ())
        if has_triggers and may_write(statement):
            with_triggers = [other for other in transactions if connection in other.trigger_connections]
            self._contexts.name_transaction(connection, with_triggers)

    def _check_autocommit(
        self, connection: Connection, context: Any, transactions: Collection[OpenTransaction]
    ) -> None:
        if connection._is_autocommit_isolation() and not all(transaction.own_writes for transaction in transactions):
            self.refuse(connection, context.compiled.statement, _IN_AUTOCOMMIT)

    def _check_origin(self, connection: Connection, context: Any, transactions: Collection[OpenTransaction]) -> None:
        """A write has to be our own, or the unit of work's."""
        if not any(_is_known(transaction, context) for transaction in transactions):
            self.refuse(connection, context.compiled.statement, _OF_NO_SESSION)

    def _check_ctes(self, connection: Connection, ctes: Collection[Any]) -> None:
        for cte in ctes:
            if isinstance(cte.element, UpdateBase):
                self.refuse(connection, cte.element, _IN_A_CTE)

    def refuse(self, connection: Connection, statement: Any, way_out: str) -> None:
        """Raise, or warn, if *statement* is on a tracked table, and no trigger sees it."""
        table = unaliased(getattr(statement, "table", None))
        tracked = self._registry.named(table, connection.dialect.default_schema_name)
        if tracked is None or tracked.by_trigger:
            return
        kind = statement.__visit_name__.upper()  # the class may be an annotated one
        message = f"{kind} on {table.name} would bypass the log of {tracked.model.__name__}: {way_out}"
        if tracked.on_untracked == "raise":
            raise UntrackedWrite(message)
        warn(message, UntrackedWriteWarning)


def _is_known(transaction: OpenTransaction, context: Any) -> bool:
    """Whether a statement is our own, or the unit of work's: only a flush passes its mapper's cache."""
    if transaction.own_writes:
        return True
    return transaction.flush is not None and "compiled_cache" in context.execution_options
