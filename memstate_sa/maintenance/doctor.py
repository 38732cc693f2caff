"""Check that the log agrees with the tables, and that nothing in the database will make them differ later."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from textwrap import fill, indent
from typing import Any, NamedTuple

from sqlalchemy import Inspector, Table, bindparam, inspect, select
from sqlalchemy.engine import Connection, Engine
from sqlalchemy.orm import configure_mappers

from memstate_sa.capture import append_only, cascades, hazards, triggers, unique_values
from memstate_sa.capture.listeners import SessionCapture
from memstate_sa.capture.recorder import Recorder
from memstate_sa.capture.supported import unsupported_tables
from memstate_sa.capture.transaction import OpenTransaction
from memstate_sa.db import sqlite
from memstate_sa.db.amendments import lacking
from memstate_sa.db.codec import Image
from memstate_sa.db.dialects import SQLITE, database_of
from memstate_sa.db.rows import TableColumns
from memstate_sa.db.statements import writing
from memstate_sa.db.tables import log, metadata, trigger_context
from memstate_sa.db.undeclared_columns import undeclared_columns, what_is_lost
from memstate_sa.embedding.batches import Destination
from memstate_sa.errors import ConflictError, MemstateError
from memstate_sa.log.absent_keys import KeyInserted, require_absent
from memstate_sa.log.changes import LogEntry, new_tx
from memstate_sa.log.history import LastEntry, last_entries
from memstate_sa.maintenance import releases
from memstate_sa.relay.progress import Progress
from memstate_sa.runtime.display import html_table, summary
from memstate_sa.runtime.printable import printable_logger
from memstate_sa.tracking import committed
from memstate_sa.tracking.registry import Registry
from memstate_sa.tracking.tracked import Tracked

logger = printable_logger("memstate_sa.doctor")

_UNSURE = (
    "%s: cannot log missing rows as deleted. Another transaction is writing to the table, and may be inserting them "
    "again. Repair again when that transaction has ended."
)
_SHOWN = 3  # the most facts and problems that a repr names
RECONCILED = "reconciled"
"""The reason of transactions in which the doctor logs unlogged changes."""


class Problem(NamedTuple):
    """Something that makes, or may make, the log untrue.

    The message completes a sentence that begins with the subject. It also says what to do.
    """

    subject: str
    message: str


class Risk(Problem):
    """Something that the log does not see, and that an application may not need. A database with a risk is healthy."""


def folded(problems: Iterable[Problem]) -> Iterator[Problem]:
    """The problems for people to read: problems with the same message become one, which lists all subjects."""
    subjects_of: dict[str, list[str]] = {}
    for subject, message in problems:
        subjects_of.setdefault(message, []).append(subject)
    for message, subjects in subjects_of.items():
        if len(subjects) == 1:
            yield Problem(subjects[0], message)
        else:
            names = fill(", ".join(subjects), width=70, break_long_words=False, break_on_hyphens=False)
            yield Problem("each of these", f"{message}\n{indent(names, '  ')}")


@dataclass(repr=False)
class Diagnosis:
    """The findings of `Memory.doctor`. A fact is a tuple of entity and primary key.

    - ``changed``: facts whose row differs from the log.
    - ``gone``: facts that the log has, and whose row is missing.
    - ``unlogged``: the number of rows without a log entry. They are older than tracking, or capture missed them.
      `Memory.backfill` of the classes in ``unlogged_by_class`` logs them.
    """

    checked: int = 0
    unlogged_by_class: dict[type[Any], int] = field(default_factory=dict)
    changed: list[tuple[str, object]] = field(default_factory=list)
    gone: list[tuple[str, object]] = field(default_factory=list)
    problems: list[Problem] = field(default_factory=list)

    @property
    def unlogged(self) -> int:
        return sum(self.unlogged_by_class.values())

    @property
    def healthy(self) -> bool:
        """True if no fact is in ``changed`` or ``gone``, and every problem is only a `Risk`.

        Facts that ``repair=True`` has logged count as different.
        """
        is_risk = [isinstance(problem, Risk) for problem in self.problems]
        return not (self.changed or self.gone) and all(is_risk)

    def __repr__(self) -> str:
        counts = {
            "changed": len(self.changed),
            "gone": len(self.gone),
            "unlogged": self.unlogged,
            "problems": len(self.problems),
        }
        found = ", ".join(f"{count} {name}" for name, count in counts.items() if count)
        facts = [f"{entity} {key!r}" for entity, key in [*self.changed, *self.gone][:_SHOWN]]
        problems = [f"{problem.subject} {problem.message}" for problem in self.problems[:_SHOWN]]
        health = "healthy" if self.healthy else "not healthy"
        return summary(self, health, f"{self.checked} checked", found, ", ".join(facts), *problems)

    def _repr_html_(self) -> str:
        rows = [(kind, *fact) for kind in ("changed", "gone") for fact in getattr(self, kind)]
        rows += [("unlogged", model.__name__, count) for model, count in self.unlogged_by_class.items()]
        rows += [(type(problem).__name__.lower(), *problem) for problem in self.problems]
        return html_table(repr(self), ("finding", "of", "details"), rows)


class Doctor:
    """One examination of one database."""

    def __init__(
        self,
        engine: Engine,
        registry: Registry,
        capture: SessionCapture,
        recorder: Recorder,
        destinations: Mapping[str, Destination],
        *,
        page_size: int = 500,
    ) -> None:
        self._engine = engine
        self._registry = registry
        self._capture = capture
        self._recorder = recorder
        self._destinations = destinations
        self._page_size = page_size

    def run(self, *, repair: bool, rows: bool = True, progress: Progress | None = None) -> Diagnosis:
        inspector = inspect(self._engine)
        diagnosis = Diagnosis(problems=[*self._problems(), *self._changed(inspector)])
        if not rows or not inspector.has_table(log.name):
            return diagnosis
        diagnosis.problems += self._unavailable_indexes()
        hidden = self._hidden()
        for tracked in self._registry.by_entity.values():
            if _absent(inspector, tracked) or any(table.fullname in hidden for table in tracked.tables):
                continue
            for differing, gone in self._differences(tracked, diagnosis, progress):
                (diagnosis.gone if gone else diagnosis.changed).extend(self._shown(tracked, differing))
                if repair:
                    self._reconcile(tracked, differing)
            diagnosis.problems += self._unique_values(tracked)
        return diagnosis

    def _unavailable_indexes(self) -> Iterator[Problem]:
        """Indexes with a server that cannot be opened, and embedders that are not installed.

        The folder of an index is left alone, because another process may have it open.
        """
        for name, destination in self._destinations.items():
            try:
                if getattr(destination.index, "in_process", False):
                    destination.vectors.embedder  # noqa: B018  # it is made here
                else:
                    destination.open()
            except MemstateError as error:
                yield Problem(f"index {name!r}", f"cannot be opened: {error}")

    def _shown(self, tracked: Tracked, keys: Collection[str]) -> Iterator[tuple[str, object]]:
        for key in keys:
            identity = tracked.columns_for(self._engine.dialect).identity(key)
            yield tracked.entity, identity[0] if len(identity) == 1 else identity

    # -- log and tables ----------------------------------------------------------------------------------------------

    def _differences(
        self, tracked: Tracked, diagnosis: Diagnosis, progress: Progress | None
    ) -> Iterator[tuple[dict[str, LastEntry], bool]]:
        """Pages of last log entries that differ from their rows, with True where the rows are missing."""
        after: str | None = None
        while True:
            with self._engine.connect() as connection:
                keys = committed.page(connection, tracked, after, self._page_size)
                entries = last_entries(connection, tracked, keys)
            if not keys:
                break
            after = keys[-1]
            diagnosis.checked += len(keys)
            if unlogged := len(keys) - len(entries):
                diagnosis.unlogged_by_class[tracked.model] = (
                    diagnosis.unlogged_by_class.get(tracked.model, 0) + unlogged
                )
            if differing := self._confirmed(tracked, entries):
                yield differing, False
            if progress is not None:
                progress(diagnosis.checked, None)
        after = ""
        while True:
            with self._engine.connect() as connection:
                page = {"entity": tracked.entity, "after": after, "limit": self._page_size}
                keys = list(connection.scalars(_logged_keys, page))
                entries = last_entries(connection, tracked, keys)
                living = {key: last for key, last in entries.items() if last.op != "delete"}
                rows = _rows(connection, tracked, list(living))
            if not keys:
                break
            after = keys[-1]
            if lost := self._confirmed(tracked, {key: last for key, last in living.items() if key not in rows}):
                yield lost, True

    def _confirmed(self, tracked: Tracked, before: Mapping[str, LastEntry]) -> dict[str, LastEntry]:
        """The entries of *before* that still differ from their rows, and are still the last of their facts.

        The last entries are read again after the rows: an entry written in between explains the difference.
        """
        if not before:
            return {}
        keys = list(before)
        with self._engine.connect() as connection:
            rows = _rows(connection, tracked, keys)
            after = last_entries(connection, tracked, keys)
        keys = [key for key, last in before.items() if key in after and after[key].id == last.id]
        columns = tracked.columns_for(self._engine.dialect)
        return {key: before[key] for key in keys if _differs(before[key], rows.get(key), columns)}

    def _reconcile(self, tracked: Tracked, before: Mapping[str, LastEntry]) -> None:
        """Log the present state of rows that differ from their last entries, and add their keys to the outbox.

        This transaction is not a step, so rollback skips it.
        """
        keys = list(before)
        while keys:
            try:
                with writing(self._engine, "READ COMMITTED") as connection:  # each statement sees all commits
                    self._log_differences(connection, tracked, {key: before[key] for key in keys})
            except KeyInserted as error:  # these rows exist again, and their insert is logged
                keys = [key for key in keys if key not in error.keys]
            except ConflictError:  # another transaction may insert them, which the next examination will show
                logger.warning(_UNSURE, tracked.entity)
                return
            else:
                return

    def _log_differences(self, connection: Connection, tracked: Tracked, before: Mapping[str, LastEntry]) -> None:
        keys = list(before)
        rows = _rows(connection, tracked, keys, for_update=True)
        images = self._recorder.images(connection, tracked, list(rows))
        entries = []
        for key, last in last_entries(connection, tracked, keys).items():
            row = rows.get(key)
            # A missing row cannot be locked: another transaction may have inserted and logged it since.
            if last.id == before[key].id and _differs(last, row, tracked.columns_for(connection.dialect)):
                op = "delete" if row is None else "insert" if last.op == "delete" else "update"
                entries.append(LogEntry(tracked.entity, key, op, images.get(key), step=False))  # type: ignore[arg-type]
        if entries:
            tx = new_tx()
            self._recorder.write(connection, OpenTransaction(), entries, tx=tx, refuse=False)
            self._recorder.write_header(connection, tx, {"reason": RECONCILED})
            require_absent(connection, tracked, [entry.key for entry in entries if entry.op == "delete"])

    def _unique_values(self, tracked: Tracked) -> Iterator[Problem]:
        """A problem if logged rows lack the unique values that ``unique_by`` gives them now."""
        if tracked.unique_values is None:
            return
        after, count = None, 0
        while True:
            with self._engine.connect() as connection:
                keys = committed.page(connection, tracked, after, self._page_size)
                suspects = self._differing(connection, tracked, list(last_entries(connection, tracked, keys)))
            if not keys:
                break
            after = keys[-1]
            if suspects:
                with self._engine.connect() as connection:  # others may have written between the first two reads
                    count += len(self._differing(connection, tracked, list(suspects)))
        if count:
            name = tracked.model.__name__
            yield Problem(
                tracked.entity,
                f"has {count} rows without their unique values. Its unique_by= is new or was changed, so other rows "
                f"may take the same values. Run memory.backfill(engine, {name}): it stores them, and warns of "
                "duplicates.",
            )

    @staticmethod
    def _differing(connection: Connection, tracked: Tracked, keys: Sequence[str]) -> set[str]:
        return unique_values.differences(connection, tracked, _rows(connection, tracked, keys)).keys

    # -- problems of the database --------------------------------------------------------------------------------------

    def _problems(self) -> Iterator[Problem]:
        inspector = inspect(self._engine)
        tables = set(inspector.get_table_names())
        lacks = lacking(inspector, metadata.sorted_tables)
        for table in metadata.sorted_tables:
            if table.name not in tables:
                yield Problem(table.name, "does not exist. Create it with memory.create_tables(engine) or a migration.")
                continue
            if columns := sorted(column.name for column in lacks.columns if column.table is table):
                yield Problem(table.name, f"is of another version: it lacks {', '.join(columns)}. Migrate it.")
            for index in lacks.indexes:
                if index.table is table:
                    yield Problem(
                        table.name, f"lacks the index {index.name}, so queries read the whole table. Create the index."
                    )
        if log.name in tables and (lost := self._lost_protection()):
            yield Problem(
                log.name,
                f"may be rewritten: it has no trigger {', '.join(lost)}. Install the missing triggers with "
                "memory.create_tables(engine) or a migration.",
            )
        if not self._capture.is_any_attached and not all(t.by_trigger for t in self._registry.by_entity.values()):
            yield Problem("Sessions", "are not captured. Call memory.attach(sessionmaker).")
        if database_of(self._engine) is SQLITE and sqlite.leaks_savepoints(self._engine):
            yield Problem(
                "SAVEPOINTs",
                "survive the ROLLBACK of their transaction. Call memstate_sa.sqlite.configure(engine).",
            )
        if trigger_context.name in tables and self._has_leftover_context():
            yield Problem(
                trigger_context.name,
                "holds rows that a transaction has left. Triggers give their labels to other transactions. Delete "
                "these rows.",
            )
        yield from self._hazards()
        for name, reason in unsupported_tables(inspector, self._tracked_tables().values()):
            yield Problem(name, reason)
        for tracked in self._registry.by_entity.values():
            yield from self._of_class(inspector, tracked, has_log=log.name in tables)

    def _of_class(self, inspector: Inspector, tracked: Tracked, *, has_log: bool) -> Iterator[Problem]:
        if absent := _absent(inspector, tracked):
            names = "" if absent == [tracked.entity] else f" {', '.join(absent)}"
            yield Problem(tracked.entity, f"is tracked, but has no table{names}. Create it with a migration.")
            return
        if tracked.by_trigger and has_log and (problem := self._trigger_problem(tracked)):
            yield Problem(tracked.table.fullname, problem)
        yield from self._cascades(tracked)
        for table in tracked.tables:
            if columns := undeclared_columns(inspector, table):
                yield Risk(table.fullname, what_is_lost(columns))

    def _tracked_tables(self) -> dict[str, Table]:
        return {table.fullname: table for tracked in self._registry.by_entity.values() for table in tracked.tables}

    def _hidden(self) -> Collection[str]:
        """The tracked tables that may hide rows from this connection. They cannot be compared."""
        with self._engine.connect() as connection:
            return hazards.hidden(connection, self._tracked_tables().values())

    def _hazards(self) -> Sequence[Problem]:
        with self._engine.connect() as connection:
            tables = self._tracked_tables().values()
            return [Problem(*hazard) for hazard in hazards.hazards(connection, tables, metadata.sorted_tables)]

    def _changed(self, inspector: Inspector) -> Iterator[Problem]:
        """Problems that another release has left behind."""
        if not {table.name for table in metadata.sorted_tables}.issubset(inspector.get_table_names()):
            return
        with self._engine.connect() as connection:
            for problem in releases.problems(connection, self._registry, self._destinations):
                yield Problem(*problem)
            for tracked in self._registry.by_entity.values():
                if not _absent(inspector, tracked):
                    for problem in releases.left_triggers(connection, self._registry, tracked):
                        yield Problem(*problem)
                    for problem in releases.renamed(connection, self._registry, tracked):
                        yield Problem(*problem)

    def _cascades(self, tracked: Tracked) -> Iterator[Problem]:
        configure_mappers()  # relationships are known only then, and this process may have loaded no instance yet
        with self._engine.connect() as connection:
            keys = [key for table in tracked.tables for key in cascades.reflected(connection, table)]
        for key, message in cascades.unseen(self._registry, tracked, keys):
            yield Risk(key.table.fullname, message)

    def _lost_protection(self) -> list[str]:
        with self._engine.connect() as connection:
            return append_only.missing(connection)

    def _has_leftover_context(self) -> bool:
        with self._engine.connect() as connection:
            return connection.execute(select(trigger_context.c.name).limit(1)).first() is not None

    def _trigger_problem(self, tracked: Tracked) -> str:
        remedy = "Install them with memory.create_tables(engine) or a migration."
        with self._engine.connect() as connection:
            try:
                expected = {trigger.name: trigger.source for trigger in triggers.triggers(connection, tracked)}
            except MemstateError as error:  # triggers cannot capture it any more: it became a partition, for example
                return f"cannot be captured by triggers: {error}"
            installed = triggers.installed(connection, tracked.table)
        if not expected.keys() & installed.keys():
            return f"has none of its triggers. {remedy}"
        outdated = [f"trigger {name}" for name, source in expected.items() if installed.get(name) != source]
        return f"lacks the current {', '.join(outdated)}. {remedy}" if outdated else ""


_logged_keys = (
    select(log.c.key)
    .where(log.c.entity == bindparam("entity"), log.c.key > bindparam("after"))
    .distinct()
    .order_by(log.c.key)
    .limit(bindparam("limit"))
)


def _rows(
    connection: Connection, tracked: Tracked, keys: Sequence[str], *, for_update: bool = False
) -> dict[str, dict[str, Any]]:
    return tracked.columns_for(connection.dialect).find_rows(connection, keys, for_update=for_update)


def _differs(last: LastEntry, row: Image | None, columns: TableColumns) -> bool:
    """Whether the row differs from the entry. Columns that were added or dropped since are no difference."""
    return columns.differ(None if last.op == "delete" else last.image, row)


def _absent(inspector: Inspector, tracked: Tracked) -> list[str]:
    """The tables of *tracked* that do not exist."""
    return [table.fullname for table in tracked.tables if not inspector.has_table(table.name, schema=table.schema)]
