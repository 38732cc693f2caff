"""Random programs run in several worlds: captured by the Session, and by triggers.

Every log replays to its tables, and all tables are equal. The logs are equal too where the database logs a Session's
changes, and where Python reads the rows.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import Connection, Engine, create_engine, delete, event, insert, select, text
from sqlalchemy.orm import Session

from memstate_sa import sqlite
from memstate_sa.capture.append_only import rewriting
from memstate_sa.capture.read_log import ReadLog
from memstate_sa.db.codec import decode_image
from memstate_sa.db.tables import log, outbox
from memstate_sa.tracking.tracked import Tracked
from tests.support import PATIENCE_S, Note, Person, Tag, World, explore, sizes
from tests.support.programs import STEPS, UNSEEN_STEPS, Play, programs, small, wipe

SEEN = {name: args for name, args in STEPS.items() if name != "relay"}


class Stage:
    """One world, with its way to run a program."""

    def __init__(self, engine: Engine, capture: Any, kind: str) -> None:
        self.world = World(engine, capture="trigger" if capture == "trigger" else "session")
        if capture == "read":  # as if SQL could not write the images
            self.world.memory._recorder._log_of = _read_log  # type: ignore[method-assign]
        self._runner = asyncio.Runner() if kind == "AsyncSession" else None
        if self._runner is not None:
            from sqlalchemy.ext.asyncio import async_sessionmaker, create_async_engine

            url = engine.url
            if engine.dialect.name == "sqlite":
                url = url.set(drivername="sqlite+aiosqlite")
            self._async_engine = create_async_engine(url, **_arguments(engine, capture))
            if engine.dialect.name == "sqlite":
                sqlite.configure(self._async_engine)
                _relax(self._async_engine.sync_engine)
            self._sessions = async_sessionmaker(self._async_engine)
            self.world.memory.attach(self._sessions)

    def play(self, steps: Any, untracked: int) -> None:
        wipe(self.world.engine)
        self.world.memory._recorder.forget_keys()  # an async engine does not see the wipe
        with self.world.engine.begin() as connection:  # rows from before tracking
            if self.world.engine.dialect.name == "postgresql":
                connection.execute(text("SET LOCAL session_replication_role = replica"))
                connection.execute(text("ALTER SEQUENCE person_id_seq RESTART"))
            for n in range(untracked):
                connection.execute(insert(Person.__table__), {"name": f"old{n}", "about": f"was here {n}"})
                connection.execute(insert(Tag.__table__), {"name": f"tag{n}", "meaning": f"was here {n}"})
            if self.world.engine.dialect.name == "sqlite":  # as if there had been no triggers
                with rewriting(connection):
                    connection.execute(delete(log))
                connection.execute(delete(outbox))

        def run(session: Session) -> None:
            Play(self.world, session).run(steps)

        if self._runner is None:
            with self.world.session() as session:
                run(session)
        else:
            self._runner.run(self._run(run))
        for model in (Person, Tag):
            self.world.memory.backfill(self.world.engine, model)
        self.world.assert_log_is_truth()

    async def _run(self, run: Callable[[Session], None]) -> None:
        async with self._sessions() as session:
            await session.run_sync(run)

    def content(self) -> list[Any]:
        with self.world.session() as session:
            return [self.world.rows(model, session) for model in (Person, Note, Tag)]

    def entries(self) -> list[list[Any]]:
        """The entries of each transaction."""
        transactions: dict[str, list[Any]] = {}
        with self.world.engine.connect() as connection:
            for row in connection.execute(
                select(log.c["tx", "entity", "key", "op", "image", "step"]).order_by(log.c.id)
            ):
                image = row.image and decode_image(row.image)
                transactions.setdefault(row.tx, []).append((row.entity, row.key, row.op, repr(image), row.step))
        return list(map(sorted, transactions.values()))

    def close(self) -> None:
        if self._runner is not None:
            self._runner.run(self._async_engine.dispose())
            self._runner.close()
        self.world.memory.close()
        self.world.engine.dispose()


def _read_log(tracked: Tracked, connection: Connection) -> ReadLog:
    return ReadLog(tracked, tracked.columns_for(connection.dialect))


def _relax(engine: Engine) -> None:
    """Turn off fsync: these tests do not simulate power failures."""
    event.listen(engine, "connect", lambda dbapi, record: dbapi.cursor().execute("PRAGMA synchronous = OFF"))


def _arguments(engine: Engine, capture: str) -> dict[str, Any]:
    """Arguments that give each world its own schema on PostgreSQL."""
    if engine.dialect.name == "sqlite":
        return {}
    return {"connect_args": {"options": f"-csearch_path={capture}_world"}}


@contextmanager
def stages(engine: Engine, folder: Path, kind: str, captures: tuple[str, ...]) -> Iterator[list[Stage]]:
    made = []
    for capture in captures:
        if engine.dialect.name == "sqlite":
            own = create_engine(f"sqlite:///{folder / capture}.db")
            sqlite.configure(own)
            _relax(own)
        else:
            with engine.begin() as connection:
                connection.execute(text(f"CREATE SCHEMA IF NOT EXISTS {capture}_world"))
            own = create_engine(engine.url, **_arguments(engine, capture))
        made.append(Stage(own, capture, kind))
    try:
        yield made
    finally:
        for stage in made:
            stage.close()
        if engine.dialect.name == "postgresql":
            with engine.begin() as connection:
                for capture in captures:
                    connection.execute(text(f"DROP SCHEMA {capture}_world CASCADE"))


def differ(engine: Engine, folder: Path, kind: str, programs_played: int) -> None:
    with stages(engine, folder, kind, ("session", "read", "trigger")) as each:

        @explore(programs_played, steps=programs(SEEN), untracked=small)
        def _agree(steps: Any, untracked: int) -> None:
            for stage in each:
                stage.play(steps, untracked)
            by_database, by_reading, by_trigger = each
            assert by_database.content() == by_reading.content() == by_trigger.content()
            assert by_database.entries() == by_reading.entries()


@pytest.mark.deep_on("AsyncSession")
@pytest.mark.timeout(PATIENCE_S)
@pytest.mark.parametrize("programs_played", sizes(12, 500))
@pytest.mark.parametrize("kind", ["Session", "AsyncSession"])
def test_captures_agree_on_sqlite(sqlite_engine: Engine, tmp_path: Path, kind: str, programs_played: int) -> None:
    differ(sqlite_engine, tmp_path, kind, programs_played)


@pytest.mark.deep_on("Session")
@pytest.mark.timeout(PATIENCE_S)
@pytest.mark.parametrize("programs_played", sizes(8, 150))
@pytest.mark.parametrize("kind", ["Session", "AsyncSession"])
def test_captures_agree_on_postgres(postgres_engine: Engine, tmp_path: Path, kind: str, programs_played: int) -> None:
    differ(postgres_engine, tmp_path, kind, programs_played)


@pytest.mark.timeout(PATIENCE_S)
@pytest.mark.parametrize("programs_played", sizes(12, 300))
@pytest.mark.parametrize("database", ["sqlite", "postgres"])
def test_triggers_log_writes_that_no_session_sees(
    request: pytest.FixtureRequest, tmp_path: Path, database: str, programs_played: int
) -> None:
    """Text SQL, bulk_*(), statements on the connection and other programs, mixed with all other writes."""
    engine = request.getfixturevalue(f"{database}_engine")
    with stages(engine, tmp_path, "Session", ("trigger",)) as [stage]:

        @explore(programs_played, steps=programs({**SEEN, **UNSEEN_STEPS}), untracked=small)
        def _replays(steps: Any, untracked: int) -> None:
            stage.play(steps, untracked)
