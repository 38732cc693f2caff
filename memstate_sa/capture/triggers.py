"""Capture by the database: triggers that write log and outbox, whoever changes the table and by whatever means.

What they write is what `columns` and `codec` would have: the image of a row as tagged JSON, and its canonical key. The
trigger context names the transaction of a Session. What other programs write is a transaction of its own.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple, Protocol

from sqlalchemy import Column, ColumnElement, Table, inspect, text
from sqlalchemy import types as sqltypes
from sqlalchemy.dialects.postgresql import INTERVAL
from sqlalchemy.engine import Connection, Dialect
from sqlalchemy.sql.util import ClauseAdapter

from memstate_sa.capture.trigger_context import SKIP
from memstate_sa.db import functions
from memstate_sa.db.codec import to_json
from memstate_sa.db.rows import TableColumns, stored_columns
from memstate_sa.db.tables import log
from memstate_sa.errors import MemstateError
from memstate_sa.log.positions import SLOTS
from memstate_sa.tracking.inheritance import inheritance_criterion
from memstate_sa.tracking.tracked import TRACKED

# -- what is captured --------------------------------------------------------------------------------------------------


class Capturable(Protocol):
    """What the triggers of a table are made from: a tracked class has it, and a migration says it."""

    @property
    def table(self) -> Table: ...
    @property
    def entity(self) -> str: ...
    @property
    def version(self) -> int: ...
    @property
    def criterion(self) -> ColumnElement[bool] | None: ...


Only = tuple[str, Sequence[Any]]
"""A column, and the values of it (as the driver gives them) that rows of single-table inheritance have."""


class CapturedTable(NamedTuple):
    """A table that triggers capture, by its parts."""

    table: Table
    entity: str
    version: int = 1
    criterion: ColumnElement[bool] | None = None

    @classmethod
    def restricted(cls, table: Table, entity: str, version: int, only: Only | None) -> CapturedTable:
        criterion = None if only is None else table.columns[only[0]].in_(only[1])
        return cls(table, entity, version, criterion)


def captured_in(table: Table) -> dict[str, CapturedTable]:
    """What `Memory.track` has asked to be captured of *table*, by entity."""
    return {
        entity: CapturedTable(table, entity, version, inheritance_criterion(inspect(model)))
        for entity, (model, version) in table.metadata.info.get(TRACKED, {}).get(table.fullname, {}).items()
    }


def only(captured: Capturable, dialect: Dialect) -> Only | None:
    """The criterion as data."""
    if captured.criterion is None:
        return None
    column, values = captured.criterion.left, captured.criterion.right.value
    if not isinstance(column, Column):
        raise MemstateError(
            f"the rows of {captured.entity} in {captured.table.fullname} are told by an expression, which a trigger "
            "cannot have: map polymorphic_on to a column"
        )
    bind = column.type.dialect_impl(dialect).bind_processor(dialect)
    return str(column.name), list(values if bind is None else map(bind, values))


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


class _Writer:
    """Writes the SQL of one table's triggers."""

    def __init__(self, captured: Capturable, dialect: Dialect) -> None:
        self.captured = captured
        self.dialect = dialect
        self.entity = _quoted(captured.entity)
        self.keys = list(captured.table.primary_key.columns)
        self._columns = TableColumns(captured.table, dialect)
        said = {"entity": captured.entity, "version": captured.version, "only": only(captured, dialect)}
        # For whoever replaces the triggers by others, and wants to be able to have these again.
        self.header = f"{_HEADER}{json.dumps(said)}\n"
        for column in self.keys:
            self._require_key(column)

    @property
    def table(self) -> str:
        return _as_sent(self.dialect.identifier_preparer.format_table(self.captured.table), self.dialect)

    def name(self, *moment: str) -> str:
        """Of the trigger of this *moment*."""
        return f"memstate_{'_'.join(moment)}_{self.digest}"

    @property
    def digest(self) -> str:
        named = f"{self.captured.table.fullname} {self.captured.entity}"
        return hashlib.sha256(named.encode()).hexdigest()[:16]

    def quote(self, name: str) -> str:
        """*name* as an identifier."""
        return _as_sent(self.dialect.identifier_preparer.quote(name), self.dialect)

    def row(self, alias: str, *, old: bool = False) -> _Source:
        """What is logged of the row *alias*; *old*: of a transition table, which has no virtual columns."""
        name = alias if alias in ("NEW", "OLD") else self.quote(alias)
        key = " || ',' || ".join(f"coalesce({self._json(name, column)}, 'null')" for column in self.keys)
        fields = " || ',' || ".join(
            f"{_quoted(to_json(column.name) + ':')} || coalesce({self._json(name, column)}, 'null')"
            for column in stored_columns(self.captured.table)
            if not (old and column.computed is not None and not column.computed.persisted)
        )
        criterion = "true" if self.dialect.name == "postgresql" else "1"
        if self.captured.criterion is not None:
            adapted = ClauseAdapter(self.captured.table.alias(alias)).traverse(self.captured.criterion)
            compiled = adapted.compile(dialect=self.dialect, compile_kwargs={"literal_binds": True})
            criterion = _as_sent(str(compiled), self.dialect)
        return _Source(f"'[' || {key} || ']'", f"'{{' || {fields} || '}}'", criterion)

    def _json(self, alias: str, column: Column[Any]) -> str:
        if column.type.column_expression(column) is not None:
            raise MemstateError(
                f"a trigger cannot log {column.table.name}.{column.name}: its type reads by an expression"
            )
        return _JSON[self.dialect.name](self._columns, column, f"{alias}.{self.quote(column.name)}")

    def _require_key(self, column: Column[Any]) -> None:
        """A key has one form as text, the one that Python gives it."""
        kind = self._columns.implementation(column)
        good = isinstance(kind, _KEYS)
        if isinstance(kind, sqltypes.Float):
            good = False
        elif isinstance(kind, sqltypes.Numeric):  # SQLite keeps it as a float; Python writes 1E-7
            good = self.dialect.name == "postgresql" and kind.scale is not None and kind.scale <= 6
        elif isinstance(kind, sqltypes.Time):
            good = not kind.timezone
        elif isinstance(kind, sqltypes.String):  # in SQLite another key may be the same row
            good = self.dialect.name == "postgresql" or kind.collation in (None, "BINARY")
        if not good:
            raise MemstateError(
                f"a trigger cannot log a primary key of {column.type!r} ({column.table.name}.{column.name})"
            )


