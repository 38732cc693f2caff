"""Undo changes of the log: write compensating entries in the caller's transaction.

`selection` chooses the transactions, and `constraints` tells which of their changes can be undone. Nothing is written
before both are known.
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
from memstate_sa.log.changes import (
    COLUMNS,
    Change,
    LogEntry,
    LoggedChange,
    conflicting_entries,
    invert,
    new_tx,
    table_row,
)
from memstate_sa.log.history import Moment, read_changes
from memstate_sa.runtime.display import html_table, summary
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
"""The greatest number of changes in `ConflictError.changes`."""
_CHANGED_LATER = "other transactions changed these facts later"
_BLOCKED = "other rows are in the way, because a unique value is taken, a row is still referred to, or a parent is gone"


@dataclass(frozen=True, slots=True, repr=False)
class Revocation:
    """The result of `Memory.revoke`.

    - ``reverted``: the new entries, which undo changes.
    - ``kept``: the changes that were not undone.
    - ``conflicts``: the changes of other transactions that are the reason.
    """

    reverted: list[Change] = field(default_factory=list)
    kept: list[Change] = field(default_factory=list)
    conflicts: list[Change] = field(default_factory=list)

    def __repr__(self) -> str:
        counts = f"{len(self.kept)} kept, {len(self.conflicts)} in conflict"
        return summary(self, f"{len(self.reverted)} reverted", counts)

    def _repr_html_(self) -> str:
        groups = {"reverted": self.reverted, "kept": self.kept, "conflicts": self.conflicts}
        rows = ((name, *table_row(change)) for name, changes in groups.items() for change in changes)
        return html_table(repr(self), ("", *COLUMNS), rows)


class Undo:
    """Undoes changes for one Memory."""

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
            # Try again if nothing was undone: another undo of the same steps has committed while we waited for it.
            if result.reverted or result.kept or not targets:
                break
        return result.reverted

    def back_to(
        self, session: Session, moment: Moment, scope: Scope, on_conflict: OnConflict, *, dry_run: bool
    ) -> list[Change]:
        """Undo all changes of *scope* since a moment."""
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
            raise ConflictError(f"Cannot undo transaction {tx}: it is already undone.")
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
        """The connection of *session* to the tracked classes. The Session may have an engine for only some of them."""
        for tracked in self._registry.by_entity.values():
            with suppress(UnboundExecutionError):
                return writing_connection(session, tracked.mapper)
        raise MemstateError("Cannot undo: no tracked class is bound to an engine of this Session.")


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
    """The tables that were already checked for columns that an undo cannot restore."""
    on_conflict: OnConflict
    _: KW_ONLY
    dry_run: bool

    @property
    def own(self) -> set[str]:
        """The transaction that the undo is part of, which the undo skips."""
        return {self.transaction.tx}

    def default_scope(self, scope: Scope) -> Scope:
        """*scope*, or if it has no labels, a scope with the labels of the session's annotation."""
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

    # -- planning ------------------------------------------------------------------------------------------------------

    def _lock(self, targets: Sequence[str]) -> set[FactKey]:
        """Lock the facts that *targets* changed, so that no entries of them are added until the transaction ends.

        Return the facts that have no row, and that another transaction may be inserting.
        """
        absent: set[FactKey] = set()
        keys_of = changed_facts(self.connection, targets)
        for tracked in self._in_flush_order(keys_of):
            entity, keys = tracked.entity, keys_of[tracked.entity]
            columns = tracked.columns_for(self.connection.dialect)
            possible = columns.possible(self.connection, keys)
            if impossible := set(keys) - possible.keys():
                raise HistoryMissing(
                    f"Cannot undo: no row of {entity} can have the key {min(impossible)}. The type of its key has "
                    "changed. Undo the steps before that by hand."
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
        """The tracked classes of *entities*, in the order in which a flush writes them.

        If an undo locked them in another order, it could deadlock with a flush.
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
            own_ids = {change.id for change in changes}
            changed_since = {entry.fact for entry in later if entry.id not in own_ids}
            if changed_since:
                undone_changes = undone(self.connection, {entry.tx for entry in later}.difference(targets))
                ids_by_fact = conflicting_entries(later, set(targets), undone_changes)
                conflicts = {fact: set(ids) for fact, ids in ids_by_fact.items()}
        if conflicts:
            present = read_facts(self.connection, self.registry, conflicts)
            # A fact that already has its final state is no conflict: restoring it loses no change.
            last = {change.fact: change.id for change in reversed(changes)}
            conflicts = {
                fact: ids
                for fact, ids in conflicts.items()
                if self._columns(fact[0]).differ(final.get(fact), present.get(fact)) or max(ids) < last[fact]
            }
        if conflicts and self.on_conflict == "raise":
            self._raise(
                _CHANGED_LATER,
                set().union(*conflicts.values()),
                'Keep these facts with on_conflict="skip", or overwrite them with "force".',
            )
        constraints = read_constraints(self.connection, self.registry, final)
        plan = Plan(changes, absent, final, constraints, changed_since, conflicts)
        blocked = plan.leave_out_blocked(self.connection)
        if blocked and self.on_conflict != "skip":
            self._raise(
                _BLOCKED,
                set().union(*(plan.left_out[fact] for fact in blocked)),
                'Change these rows first, or leave the blocked facts out with on_conflict="skip".',
            )
        return plan

    def _raise(self, why: str, ids: Collection[int], remedy: str) -> None:
        changes = self._changes(sorted(ids)[:_SHOWN])
        names = "; ".join(f"{c.entity} {c.key!r} ({c.op} by {c.actor or 'unknown'} in {c.tx})" for c in changes[:5])
        raise ConflictError(f"Cannot undo: {why}: {names or 'a row without history'}. {remedy}", changes=changes)

    # -- execution -----------------------------------------------------------------------------------------------------

    def _attempt(self, plan: Plan, reason: str) -> list[Change]:
        """Carry out all of *plan* or nothing, and return the new changes. With ``dry_run``, roll them back."""
        reverted: list[Change] = []
        if plan.selected:
            attempt, before = self.connection.begin_nested(), self.transaction.log_state
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
            if [row[1:3] for row in written] == [entry[:2] for entry in entries]:  # triggers have logged nothing more
                return self._as_changes(plan.selected, entries, written, labels)
        return read_changes(connection, registry, log.c.tx == tx)

    def _as_changes(
        self,
        undone_changes: Sequence[LoggedChange],
        entries: Sequence[LogEntry],
        written: Sequence[Any],
        labels: Mapping[str, str | None],
    ) -> list[Change]:
        """The changes that `read_changes` would return. Only their ids and times had to be read."""
        last: dict[FactKey, Image | None] = {}
        for undone_change in undone_changes:  # newest first
            last.setdefault(undone_change.fact, undone_change.after)
        changes = []
        for (entity, key, op, image, reverts, _), (id_, _, _, tx, at) in zip(entries, written, strict=True):
            columns = self._columns(entity)
            before, last[entity, key] = last[entity, key], image
            old, new = (None if state is None else columns.past_values(dict(state)) for state in (before, image))
            identity = columns.identity(key)
            public_key = identity[0] if len(identity) == 1 else identity
            changes.append(Change(id_, tx, entity, public_key, op, old, new, at, reverts=reverts, **labels))
        return changes

    def _images(self, facts: Iterable[FactKey]) -> Iterator[tuple[FactKey, Image]]:
        """The current images of *facts*, in the form in which a flush would log them."""
        for entity, keys in by_entity(facts).items():
            images = self.recorder.images(self.connection, self.registry.by_entity[entity], keys)
            yield from (((entity, key), image) for key, image in images.items())

    def _warn_of_losses(self, entities: Collection[str]) -> None:
        """Warn if restored rows of *entities* lack columns that the log does not hold."""
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
    """*entries*, with corrected operations for *current* facts: their first entry starts from the present row."""
    exists = {fact: image is not None for fact, image in current.items()}
    for entry in entries:
        fact, stays = (entry.entity, entry.key), entry.image is not None
        if fact not in exists:
            yield entry
            continue
        yield entry._replace(op="delete" if not stays else "update" if exists[fact] else "insert")
        exists[fact] = stays


def _with_last_images(changes: Iterable[LogEntry], rows: Mapping[FactKey, Image | None]) -> Iterator[LogEntry]:
    """*changes*, with the actual row in the last entry of each key.

    Version counters and generated columns differ from the logged image.
    """
    entries = list(changes)
    last = {(entry.entity, entry.key): position for position, entry in enumerate(entries)}
    for position, entry in enumerate(entries):
        fact = (entry.entity, entry.key)
        yield entry._replace(image=rows[fact]) if last[fact] == position else entry
