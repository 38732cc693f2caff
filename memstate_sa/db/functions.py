"""Our trigger functions on PostgreSQL. Each runs only for the table and the event that it was made for.

They run with the rights of their owner, so that a role that may write a table needs no right to write the log. A role
that could attach a function to its own table would write the log, and would run its own casts with those rights.
"""

from __future__ import annotations

from collections.abc import Sequence

from sqlalchemy import text
from sqlalchemy.engine import Connection

SEARCH_PATH = "pg_catalog, pg_temp"
"""Other roles cannot add a function or operator here. PostgreSQL never looks for functions in pg_temp by name alone."""

MOMENT = "extract(epoch FROM transaction_timestamp())::text"
"""The start time of the transaction. Our settings carry it, so that a left-over setting or a default is ignored."""

CHECK = "-- memstate_sa: for one table and one event"
"""The first line of the check at the beginning of each function."""


def dollar_quoted(body: str) -> str:
    """*body* as a string constant. It may contain any text."""
    tag = "memstate"
    while f"${tag}" in body:
        tag += "_"
    return f"${tag}${body}${tag}$"


def check(schema: str, table: str, event: str, when: str) -> str:
    """The check at the beginning of a function's body. *schema* and *table* are SQL literals."""
    return (
        f"  {CHECK}\n"
        f"  IF TG_TABLE_SCHEMA <> {schema} OR TG_TABLE_NAME <> {table} OR TG_OP <> '{event}' OR TG_WHEN <> '{when}' "
        f"OR TG_LEVEL <> 'STATEMENT' THEN\n"
        f"    RAISE EXCEPTION USING ERRCODE = 'insufficient_privilege',\n"
        f"      MESSAGE = 'This function captures {event} of ' || {schema} || '.' || {table} || ', not of ' || "
        f"TG_TABLE_SCHEMA || '.' || TG_TABLE_NAME || '.',\n"
        f"      HINT = 'Was the table renamed or moved? Untrack it and track it again: memory.create_tables(engine), "
        f"or a migration.';\n"
        f"  END IF;\n"
    )


def creating(name: str, source: str, settings: str = "", *, definer: bool = True) -> tuple[str, str]:
    """Statements that create the trigger function *name*, and forbid other roles to attach it."""
    security = f"{'SECURITY DEFINER ' if definer else ''}SET search_path = {SEARCH_PATH}{settings}"
    return (
        f"CREATE OR REPLACE FUNCTION {name}() RETURNS trigger LANGUAGE plpgsql {security} AS {dollar_quoted(source)}",
        f"REVOKE ALL ON FUNCTION {name}() FROM PUBLIC",
    )


def transaction_setting(name: str, moment: str = MOMENT) -> str:
    """SQL for the value that `set_transaction_setting` gave ``memstate.<name>`` in this transaction, or NULL."""
    return (
        f"(CASE WHEN current_setting('memstate.{name}_at', true) = {moment} "
        f"THEN nullif(current_setting('memstate.{name}', true), '') END)"
    )


_set = text(
    "SELECT set_config('memstate.' || CAST(:name AS text), CAST(:value AS text), true), "
    f"set_config('memstate.' || CAST(:name AS text) || '_at', CAST({MOMENT.removesuffix('::text')} AS text), true)"
)


def set_transaction_setting(connection: Connection, name: str, value: str) -> None:
    """Set ``memstate.<name>`` for the rest of this transaction. '' removes it."""
    connection.execute(_set, {"name": name, "value": value})


IS_CLOSED = (
    f"NOT has_function_privilege('public', p.oid, 'EXECUTE') AND p.proconfig @> ARRAY['search_path={SEARCH_PATH}']"
)
"""SQL for "the function ``p`` has the rights and settings of `creating`". Its body is not compared here."""

_IS_CHECKED = f"position('{CHECK}' IN p.prosrc) > 0"
_IS_OPEN = (
    "p.proname LIKE 'memstate\\_%' AND p.prorettype = 'trigger'::regtype AND p.prosecdef "
    f"AND position('memstate_log' IN p.prosrc) > 0 AND NOT ({IS_CLOSED} AND {_IS_CHECKED})"
)
_open = text(f"SELECT CAST(CAST(p.oid AS regprocedure) AS text) FROM pg_proc AS p WHERE {_IS_OPEN} ORDER BY 1")

# A function of an older version gets a check for the table that its source names, or for that of its oldest trigger.
_CLOSE = f"""DO $memstate_do$
DECLARE
  f record;
  path text := pg_catalog.current_setting('search_path');
BEGIN
  PERFORM pg_catalog.set_config('search_path', '{SEARCH_PATH}', true);
  FOR f IN
    SELECT p.proname, p.prosrc, n.nspname, t.its, t.relname, {_IS_CHECKED} AS is_checked,
      upper(split_part(p.proname, '_', 2)) AS event
    FROM pg_proc AS p JOIN pg_namespace AS n ON n.oid = p.pronamespace LEFT JOIN LATERAL (
      SELECT i.nspname AS its, c.relname FROM pg_trigger AS t
      JOIN pg_class AS c ON c.oid = t.tgrelid JOIN pg_namespace AS i ON i.oid = c.relnamespace
      WHERE t.tgfoid = p.oid
      ORDER BY position(format('%I.%I', i.nspname, c.relname) IN p.prosrc) = 0, t.tgname <> p.proname, t.oid LIMIT 1
    ) AS t ON true
    WHERE {_IS_OPEN} AND pg_has_role(p.proowner, 'USAGE')
  LOOP
    IF f.its IS NULL THEN
      EXECUTE format('DROP FUNCTION %I.%I()', f.nspname, f.proname);
      CONTINUE;
    END IF;
    IF NOT f.is_checked AND position(E'\\nBEGIN\\n' IN f.prosrc) > 0 THEN
      f.prosrc := overlay(f.prosrc PLACING E'\\nBEGIN\\n' || format(
        {{check}},
        f.its, f.relname, f.event, CASE f.event WHEN 'TRUNCATE' THEN 'BEFORE' ELSE 'AFTER' END
      ) FROM position(E'\\nBEGIN\\n' IN f.prosrc) FOR 7);
    END IF;
    EXECUTE format(
      'CREATE OR REPLACE FUNCTION %I.%I() RETURNS trigger LANGUAGE plpgsql SECURITY DEFINER '
      'SET search_path = {SEARCH_PATH} AS %L', f.nspname, f.proname, f.prosrc
    );
    EXECUTE format('REVOKE ALL ON FUNCTION %I.%I() FROM PUBLIC', f.nspname, f.proname);
  END LOOP;
  PERFORM pg_catalog.set_config('search_path', path, true);
END
$memstate_do$"""


def open_functions(connection: Connection) -> Sequence[str]:
    """Our functions that other roles can attach to their tables: an older version made them, or a restore did."""
    return connection.scalars(_open).all()


def close(connection: Connection) -> None:
    """Close the `open_functions`: add the check, and forbid others to attach them. Drop unused ones."""
    if open_functions(connection):
        statement = _CLOSE.replace("{check}", _as_format())
        connection.exec_driver_sql(statement, execution_options={"no_parameters": True})


def _as_format() -> str:
    """The check as a template for PostgreSQL's format()."""
    return "'" + check("%1$L", "%2$L", "%3$s", "%4$s").replace("'", "''") + "'"
