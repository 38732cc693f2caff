"""The guard refuses statements that would change tracked rows without a log entry."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

from sqlalchemy.engine import Connection
from sqlalchemy.sql.dml import UpdateBase

from memstate_sa.capture.recorder import TWO_DATABASES, Recorder
from memstate_sa.capture.transaction import Flush, OpenTransaction, OpenTransactions
from memstate_sa.capture.trigger_context import TriggerContexts, may_write
from memstate_sa.db.tables import log
from memstate_sa.errors import MemstateError, UntrackedWrite
from memstate_sa.runtime.warn import warn
from memstate_sa.tracking.registry import Registry, unaliased
from memstate_sa.tracking.tracked import Tracked

_IN_AUTOCOMMIT = (
    "In AUTOCOMMIT each statement is a transaction of its own, so the log entry cannot be in it. Use an engine that "
    "begins transactions, or capture='trigger'."
)
_OF_NO_SESSION = (
    "No Session captures it. Change objects of the Session, or use session.execute(insert/update/delete(Model)). If it "
    "is the secondary table of a relationship, use capture='trigger' or an association object."
)
_OF_ANOTHER_CLASS = "This flush writes the table through a class that is not tracked. Use the tracked class."
_IN_A_CTE = "A CTE that writes cannot be captured. Execute it as a statement of its own."


class UntrackedWriteWarning(UserWarning):
    """A write to a tracked table bypassed the log (``on_untracked="warn"``)."""


class Guard:
    """Checks all statements on the connections of Sessions, bulk_*() and session.connection() included."""

    def __init__(
        self, registry: Registry, recorder: Recorder, transactions: OpenTransactions, contexts: TriggerContexts
    ) -> None:
        self._registry = registry
        self._recorder = recorder
        self._transactions = transactions
        self._contexts = contexts

    def before_statement(self, context: Any) -> None:
        """Refuse a statement that neither a trigger nor a listener of ours captures. Set the trigger context.

        Most statements only read, and return at the first check.
        """
        writes: bool = context.isinsert or context.isupdate or context.isdelete
        # A SELECT may write too, by a CTE with DELETE … RETURNING. Only the compiled statement knows its CTEs.
        ctes = getattr(context.compiled, "ctes", None)
        has_triggers = bool(self._registry.by_trigger)
        if not (writes or ctes or has_triggers or context.isddl or context.is_text):
            return
        connection = context.root_connection
        if context.isddl or ((context.isdelete or context.is_text) and log.name in context.statement):
            self._recorder.known_keys(connection).clear()  # the statement may replace or empty the log
        transactions = self._transactions.on(connection)
        if not transactions:
            return
        if writes:
            self._check_autocommit(connection, context, transactions)
            self._check_origin(connection, context, transactions)
            for transaction in () if context.isinsert else transactions:
                if not transaction.own_writes and (flush := _running_flush(transaction)) is not None:
                    flush.before_change(connection, context.compiled.statement.table)
        self._check_ctes(connection, ctes or ())
        if has_triggers and may_write(context.statement):
            with_triggers = [other for other in transactions if connection in other.trigger_connections]
            self._contexts.name_transaction(connection, with_triggers)

    def _check_autocommit(
        self, connection: Connection, context: Any, transactions: Collection[OpenTransaction]
    ) -> None:
        if connection._is_autocommit_isolation() and not all(transaction.own_writes for transaction in transactions):
            self.refuse(connection, context.compiled.statement, _IN_AUTOCOMMIT)

    def _check_origin(self, connection: Connection, context: Any, transactions: Collection[OpenTransaction]) -> None:
        """Refuse a write, unless it is our own, or the unit of work writes objects of the tracked class."""
        statement = context.compiled.statement
        if any(transaction.own_writes for transaction in transactions):
            if any(transaction.statement_on not in (None, connection) for transaction in transactions):
                self._refuse_second_database(connection, statement)
            return
        flushes = [flush for transaction in transactions if (flush := _running_flush(transaction)) is not None]
        cache = context.execution_options.get("compiled_cache")
        if cache is None or not flushes:
            self.refuse(connection, statement, _OF_NO_SESSION)
            return
        tracked = self._logged(connection, statement.table)
        if tracked is None:
            return
        is_of_class = cache is tracked.mapper.base_mapper._compiled_cache
        if not is_of_class or self._is_of_base(tracked, context, flushes):
            self.refuse(connection, statement, _OF_ANOTHER_CLASS)
        for flush in flushes:
            if flush.written_on not in (None, connection):
                self._refuse_second_database(connection, statement)
            flush.written_on = connection

    def _refuse_second_database(self, connection: Connection, statement: Any) -> None:
        """Refuse a Session that writes to two databases: the log of one does not have the changes of the other."""
        if self._logged(connection, statement.table) is not None:
            raise MemstateError(TWO_DATABASES)

    def _logged(self, connection: Connection, table: Any) -> Tracked | None:
        """The tracked class whose rows are in *table*, unless triggers log them."""
        tracked = self._registry.named(table, connection.dialect.default_schema_name)
        return None if tracked is None or tracked.by_trigger else tracked

    def _is_of_base(self, tracked: Tracked, context: Any, flushes: Collection[Flush]) -> bool:
        """Whether a flush changes rows of a base class that may also belong to facts of *tracked*.

        Without a discriminator column, an existing row of the base class may belong to a subclass. A row that is being
        inserted into the base table has no subclass row yet.
        """
        table = context.compiled.statement.table
        is_of_base = table in tracked.tables[: tracked.base_table_count]
        if context.isinsert or tracked.mapper.polymorphic_on is not None or not is_of_base:
            return False
        mappers = {state.mapper for flush in flushes for state in flush.context.states if state.key is not None}
        return any(table in mapper.tables and self._registry.find(mapper) is None for mapper in mappers)

    def _check_ctes(self, connection: Connection, ctes: Collection[Any]) -> None:
        for cte in ctes:
            if isinstance(cte.element, UpdateBase):
                self.refuse(connection, cte.element, _IN_A_CTE)

    def refuse(self, connection: Connection, statement: Any, way_out: str) -> None:
        """Raise, or warn, if *statement* is on a tracked table, and no trigger logs it."""
        table = unaliased(getattr(statement, "table", None))
        tracked = self._logged(connection, table)
        if tracked is None:
            return
        statement = getattr(statement, "_resolved", statement)  # a lambda_stmt() has its statement there
        kind = statement.__visit_name__.upper()  # the statement's class may be an annotated copy
        message = f"{kind} on {table.name} would bypass the log of {tracked.model.__name__}. {way_out}"
        if tracked.on_untracked == "raise":
            raise UntrackedWrite(message)
        warn(message, UntrackedWriteWarning)


def _running_flush(transaction: OpenTransaction) -> Flush | None:
    """The flush that runs now, if the statement belongs to it.

    The compiled cache is the same for a flush and for bulk_*(). But a bulk_*() in a flush event runs in a nested
    transaction of its own. And until the flush begins, its unit of work has no transaction.
    """
    flush = transaction.flush
    unit = None if flush is None else flush.context
    is_running = unit is not None and unit.session._transaction is getattr(unit, "transaction", None)
    return flush if is_running else None
