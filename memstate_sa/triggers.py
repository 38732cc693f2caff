"""Capture by the database: triggers that write log and outbox, whoever changes the table and by whatever means.

What they write is what `columns` and `codec` would have: the image of a row as tagged JSON, and its canonical key. A
Session tells them its transaction, so that actor, reason and session_id belong to what they log; what other programs
write is a transaction of its own.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

from sqlalchemy import Column, bindparam, delete, func, insert, inspect, select, text, true
from sqlalchemy import types as sqltypes
from sqlalchemy.dialects.postgresql import INTERVAL
from sqlalchemy.engine import Connection, Dialect
from sqlalchemy.sql.util import ClauseAdapter

from memstate_sa.codec import to_json
from memstate_sa.columns import TableColumns
from memstate_sa.errors import MemstateError
from memstate_sa.facts import Tracked
from memstate_sa.positions import SLOTS
from memstate_sa.tables import current, log

# -- what they are told ------------------------------------------------------------------------------------------------

_READS = ("SELECT", "PRAGMA", "EXPLAIN", "VALUES", "BEGIN", "SAVEPOINT", "RELEASE", "ROLLBACK", "SHOW", "SET")
_set = select(func.set_config(bindparam("name"), bindparam("value"), true()))  # until the transaction ends
_put = insert(current)
_clear = delete(current)
_logged = select(select(log.c.id).where(log.c.tx == bindparam("tx")).exists())


def only_reads(statement: str) -> bool:
    """By its first word; a SELECT of a function that writes is taken for a reader."""
    return statement.lstrip()[:9].upper().startswith(_READS)


def tell(connection: Connection, tx: str) -> None:
    """What triggers log from now on is of the transaction *tx*."""
    if connection.dialect.name == "postgresql":
        connection.execute(_set, {"name": "memstate.tx", "value": tx})
    else:
        connection.execute(_put, {"tx": tx, "quiet": False})


def silence(connection: Connection) -> None:
    """Have them log nothing."""
    if connection.dialect.name == "postgresql":
        connection.execute(_set, {"name": "memstate.quiet", "value": "on"})
    else:
        connection.execute(_put, {"tx": None, "quiet": True})


def untell(connection: Connection) -> None:
    """End what `silence` began; and, on SQLite, what `tell` did."""
    if connection.dialect.name == "postgresql":
        connection.execute(_set, {"name": "memstate.quiet", "value": "off"})
    else:
        connection.execute(_clear)


def have_logged(connection: Connection, tx: str) -> bool:
    return bool(connection.execute(_logged, {"tx": tx}).scalar_one())


# -- a row as JSON, in SQL ---------------------------------------------------------------------------------------------


def _tagged(tag: str, value: str) -> str:
    return f"""'{{"{tag}":"' || {value} || '"}}'"""


def _iso(value: str, format_: str) -> str:
    """As Python's isoformat(): microseconds only where there are some."""
    return (
        f"to_char({value}, '{format_}') || CASE WHEN date_trunc('second', {value}) = {value} THEN '' "
        f"ELSE to_char({value}, '.US') END"
    )


_DATETIME = 'YYYY-MM-DD"T"HH24:MI:SS'
_SECONDS = "(extract(hour FROM {0}) * 3600 + extract(minute FROM {0}) * 60) * 1000000 + extract(microseconds FROM {0})"
_DAYS = "extract(year FROM {0}) * 365 + extract(month FROM {0}) * 30 + extract(day FROM {0})"


def _datetime(type_: Any, value: str) -> str:
    if not type_.timezone:
        return _tagged("$datetime", _iso(value, _DATETIME))
    utc = _iso(f"timezone('UTC', {value})", _DATETIME)
    return _tagged("$datetime", f"{utc} || '+00:00'")


def _interval(_: Any, value: str) -> str:
    # As psycopg reads it: a year is 365 days, a month 30.
    days, micros = _DAYS.format(value), _SECONDS.format(value)
    return f"""'{{"$timedelta":[' || ({days})::bigint || ',0,' || ({micros})::bigint || ']}}'"""


