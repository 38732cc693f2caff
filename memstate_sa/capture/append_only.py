"""Triggers keep the log append-only: the database refuses to change, remove or backdate an entry.

They protect against mistakes, and against programs that do not know memstate_sa. A role that may drop a trigger, or
that sets the same setting as `rewriting`, can still rewrite the log. Only database rights keep such a role out.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from sqlalchemy import DDL, delete, event, insert
from sqlalchemy.engine import Connection

from memstate_sa.capture import triggers
from memstate_sa.capture.captured_tables import Trigger
from memstate_sa.db import functions
from memstate_sa.db.dialects import POSTGRESQL, SQLITE, Database, database_of
from memstate_sa.db.statements import take_write_lock
from memstate_sa.db.tables import log, trigger_context

_REFUSED = (
    "memstate_log is append-only: memory.rollback() undoes a change, memory.erase() forgets a fact, "
    "Retention(log=...) folds old entries"
)
_REWRITE = "rewrite"

_IS_REFUSED = f"{functions.transaction_setting(_REWRITE)} IS DISTINCT FROM 'on'"
_RAISE = f"RAISE EXCEPTION USING ERRCODE = 'restrict_violation', MESSAGE = '{_REFUSED}'"

_CHANGE = f"""
BEGIN
  IF {_IS_REFUSED} THEN
    {_RAISE};
  END IF;
  RETURN NULL;
END
"""

# There are three cases for the id of a new entry:
# 1. The sequence has just numbered the entry. Its id is the last value of the sequence. If other sessions have taken
#    numbers since, its id is this session's last value.
# 2. The sequence has numbered no entry yet. Then the log is being restored, and any id is accepted.
# 3. The id is larger. Then the sequence goes on after this id, so that later entries get larger ids. Ids above
#    `_LAST_ID` are refused, so that later entries always have free ids.
# There is no setting for exceptions, because a role that may only add entries could set it too.
_LAST_ID = 2**62
_INSERT = f"""
DECLARE
  ids regclass;
  newest bigint;
BEGIN
  {functions.CHECK}
  IF TG_TABLE_NAME <> '{log.name}' OR TG_OP <> 'INSERT' OR TG_WHEN <> 'BEFORE' OR TG_LEVEL <> 'ROW' THEN
    {_RAISE};
  END IF;
  ids := format('%I.{log.name}_id_seq', TG_TABLE_SCHEMA);
  newest := pg_sequence_last_value(ids);
  IF newest IS NULL OR NEW.id = newest THEN
    RETURN NEW;
  END IF;
  BEGIN
    IF NEW.id = currval(ids) THEN
      RETURN NEW;
    END IF;
  EXCEPTION WHEN object_not_in_prerequisite_state THEN
    NULL;  -- This session has numbered no entry.
  END;
  IF NEW.id < newest OR NEW.id > {_LAST_ID} THEN
    {_RAISE};
  END IF;
  PERFORM setval(ids, greatest(NEW.id, nextval(ids)));
  RETURN NEW;
END
"""


def _on_postgresql(name: str, moment: str, level: str, source: str, *, definer: bool) -> Trigger:
    trigger = (
        f"CREATE OR REPLACE TRIGGER {name} BEFORE {moment} ON {log.name} FOR EACH {level} EXECUTE FUNCTION {name}()"
    )
    return Trigger(name, source, (*functions.creating(name, source, definer=definer), trigger))


def _on_sqlite(name: str, moment: str, when: str = "1") -> Trigger:
    name = f"memstate_append_only_{name}"
    source = (
        f"CREATE TRIGGER {name} {moment} ON {log.name} FOR EACH ROW WHEN {when} "
        f"AND NOT EXISTS (SELECT 1 FROM memstate_trigger_context WHERE name = '{_REWRITE}') "
        f"BEGIN SELECT RAISE(ABORT, '{_REFUSED}'); END"
    )
    return Trigger(name, source, (f"DROP TRIGGER IF EXISTS {name}", source))


_TRIGGERS: Mapping[Database, Sequence[Trigger]] = {
    POSTGRESQL: [
        # This trigger runs once per statement, because TRUNCATE has no rows.
        _on_postgresql("memstate_append_only", "UPDATE OR DELETE OR TRUNCATE", "STATEMENT", _CHANGE, definer=False),
        # The function has its owner's rights, so that a role that may add entries needs no right to read the sequence.
        _on_postgresql("memstate_append_only_insert", "INSERT", "ROW", _INSERT, definer=True),
    ],
    SQLITE: [
        _on_sqlite("update", "BEFORE UPDATE"),
        _on_sqlite("delete", "BEFORE DELETE"),
        # When REPLACE deletes a row, no DELETE trigger runs, unless recursive_triggers is on.
        _on_sqlite("insert", "BEFORE INSERT", f"EXISTS (SELECT 1 FROM {log.name} WHERE id = NEW.id)"),
        # The id is known only after the INSERT.
        _on_sqlite("past", "AFTER INSERT", f"EXISTS (SELECT 1 FROM {log.name} WHERE id > NEW.id)"),
    ],
}


_DROP_FUNCTIONS = [f"DROP FUNCTION IF EXISTS {trigger.name}()" for trigger in _TRIGGERS[POSTGRESQL]]


def creating(database: Database) -> list[str]:
    """Statements that create the log's triggers, or replace them."""
    return [statement for trigger in _TRIGGERS[database] for statement in trigger.statements]


def dropping(database: Database) -> list[str]:
    """Statements that drop the log's triggers, if they exist."""
    if database is POSTGRESQL:
        drop = [f"DROP TRIGGER IF EXISTS {trigger.name} ON {log.name}" for trigger in _TRIGGERS[database]]
        return drop + _DROP_FUNCTIONS
    return [f"DROP TRIGGER IF EXISTS {trigger.name}" for trigger in _TRIGGERS[database]]


def _listen(when: str, statement: str, database: Database) -> None:
    ddl: Any = DDL(statement.replace("%", "%%"))  # type: ignore[no-untyped-call]  # SQLAlchemy has not typed it
    event.listen(log, when, ddl.execute_if(dialect=database.name))


for _database in _TRIGGERS:
    for _statement in creating(_database):
        _listen("after_create", _statement, _database)
for _statement in _DROP_FUNCTIONS:
    _listen("after_drop", _statement, POSTGRESQL)


def install(connection: Connection) -> None:
    """Create or replace the log's triggers, where they are missing or outdated.

    ``metadata.create_all`` creates them with a new table. In an Alembic migration, ``op.memstate_protect_log()`` does.
    """
    triggers.replace(connection, log, _TRIGGERS[database_of(connection)])


def missing(connection: Connection) -> list[str]:
    """The names of the log's triggers that are missing or outdated."""
    sources = triggers.installed(connection, log)
    return [t.name for t in _TRIGGERS[database_of(connection)] if sources.get(t.name) != t.source]


_put = insert(trigger_context).values(name=_REWRITE)
_remove = delete(trigger_context).where(trigger_context.c.name == _REWRITE)


@contextmanager
def rewriting(connection: Connection) -> Iterator[None]:
    """Let the statements in this block change the log, on *connection* and in its transaction.

    A SAVEPOINT takes back both the permission and the changes when a statement fails.
    """
    take_write_lock(connection)  # some drivers begin a transaction at a write, but not at a SAVEPOINT
    as_setting = database_of(connection).has_transaction_settings
    with connection.begin_nested():
        functions.set_transaction_setting(connection, _REWRITE, "on") if as_setting else connection.execute(_put)
        yield
        functions.set_transaction_setting(connection, _REWRITE, "") if as_setting else connection.execute(_remove)
