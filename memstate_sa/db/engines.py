"""The engines that memstate_sa makes: from a URL, with a driver for threads, or with a pool of their own."""

from __future__ import annotations

import threading
from functools import partial
from typing import TYPE_CHECKING, Any

from sqlalchemy import URL, Engine, Pool, StaticPool, create_engine, event
from sqlalchemy.engine import make_url
from sqlalchemy.engine.base import OptionEngine
from sqlalchemy.exc import ArgumentError, DBAPIError, NoSuchModuleError

from memstate_sa.db import sqlite
from memstate_sa.db.dialects import BY_NAME, SQLITE, database_of
from memstate_sa.errors import MemstateError, MissingExtra
from memstate_sa.runtime import forks

_ATTRIBUTE = "memstate_own_pool"
URL_EXAMPLES = "Write for example sqlite:///app.db or postgresql+psycopg://user@host/app."
_ADVICE = {
    True: "Check the path, and the rights on its folder.",
    False: "Check the URL, and that the server runs and has this database.",
}
_making = threading.Lock()
_OF_ASYNCPG = {
    *("async_fallback", "command_timeout", "max_cacheable_statement_size", "max_cached_statement_lifetime"),
    *("prepared_statement_cache_size", "prepared_statement_name_func", "statement_cache_size", "timeout"),
}


def make_engine(url: str | URL, **options: Any) -> Engine:
    """A new engine on *url*. All engines that memstate_sa owns are made here.

    A connection that the server or a pooler has closed is replaced at checkout. A forked child gets its own
    connections.
    """
    engine: Engine = sqlite.configure(create_engine(url, pool_pre_ping=True, **options))
    forks.in_child(engine, _renew_pool)
    return engine


def _renew_pool(engine: Engine) -> None:
    """Let go of the parent's connections after a fork, without closing them.

    Connections to SQLite are an exception, and are closed. While one is open, SQLite's library believes that this
    process has the parent's locks. The child keeps an in-memory database, because it is a copy.
    """
    if not sqlite.is_in_memory(engine):
        engine.dispose(close=database_of(engine).runs_in_process)


class _SeparatePool(OptionEngine):
    """An engine with a pool of its own. It shares events and options with the engine that it was made from."""

    def __init__(self, engine: Engine) -> None:
        self._own = engine.pool.recreate()
        self._own._pre_ping = True  # noqa: SLF001  # recreate() takes no options
        super().__init__(engine, {})

    if not TYPE_CHECKING:

        @property
        def pool(self) -> Pool:
            return self._own

        @pool.setter
        def pool(self, pool: Pool) -> None:
            self._own = pool


def with_separate_pool(engine: Engine) -> Engine:
    """*engine* with a pool of its own, which is disposed of with the engine.

    Use it when a thread may hold a connection while it needs a second one. With one pool, such threads could wait for
    each other forever.
    """
    if getattr(engine.dialect, "default_isolation_level", None) is None:
        # The engine's first connection reads the server's settings. A connection of another pool would not wait for it.
        engine.connect().close()
    with _making:
        separate: Engine | None = getattr(engine, _ATTRIBUTE, None)
        if separate is None:
            separate = _SeparatePool(engine)
            setattr(engine, _ATTRIBUTE, separate)
            event.listen(engine, "engine_disposed", partial(_dispose, separate))
            forks.in_child(separate, _renew_pool)
        return separate


def _dispose(separate: Engine, engine: Engine) -> None:
    if engine is not separate:
        separate.dispose()


def blocking_engine(url: URL, **options: Any) -> Engine:
    """An engine on *url* with a driver for threads. Options of asyncpg are translated, or left out."""
    database, query, arguments = BY_NAME.get(url.get_backend_name()), dict(url.query), dict[str, Any]()
    if url.drivername == "postgresql+asyncpg":
        if "ssl" in query:
            query["sslmode"] = query.pop("ssl")
        if query.get("prepared_statement_cache_size") == "0":  # applications set this for PgBouncer
            arguments["prepare_threshold"] = None
        query = {name: value for name, value in query.items() if name not in _OF_ASYNCPG}
    driver = url.get_backend_name() if database is None else database.blocking_driver
    arguments |= options.pop("connect_args", {})
    return make_engine(url.set(drivername=driver, query=query), connect_args=arguments, **options)


def engine_of(url: str | URL) -> Engine:
    """An engine for threads on *url* as users write it. Raises MemstateError if *url* is invalid or not supported.

    ``postgresql://…`` and ``postgres://…`` take psycopg. A driver for asyncio is replaced by one for threads.
    """
    try:
        parsed = make_url(url)
    except (ArgumentError, ValueError):  # no chain: the error may quote a part of the password
        raise MemstateError(f"This is not a database URL. {URL_EXAMPLES}") from None
    if parsed.drivername in ("postgresql", "postgres"):
        parsed = parsed.set(drivername="postgresql+psycopg")
    kind = parsed.get_backend_name()
    if kind not in BY_NAME:
        raise MemstateError(f"memstate_sa does not support {kind}. It works with PostgreSQL and SQLite. {URL_EXAMPLES}")
    in_memory = BY_NAME[kind] is SQLITE and (parsed.database or ":memory:") == ":memory:"
    options: dict[str, Any] = (
        {"poolclass": StaticPool, "connect_args": {"check_same_thread": False}} if in_memory else {}
    )
    try:
        return (blocking_engine if parsed.get_dialect().is_async else make_engine)(parsed, **options)
    except NoSuchModuleError as error:
        raise MemstateError(f"SQLAlchemy does not know the driver of {parsed.drivername}://. {URL_EXAMPLES}") from error
    except ModuleNotFoundError as error:
        if error.name == "psycopg":
            raise MissingExtra("psycopg", "postgres") from error
        raise MemstateError(f"The driver {error.name} is not installed. {URL_EXAMPLES}") from error


def connection_failure(url: URL, error: DBAPIError) -> MemstateError:
    """The error for a database that cannot be opened, with the driver's own reason. It shows no secret of *url*."""
    lines = str(error.orig).strip().splitlines() or [type(error.orig).__name__]
    reason = lines[0].rstrip(" .:")
    for values in (url.password, *url.query.values()):
        for value in (values,) if isinstance(values, str) else values or ():
            reason = reason.replace(value, "…") if value else reason
    if error.statement:
        advice = "Check the rights of the URL's user, and the database."
    else:
        advice = _ADVICE[BY_NAME[url.get_backend_name()].runs_in_process]
    return MemstateError(f"Cannot open {shown_url(url)}: {reason}. {advice}")


def shown_url(url: URL) -> str:
    """*url* without secrets: its query may hold a password, too."""
    return url.set(query={}).render_as_string()


def is_same_database(one: Engine, other: Engine) -> bool:
    """Whether two engines use the same database, with any drivers. On SQLite, one would wait for the other."""
    return one is other or one.url.set(drivername=_kind(one)) == other.url.set(drivername=_kind(other))


def _kind(engine: Engine) -> str:
    return engine.url.get_backend_name()
