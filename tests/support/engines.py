"""Engines for tests: each on its own database, all with one cache of compiled SQL."""

from __future__ import annotations

from typing import Any

from sqlalchemy import Engine, create_engine
from sqlalchemy.exc import OperationalError

_first: dict[tuple[str, bool], Engine] = {}
_OF_A_POOL = {"connect_args", "pool_pre_ping", "pool_size", "pool_timeout", "max_overflow", "poolclass"}


def make_engine(url: Any, *, comments: bool = False, **options: Any) -> Engine:
    """An engine on *url* that reuses the SQL compiled by earlier engines.

    SQLAlchemy compiles a statement once for each dialect object, so all engines of a kind share the first one's.
    Without *comments*, making our tables on PostgreSQL takes a third fewer statements.
    """
    engine = create_engine(url, **options)
    if not options.keys() <= _OF_A_POOL:  # some options may belong to the dialect
        return engine
    kind = engine.dialect.name, comments
    first = _first.get(kind)
    if first is None:
        first = create_engine("sqlite://" if engine.dialect.name == "sqlite" else url, query_cache_size=5000)
        try:
            first.connect().close()  # the dialect learns the server's version
        except OperationalError:  # a test may use a URL that does not connect
            return engine
        first.dispose()
        first.dialect.supports_comments &= comments
        _first[kind] = first
    engine.dialect = engine.pool._dialect = first.dialect
    engine._compiled_cache = first._compiled_cache
    return engine
