"""Commits of one row with a database that is one millisecond away, to show the number of round trips."""

from __future__ import annotations

import asyncio
import multiprocessing
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from functools import partial
from itertools import count
from multiprocessing.connection import Connection as Pipe
from statistics import median
from time import perf_counter
from typing import Any

from sqlalchemy import URL, make_url
from sqlalchemy.orm import Session, sessionmaker

from benchmarks import databases
from benchmarks.report import Target, console, interleaved, ratio, table
from benchmarks.writer import CONTENDERS

DELAY_S = 0.001
TARGET = Target(1.5)
KEYS = count(1)


def run(*, quick: bool = False) -> None:
    rounds = 5 if quick else 200
    with databases.postgres_server() as server, proxy(server) as far, ExitStack() as stack:
        writers = {}
        for name in ("plain", "memstate_sa"):
            url = stack.enter_context(databases.postgres_database(server))
            far_url = far.set(database=make_url(url).database)
            engine = databases.engine(far_url.render_as_string(hide_password=False))
            stack.callback(engine.dispose)
            writers[name] = CONTENDERS[name](engine)
        result = table(
            f"Commit of one row through a proxy that adds {DELAY_S * 1000:g} ms to each round trip, PostgreSQL",
            "", "plain", "memstate_sa", "ratio", "target",
        )  # fmt: skip
        for kind, measure in {"insert": insert, "update": update, "second update": known, "delete": remove}.items():
            contenders = {name: partial(measure, *writer) for name, writer in writers.items()}
            for contender in contenders.values():
                contender()
            seconds = interleaved(contenders, rounds)
            share = ratio(seconds["memstate_sa"], seconds["plain"])
            medians = (f"{median(seconds[name]) * 1000:.1f} ms" for name in contenders)
            result.add_row(kind, *medians, f"[bold]{share:.2f}×[/]", TARGET.verdict(share))
        console.print(result)


def insert(model: Any, sessions: sessionmaker[Session]) -> float:
    start = perf_counter()
    with sessions() as session:
        session.add(_row(model))
        session.commit()
    return perf_counter() - start


def update(model: Any, sessions: sessionmaker[Session], *, times: int = 1) -> float:
    """Seconds of the *times*-th change of a new row. A transaction loads the row, changes it and commits."""
    key = _new(model, sessions)
    for n in range(times):
        start = perf_counter()
        with sessions() as session:
            session.get_one(model, key).content = f"change {n}"
            session.commit()
    return perf_counter() - start


def known(model: Any, sessions: sessionmaker[Session]) -> float:
    return update(model, sessions, times=2)


def remove(model: Any, sessions: sessionmaker[Session]) -> float:
    key = _new(model, sessions)
    start = perf_counter()
    with sessions() as session:
        session.delete(session.get_one(model, key))
        session.commit()
    return perf_counter() - start


def _row(model: Any) -> Any:
    return model(id=next(KEYS), user_id="u", role="r", content="one", weight=1.0)


def _new(model: Any, sessions: sessionmaker[Session]) -> int:
    with sessions() as session:
        row = _row(model)
        session.add(row)
        session.commit()
        key: int = row.id
    return key


# -- the slow connection -----------------------------------------------------------------------------------------------


@contextmanager
def proxy(server: URL) -> Iterator[URL]:
    """A URL of *server* where each message to the server takes `DELAY_S` longer. The proxy is a separate process."""
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    process = context.Process(target=_serve, args=(dict(server.query), server.host, server.port, theirs), daemon=True)
    process.start()
    try:
        port = ours.recv()
        yield server.set(host="127.0.0.1", port=port, query={})
    finally:
        process.terminate()
        process.join()


def _serve(query: dict[str, Any], host: str | None, port: int | None, pipe: Pipe) -> None:
    folder = query.get("host")
    path = f"{folder}/.s.PGSQL.{query.get('port', port or 5432)}" if folder else None
    opens: Callable[[], Any] = (
        partial(asyncio.open_unix_connection, path) if path else partial(asyncio.open_connection, host, port or 5432)
    )

    async def relay(client: asyncio.StreamReader, answers: asyncio.StreamWriter) -> None:
        reader, writer = await opens()
        await asyncio.gather(_pass(client, writer, DELAY_S), _pass(reader, answers, 0.0))

    async def listen() -> None:
        listening = await asyncio.start_server(relay, "127.0.0.1", 0)
        pipe.send(listening.sockets[0].getsockname()[1])
        async with listening:
            await listening.serve_forever()

    asyncio.run(listen())


async def _pass(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, delay_s: float) -> None:
    with suppress(ConnectionError):  # the connection breaks when the benchmark ends
        while data := await reader.read(65536):
            if delay_s:
                await asyncio.sleep(delay_s)
            writer.write(data)
            await writer.drain()
    writer.close()
