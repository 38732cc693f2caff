"""What is known of a Session's open transaction, and of the flush that it is in."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from sqlalchemy.engine import Connection

from memstate_sa.changes import Entry, Op, new_tx
from memstate_sa.facts import Tracked


@dataclass
class Unit:
    """What we know of one Session's open transaction."""

    tx: str = field(default_factory=new_tx)
    actor: str | None = None
    reason: str | None = None
    session_id: str | None = None
    step: bool = True  # whether rollback counts this transaction
    flush: Flush | None = None
    own_writes: int = 0
    logged: bool = False
    sealed: bool = False
    armed: bool = False
    txs: dict[str, None] = field(default_factory=dict)  # what it logged under, an undo's own among them, in order
    intended: bool = False  # an index may hold what is not committed yet
    told_on: Connection | None = None  # where triggers know of it, or knew
    connections: list[Connection] = field(default_factory=list)
    telling: list[Connection] = field(default_factory=list)  # those of databases with triggers of ours
    written_on: Connection | None = None

    @property
    def labels(self) -> dict[str, str | None]:
        return {"actor": self.actor, "reason": self.reason, "session_id": self.session_id}

    @property
    def logged_under(self) -> list[str]:
        """The transactions that its entries are of, the last one last."""
        return list(self.txs if self.told_on is None else {self.tx: None, **self.txs})

    @property
    def mark(self) -> tuple[bool, Connection | None, dict[str, None]]:
        """What `back_to` takes when what was logged since is rolled back."""
        return self.logged, self.written_on, dict(self.txs)

    def back_to(self, mark: tuple[bool, Connection | None, dict[str, None]]) -> None:
        self.logged, self.written_on, self.txs = mark

    @contextmanager
    def writing(self) -> Iterator[None]:
        """Statements in here are ours: the guard lets them pass."""
        self.own_writes += 1
        try:
            yield
        finally:
            self.own_writes -= 1


@dataclass
class Flush:
    """What one flush touches, while it runs: states of tracked classes, what is done to them, whether it is certain."""

    unit: Unit
    context: Any
    touched: list[tuple[Any, Op, bool | None]] = field(default_factory=list)
    baselines: list[Entry] = field(default_factory=list)
    canonical: dict[Tracked, dict[tuple[Any, ...], str]] = field(default_factory=dict)
    written: dict[Tracked, list[tuple[Any, ...]]] = field(default_factory=dict)
    certain: dict[Tracked, set[tuple[Any, ...]]] = field(default_factory=dict)
    checked: bool = False
    # Of facts in several tables: their keys, by whether they are to go, until their first rows are locked.
    parts: dict[tuple[Tracked, bool], list[tuple[Any, ...]]] = field(default_factory=dict)
