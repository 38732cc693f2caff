"""The Session behind what an application has: a Session, a scoped_session, or their async counterparts."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, TypeAlias

from sqlalchemy import update
from sqlalchemy.engine import Connection
from sqlalchemy.orm import Mapper, Session, scoped_session

from memstate_sa.errors import MemstateError

if TYPE_CHECKING:
    from sqlalchemy.ext.asyncio import AsyncSession, async_scoped_session

SyncSession: TypeAlias = "Session | scoped_session[Any]"
AwaitedSession: TypeAlias = "AsyncSession | async_scoped_session[Any]"
AnySession: TypeAlias = "SyncSession | AwaitedSession"


def in_scope(session: Any) -> Any:
    """The session of this scope, if *session* is a scoped_session or an async_scoped_session; else itself."""
    return session() if hasattr(session, "registry") else session


def sync_session(session: Any) -> Session:
    """The Session that *session* is, stands for (scoped_session), or has (AsyncSession)."""
    current = in_scope(session)
    sync = getattr(current, "sync_session", current)
    if not isinstance(sync, Session):
        raise MemstateError(f"{session!r} is not a Session")
    return sync


def blocking_session(session: Any, method: str) -> Session:
    """The Session for *method* of a Memory, which waits for the database. Raises MemstateError for an AsyncSession."""
    if hasattr(in_scope(session), "sync_session"):
        raise MemstateError(f"Cannot use an AsyncSession: this call blocks. Use `await memory.a{method}(…)`.")
    return sync_session(session)


def writing_connection(session: Session, mapper: Mapper[Any]) -> Connection:
    """The connection on which *session* writes rows of *mapper*. A Session may read from another one, of a replica."""
    return session.connection(bind_arguments={"mapper": mapper, "clause": update(mapper)})
