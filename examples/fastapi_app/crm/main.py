"""The service: ``uvicorn crm.main:app``."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, closing

from fastapi import FastAPI

from crm.database import engine
from crm.memory import memory
from crm.routers import contacts, notes, recall, users


@asynccontextmanager
async def lifespan(app: FastAPI) -> AsyncIterator[None]:
    with closing(memory), memory.relay(engine):
        yield
    await engine.dispose()


app = FastAPI(title="CRM", lifespan=lifespan)
app.include_router(users.router)
app.include_router(contacts.router)
app.include_router(notes.router)
app.include_router(recall.router)
