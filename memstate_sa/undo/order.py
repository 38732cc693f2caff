"""The order in which an undo writes rows. It is computed without asking the database.

There are three cases in which a write waits for another one. When writes wait for each other in a circle, one of them
gives way:

1. The write refers to a row that the other write inserts. To give way, it writes NULL first, and the reference last.
2. The write deletes a row that the other row still refers to. To give way, the other reference becomes NULL first.
3. The write needs a unique value that the other row still has. To give way, the other row gets an unused value first.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from enum import Enum
from typing import Any, NamedTuple, TypeAlias

from sqlalchemy import Column, ForeignKeyConstraint, Table

from memstate_sa.db.codec import Image
from memstate_sa.db.rows import columns_of, values_of

Columns: TypeAlias = tuple[Column[Any], ...]


class Kind(Enum):
    """The statement that writes a row."""

    DELETE = 1
    UPDATE = 2
    INSERT = 3


@dataclass(eq=False)
class Write:
    """A change of one row of *table* from *current* to *final*.

    ``given_up``: columns whose values were cleared or replaced first. ``postponed``: columns that are written last.
    """

    table: Table
    key: str
    kind: Kind
    current: Image | None
    final: Image | None
    given_up: set[str] = field(default_factory=set)
    postponed: set[str] = field(default_factory=set)


class Reason(Enum):
    """The reason why a write waits for another."""

    GAINS_REFERENCE = 1
    LOSES_REFERENCE = 2
    UNIQUE_VALUE = 3


class Wait(NamedTuple):
    """*after* waits for *before*. The *columns* belong to the write that can give way."""

    before: Write
    after: Write
    reason: Reason
    columns: Columns


GiveWay: TypeAlias = Callable[[Write, Columns], bool]
"""A function that frees a row's values in these columns before the next round. It returns False if it cannot."""


class Order:
    """The writes in an order in which each comes after the writes that it waits for, as far as possible."""

    def __init__(self, writes: Sequence[Write], waits: Iterable[Wait], clear: GiveWay, replace: GiveWay) -> None:
        """*clear* sets references to NULL. *replace* replaces unique values, after all references to them are NULL."""
        self._clear, self._replace = clear, replace
        self._waiting = dict.fromkeys(writes)
        self._before: dict[Write, dict[Write, list[Wait]]] = {write: {} for write in writes}
        self._after: dict[Write, dict[Write, None]] = {write: {} for write in writes}
        self._referring: dict[Write, list[Wait]] = {write: [] for write in writes}
        """The waits of each write that removes a referred value. They include references of the row to itself."""
        for wait in waits:
            if wait.reason is Reason.LOSES_REFERENCE:
                self._referring[wait.after].append(wait)
            if wait.before is not wait.after:
                self._before[wait.after].setdefault(wait.before, []).append(wait)
                self._after[wait.before][wait.after] = None

    def rounds(self) -> Iterator[list[Write]]:
        """Lists of writes of one kind that can be executed together, in order.

        Writes that wait for nothing are ordered by kind: deletes, updates, inserts. Some unique values are not compared
        here, because only the database knows their collation or expression. This order frees such values early.
        """
        ready: dict[Kind, list[Write]] = {kind: [] for kind in Kind}
        released = [write for write in self._waiting if not self._before[write]]
        while self._waiting:
            for write in released:
                ready[write.kind].append(write)
            kind = next((kind for kind in Kind if ready[kind]), None)
            if kind is None:
                released = self._break_circle()
                continue
            writes, ready[kind] = ready[kind], []
            yield writes
            for write in writes:
                del self._waiting[write]
            released = [after for write in writes for after in self._after[write] if self._release(write, after)]

    def _release(self, before: Write, after: Write) -> bool:
        """Let *after* no longer wait for *before*. Return True if it now waits for nothing."""
        return self._before[after].pop(before, None) is not None and not self._before[after]

    def _break_circle(self) -> list[Write]:
        """Let one write of a circle give way, and return the writes that wait for nothing now.

        If no write can give way, release one anyway, because the database may check the constraint only at COMMIT.
        """
        circle = self._circle()
        for before, after in circle:
            if all(map(self._gives_way, self._before[after][before])):
                return [after] if self._release(before, after) else []
        before, after = circle[0]
        return [after] if self._release(before, after) else []

    def _circle(self) -> list[tuple[Write, Write]]:
        """Writes that wait for each other in a circle, as pairs (before, after)."""
        path = {next(iter(self._waiting)): 0}
        while True:
            after = next(reversed(path))
            before = next(iter(self._before[after]))
            if before in path:
                members = [*path][path[before] :]
                return [*zip(members[1:], members, strict=False), (before, after)]
            path[before] = len(path)

    def _gives_way(self, wait: Wait) -> bool:
        if wait.reason is Reason.LOSES_REFERENCE:
            return self._clear(wait.before, wait.columns)
        if wait.reason is Reason.UNIQUE_VALUE:
            return self._clear_references(wait.before) and self._replace(wait.before, wait.columns)
        nullable = [column.name for column in wait.columns if column.nullable and not column.primary_key]
        wait.after.postponed.update(nullable)
        return bool(nullable)

    def _clear_references(self, write: Write) -> bool:
        """Clear the references to the row of *write*, before its value is replaced. Return False if one cannot be."""
        waits = (wait for wait in self._referring[write] if wait.before in self._waiting)
        return all(self._clear(wait.before, wait.columns) for wait in waits)


def waits_for_unique_values(writes: Sequence[Write], columns: Columns) -> Iterator[Wait]:
    """The waits of rows that need a unique value, for the rows that have it now."""
    holders = {value: write for write in writes if (value := values_of(write.current, columns)) is not None}
    for write in writes:
        value = values_of(write.final, columns)
        holder = None if value is None else holders.get(value)
        if holder is not None and holder is not write:
            yield Wait(holder, write, Reason.UNIQUE_VALUE, columns)


def waits_for_references(
    referring: Sequence[Write], referred: Sequence[Write], fk: ForeignKeyConstraint
) -> Iterator[Wait]:
    """The waits of new references for their referred rows, and of removed rows for the rows that refer to them."""
    local, remote = map(tuple, columns_of(fk))
    adding, removing = {}, {}  # the writes that add or remove a referred value
    for write in referred:
        current, final = values_of(write.current, remote), values_of(write.final, remote)
        if current != final:
            adding[final], removing[current] = write, write
    for write in referring:
        current, final = values_of(write.current, local), values_of(write.final, local)
        if current != final:
            if final is not None and final in adding:
                yield Wait(adding[final], write, Reason.GAINS_REFERENCE, local)
            if current is not None and current in removing:
                yield Wait(write, removing[current], Reason.LOSES_REFERENCE, local)
