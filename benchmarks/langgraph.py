"""Checkpoints of a conversation, compared with LangGraph's own savers: time, growth, bytes and crashes."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from datetime import UTC, datetime
from pathlib import Path
from statistics import median
from time import perf_counter
from typing import Any, NamedTuple, TypeAlias
from uuid import uuid4

from langchain_core.messages import HumanMessage
from langgraph.checkpoint.base import BaseCheckpointSaver
from langgraph.checkpoint.base.id import uuid6
from langgraph.checkpoint.postgres.aio import AsyncPostgresSaver
from langgraph.checkpoint.sqlite.aio import AsyncSqliteSaver
from sqlalchemy import make_url, text
from sqlalchemy.engine import URL

from benchmarks import databases
from benchmarks.langgraph_crashes import Way, kill_again_and_again
from benchmarks.report import Target, console, ratio, table
from memstate_sa.integrations.langgraph.checkpointer import MemStateCheckpointer

SIZES, QUICK_SIZES = (100, 1000, 4000), (20, 40)
KILLS, QUICK_KILLS = 200, 3
_WINDOW = 20
"""The number of messages in the agent's state."""

Saver: TypeAlias = BaseCheckpointSaver[str]
TABLES = (
    ("checkpoints", "checkpoint_blobs", "checkpoint_writes", "writes"),
    ("memstate_checkpoint", "memstate_checkpoint_blob", "memstate_checkpoint_write"),
)


class Conversation:
    """A thread that grows by one message a step. One channel changes as a whole, two are small, and one stays."""

    def __init__(self, saver: Saver) -> None:
        self.saver, self.step = saver, 0
        self.config: Any = {"configurable": {"thread_id": str(uuid4()), "checkpoint_ns": ""}}
        self.latest: Any = {"configurable": dict(self.config["configurable"])}
        self._messages: list[HumanMessage] = []
        self._versions: dict[str, Any] = {"plan": saver.get_next_version(None, None)}

    async def grow(self) -> float:
        """Save a step with the writes of its only task, and return the seconds."""
        self.step += 1
        self._messages = [*self._messages, HumanMessage(f"message {self.step} " + "x" * 80, id=str(uuid4()))][-_WINDOW:]
        changed = ["messages", "branch:to:agent", "counter"]
        for channel in changed:
            self._versions[channel] = self.saver.get_next_version(self._versions.get(channel), None)
        new = {channel: self._versions[channel] for channel in changed} if self.step > 1 else dict(self._versions)
        values = {
            "messages": self._messages,
            "branch:to:agent": None,
            "counter": self.step,
            "plan": {"goal": "g" * 200, "steps": list(range(20))},
        }
        seen = {"branch:to:agent": self._versions["branch:to:agent"]}
        checkpoint: Any = {
            "v": 4,
            "id": str(uuid6(clock_seq=self.step)),
            "ts": datetime.now(UTC).isoformat(),
            "channel_values": values,
            "channel_versions": dict(self._versions),
            "versions_seen": {"__input__": {}, "agent": seen, "tools": seen},
            "updated_channels": changed,
        }
        metadata: Any = {"source": "loop", "step": self.step, "parents": {}}
        written = [("messages", self._messages[-1:]), ("branch:to:agent", None)]
        began = perf_counter()
        self.config = await self.saver.aput(self.config, checkpoint, metadata, new)
        await self.saver.aput_writes(self.config, written, str(uuid4()), "~__pregel_pull, agent")
        return perf_counter() - began

    async def read(self) -> float:
        """Get the latest checkpoint, and return the seconds."""
        began = perf_counter()
        latest = await self.saver.aget_tuple(self.latest)
        took = perf_counter() - began
        assert latest is not None and latest.checkpoint["channel_values"]["counter"] == self.step
        return took


class Figures(NamedTuple):
    size: int
    grow: tuple[list[float], list[float]]  # theirs, ours
    read: tuple[list[float], list[float]]


