"""Calls of the stores that type checkers accept, and the types of their results."""

from __future__ import annotations

from datetime import datetime, timedelta
from typing import assert_type

from pydantic import BaseModel
from sqlalchemy import Engine
from sqlalchemy.orm import Session

from memstate_sa import AsyncMemoryStore, Fact, MemoryStore
from memstate_sa.indexes import InMemoryIndex
from memstate_sa.log.changes import Changes
from memstate_sa.relay.backlog import Backlog
from memstate_sa.search.hits import Hits
from memstate_sa.undo.undo import Revocation


class Profile(BaseModel):
    user: str


fact = Fact(type="tip", payload={"text": "green tea"})


def blocking(engine: Engine, now: datetime) -> None:
    with MemoryStore(engine, {"memory": InMemoryIndex()}, background=False, strict_types=True) as store:
        store.register_schema("profile", Profile, unique_by="user", immutable=True)
        assert_type(store.commit(fact, session_id="s", actor="ann", ttl=timedelta(days=1)), str)
        assert_type(store.search("tea", 3, {"text": "green tea"}, as_of=now, consistency="eventual"), Hits[Fact])
        assert_type(store.search("tea")[0].fact, Fact)
        assert_type(store.get("id"), Fact | None)
        assert_type(store.as_of("id", now), Fact | None)
        assert_type(store.history(), Changes)
        assert_type(store.rollback(2, "s", on_conflict="skip", dry_run=True), Changes)
        assert_type(store.revoke(actor="ann"), Revocation)
        assert_type(store.status(), dict[str, Backlog])
        with store.transaction(actor="ann", reason="test") as session:
            assert_type(session, Session)


async def awaiting(engine: Engine, now: datetime) -> None:
    async with AsyncMemoryStore(engine, InMemoryIndex(), delivery="strict") as store:
        assert_type(store, AsyncMemoryStore)
        store.register_schema("profile", Profile, unique_by=["user"])
        assert_type(await store.commit(fact, session_id="s", actor="ann", ttl=timedelta(days=1)), str)
        assert_type(await store.commit_model(Profile(user="ann")), str)
        assert_type(await store.search("tea", 3, {"text": "green tea"}, as_of=now), Hits[Fact])
        assert_type(await store.get("id"), Fact | None)
        assert_type(await store.query(type="tip"), list[Fact])
        assert_type(await store.rollback(2, "s", on_conflict="skip"), Changes)
        assert_type(await store.revoke(tx=["a"]), Revocation)
        assert_type(await store.run_sync(lambda sync_store: sync_store.get("id")), Fact | None)
        async with store.transaction(actor="ann"):
            assert_type(await store.delete("id", reason="wrong"), str)
