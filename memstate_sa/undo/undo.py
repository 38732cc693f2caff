"""Undoing what the log says: new entries that compensate, in the caller's transaction.

`selection` says which transactions are undone, `constraints` which of their changes can be. Nothing is written before
both are known.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import KW_ONLY, dataclass, field
from itertools import islice
from typing import Any, Literal, TypeAlias

from sqlalchemy import Table, bindparam, inspect, select
from sqlalchemy.engine import Connection
from sqlalchemy.exc import UnboundExecutionError
from sqlalchemy.orm import Session

from memstate_sa.capture.guard import UntrackedWriteWarning
from memstate_sa.capture.listeners import SessionCapture
from memstate_sa.capture.recorder import Recorder
from memstate_sa.capture.transaction import OpenTransaction
from memstate_sa.db.codec import FactKey, Image, by_entity
from memstate_sa.db.rows import TableColumns
from memstate_sa.db.sessions import writing_connection
from memstate_sa.db.statements import batches, take_write_lock
from memstate_sa.db.tables import log
from memstate_sa.db.undeclared_columns import undeclared_columns, what_is_lost
from memstate_sa.errors import ConflictError, HistoryMissing, MemstateError
from memstate_sa.log import absent_keys
from memstate_sa.log.changes import Change, LogEntry, LoggedChange, conflicting_entries, invert, new_tx
from memstate_sa.log.history import Moment, read_changes
from memstate_sa.runtime.warn import warn
from memstate_sa.tracking.registry import Registry
from memstate_sa.tracking.tracked import Tracked
from memstate_sa.tracking.validation import require_count
from memstate_sa.undo.constraints import read_constraints
from memstate_sa.undo.expiring import expire
from memstate_sa.undo.restore import read_facts, restore, sorted_tables
from memstate_sa.undo.selection import (
    Plan,
    Scope,
    changed_facts,
    changes_to_undo,
    effective_transactions,
    later_entries,
    require_closed,
    transactions_since,
    undone,
)

OnConflict: TypeAlias = Literal["raise", "skip", "force"]

_ATTEMPTS = 5
_SHOWN = 100
"""The most changes that an error names."""
_CHANGED_LATER = "other transactions changed these facts later"
_BLOCKED = "these rows have a unique value that would come back, or refer to one that would go, or a parent is gone"


@dataclass(frozen=True, slots=True)
class Revocation:
    """What `Memory.revoke` did: its new entries, the changes of the run that stay, and those that are in their way."""

    reverted: list[Change] = field(default_factory=list)
    kept: list[Change] = field(default_factory=list)
    conflicts: list[Change] = field(default_factory=list)


class Undo:
    """Undo for one Memory."""

    def __init__(self, registry: Registry, capture: SessionCapture, recorder: Recorder) -> None:
        self._registry = registry
        self._capture = capture
        self._recorder = recorder
        self._examined: set[Table] = set()

    def last_steps(
        self, session: Session, steps: int, scope: Scope, on_conflict: OnConflict, *, dry_run: bool
    ) -> list[Change]:
        require_count("steps", steps, "how many transactions to undo, at least 1")
        undoing = self._begin(session, on_conflict, dry_run=dry_run)
        scope = undoing.default_scope(scope)
        for attempts_left in reversed(range(_ATTEMPTS)):
            targets = list(islice(effective_transactions(undoing.connection, undoing.own, scope, steps), steps))
            result = undoing.run(targets, scope, all_or_none=attempts_left > 0)
            # Nothing, although there was something: another undo came first, and ended while we waited for it.
            if result.reverted or result.kept or not targets:
                break
        return result.reverted

    def back_to(
        self, session: Session, moment: Moment, scope: Scope, on_conflict: OnConflict, *, dry_run: bool
    ) -> list[Change]:
        """Undo everything of *scope* since a moment."""
        undoing = self._begin(session, on_conflict, dry_run=dry_run)
        scope = undoing.default_scope(scope)
        targets = transactions_since(undoing.connection, undoing.own, scope, moment)
        return undoing.run(targets, scope).reverted

    def transaction(
        self, session: Session, tx: str, scope: Scope, on_conflict: OnConflict, *, dry_run: bool
    ) -> list[Change]:
        undoing = self._begin(session, on_conflict, dry_run=dry_run)
        require_closed(undoing.connection, undoing.transaction.tx, tx)
        result = undoing.run([tx], scope)
        if not result.reverted and not result.kept:
            raise ConflictError(f"transaction {tx} is already undone")
        return result.reverted

    def revoke(
        self, session: Session, scope: Scope, txs: Sequence[str], on_conflict: OnConflict, *, dry_run: bool
    ) -> Revocation:
        undoing = self._begin(session, on_conflict, dry_run=dry_run)
        for tx in txs:
            require_closed(undoing.connection, undoing.transaction.tx, tx)
        if txs:
            targets = list(dict.fromkeys(txs))
        else:
            targets = list(effective_transactions(undoing.connection, undoing.own, scope))
        return undoing.run(targets, scope, reason="revoke")

    def _begin(self, session: Session, on_conflict: OnConflict, *, dry_run: bool) -> Undoing:
        session.flush()
        connection = self._connection(session)
        transaction = self._capture.transaction(session)
        with transaction.writing():
            take_write_lock(connection)
        return Undoing(
            session,
            connection,
            transaction,
            self._registry,
            self._capture,
            self._recorder,
            self._examined,
            on_conflict,
            dry_run=dry_run,
        )

    def _connection(self, session: Session) -> Connection:
        """Where the tracked classes of *session* are; it may know an engine for some of them only."""
        for tracked in self._registry.by_entity.values():
            with suppress(UnboundExecutionError):
                return writing_connection(session, tracked.mapper)
        raise MemstateError("this Session is bound to no engine on which a tracked class is")


@dataclass
class Undoing:
    """One undo, in the open transaction of a Session."""

    session: Session
    connection: Connection
    transaction: OpenTransaction
    registry: Registry
    capture: SessionCapture
    recorder: Recorder
    examined: set[Table]
    """The tables that were looked at for columns which no undo restores: once is enough."""
    on_conflict: OnConflict
    _: KW_ONLY
    dry_run: bool

    @property
    def own(self) -> set[str]:
        """What an undo passes by: the transaction that it is part of."""
        return {self.transaction.tx}

    def default_scope(self, scope: Scope) -> Scope:
        """The labels of *scope*, or those of the session's annotation."""
        return scope if scope.labels else Scope(self.transaction.session_id, self.transaction.actor, scope.entity)

    def run(
        self, targets: Sequence[str], scope: Scope, *, reason: str = "rollback", all_or_none: bool = False
    ) -> Revocation:
        """Undo the transactions *targets*. With *all_or_none*, undo nothing if one of them is undone by now."""
        absent = self._lock(targets)
        changes = changes_to_undo(self.connection, self.registry, targets, scope)
        if all_or_none and {change.tx for change in changes} != set(targets):
            return Revocation()
        plan = self._plan(changes, absent, targets)
        reverted = self._attempt(plan, reason)
        if reverted and not self.dry_run:
            expire(self.session, self.connection.dialect, self.registry, reverted)
            self._warn_of_losses({change.entity for change in reverted if change.op == "insert"})
        return Revocation(
            reverted,
            kept=self._changes({change.id for change in plan.kept}),
            conflicts=self._changes(plan.conflicts),
        )

    # -- what can be undone --------------------------------------------------------------------------------------------

    def _lock(self, targets: Sequence[str]) -> set[FactKey]:
        """Lock what *targets* changed: what the log says of it from here on is true until the end.

        Returns the facts without a row, of which others may be adding one.
        """
        absent: set[FactKey] = set()
        keys_of = changed_facts(self.connection, targets)
        for tracked in self._in_flush_order(keys_of):
            entity, keys = tracked.entity, keys_of[tracked.entity]
            columns = tracked.columns_for(self.connection.dialect)
            possible = columns.possible(self.connection, keys)
            if lost := set(keys) - possible.keys():
                raise HistoryMissing(
                    f"Cannot undo: no row of {entity} can have the key {min(lost)}. The type of its key has changed. "
                    "Undo the steps before that by hand."
                )
            present = columns.lock(self.connection, list(possible.values()))
            missing = [key for key in keys if key not in present]
            open_keys = absent_keys.keys_others_can_insert(
                self.connection, tracked, missing, self.transaction.logged_under
            )
            absent_keys.lock_absent_keys(self.connection, [(entity, key) for key in open_keys])
            absent_keys.require_current(self.connection, tracked, open_keys)
            absent.update((entity, key) for key in open_keys)
        return absent

    def _in_flush_order(self, entities: Iterable[str]) -> list[Tracked]:
        """The classes of *entities* that are tracked, in the order in which a flush comes to them.

        An undo that locked them in another order, and a flush, would wait for each other.
        """
        classes = [self.registry.by_entity[entity] for entity in entities if entity in self.registry.by_entity]
        classes.sort(key=lambda tracked: (tracked.model.__module__, tracked.model.__name__))
        tables = sorted_tables([tracked.table for tracked in classes])
        return sorted(classes, key=lambda tracked: tables.index(tracked.table))

    def _plan(self, changes: list[LoggedChange], absent: Collection[FactKey], targets: Sequence[str]) -> Plan:
        _, final = invert(changes)
        conflicts: dict[FactKey, set[int]] = {}
        changed_since: Collection[FactKey] = set(final)
        if self.on_conflict != "force":
            later = later_entries(self.connection, changes)
            own = {change.id for change in changes}
            changed_since = {entry.fact for entry in later if entry.id not in own}
            if changed_since:
                undone_changes = undone(self.connection, {entry.tx for entry in later}.difference(targets))
                ids_by_fact = conflicting_entries(later, set(targets), undone_changes)
                conflicts = {fact: set(ids) for fact, ids in ids_by_fact.items()}
        if conflicts:
            present = read_facts(self.connection, self.registry, conflicts)
            # Where others have left a fact as it should be, nobody's change is lost.
            last = {change.fact: change.id for change in reversed(changes)}
            conflicts = {
                fact: ids
                for fact, ids in conflicts.items()
                if self._columns(fact[0]).differ(final.get(fact), present.get(fact)) or max(ids) < last[fact]
            }
        if conflicts and self.on_conflict == "raise":
            self._raise(_CHANGED_LATER, set().union(*conflicts.values()))
        constraints = read_constraints(self.connection, self.registry, final)
        plan = Plan(changes, absent, final, constraints, changed_since, conflicts)
        blocked = plan.leave_out_blocked(self.connection)
        if blocked and self.on_conflict != "skip":
            self._raise(_BLOCKED, set().union(*(plan.left_out[fact] for fact in blocked)))
        return plan

    def _raise(self, why: str, ids: Collection[int]) -> None:
        changes = self._changes(sorted(ids)[:_SHOWN])
        what = "; ".join(f"{c.entity} {c.key!r} ({c.op} by {c.actor or 'unknown'} in {c.tx})" for c in changes[:5])
        raise ConflictError(f"Cannot undo: {why}: {what or 'a row that the log does not know'}", changes=changes)

    # -- doing it ------------------------------------------------------------------------------------------------------

    def _attempt(self, plan: Plan, reason: str) -> list[Change]:
        """Carry *plan* out, or nothing of it."""
        reverted: list[Change] = []
        if plan.selected:
            attempt, before = self.connection.begin_nested(), self.transaction.mark
            try:
                reverted = self._carry_out(plan, reason)
            finally:
                if self.dry_run or not reverted:
                    attempt.rollback()
                    self.transaction.back_to(before)
                else:
                    attempt.commit()
        return reverted

    def _carry_out(self, plan: Plan, reason: str) -> list[Change]:
        connection, registry = self.connection, self.registry
        tx = new_tx()
        labels = {**self.transaction.labels, "reason": self.transaction.reason or reason}
        inverse, final = invert(plan.selected)
        with self.transaction.writing():
            current = read_facts(connection, registry, final.keys() & plan.changed_since)
            with self.capture.undoing(connection, tx, final):
                restored = restore(connection, registry, final)
            restored |= self._images(restored)
            entries = list(_with_last_images(_from_current_rows(inverse, current), restored))
            self.recorder.write(connection, self.transaction, entries, tx=tx)
            self.recorder.write_header(connection, tx, labels)
            deleted = by_entity(fact for fact in final.keys() & plan.absent_keys if final[fact] is None)
            for entity, keys in deleted.items():
                absent_keys.require_absent(connection, registry.by_entity[entity], keys)
        if final.keys().isdisjoint(plan.changed_since):
            written = connection.execute(_written, {"tx": tx}).all()
            if [row[1:3] for row in written] == [entry[:2] for entry in entries]:  # and triggers logged nothing more
                return self._as_changes(plan.selected, entries, written, labels)
        return read_changes(connection, registry, log.c.tx == tx)

    def _as_changes(
        self,
        undone_changes: Sequence[LoggedChange],
        entries: Sequence[LogEntry],
        written: Sequence[Any],
        labels: Mapping[str, str | None],
    ) -> list[Change]:
        """What `read_changes` would find, of which everything but ids and times is known already."""
        last: dict[FactKey, Image | None] = {}
        for undone_change in undone_changes:  # newest first
            last.setdefault(undone_change.fact, undone_change.after)
        changes = []
        for (entity, key, op, image, reverts, _), (id_, _, _, tx, at) in zip(entries, written, strict=True):
            columns = self._columns(entity)
            before, last[entity, key] = last[entity, key], image
            was, is_ = (None if it is None else columns.past_values(dict(it)) for it in (before, image))
            identity = columns.identity(key)
            public_key = identity[0] if len(identity) == 1 else identity
            changes.append(Change(id_, tx, entity, public_key, op, was, is_, at, reverts=reverts, **labels))
        return changes

    def _images(self, facts: Iterable[FactKey]) -> Iterator[tuple[FactKey, Image]]:
        """The rows of *facts*, in the form in which a flush that changes nothing finds them."""
        for entity, keys in by_entity(facts).items():
            images = self.recorder.images(self.connection, self.registry.by_entity[entity], keys)
            yield from (((entity, key), image) for key, image in images.items())

    def _warn_of_losses(self, entities: Collection[str]) -> None:
        """UntrackedWriteWarning for rows of *entities* that came back without columns that the log does not hold."""
        for tracked in (self.registry.by_entity[entity] for entity in entities if entity in self.registry.by_entity):
            for table in set(tracked.tables) - self.examined:
                self.examined.add(table)
                columns = [*undeclared_columns(inspect(self.connection), table), *tracked.excluded_of(table)]
                if columns:
                    warn(f"{table.fullname} {what_is_lost(columns)}", UntrackedWriteWarning)

    def _changes(self, ids: Collection[int]) -> list[Change]:
        changes: list[Change] = []
        for batch in batches(sorted(ids), 500):
            changes += read_changes(self.connection, self.registry, log.c.id.in_(batch))
        return changes

    def _columns(self, entity: str) -> TableColumns:
        return self.registry.by_entity[entity].columns_for(self.connection.dialect)


_written = (
    select(log.c.id, log.c.entity, log.c.key, log.c.tx, log.c.at).where(log.c.tx == bindparam("tx")).order_by(log.c.id)
)


def _from_current_rows(entries: Sequence[LogEntry], current: Mapping[FactKey, Image | None]) -> Iterator[LogEntry]:
    """*entries*, but those of *current* facts say what they do to the row that is there now."""
    exists = {fact: image is not None for fact, image in current.items()}
    for entry in entries:
        fact, stays = (entry.entity, entry.key), entry.image is not None
        if fact not in exists:
            yield entry
            continue
        yield entry._replace(op="delete" if not stays else "update" if exists[fact] else "insert")
        exists[fact] = stays


def _with_last_images(changes: Iterable[LogEntry], rows: Mapping[FactKey, Image | None]) -> Iterator[LogEntry]:
    """*changes*, the last one of each key showing the row as it is: version counters and generated columns moved."""
    entries = list(changes)
    last = {(entry.entity, entry.key): position for position, entry in enumerate(entries)}
    for position, entry in enumerate(entries):
        fact = (entry.entity, entry.key)
        yield entry._replace(image=rows[fact]) if last[fact] == position else entry