def _as_sent(compiled: str, dialect: Dialect) -> str:
    """SQL that goes without parameters, so that a percent sign is one."""
    return compiled.replace("%%", "%") if dialect.name == "postgresql" else compiled


def _quoted(value: str) -> str:
    return "'" + value.replace("'", "''") + "'"


# -- the triggers of one table -----------------------------------------------------------------------------------------


class Trigger(NamedTuple):
    """``name`` on its table; ``source`` is what the database shows of it, and tells whether it is ours as it is now."""

    name: str
    source: str
    statements: tuple[str, ...]


def triggers(connection: Connection, captured: Capturable) -> list[Trigger]:
    """What captures *captured*. Raises MemstateError for what triggers cannot log, and when there is no table."""
    writer, table = _Writer(captured, connection.dialect), captured.table
    if not inspect(connection).has_table(table.name, schema=table.schema):
        raise MemstateError(f"table {table.fullname} is not there yet: create it before its triggers")
    if connection.dialect.name == "sqlite":
        return list(_on_sqlite(writer))
    places = [connection.execute(_place, {"name": name}).one_or_none() for name in (writer.table, log.name)]
    if None in places:
        raise MemstateError("the tables of memstate_sa are not there yet: create them before the triggers")
    (its, its_name, parts), (ours, _, _) = places  # type: ignore[misc]
    if parts:
        raise MemstateError(
            f"{table.fullname} {parts}: its triggers would not see writes to partitions or children. Track it with "
            "capture='session'."
        )
    return list(_on_postgresql(writer, _Places(its, its_name, ours)))


class _Places(NamedTuple):
    """The schema of a table, as an identifier and as a literal; and that of memstate_sa, as an identifier."""

    its: str
    its_name: str
    ours: str