_POSTGRESQL: Mapping[type, Callable[[Any, str], str]] = {
    sqltypes.Boolean: lambda _, value: f"{value}::text",
    sqltypes.Integer: lambda _, value: f"{value}::text",
    sqltypes.Float: lambda _, value: _tagged("$float", f"{value}::text"),  # before Numeric, whose subclass it may be
    sqltypes.Numeric: lambda _, value: _tagged("$decimal", f"{value}::text"),
    sqltypes.String: lambda _, value: f"to_json({value})::text",
    sqltypes.Uuid: lambda _, value: _tagged("$uuid", f"replace({value}::text, '-', '')"),
    sqltypes.LargeBinary: lambda _, value: _tagged("$bytes", f"encode({value}, 'hex')"),
    sqltypes.DateTime: _datetime,
    sqltypes.Date: lambda _, value: _tagged("$date", f"to_char({value}, 'YYYY-MM-DD')"),
    sqltypes.Time: lambda type_, value: _tagged(
        "$time", f"{value}::text" if type_.timezone else _iso(f"{value}::interval", "HH24:MI:SS")
    ),
    sqltypes.Interval: _interval,
    INTERVAL: _interval,
}
_ITEMS = (sqltypes.Boolean, sqltypes.Integer, sqltypes.String)
_KEYS = (
    sqltypes.Boolean,
    sqltypes.Integer,
    sqltypes.Numeric,
    sqltypes.String,
    sqltypes.Uuid,
    sqltypes.LargeBinary,
    sqltypes.DateTime,
    sqltypes.Date,
    sqltypes.Time,
)


def _json_postgresql(columns: TableColumns, column: Column[Any], value: str) -> str:
    type_ = columns.implementation(column)
    if columns.travels_as_text(column):
        return f"to_json({value}::text)::text"
    if isinstance(type_, sqltypes.ARRAY):
        if isinstance(type_.item_type, sqltypes.Enum):
            return f"to_json({value}::text)::text"  # psycopg does not take an array of them apart
        if isinstance(type_.item_type, _ITEMS):
            return f"to_jsonb({value})::text"
    else:
        for kind, write in _POSTGRESQL.items():
            if isinstance(type_, kind):
                return write(type_, value)
    raise MemstateError(f"a trigger cannot log {column.table.name}.{column.name} ({column.type!r}): track it without")


def _json_sqlite(_: TableColumns, __: Column[Any], value: str) -> str:
    """By the class in which the value is stored: the type of a column does not tell."""
    return (
        f"CASE typeof({value}) WHEN 'integer' THEN CAST({value} AS TEXT) "
        f"WHEN 'real' THEN {_tagged('$float', f'quote({value})')} "
        f"WHEN 'blob' THEN {_tagged('$bytes', f'lower(hex({value}))')} "
        f"WHEN 'text' THEN CASE WHEN instr({value}, char(0)) THEN "
        f"{_tagged('$text', f'lower(hex(CAST({value} AS BLOB)))')} ELSE json_quote({value}) END END"
    )


_JSON = {"postgresql": _json_postgresql, "sqlite": _json_sqlite}


class _Source(NamedTuple):
    """A row under one of its names in a trigger: what is logged of it."""

    key: str
    image: str
    criterion: str


def _source(tracked: Tracked, dialect: Dialect, alias: str) -> _Source:
    columns, quote = tracked.on(dialect), dialect.identifier_preparer.quote

    def json(column: Column[Any]) -> str:
        if column.type.column_expression(column) is not None:
            raise MemstateError(
                f"a trigger cannot log {column.table.name}.{column.name}: its type reads by an expression"
            )
        return _JSON[dialect.name](columns, column, f"{alias}.{quote(column.name)}")

    keys = list(tracked.table.primary_key.columns)
    for column in keys:
        kind = columns.implementation(column)
        # SQLite keeps a Numeric as a float; and a float has more than one form in text.
        is_float = isinstance(kind, (sqltypes.Float, *([sqltypes.Numeric] if dialect.name == "sqlite" else [])))
        if is_float or not isinstance(kind, _KEYS):
            raise MemstateError(f"a trigger cannot log a primary key of {column.type!r} ({tracked.table.name})")
    key = " || ',' || ".join(json(column) for column in keys)
    fields = " || ',' || ".join(
        f"{_quoted(to_json(column.name) + ':')} || coalesce({json(column)}, 'null')" for column in tracked.table.columns
    )
    criterion = "true" if dialect.name == "postgresql" else "1"
    if tracked.criterion is not None:
        adapted = ClauseAdapter(tracked.table.alias(alias)).traverse(tracked.criterion)
        criterion = str(adapted.compile(dialect=dialect, compile_kwargs={"literal_binds": True}))
    return _Source(f"'[' || {key} || ']'", f"'{{' || {fields} || '}}'", criterion)


