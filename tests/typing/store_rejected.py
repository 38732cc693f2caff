"""Calls of the stores that type checkers reject."""

from __future__ import annotations

from memstate_sa import AsyncMemoryStore, Fact, MemoryStore
from memstate_sa.indexes import InMemoryIndex

Fact(type="tip")  # type: ignore[call-arg]  # pyright: ignore[reportCallIssue]
MemoryStore("sqlite://", InMemoryIndex(), backgroud=False)  # type: ignore[call-arg]  # pyright: ignore[reportCallIssue]
AsyncMemoryStore("sqlite://", InMemoryIndex(), delivery="soon")  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]


def blocking(store: MemoryStore, fact: Fact) -> None:
    store.rollback(1, bogus=True)  # type: ignore[call-arg]  # pyright: ignore[reportCallIssue]
    store.revoke(acter="ann")  # type: ignore[call-arg]  # pyright: ignore[reportCallIssue]
    store.commit({"type": "tip"})  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
    store.commit(fact, sesion_id="s")  # type: ignore[call-arg]  # pyright: ignore[reportCallIssue]
    store.search("tea", consistency="strong")  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
    store.search("tea", limit="3")  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
    _ = store.search("tea")[0].fact.text  # type: ignore[attr-defined]  # pyright: ignore[reportAttributeAccessIssue]


async def awaiting(store: AsyncMemoryStore, fact: Fact) -> None:
    await store.rollback(1, bogus=True)  # type: ignore[call-arg]  # pyright: ignore[reportCallIssue]
    await store.commit(fact, sesion_id="s")  # type: ignore[call-arg]  # pyright: ignore[reportCallIssue]
    await store.search("tea", consistency="strong")  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
    await store.register_schema("tip", dict)  # type: ignore[arg-type, misc]  # pyright: ignore[reportArgumentType, reportGeneralTypeIssues]
    store.transaction(acter="ann")  # type: ignore[call-arg]  # pyright: ignore[reportCallIssue]
    _ = store.get("id").payload  # type: ignore[attr-defined]  # pyright: ignore[reportAttributeAccessIssue]
