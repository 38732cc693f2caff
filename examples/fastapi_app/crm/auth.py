"""Who is calling: every user has an API key, sent as a bearer token."""

import hashlib
import secrets
from typing import Annotated

from fastapi import Depends, HTTPException, status
from fastapi.security import HTTPAuthorizationCredentials, HTTPBearer
from sqlalchemy import select

from crm.database import DatabaseSession
from crm.models import User

_bearer = HTTPBearer(auto_error=False)


def new_key() -> str:
    return secrets.token_urlsafe(32)


def digest(key: str) -> str:
    """Keys are long and random: nothing is gained by a slow hash."""
    return hashlib.sha256(key.encode()).hexdigest()


async def get_user(
    session: DatabaseSession, credentials: Annotated[HTTPAuthorizationCredentials | None, Depends(_bearer)]
) -> User:
    user = credentials and await session.scalar(select(User).where(User.key_digest == digest(credentials.credentials)))
    if not user:
        raise HTTPException(status.HTTP_401_UNAUTHORIZED, "unknown key", {"WWW-Authenticate": "Bearer"})
    return user


CurrentUser = Annotated[User, Depends(get_user)]