def _quoted(value: str) -> str:
    return "'" + value.replace("'", "''") + "'"


# -- the triggers of one table -----------------------------------------------------------------------------------------


class Trigger(NamedTuple):
    """``name`` on its table; ``source`` is what the database shows of it, and tells whether it is ours as it is now."""

    name: str
    source: str
    statements: tuple[str, ...]


def triggers(tracked: Tracked, dialect: Dialect) -> list[Trigger]:
    """What captures *tracked*. Raises MemstateError for a column that triggers cannot log."""
    return list({"postgresql": _on_postgresql, "sqlite": _on_sqlite}[dialect.name](tracked, dialect))


_LOG = "INSERT INTO memstate_log (tx, at, version, step, entity, key, op, image)"
_OUTBOX = "INSERT INTO memstate_outbox (tx, created_at, slot, entity, key)"

_FUNCTION = """
DECLARE
  its_tx text := coalesce(
    nullif(current_setting('memstate.tx', true), ''),
    -- Of another program: one for each of its transactions, in the form of ours.
    lpad(to_hex((extract(epoch FROM transaction_timestamp()) * 1000)::bigint), 12, '0')
      || lpad(to_hex(pg_current_xact_id()::text::bigint), 20, '0')
  );
  its_time timestamptz := clock_timestamp();
BEGIN
  IF current_setting('memstate.quiet', true) = 'on' THEN
    RETURN NULL;
  END IF;
{body}
  RETURN NULL;
END
"""

# Without a key that both have, FULL JOIN takes a change of keys for what it is: one row less, and one more.
_BASELINES = """
  {log}
  SELECT its_tx, its_time, 1, false, {entity}, o.key, 'baseline', o.image::jsonb
  FROM ({old}) AS o{joined}
  WHERE NOT EXISTS (SELECT FROM memstate_log AS l WHERE l.entity = {entity} AND l.key = o.key){differs};
"""
_CHANGES = """
  WITH changed AS ({changed}),
  logged AS (
    {log}
    SELECT its_tx, its_time, 1, true, {entity}, key, op, image::jsonb FROM changed
  )
  {outbox}
  SELECT its_tx, its_time, mod(get_byte(sha256(convert_to({entity} || key, 'UTF8')), 0), {slots}), {entity}, key
  FROM changed;
"""


