"""`Change`, and the decisions about changes: the operation that a row shows, and the inversion of a transaction.

All functions here are pure.
"""

from __future__ import annotations

import secrets
import time
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any, Literal, NamedTuple, TypeAlias

from memstate_sa.db.codec import FactKey, Image
from memstate_sa.runtime.display import html_table, shortened, summary

Op: TypeAlias = Literal["baseline", "insert", "update", "delete"]


REDACTED = 0
"""The version of an entry whose image was erased. The log still says when the fact changed, but not how."""


@dataclass(frozen=True, slots=True, repr=False)
class Change:
    """One entry of the log: the change of one fact in one transaction.

    ``key``: the primary key, a tuple when it is composite.
    ``before``, ``after``: the column values by column name, None where there was no row.
    ``op``: a "baseline" records a row that is older than tracking.
    ``reverts``: the transaction that this entry undoes.
    """

    id: int
    tx: str
    entity: str
    key: Any
    op: Op
    before: Image | None
    after: Image | None
    at: datetime
    actor: str | None = None
    reason: str | None = None
    session_id: str | None = None
    reverts: str | None = None

    @property
    def changed(self) -> dict[str, tuple[Any, Any]]:
        """The columns whose values differ, each with its value before and after. None stands for no row, too."""
        before, after = self.before or {}, self.after or {}
        pairs = {name: (before.get(name), after.get(name)) for name in {**before, **after}}
        if self.before is None or self.after is None:
            return pairs
        return {name: pair for name, pair in pairs.items() if name not in before or pair[0] != pair[1]}

    def __repr__(self) -> str:
        by = f"by {self.actor}" if self.actor is not None else ""
        undo = f"undoes {self.reverts}" if self.reverts is not None else ""
        return summary(self, f"{self.op} {self.entity} {self.key!r}", _changed_text(self), by, undo)


class Changes(list[Change]):
    """A list of changes, which a notebook shows as a table."""

    def _repr_html_(self) -> str:
        columns = ("at", "transaction", "fact", "op", "changed", "actor", "session", "reason")
        rows = (
            (
                *(f"{one.at:%Y-%m-%d %H:%M:%S}", one.tx, f"{one.entity} {one.key!r}", one.op),
                *(_changed_text(one), one.actor, one.session_id, one.reason),
            )
            for one in self
        )
        return html_table(f"{len(self)} changes", columns, rows)


def _changed_text(change: Change) -> str:
    if change.before is None or change.after is None:
        values = change.after or change.before or {}
        return ", ".join(f"{name}={shortened(value, 40)}" for name, value in values.items())
    pairs = change.changed.items()
    return ", ".join(f"{name}={shortened(was, 40)} → {shortened(now, 40)}" for name, (was, now) in pairs)


class LogEntry(NamedTuple):
    """A log entry about to be written; ``image`` is encoded. ``step``: rollback counts its transaction."""

    entity: str
    key: str
    op: Op
    image: Image | None
    reverts: str | None = None
    step: bool = True


def new_tx() -> str:
    """A transaction id: 48 bits of milliseconds, so that neighbours in time are neighbours in the index, and chance."""
    return f"{time.time_ns() // 1_000_000:012x}{secrets.token_hex(10)}"


def classify(before: Image | None, after: Image | None, *, was_there: bool) -> Op | None:
    """The operation that turns *before* into *after*; None when the log knows *after* already.

    Only the two ends count: a delete and an insert of one key are an update, as the table shows it. *before* is None
    also for a row that *was there* and whose image was erased.
    """
    if after is None:
        return "delete" if was_there else None
    if not was_there:
        return "insert"
    return None if before == after else "update"


class LoggedChange(NamedTuple):
    """One logged change to undo; ``before`` and ``after`` are encoded images."""

    id: int
    tx: str
    entity: str
    key: str
    before: Image | None
    after: Image | None

    @property
    def fact(self) -> FactKey:
        return self.entity, self.key


def invert(changes: Sequence[LoggedChange]) -> tuple[list[LogEntry], dict[FactKey, Image | None]]:
    """The compensating log entries for *changes* (newest first), and the row each fact must end up with.

    Every change is undone by an entry of its own, so that the log says which transaction each entry reverts. The table
    only needs the last entry of each fact.
    """
    entries = []
    final: dict[FactKey, Image | None] = {}
    for change in changes:
        if change.before is None and change.after is None:
            continue
        op: Op = "insert" if change.after is None else "delete" if change.before is None else "update"
        entries.append(LogEntry(change.entity, change.key, op, change.before, reverts=change.tx))
        final[change.fact] = change.before
    return entries, final


class LaterEntry(NamedTuple):
    """An entry of a fact, later than the first change of that fact to undo."""

    id: int
    tx: str
    fact: FactKey
    reverts: str | None


def conflicting_entries(
    later: Sequence[LaterEntry], targets: Collection[str], undone: Collection[tuple[str, FactKey]]
) -> dict[FactKey, list[int]]:
    """The ids of those *later* entries, by fact, that undoing the transactions *targets* would lose.

    *undone* are pairs (transaction, fact) whose change was undone, and not redone. A later entry and the undo of it
    cancel each other, so neither counts. The undo of an older entry counts.
    """
    since = {(entry.tx, entry.fact) for entry in later}
    conflicts: dict[FactKey, list[int]] = {}
    for entry in later:
        reverts_since = entry.reverts is not None and (entry.reverts in targets or (entry.reverts, entry.fact) in since)
        if entry.tx not in targets and (entry.tx, entry.fact) not in undone and not reverts_since:
            conflicts.setdefault(entry.fact, []).append(entry.id)
    return conflicts


def replay(changes: Iterable[Change]) -> dict[tuple[str, Any], Image]:
    """The rows that result from *changes*, oldest first, by (entity, key)."""
    rows: dict[tuple[str, Any], Image] = {}
    for change in changes:
        if change.after is None:
            rows.pop((change.entity, change.key), None)
        else:
            rows[change.entity, change.key] = change.after
    return rows
