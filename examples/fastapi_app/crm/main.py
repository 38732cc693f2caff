"""The service: ``uvicorn crm.main:app``."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from fastapi import FastAPI

from crm.database import engine
from crm.routers import contacts, notes, users


@asynccontextmanager
async def lifespan(app: FastAPI) -> AsyncIterator[None]:
    yield
    await engine.dispose()


app = FastAPI(title="CRM", lifespan=lifespan)
app.include_router(users.router)
app.include_router(contacts.router)
app.include_router(notes.router)
