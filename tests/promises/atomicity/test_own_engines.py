"""Engines that memstate_sa makes itself: for a URL, beside an AsyncEngine, with a pool of its own."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib import import_module
from typing import Any

import pytest
from sqlalchemy import Engine, create_engine, text
from sqlalchemy.ext.asyncio import create_async_engine

from memstate_sa import Fact, Memory, MemoryStore
from memstate_sa.db.engines import with_separate_pool
from memstate_sa.indexes import InMemoryIndex
from memstate_sa.testing import HashEmbedder

Call = Callable[[], Any]


@contextmanager
def store(url: str) -> Iterator[Call]:
    with MemoryStore(url, InMemoryIndex(), embedder=HashEmbedder(), background=False) as facts:
        yield lambda: facts.commit(Fact(type="n", payload={}))


@contextmanager
def checkpointer(url: str) -> Iterator[Call]:
    pytest.importorskip("langgraph.graph")
    langgraph = import_module("memstate_sa.integrations.langgraph.checkpointer")
    with langgraph.MemStateCheckpointer(url) as saver:
        saver.setup()
        yield lambda: saver.get_tuple({"configurable": {"thread_id": "1"}})


@contextmanager
def beside_async(url: str) -> Iterator[Call]:
    memory = Memory(InMemoryIndex(), embedder=HashEmbedder())
    engine = create_async_engine(url)
    memory.create_tables(engine)
    yield lambda: memory.status(engine)
    memory.close()


@contextmanager
def pool_of_its_own(url: str) -> Iterator[Call]:
    """The application's engine does not test its connections first. Our own engine must."""
    engine = create_engine(url)
    made = with_separate_pool(engine)

    def call() -> None:
        with made.connect() as connection:
            connection.execute(text("SELECT 1"))

    yield call
    engine.dispose()


@pytest.mark.parametrize("opened", [store, checkpointer, beside_async, pool_of_its_own])
def test_call_works_after_the_server_closed_idle_connections(postgres_engine: Engine, opened: Any) -> None:
    """The same kind: a pooler's or a firewall's timeout, a restart of the server, a failover."""
    with opened(postgres_engine.url.render_as_string(hide_password=False)) as call:
        call()
        with postgres_engine.connect().execution_options(isolation_level="AUTOCOMMIT") as connection:
            connection.execute(
                text(
                    "SELECT pg_terminate_backend(pid, 60000) FROM pg_stat_activity "
                    "WHERE datname = current_database() AND pid <> pg_backend_pid()"
                )
            )
        call()
