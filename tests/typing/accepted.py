"""Calls that type checkers accept, and the types of their results."""

from __future__ import annotations

from datetime import datetime
from typing import assert_type

from sqlalchemy import Engine, select
from sqlalchemy.ext.asyncio import AsyncSession, async_scoped_session, async_sessionmaker
from sqlalchemy.orm import Session, scoped_session, sessionmaker

from memstate_sa import Changes, Fact, Hits, Memory, Relay, RetryPolicy, Revocation
from memstate_sa.db.codec import Image
from memstate_sa.indexes import InMemoryIndex
from tests.typing.models import Base, Preference

memory = Memory(InMemoryIndex(), delivery="strict", embedding_cache=0)
assert_type(memory.track(Preference, text="content", immutable=True, unique_by=("content",)), type[Preference])
assert_type(memory.track(Preference, text=lambda preference: preference.content.title()), type[Preference])
Memory().track(Preference, text=None)
memory.track(Preference, text=Preference.content, unique_by=lambda row: [row["content"]])


@memory.track(text="content")
class Tip(Base):
    __tablename__ = "tip"


assert_type(Tip(), Tip)


def attach(
    maker: sessionmaker[Session],
    scoped: scoped_session[Session],
    async_maker: async_sessionmaker[AsyncSession],
    async_scoped: async_scoped_session[AsyncSession],
) -> None:
    memory.attach(maker)
    memory.attach(scoped)
    memory.attach(Session)
    memory.attach(async_maker)
    memory.attach(async_scoped)


def read(session: Session, scoped: scoped_session[Session], now: datetime) -> None:
    statement = select(Preference).where(Preference.id > 3)
    assert_type(memory.search(session, "tea", Preference), Hits[Preference])
    assert_type(memory.search(session, "tea", statement), Hits[Preference])
    assert_type(memory.search(scoped, "tea", statement, limit=3, as_of=now)[0].fact, Preference)
    assert_type(memory.history(session, Preference, 1, actor="ann"), Changes)
    assert_type(memory.as_of(session, Preference, 1, now), Image | None)
    assert_type(memory.diff(scoped, now), Changes)


def undo(session: Session, engine: Engine) -> None:
    assert_type(memory.rollback(session, 2, session_id="s", on_conflict="skip", dry_run=True), Changes)
    assert_type(memory.revoke(session, actor="ann", tx=["a"]), Revocation)
    assert_type(memory.backfill(engine, Preference, batch_size=10, progress=print), int)
    memory.backfill(engine, progress=True)
    assert_type(memory.relay(engine, page_size=3, policy=RetryPolicy(max_attempts=3)), Relay)


async def await_all(session: AsyncSession, scoped: async_scoped_session[AsyncSession], now: datetime) -> None:
    assert_type(await memory.asearch(session, "tea", Preference, consistency="eventual"), Hits[Preference])
    assert_type(await memory.asearch(scoped, "tea", select(Preference)), Hits[Preference])
    assert_type(await memory.ahistory(session, Preference, 1, limit=5), Changes)
    assert_type(await memory.aas_of(session, Preference, 1, now), Image | None)
    assert_type(await memory.adiff(scoped, now, model=Preference), Changes)
    assert_type(await memory.arollback(session, 2, to=now), Changes)
    assert_type(await memory.arevoke(session, actor="ann"), Revocation)
    assert_type(await memory.aerase(session, Preference, 1, reason="asked"), int)


Fact(type="tip", payload={"text": "green tea"}, session_id="s")
