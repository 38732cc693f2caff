"""Calls that type checkers reject."""

from __future__ import annotations

from sqlalchemy import Engine, select
from sqlalchemy.ext.asyncio import AsyncSession
from sqlalchemy.orm import Session

from memstate_sa import Fact, Memory
from memstate_sa.indexes import InMemoryIndex
from tests.typing.models import Preference

memory = Memory(InMemoryIndex())
Memory(InMemoryIndex(), delivery="soon")  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
Memory(InMemoryIndex(), embeder=None)  # type: ignore[call-arg]  # pyright: ignore[reportCallIssue]
memory.track(Preference, text="content", immutable="yes")  # type: ignore[call-overload]  # pyright: ignore[reportArgumentType]
memory.track(Preference, text="content", unique_by=3)  # type: ignore[call-overload]  # pyright: ignore[reportArgumentType]
memory.track(Preference, text=lambda preference: preference.contents)  # type: ignore[attr-defined]  # pyright: ignore[reportAttributeAccessIssue]
memory.track(Preference)  # type: ignore[call-overload]  # pyright: ignore[reportCallIssue]
memory.attach(42)  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
Fact(typ="tip", payload={})  # type: ignore[call-arg]  # pyright: ignore[reportCallIssue]


def blocking(session: Session, awaited: AsyncSession, engine: Engine) -> None:
    memory.relay(engine, pagesize=3)  # type: ignore[call-arg]  # pyright: ignore[reportCallIssue]
    memory.search(session, "tea", Preference, limt=3)  # type: ignore[call-overload]  # pyright: ignore[reportCallIssue]
    memory.search(session, "tea", Preference, consistency="strong")  # type: ignore[call-overload]  # pyright: ignore[reportArgumentType, reportCallIssue]
    memory.search(awaited, "tea", Preference)  # type: ignore[call-overload]  # pyright: ignore[reportArgumentType, reportCallIssue]
    memory.search(session, "tea", "preference")  # type: ignore[call-overload]  # pyright: ignore[reportArgumentType, reportCallIssue]
    _ = memory.search(session, "tea", select(Preference))[0].fact.contents  # type: ignore[attr-defined]  # pyright: ignore[reportAttributeAccessIssue]
    memory.history(awaited, Preference)  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
    memory.rollback(session, 1, bogus=True)  # type: ignore[call-arg]  # pyright: ignore[reportCallIssue]
    memory.rollback(session, on_conflict="ignore")  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
    memory.revoke(session, acter="ann")  # type: ignore[call-arg]  # pyright: ignore[reportCallIssue]
    memory.backfill(engine, batchsize=3)  # type: ignore[call-arg]  # pyright: ignore[reportCallIssue]


async def awaiting(session: Session, awaited: AsyncSession) -> None:
    await memory.asearch(session, "tea", Preference)  # type: ignore[call-overload]  # pyright: ignore[reportArgumentType, reportCallIssue]
    await memory.ahistory(session, Preference)  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
    await memory.ahistory(awaited, Preference, limt=3)  # type: ignore[call-arg]  # pyright: ignore[reportCallIssue]
    await memory.arollback(awaited, 1, bogus=True)  # type: ignore[call-arg]  # pyright: ignore[reportCallIssue]
    await memory.aerase(awaited, Preference)  # type: ignore[call-arg]  # pyright: ignore[reportCallIssue]
