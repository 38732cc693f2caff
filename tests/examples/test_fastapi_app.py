"""The FastAPI service: before the memory, with the patch that adopts it, and after, over HTTP."""

from __future__ import annotations

import ast
import os
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import Engine

from tests.torture.servers import Chroma

pytest.importorskip("chromadb")
pytest.importorskip("wordllama")
pytest.importorskip("aiosqlite")
pytest.importorskip("uvicorn")
httpx = pytest.importorskip("httpx")

EXAMPLE = Path(__file__).resolve().parents[2] / "examples" / "fastapi_app"
REVISION = "migrations/versions/0007_memory.py"
# Files that came with the memory, beside the patch.
NEW = ("crm/routers/recall.py", "tests/test_memory.py", "tests/test_memory_behind.py", REVISION)

pytestmark = pytest.mark.timeout(400)


class Project:
    """A copy of the service in its own folder, on a database."""

    def __init__(self, folder: Path, engine: Engine) -> None:
        self.folder = folder
        url = engine.url.set(drivername="sqlite+aiosqlite") if engine.dialect.name == "sqlite" else engine.url
        self.url = url.render_as_string(hide_password=False)
        self.environment = {name: value for name, value in os.environ.items() if not name.startswith("GIT_")}
        self.environment |= {"CRM_DATABASE_URL": self.url, "CRM_CHROMA": str(folder / "chroma")}
        shutil.copytree(EXAMPLE, folder, ignore=shutil.ignore_patterns("__pycache__", ".*_cache", "crm.db*", "chroma"))

    def run(self, module: str, *arguments: str) -> None:
        self.execute(sys.executable, "-m", module, *arguments)

    def execute(self, *command: str) -> None:
        done = subprocess.run(command, cwd=self.folder, env=self.environment, capture_output=True, text=True)
        assert done.returncode == 0, f"{command}\n{done.stdout}\n{done.stderr}"

    def sources(self) -> dict[str, str]:
        paths = [path for path in self.folder.rglob("*") if path.suffix in (".py", ".txt", ".ini", ".md", ".mako")]
        return {str(path.relative_to(self.folder)): path.read_text() for path in paths}

    def patch(self, *options: str) -> None:
        # git would look for a repository around the folder, and ignore files outside of it.
        self.environment["GIT_CEILING_DIRECTORIES"] = str(self.folder.parent)
        self.execute("git", "apply", *options, "adopt.patch")

    def without_memory(self) -> None:
        self.patch("--reverse")
        for name in NEW:
            (self.folder / name).unlink()
        for path in self.folder.rglob("*.py"):
            assert "memstate" not in path.read_text(), f"{path} knows the memory already"

    def with_memory(self) -> None:
        self.patch()
        for name in NEW:
            if name != REVISION:  # Alembic writes it
                shutil.copy(EXAMPLE / name, self.folder / name)

    @contextmanager
    def serve(self) -> Iterator[str]:
        """The address of the service, which uvicorn runs in its own process.

        The socket listens before the process begins: a first request waits until it is answered.
        """
        with socket.create_server(("127.0.0.1", 0)) as listener, (self.folder / "uvicorn.log").open("a+") as log:
            process = subprocess.Popen(
                [sys.executable, "-m", "uvicorn", "crm.main:app", "--fd", str(listener.fileno())],
                cwd=self.folder,
                env=self.environment,
                pass_fds=[listener.fileno()],
                stdout=log,
                stderr=log,
            )
            address = f"http://127.0.0.1:{listener.getsockname()[1]}"
            listener.close()  # now only the server has the socket, and if it dies, connections are refused
            try:
                yield address
            finally:
                process.terminate()
                code = process.wait(60)
                log.seek(0)
                said = log.read()
        assert code in (0, -15) and "Application shutdown complete" in said and "Traceback" not in said, said


class User:
    """A client of the service. Each request must succeed."""

    def __init__(self, address: str, key: str) -> None:
        self.address, self.key = address, key

    @classmethod
    def joins(cls, address: str, name: str) -> User:
        given = {"account": name, "name": name, "email": f"{name}@example.org"}
        return cls(address, cls(address, "none yet").sends("POST", "/accounts", json=given)["key"])

    def sends(self, method: str, path: str, **options: Any) -> Any:
        headers = {"Authorization": f"Bearer {self.key}"}
        answer = httpx.request(method, self.address + path, headers=headers, timeout=120, **options)
        assert answer.is_success, answer.text
        return answer.json() if answer.content else None

    def notes(self, contact: int, body: str, *tags: str) -> int:
        number: int = self.sends("POST", "/notes", json={"contact_id": contact, "body": body, "tags": tags})["id"]
        return number

    def finds(self, question: str) -> list[str]:
        return [hit["fact"]["body"] for hit in self.sends("GET", "/search/notes", params={"q": question})]