def _on_postgresql(tracked: Tracked, dialect: Dialect) -> Iterator[Trigger]:
    """Once a statement, of all its rows. On TRUNCATE before it, as there are no rows after."""
    quote, table = dialect.identifier_preparer.quote, dialect.identifier_preparer.format_table(tracked.table)
    given = {"entity": _quoted(tracked.entity), "log": _LOG, "outbox": _OUTBOX, "slots": SLOTS}

    def rows(alias: str, of: str) -> str:
        source = _source(tracked, dialect, alias)
        return f"SELECT {source.key} AS key, {source.image} AS image FROM {of} AS {alias} WHERE {source.criterion}"

    old, new = rows("r", "old_rows"), rows("r", "new_rows")
    inserted = f"SELECT key, 'insert' AS op, image FROM ({new}) AS n"
    deleted = "SELECT key, 'delete' AS op, NULL AS image FROM ({0}) AS o"
    joined = f" LEFT JOIN ({new}) AS n USING (key)"
    updated = (
        "SELECT key, CASE WHEN n.image IS NULL THEN 'delete' WHEN o.image IS NULL THEN 'insert' ELSE 'update' END "
        f"AS op, n.image FROM ({old}) AS o FULL JOIN ({new}) AS n USING (key) WHERE o.image IS DISTINCT FROM n.image"
    )
    differs = " AND o.image IS DISTINCT FROM n.image"
    every = rows("r", table)
    bodies = {
        "insert": _CHANGES.format(changed=inserted, **given),
        "update": _BASELINES.format(old=old, joined=joined, differs=differs, **given)
        + _CHANGES.format(changed=updated, **given),
        "delete": _BASELINES.format(old=old, joined="", differs="", **given)
        + _CHANGES.format(changed=deleted.format(old), **given),
        "truncate": _BASELINES.format(old=every, joined="", differs="", **given)
        + _CHANGES.format(changed=deleted.format(every), **given),
    }
    tables = {
        "insert": "REFERENCING NEW TABLE AS new_rows ",
        "update": "REFERENCING OLD TABLE AS old_rows NEW TABLE AS new_rows ",
        "delete": "REFERENCING OLD TABLE AS old_rows ",
        "truncate": "",
    }
    for event, body in bodies.items():
        name = f"memstate_{event}"
        function = quote(f"memstate_{event}_{_digest(tracked)}")
        source = _FUNCTION.format(body=body)
        # As its owner: who may write the table, need not be allowed to write the log.
        create_function = (
            f"CREATE OR REPLACE FUNCTION {function}() RETURNS trigger LANGUAGE plpgsql SECURITY DEFINER "
            f"SET search_path FROM CURRENT AS $memstate${source}$memstate$"
        )
        create_trigger = (
            f"CREATE TRIGGER {name} {'BEFORE' if event == 'truncate' else 'AFTER'} {event.upper()} ON {table} "
            f"{tables[event]}FOR EACH STATEMENT EXECUTE FUNCTION {function}()"
        )
        yield Trigger(name, source, (create_function, f"DROP TRIGGER IF EXISTS {name} ON {table}", create_trigger))


# Who writes without a Session has no transaction that a trigger could know: what comes in one millisecond is one.
_TX = (
    "coalesce((SELECT tx FROM memstate_current), (SELECT tx FROM memstate_log WHERE id = (SELECT max(id) FROM "
    "memstate_log) AND at = {now} AND tx LIKE 'outside-%'), 'outside-' || lower(hex(randomblob(12))))"
)
_NOW = "strftime('%Y-%m-%d %H:%M:%f000', 'now')"
_LAST = "(SELECT max(id) FROM memstate_log)"


