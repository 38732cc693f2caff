"""The service, called over HTTP without a socket. CRM_DATABASE_URL is its database (default: a temporary SQLite)."""

import asyncio
import os
import tempfile
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from pathlib import Path
from secrets import token_hex
from typing import Any

import pytest
from alembic import command
from alembic.config import Config
from httpx import ASGITransport, AsyncClient

_folder = tempfile.TemporaryDirectory(prefix="crm-")
os.environ.setdefault("CRM_DATABASE_URL", f"sqlite+aiosqlite:///{_folder.name}/crm.db")
os.environ.setdefault("CRM_CHROMA", f"{_folder.name}/chroma")

from crm.main import app, lifespan  # noqa: E402  # the service reads its environment

Join = Callable[..., Awaitable[AsyncClient]]


@pytest.fixture(scope="session", autouse=True)
def database() -> Iterator[Config]:
    """The configuration of Alembic, after all migrations have run."""
    config = Config(Path(__file__).parents[1] / "alembic.ini")
    command.upgrade(config, "head")
    yield config
    _folder.cleanup()


@pytest.fixture
async def running() -> AsyncIterator[None]:
    async with lifespan(app):
        yield


@pytest.fixture
async def join(running: None) -> AsyncIterator[Join]:
    """A function: ``await join()`` is a client of a new account's user, and ``await join(user)`` one of a colleague."""
    clients: list[AsyncClient] = []

    async def client(key: str | None = None) -> AsyncClient:
        headers = {} if key is None else {"Authorization": f"Bearer {key}"}
        clients.append(AsyncClient(transport=ASGITransport(app), base_url="http://crm", headers=headers))
        return clients[-1]

    async def join(colleague: AsyncClient | None = None) -> AsyncClient:
        name = token_hex(4)
        given: dict[str, Any] = {"name": name, "email": f"{name}@example.org"}
        if colleague is None:
            made = await (await client()).post("/accounts", json={"account": f"Account of {name}", **given})
        else:
            made = await colleague.post("/users", json=given)
        assert made.status_code == 201, made.text
        return await client(made.json()["key"])

    yield join
    await asyncio.gather(*(each.aclose() for each in clients))


@pytest.fixture
async def ada(join: Join) -> AsyncClient:
    return await join()
