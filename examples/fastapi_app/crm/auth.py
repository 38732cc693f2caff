"""The caller: every user has an API key, sent as a bearer token."""

import hashlib
import secrets
from typing import Annotated

from fastapi import Depends, Header, HTTPException, status
from fastapi.security import HTTPAuthorizationCredentials, HTTPBearer
from sqlalchemy import select

from crm.database import DatabaseSession
from crm.memory import memory
from crm.models import User

_bearer = HTTPBearer(auto_error=False)


def new_key() -> str:
    return secrets.token_urlsafe(32)


def digest(key: str) -> str:
    """The hash of an API key. A slow hash would not help, because keys are long and random."""
    return hashlib.sha256(key.encode()).hexdigest()


def actor_of(user: User) -> str:
    return f"user:{user.id}"


async def get_user(
    session: DatabaseSession,
    credentials: Annotated[HTTPAuthorizationCredentials | None, Depends(_bearer)],
    x_session_id: Annotated[str | None, Header(max_length=100)] = None,
) -> User:
    key = credentials.credentials if credentials else ""
    user: User | None = await session.scalar(select(User).where(User.key_digest == digest(key)))
    if user is None:
        raise HTTPException(status.HTTP_401_UNAUTHORIZED, "unknown key", {"WWW-Authenticate": "Bearer"})
    memory.annotate(session, actor=actor_of(user), session_id=x_session_id)
    return user


CurrentUser = Annotated[User, Depends(get_user)]