# With every name qualified: who runs a migration may have schemas of others in the search_path.
_PARTS = (
    "CASE WHEN c.relkind = 'p' THEN 'is partitioned' WHEN c.relispartition THEN 'is a partition' WHEN EXISTS (SELECT "
    "FROM pg_catalog.pg_inherits AS i WHERE c.oid IN (i.inhrelid, i.inhparent)) THEN 'inherits, or is inherited' END"
)
_PLACE = (
    "FROM pg_catalog.pg_class AS c JOIN pg_catalog.pg_namespace AS n ON n.oid = c.relnamespace "
    "WHERE c.oid = CAST(pg_catalog.to_regclass({}) AS oid)"
)
_SCHEMA = "pg_catalog.quote_ident(CAST(n.nspname AS text))"
_SCHEMA_NAME = "pg_catalog.quote_literal(CAST(n.nspname AS text))"
_place = text(f"SELECT {_SCHEMA}, {_SCHEMA_NAME}, {_PARTS} {_PLACE.format(':name')}")
_OFFLINE = """
DECLARE
  its text;
  its_name text;
  ours text;
  parts text;
BEGIN
  SELECT {schema}, {schema_name}, {parts} INTO its, its_name, parts {its_place};
  SELECT {schema} INTO ours {our_place};
  IF its IS NULL OR ours IS NULL OR parts IS NOT NULL THEN
    RAISE EXCEPTION USING MESSAGE = 'is it there, and not partitioned, and are the tables of memstate_sa? ' || {table};
  END IF;
{statements}
END
"""


def creating(captured: Capturable, dialect: Dialect) -> list[str]:
    """Statements that create the triggers of *captured* where nobody can be asked for the schemas of the tables."""
    writer = _Writer(captured, dialect)
    if dialect.name == "sqlite":
        return [statement for trigger in _on_sqlite(writer) for statement in trigger.statements]
    # No name of the application is one of these: it would have to hold its own digest.
    unknown = _Places(*(f"@{place} {writer.digest}@" for place in _Places._fields))
    statements = "\n".join(
        f"  EXECUTE {_filled_in(functions.dollar_quoted(statement), unknown)};"
        for trigger in _on_postgresql(writer, unknown)
        for statement in trigger.statements
    )
    table = _quoted(writer.table)
    places = {"its_place": _PLACE.format(table), "our_place": _PLACE.format(_quoted(log.name)), "table": table}
    shown = {"schema": _SCHEMA, "schema_name": _SCHEMA_NAME, "parts": _PARTS}
    return [f"DO {functions.dollar_quoted(_OFFLINE.format(statements=statements, **places, **shown))}"]


def _filled_in(statement: str, unknown: _Places) -> str:
    for variable, placeholder in unknown._asdict().items():
        statement = f"pg_catalog.replace({statement}, '{placeholder}', {variable})"
    return statement


def dropping(captured: Capturable, dialect: Dialect) -> list[str]:
    """Statements that drop the triggers of *captured*, and their functions, as far as they are there."""
    writer = _Writer(captured, dialect)
    if dialect.name == "sqlite":
        return [f"DROP TRIGGER IF EXISTS {writer.name(*moment)}" for moment in _ON_SQLITE]
    names = [writer.name(event) for event in _ON_POSTGRESQL]
    triggers = [f"DROP TRIGGER IF EXISTS {name} ON {writer.table}" for name in names]
    return triggers + [f"DROP FUNCTION IF EXISTS {name}()" for name in names]


_HEADER = "-- memstate_sa "
_ON_POSTGRESQL = ("insert", "update", "delete", "truncate")
_ON_SQLITE = (("before", "insert"), ("after", "insert"), ("after", "update"), ("after", "delete"))
_FUNCTION = """
{header}DECLARE
  moment text := {moment};
  its_tx text := coalesce(
    {tx},
    -- Of another program: one for each of its transactions, in the form of ours.
    lpad(to_hex((extract(epoch FROM transaction_timestamp()) * 1000)::bigint), 12, '0')
      || lpad(to_hex(pg_current_xact_id()::text::bigint), 20, '0')
  );
  its_time timestamptz := clock_timestamp();
  counts boolean := {step} IS DISTINCT FROM 'off';
  undoes boolean := {skip} IS NOT DISTINCT FROM 'on';
  nested boolean := pg_trigger_depth() > 1;
BEGIN
{check}  IF nested THEN
    PERFORM set_config('memstate.nested', moment, true);
  END IF;
{body}
  RETURN NULL;
END
"""
# A Session asks it before its COMMIT: to read the log would be a conflict in SERIALIZABLE.
_LOGGED = """
  IF FOUND AND position(its_tx IN coalesce(current_setting('memstate.logged', true), '')) = 0 THEN
    PERFORM set_config('memstate.logged', concat_ws(' ', current_setting('memstate.logged', true), its_tx), true);
  END IF;
"""

