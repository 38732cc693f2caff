"""The triggers of a tracked table on PostgreSQL. They run once per statement, for all its rows."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

from sqlalchemy import Table, text
from sqlalchemy.engine import Connection, Dialect

from memstate_sa.capture.captured_tables import Trigger
from memstate_sa.capture.row_images import TableWriter
from memstate_sa.capture.sql_text import as_sent, literal, templates
from memstate_sa.db import functions
from memstate_sa.db.dialects import POSTGRESQL
from memstate_sa.db.tables import log
from memstate_sa.errors import MemstateError
from memstate_sa.log.positions import SLOTS

_SQL = templates(POSTGRESQL)
_EVENTS = ("insert", "update", "delete", "truncate")
_TRANSITION_TABLES = {
    "insert": "REFERENCING NEW TABLE AS new_rows ",
    "update": "REFERENCING OLD TABLE AS old_rows NEW TABLE AS new_rows ",
    "delete": "REFERENCING OLD TABLE AS old_rows ",
    "truncate": "",
}
# By default, PostgreSQL reads all rows of a table that is small or has no statistics. SERIALIZABLE then locks all of
# them.
_BY_INDEX = " SET enable_seqscan = off SET enable_bitmapscan = off"
_DESCRIBED = {"schema": _SQL.line("schema"), "schema_name": _SQL.line("schema_name"), "parts": _SQL.line("parts")}
INSTALLED = text(_SQL.line("installed", is_closed=functions.IS_CLOSED))
_place = text("SELECT {schema}, {schema_name}, {parts} ".format(**_DESCRIBED) + _SQL.line("from_table", table=":name"))


class Places(NamedTuple):
    """The schema of a tracked table, as an identifier and as a literal, and the schema of our tables."""

    its: str
    its_name: str
    ours: str


def triggers(connection: Connection, writer: TableWriter) -> list[Trigger]:
    """The triggers of a table. Raises MemstateError if triggers cannot capture it."""
    return list(build(writer, find_places(connection, writer)))


def name_in_catalog(table: Table, dialect: Dialect) -> str:
    """The name of *table* as a parameter of the statement `INSTALLED`."""
    return as_sent(dialect.identifier_preparer.format_table(table), dialect)


def find_places(connection: Connection, writer: TableWriter) -> Places:
    """Find the schemas of the table and of our tables. Raises MemstateError if triggers cannot capture the table."""
    places = [connection.execute(_place, {"name": name}).one_or_none() for name in (writer.table, log.name)]
    if None in places:
        raise MemstateError(
            "Cannot create triggers: the tables of memstate_sa do not exist. Create them first, by a migration or "
            "memory.create_tables(engine)."
        )
    (its, its_name, parts), (ours, _, _) = places  # type: ignore[misc]
    if parts:
        raise MemstateError(
            f"Cannot capture {writer.captured.table.fullname} by triggers: it {parts}, and triggers do not see "
            "writes to partitions or children. Track it with capture='session'."
        )
    return Places(its, its_name, ours)


def build(writer: TableWriter, places: Places) -> Iterator[Trigger]:
    """The triggers of a table. The trigger for TRUNCATE runs before the rows are removed, because it logs them."""
    table_name = str(writer.captured.table.name)
    table = f"{places.its}.{writer.quote(table_name)}"
    bodies = _Bodies(writer, table, places.ours).by_event()
    for event in _EVENTS:
        name = writer.name(event)
        when = "BEFORE" if event == "truncate" else "AFTER"
        check = functions.check(places.its_name, literal(table_name), event.upper(), when)
        context = {setting: functions.transaction_setting(setting, "moment") for setting in ("tx", "step", "skip")}
        parts = {"header": writer.header, "moment": functions.MOMENT, "check": check.rstrip("\n")}
        source = "\n" + _SQL.block("function", body=bodies[event], **parts, **context) + "\n"
        # The function has its owner's rights, so that a role that may write the table needs no right to write the log.
        create_function = functions.creating(f"{places.ours}.{name}", source, "" if event == "truncate" else _BY_INDEX)
        create_trigger = (
            f"CREATE TRIGGER {name} {when} {event.upper()} ON {table} "
            f"{_TRANSITION_TABLES[event]}FOR EACH STATEMENT EXECUTE FUNCTION {places.ours}.{name}()"
        )
        yield Trigger(name, source, (*create_function, f"DROP TRIGGER IF EXISTS {name} ON {table}", create_trigger))


class _Bodies:
    """Writes the bodies of the functions of one table."""

    def __init__(self, writer: TableWriter, table: str, ours: str) -> None:
        self._table = table
        self._keys = [writer.quote(column.name) for column in writer.keys]
        self._common = {
            "ours": ours,
            "entity": writer.entity,
            "slots": SLOTS,
            "version": writer.captured.version,
        }
        self._now = writer.row("t")
        shown = writer.row("r", old=True)
        images: dict[str, Any] = {"key": shown.key, "image": shown.image, "criterion": shown.criterion}
        old_rows = _SQL.line("numbered_rows", rows="old_rows", **images)
        new_rows = _SQL.line("numbered_rows", rows="new_rows", **images)
        new_keys = _SQL.line("numbered_rows", rows="new_rows", **{**images, "image": "NULL"})
        self._first_old = _SQL.line("first_old", numbered_rows=old_rows)
        self._first_new = _SQL.line("first_new", numbered_rows=new_keys)
        self._last_new = _SQL.line("last_new", numbered_rows=new_rows)
        self._no_rows = _SQL.line("no_rows")

    def by_event(self) -> dict[str, str]:
        old_keys = _SQL.line("keys", rows=self._first_old)
        new_keys = _SQL.line("keys", rows=self._first_new)
        no_last_entry = _SQL.line("no_last_entry")
        inserted: dict[str, str] = {"touched": new_keys, "new": self._first_new}
        updated = {"touched": f"{old_keys} UNION {new_keys}", "old": self._first_old, "new": self._first_new}
        deleted = {"touched": old_keys, "old": self._first_old}
        all_rows = _SQL.line("all_rows", table=self._table, **self._now._asdict())
        return {
            "insert": _SQL.block(
                "shown_or_read",
                shown=self._body(**inserted, now=self._last_new, last=no_last_entry),
                read=self._body(**inserted, now=self._current_rows("new_rows")),
            ),
            "update": _SQL.block(
                "shown_or_read",
                shown=self._body(**updated, now=self._last_new),
                read=self._body(**updated, now=self._current_rows("old_rows", "new_rows")),
            ),
            "delete": _SQL.block(
                "shown_or_read",
                shown=self._body(**deleted),
                read=self._body(**deleted, now=self._current_rows("old_rows")),
            ),
            "truncate": "\n\n".join(
                (_SQL.block("check_truncate"), self._body(_SQL.line("keys", rows=all_rows), old=all_rows))
            ),
        }

    def _body(
        self, touched: str, *, old: str | None = None, new: str | None = None, now: str | None = None, last: str = ""
    ) -> str:
        """SQL that logs the changes of the *touched* rows. Each argument is a SELECT, and None stands for no rows.

        *old* has the rows before the statement, *new* the keys that it wrote, and *now* the current rows. *last* is the
        last entry of a key, read from the log by default.
        """
        now = now or self._no_rows
        baselines = (
            [] if old is None else [_SQL.block("baselines", old=old, new=new or self._no_rows, now=now, **self._common)]
        )
        last = last or _SQL.line("last_entry", **self._common)
        changes = _SQL.block("changes", touched=touched, now=now, last=last, **self._common)
        return "\n\n".join([*baselines, changes, _SQL.block("remember_tx")])

    def _current_rows(self, *transition_tables: str) -> str:
        """The rows of the table for the keys in *transition_tables*."""
        keys = ", ".join(f"r.{name}" for name in self._keys)  # "r." is needed: a variable may have the same name
        touched = " UNION ".join(_SQL.line("touched_keys", keys=keys, rows=rows) for rows in transition_tables)
        same = " AND ".join(f"i.{name} = k.{name}" for name in self._keys)
        return _SQL.line("current_rows", touched=touched, table=self._table, same=same, **self._now._asdict())


def creating_offline(writer: TableWriter) -> list[str]:
    """Statements that create the triggers, for a script that runs without a connection."""
    # No name of the application equals a placeholder, because it would have to contain its own digest.
    unknown = Places(*(f"@{place} {writer.digest}@" for place in Places._fields))
    statements = "\n".join(
        f"  EXECUTE {_filled_in(functions.dollar_quoted(statement), unknown)};"
        for trigger in build(writer, unknown)
        for statement in trigger.statements
    )
    table = literal(writer.table)
    source = _SQL.block(
        "offline",
        statements=statements,
        table=table,
        from_its=_SQL.line("from_table", table=table),
        from_ours=_SQL.line("from_table", table=literal(log.name)),
        **_DESCRIBED,
    )
    return ["DO " + functions.dollar_quoted(f"\n{source}\n")]


def _filled_in(statement: str, unknown: Places) -> str:
    for variable, placeholder in unknown._asdict().items():
        statement = f"pg_catalog.replace({statement}, '{placeholder}', {variable})"
    return statement


def dropping(writer: TableWriter) -> list[str]:
    """Statements that drop the triggers of a table and their functions, if they exist."""
    names = [writer.name(event) for event in _EVENTS]
    triggers = [f"DROP TRIGGER IF EXISTS {name} ON {writer.table}" for name in names]
    return triggers + [f"DROP FUNCTION IF EXISTS {name}()" for name in names]
