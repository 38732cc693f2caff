"""Undo of the last 1,000 transactions with short and long logs, reads of the past, and memstate's rollback."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from datetime import UTC, datetime, timedelta
from functools import partial
from pathlib import Path
from random import Random
from statistics import median
from time import perf_counter
from typing import Any

import numpy as np
from numpy.typing import NDArray
from rich.progress import track
from sqlalchemy import Engine, Text, bindparam, select, text, update
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column, sessionmaker

from benchmarks import databases
from benchmarks.commits import memstate_store, payload
from benchmarks.facts import texts
from benchmarks.report import Target, console, interleaved, ratio, spread, table
from memstate_sa import Fact, Memory, MemoryStore
from memstate_sa.db import statements
from memstate_sa.db.codec import encode_key
from memstate_sa.db.tables import utcnow
from memstate_sa.indexes import ChromaIndex, InMemoryIndex
from memstate_sa.log import outbox
from memstate_sa.log.changes import LogEntry, new_tx
from memstate_sa.testing import HashEmbedder

STEPS = 1000
ROLLBACK = Target(150, " ms")
FLAT = Target(1.3)
AS_OF = Target(2, " ms")
EMBEDDED = Target(0, " texts")
PEER = Target(1)


def run(*, quick: bool = False) -> None:
    sizes = (10_000, 20_000) if quick else (10_000, 100_000, 1_000_000)
    rounds = 2 if quick else 9
    with databases.folder() as home, ExitStack() as stack:
        measure("SQLite, file", lambda: databases.sqlite_url(home), sizes, rounds, stack)
    with databases.postgres_server() as server, ExitStack() as stack:
        new = partial(_entered, stack, lambda: databases.postgres_database(server))
        measure("PostgreSQL", new, sizes, rounds, stack)
    with databases.folder() as home, ExitStack() as stack:
        beside_the_peer(home, 1 if quick else 9, stack)


def _entered(stack: ExitStack, manager: Callable[[], Any]) -> str:
    url: str = stack.enter_context(manager())
    return url


# -- a database with a long history -----------------------------------------------------------------------------------


class Counting(HashEmbedder):
    """An embedder that counts its texts."""

    def __init__(self) -> None:
        super().__init__()
        self.embedded = 0

    def embed(self, texts: Sequence[str]) -> NDArray[np.float32]:
        self.embedded += len(texts)
        return super().embed(texts)


def define() -> type[Any]:
    class Base(DeclarativeBase):
        pass

    class Preference(Base):
        __tablename__ = "preference"
        id: Mapped[int] = mapped_column(primary_key=True)
        user_id: Mapped[str] = mapped_column(index=True)
        role: Mapped[str]
        content: Mapped[str] = mapped_column(Text)

    return Preference


_SQLITE = {
    "series": "(WITH RECURSIVE s(n) AS (SELECT :first UNION ALL SELECT n + 1 FROM s WHERE n < :last) SELECT n FROM s)",
    "tx": "printf('%032x', n)",
    "object": "json_object",
    "at": "strftime('%Y-%m-%d %H:%M:%f000', :base, '+' || (n / 100.0) || ' seconds')",
    "true": "1",
    "false": "0",
}
_POSTGRESQL = {
    "series": "(SELECT n FROM generate_series(CAST(:first AS bigint), CAST(:last AS bigint)) n) s",
    "tx": "lpad(to_hex(n), 32, '0')",
    "object": "jsonb_build_object",
    "at": "CAST(:base AS timestamp) AT TIME ZONE 'UTC' + n * interval '10 milliseconds'",
    "true": "true",
    "false": "false",
}


class World:
    """A database with facts and *entries* log entries, one for each transaction, as capture writes them.

    No key is delivered.
    """

    def __init__(self, url: str, entries: int) -> None:
        self.engine = databases.engine(url)
        self.model = define()
        self.memory = Memory(InMemoryIndex(), embedder=HashEmbedder())
        self.memory.track(self.model, text="content", metadata=("user_id", "role"))
        self.sessions = sessionmaker(self.engine)
        self.memory.attach(self.sessions)
        self.model.metadata.create_all(self.engine)
        self.memory.create_tables(self.engine)
        self.facts = entries // 5
        self.base = datetime.now(UTC).replace(microsecond=0) - timedelta(days=1)
        self._sql = _SQLITE if self.engine.dialect.name == "sqlite" else _POSTGRESQL
        self._last = 0
        self._write(self.facts, op="insert")
        self._write(entries - self.facts)
        if self.engine.dialect.name == "postgresql":
            with self.engine.connect().execution_options(isolation_level="AUTOCOMMIT") as connection:
                connection.execute(text("VACUUM ANALYZE"))

    def at(self, number: int) -> datetime:
        """A time between the *number*-th entry and the next."""
        return self.base + timedelta(milliseconds=10 * number + 5)

    def change(self, count: int, *, stride: int = 0, offset: int = 0, session_id: str = "later") -> None:
        """Make *count* transactions, each an update of another fact. By default the facts are all over the table."""
        self._write(count, stride=stride or self.facts // count, offset=offset, session_id=session_id)

    def _write(
        self, count: int, *, op: str = "update", stride: int = 1, offset: int = 0, session_id: str = "earlier"
    ) -> None:
        """Write the transactions in a few statements. Through a Session, a million would take a quarter of an hour."""
        first, last = self._last + 1, self._last + count
        self._last = last
        sql = self._sql
        key = f"(((n - {first}) * {stride} + {offset}) % {self.facts} + 1)"
        content = f"'User prefers dish number ' || n || ' of fact ' || {key}"
        user = f"'u' || ({key} % 50)"
        image = f"{sql['object']}('id', {key}, 'user_id', {user}, 'role', 'preference', 'content', {content})"
        source = f"FROM {sql['series']} ORDER BY n"
        logged = f"{sql['tx']}, 'preference', '[' || {key} || ']', '{op}', {image}, 1, {sql['true']}, {sql['at']}"
        labelled = f"{sql['tx']}, :session_id, {sql['at']}"
        marked = f"0, {sql['false']}, 0, 'preference', '[' || {key} || ']', {sql['tx']}, {sql['at']}"
        written = [
            f"INSERT INTO memstate_log (tx, entity, key, op, image, version, step, at) SELECT {logged} {source}",
            f"INSERT INTO memstate_transaction (tx, session_id, at) SELECT {labelled} {source}",
            f"INSERT INTO memstate_outbox (xid, intent, slot, entity, key, tx, created_at) SELECT {marked} {source}",
        ]
        if op == "insert":
            written.append(
                "INSERT INTO preference (id, user_id, role, content) "
                f"SELECT {key}, {user}, 'preference', {content} {source}"
            )
        else:
            written.append(
                f"UPDATE preference SET content = new.content FROM (SELECT {key} AS id, {content} AS content "
                f"FROM {sql['series']} WHERE n > :last - :facts) AS new WHERE preference.id = new.id"
            )
        base = self.base.strftime("%Y-%m-%d %H:%M:%S")
        parameters = {"first": first, "last": last, "base": base, "session_id": session_id, "facts": self.facts}
        with self.engine.begin() as connection:
            for statement in written:
                connection.execute(text(statement), {k: v for k, v in parameters.items() if f":{k}" in statement})

    # -- measurements --------------------------------------------------------------------------------------------------

    def rollback(self) -> float:
        """Milliseconds of ``rollback(1000)`` and the commit."""
        self.change(STEPS)
        return self._timed(STEPS)

    def rollback_of_neighbours(self) -> float:
        """Milliseconds of ``rollback(1000)`` of neighbouring facts, which are on few pages even of a large table."""
        self.change(STEPS, stride=1, offset=self.facts // 2)
        return self._timed(STEPS)

    def rollback_of_a_run(self) -> float:
        """Milliseconds of ``rollback(1000)`` of one session_id, after which others made as many transactions."""
        self.change(STEPS, session_id="run")
        self.change(STEPS, offset=1)
        return self._timed(STEPS, session_id="run")

    def _timed(self, steps: int, **scope: Any) -> float:
        with self.sessions() as session:
            gc.collect()
            start = perf_counter()
            changes = self.memory.rollback(session, steps, **scope)
            session.commit()
            taken = perf_counter() - start
        assert len(changes) == steps
        return taken * 1000

    def by_hand(self) -> float:
        """Milliseconds of the lower limit: read, update and log rows of known keys, and add the keys to the outbox."""
        self.change(STEPS)
        stride = self.facts // STEPS
        preference = self.model.__table__
        keys = [n * stride + 1 for n in range(STEPS)]
        statement = update(preference).where(preference.c.id == bindparam("b_id")).values(content=bindparam("b_text"))
        gc.collect()
        start = perf_counter()
        with self.engine.begin() as connection:
            statements.take_write_lock(connection)
            present = connection.execute(select(preference).where(preference.c.id.in_(keys)).with_for_update())
            images = [{**row, "content": row["content"] + ", again"} for row in present.mappings()]
            connection.execute(statement, [{"b_id": image["id"], "b_text": image["content"]} for image in images])
            facts = [("preference", encode_key([image["id"]])) for image in images]
            entries = [LogEntry(*fact, "update", image) for fact, image in zip(facts, images, strict=True)]
            outbox.add(connection, entries, facts, new_tx(), utcnow(), {"preference": 1})
        return (perf_counter() - start) * 1000

    def as_of(self) -> float:
        """Milliseconds of ``as_of`` by key, at a random moment."""
        random = Random(1)
        with self.sessions() as session:
            moments = [
                (random.randint(1, self.facts), self.at(random.randint(self.facts, self._last))) for _ in range(200)
            ]
            start = perf_counter()
            for key, at in moments:
                assert self.memory.as_of(session, self.model, key, at) is not None
            return (perf_counter() - start) * 1000 / len(moments)

    def embedded_again(self) -> int:
        """The number of texts embedded after a rollback of 1,000 facts whose old content had a vector before.

        A new Memory embeds them. It knows only the database, as after a restart of the process.
        """
        relay = self.memory.relay(self.engine)
        relay.drain(timeout=600)
        self.change(STEPS)
        relay.drain(timeout=600)
        self._timed(STEPS)
        embedder = Counting()
        another = Memory(self.memory.indexes, embedder=embedder)
        another.track(self.model, text="content", metadata=("user_id", "role"))
        relay.stop()
        delivered = another.relay(self.engine).drain(timeout=600)
        assert delivered >= STEPS
        return embedder.embedded


def measure(database: str, new_url: Callable[[], str], sizes: Sequence[int], rounds: int, stack: ExitStack) -> None:
    worlds: dict[int, World] = {}
    for size in track(sizes, f"filling, {database}", console=console, transient=True):
        worlds[size] = World(new_url(), size)
        stack.callback(worlds[size].engine.dispose)
    kinds: dict[str, Callable[[World], float]] = {
        f"rollback({STEPS:,})": World.rollback,
        f"rollback({STEPS:,}) of neighbours": World.rollback_of_neighbours,
        f"rollback({STEPS:,}, session_id=…)": World.rollback_of_a_run,
        "the same rows by hand": World.by_hand,
        "as_of() by key": World.as_of,
    }
    shortest, *_, longest = sizes
    result = table(
        f"{database}: median of {rounds} interleaved rounds",
        "log entries", *(f"{size:,}" for size in sizes), "quartiles at the most", "target", "most/least", "target",
    )  # fmt: skip
    measured: dict[str, dict[str, list[float]]] = {}
    for title, kind in kinds.items():
        contenders = {str(size): partial(kind, world) for size, world in worlds.items()}
        for contender in contenders.values():
            contender()
        taken = measured[title] = interleaved(contenders, rounds)
        most = median(taken[str(longest)])
        target = AS_OF if kind is World.as_of else ROLLBACK
        flat = ratio(taken[str(longest)], taken[str(shortest)])
        low, high = spread(taken[str(longest)])
        by_hand = kind is World.by_hand
        result.add_row(
            title,
            *(f"{median(taken[str(size)]):.{2 if kind is World.as_of else 0}f} ms" for size in sizes),
            f"{low:.{2 if kind is World.as_of else 0}f}-{high:.{2 if kind is World.as_of else 0}f} ms",
            "" if by_hand else target.verdict(most),
            f"{flat:.2f}×",
            "" if by_hand else FLAT.verdict(flat),
        )
    console.print(result)
    unscoped, _, _, floor, _ = measured.values()
    times = [f"{ratio(unscoped[str(size)], floor[str(size)]):.1f}×" for size in sizes]
    console.print(f"rollback({STEPS:,}), in times of the same rows by hand: {', '.join(times)}")
    again = worlds[shortest].embedded_again()
    console.print(
        f"texts embedded again after rollback({STEPS:,}) of facts: [bold]{again}[/] {EMBEDDED.verdict(again)}"
    )


# -- beside memstate ---------------------------------------------------------------------------------------------------


def beside_the_peer(home: Path, rounds: int, stack: ExitStack) -> None:
    """Undo of 100 commits on SQLite and Chroma, and the time until the index follows (with memstate, at once)."""
    steps = 100
    contents = iter(texts(2 * steps * (rounds + 1)))
    contenders = {"theirs": theirs(home, steps, contents, stack), "ours": ours(home, steps, contents, stack)}
    for contender in contenders.values():
        contender()
    taken: dict[str, list[float]] = {name: [] for name in contenders}
    followed: dict[str, list[float]] = {name: [] for name in contenders}
    for number in track(range(rounds), "rollback(100)", console=console, transient=True):
        for name in list(contenders)[:: -1 if number % 2 else 1]:
            back, in_the_index = contenders[name]()
            taken[name].append(back)
            followed[name].append(in_the_index)
    import memstate

    result = table(
        f"rollback({steps}) of single-fact commits, SQLite and Chroma: median of {rounds} interleaved rounds",
        "", "rollback", "and in the index", "ratio", "target",
    )  # fmt: skip
    for name, title in (("theirs", f"memstate {memstate.__version__}"), ("ours", "memstate_sa")):
        share = ratio(followed[name], followed["theirs"])
        result.add_row(
            title,
            f"{median(taken[name]) * 1000:.0f} ms",
            f"{median(followed[name]) * 1000:.0f} ms",
            *(("", "") if name == "theirs" else (f"[bold]{share:.2f}×[/]", PEER.verdict(share))),
        )
    console.print(result)


Round = Callable[[], tuple[float, float]]
"""A function that commits, and undoes the commits. It returns the seconds of the rollback, and of its delivery."""


def theirs(home: Path, steps: int, contents: Iterator[str], stack: ExitStack) -> Round:
    import memstate

    store = memstate_store(home, stack)

    def once() -> tuple[float, float]:
        for _ in range(steps):
            store.commit(memstate.Fact(type="preference", payload=payload(next(contents))), session_id="s")
        start = perf_counter()
        store.rollback("s", steps)
        taken = perf_counter() - start
        assert not store.query("preference")
        return taken, taken

    return once


def ours(home: Path, steps: int, contents: Iterator[str], stack: ExitStack) -> Round:
    index = ChromaIndex(stack.enter_context(databases.chroma(home)), "memory")
    engine: Engine = databases.engine(databases.sqlite_url(home))
    stack.callback(engine.dispose)
    store = stack.enter_context(MemoryStore(engine, index))

    def settle() -> None:
        while store.memory.status(engine)["memory"].pending:
            time.sleep(0.002)

    def once() -> tuple[float, float]:
        for _ in range(steps):
            store.commit(Fact(type="preference", payload=payload(next(contents))), session_id="s")
        settle()
        start = perf_counter()
        store.rollback(steps, session_id="s")
        taken = perf_counter() - start
        settle()
        followed = perf_counter() - start
        assert not store.query("preference")
        return taken, followed

    return once
