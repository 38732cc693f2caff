"""An application with a Memory: the set-up of most tests."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import nullcontext
from functools import cached_property
from typing import Any

from sqlalchemy import Engine, event, inspect, select
from sqlalchemy.orm import Session, sessionmaker

from memstate_sa import Memory
from memstate_sa.indexes import InMemoryIndex
from memstate_sa.log.changes import replay
from memstate_sa.relay import Relay
from memstate_sa.testing import HashEmbedder


def enforce_foreign_keys(engine: Engine) -> None:
    """Make SQLite enforce foreign keys, as PostgreSQL always does."""
    if engine.dialect.name == "sqlite":
        event.listen(engine, "connect", lambda dbapi, record: dbapi.cursor().execute("PRAGMA foreign_keys = ON"))
        engine.dispose()


class App:
    """Mapped classes that a Memory tracks, and their database. A test file adds its own methods in a subclass.

    *memory* holds options of the Memory, *options* those of `Memory.track`. *tracking* holds options of one class, by
    the class or by its name.
    """

    def __init__(
        self,
        engine: Engine,
        *models: type[Any],
        index: Any = None,
        embedder: Any = None,
        memory: Mapping[str, Any] | None = None,
        tracking: Mapping[Any, Mapping[str, Any]] | None = None,
        foreign_keys: bool = False,
        **options: Any,
    ) -> None:
        if foreign_keys:
            enforce_foreign_keys(engine)
        self.engine, self.models = engine, models
        self.index = InMemoryIndex() if index is None else index
        self.embedder = HashEmbedder() if embedder is None else embedder
        self.memory = Memory(self.index, embedder=self.embedder, **memory or {})
        by_name = {key if isinstance(key, str) else key.__name__: own for key, own in (tracking or {}).items()}
        for model in models:
            self.memory.track(model, **{"text": "text", **options, **by_name.pop(model.__name__, {})})
        assert not by_name, f"options of classes that are not here: {by_name}"
        self.sessions = sessionmaker(engine)
        self.memory.attach(self.sessions)
        for metadata in {model.metadata for model in models}:
            metadata.create_all(engine)
        self.memory.create_tables(engine)

    @cached_property
    def relay(self) -> Relay:
        return self.memory.relay(self.engine)

    def session(self, **labels: str | None) -> Session:
        """A Session whose transaction has these labels."""
        session = self.sessions()
        if labels:
            self.memory.annotate(session, **labels)
        return session

    def write(self, *rows: Any, **labels: str | None) -> str:
        """Commit one transaction that adds *rows*. Returns its token."""
        with self.session(**labels) as session:
            session.add_all(rows)
            session.commit()
            return self.memory.token(session) or ""

    def rows(self, model: type[Any], session: Session | None = None) -> dict[Any, dict[str, Any]]:
        """The table's rows by key, as *session* sees them."""
        table = inspect(model).local_table
        names = [column.name for column in table.columns]
        keys = [column.name for column in table.primary_key]
        rows = {}
        with nullcontext(session) if session is not None else self.session() as reading:
            for values in reading.execute(select(table)):
                row = dict(zip(names, values, strict=True))
                key = tuple(row[name] for name in keys)
                rows[key[0] if len(key) == 1 else key] = row
        return rows

    def assert_log_is_truth(self, *models: type[Any]) -> None:
        """Assert replay(log) == tables, for *models* or for all."""
        with self.session() as session:
            for model in models or self.models:
                history = self.memory.history(session, model)
                assert {key: dict(row) for (_, key), row in replay(history).items()} == self.rows(model, session)


def make_app(engine: Engine, *models: type[Any], **options: Any) -> App:
    """An App that tracks *models*. The options are those of `App`."""
    return App(engine, *models, **options)