# One statement may touch a row several times: by foreign keys that cascade, by other triggers. What it was is its
# first old row, unless it was made before that; what it is, the table knows. It is logged if the log says otherwise.
_BASELINES = """
  INSERT INTO {ours}.memstate_log (tx, at, xid, version, step, entity, key, op, image)
  SELECT its_tx, its_time, pg_current_xact_id()::text::bigint, {version}, false, {entity}, o.key, 'baseline',
    o.image::jsonb
  FROM ({old}) AS o LEFT JOIN ({new}) AS n ON n.key = o.key LEFT JOIN ({now}) AS t ON t.key = o.key
  WHERE (n.n IS NULL OR o.n <= n.n) AND o.image IS DISTINCT FROM t.image
    AND NOT (undoes AND EXISTS (SELECT FROM {ours}.memstate_current AS c WHERE c.name = 'skip ' || {entity} || o.key))
    AND (SELECT true FROM {ours}.memstate_log WHERE entity = {entity} AND key = o.key ORDER BY id DESC LIMIT 1) IS NULL;
"""
_CHANGES = """
  WITH state AS (
    SELECT k.key, t.image::jsonb AS image, l.op AS last_op, l.image AS last_image
    FROM ({touched}) AS k LEFT JOIN ({now}) AS t ON t.key = k.key LEFT JOIN LATERAL ({last}) AS l ON true
    WHERE NOT (undoes AND EXISTS (SELECT FROM {ours}.memstate_current AS c WHERE c.name = 'skip ' || {entity} || k.key))
  ), changed AS (
    SELECT key, image, CASE WHEN image IS NULL THEN 'delete' WHEN last_op IS DISTINCT FROM 'delete'
      AND last_op IS NOT NULL THEN 'update' ELSE 'insert' END AS op
    FROM state WHERE CASE WHEN image IS NULL THEN coalesce(last_op, 'delete') <> 'delete'
      ELSE coalesce(last_op, 'delete') = 'delete' OR image IS DISTINCT FROM last_image END
  ), logged AS (
    INSERT INTO {ours}.memstate_log (tx, at, xid, snapshot, version, step, entity, key, op, image)
    SELECT its_tx, its_time, pg_current_xact_id()::text::bigint,
      CASE WHEN row_number() OVER () = 1 THEN pg_current_snapshot()::text END, {version}, counts, {entity}, key, op,
      image
    FROM changed
  )
  INSERT INTO {ours}.memstate_outbox (tx, created_at, xid, intent, slot, entity, key)
  SELECT its_tx, its_time, pg_current_xact_id()::text::bigint, false,
    mod(get_byte(sha256(convert_to({entity} || key, 'UTF8')), 0), {slots}), {entity}, key
  FROM changed;
"""
_LAST = "SELECT op, image FROM {ours}.memstate_log WHERE entity = {entity} AND key = k.key ORDER BY id DESC LIMIT 1"
_NO_LAST = "SELECT NULL::text AS op, NULL::jsonb AS image"
_ALONE = """
  IF current_setting('transaction_isolation') <> 'read committed' THEN
    RAISE EXCEPTION 'TRUNCATE would remove rows that this transaction does not see, past their log'
      USING HINT = 'Truncate in READ COMMITTED.';
  END IF;
  IF row_security_active(TG_RELID) THEN
    RAISE EXCEPTION 'TRUNCATE would remove rows that row-level security hides from this function, past their log'
      USING HINT = 'Delete the rows, or give the function an owner with BYPASSRLS.';
  END IF;
"""
# What the statement shows is taken for what has become of a row in two cases:
# 1. A policy that holds for the function's owner (FORCE ROW LEVEL SECURITY) may hide a row that is there.
# 2. In SERIALIZABLE, whatever is read makes transactions fail that have nothing to do with each other: an index is
#    locked by the page. So neither the table is read, nor the log for a row that is new.
# It is so unless another statement within this one came later, of a trigger of the application. That one tells us.
_SHOWN_OR_READ = """
  IF row_security_active(TG_RELID) OR (NOT nested AND current_setting('transaction_isolation') = 'serializable'
    AND current_setting('memstate.nested', true) IS DISTINCT FROM moment)
  THEN
{shown}
  ELSE
{read}
  END IF;
"""
# A small table, or one without statistics, is read as a whole otherwise: in SERIALIZABLE, it is locked as a whole.
_BY_INDEX = " SET enable_seqscan = off SET enable_bitmapscan = off"
_NO_ROWS = "SELECT NULL::text AS key, NULL::text AS image, 0::bigint AS n WHERE false"