async def measure(theirs: Saver, ours: MemStateCheckpointer, sizes: tuple[int, ...]) -> list[Figures]:
    contenders = (Conversation(theirs), Conversation(ours))
    figures = []
    for contender in contenders:  # warm up caches and prepared statements
        for _ in range(10):
            await contender.grow()
            await contender.read()
    for size in sizes:
        rounds = min(60, size // 2)
        while contenders[0].step < size - rounds:
            for contender in contenders:
                await contender.grow()
        if ours.engine.dialect.name == "postgresql":  # autovacuum would do this later
            with ours.engine.begin() as connection:
                connection.execute(text("ANALYZE"))
        at_size = Figures(size, ([], []), ([], []))
        for number in range(rounds):
            order = (0, 1) if number % 2 else (1, 0)
            for side in order:
                at_size.grow[side].append(await contenders[side].grow())
        for number in range(100):
            for side in (0, 1) if number % 2 else (1, 0):
                at_size.read[side].append(await contenders[side].read())
        figures.append(at_size)
    return figures


@asynccontextmanager
async def _savers(url: str) -> AsyncIterator[tuple[Saver, MemStateCheckpointer]]:
    """Both savers. On SQLite each has its own file, on PostgreSQL its own tables."""
    ours = MemStateCheckpointer(url)
    await ours.asetup()
    own = (
        AsyncSqliteSaver.from_conn_string(f"{make_url(url).database}.theirs")
        if url.startswith("sqlite")
        else AsyncPostgresSaver.from_conn_string(url.replace("+psycopg", ""))
    )
    async with own as theirs:
        await theirs.setup()
        yield theirs, ours
    ours.close()


def _bytes(url: str, ours: MemStateCheckpointer) -> list[int]:
    """The bytes of each saver on the disk, including indexes."""
    if url.startswith("sqlite"):
        path = make_url(url).database
        with ours.engine.connect() as connection:
            connection.exec_driver_sql("PRAGMA wal_checkpoint(TRUNCATE)")
        return [sum(Path(f"{path}{end}").stat().st_size for end in ends) for ends in ((".theirs",), ("",))]
    size = text("SELECT coalesce(sum(pg_total_relation_size(oid)), 0) FROM pg_class WHERE relname = ANY(:names)")
    with ours.engine.connect() as connection:
        return [connection.execute(size, {"names": list(names)}).scalar_one() for names in TABLES]


async def _compare(name: str, url: str, sizes: tuple[int, ...]) -> None:
    async with _savers(url) as (theirs, ours):
        figures = await measure(theirs, ours, sizes)
        if isinstance(theirs, AsyncSqliteSaver):
            await theirs.conn.execute("PRAGMA wal_checkpoint(TRUNCATE)")
        stored = _bytes(url, ours)
    shown = table(f"{name}: a step and its writes, the latest checkpoint (ms, median)",
                  "checkpoints", "save: theirs", "ours", "ratio", "", "get: theirs", "ours", "ratio", "")  # fmt: skip
    for at_size in figures:
        cells = []
        for (their, our), limit in ((at_size.grow, 1.2), (at_size.read, 1.0)):
            times = ratio(our, their)
            cells += [f"{median(their) * 1000:.2f}", f"{median(our) * 1000:.2f}", f"{times:.2f}×"]
            cells.append(Target(limit, "×").verdict(times))
        shown.add_row(str(at_size.size), *cells)
    console.print(shown)
    growth = median(figures[-1].read[1]) / median(figures[0].read[1])
    console.print(f"get-latest, {figures[-1].size} checkpoints against {figures[0].size}: {growth:.2f}×")
    of_theirs, of_ours = (size / figures[-1].size for size in stored)
    console.print(
        f"bytes a checkpoint: theirs {of_theirs:.0f}, ours {of_ours:.0f}", Target(1, "×").verdict(of_ours / of_theirs)
    )


def crashes(name: str, url: str, home: Path, way: Way, kills: int) -> None:
    home.mkdir()
    verdict = kill_again_and_again(url, home, way, kills, seed=7)
    how = "facts in the step" if way == "step" else "their saver, nodes commit by themselves"
    console.print(
        f"{name}, {how}: {kills} kills, {verdict.threads} threads: {len(verdict.doubled)} effects doubled, "
        f"{len(verdict.lost)} lost"
    )


def run(*, quick: bool = False) -> None:
    sizes, kills = (QUICK_SIZES, QUICK_KILLS) if quick else (SIZES, KILLS)
    with databases.folder() as home:
        asyncio.run(_compare("SQLite, AsyncSqliteSaver", databases.sqlite_url(home), sizes))
        ways: tuple[Way, Way] = ("step", "apart")
        for way in ways:
            crashes("SQLite", databases.sqlite_url(home), home / f"sqlite-{way}", way, kills)
        with databases.postgres_server() as server:
            _on_postgres(server, home, sizes, kills)


def _on_postgres(server: URL, home: Path, sizes: tuple[int, ...], kills: int) -> None:
    with databases.postgres_database(server) as url:
        asyncio.run(_compare("PostgreSQL, AsyncPostgresSaver", url, sizes))
    ways: tuple[Way, Way] = ("step", "apart")
    for way in ways:
        with databases.postgres_database(server) as url:
            crashes("PostgreSQL", url, home / f"postgres-{way}", way, kills)
