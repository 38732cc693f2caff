"""`memstate-sa init`: what is still to be done, and done where it can be."""

from __future__ import annotations

import io
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from alembic import command
from alembic.config import Config
from sqlalchemy import create_engine

from memstate_sa.adoption import edited, find_alembic, find_memories
from tests.integration.test_cli import invoke
from tests.migration.application import HEAD, contents

SHOP = (
    HEAD
    + """
class Note(Base):
    __tablename__ = "note"
    id: Mapped[int] = mapped_column(primary_key=True)
    text: Mapped[Optional[str]]

memory.track(Note, text="text", capture="trigger")
"""
)


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The folder of an application, which is the working directory."""
    (tmp_path / "shop").mkdir()
    (tmp_path / "shop" / "__init__.py").write_text("")
    (tmp_path / "shop" / "facts.py").write_text(SHOP)
    (tmp_path / "shop" / "other.py").write_text("raise RuntimeError('nobody has a reason to import this')\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    yield tmp_path
    for name in [name for name in sys.modules if name.split(".")[0] == "shop"]:
        del sys.modules[name]


@pytest.fixture
def url(folder: Path) -> str:
    """Of a database that has the application's table."""
    made = f"sqlite:///{folder / 'shop.db'}"
    engine = create_engine(made)
    with engine.begin() as connection:
        connection.exec_driver_sql("CREATE TABLE note (id INTEGER NOT NULL, text VARCHAR, PRIMARY KEY (id))")
    engine.dispose()
    return made


def tables(url: str) -> set[str]:
    engine = create_engine(url)
    found = set(contents(engine, ours=True))
    engine.dispose()
    return found


def run_alembic(folder: Path, function: object, *arguments: str, **options: object) -> None:
    """By its alembic.ini."""
    function(Config(folder / "alembic.ini", stdout=io.StringIO()), *arguments, **options)  # type: ignore[operator]


def test_without_alembic_tables_and_triggers_are_created(url: str) -> None:
    """The Memory is found by itself; a dry run does nothing."""
    shown = invoke("init", "--url", url, "--dry-run")
    assert "--app shop.facts:memory" in shown
    assert "✓ a Memory that tracks note" in shown
    assert "✗ tables and triggers in the database" in shown and "memstate_log is not there" in shown
    assert tables(url) == {"note"}
    assert "There is nothing left to do" in invoke("init", "--url", url)
    assert tables(url) > {"note", "memstate_log"}
    assert "There is nothing left to do" in invoke("init", "--url", url, "--dry-run")


def test_with_alembic_a_migration_creates_them(folder: Path, url: str) -> None:
    """On a project as `alembic init` makes it: init adds two lines to env.py, and the revision does the rest."""
    run_alembic(folder, command.init, directory=str(folder / "migrations"))
    ini, env = folder / "alembic.ini", folder / "migrations" / "env.py"
    config = ini.read_text().replace("driver://user:pass@localhost/dbname", url)
    ini.write_text(config.replace(str(folder), "%(here)s"))
    written = env.read_text()
    env.write_text(
        written.replace("target_metadata = None", "from shop.facts import Base\n\ntarget_metadata = Base.metadata")
    )
    before = env.read_text()

    shown = invoke("init", "--url", url)
    assert "3 of 5 steps are left" in shown
    assert "memstate_sa.metadata" in shown and "alembic revision --autogenerate" in shown
    assert "+target_metadata = [Base.metadata, memstate_sa.metadata]" in invoke(
        "init", "--url", url, "--apply", "--dry-run"
    )
    assert "Edit" in invoke("init", "--url", url, "--apply", input="n\n", exit_code=0)
    assert (env.read_text(), tables(url)) == (before, {"note"})

    assert "1 of 5 steps are left" in invoke("init", "--url", url, "--apply", "--yes")
    assert env.read_text().count("autogenerate_plugins") == 2  # online and offline
    run_alembic(folder, command.stamp, "base")
    run_alembic(folder, command.revision, message="memstate_sa", autogenerate=True)
    run_alembic(folder, command.upgrade, "head")
    run_alembic(folder, command.check)
    assert "There is nothing left to do" in invoke("init", "--url", url)
    edited_once = env.read_text()
    assert "There is nothing left to do" in invoke("init", "--url", url, "--apply", "--yes")
    assert env.read_text() == edited_once