def _on_postgresql(writer: _Writer, places: _Places) -> Iterator[Trigger]:
    """Once a statement, of all its rows. On TRUNCATE before it, as there are no rows after."""
    ours, table_name = places.ours, str(writer.captured.table.name)
    table = f"{places.its}.{writer.quote(table_name)}"
    shown, now = writer.row("r", old=True), writer.row("t")
    names = [writer.quote(column.name) for column in writer.keys]
    numbered = "SELECT {0} AS key, {1} AS image, {2} AS ours, row_number() OVER () AS n FROM {3} AS r"
    first_old = (
        f"SELECT DISTINCT ON (key) key, image, n FROM ({numbered.format(*shown, 'old_rows')}) AS x WHERE ours "
        "ORDER BY key, n"
    )
    last_new = (
        f"SELECT DISTINCT ON (key) key, image FROM ({numbered.format(*shown, 'new_rows')}) AS x WHERE ours "
        "ORDER BY key, n DESC"
    )
    first_new = (
        f"SELECT key, min(n) AS n FROM ({numbered.format(shown.key, 'NULL', shown.criterion, 'new_rows')}) AS x "
        "WHERE ours GROUP BY key"
    )

    def current_rows(*transitions: str) -> str:
        """Row by row: a plan that is kept must not read the table as a whole."""
        keys = ", ".join(f"r.{name}" for name in names)  # a variable of the function may have the name of a column
        touched = " UNION ".join(f"SELECT {keys} FROM {rows} AS r" for rows in transitions)
        same = " AND ".join(f"i.{name} = k.{name}" for name in names)
        return (
            f"SELECT {now.key} AS key, {now.image} AS image FROM ({touched}) AS k CROSS JOIN LATERAL "
            f"(SELECT * FROM {table} AS i WHERE {same} LIMIT 1) AS t WHERE {now.criterion}"
        )

    def body(touched: str, *, old: str = _NO_ROWS, new: str = _NO_ROWS, now: str = _NO_ROWS, last: str = _LAST) -> str:
        given = {"ours": ours, "entity": writer.entity, "now": now, "slots": SLOTS, "version": writer.captured.version}
        baselines = "" if old is _NO_ROWS else _BASELINES.format(old=old, new=new, **given)
        return baselines + _CHANGES.format(touched=touched, last=last.format(**given), **given) + _LOGGED

    keys_old, keys_new = f"SELECT key FROM ({first_old}) AS y", f"SELECT key FROM ({first_new}) AS y"
    every = f"SELECT {now.key} AS key, {now.image} AS image, 0::bigint AS n FROM {table} AS t WHERE {now.criterion}"
    updated = {"touched": f"{keys_old} UNION {keys_new}", "old": first_old, "new": first_new}

    def shown_or_read(shown: str, read: str) -> str:
        return _SHOWN_OR_READ.format(shown=shown, read=read)

    bodies = {
        "insert": shown_or_read(
            body(keys_new, new=first_new, now=last_new, last=_NO_LAST),
            body(keys_new, new=first_new, now=current_rows("new_rows")),
        ),
        "update": shown_or_read(
            body(**updated, now=last_new), body(**updated, now=current_rows("old_rows", "new_rows"))
        ),
        "delete": shown_or_read(
            body(keys_old, old=first_old), body(keys_old, old=first_old, now=current_rows("old_rows"))
        ),
        "truncate": _ALONE + body(f"SELECT key FROM ({every}) AS y", old=every),
    }
    tables = {
        "insert": "REFERENCING NEW TABLE AS new_rows ",
        "update": "REFERENCING OLD TABLE AS old_rows NEW TABLE AS new_rows ",
        "delete": "REFERENCING OLD TABLE AS old_rows ",
        "truncate": "",
    }
    for event in _ON_POSTGRESQL:
        name = writer.name(event)
        when = "BEFORE" if event == "truncate" else "AFTER"
        check = functions.check(places.its_name, _quoted(table_name), event.upper(), when)
        told = {name: functions.told(name, "moment") for name in ("tx", "step", "skip")}
        parts = {"header": writer.header, "moment": functions.MOMENT, "check": check, "body": bodies[event]}
        source = _FUNCTION.format(**parts, **told)
        # As its owner: who may write the table, need not be allowed to write the log.
        create_function = functions.creating(f"{ours}.{name}", source, "" if event == "truncate" else _BY_INDEX)
        create_trigger = (
            f"CREATE TRIGGER {name} {when} {event.upper()} ON {table} "
            f"{tables[event]}FOR EACH STATEMENT EXECUTE FUNCTION {ours}.{name}()"
        )
        yield Trigger(name, source, (*create_function, f"DROP TRIGGER IF EXISTS {name} ON {table}", create_trigger))