def _on_sqlite(tracked: Tracked, dialect: Dialect) -> Iterator[Trigger]:
    """Once a row."""
    quote, table = dialect.identifier_preparer.quote, dialect.identifier_preparer.format_table(tracked.table)
    entity, now, tx = _quoted(tracked.entity), _NOW, _TX.format(now=_NOW)
    old, new = _source(tracked, dialect, "OLD"), _source(tracked, dialect, "NEW")

    def log(op: str, key: str, image: str, step: int, where: str) -> str:
        return f"{_LOG} SELECT {tx}, {now}, 1, {step}, {entity}, {key}, {op}, {image} WHERE {where};\n"

    def change(op: str, key: str, image: str, where: str) -> str:
        marked = f"{_OUTBOX} SELECT tx, {now}, 0, entity, key FROM memstate_log WHERE id = {_LAST} AND {where};\n"
        return log(op, key, image, 1, where) + marked

    def baseline(row: _Source, where: str) -> str:
        unknown = f"NOT EXISTS (SELECT 1 FROM memstate_log WHERE entity = {entity} AND key = {row.key})"
        return log("'baseline'", row.key, row.image, 0, f"{where} AND {unknown}")

    last = f"(SELECT op FROM memstate_log WHERE entity = {entity} AND key = {new.key} ORDER BY id DESC LIMIT 1)"
    # REPLACE deletes rows without a word, unless recursive_triggers is on.
    put = f"CASE WHEN coalesce({last}, 'delete') = 'delete' THEN 'insert' ELSE 'update' END"
    there = " AND ".join(f"{quote(c.name)} IS NEW.{quote(c.name)}" for c in tracked.table.primary_key.columns)
    row = _source(tracked, dialect, quote(tracked.table.name))
    replaced = (
        f"{_LOG} SELECT {tx}, {now}, 1, 0, {entity}, {row.key}, 'baseline', {row.image} FROM {table} WHERE {there} AND "
        f"{row.criterion} AND NOT EXISTS (SELECT 1 FROM memstate_log WHERE entity = {entity} AND key = {row.key});\n"
    )
    names = {column: quote(column.name) for column in tracked.table.columns}
    differs = {column: f"OLD.{name} IS NOT NEW.{name}" for column, name in names.items()}
    moved = f"({' OR '.join(differs[column] for column in tracked.table.primary_key.columns)})"
    changed = f"({' OR '.join(differs.values())})"
    was, is_ = f"({old.criterion})", f"({new.criterion})"
    bodies = {
        ("BEFORE", "INSERT"): replaced,
        ("AFTER", "INSERT"): change(put, new.key, new.image, is_),
        ("AFTER", "UPDATE"): baseline(old, f"{was} AND {changed}")
        + change("'delete'", old.key, "NULL", f"{was} AND ({moved} OR NOT {is_})")
        + change("'insert'", new.key, new.image, f"{is_} AND ({moved} OR NOT {was})")
        + change("'update'", new.key, new.image, f"{was} AND {is_} AND NOT {moved} AND {changed}"),
        ("AFTER", "DELETE"): baseline(old, was) + change("'delete'", old.key, "NULL", was),
    }
    for (when, event), body in bodies.items():
        name = f"memstate_{when.lower()}_{event.lower()}_{_digest(tracked)}"
        source = (
            f"CREATE TRIGGER {name} {when} {event} ON {table} FOR EACH ROW "
            f"WHEN NOT EXISTS (SELECT 1 FROM memstate_current WHERE quiet) BEGIN\n{body}END"
        )
        yield Trigger(name, source, (f"DROP TRIGGER IF EXISTS {name}", source))


def install(connection: Connection, tracked: Tracked) -> None:
    """Create the triggers of *tracked*, or replace those that are not as they should be."""
    there = installed(connection, tracked)
    for trigger in triggers(tracked, connection.dialect):
        if there.get(trigger.name) != trigger.source:
            for statement in trigger.statements:
                connection.exec_driver_sql(statement, execution_options={"no_parameters": True})  # it may hold a %


def installed(connection: Connection, tracked: Tracked) -> dict[str, str]:
    """The source of each trigger of ours that the table has, by name. Raises MemstateError when there is no table."""
    table = tracked.table
    if not inspect(connection).has_table(table.name, schema=table.schema):
        raise MemstateError(f"table {table.fullname} is not there yet: create it before its triggers")
    if connection.dialect.name == "postgresql":
        of = connection.dialect.identifier_preparer.format_table(table)
        found = connection.execute(_triggers_postgresql, {"table": of}).all()
    else:
        found = connection.execute(_triggers_sqlite, {"table": table.name}).all()
    return {name: source for name, source in found}  # noqa: C416  # rows, not pairs


_triggers_postgresql = text(
    "SELECT t.tgname, p.prosrc FROM pg_trigger AS t JOIN pg_proc AS p ON p.oid = t.tgfoid "
    "WHERE t.tgrelid = to_regclass(:table) AND t.tgname LIKE 'memstate\\_%' AND t.tgenabled <> 'D'"
)
_triggers_sqlite = text(
    "SELECT name, sql FROM sqlite_master WHERE type = 'trigger' AND tbl_name = :table AND name LIKE 'memstate\\_%' "
    "ESCAPE '\\'"
)


def _digest(tracked: Tracked) -> str:
    return hashlib.sha256(tracked.table.fullname.encode()).hexdigest()[:16]
