"""Draining a backlog, compared with job queues on the same PostgreSQL server.

Also tracked commits, compared with a log and an outbox written by hand.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import secrets
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from datetime import UTC, datetime
from functools import partial
from itertools import count
from statistics import median
from time import perf_counter
from typing import Any

import numpy as np
from numpy.typing import NDArray
from sqlalchemy import Engine, Text, insert, select
from sqlalchemy.engine import URL
from sqlalchemy.orm import DeclarativeBase, Mapped, Session, mapped_column, sessionmaker

from benchmarks import databases
from benchmarks.queue_peers import PEERS, Handled, Pace, Peer, clock
from benchmarks.report import Target, console, interleaved, ratio, spread, table
from memstate_sa import Memory, metadata
from memstate_sa.indexes import InMemoryIndex
from memstate_sa.indexes.base import Point

OURS = "memstate_sa"
KEYS = 20_000
PER_TRANSACTION = 100
KEYS_A_SECOND = Target(20_000, " keys/s", at_least=True)
SHARE = Target(95, " %", at_least=True)


def run(*, quick: bool = False) -> None:
    with databases.postgres_server() as server:
        drains(server, quick=quick)
        with databases.folder() as home, ExitStack() as stack:
            commits("SQLite, file", lambda: databases.sqlite_url(home), stack, quick=quick)
        with ExitStack() as stack:
            commits("PostgreSQL", lambda: stack.enter_context(databases.postgres_database(server)), stack, quick=quick)


# -- the application --------------------------------------------------------------------------------------------------


def define() -> type[Any]:
    """A new class for the model, so that tracking it does not affect other contenders."""

    class Base(DeclarativeBase):
        pass

    class Preference(Base):
        __tablename__ = "preference"

        id: Mapped[int] = mapped_column(primary_key=True)
        number: Mapped[int]
        user_id: Mapped[str]
        role: Mapped[str]
        content: Mapped[str] = mapped_column(Text)

    return Preference


def facts(model: type[Any], numbers: Sequence[int]) -> list[Any]:
    return [
        model(number=n, user_id=f"u{n % 50}", role="preference", content=f"User prefers dish number {n}")
        for n in numbers
    ]


class Constant:
    """An embedder with the same vector for every text."""

    dimension = 8
    fingerprint = "constant"

    def embed(self, texts: Sequence[str]) -> NDArray[np.float32]:
        return np.full((len(texts), self.dimension), 0.5, dtype=np.float32)


class Nowhere(InMemoryIndex):
    """An index that stores nothing. *note* gets the numbers of the facts."""

    def __init__(self, note: Callable[..., object] | None = None) -> None:
        super().__init__()
        self._note = note

    def upsert(self, points: Sequence[Point]) -> None:
        if self._note is not None:
            self._note(*(point.metadata["number"] for point in points))


def remember(model: type[Any], index: Nowhere) -> Memory:
    memory = Memory(index, embedder=Constant(), embedding_cache=0)  # vectors must cost nothing here
    memory.track(model, text="content", metadata=("user_id", "role", "number"))
    return memory


# -- draining a backlog -----------------------------------------------------------------------------------------------


@dataclass
class Contender:
    """A call drains a new backlog and returns jobs a second. ``running`` has the paces of the second halves."""

    drain: Callable[[str], Pace]
    server: URL
    running: list[float] = field(default_factory=list)

    def __call__(self) -> float:
        with databases.postgres_database(self.server) as url:
            pace = self.drain(url)
        self.running.append(pace.running)
        return pace.overall


def drains(server: URL, *, quick: bool = False) -> None:
    less, rounds = (5, 2) if quick else (1, 3)
    peers: dict[str, Peer] = {}
    missing: set[str] = set()
    for peer in (peer for peer in PEERS if peer.in_short or not quick):
        missing_package = peer.missing()
        if missing_package is None:
            peers[peer.name] = peer
        elif missing_package not in missing:
            missing.add(missing_package)
            console.print(f"{missing_package} is not installed: skipped")
    contenders = {OURS: Contender(partial(ours, keys=KEYS // less), server)}
    for name, peer in peers.items():
        contenders[name] = Contender(partial(theirs, peer, jobs=peer.jobs // less), server)
    measured = interleaved(contenders, rounds)

    result = table(
        f"A backlog drained, PostgreSQL, handlers that do nothing: median of {rounds} interleaved rounds",
        "", "jobs", "a second", "ratio", "range", "target", "once running", "ratio",
    )  # fmt: skip
    result.add_row(
        OURS,
        f"{KEYS // less}",
        f"[bold]{median(measured[OURS]):.0f}[/]",
        "",
        "",
        KEYS_A_SECOND.verdict(median(measured[OURS])),
        f"{median(contenders[OURS].running):.0f}",
        "",
    )
    for name, peer in peers.items():
        times = [a / b for a, b in zip(measured[OURS], measured[name], strict=True)]
        result.add_row(
            name,
            f"{peer.jobs // less}",
            f"{median(measured[name]):.0f}",
            f"[bold]{median(times):.1f}×[/]",
            f"{min(times):.1f}-{max(times):.1f}",
            peer.target.verdict(median(times)) if peer.target else "",
            f"{median(contenders[name].running):.0f}",
            f"{ratio(contenders[OURS].running, contenders[name].running):.1f}×",
        )
    console.print(result)


def theirs(peer: Peer, url: str, *, jobs: int) -> Pace:
    async def drain() -> Pace:
        return await peer.drain(url, jobs)

    return asyncio.run(drain())


def ours(url: str, *, keys: int) -> Pace:
    """``drain()`` of rows committed with the ORM: all work of a relay except embedding and writing vectors."""
    handled = Handled(keys)
    model = define()
    memory = remember(model, Nowhere(handled.note))
    engine = databases.engine(url)
    model.metadata.create_all(engine)
    memory.create_tables(engine)
    sessions: sessionmaker[Session] = sessionmaker(engine)
    memory.attach(sessions)
    relay = memory.relay(engine)
    relay.drain()  # a new index would be filled from the table instead of the outbox
    for first in range(0, keys, PER_TRANSACTION):
        with sessions() as session:
            session.add_all(facts(model, range(first, min(first + PER_TRANSACTION, keys))))
            session.commit()
    start = clock()
    delivered = relay.drain(timeout=600)
    end = perf_counter()
    assert delivered == keys
    assert not memory.status(engine)["memory"].pending
    memory.close()
    engine.dispose()
    return handled.pace(start, end)


# -- commits, tracked and by hand -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Transaction:
    """The number of facts that a transaction adds, and its labels."""

    rows: int
    labels: dict[str, str] = field(default_factory=dict)

    def __str__(self) -> str:
        return f"{self.rows} row{'s' if self.rows > 1 else ''}{', labelled' if self.labels else ''}"


TRANSACTIONS = (
    Transaction(1),
    Transaction(10),
    Transaction(1, {"actor": "planner", "reason": "asked to", "session_id": "s1"}),
    Transaction(10, {"actor": "planner", "reason": "asked to", "session_id": "s1"}),
)


class Tracked:
    """Commits facts of a tracked model to a separate database."""

    def __init__(self, url: str, stack: ExitStack) -> None:
        self.engine = databases.engine(url)
        stack.callback(self.engine.dispose)
        self.model = define()
        self.sessions: sessionmaker[Session] = sessionmaker(self.engine)
        self.numbers = count()
        self.model.metadata.create_all(self.engine)
        metadata.create_all(self.engine)
        self.memory = self.adopt()

    def adopt(self) -> Memory:
        memory = remember(self.model, Nowhere())
        memory.attach(self.sessions)
        return memory

    def facts(self, rows: int) -> list[Any]:
        return facts(self.model, [next(self.numbers) for _ in range(rows)])

    def commit(self, transaction: Transaction) -> None:
        with self.sessions() as session:
            if transaction.labels:
                self.memory.annotate(session, **transaction.labels)
            session.add_all(self.facts(transaction.rows))
            session.commit()

    def burst(self, transaction: Transaction, times: int) -> float:
        """Commits a second."""
        start = perf_counter()
        for _ in range(times):
            self.commit(transaction)
        return times / (perf_counter() - start)


class Delivered(Tracked):
    """Commits facts of a tracked model, with a relay in the background."""

    def burst(self, transaction: Transaction, times: int) -> float:
        relay = self.memory.relay(self.engine)
        relay.drain()  # deliver the rest of the previous burst
        with relay:
            return super().burst(transaction, times)


class ByHand(Tracked):
    """The lower limit for tracking: the application itself writes the same rows into the same tables."""

    log, outbox, transaction = (metadata.tables[f"memstate_{name}"] for name in ("log", "outbox", "transaction"))

    def adopt(self) -> Memory:
        return remember(define(), Nowhere())  # this Memory tracks another class, and is not attached

    def commit(self, transaction: Transaction) -> None:
        with self.sessions() as session:
            added = self.facts(transaction.rows)
            session.add_all(added)
            session.flush()
            connection = session.connection()
            tx = f"{time.time_ns() // 1_000_000:012x}{secrets.token_hex(10)}"
            at = datetime.now(UTC)
            entity = "preference"
            images = {f"[{fact.id}]": self.image(fact) for fact in added}
            connection.execute(
                insert(self.log),
                [
                    {"tx": tx, "entity": entity, "key": key, "op": "insert", "image": image, "version": 1,
                     "reverts": None, "step": True, "at": at}
                    for key, image in images.items()
                ],
            )  # fmt: skip
            connection.execute(
                insert(self.outbox),
                [
                    {"slot": self.slot(entity + key), "entity": entity, "key": key, "tx": tx, "created_at": at}
                    for key in images
                ],
            )  # fmt: skip
            if transaction.labels:
                connection.execute(insert(self.transaction), {"tx": tx, "at": at, **transaction.labels})
            session.commit()

    def slot(self, fact: str) -> int:
        """The slot of a key. SQLite has one slot."""
        is_postgresql = self.engine.dialect.name == "postgresql"
        return hashlib.sha256(fact.encode()).digest()[0] % 64 if is_postgresql else 0

    @staticmethod
    def image(fact: Any) -> dict[str, Any]:
        return {
            "id": fact.id, "number": fact.number, "user_id": fact.user_id, "role": fact.role, "content": fact.content
        }  # fmt: skip


def written(engine: Engine) -> list[list[str]]:
    """The content of our tables, without columns that differ between runs."""
    variable_columns = {"tx", "at", "created_at", "xid", "snapshot"}
    with engine.connect() as connection:
        return [
            sorted(
                json.dumps([row[c.name] for c in source.columns if c.name not in variable_columns], sort_keys=True)
                for row in connection.execute(select(source)).mappings()
            )
            for source in (ByHand.log, ByHand.outbox, ByHand.transaction)
        ]


def commits(database: str, new_url: Callable[[], str], stack: ExitStack, *, quick: bool = False) -> None:
    rounds, times = (3, 20) if quick else (10, 150)
    hand, tracked, delivered = ByHand(new_url(), stack), Tracked(new_url(), stack), Delivered(new_url(), stack)
    result = table(
        f"Commits a second, {database}: median of {rounds} interleaved bursts",
        "", "by hand", "tracked", "of by hand", "quartiles", "target", "tracked, relay running", "of by hand",
    )  # fmt: skip
    for transaction in TRANSACTIONS[:2] if quick else TRANSACTIONS:
        bursts = {
            name: partial(writer.burst, transaction, times)
            for name, writer in (("by hand", hand), ("tracked", tracked), ("delivered", delivered))
        }
        for burst in bursts.values():  # warm up caches and prepared statements
            burst()
        measured = interleaved(bursts, rounds)
        by_hand = measured["by hand"]
        share = 100 * ratio(measured["tracked"], by_hand)
        low, high = spread([100 * a / b for a, b in zip(measured["tracked"], by_hand, strict=True)])
        result.add_row(
            str(transaction),
            f"{median(by_hand):.0f}",
            f"{median(measured['tracked']):.0f}",
            f"[bold]{share:.0f} %[/]",
            f"{low:.0f}-{high:.0f}",
            SHARE.verdict(share),
            f"{median(measured['delivered']):.0f}",
            f"{100 * ratio(measured['delivered'], by_hand):.0f} %",
        )
    assert written(hand.engine) == written(tracked.engine)
    console.print(result)