# Who writes without a Session has no transaction that a trigger could know: what comes in one millisecond is one.
_NOW = "strftime('%Y-%m-%d %H:%M:%f000', 'now')"
_TOLD = "(SELECT value FROM memstate_current WHERE name = '{}')"
_TX = (
    f"coalesce({_TOLD.format('tx')}, (SELECT tx FROM memstate_log WHERE id = (SELECT max(id) FROM memstate_log) "
    f"AND at = {_NOW} AND tx LIKE 'outside-%'), 'outside-' || lower(hex(randomblob(12))))"
)
_STEP = f"coalesce({_TOLD.format('step')}, 1)"
_INSERT = "INSERT INTO memstate_log (tx, at, version, step, entity, key, op, image)"


def _on_sqlite(writer: _Writer) -> Iterator[Trigger]:
    """Once a row. What it has become is read from the table: triggers of the application may have changed it."""
    captured, quote, entity, table = writer.captured, writer.quote, writer.entity, writer.table
    row = writer.row("r")

    def same(alias: str) -> str:
        return " AND ".join(f"r.{quote(column.name)} IS {alias}.{quote(column.name)}" for column in writer.keys)

    def logs(key: str) -> str:
        return (
            f"NOT EXISTS (SELECT 1 FROM memstate_current WHERE name = {_quoted(SKIP.format(''))} || {entity} || {key})"
        )

    def last(column: str, key: str) -> str:
        return f"(SELECT {column} FROM memstate_log WHERE entity = {entity} AND key = {key} ORDER BY id DESC LIMIT 1)"

    def baseline(of: _Source, source: str) -> str:
        """What a row was, if the log has not seen it."""
        unknown = f"NOT EXISTS (SELECT 1 FROM memstate_log WHERE entity = {entity} AND key = {of.key})"
        return (
            f"{_INSERT} SELECT {_TX}, {_NOW}, {captured.version}, 0, {entity}, {of.key}, 'baseline', {of.image} "
            f"{source} {of.criterion} AND {unknown} AND {logs(of.key)};\n"
        )

    def settle(alias: str, when: str = "1") -> str:
        """What has become of the key of *alias*, if the log does not say so already."""
        key = writer.row(alias).key
        there = f"FROM {table} AS r WHERE {same(alias)} AND {row.key} = {key} AND {row.criterion}"
        op = f"CASE WHEN coalesce({last('op', key)}, 'delete') = 'delete' THEN 'insert' ELSE 'update' END"
        differs = f"({op} = 'insert' OR {last('image', key)} IS NOT {row.image})"
        entry = f"{_INSERT} SELECT {_TX}, {_NOW}, {captured.version}, {_STEP}, {entity}, {key}"
        return (
            f"{entry}, {op}, {row.image} {there} AND {differs} AND {logs(key)} AND {when};\n"
            f"{entry}, 'delete', NULL WHERE {last('op', key)} <> 'delete' AND NOT EXISTS (SELECT 1 {there}) "
            f"AND {logs(key)} AND {when};\n"
            # Once too often does no harm.
            "INSERT INTO memstate_outbox (tx, created_at, xid, intent, slot, entity, key) "
            "SELECT tx, at, 0, 0, 0, entity, key FROM memstate_log WHERE id = (SELECT max(id) FROM memstate_log) "
            f"AND entity = {entity} AND key = {key} AND op <> 'baseline' AND {when};\n"
        )

    old = writer.row("OLD")
    # As it is stored: the collation of a column may take different values for the same.
    differs = [f"OLD.{quote(c.name)} IS NOT NEW.{quote(c.name)} COLLATE BINARY" for c in stored_columns(captured.table)]
    moved = " OR ".join(f"OLD.{quote(c.name)} IS NOT NEW.{quote(c.name)} COLLATE BINARY" for c in writer.keys)
    bodies = {
        # REPLACE deletes rows without a word, unless recursive_triggers is on.
        ("before", "insert"): ("", baseline(row, f"FROM {table} AS r WHERE {same('NEW')} AND")),
        ("after", "insert"): ("", settle("NEW")),
        ("after", "update"): (
            f"WHEN {' OR '.join(differs)} ",
            baseline(old, "WHERE") + settle("OLD", f"({moved})") + settle("NEW"),
        ),
        ("after", "delete"): ("", baseline(old, "WHERE") + settle("OLD")),
    }
    for moment in _ON_SQLITE:
        name, when, (condition, body) = writer.name(*moment), " ".join(moment).upper(), bodies[moment]
        source = f"CREATE TRIGGER {name} {when} ON {table} FOR EACH ROW {condition}BEGIN\n{writer.header}{body}END"
        yield Trigger(name, source, (f"DROP TRIGGER IF EXISTS {name}", source))