@pytest.fixture
def project(tmp_path: Path, engine: Engine) -> Project:
    return Project(tmp_path / "service", engine)


@pytest.fixture
def chroma(tmp_path: Path, engine: Engine) -> Iterator[str | None]:
    """A client's folder for SQLite, a server for PostgreSQL."""
    if engine.dialect.name == "sqlite":
        yield None
        return
    server = Chroma(tmp_path / "server", tmp_path / "server.log")
    server.start()
    deadline = time.monotonic() + 120
    while not server.answers():
        assert time.monotonic() < deadline, "the Chroma server does not answer"
        time.sleep(0.05)
    yield f"http://127.0.0.1:{server.port}"
    server.kill()


@pytest.mark.deep_on("postgres")
def test_the_patch_takes_the_memory_out_and_brings_it_back(project: Project) -> None:
    before = project.sources()
    project.without_memory()
    project.with_memory()
    assert project.sources() == {path: text for path, text in before.items() if path != REVISION}


@pytest.mark.deep
def test_the_service_without_memory_passes_its_tests(project: Project) -> None:
    """The patch, applied in reverse, makes this service."""
    project.without_memory()
    project.run("pytest", "-q")


@pytest.mark.deep
def test_the_service_with_memory_passes_its_tests(project: Project) -> None:
    project.run("pytest", "-q")


@pytest.mark.deep
def test_service_adopts_memory_over_http(project: Project, chroma: str | None) -> None:
    """Earlier notes are found, undone and explained. Alembic writes the same migration as the example has."""
    if chroma is not None:
        project.environment["CRM_CHROMA"] = chroma
    project.without_memory()
    project.run("alembic", "upgrade", "head")
    with project.serve() as address:
        ada, bob = User.joins(address, "ada"), User.joins(address, "bob")
        tomas, vera = (user.sends("POST", "/contacts", json={"name": "Vera"})["id"] for user in (ada, bob))
        violin = ada.notes(tomas, "Her daughter plays the violin", "family")
        ada.notes(tomas, "Wants the invoice sent to the tax adviser")
        bob.notes(vera, "Sings in a choir")
        assert httpx.get(f"{address}/search/notes", headers={"Authorization": f"Bearer {ada.key}"}).status_code == 404

    project.with_memory()
    project.run("alembic", "revision", "--autogenerate", "--rev-id", "0007", "-m", "memory")
    assert code(project.folder / REVISION) == code(EXAMPLE / REVISION), (
        f"Alembic writes another migration now. Copy its migration to {REVISION}, formatted by ruff"
    )
    project.run("alembic", "upgrade", "head")
    cli = shutil.which("memstate-sa", path=str(Path(sys.executable).parent))
    assert cli is not None
    project.execute(cli, "drain", "--app", "crm.memory:memory", "--url", project.url)

    with project.serve() as address:
        ada, bob = User(address, ada.key), User(address, bob.key)
        assert ada.finds("music") == ["Her daughter plays the violin", "Wants the invoice sent to the tax adviser"]
        assert bob.finds("music") == bob.finds("Her daughter plays the violin") == ["Sings in a choir"]
        ada.sends("DELETE", f"/notes/{violin}")
        assert ada.finds("music") == ["Wants the invoice sent to the tax adviser"]
        assert bob.sends("POST", "/undo") == []
        undone = ada.sends("POST", "/undo")
        assert [(change["entity"], change["op"]) for change in undone] == [("note", "insert"), ("note_tag", "insert")]
        assert ada.finds("music")[0] == "Her daughter plays the violin"
        assert ada.sends("GET", f"/notes/{violin}")["tags"] == ["family"]
        history = ada.sends("GET", f"/notes/{violin}/history")
        assert [change["op"] for change in history] == ["baseline", "delete", "insert"]
    for command in ("verify", "doctor"):  # indexes against tables, log against tables, and the protection
        project.execute(cli, command, "--app", "crm.memory:memory", "--url", project.url)


def code(revision: Path) -> str:
    """The code of a migration in one format."""
    return ast.dump(
        ast.Module([node for node in ast.parse(revision.read_text()).body if isinstance(node, ast.FunctionDef)], [])
    )
