"""The triggers of a tracked table on SQLite. They run once per row."""

from __future__ import annotations

from collections.abc import Iterator

from sqlalchemy import Table, text
from sqlalchemy.engine import Connection, Dialect

from memstate_sa.capture.captured_tables import Trigger
from memstate_sa.capture.row_images import RowImage, TableWriter
from memstate_sa.capture.sql_text import templates
from memstate_sa.db.dialects import SQLITE

_SQL = templates(SQLITE)
INSTALLED = text(_SQL.line("installed"))
_MOMENTS = (("before", "insert"), ("after", "insert"), ("after", "update"), ("after", "delete"))


def build(writer: TableWriter) -> Iterator[Trigger]:
    """The triggers of a table."""
    body = _Body(writer)
    old, row = writer.row("OLD"), writer.row("r")
    columns = [writer.quote(column.name) for column in writer.logged_columns]
    names = [writer.quote(column.name) for column in writer.keys]
    bodies = {
        # When REPLACE deletes a row, no DELETE trigger runs, unless recursive_triggers is on.
        ("before", "insert"): ("", body.baseline(row, f"FROM {writer.table} AS r WHERE {body.same_key('NEW')} AND")),
        ("after", "insert"): ("", body.settle("NEW")),
        ("after", "update"): (
            f"WHEN {_differ(columns)} ",
            f"{body.baseline(old, 'WHERE')}\n{body.settle('OLD', f'({_differ(names)})')}\n{body.settle('NEW')}",
        ),
        ("after", "delete"): ("", f"{body.baseline(old, 'WHERE')}\n{body.settle('OLD')}"),
    }
    for moment in _MOMENTS:
        name, (condition, statements) = writer.name(*moment), bodies[moment]
        source = _SQL.block(
            "trigger",
            name=name,
            moment=" ".join(moment).upper(),
            table=writer.table,
            condition=condition,
            header=writer.header,
            body=statements,
        )
        yield Trigger(name, source, (f"DROP TRIGGER IF EXISTS {name}", source))


def triggers(_: Connection, writer: TableWriter) -> list[Trigger]:
    return list(build(writer))


def creating_offline(writer: TableWriter) -> list[str]:
    return [statement for trigger in build(writer) for statement in trigger.statements]


def name_in_catalog(table: Table, _: Dialect) -> str:
    return str(table.name)


def dropping(writer: TableWriter) -> list[str]:
    """Statements that drop the triggers of a table, if they exist."""
    return [f"DROP TRIGGER IF EXISTS {writer.name(*moment)}" for moment in _MOMENTS]


def _differ(names: list[str]) -> str:
    """SQL for "OLD and NEW differ in one of these columns". It compares bytes: a collation may equate two values."""
    return " OR ".join(f"OLD.{name} IS NOT NEW.{name} COLLATE BINARY" for name in names)


class _Body:
    """Writes the statements of the triggers of one table."""

    def __init__(self, writer: TableWriter) -> None:
        self._writer = writer
        now = _SQL.line("now")
        self._common = {
            "tx": _SQL.line("tx", now=now),
            "now": now,
            "version": writer.captured.version,
            "step": _SQL.line("step"),
            "entity": writer.entity,
        }

    def same_key(self, alias: str) -> str:
        names = (self._writer.quote(column.name) for column in self._writer.keys)
        return " AND ".join(f"r.{name} IS {alias}.{name}" for name in names)

    def baseline(self, row: RowImage, source: str) -> str:
        """Log *row* as a baseline, if the log has no entry of it. *source* is its FROM and WHERE."""
        is_ours = self._is_ours(row.key)
        values = {"key": row.key, "image": row.image, "criterion": row.criterion}
        return _SQL.line("baseline", source=source, is_ours=is_ours, **values, **self._common)

    def settle(self, alias: str, when: str = "1") -> str:
        """Log the change of the row with the key of *alias*, if its last entry differs."""
        row, key = self._writer.row("r"), self._writer.row(alias).key
        last_op = self._last("op", key)
        from_row = _SQL.line(
            "from_row",
            table=self._writer.table,
            same=self.same_key(alias),
            row_key=row.key,
            key=key,
            criterion=row.criterion,
        )
        return _SQL.line(
            "settle",
            key=key,
            op=_SQL.line("op", last_op=last_op),
            image=row.image,
            last_op=last_op,
            last_image=self._last("image", key),
            from_row=from_row,
            is_ours=self._is_ours(key),
            when=when,
            **self._common,
        )

    def _is_ours(self, key: str) -> str:
        """SQL for "triggers log this *key*, and do not leave it to an undo"."""
        return _SQL.line("is_ours", entity=self._writer.entity, key=key)

    def _last(self, column: str, key: str) -> str:
        return _SQL.line("last", column=column, entity=self._writer.entity, key=key)
