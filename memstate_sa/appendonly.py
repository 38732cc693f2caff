"""The log is append-only by the database: triggers refuse whoever changes or removes an entry, by whatever means.

They keep out mistakes, and programs that have never heard of us. Who may drop a trigger, or knows how `rewriting` is
told, can still rewrite the log: against those there are the rights that the database grants.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from sqlalchemy import DDL, delete, event, func, insert, select, true
from sqlalchemy.engine import Connection

from memstate_sa import triggers
from memstate_sa.outbox import take_write_lock
from memstate_sa.tables import current, log
from memstate_sa.triggers import Trigger

_REFUSED = (
    "memstate_log is append-only: memory.rollback() undoes a change, memory.erase() forgets a fact, "
    "Retention(log=...) folds old entries"
)
_REWRITE = "rewrite"

_FUNCTION = f"""
BEGIN
  IF current_setting('memstate.{_REWRITE}', true) IS DISTINCT FROM 'on' THEN
    RAISE EXCEPTION USING ERRCODE = 'restrict_violation', MESSAGE = '{_REFUSED}';
  END IF;
  RETURN NULL;
END
"""
_DROP_FUNCTION = "DROP FUNCTION IF EXISTS memstate_append_only()"


def _on_postgresql() -> Trigger:
    """Once a statement, as TRUNCATE has no rows."""
    name = "memstate_append_only"
    function = (
        f"CREATE OR REPLACE FUNCTION {name}() RETURNS trigger LANGUAGE plpgsql AS $memstate${_FUNCTION}$memstate$"
    )
    trigger = (
        f"CREATE OR REPLACE TRIGGER {name} BEFORE UPDATE OR DELETE OR TRUNCATE ON memstate_log FOR EACH STATEMENT "
        f"EXECUTE FUNCTION {name}()"
    )
    return Trigger(name, _FUNCTION, (function, trigger))


def _on_sqlite(change: str, when: str = "1") -> Trigger:
    name = f"memstate_append_only_{change.lower()}"
    source = (
        f"CREATE TRIGGER {name} BEFORE {change} ON memstate_log FOR EACH ROW WHEN {when} "
        f"AND NOT EXISTS (SELECT 1 FROM memstate_current WHERE name = '{_REWRITE}') "
        f"BEGIN SELECT RAISE(ABORT, '{_REFUSED}'); END"
    )
    return Trigger(name, source, (f"DROP TRIGGER IF EXISTS {name}", source))


_TRIGGERS: Mapping[str, Sequence[Trigger]] = {
    "postgresql": [_on_postgresql()],
    "sqlite": [
        _on_sqlite("UPDATE"),
        _on_sqlite("DELETE"),
        # REPLACE deletes rows without a word, unless recursive_triggers is on.
        _on_sqlite("INSERT", "EXISTS (SELECT 1 FROM memstate_log WHERE id = NEW.id)"),
    ],
}


def creating(dialect_name: str) -> list[str]:
    """Statements that create the log's triggers, or replace them."""
    return [statement for trigger in _TRIGGERS.get(dialect_name, ()) for statement in trigger.statements]


def dropping(dialect_name: str) -> list[str]:
    """Statements that drop them, as far as they are there."""
    if dialect_name == "postgresql":
        return ["DROP TRIGGER IF EXISTS memstate_append_only ON memstate_log", _DROP_FUNCTION]
    return [f"DROP TRIGGER IF EXISTS {trigger.name}" for trigger in _TRIGGERS.get(dialect_name, ())]


def _listen(when: str, statement: str, dialect: str) -> None:
    ddl: Any = DDL(statement)  # type: ignore[no-untyped-call]  # SQLAlchemy has not typed it
    event.listen(log, when, ddl.execute_if(dialect=dialect))


for _dialect in _TRIGGERS:
    for _statement in creating(_dialect):
        _listen("after_create", _statement, _dialect)
_listen("after_drop", _DROP_FUNCTION, "postgresql")


def install(connection: Connection) -> None:
    """Create the log's triggers where they are not as they should be, on tables of before there were any.

    ``metadata.create_all`` installs them with the table, in an Alembic migration ``op.memstate_protect_log()`` does.
    """
    triggers.replace(connection, log, _TRIGGERS.get(connection.dialect.name, ()))


def missing(connection: Connection) -> list[str]:
    """Which of the log's triggers are not there, or not as they should be."""
    there = triggers.installed(connection, log)
    return [t.name for t in _TRIGGERS.get(connection.dialect.name, ()) if there.get(t.name) != t.source]


_set = select(func.set_config(f"memstate.{_REWRITE}", "on", true()))  # until the transaction ends
_unset = select(func.set_config(f"memstate.{_REWRITE}", "", true()))
_put = insert(current).values(name=_REWRITE)
_remove = delete(current).where(current.c.name == _REWRITE)


@contextmanager
def rewriting(connection: Connection) -> Iterator[None]:
    """Statements in here may change the log, on *connection* and in its transaction.

    In a SAVEPOINT: where one fails, the permission goes with what it has done.
    """
    take_write_lock(connection)  # a driver that begins by itself does not do so at a SAVEPOINT
    on_postgresql = connection.dialect.name == "postgresql"
    with connection.begin_nested():
        connection.execute(_set if on_postgresql else _put)
        yield
        connection.execute(_unset if on_postgresql else _remove)
