"""What is known of a Session's open transaction, and of the flush that it is in."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any
from weakref import WeakSet, ref

from sqlalchemy.engine import Connection

from memstate_sa.log.changes import LogEntry, Op, new_tx
from memstate_sa.tracking.tracked import Tracked


class _Weakly:
    """An attribute that keeps nothing alive: a Session that was dropped gives its connection back to the pool."""

    def __set_name__(self, owner: type[Any], name: str) -> None:
        self._name = f"_{name}"

    def __get__(self, instance: Any, owner: type[Any]) -> Any:
        found: ref[Any] | None = None if instance is None else getattr(instance, self._name)
        return None if found is None else found()

    def __set__(self, instance: Any, value: Any) -> None:
        setattr(instance, self._name, None if value is None else ref(value))


@dataclass
class OpenTransaction:
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
    told_on: _Weakly = _Weakly()  # the Connection where triggers know of it, or knew
    connections: WeakSet[Connection] = field(default_factory=WeakSet)
    telling: WeakSet[Connection] = field(default_factory=WeakSet)  # those of databases with triggers of ours
    written_on: _Weakly = _Weakly()

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

    unit: OpenTransaction
    context: _Weakly = _Weakly()  # of SQLAlchemy, and the Session's; another listener's error leaves a Flush behind
    touched: list[tuple[Any, Op, bool | None]] = field(default_factory=list)
    baselines: list[LogEntry] = field(default_factory=list)
    canonical: dict[Tracked, dict[tuple[Any, ...], str]] = field(default_factory=dict)
    written: dict[Tracked, list[tuple[Any, ...]]] = field(default_factory=dict)
    certain: dict[Tracked, set[tuple[Any, ...]]] = field(default_factory=dict)
    checked: bool = False
    # Of facts in several tables: their keys, by whether they are to go, until their first rows are locked.
    parts: dict[tuple[Tracked, bool], list[tuple[Any, ...]]] = field(default_factory=dict)
