"""The service of the FastAPI page for production, on PostgreSQL: asyncpg, Alembic, pgvector, a relay elsewhere."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path

import pytest
from sqlalchemy import create_engine, make_url, text

from tests.test_docs import ROOT, blocks

PAGE = ROOT / "docs" / "how-to" / "fastapi.md"

USE = """\
from alembic import command
from alembic.config import Config

configuration = Config("alembic.ini")
command.revision(configuration, "notes and their memory", autogenerate=True)
command.upgrade(configuration, "head")
command.check(configuration)

from fastapi.testclient import TestClient
from notes.app import Db, app
from notes.memory import Note, Session, engine, memory

ada, ben = {"X-User": "ada"}, {"X-User": "ben"}


@app.post("/two")
async def add_two(session: Db) -> None:
    for text in ("first", "second"):
        session.add(Note(owner="ada", text=text))
        await session.commit()


@app.post("/undo-after-an-empty-commit")
async def undo_after_an_empty_commit(session: Db) -> int:
    await session.commit()
    await session.rollback()
    return len(await memory.arollback(session, actor=session.info["user"]))


@app.get("/actors")
async def actors(session: Db) -> list[str | None]:
    return [change.actor for change in await memory.ahistory(session, Note)]


with TestClient(app) as client:
    assert client.post("/notes", params={"text": "how to bake rye bread"}, headers=ada).status_code == 200
    relay = memory.relay(engine)  # in production, `memstate-sa relay`
    relay.drain()
    assert client.get("/search", params={"q": "baking"}, headers=ada).json() == ["how to bake rye bread"]
    assert client.get("/search", params={"q": "baking"}, headers=ben).json() == []
    assert client.post("/two", headers=ada).status_code == 200
    assert client.get("/actors", headers=ada).json() == ["ada", "ada", "ada"]
    assert client.post("/undo", headers=ben).json() == 0
    assert client.post("/undo-after-an-empty-commit", headers=ben).json() == 0
    assert client.post("/undo", headers=ada).json() == 1
    memory.indexes["memory"].query = None  # no call succeeds
    failing = client.get("/search", params={"q": "baking"}, headers=ada)
    assert failing.status_code == 503, failing.text
"""


@pytest.fixture
def database(postgres_url: str) -> Iterator[str]:
    """The URL of a new database. Alembic compares a whole database."""
    admin = create_engine(postgres_url, isolation_level="AUTOCOMMIT")
    with admin.connect() as connection:
        connection.execute(text("DROP DATABASE IF EXISTS notes_service WITH (FORCE)"))
        connection.execute(text("CREATE DATABASE notes_service"))
    yield make_url(postgres_url).set(drivername="postgresql+asyncpg", database="notes_service").render_as_string(False)
    with admin.connect() as connection:
        connection.execute(text("DROP DATABASE notes_service WITH (FORCE)"))
    admin.dispose()


def test_the_service_of_the_page_runs(database: str, tmp_path: Path) -> None:
    for package in ("asyncpg", "fastapi", "httpx", "wordllama"):
        pytest.importorskip(package)
    command, config = pytest.importorskip("alembic.command"), pytest.importorskip("alembic.config")
    for block in blocks(PAGE.read_text()):
        if block.title is not None:
            (tmp_path / block.title).parent.mkdir(exist_ok=True)
            (tmp_path / block.title).write_text(block.code)
    (tmp_path / "use.py").write_text(USE)
    environment = os.environ | {
        "DATABASE_URL": database,
        "PYTHONPATH": os.pathsep.join([str(tmp_path), str(ROOT)]),
    }

    configuration = config.Config(tmp_path / "alembic.ini")
    command.init(configuration, str(tmp_path / "migrations"), template="async")
    edit(tmp_path / "alembic.ini", {"driver://user:pass@localhost/dbname": database.replace("%", "%%")})
    changes = {
        "import context\n": "import context\nimport memstate_sa\nfrom notes.memory import Base\n",
        "target_metadata = None": "target_metadata = [Base.metadata, memstate_sa.metadata]",
        "=target_metadata,": '=target_metadata, autogenerate_plugins=["alembic.autogenerate.*", "memstate_sa"],',
    }
    edit(tmp_path / "migrations" / "env.py", changes)
    done = subprocess.run(
        [sys.executable, "use.py"], cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=200
    )
    assert done.returncode == 0, f"{done.stdout}\n{done.stderr}"


def edit(path: Path, replacements: Mapping[str, str]) -> None:
    text = path.read_text()
    for old, new in replacements.items():
        assert old in text
        text = text.replace(old, new)
    path.write_text(text)
