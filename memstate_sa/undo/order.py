"""The order in which an undo writes rows: each write after those that it waits for. It asks no database.

There are three reasons why a write waits for another. In a circle one of them has to give way:
1. It refers to a row that the other brings: then it writes NULL, and the reference at the end.
2. It takes away a row that the other refers to: then that reference becomes NULL before.
3. It writes a unique value that the other gives up: then the other's row gets a value before that no row has.
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
    """One row of *table* that is to become *final*.

    ``given_up`` are columns that have lost their values before, and ``postponed`` those that get theirs at the end.
    """

    table: Table
    key: str
    kind: Kind
    current: Image | None
    final: Image | None
    given_up: set[str] = field(default_factory=set)
    postponed: set[str] = field(default_factory=set)


class Reason(Enum):
    """Why a write waits for another."""

    GAINS_REFERENCE = 1
    LOSES_REFERENCE = 2
    UNIQUE_VALUE = 3


class Wait(NamedTuple):
    """*after* waits for *before*, because of these columns of the one that would give way."""

    before: Write
    after: Write
    reason: Reason
    columns: Columns


GiveWay: TypeAlias = Callable[[Write, Columns], bool]
"""Have a row give these columns up before the next round; False where it cannot."""


class Order:
    """The writes in an order that keeps each waiting for the others, as far as there is one."""

    def __init__(self, writes: Sequence[Write], waits: Iterable[Wait], clear: GiveWay, replace: GiveWay) -> None:
        """*clear* gives references up, then *replace* gives unique values up, for which all references are cleared."""
        self._clear, self._replace = clear, replace
        self._waiting = dict.fromkeys(writes)
        self._before: dict[Write, dict[Write, list[Wait]]] = {write: {} for write in writes}
        self._after: dict[Write, dict[Write, None]] = {write: {} for write in writes}
        self._referring: dict[Write, list[Wait]] = {write: [] for write in writes}
        """Waits for the end of references to a row, those of the row itself among them."""
        for wait in waits:
            if wait.reason is Reason.LOSES_REFERENCE:
                self._referring[wait.after].append(wait)
            if wait.before is not wait.after:
                self._before[wait.after].setdefault(wait.before, []).append(wait)
                self._after[wait.before][wait.after] = None

    def rounds(self) -> Iterator[list[Write]]:
        """Writes of one kind that may be executed together, in their order.

        Of those that wait for nothing, first the deletes, then the updates: they may make room in an index that is not
        compared here, as a collation or an expression decides.
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
            now, ready[kind] = ready[kind], []
            yield now
            for write in now:
                del self._waiting[write]
            released = [after for write in now for after in self._after[write] if self._release(write, after)]

    def _release(self, before: Write, after: Write) -> bool:
        """Have *after* wait for *before* no longer. Whether it waits for nothing now."""
        return self._before[after].pop(before, None) is not None and not self._before[after]

    def _break_circle(self) -> list[Write]:
        """Have one write of a circle give way. Without one that can, the constraint may be checked at COMMIT."""
        circle = self._circle()
        for before, after in circle:
            if all(map(self._gives_way, self._before[after][before])):
                return [after] if self._release(before, after) else []
        before, after = circle[0]
        return [after] if self._release(before, after) else []

    def _circle(self) -> list[tuple[Write, Write]]:
        """Pairs of writes, each of which the next one waits for, in a circle."""
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
            return self._is_let_go(wait.before) and self._replace(wait.before, wait.columns)
        nullable = [column.name for column in wait.columns if column.nullable and not column.primary_key]
        wait.after.postponed.update(nullable)
        return bool(nullable)

    def _is_let_go(self, write: Write) -> bool:
        """Have the rows that refer to the row of *write* give that up, before it has another value."""
        waits = (wait for wait in self._referring[write] if wait.before in self._waiting)
        return all(self._clear(wait.before, wait.columns) for wait in waits)


def waits_for_unique_values(writes: Sequence[Write], columns: Columns) -> Iterator[Wait]:
    """Who is to have a unique value waits for who has it."""
    holders = {value: write for write in writes if (value := values_of(write.current, columns)) is not None}
    for write in writes:
        value = values_of(write.final, columns)
        holder = None if value is None else holders.get(value)
        if holder is not None and holder is not write:
            yield Wait(holder, write, Reason.UNIQUE_VALUE, columns)


def waits_for_references(
    referring: Sequence[Write], referred: Sequence[Write], fk: ForeignKeyConstraint
) -> Iterator[Wait]:
    """Who is to refer to a row waits for who brings it. Who takes a row away waits for those that refer to it."""
    local, remote = map(tuple, columns_of(fk))
    bringing, taking = {}, {}
    for write in referred:
        now, then = values_of(write.current, remote), values_of(write.final, remote)
        if now != then:
            bringing[then], taking[now] = write, write
    for write in referring:
        now, then = values_of(write.current, local), values_of(write.final, local)
        if now != then:
            if then is not None and then in bringing:
                yield Wait(bringing[then], write, Reason.GAINS_REFERENCE, local)
            if now is not None and now in taking:
                yield Wait(write, taking[now], Reason.LOSES_REFERENCE, local)
