"""`Change`, and the decisions about changes: the operation that a row shows, and the inversion of a transaction.

All functions here are pure.
"""

from __future__ import annotations

import secrets
import time
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any, Literal, NamedTuple, SupportsIndex, TypeAlias, overload

from memstate_sa.db.codec import FactKey, Image
from memstate_sa.runtime.display import counted, html_table, shortened, shown, summary

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
        values = ", ".join(f"{name}={text}" for name, text in value_texts(self, lambda value: shortened(value, 60)))
        return summary(self, f"{self.op} {self.entity} {self.key!r}", values, by, undo)


COLUMNS = ("at", "transaction", "fact", "op", "changed", "actor", "session", "reason")
"""The columns of a table of changes: see `table_row`."""


class Changes(list[Change]):
    """A list of changes, which a notebook shows as a table. A slice of it is one, too."""

    @overload
    def __getitem__(self, index: SupportsIndex, /) -> Change: ...

    @overload
    def __getitem__(self, index: slice, /) -> Changes: ...

    def __getitem__(self, index: Any, /) -> Any:
        chosen = super().__getitem__(index)
        return Changes(chosen) if isinstance(index, slice) else chosen

    def _repr_html_(self) -> str:
        return html_table(counted(len(self), "change", "changes"), COLUMNS, map(table_row, self))


def table_row(change: Change) -> tuple[object, ...]:
    """*change* in the columns `COLUMNS`."""
    values = ", ".join(f"{name}: {text}" for name, text in value_texts(change, shown))
    labels = (change.actor, change.session_id, change.reason)
    return (
        f"{change.at:%Y-%m-%d %H:%M:%S}",
        change.tx,
        f"{change.entity} {shown(change.key)}",
        change.op,
        values,
        *labels,
    )


def value_texts(change: Change, show: Callable[[Any], str]) -> Iterator[tuple[str, str]]:
    """The name and the text of each value. An update has only the values that differ, before and after.

    A JSON object has only the members that differ, each with its path: ``payload.city``.
    """
    hidden = _HIDDEN.get(change.entity, ())
    if change.before is None or change.after is None:
        texts = ((name, show(value)) for name, value in (change.after or change.before or {}).items())
    else:
        differences = _differences(change.before, change.after, _DEEPEST_PATH)
        texts = ((name, f"{show(was)} → {show(now)}") for name, was, now in differences)
    return ((name, text) for name, text in texts if name not in hidden)


def _differences(before: Image, after: Image, depth: int) -> Iterator[tuple[str, Any, Any]]:
    for name in {**before, **after}:
        was, now = before.get(name, _ABSENT), after.get(name, _ABSENT)
        if isinstance(was, dict) and isinstance(now, dict) and depth:
            yield from ((f"{name}.{path}", *pair) for path, *pair in _differences(was, now, depth - 1))
        elif was is _ABSENT or now is _ABSENT or was != now:
            yield name, was, now


class _Absent:
    def __repr__(self) -> str:
        return "(absent)"


_ABSENT = _Absent()
_DEEPEST_PATH = 5
_HIDDEN = {"memstate_fact": ("updated_at",)}
"""Columns that say nothing more than the time of the change, by entity."""


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
    """The operation that turns *before* into *after*. It is None if the log knows *after* already.

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
