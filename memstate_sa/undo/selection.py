"""Select the transactions that an undo takes back, and their changes.

This module reads the log and decides. It writes nothing.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any, TypeAlias

from sqlalchemy import BigInteger, Column, ColumnElement, Select, and_, cast, func, select
from sqlalchemy.engine import Connection

from memstate_sa.db.codec import FactKey, Image, by_entity
from memstate_sa.db.json_params import as_array, unnest_strings
from memstate_sa.db.tables import log, transaction
from memstate_sa.errors import HistoryMissing, MemstateError, NotFound
from memstate_sa.log.changes import REDACTED, LaterEntry, LoggedChange
from memstate_sa.log.history import Moment, log_at
from memstate_sa.log.positions import Snapshot
from memstate_sa.tracking.registry import Registry
from memstate_sa.undo.constraints import BlockedFacts, Constraints

Undone: TypeAlias = set[tuple[str, FactKey]]
"""The changes, as (transaction, fact), that were undone and not redone."""

_PAGES = (100, 1000)
"""The least and the most entries or headers that a SELECT reads. The first SELECT reads about as many as are needed."""


@dataclass(frozen=True, slots=True)
class Scope:
    """The changes that an undo considers, limited to these labels and this entity. None means no limit."""

    session_id: str | None = None
    actor: str | None = None
    entity: str | None = None

    @property
    def labels(self) -> list[ColumnElement[bool]]:
        criteria = [transaction.c.session_id == self.session_id] if self.session_id is not None else []
        return criteria + ([transaction.c.actor == self.actor] if self.actor is not None else [])


@dataclass
class Plan:
    """How to undo *changes*, newest first.

    - *final*: the row that each fact must have in the end.
    - *left_out*: facts that stay as they are, with the ids of the entries that are the reason.
    - *changed_since*: facts that may have later entries than *changes*.
    - *absent_keys*: facts without a row. Other transactions may be inserting one.
    """

    changes: list[LoggedChange]
    absent_keys: Collection[FactKey]
    final: dict[FactKey, Image | None]
    constraints: Constraints
    changed_since: Collection[FactKey]
    left_out: dict[FactKey, set[int]]

    @property
    def selected(self) -> list[LoggedChange]:
        """The changes that are undone."""
        return [change for change in self.changes if change.fact not in self.left_out]

    @property
    def kept(self) -> list[LoggedChange]:
        return [change for change in self.changes if change.fact in self.left_out]

    @property
    def conflicts(self) -> set[int]:
        return set().union(*self.left_out.values())

    def leave_out_blocked(self, connection: Connection) -> BlockedFacts:
        """Leave out the facts that other rows or left-out facts block. Return them with the facts that block them."""
        blocked = self.constraints.blocked_facts(self.left_out)
        # Report only the causes: a blocking fact that is left out itself has its own cause in the report already.
        causes = {by for by in blocked.values() if by is not None and by not in blocked and by not in self.left_out}
        entries = _newest_entries(connection, causes) if causes else {}
        for fact, by in blocked.items():
            self.left_out[fact] = {entries[by]} if by in entries else set()
        return blocked


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
"""The undos of ``keys``, the undos of these undos, and so on: a change may have been undone and redone many times."""


def undone(connection: Connection, txs: Collection[str]) -> Undone:
    """The changes of *txs* that a rollback has undone, and that no other rollback has redone since."""
    rows = connection.execute(_chain, {"keys": as_array(txs)}).all()
    undone_changes: Undone = set()
    for row in sorted(rows, reverse=True):  # the newest id first, because an undo comes after the entry that it undoes
        if (row.tx, (row.entity, row.key)) not in undone_changes:
            undone_changes.add((row.reverts, (row.entity, row.key)))
    targets = set(txs)
    return {(tx, fact) for tx, fact in undone_changes if tx in targets}


def effective_transactions(
    connection: Connection, own: Collection[str], scope: Scope, count: int = _PAGES[1]
) -> Iterator[str]:
    """The transactions of *scope* that have changes to undo, newest first, without *own*.

    *count* is the number of transactions that the caller will probably read.
    """
    seen = set(own)
    walk = _labelled if scope.labels else _all
    least, most = _PAGES
    for rows in walk(connection, scope, min(max(count + len(own), least), most)):
        undone_changes = undone(connection, {row.tx for row in rows} - seen)
        for row in rows:
            if row.tx not in seen and (row.tx, (row.entity, row.key)) not in undone_changes:
                seen.add(row.tx)
                yield row.tx


_changed = select(log.c.id, log.c.tx, log.c.entity, log.c.key, log.c.step)
_changed_by = _changed.where(log.c.tx.in_(select(_keys.c.value)))


def _all(connection: Connection, scope: Scope, page: int) -> Iterator[Sequence[Any]]:
    """Pages of the entries of steps, newest first."""
    steps = _changed.where(log.c.step)
    if scope.entity is not None:
        steps = steps.where(log.c.entity == scope.entity)
    yield from _backwards(connection, steps.order_by(log.c.id.desc()), log.c.id, page)


def _labelled(connection: Connection, scope: Scope, page: int) -> Iterator[Sequence[Any]]:
    """Pages of the entries of steps with the scope's labels, newest first.

    The headers are read first, because a long log may have few entries with these labels.
    """
    headers = select(transaction.c.at, transaction.c.tx).where(*scope.labels).order_by(transaction.c.at.desc())
    for header_page in _backwards(connection, headers, transaction.c.at, page):
        # Filter and sort in Python. In SQL, SQLite would read all steps, or all entries of the entity.
        rows = connection.execute(_changed_by, {"keys": as_array({row.tx for row in header_page})}).all()
        steps = [row for row in rows if row.step and scope.entity in (None, row.entity)]
        yield sorted(steps, key=lambda row: row.id, reverse=True)


def _backwards(connection: Connection, statement: Select[Any], by: Column[Any], page: int) -> Iterator[Sequence[Any]]:
    """Pages of *statement* in descending order of *by*, its first column. Rows with the same value are on one page.

    *page* is the size of the first page.
    """
    rows = connection.execute(statement.limit(page)).all()
    while len(rows) == page:
        last = rows[-1][0]
        if not by.primary_key:
            last_rows = connection.execute(statement.where(by == last)).all()
            rows = [*(row for row in rows if row[0] != last), *last_rows]
        yield rows
        page = _PAGES[1]
        rows = connection.execute(statement.where(by < last).limit(page)).all()
    yield rows


def transactions_since(connection: Connection, own: Collection[str], scope: Scope, moment: Moment) -> list[str]:
    """The transactions of *scope* since a moment that have changes to undo, newest first."""
    at_moment = log_at(connection, moment)
    of_page = select(log.c.tx, log.c.snapshot, (~at_moment.criterion).label("since"))
    of_page = of_page.where(log.c.tx.in_(select(_keys.c.value)))
    txs: list[str] = []
    candidates = effective_transactions(connection, own, scope)
    # Concurrent transactions have no order, so stop only at a whole page without any transaction since the moment.
    while page := list(islice(candidates, _PAGES[1])):
        rows = connection.execute(of_page, {"keys": as_array(page)}).all()
        since = {row.tx for row in rows if row.since}
        txs += [tx for tx in page if tx in since]
        if not since and _is_before(at_moment.snapshot, [row.snapshot for row in rows]):
            break
    return txs


def _is_before(moment: Snapshot | None, snapshots: Iterable[str | None]) -> bool:
    """Whether one of *snapshots* is older than all transactions that were open at *moment*.

    Also True if the snapshots are unknown.
    """
    known_snapshots = [Snapshot.parse(snapshot) for snapshot in snapshots if snapshot is not None]
    return moment is None or not known_snapshots or any(snapshot.xmax <= moment.xmin for snapshot in known_snapshots)


def require_closed(connection: Connection, open_tx: str, tx: str) -> None:
    """Raise MemstateError if *tx* is the open transaction, and NotFound if the log does not have it."""
    if tx == open_tx:
        raise MemstateError(f"Cannot undo transaction {tx}: it is still open. Call session.rollback().")
    if connection.execute(select(log.c.id).where(log.c.tx == tx).limit(1)).first() is None:
        raise NotFound(f"Cannot undo: the log has no transaction {tx!r}.")


# -- which changes -----------------------------------------------------------------------------------------------------

_earlier = log.alias("earlier")
_previous = (
    select(func.max(_earlier.c.id))
    .where(_earlier.c.entity == log.c.entity, _earlier.c.key == log.c.key, _earlier.c.id < log.c.id)
    .scalar_subquery()
)
# The images of the previous entries are read by another statement. With a join, PostgreSQL would expect many rows, and
# read the whole log if it has few, large transactions.
_entries = (
    select(
        log.c.id, log.c.tx, log.c.entity, log.c.key, log.c.op, log.c.image, log.c.version, _previous.label("previous")
    )
    .where(log.c.tx.in_(select(_keys.c.value)), log.c.op != "baseline")
    .order_by(log.c.id.desc())
)
_facts = select(log.c.entity, log.c.key).where(log.c.tx.in_(select(_keys.c.value)), log.c.op != "baseline").distinct()
_images = select(log.c.id, log.c.image, log.c.version).where(log.c.id.in_(select(cast(_keys.c.value, BigInteger))))


def changed_facts(connection: Connection, targets: Sequence[str]) -> dict[str, list[str]]:
    """The keys that the transactions *targets* changed, by entity."""
    return by_entity(map(tuple, connection.execute(_facts, {"keys": as_array(targets)}).all()))


def changes_to_undo(
    connection: Connection, registry: Registry, targets: Sequence[str], scope: Scope
) -> list[LoggedChange]:
    """The changes of *targets* that are neither undone nor redacted, newest first."""
    rows = connection.execute(_entries, {"keys": as_array(targets)}).all()
    images: dict[int | None, Any] = {row.id: row for row in rows}
    earlier = as_array({str(row.previous) for row in rows if row.previous is not None} - {str(id_) for id_ in images})
    images.update({row.id: row for row in connection.execute(_images, {"keys": earlier})})
    untracked = {row.entity for row in rows} - set(registry.by_entity)
    if untracked:
        items = " For memstate_item, make a MemStateStore(store)." if "memstate_item" in untracked else ""
        raise HistoryMissing(
            f"Cannot undo changes of {', '.join(sorted(untracked))}: this Memory does not track it. Track the class."
            f"{items}"
        )
    undone_changes = undone(connection, targets)
    changes = []
    for row in rows:
        previous = images.get(row.previous)
        outside = scope.entity is not None and row.entity != scope.entity
        # Skip redacted entries. The next entry needs no image of them either: it is the delete of the erasure.
        if row.version == REDACTED or outside or (row.tx, (row.entity, row.key)) in undone_changes:
            continue
        if row.previous is not None and row.previous not in images:
            raise HistoryMissing(
                f"Cannot undo {row.entity} {row.key}: its earlier entries have just been folded (Retention.log). Write "
                "the old values by hand."
            )
        upcast = registry.by_entity[row.entity].upcast
        before, after = (
            None if it is None or it.image is None else upcast(it.image, it.version, connection.dialect)
            for it in (previous, row)
        )
        changes.append(LoggedChange(row.id, row.tx, row.entity, row.key, before, after))
    return changes


def later_entries(connection: Connection, changes: Sequence[LoggedChange]) -> list[LaterEntry]:
    """The entries of each fact after the first of its *changes*. Later changes in *changes* are included."""
    first: dict[FactKey, int] = {}
    for change in changes:
        first[change.fact] = min(change.id, first.get(change.fact, change.id))
    later: list[LaterEntry] = []
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
            LaterEntry(id_, tx, (entity, key), reverts) for id_, tx, key, reverts in rows if id_ > first[entity, key]
        ]
    return later


def _newest_entries(connection: Connection, facts: Collection[FactKey]) -> dict[FactKey, int]:
    """The id of the last entry of each fact."""
    ids: dict[FactKey, int] = {}
    for entity, keys in by_entity(facts).items():
        newest = select(log.c.key, func.max(log.c.id)).where(
            log.c.entity == entity, log.c.key.in_(select(_keys.c.value))
        )
        rows = connection.execute(newest.group_by(log.c.key), {"keys": as_array(set(keys))})
        ids.update({(entity, key): id_ for key, id_ in rows})
    return ids
