"""`Change`, and the decisions about changes: what became of a row, and how to invert what a transaction did.

Pure: values in, values out.
"""

from __future__ import annotations

import secrets
import time
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any, Literal, NamedTuple, TypeAlias

from memstate_sa.db.codec import FactKey, Image

Op: TypeAlias = Literal["baseline", "insert", "update", "delete"]


REDACTED = 0
"""The version of an entry whose image was erased: that something happened stays in the log, what it was does not."""


@dataclass(frozen=True, slots=True)
class Change:
    """One entry of the log: what one transaction did to one fact.

    ``key`` is the primary key, as a tuple for a composite one; ``before`` and ``after`` are column values by column
    name, None where the row did not exist. A ``baseline`` records a row that was there before it was tracked.
    ``reverts`` is the transaction that this entry undoes.
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


class Changes(list[Change]):
    """Changes, in the order that the method which returns them names."""


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
    """What a statement did to a row; None: nothing that the log does not know.

    Only the two ends count: a delete and an insert of one key are an update, as the table shows it. *before* is None,
    too, where the row *was there* and its image was erased.
    """
    if after is None:
        return "delete" if was_there else None
    if not was_there:
        return "insert"
    return None if before == after else "update"


class LoggedChange(NamedTuple):
    """One logged change that is to be undone; ``before`` and ``after`` are encoded images."""

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

    Every change is undone by an entry of its own, so that the log says which transaction each entry reverts; the table
    only needs the last of them.
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
    """An entry of a fact, later than the first of its changes that are to be undone."""

    id: int
    tx: str
    fact: FactKey
    reverts: str | None


def conflicting_entries(
    later: Sequence[LaterEntry], targets: Collection[str], undone: Collection[tuple[str, FactKey]]
) -> dict[FactKey, list[int]]:
    """The ids of those *later* entries, by fact, that undoing the transactions *targets* would lose.

    *undone* are (transaction, fact) whose change was undone, and not redone. An undo of what came later too leaves
    nothing behind, and neither does what it undid; an undo of something older is a change like any other.
    """
    since = {(entry.tx, entry.fact) for entry in later}
    conflicts: dict[FactKey, list[int]] = {}
    for entry in later:
        reverts_since = entry.reverts is not None and (entry.reverts in targets or (entry.reverts, entry.fact) in since)
        if entry.tx not in targets and (entry.tx, entry.fact) not in undone and not reverts_since:
            conflicts.setdefault(entry.fact, []).append(entry.id)
    return conflicts


def replay(changes: Iterable[Change]) -> dict[tuple[str, Any], Image]:
    """The rows that a log, oldest change first, says there are, by (entity, key)."""
    rows: dict[tuple[str, Any], Image] = {}
    for change in changes:
        if change.after is None:
            rows.pop((change.entity, change.key), None)
        else:
            rows[change.entity, change.key] = change.after
    return rows
