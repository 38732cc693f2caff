"""SIGKILL at random moments of a process that writes and relays: no commit is lost, and the contents are equal."""

from __future__ import annotations

import multiprocessing
import os
import random
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.promises.crash import kill_child
from tests.support import PATIENCE_S

KILLS = int(os.environ.get("MEMSTATE_KILLS", "25"))


@pytest.fixture
def redis_server() -> Iterator[Any]:
    from tests.support.redis_server import AT_ONCE, server

    with server(*AT_ONCE) as made:
        yield made


@pytest.mark.timeout(PATIENCE_S)
@pytest.mark.parametrize(
    ("kind", "kills"),
    [
        ("chroma", 2),
        *(
            pytest.param(kind, kills, marks=pytest.mark.deep)
            for kind, kills in (
                ("chroma", KILLS),
                ("faiss", KILLS // 4),
                ("pgvector", KILLS // 4),
                ("redis", KILLS // 4),
            )
        ),
    ],
)
def test_sigkill_at_random_moments_loses_nothing(
    tmp_path: Path, request: pytest.FixtureRequest, kind: str, kills: int
) -> None:
    """The process is killed again and again on one database and one index. The next run compares contents.

    With pgvector, facts and index are in the same database. With Redis, the server is killed each time, too.
    """
    pytest.importorskip({"chroma": "chromadb", "faiss": "faiss", "pgvector": "psycopg", "redis": "redis"}[kind])
    url = f"sqlite:///{tmp_path / 'facts.db'}"
    if kind == "pgvector":
        url = request.getfixturevalue("postgres_engine").url.render_as_string(hide_password=False)
    redis_server = request.getfixturevalue("redis_server") if kind == "redis" else None
    place = kill_child.Place(kind, tmp_path, url, f"redis://localhost:{redis_server.port}" if redis_server else "")
    chance = random.Random(int(os.environ.get("MEMSTATE_SEED", "11")))
    processes = multiprocessing.get_context("forkserver")  # imports shared modules only once
    processes.set_forkserver_preload([kill_child.__name__, "chromadb"])
    for kill in range(kills):
        receiver, sender = processes.Pipe(duplex=False)
        child = processes.Process(target=kill_child.run, args=(place, kill, sender))
        child.start()
        sender.close()
        try:
            assert receiver.recv() == "ready"
        except EOFError:
            pytest.fail(f"run {kill} found something wrong, or did not start")
        time.sleep(chance.uniform(0.0, 0.4))
        child.kill()
        child.join()
        assert child.exitcode == -signal.SIGKILL
        if redis_server is not None:
            redis_server.kill()
            redis_server.start()
    last = processes.Process(target=kill_child.check, args=(place,))
    last.start()
    last.join()
    assert last.exitcode == 0
