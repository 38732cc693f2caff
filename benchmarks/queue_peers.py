"""The relay's peers: job queues on PostgreSQL, each emptying a backlog with a handler that does nothing.

Each is set up as its own documentation does it, in a database of its own. The time runs from the start of the worker to
the last job handled: what a worker takes to stop is not in it, nor its last acknowledgements.
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
"""Jobs are enqueued by so many."""

LONGEST_S = 600


class Pace(NamedTuple):
    """Jobs a second: over all of the backlog, and once running, which is over its second half."""

    overall: float
    running: float


class Handled:
    """Which jobs, by number, a handler was called with, and when."""

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
        """*end*: when all was done; the last job by default. Every job must have been handled, once."""
        assert sorted(self._numbers) == list(range(self._count))
        middle, last = self._times[self._count // 2 - 1], self._times[-1]
        rest = self._count - bisect_right(self._times, middle)
        return Pace(self._count / ((end or last) - start), rest / (last - middle))


def clock() -> float:
    """The time, once what the preparations left behind is gone, or is no concern of the garbage collector.

    Each contender is measured as in a process of its own: none pays for what the others have imported.
    """
    gc.collect()
    gc.freeze()
    return perf_counter()


@dataclass(frozen=True)
class Peer:
    """``drain`` gets the URL of an empty database and the number of jobs; ``target`` is for ours over theirs.

    ``in_short``: it takes part when there is little time.
    """

    name: str
    needs: tuple[str, ...]
    drain: Callable[[str, int], Awaitable[Pace]]
    jobs: int
    target: Target | None = None
    in_short: bool = False

    def missing(self) -> str | None:
        """What it needs and is not installed, by the name pip knows."""
        return next((module.replace("_", "-") for module in self.needs if find_spec(module) is None), None)


def _numbers(jobs: int) -> Iterator[range]:
    """The numbers of the jobs, in the portions in which they are enqueued."""
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
    # It would end by itself, through psycopg four seconds later: queries there wait until LISTEN gives way. So it is
    # cut off, whatever it says to that.
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
"""As they come or as their README starts them, then as their guides tune them for many short jobs."""
