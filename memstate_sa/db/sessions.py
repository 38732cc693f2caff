"""The Session behind an application's session object: a Session, a scoped_session, or their async counterparts."""

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
    """The current session if *session* is a scoped_session or an async_scoped_session, otherwise *session* itself."""
    return session() if hasattr(session, "registry") else session


def sync_session(session: Any) -> Session:
    """The Session behind *session*, which may be a scoped_session or an AsyncSession."""
    current = in_scope(session)
    sync = getattr(current, "sync_session", current)
    if not isinstance(sync, Session):
        raise MemstateError(f"session={session!r} is not a Session. Pass a Session, AsyncSession or scoped_session.")
    return sync


def blocking_session(session: Any, method: str) -> Session:
    """The Session for *method* of a Memory, which waits for the database. Raises MemstateError for an AsyncSession."""
    if hasattr(in_scope(session), "sync_session"):
        raise MemstateError(f"Cannot use an AsyncSession: this call blocks. Use `await memory.a{method}(…)`.")
    return sync_session(session)


def writing_connection(session: Session, mapper: Mapper[Any]) -> Connection:
    """The connection on which *session* writes rows of *mapper*. The Session may read from another, a replica."""
    return session.connection(bind_arguments={"mapper": mapper, "clause": update(mapper)})