def test_create_tables_goes_past_alembic_when_it_is_told_to(folder: Path, url: str) -> None:
    """For a prototype."""
    (folder / "migrations").mkdir()
    (folder / "migrations" / "env.py").write_text("")
    (folder / "pyproject.toml").write_text('[tool.alembic]\nscript_location = "%(here)s/migrations"\n')
    invoke("init", "--url", url)
    assert tables(url) == {"note"}
    invoke("init", "--url", url, "--create-tables")
    assert tables(url) > {"note", "memstate_log"}


def test_what_cannot_be_found_is_said(folder: Path, url: str) -> None:
    """No Memory, and several."""
    (folder / "shop" / "facts.py").rename(folder / "shop" / "memories.py")
    second = (
        folder / "shop" / "memories.py"
    ).read_text() + "another = Memory(InMemoryIndex(), embedder=HashEmbedder())\n"
    (folder / "shop" / "memories.py").write_text(second)
    assert "there are several" in invoke("init", "--url", url, exit_code=2)
    assert "✓ a Memory" in invoke("init", "--url", url, "--dry-run", "--app", "shop.memories:memory")
    (folder / "shop" / "memories.py").unlink()
    assert "no module of this folder has a Memory" in invoke("init", "--url", url, exit_code=2)


def test_a_module_that_cannot_be_imported_is_named(folder: Path, url: str) -> None:
    (folder / "shop" / "broken.py").write_text("from memstate_sa import Memory\nimport nowhere\nmemory = Memory(1)\n")
    shown = invoke("init", "--url", url, exit_code=1)
    assert "shop.broken cannot be imported" in shown and "nowhere" in shown


@pytest.mark.parametrize(
    ("locations", "to_do"),
    [
        ("%(here)s/migrations/versions", "revision --autogenerate"),
        ("a memstate_sa:_migrations/versions", "upgrade heads"),
    ],
)
def test_our_branch_needs_no_metadata(folder: Path, url: str, locations: str, to_do: str) -> None:
    """Whose revisions are among the application's, is told to upgrade to all heads."""
    (folder / "migrations").mkdir()
    (folder / "migrations" / "env.py").write_text("")
    config = f"[alembic]\nscript_location = migrations\nversion_locations = {locations}\nsqlalchemy.url = memstate_sa\n"
    (folder / "alembic.ini").write_text(config)
    assert to_do in invoke("init", "--url", url)


def test_modules_in_src_are_found(folder: Path) -> None:
    """By the name under which the application imports them."""
    (folder / "src").mkdir()
    (folder / "shop").rename(folder / "src" / "shop")
    assert find_memories(folder) == ["shop.facts:memory"]


def test_a_project_that_is_none() -> None:
    assert find_alembic(Path(__file__).parent) is None


CONFIGURED = """import os
from alembic import context
from shop import (
    Base,
    more,
)

target_metadata = {before}  # all of it

def online():
    context.configure(connection=connection, target_metadata=target_metadata)

def offline():
    context.configure(
        url=url,
        target_metadata=target_metadata,
    )
"""


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ("Base.metadata", "[Base.metadata, memstate_sa.metadata]"),
        ("[Base.metadata, more]", "[Base.metadata, more, memstate_sa.metadata]"),
        ("[Base.metadata,]", "[Base.metadata, memstate_sa.metadata]"),
    ],
)
@pytest.mark.parametrize("has_plugins", [True, False])
def test_what_becomes_of_an_env_py(before: str, after: str, has_plugins: bool) -> None:
    """Its own lines stay; edited twice, it is as edited once."""
    source = CONFIGURED.format(before=before).replace("  # all of it", "")
    new = edited(source, has_plugins=has_plugins)
    assert f"target_metadata = {after}\n" in new
    kept = [
        line for line in source.splitlines() if "target_metadata = " not in line and "configure(connection" not in line
    ]
    remaining = iter(new.splitlines())
    assert all(line in remaining for line in kept)
    assert "import memstate_sa\n" in new or "import memstate_sa.migrations\n" in new
    if has_plugins:
        named = 'autogenerate_plugins=["alembic.autogenerate.*", "memstate_sa"],'
        assert f"context.configure({named} connection=connection" in new
        assert f"context.configure(\n        {named}\n        url=url,\n" in new
    else:
        assert "memstate_sa.migrations.register()\n" in new
    assert edited(new, has_plugins=has_plugins) == new


@pytest.mark.parametrize(
    "source", ["", "target_metadata = None\n", "context.configure(*arguments)\ntarget_metadata: X = Y\n"]
)
def test_an_env_py_that_is_not_understood_stays_as_it_is(source: str) -> None:
    """Half an edit would be worse."""
    assert "target_metadata = [" not in edited(source, has_plugins=True)
    compile(edited(source, has_plugins=True), "env.py", "exec")
