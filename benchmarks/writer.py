"""One contender of the capture benchmark, in a separate process because SQLAlchemy-Continuum patches every mapper.

Run it as ``python -m benchmarks.writer CONTENDER URL``. It reads "insert|update|delete COUNT" from stdin, and answers
with seconds and bytes of WAL (0 on SQLite).
"""

from __future__ import annotations

import gc
import sys
from collections.abc import Callable
from time import perf_counter
from typing import Any, Literal

from sqlalchemy import Engine, Text, event, select, text
from sqlalchemy.orm import DeclarativeBase, Mapped, Session, configure_mappers, mapped_column, sessionmaker

from benchmarks import databases
from memstate_sa import Memory
from memstate_sa.db import tables
from memstate_sa.indexes import InMemoryIndex
from memstate_sa.log import outbox
from memstate_sa.log.changes import LogEntry, new_tx
from memstate_sa.testing import HashEmbedder

Adopt = Callable[[Engine], tuple[type[Any], sessionmaker[Session]]]


def define(**continuum: Any) -> type[Any]:
    """The model: a key and four plain columns."""
    own = {"__versioned__": continuum} if continuum else {}

    class Base(DeclarativeBase):
        pass

    class Preference(Base):
        __tablename__ = "preference"
        locals().update(own)

        id: Mapped[int] = mapped_column(primary_key=True)
        user_id: Mapped[str]
        role: Mapped[str]
        content: Mapped[str] = mapped_column(Text)
        weight: Mapped[float]

    return Preference


def plain(engine: Engine) -> tuple[type[Any], sessionmaker[Session]]:
    model = define()
    model.metadata.create_all(engine)
    return model, sessionmaker(engine)


def by_hand(engine: Engine) -> tuple[type[Any], sessionmaker[Session]]:
    """The lower limit: the same rows of log and outbox, made from the objects, without any reads."""
    model, sessions = plain(engine)
    tables.metadata.create_all(engine)

    def write(session: Session, context: Any) -> None:
        changes = [*((fact, "insert") for fact in session.new), *((fact, "update") for fact in session.dirty)]
        entries, dirty = [], []
        for fact, op in [*changes, *((fact, "delete") for fact in session.deleted)]:
            image = {name: getattr(fact, name) for name in COLUMNS} if op != "delete" else None
            entries.append(LogEntry("preference", f"[{fact.id}]", op, image))  # type: ignore[arg-type]
            dirty.append(("preference", f"[{fact.id}]"))
        outbox.add(session.connection(), entries, dirty, new_tx(), tables.utcnow(), {"preference": 1})

    event.listen(sessions, "after_flush", write)
    return model, sessions


COLUMNS = ("id", "user_id", "role", "content", "weight")


def memstate_sa(capture: Literal["session", "trigger"]) -> Adopt:
    def adopt(engine: Engine) -> tuple[type[Any], sessionmaker[Session]]:
        memory = Memory(InMemoryIndex(), embedder=HashEmbedder())
        model = memory.track(define(), text="content", metadata=("user_id", "role"), capture=capture)
        sessions = sessionmaker(engine)
        memory.attach(sessions)
        model.metadata.create_all(engine)
        memory.create_tables(engine)
        return model, sessions

    return adopt


def history(engine: Engine) -> tuple[type[Any], sessionmaker[Session]]:
    from sqlalchemy_history import make_versioned

    make_versioned(user_cls=None)
    model = define(strategy="validity")
    configure_mappers()
    model.metadata.create_all(engine)
    return model, sessionmaker(engine)


def continuum(strategy: str) -> Adopt:
    def adopt(engine: Engine) -> tuple[type[Any], sessionmaker[Session]]:
        from sqlalchemy_continuum import make_versioned

        make_versioned(user_cls=None, options={"strategy": strategy})
        model = define(strategy=strategy)
        configure_mappers()
        model.metadata.create_all(engine)
        return model, sessionmaker(engine)

    return adopt


CONTENDERS = {
    "plain": plain,
    "by hand": by_hand,
    "memstate_sa": memstate_sa("session"),
    "triggers": memstate_sa("trigger"),
    "history": history,
    "continuum": continuum("validity"),  # this is its default
    "continuum-subquery": continuum("subquery"),
}


def commit(model: type[Any], sessions: sessionmaker[Session], op: str, count: int) -> tuple[float, int]:
    """Seconds and bytes of WAL of ``session.commit()`` for *count* changed objects, without the time of the changes."""
    with sessions() as session:
        if op == "insert":
            session.add_all(
                [
                    model(user_id=f"u{n % 50}", role="preference", content=f"User likes dish number {n}", weight=n / 7)
                    for n in range(count)
                ]
            )
        else:
            objects = session.scalars(select(model)).all()
            assert len(objects) == count
            for n, fact in enumerate(objects):
                if op == "update":
                    fact.content = f"User no longer likes dish number {n}"
                else:
                    session.delete(fact)
        gc.collect()
        before = wal(session.get_bind())
        start = perf_counter()
        session.commit()
        return perf_counter() - start, wal(session.get_bind()) - before


def wal(engine: Any) -> int:
    if engine.dialect.name != "postgresql":
        return 0
    with engine.connect() as connection:
        written: int = connection.scalar(text("SELECT pg_wal_lsn_diff(pg_current_wal_insert_lsn(), '0/0')::bigint"))
    return written


def main(contender: str, url: str) -> None:
    engine = databases.engine(url)
    model, sessions = CONTENDERS[contender](engine)
    print("ready", flush=True)
    for line in sys.stdin:
        op, count = line.split()
        print(*commit(model, sessions, op, int(count)), flush=True)
    engine.dispose()


if __name__ == "__main__":
    main(*sys.argv[1:])
