"""The command line of an application."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path
from typing import Any
from uuid import uuid4

import pytest
from sqlalchemy import create_engine, insert, select
from sqlalchemy.orm import sessionmaker
from typer.testing import CliRunner

from memstate_sa import cli, sqlite
from memstate_sa.db.tables import cursor, parked, utcnow

ROOT = Path(__file__).resolve().parents[2]


APPLICATION = """
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column

from memstate_sa import Memory
from memstate_sa.indexes import InMemoryIndex
from memstate_sa.testing import HashEmbedder


class Base(DeclarativeBase):
    pass


class Note(Base):
    __tablename__ = "note"

    id: Mapped[int] = mapped_column(primary_key=True)
    text: Mapped[str]


class Pair(Base):
    __tablename__ = "pair"

    left: Mapped[int] = mapped_column(primary_key=True)
    right: Mapped[str] = mapped_column(primary_key=True)
    text: Mapped[str]


memory = Memory(InMemoryIndex(), embedder=HashEmbedder())
memory.track(Note, text="text")
memory.track(Pair, text="text")
something_else = 3


def make():
    return memory
"""


class Application:
    """An application's module and database, and the command line on them."""

    def __init__(self, folder: Path) -> None:
        self.name = f"application_{uuid4().hex}"
        (folder / f"{self.name}.py").write_text(APPLICATION)
        self.url = f"sqlite:///{folder / 'app.db'}"
        self.engine = sqlite.configure(create_engine(self.url))
        self.sessions = sessionmaker(self.engine)

    @property
    def module(self) -> Any:
        return import_module(self.name)

    def run(self, command: str, *arguments: str, **options: Any) -> str:
        at = ["--app", f"{self.name}:memory", "--url", self.url]
        name = [command, arguments[0]] if command == "dead" else [command]
        return invoke(*name, *at, *arguments[len(name) - 1 :], **options)

    def adopt(self) -> None:
        self.module.memory.attach(self.sessions)

    def add(self, text: str, **labels: str) -> int:
        with self.sessions() as session:
            note = self.module.Note(text=text)
            session.add(note)
            if labels:
                self.module.memory.annotate(session, **labels)
            session.commit()
            return int(note.id)

    def texts(self) -> list[str]:
        with self.sessions() as session:
            return list(session.scalars(select(self.module.Note.text).order_by(self.module.Note.id)))


def invoke(
    *arguments: str, exit_code: int = 0, input: str | None = None, stdout: bool = False, columns: int = 200
) -> str:
    """Run the command line. Returns its output on the terminal, or on *stdout* only."""
    environment = {"COLUMNS": str(columns), "TERM": "dumb"}
    result = CliRunner().invoke(cli.application(), list(arguments), input=input, env=environment)
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    assert result.exit_code == exit_code, result.output
    return str(result.stdout if stdout else result.output)


def flat(output: str) -> str:
    """*output* without the box and the line breaks of an error."""
    return " ".join(output.replace("│", " ").split())


@pytest.fixture
def bare(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Application]:
    """An application whose database has only its own tables."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [str(tmp_path), *sys.path])
    application = Application(tmp_path)
    application.module.Base.metadata.create_all(application.engine)
    yield application
    application.engine.dispose()


@pytest.fixture
def app(bare: Application) -> Application:
    """An application that has adopted memstate_sa."""
    bare.run("init")
    bare.adopt()
    return bare


def add_dead_key(app: Application, key: int) -> None:
    """Have the index refuse the note *key* too often."""
    with app.engine.begin() as connection:
        at = connection.execute(select(cursor.c.index, cursor.c.incarnation)).mappings().one()
        values = {"entity": "note", "slot": 0, "attempts": 8, "next_at": utcnow(), "state": "dead", "mark": "x"}
        letter = {**at, **values, "key": f"[{key}]", "error": "DeliveryRejected from ValueError"}
        connection.execute(insert(parked), letter)
