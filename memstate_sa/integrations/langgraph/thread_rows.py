"""Lock, copy and delete all rows of a thread."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from sqlalchemy import ColumnElement, Table, Text, bindparam, delete, false, func, literal_column, select
from sqlalchemy.engine import Connection

from memstate_sa.db.dialects import Database, database_of
from memstate_sa.db.json_params import as_array, unnest_strings
from memstate_sa.integrations.langgraph.checkpoint_rows import TABLES
from memstate_sa.integrations.langgraph.tables import checkpoint

_threads = unnest_strings("threads")


def _of_threads(table: Table) -> ColumnElement[bool]:
    return table.c.thread_id.in_(select(_threads.c.value))


_take_advisory_locks = select(func.count(func.pg_advisory_xact_lock(func.hashtextextended(_threads.c.value, 8021))))
_lock_rows: Any = (
    select(literal_column("1")).where(_of_threads(checkpoint)).order_by(*checkpoint.primary_key).with_for_update()
)
_delete_nothing = delete(checkpoint).where(false())


def lock_threads(connection: Connection, thread_ids: Iterable[str]) -> None:
    """Lock threads, so that others that save to them wait until this transaction ends.

    Saving a checkpoint waits for the lock on its parent's row. If the parent was deleted, it waits for the thread's
    advisory lock.
    """
    if database_of(connection).has_one_writer:
        connection.execute(_delete_nothing)  # this statement takes the write lock
        return
    params = {"threads": as_array(sorted(thread_ids))}
    connection.execute(_take_advisory_locks, params)
    connection.execute(_lock_rows, params)


def delete_threads(connection: Connection, thread_ids: Iterable[str]) -> None:
    """Delete all rows of these threads."""
    thread_ids = list(thread_ids)
    lock_threads(connection, thread_ids)
    statements = [delete(table).where(_of_threads(table)) for table in TABLES]
    _execute_at_once(connection, statements, {"threads": as_array(thread_ids)})


def _execute_at_once(connection: Connection, statements: Sequence[Any], params: Mapping[str, Any]) -> None:
    """Run *statements* on one state of the database."""
    # A database without writing CTEs (SQLite) has one writer, so all statements see the same state anyway.
    if database_of(connection).has_writing_ctes:
        first, *others = statements
        statements = [first.add_cte(*(other.cte(f"also_{n}") for n, other in enumerate(others)))]
    for statement in statements:
        connection.execute(statement, params)


def copy_thread(connection: Connection, source: str, target: str) -> None:
    """Copy all rows of a thread from one state of the database, so that pruning cannot happen in between."""
    statements = [_copy(database_of(connection), table) for table in TABLES]
    _execute_at_once(connection, statements, {"source": source, "target": target})


def _copy(database: Database, table: Table) -> Any:
    values: dict[str, ColumnElement[Any]] = {column.name: column for column in table.columns}
    values["thread_id"] = bindparam("target", type_=Text())
    copied = select(*values.values()).where(table.c.thread_id == bindparam("source", type_=Text()))
    return database.upsert(table).from_select(list(values), copied).on_conflict_do_nothing()


def threads_of_runs(connection: Connection, run_ids: Iterable[str]) -> list[str]:
    """The threads with checkpoints of these runs."""
    runs = unnest_strings("runs")
    statement = select(checkpoint.c.thread_id).distinct().where(
        checkpoint.c.run_id.is_not(None), checkpoint.c.run_id.in_(select(runs.c.value))
    )  # fmt: skip
    return list(connection.scalars(statement, {"runs": as_array(run_ids)}))
