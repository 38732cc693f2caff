"""The database, and a session for each request."""

import os
from collections.abc import AsyncIterator
from typing import Annotated, Any

from fastapi import Depends
from sqlalchemy import event
from sqlalchemy.ext.asyncio import AsyncSession, async_sessionmaker, create_async_engine

DATABASE_URL = os.environ.get("CRM_DATABASE_URL", "sqlite+aiosqlite:///crm.db")

engine = create_async_engine(DATABASE_URL)
Sessions = async_sessionmaker(engine, expire_on_commit=False)

if engine.dialect.name == "sqlite":

    @event.listens_for(engine.sync_engine, "connect")
    def _enforce_foreign_keys(connection: Any, record: Any) -> None:
        connection.execute("PRAGMA foreign_keys = ON")


async def get_session() -> AsyncIterator[AsyncSession]:
    async with Sessions() as session:
        yield session


DatabaseSession = Annotated[AsyncSession, Depends(get_session)]
