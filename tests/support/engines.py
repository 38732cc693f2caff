"""Engines of tests: each on a database of its own, all with one cache of compiled SQL."""

from __future__ import annotations

from sqlalchemy import Engine, create_engine

_first: dict[str, Engine] = {}


def make_engine(url: str) -> Engine:
    """An engine on *url* that uses what the engines before it have compiled.

    SQLAlchemy compiles a statement once for each dialect object, so all engines of a kind have the first one's.
    """
    engine = create_engine(url)
    first = _first.get(engine.dialect.name)
    if first is None:
        first = create_engine("sqlite://" if engine.dialect.name == "sqlite" else url, query_cache_size=5000)
        first.connect().close()  # its dialect learns the server's version
        first.dispose()
        _first[engine.dialect.name] = first
    engine.dialect = engine.pool._dialect = first.dialect
    engine._compiled_cache = first._compiled_cache
    return engine
