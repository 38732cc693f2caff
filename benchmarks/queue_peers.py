"""The relay's peers: job queues on PostgreSQL, which drain a backlog with a handler that does nothing.

Each queue has a separate database, and the settings of its own documentation. The time runs from the start of the
worker to the last handled job. It excludes the last acknowledgements and the end of the worker.
"""

from __future__ import annotations

import asyncio
import gc
from bisect import bisect_right
from collections.abc import Awaitable, Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from importlib import import_module
from importlib.util import find_spec
from time import perf_counter
from typing import Any, NamedTuple

from sqlalchemy import MetaData, func, select
from sqlalchemy.engine import make_url
from sqlalchemy.ext.asyncio import AsyncSession, create_async_engine

from benchmarks.report import Target

AT_ONCE = 1000
"""The number of jobs that are enqueued together."""

LONGEST_S = 600


class Pace(NamedTuple):
    """Jobs a second, for the whole backlog (overall) and for its second half (running)."""

    overall: float
    running: float


class Handled:
    """The numbers of the jobs that a handler was called with, and the times."""

    def __init__(self, count: int) -> None:
        self.all = asyncio.Event()
        self._count = count
        self._numbers: list[int] = []
        self._times: list[float] = []

    def note(self, *numbers: int) -> None:
        self._numbers.extend(numbers)
        self._times.extend([perf_counter()] * len(numbers))
        if len(self._numbers) >= self._count:
            self.all.set()

    def pace(self, start: float, end: float | None = None) -> Pace:
        """The pace until *end*, by default the time of the last job. Asserts that every job was handled once."""
        assert sorted(self._numbers) == list(range(self._count))
        middle, last = self._times[self._count // 2 - 1], self._times[-1]
        rest = self._count - bisect_right(self._times, middle)
        return Pace(self._count / ((end or last) - start), rest / (last - middle))


def clock() -> float:
    """The time after a garbage collection. The remaining objects are excluded from later collections.

    So no contender pays for the imports and objects of others.
    """
    gc.collect()
    gc.freeze()
    return perf_counter()


@dataclass(frozen=True)
class Peer:
    """A job queue. ``drain`` gets the URL of an empty database and the number of jobs.

    ``target`` is for the ratio of our pace to theirs. A peer with ``in_short`` also takes part in quick runs.
    """

    name: str
    needs: tuple[str, ...]
    drain: Callable[[str, int], Awaitable[Pace]]
    jobs: int
    target: Target | None = None
    in_short: bool = False

    def missing(self) -> str | None:
        """The first missing package, by its name for pip. None if all are installed."""
        return next((module.replace("_", "-") for module in self.needs if find_spec(module) is None), None)


def _numbers(jobs: int) -> Iterator[range]:
    """The numbers of the jobs, in groups that are enqueued together."""
    return (range(first, min(first + AT_ONCE, jobs)) for first in range(0, jobs, AT_ONCE))


def _dsn(url: str) -> str:
    return make_url(url).set(drivername="postgresql").render_as_string(hide_password=False)


async def procrastinate(url: str, jobs: int, *, concurrency: int) -> Pace:
    library: Any = import_module("procrastinate")
    app = library.App(connector=library.PsycopgConnector(conninfo=_dsn(url)))
    handled = Handled(jobs)

    async def nothing(number: int) -> None:
        handled.note(number)

    task = app.task(nothing)
    async with app.open_async():
        await app.schema_manager.apply_schema_async()
        for numbers in _numbers(jobs):
            await task.batch_defer_async(*({"number": number} for number in numbers))
        start = clock()
        await app.run_worker_async(wait=False, concurrency=concurrency, install_signal_handlers=False)
        assert len(await app.job_manager.list_jobs_async(status="succeeded")) == jobs
    return handled.pace(start)


async def pgqueuer(url: str, jobs: int, *, driver: str, batch_size: int) -> Pace:
    library: Any = import_module("pgqueuer")
    drivers: Any = import_module("pgqueuer.db")
    types: Any = import_module("pgqueuer.types")
    queries: Any = import_module("pgqueuer.queries")
    vendor: Any = import_module(driver)

    async def connect() -> Any:
        if driver == "asyncpg":
            return await vendor.connect(_dsn(url))
        return await vendor.AsyncConnection.connect(_dsn(url), autocommit=True)

    def on(connection: Any) -> Any:
        return drivers.AsyncpgDriver(connection) if driver == "asyncpg" else drivers.PsycopgDriver(connection)

    handled = Handled(jobs)

    async def nothing(job: Any) -> None:
        handled.note(int(job.payload))

    ours, workers = await connect(), await connect()
    queue = queries.Queries(on(ours))
    await queue.install()
    for numbers in _numbers(jobs):
        payloads = [str(number).encode() for number in numbers]
        await queue.enqueue(["nothing"] * len(payloads), payloads, [0] * len(payloads))
    worker = library.PgQueuer(on(workers))
    worker.entrypoint("nothing")(nothing)
    start = clock()
    running = asyncio.create_task(worker.run(batch_size=batch_size, mode=types.QueueExecutionMode.drain))
    await asyncio.wait_for(handled.all.wait(), LONGEST_S)
    while (await queue.driver.fetch("SELECT count(*) AS jobs FROM pgqueuer"))[0]["jobs"]:  # noqa: ASYNC110  # a table
        await asyncio.sleep(0.01)
    # The worker would end by itself, but with psycopg four seconds later, because queries wait for LISTEN. So cancel
    # it, and ignore its errors.
    running.cancel()
    await workers.close()
    with suppress(asyncio.CancelledError, Exception):
        await running
    await ours.close()
    return handled.pace(start)


async def faststream_outbox(url: str, jobs: int, **options: int) -> Pace:
    library: Any = import_module("faststream_outbox")
    metadata = MetaData()
    table = library.make_outbox_table(metadata, table_name="outbox")
    engine = create_async_engine(make_url(url).set(drivername="postgresql+asyncpg"))
    async with engine.begin() as connection:
        await connection.run_sync(metadata.create_all)
    broker = library.OutboxBroker(engine, outbox_table=table, logger=None)
    handled = Handled(jobs)

    async def nothing(number: int) -> None:
        handled.note(number)

    broker.subscriber("nothing", **options)(nothing)
    async with AsyncSession(engine) as session, session.begin():
        for numbers in _numbers(jobs):
            await broker.publish_batch(*numbers, queue="nothing", session=session)
    start = clock()
    await broker.start()
    await asyncio.wait_for(handled.all.wait(), LONGEST_S)
    await broker.stop()
    async with engine.connect() as connection:
        assert (await connection.execute(select(func.count()).select_from(table))).scalar_one() == 0
    await engine.dispose()
    return handled.pace(start)


_BOTH = ("faststream_outbox", "asyncpg")

PEERS = (
    Peer("procrastinate", ("procrastinate",), partial(procrastinate, concurrency=1), 600, Target(100, at_least=True)),
    Peer(
        "procrastinate, 30 at a time",
        ("procrastinate",),
        partial(procrastinate, concurrency=30),
        600,
        Target(100, at_least=True),
        in_short=True,
    ),
    *(
        Peer(
            f"pgqueuer, {driver}, batches of {size}",
            ("pgqueuer", driver),
            partial(pgqueuer, driver=driver, batch_size=size),
            20_000,
            Target(10, at_least=True) if driver == "psycopg" else None,
            in_short=(driver, size) in (("psycopg", 10), ("asyncpg", 100)),
        )
        for driver in ("psycopg", "asyncpg")
        for size in (10, 100)
    ),
    Peer("faststream-outbox, 4 workers", _BOTH, partial(faststream_outbox, max_workers=4), 5000),
    Peer(
        "faststream-outbox, batches of 100",
        _BOTH,
        partial(faststream_outbox, fetch_batch_size=100, terminal_flush_batch_size=100),
        20_000,
        Target(4, at_least=True),
        in_short=True,
    ),
    Peer(
        "faststream-outbox, 4 workers, of 500",
        _BOTH,
        partial(faststream_outbox, fetch_batch_size=500, terminal_flush_batch_size=100, max_workers=4),
        20_000,
        Target(4, at_least=True),
    ),
)
"""Each queue with its default settings, or those of its README, and with its guide's settings for many short jobs."""