def install(connection: Connection, captured: Capturable) -> None:
    """Create the triggers of *captured*, or replace those that are not as they should be."""
    replace(connection, captured.table, triggers(connection, captured))


def uninstall(connection: Connection, captured: Capturable) -> None:
    """Drop the triggers that log *captured*, if there are any: a Session logs it now, and each change only once."""
    if captured.entity in entities_of(connection, captured.table):
        run(connection, dropping(captured, connection.dialect))


def entities_of(connection: Connection, table: Table) -> set[str]:
    """The entities as which triggers of ours log *table*."""
    found = (header(source) for source in installed(connection, table).values())
    return {said["entity"] for said in found if said is not None}


def replace(connection: Connection, table: Table, wanted: Sequence[Trigger]) -> None:
    """Make *table* have the triggers that are *wanted*."""
    there = installed(connection, table)
    for trigger in wanted:
        if there.get(trigger.name) != trigger.source:
            run(connection, trigger.statements)


def run(connection: Connection, statements: Iterable[str]) -> None:
    for statement in statements:
        connection.exec_driver_sql(statement, execution_options={"no_parameters": True})  # it may hold a %


def header(source: str) -> Mapping[str, Any] | None:
    """``entity``, ``version`` and ``only`` of the trigger with this *source*; None where it is not ours, or older."""
    line = next((line for line in source.splitlines() if line.startswith(_HEADER)), None)
    return None if line is None else json.loads(line.removeprefix(_HEADER))


def installed(connection: Connection, table: Table) -> dict[str, str]:
    """The source of each trigger of ours that *table* has, by name."""
    of_postgresql = _as_sent(connection.dialect.identifier_preparer.format_table(table), connection.dialect)
    of = of_postgresql if connection.dialect.name == "postgresql" else table.name
    return {name: source for found in everywhere(connection, of).values() for name, source in found.items()}


def everywhere(connection: Connection, table: str | None = None) -> dict[tuple[str | None, str], dict[str, str]]:
    """The same of every table, or of one; by its schema, None for the default one, and its name."""
    found: dict[tuple[str | None, str], dict[str, str]] = {}
    for schema, of, name, source in connection.execute(_triggers[connection.dialect.name], {"table": table}):
        found.setdefault((schema, of), {})[name] = source
    return found


_triggers = {
    "postgresql": text(
        "SELECT nullif(n.nspname, current_schema()), c.relname, t.tgname, "
        f"CASE WHEN {functions.IS_CLOSED} THEN p.prosrc ELSE '-- others may run it' || p.prosrc END "
        "FROM pg_trigger AS t JOIN pg_proc AS p ON p.oid = t.tgfoid JOIN pg_class AS c ON c.oid = t.tgrelid "
        "JOIN pg_namespace AS n ON n.oid = c.relnamespace "
        "WHERE t.tgname LIKE 'memstate\\_%' AND t.tgenabled IN ('O', 'A') "
        "AND (CAST(:table AS text) IS NULL OR c.oid = to_regclass(CAST(:table AS text)))"
    ),
    "sqlite": text(
        "SELECT NULL, tbl_name, name, sql FROM sqlite_master WHERE type = 'trigger' AND name LIKE 'memstate\\_%' "
        "ESCAPE '\\' AND (:table IS NULL OR tbl_name = :table)"
    ),
}
