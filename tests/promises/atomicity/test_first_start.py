"""Workers that start together on an empty database all start."""

from __future__ import annotations

import threading
from collections.abc import Callable
from contextlib import suppress
from importlib import import_module
from typing import Any

import pytest
from sqlalchemy import Engine, create_engine, event, inspect

from memstate_sa import Memory, MemoryStore, sqlite
from memstate_sa.indexes import InMemoryIndex
from memstate_sa.testing import HashEmbedder
from tests.support import Base, Tag, in_threads

pytestmark = pytest.mark.sa20


def make_store(engine: Engine) -> None:
    MemoryStore(engine, InMemoryIndex(), embedder=HashEmbedder(), background=False).close()


def create_tables(engine: Engine) -> None:
    memory = Memory(InMemoryIndex(), embedder=HashEmbedder())
    memory.track(Tag, text="meaning", capture="trigger")
    memory.create_tables(engine)
    memory.close()


def set_up_checkpointer(engine: Engine) -> None:
    langgraph = import_module("memstate_sa.integrations.langgraph.checkpointer")
    with langgraph.MemStateCheckpointer(engine) as checkpointer:
        checkpointer.setup()


def set_up_store(engine: Engine) -> None:
    stores = import_module("memstate_sa.integrations.langgraph.store")
    memory = Memory(InMemoryIndex(), embedder=HashEmbedder())
    stores.MemStateStore(engine, memory=memory).setup()
    memory.close()


@pytest.mark.parametrize("start", [make_store, create_tables, set_up_checkpointer, set_up_store])
@pytest.mark.parametrize("configured", [True, False])
def test_workers_that_start_together_all_start(
    engine: Engine, start: Callable[[Engine], None], configured: bool
) -> None:
    """All look before any creates, where the database allows it.

    The same kind: processes, threads, an upgrade beside a start. Also each kind of object that a start creates: tables,
    triggers, functions, an extension.
    """
    if start in (set_up_checkpointer, set_up_store):
        pytest.importorskip("langgraph.graph")
    Base.metadata.create_all(engine)
    both_looked = threading.Barrier(2)
    engines = [create_engine(engine.url) for _ in range(2)]

    def wait_for_the_other(connection: Any, cursor: Any, statement: str, *_: Any) -> None:
        if "CREATE TABLE" in statement and not both_looked.broken:
            with suppress(threading.BrokenBarrierError):
                both_looked.wait(0.5)  # times out where they come one after the other
            both_looked.abort()

    for each in engines:
        if configured:
            sqlite.configure(each)
        event.listen(each, "before_cursor_execute", wait_for_the_other)
    assert in_threads(2, lambda number: start(engines[number])) == []
    assert any(name.startswith("memstate_") for name in inspect(engine).get_table_names())
    for each in engines:
        each.dispose()


def test_start_waits_for_no_writer_where_all_tables_are_there(sqlite_engine: Engine) -> None:
    """Only missing tables are created under the write lock."""
    make_store(sqlite_engine)
    with sqlite_engine.connect() as writer:
        writer.exec_driver_sql("BEGIN IMMEDIATE")
        make_store(sqlite.configure(create_engine(sqlite_engine.url), busy_timeout_s=0.0))
        writer.rollback()
