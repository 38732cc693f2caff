"""Undoing what the log says: new entries that compensate, in the caller's transaction.

Which transactions is one question (steps, scopes, moments), what of them can be undone another (conflicts, obstacles).
Nothing is written before both are answered.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from itertools import islice
from typing import Any, Literal, TypeAlias

from sqlalchemy import BigInteger, Column, ColumnElement, Select, and_, bindparam, cast, func, inspect, select
from sqlalchemy.engine import Connection
from sqlalchemy.exc import UnboundExecutionError
from sqlalchemy.orm import Session

from memstate_sa.capture.listeners import SessionCapture
from memstate_sa.capture.recorder import Recorder
from memstate_sa.capture.transaction import OpenTransaction
from memstate_sa.db.codec import FactKey, Image, by_entity, decode_key
from memstate_sa.db.json_params import as_array, unnest_strings
from memstate_sa.db.rows import TableColumns
from memstate_sa.db.statements import batches, take_write_lock
from memstate_sa.db.tables import log, transaction
from memstate_sa.errors import ConflictError, HistoryMissing, MemstateError, NotFound
from memstate_sa.log import absent_keys
from memstate_sa.log.changes import REDACTED, Change, Later, LogEntry, Step, conflicting_entries, invert, new_tx
from memstate_sa.log.history import Moment, read_changes, until
from memstate_sa.log.positions import Snapshot
from memstate_sa.tracking.registry import Registry
from memstate_sa.tracking.tracked import Tracked
from memstate_sa.tracking.validation import require_count
from memstate_sa.undo.constraints import Obstacles, Rules, read_rules
from memstate_sa.undo.restore import read_facts, restore, sorted_tables

OnConflict: TypeAlias = Literal["raise", "skip", "force"]
Undone: TypeAlias = set[tuple[str, FactKey]]
"""(transaction, fact) whose change was undone, and not redone."""

_PAGES = (100, 1000)
"""Entries or headers a SELECT: a walk begins with what it probably needs, and goes on with the most."""
_ATTEMPTS = 5
_SHOWN = 100
"""The most changes that an error names."""


@dataclass(frozen=True, slots=True)
class Scope:
    """Whose transactions count, and what of them: all, or those with these labels; all facts, or those of one class."""

    session_id: str | None = None
    actor: str | None = None
    entity: str | None = None

    @property
    def labels(self) -> list[ColumnElement[bool]]:
        found = [transaction.c.session_id == self.session_id] if self.session_id is not None else []
        return found + ([transaction.c.actor == self.actor] if self.actor is not None else [])


@dataclass(frozen=True, slots=True)
class Revocation:
    """What `Memory.revoke` did: its new entries, the changes of the run that stay, and those that are in their way."""

    reverted: list[Change] = field(default_factory=list)
    kept: list[Change] = field(default_factory=list)
    conflicts: list[Change] = field(default_factory=list)


@dataclass
class Plan:
    """How to undo *steps*, newest first: the facts as they are *wanted*, but for those that are left out.

    *left_out* says of each of these which entries are in its way. Of facts that *moved_on*, steps may not be the last
    entries. *vacant* facts had no row: others may be adding one.
    """

    steps: list[Step]
    vacant: Collection[FactKey]
    wanted: dict[FactKey, Image | None]
    rules: Rules
    moved_on: Collection[FactKey]
    left_out: dict[FactKey, set[int]]

    @property
    def going(self) -> list[Step]:
        return [step for step in self.steps if step.fact not in self.left_out]

    @property
    def kept(self) -> list[Step]:
        return [step for step in self.steps if step.fact in self.left_out]

    def possible(self, facts: Collection[FactKey]) -> set[FactKey]:
        """Which of *facts* can be as they are wanted when all others stay as they are."""
        others = self.wanted.keys() - facts
        return set(facts) - self.rules.obstacles(others).keys()

    @property
    def conflicts(self) -> set[int]:
        return set().union(*self.left_out.values())


# -- which transactions ------------------------------------------------------------------------------------------------

_keys = unnest_strings("keys")


_reverting = select(log.c.id, log.c.reverts, log.c.tx, log.c.entity, log.c.key)
_first = _reverting.where(log.c.reverts.in_(select(_keys.c.value)), log.c.reverts.is_not(None)).cte(recursive=True)
_chain = select(
    _first.union(
        _reverting.join(
            _first, and_(log.c.reverts == _first.c.tx, log.c.entity == _first.c.entity, log.c.key == _first.c.key)
        )
    )
)
"""The undos of ``keys``, the undos of those undos, and so on: a chain may have been toggled a thousand times."""


def undone(connection: Connection, txs: Collection[str]) -> Undone:
    """What of *txs* a rollback has undone, and no rollback of that rollback has redone."""
    rows = connection.execute(_chain, {"keys": as_array(txs)}).all()
    found: Undone = set()
    for row in sorted(rows, reverse=True):  # by id: what undoes an undo comes after it
        if (row.tx, (row.entity, row.key)) not in found:
            found.add((row.reverts, (row.entity, row.key)))
    asked = set(txs)
    return {(tx, fact) for tx, fact in found if tx in asked}


def effective(connection: Connection, own: Collection[str], scope: Scope, wanted: int = _PAGES[1]) -> Iterator[str]:
    """Transactions of *scope* with something to undo, the last one first, about *wanted*; *own* are passed by."""
    seen = set(own)
    walk = _labelled if scope.labels else _all
    least, most = _PAGES
    for rows in walk(connection, scope, min(max(wanted + len(own), least), most)):
        gone = undone(connection, {row.tx for row in rows} - seen)
        for row in rows:
            if row.tx not in seen and (row.tx, (row.entity, row.key)) not in gone:
                seen.add(row.tx)
                yield row.tx


_changed = select(log.c.id, log.c.tx, log.c.entity, log.c.key, log.c.step)
_changed_by = _changed.where(log.c.tx.in_(select(_keys.c.value)))


def _all(connection: Connection, scope: Scope, page: int) -> Iterator[Sequence[Any]]:
    """Steps of the log, backwards, page by page."""
    steps = _changed.where(log.c.step)
    if scope.entity is not None:
        steps = steps.where(log.c.entity == scope.entity)
    yield from _backwards(connection, steps.order_by(log.c.id.desc()), log.c.id, page)


def _labelled(connection: Connection, scope: Scope, page: int) -> Iterator[Sequence[Any]]:
    """The same of those with the labels, found by their headers: there may be few of them in a long log."""
    headers = select(transaction.c.at, transaction.c.tx).where(*scope.labels).order_by(transaction.c.at.desc())
    for some in _backwards(connection, headers, transaction.c.at, page):
        # Chosen and sorted here: for either, SQLite would walk all steps, or all of an entity, to find these.
        rows = connection.execute(_changed_by, {"keys": as_array({row.tx for row in some})}).all()
        steps = [row for row in rows if row.step and scope.entity in (None, row.entity)]
        yield sorted(steps, key=lambda row: row.id, reverse=True)


def _backwards(connection: Connection, statement: Select[Any], by: Column[Any], page: int) -> Iterator[Sequence[Any]]:
    """Pages of *statement*, whose first column is *by*, from the greatest; rows of one value are on one page.

    The first page has *page* rows.
    """
    rows = connection.execute(statement.limit(page)).all()
    while len(rows) == page:
        last = rows[-1][0]
        if not by.primary_key:
            same = connection.execute(statement.where(by == last)).all()
            rows = [*(row for row in rows if row[0] != last), *same]
        yield rows
        page = _PAGES[1]
        rows = connection.execute(statement.where(by < last).limit(page)).all()
    yield rows


_earlier = log.alias("earlier")
_previous = (
    select(func.max(_earlier.c.id))
    .where(_earlier.c.entity == log.c.entity, _earlier.c.key == log.c.key, _earlier.c.id < log.c.id)
    .scalar_subquery()
)
# The entry before each is looked up by another statement: joined, PostgreSQL reads all of a log of few large
# transactions, as it expects as many rows of these.
_entries = (
    select(
        log.c.id, log.c.tx, log.c.entity, log.c.key, log.c.op, log.c.image, log.c.version, _previous.label("previous")
    )
    .where(log.c.tx.in_(select(_keys.c.value)), log.c.op != "baseline")
    .order_by(log.c.id.desc())
)
_facts = select(log.c.entity, log.c.key).where(log.c.tx.in_(select(_keys.c.value)), log.c.op != "baseline").distinct()
_images = select(log.c.id, log.c.image, log.c.version).where(log.c.id.in_(select(cast(_keys.c.value, BigInteger))))


# -- undo --------------------------------------------------------------------------------------------------------------


class Undo:
    """Undo for one Memory."""

    def __init__(self, registry: Registry, capture: SessionCapture, recorder: Recorder) -> None:
        self._registry = registry
        self._capture = capture
        self._recorder = recorder

    def steps(
        self, session: Session, steps: int, scope: Scope, on_conflict: OnConflict, *, dry_run: bool
    ) -> list[Change]:
        require_count("steps", steps, "how many transactions to undo, at least 1")
        unit, connection = self._prepare(session)
        scope = self._default(scope, unit)
        for left in reversed(range(_ATTEMPTS)):
            targets = list(islice(effective(connection, {unit.tx}, scope, steps), steps))
            result = self._run(
                session, connection, unit, targets, scope, on_conflict, dry_run=dry_run, all_or_none=left > 0
            )
            # Nothing, although there was something: another undo came first, and ended while we waited for it.
            if result.reverted or result.kept or not targets:
                break
        return result.reverted

    def back_to(
        self, session: Session, to: Moment, scope: Scope, on_conflict: OnConflict, *, dry_run: bool
    ) -> list[Change]:
        """Everything of *scope* since a moment."""
        unit, connection = self._prepare(session)
        scope = self._default(scope, unit)
        targets = self._since(connection, unit, scope, to)
        return self._run(session, connection, unit, targets, scope, on_conflict, dry_run=dry_run).reverted

    def transaction(
        self, session: Session, tx: str, scope: Scope, on_conflict: OnConflict, *, dry_run: bool
    ) -> list[Change]:
        unit, connection = self._prepare(session)
        self._require_closed(connection, unit, tx)
        result = self._run(session, connection, unit, [tx], scope, on_conflict, dry_run=dry_run)
        if not result.reverted and not result.kept:
            raise ConflictError(f"transaction {tx} is already undone")
        return result.reverted

    def revoke(
        self, session: Session, scope: Scope, txs: Sequence[str], on_conflict: OnConflict, *, dry_run: bool
    ) -> Revocation:
        unit, connection = self._prepare(session)
        for tx in txs:
            self._require_closed(connection, unit, tx)
        targets = list(dict.fromkeys(txs)) if txs else list(effective(connection, {unit.tx}, scope))
        return self._run(session, connection, unit, targets, scope, on_conflict, dry_run=dry_run, reason="revoke")

    # -- what is asked for ---------------------------------------------------------------------------------------------

    def _prepare(self, session: Session) -> tuple[OpenTransaction, Connection]:
        session.flush()
        connection = self._connection(session)
        unit = self._capture.transaction(session)
        with unit.writing():
            take_write_lock(connection)
        return unit, connection

    def _connection(self, session: Session) -> Connection:
        """Where the tracked classes of *session* are; it may know an engine for some of them only."""
        for tracked in self._registry.by_entity.values():
            with suppress(UnboundExecutionError):
                return session.connection(bind_arguments={"mapper": tracked.mapper})
        raise MemstateError("this Session is bound to no engine on which a tracked class is")

    def _columns(self, connection: Connection, entity: str) -> TableColumns:
        return self._registry.by_entity[entity].on(connection.dialect)

    @staticmethod
    def _default(scope: Scope, unit: OpenTransaction) -> Scope:
        """What the session is annotated with, where nothing else is said."""
        return scope if scope.labels else Scope(unit.session_id, unit.actor, scope.entity)

    @staticmethod
    def _require_closed(connection: Connection, unit: OpenTransaction, tx: str) -> None:
        if tx == unit.tx:
            raise MemstateError("this transaction is still open; session.rollback() undoes it")
        if connection.execute(select(log.c.id).where(log.c.tx == tx).limit(1)).first() is None:
            raise NotFound(f"the log has no transaction {tx!r}")

    @staticmethod
    def _since(connection: Connection, unit: OpenTransaction, scope: Scope, to: Moment) -> list[str]:
        reached = until(connection, to)
        of_page = select(log.c.tx, log.c.snapshot, (~reached.criterion).label("since"))
        of_page = of_page.where(log.c.tx.in_(select(_keys.c.value)))
        found: list[str] = []
        candidates = effective(connection, {unit.tx}, scope)
        # Transactions that ran at once are in no order: so it ends with a page that has none.
        while some := list(islice(candidates, _PAGES[1])):
            rows = connection.execute(of_page, {"keys": as_array(some)}).all()
            since = {row.tx for row in rows if row.since}
            found += [tx for tx in some if tx in since]
            if not since and _is_before(reached.snapshot, [row.snapshot for row in rows]):
                break
        return found

    # -- what can be undone --------------------------------------------------------------------------------------------

    def _run(
        self,
        session: Session,
        connection: Connection,
        unit: OpenTransaction,
        targets: Sequence[str],
        scope: Scope,
        on_conflict: OnConflict,
        *,
        dry_run: bool,
        reason: str = "rollback",
        all_or_none: bool = False,
    ) -> Revocation:
        """*all_or_none*: nothing, if one of *targets* is undone by now."""
        vacant = self._lock(connection, unit, targets)
        steps = self._steps(connection, targets, scope)
        if all_or_none and {step.tx for step in steps} != set(targets):
            return Revocation()
        plan = self._plan(connection, steps, vacant, targets, on_conflict)
        try:
            reverted = self._attempt(connection, unit, plan, reason, dry_run=dry_run)
        except ConflictError:
            refused = self._refused(connection, unit, plan) if on_conflict == "skip" else []
            if not refused:
                raise
            plan.left_out.update((fact, set()) for fact in refused)
            self._leave_out(connection, plan)
            reverted = self._attempt(connection, unit, plan, reason, dry_run=dry_run)
        if reverted and not dry_run:
            self._expire(session, connection, {step.fact for step in plan.going})
        return Revocation(
            reverted,
            kept=self._changes(connection, {step.id for step in plan.kept}),
            conflicts=self._changes(connection, plan.conflicts),
        )

    def _attempt(
        self, connection: Connection, unit: OpenTransaction, plan: Plan, reason: str, *, dry_run: bool
    ) -> list[Change]:
        """Carry *plan* out, or nothing of it."""
        reverted: list[Change] = []
        if plan.going:
            attempt, before = connection.begin_nested(), unit.mark
            try:
                reverted = self._carry_out(connection, unit, plan, reason)
            finally:
                if dry_run or not reverted:
                    attempt.rollback()
                    unit.back_to(before)
                else:
                    attempt.commit()
        return reverted

    def _refused(self, connection: Connection, unit: OpenTransaction, plan: Plan) -> list[FactKey]:
        """What the database does not let be as *plan* wants it, for reasons that only it knows: found by trying.

        Fact by fact joins those that can be restored together, as many at once as go well; which those are is found by
        halving. Others may have to wait for the one that fails: it is to blame if it fails without them.
        """
        accepted: set[FactKey] = set()
        waiting = [fact for fact in plan.wanted if fact not in plan.left_out]
        refused: list[FactKey] = []
        fails_with = partial(self._fails, connection, unit, plan)
        while True:
            most = 1
            while most < len(waiting) and not fails_with({*accepted, *waiting[:most]}):
                most *= 2
            most = min(most, len(waiting))
            fine = most // 2 + bisect_left(
                range(most // 2 + 1, most + 1), True, key=lambda n: fails_with({*accepted, *waiting[:n]})
            )
            accepted = plan.possible({*accepted, *waiting[:fine]})
            if fine == len(waiting):
                return refused
            suspect = waiting.pop(fine)
            waiting = [fact for fact in waiting if fact not in accepted]
            alone = plan.possible({*accepted, suspect})
            if suspect in alone and not fails_with(alone):
                accepted = alone
            else:
                refused.append(suspect)

    def _fails(self, connection: Connection, unit: OpenTransaction, plan: Plan, facts: Collection[FactKey]) -> bool:
        final = {fact: plan.wanted[fact] for fact in plan.possible(facts)}
        attempt = connection.begin_nested()
        try:
            with unit.writing(), self._capture.undoing(connection, new_tx(), final):
                restore(connection, self._registry, final)
        except ConflictError:
            return True
        else:
            return False
        finally:
            attempt.rollback()

    def _plan(
        self,
        connection: Connection,
        steps: list[Step],
        vacant: Collection[FactKey],
        targets: Sequence[str],
        on_conflict: OnConflict,
    ) -> Plan:
        _, wanted = invert(steps)
        conflicts: dict[FactKey, set[int]] = {}
        moved_on: Collection[FactKey] = set(wanted)
        if on_conflict != "force":
            later = self._later_entries(connection, steps)
            own = {step.id for step in steps}
            moved_on = {entry.fact for entry in later if entry.id not in own}
            if moved_on:
                gone = undone(connection, {entry.tx for entry in later}.difference(targets))
                conflicts = {fact: set(ids) for fact, ids in conflicting_entries(later, set(targets), gone).items()}
        if conflicts:
            present = read_facts(connection, self._registry, conflicts)
            # Where others have left a fact as it should be, nobody's change is lost.
            last = {step.fact: step.id for step in reversed(steps)}
            conflicts = {
                fact: ids
                for fact, ids in conflicts.items()
                if self._columns(connection, fact[0]).differ(wanted.get(fact), present.get(fact))
                or max(ids) < last[fact]
            }
        if conflicts and on_conflict == "raise":
            self._raise(connection, set().union(*conflicts.values()))
        plan = Plan(steps, vacant, wanted, read_rules(connection, self._registry, wanted), moved_on, conflicts)
        obstacles = self._leave_out(connection, plan)
        if obstacles and on_conflict != "skip":
            self._raise(connection, set().union(*(plan.left_out[fact] for fact in obstacles)))
        return plan

    def _leave_out(self, connection: Connection, plan: Plan) -> Obstacles:
        """Leave out of *plan* what cannot be, because of others or of what is left out already; returns that."""
        obstacles = plan.rules.obstacles(plan.left_out)
        # What is left out may be what others need. They are told why it is, not that it is.
        causes = {by for by in obstacles.values() if by is not None and by not in obstacles and by not in plan.left_out}
        entries = self._last_entries(connection, causes) if causes else {}
        for fact, by in obstacles.items():
            plan.left_out[fact] = {entries[by]} if by in entries else set()
        return obstacles

    def _steps(self, connection: Connection, targets: Sequence[str], scope: Scope) -> list[Step]:
        """The changes of *targets* that are neither undone nor redacted, newest first."""
        rows = connection.execute(_entries, {"keys": as_array(targets)}).all()
        images: dict[int | None, Any] = {row.id: row for row in rows}
        earlier = as_array(
            {str(row.previous) for row in rows if row.previous is not None} - {str(id_) for id_ in images}
        )
        images.update({row.id: row for row in connection.execute(_images, {"keys": earlier})})
        untracked = {row.entity for row in rows} - set(self._registry.by_entity)
        if untracked:
            raise HistoryMissing(f"{', '.join(sorted(untracked))}: no longer tracked, so it cannot be written back")
        gone = undone(connection, targets)
        steps = []
        for row in rows:
            previous = images.get(row.previous)
            outside = scope.entity is not None and row.entity != scope.entity
            # After a redacted entry comes a tombstone: it is never what a living one goes back to.
            if row.version == REDACTED or outside or (row.tx, (row.entity, row.key)) in gone:
                continue
            if row.previous is not None and row.previous not in images:
                raise HistoryMissing(f"{row.entity} {row.key}: what it was before has just been folded (Retention.log)")
            upcast = self._registry.by_entity[row.entity].upcast
            before, after = (
                None if it is None or it.image is None else upcast(it.image, it.version, connection.dialect)
                for it in (previous, row)
            )
            steps.append(Step(row.id, row.tx, row.entity, row.key, before, after))
        return steps

    def _lock(self, connection: Connection, unit: OpenTransaction, targets: Sequence[str]) -> set[FactKey]:
        """Lock what *targets* changed: what the log says of it from here on is true until the end.

        Returns the facts without a row, of which others may be adding one.
        """
        vacant: set[FactKey] = set()
        facts = connection.execute(_facts, {"keys": as_array(targets)}).all()
        keys_of = by_entity(map(tuple, facts))
        for tracked in self._in_flush_order(keys_of):
            entity, keys = tracked.entity, keys_of[tracked.entity]
            columns = tracked.on(connection.dialect)
            possible = columns.possible(connection, keys)
            if lost := set(keys) - possible.keys():
                raise HistoryMissing(
                    f"Cannot undo: no row of {entity} can have the key {min(lost)}. The type of its key has changed. "
                    "Undo the steps before that by hand."
                )
            there = columns.lock(connection, list(possible.values()))
            missing = [key for key in keys if key not in there]
            open_keys = absent_keys.open_to_others(connection, tracked, missing, unit.logged_under)
            absent_keys.hold(connection, [(entity, key) for key in open_keys])
            absent_keys.require_current(connection, tracked, open_keys)
            vacant.update((entity, key) for key in open_keys)
        return vacant

    def _in_flush_order(self, entities: Iterable[str]) -> list[Tracked]:
        """The classes of *entities* that are tracked, in the order in which a flush comes to them.

        An undo that locked them in another order, and a flush, would wait for each other.
        """
        found = [self._registry.by_entity[entity] for entity in entities if entity in self._registry.by_entity]
        found.sort(key=lambda tracked: (tracked.model.__module__, tracked.model.__name__))
        tables = [table for table, _ in sorted_tables([tracked.table for tracked in found])]
        return sorted(found, key=lambda tracked: tables.index(tracked.table))

    @staticmethod
    def _later_entries(connection: Connection, steps: Sequence[Step]) -> list[Later]:
        """Entries of the same facts that came after the first of their *steps*, further steps among them."""
        first: dict[FactKey, int] = {}
        for step in steps:
            first[step.fact] = min(step.id, first.get(step.fact, step.id))
        later: list[Later] = []
        for entity, group in by_entity(first).items():
            rows = connection.execute(
                select(log.c.id, log.c.tx, log.c.key, log.c.reverts).where(
                    log.c.entity == entity,
                    log.c.key.in_(select(_keys.c.value)),
                    log.c.id > min(first[entity, key] for key in group),
                    log.c.op != "baseline",
                ),
                {"keys": as_array(group)},
            )
            later += [
                Later(id_, tx, (entity, key), reverts) for id_, tx, key, reverts in rows if id_ > first[entity, key]
            ]
        return later

    @staticmethod
    def _last_entries(connection: Connection, facts: Collection[FactKey]) -> dict[FactKey, int]:
        found: dict[FactKey, int] = {}
        for entity, keys in by_entity(facts).items():
            newest = select(log.c.key, func.max(log.c.id)).where(
                log.c.entity == entity, log.c.key.in_(select(_keys.c.value))
            )
            rows = connection.execute(newest.group_by(log.c.key), {"keys": as_array(set(keys))})
            found.update({(entity, key): id_ for key, id_ in rows})
        return found

    def _raise(self, connection: Connection, ids: Collection[int]) -> None:
        changes = self._changes(connection, sorted(ids)[:_SHOWN])
        what = "; ".join(f"{c.entity} {c.key!r} ({c.op} by {c.actor or 'unknown'} in {c.tx})" for c in changes[:5])
        raise ConflictError(
            f"changed later, outside of what is to be undone: {what or 'a row that the log does not know'}",
            changes=changes,
        )

    def _changes(self, connection: Connection, ids: Collection[int]) -> list[Change]:
        found: list[Change] = []
        for some in batches(sorted(ids), 500):
            found += read_changes(connection, self._registry, log.c.id.in_(some))
        return found

    # -- doing it ------------------------------------------------------------------------------------------------------

    def _carry_out(self, connection: Connection, unit: OpenTransaction, plan: Plan, reason: str) -> list[Change]:
        tx = new_tx()
        labels = {**unit.labels, "reason": unit.reason or reason}
        inverse, final = invert(plan.going)
        with unit.writing():
            others = read_facts(connection, self._registry, final.keys() & plan.moved_on)
            with self._capture.undoing(connection, tx, final):
                now = restore(connection, self._registry, final)
            entries = list(_with_last_images(_from_there(inverse, others), now))
            self._recorder.write(connection, unit, entries, tx=tx)
            self._recorder.write_header(connection, tx, labels)
            gone = by_entity(fact for fact in final.keys() & plan.vacant if final[fact] is None)
            for entity, keys in gone.items():
                absent_keys.require_absent(connection, self._registry.by_entity[entity], keys)
        if final.keys().isdisjoint(plan.moved_on):
            written = connection.execute(_written, {"tx": tx}).all()
            if [row[1:3] for row in written] == [entry[:2] for entry in entries]:  # and triggers logged nothing more
                return self._as_changes(connection, plan.going, entries, written, labels)
        return read_changes(connection, self._registry, log.c.tx == tx)

    def _as_changes(
        self,
        connection: Connection,
        steps: Sequence[Step],
        entries: Sequence[LogEntry],
        written: Sequence[Any],
        labels: Mapping[str, str | None],
    ) -> list[Change]:
        """What `read_changes` would find, of which everything but ids and times is known already."""
        last: dict[FactKey, Image | None] = {}
        for step in steps:  # newest first
            last.setdefault(step.fact, step.after)
        changes = []
        for (entity, key, op, image, reverts, _), (id_, _, _, tx, at) in zip(entries, written, strict=True):
            columns = self._columns(connection, entity)
            before, last[entity, key] = last[entity, key], image
            was, is_ = (None if it is None else columns.values(dict(it)) for it in (before, image))
            identity = columns.identity(key)
            found = identity[0] if len(identity) == 1 else identity
            changes.append(Change(id_, tx, entity, found, op, was, is_, at, reverts=reverts, **labels))
        return changes

    def _expire(self, session: Session, connection: Connection, facts: Collection[FactKey]) -> None:
        """Loaded copies of what was written are read anew."""
        keys: dict[Tracked, set[tuple[Any, ...]]] = {}
        for entity, key in facts:
            keys.setdefault(self._registry.by_entity[entity], set()).add(decode_key(key))
        for instance in list(session.identity_map.values()):
            state: Any = inspect(instance)
            found = self._registry.find(state.mapper)
            if found in keys and found.on(connection.dialect).raw_key(state.key[1]) in keys[found]:
                session.expire(instance)


def _is_before(moment: Snapshot | None, snapshots: Iterable[str | None]) -> bool:
    """Whether one of *snapshots* was taken when nothing had begun that was open at *moment*, or none is known."""
    known = [Snapshot.parse(snapshot) for snapshot in snapshots if snapshot is not None]
    return moment is None or not known or any(snapshot.xmax <= moment.xmin for snapshot in known)


_written = (
    select(log.c.id, log.c.entity, log.c.key, log.c.tx, log.c.at).where(log.c.tx == bindparam("tx")).order_by(log.c.id)
)


def _from_there(entries: Sequence[LogEntry], others: Mapping[FactKey, Image | None]) -> Iterator[LogEntry]:
    """*entries*, those of facts that *others* have changed since saying what they do to what these have left there."""
    there = {fact: image is not None for fact, image in others.items()}
    for entry in entries:
        fact, stays = (entry.entity, entry.key), entry.image is not None
        if fact not in there:
            yield entry
            continue
        yield entry._replace(op="delete" if not stays else "update" if there[fact] else "insert")
        there[fact] = stays


def _with_last_images(changes: Iterable[LogEntry], now: Mapping[FactKey, Image | None]) -> Iterator[LogEntry]:
    """*changes*, the last one of each key showing the row as it is: version counters and generated columns moved."""
    entries = list(changes)
    last = {(entry.entity, entry.key): position for position, entry in enumerate(entries)}
    for position, entry in enumerate(entries):
        fact = (entry.entity, entry.key)
        yield entry._replace(image=now[fact]) if last[fact] == position else entry
