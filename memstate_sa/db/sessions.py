"""The Session behind what an application has: a Session, a scoped_session, or their async counterparts."""

from __future__ import annotations

from typing import Any

from sqlalchemy import update
from sqlalchemy.engine import Connection
from sqlalchemy.orm import Mapper, Session

from memstate_sa.errors import MemstateError


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


def blocking_session(session: Any) -> Session:
    """The same, for calls that wait for the database. Raises MemstateError for an AsyncSession."""
    if hasattr(in_scope(session), "sync_session"):
        raise MemstateError(
            "this waits for the database, which an AsyncSession cannot: await session.run_sync(memory.history, Model, "
            "key), for example, gives it the Session; search has `await memory.asearch(session, …)`"
        )
    return sync_session(session)


def writing_connection(session: Session, mapper: Mapper[Any]) -> Connection:
    """The connection on which *session* writes rows of *mapper*. A Session may read from another one, of a replica."""
    return session.connection(bind_arguments={"mapper": mapper, "clause": update(mapper)})
