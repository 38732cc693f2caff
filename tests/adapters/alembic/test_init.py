"""`memstate-sa init` lists the missing setup, and completes it where it can."""

from __future__ import annotations

import io
import sys
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path

import flask_migrate
import pytest
from alembic import command
from alembic.config import Config
from alembic.script import ScriptDirectory
from sqlalchemy import Engine, create_engine, inspect

from memstate_sa import metadata
from memstate_sa.cli.alembic_project import AlembicProject, edited, find_alembic, find_memories
from tests.adapters.alembic.application import HEAD, contents
from tests.support.commands import invoke

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
    """The application's folder, which is the working directory."""
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
    """The URL of a database with the application's table."""
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
    """Run Alembic by its alembic.ini."""
    function(Config(folder / "alembic.ini", stdout=io.StringIO()), *arguments, **options)  # type: ignore[operator]


def test_without_alembic_tables_and_triggers_are_created(url: str) -> None:
    """init finds the Memory without a name. A dry run does nothing."""
    shown = invoke("init", "--url", url, "--dry-run")
    assert "--app shop.facts:memory" in shown
    assert "✓ a Memory that tracks note" in shown
    assert "✗ tables and triggers in the database" in shown and "memstate_log" in shown
    assert tables(url) == {"note"}
    assert "There is nothing left to do" in invoke("init", "--url", url)
    assert tables(url) > {"note", "memstate_log"}
    assert "There is nothing left to do" in invoke("init", "--url", url, "--dry-run")


MORE = """
class Tag(Base):
    __tablename__ = "tag"
    id: Mapped[int] = mapped_column(primary_key=True)

class Word(Base):
    __tablename__ = "word"
    id: Mapped[int] = mapped_column(primary_key=True)

memory.track(Tag, text=None, capture="trigger")
memory.track(Word, text=None, capture="trigger")
"""


def test_init_reports_each_problem_once_with_all_names(folder: Path, url: str) -> None:
    """The problem names all tables (the application's too) and all triggers. A changed trigger is named."""
    (folder / "shop" / "facts.py").write_text(SHOP + MORE)
    shown = invoke("init", "--url", url, "--dry-run")
    to_do = shown[shown.index("✗ tables and triggers") :]
    assert to_do.count("does not exist") == to_do.count("has no table") == 1
    assert all(name in to_do for name in metadata.tables) and "tag, word" in to_do
    assert max(map(len, to_do.splitlines())) < 100
    engine = create_engine(url)
    with engine.begin() as connection:
        connection.exec_driver_sql("CREATE TABLE tag (id INTEGER NOT NULL, PRIMARY KEY (id))")
        connection.exec_driver_sql("CREATE TABLE word (id INTEGER NOT NULL, PRIMARY KEY (id))")
        metadata.create_all(connection)
    untriggered = invoke("init", "--url", url, "--dry-run")
    assert untriggered.count("has none of its triggers") == 1 and "note, tag, word" in untriggered
    invoke("init", "--url", url)
    with engine.begin() as connection:
        named = "SELECT name FROM sqlite_master WHERE name LIKE 'memstate%delete%' AND tbl_name = 'tag'"
        gone = connection.exec_driver_sql(named).scalar_one()
        connection.exec_driver_sql(f"DROP TRIGGER {gone}")
    engine.dispose()
    assert f"tag lacks the current trigger {gone}" in invoke("init", "--url", url, "--dry-run")


@pytest.mark.parametrize(
    ("metadata", "with_ours"),
    [
        ("Base.metadata", "[Base.metadata, memstate_sa.metadata]"),
        ("(Base.metadata,)", "(Base.metadata, memstate_sa.metadata)"),
    ],
)
def test_init_with_alembic_leaves_creation_to_a_migration(
    folder: Path, url: str, metadata: str, with_ours: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a project as made by `alembic init`, init adds two lines to env.py, and the revision does the rest."""
    # This env.py calls fileConfig, which would switch off every logger of this process.
    monkeypatch.setattr("logging.config.fileConfig", lambda _: None)
    run_alembic(folder, command.init, directory=str(folder / "migrations"))
    ini, env = folder / "alembic.ini", folder / "migrations" / "env.py"
    config = ini.read_text().replace("driver://user:pass@localhost/dbname", url)
    ini.write_text(config.replace(str(folder), "%(here)s"))
    written = env.read_text()
    env.write_text(
        written.replace("target_metadata = None", f"from shop.facts import Base\n\ntarget_metadata = {metadata}")
    )
    before = env.read_text()

    shown = invoke("init", "--url", url)
    assert "3 of 5 items" in shown
    assert "memstate_sa.metadata" in shown and "alembic revision --autogenerate" in shown
    assert f"+target_metadata = {with_ours}" in invoke("init", "--url", url, "--apply", "--dry-run")
    assert "Edit" in invoke("init", "--url", url, "--apply", input="n\n", exit_code=0)
    assert (env.read_text(), tables(url)) == (before, {"note"})

    assert "1 of 5 items" in invoke("init", "--url", url, "--apply", "--yes")
    assert env.read_text().count("autogenerate_plugins") == 2  # online and offline
    run_alembic(folder, command.stamp, "base")
    run_alembic(folder, command.revision, message="memstate_sa", autogenerate=True)
    run_alembic(folder, command.upgrade, "head")
    run_alembic(folder, command.check)
    assert "There is nothing left to do" in invoke("init", "--url", url)
    edited_once = env.read_text()
    assert "There is nothing left to do" in invoke("init", "--url", url, "--apply", "--yes")
    assert env.read_text() == edited_once


def test_init_with_create_tables_bypasses_alembic(folder: Path, url: str) -> None:
    """A prototype may do this."""
    (folder / "migrations").mkdir()
    (folder / "migrations" / "env.py").write_text("")
    (folder / "pyproject.toml").write_text('[tool.alembic]\nscript_location = "%(here)s/migrations"\n')
    invoke("init", "--url", url)
    assert tables(url) == {"note"}
    invoke("init", "--url", url, "--create-tables")
    assert tables(url) > {"note", "memstate_log"}


LOCATIONS = {
    "a path": ("alembic.ini", "[alembic]\nscript_location = %(here)s/shop/migrations\n"),
    "a package": ("alembic.ini", "[alembic]\nscript_location = shop:migrations\n"),
    "inside of a package": ("alembic.ini", "[alembic]\nscript_location = shop.migrations:\n"),
    "pyproject.toml": ("pyproject.toml", '[tool.alembic]\nscript_location = "shop:migrations"\n'),
}


@pytest.mark.parametrize("src", ["", "src"])
@pytest.mark.parametrize("location", LOCATIONS)
def test_init_finds_alembic_wherever_its_config_points(folder: Path, url: str, location: str, src: str) -> None:
    """Then no table is created. A package around the configuration is not imported."""
    name, content = LOCATIONS[location]
    if src:
        (folder / src).mkdir()
        (folder / "shop").rename(folder / src / "shop")
        content = content.replace("%(here)s/", "%(here)s/src/")
    env = folder / src / "shop" / "migrations" / "env.py"
    env.parent.mkdir()
    env.write_text("")
    (folder / name).write_text(content)
    found = find_alembic(folder)
    assert found is not None and "shop" not in sys.modules
    assert found.env.resolve() == env.resolve()
    if name == "alembic.ini":
        assert Path(ScriptDirectory.from_config(Config(folder / name)).dir).resolve() == env.parent.resolve()
    invoke("init", "--url", url)
    assert tables(url) == {"note"}


FLASK_MIGRATE = (Path(flask_migrate.__file__).parent / "templates" / "flask" / "env.py").read_text()
FLASK_SHOP = """
from types import SimpleNamespace
from flask import Flask
from flask_migrate import Migrate

app = Flask("shop")
db = SimpleNamespace(metadata=Base.metadata, engine=sa.create_engine(URL, poolclass=sa.NullPool))
Migrate(app, db, "migrations"OPTIONS)
"""
NAMES_US = ', autogenerate_plugins=["alembic.autogenerate.*", "memstate_sa"]'


@pytest.mark.parametrize("options", ["", NAMES_US])
def test_flask_migrate_creates_tables_and_triggers(
    folder: Path, url: str, options: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """init adds the missing lines to its env.py. A plugin that is passed to Migrate() is not named twice."""
    monkeypatch.setattr("logging.config.fileConfig", lambda _: None)
    monkeypatch.syspath_prepend(folder)
    facts = folder / "shop" / "facts.py"
    facts.write_text(SHOP + FLASK_SHOP.replace("URL", repr(url)).replace("OPTIONS", options))
    app = import_module("shop.facts").app
    with app.app_context():
        flask_migrate.init()
        assert "1 of 5 items" in invoke("init", "--url", url, "--apply", "--yes")
        source = (folder / "migrations" / "env.py").read_text()
        assert source.count("[get_metadata(), memstate_sa.metadata]") == 2
        assert source.count("autogenerate_plugins") == (0 if options else 2)
        flask_migrate.stamp()
        flask_migrate.migrate()
        flask_migrate.upgrade()
    assert "There is nothing left to do" in invoke("init", "--url", url, "--apply", "--yes")


def test_plugins_that_migrate_is_given_lack_ours(folder: Path, url: str) -> None:
    """The checklist names the module with the other plugins."""
    (folder / "shop" / "web.py").write_text("Migrate(app, db, autogenerate_plugins=['alembic.autogenerate.*'])\n")
    (folder / "migrations").mkdir()
    (folder / "migrations" / "env.py").write_text(FLASK_MIGRATE)
    shown = invoke("init", "--url", url, "--apply", "--yes")
    assert "✗ our plugin in web.py\n    Migrate(..., autogenerate_plugins=[" in shown
    assert "autogenerate_plugins" not in (folder / "migrations" / "env.py").read_text()
    assert "it has an unusual form" not in invoke("init", "--url", url, "--apply", "--yes")


@pytest.mark.parametrize(
    ("place", "config", "to_do"),
    [
        ("migrations", "migrations/alembic.ini", "flask db migrate"),
        ("db/versioned", "db/alembic.ini", "flask db migrate"),
        ("migrations", None, "flask db migrate"),
    ],
)
def test_an_env_py_is_a_sign_of_alembic(folder: Path, url: str, place: str, config: str | None, to_do: str) -> None:
    """Flask-Migrate has no alembic.ini with the location. Other projects keep it elsewhere."""
    env = folder / place / "env.py"
    env.parent.mkdir(parents=True)
    env.write_text(FLASK_MIGRATE)
    if config is not None:
        (folder / config).write_text("[alembic]\n# file_template = %%(rev)s_%%(slug)s\n")
    for elsewhere in ("tests", ".venv/lib", "node_modules/x"):
        (folder / elsewhere).mkdir(parents=True)
        (folder / elsewhere / "env.py").write_text("from alembic import context\n")
    assert to_do in invoke("init", "--url", url, "--apply", "--yes")
    assert tables(url) == {"note"}
    assert "target_metadata=[get_metadata(), memstate_sa.metadata],\n" in env.read_text()
    assert find_alembic(folder) is not None
    if config is not None:  # our own migrations, instead of the metadata
        env.write_text(FLASK_MIGRATE)
        (folder / config).write_text("[alembic]\nversion_locations = v memstate_sa:_migrations/versions\n")
        assert "alembic upgrade heads" in invoke("init", "--url", url, "--apply", "--yes")
        assert "memstate_sa.metadata" not in env.read_text()


def test_missing_env_py_does_not_rule_out_alembic(folder: Path, url: str) -> None:
    """env.py may be in a package that is installed elsewhere."""
    (folder / "alembic.ini").write_text("[alembic]\nscript_location = elsewhere:migrations\n")
    assert "✗ our tables in env.py" in invoke("init", "--url", url, "--apply", "--yes")
    assert tables(url) == {"note"}


def test_env_py_of_another_tool_is_no_sign_of_alembic(folder: Path, url: str) -> None:
    (folder / "shop" / "env.py").write_text("import os\n\nDEBUG = 'alembic' in os.environ\n")
    assert find_alembic(folder) is None
    assert "There is nothing left to do" in invoke("init", "--url", url)


@pytest.mark.deep_on("postgres")
def test_a_database_that_alembic_made_is_left_to_it(folder: Path, engine: Engine) -> None:
    """The project's migrations may be elsewhere."""
    url = engine.url.render_as_string(hide_password=False)
    with engine.begin() as connection:
        connection.exec_driver_sql("CREATE TABLE note (id INTEGER NOT NULL, text VARCHAR, PRIMARY KEY (id))")
        connection.exec_driver_sql("CREATE TABLE alembic_version (version_num VARCHAR(32) NOT NULL)")
    assert "Alembic migrates this database" in invoke("init", "--url", url)
    assert set(inspect(engine).get_table_names()) == {"note", "alembic_version"}
    assert "There is nothing left to do" in invoke("init", "--url", url, "--create-tables")
    assert set(inspect(engine).get_table_names()) > {"note", "alembic_version", "memstate_log"}


@pytest.mark.parametrize("migrated", [True, False])
def test_looking_at_a_missing_sqlite_file_does_not_create_it(folder: Path, migrated: bool) -> None:
    """If Alembic creates it, `init` must not."""
    options = [] if migrated else ["--dry-run"]
    if migrated:
        (folder / "env.py").write_text("from alembic import context\n")
    shown = invoke("init", "--url", f"sqlite:///{folder / 'new.db'}", *options)
    assert "✗ tables and triggers in the database" in shown and "memstate_log" in shown
    assert not (folder / "new.db").exists()


def test_init_names_an_env_py_that_it_cannot_edit(folder: Path, url: str) -> None:
    env = folder / "migrations" / "env.py"
    env.parent.mkdir()
    env.write_text("from alembic import context\n\ncontext.configure(*everything())\n")
    shown = invoke("init", "--url", url, "--apply", "--yes")
    assert f"Cannot edit {env}: it has an unusual form" in shown
    assert "✗ our tables in env.py" in shown and "✗ our plugin in env.py" in shown


def test_init_refuses_no_memory_and_several_memories(folder: Path, url: str) -> None:
    """There is no Memory, or there are several."""
    (folder / "shop" / "facts.py").rename(folder / "shop" / "memories.py")
    second = (
        folder / "shop" / "memories.py"
    ).read_text() + "another = Memory(InMemoryIndex(), embedder=HashEmbedder())\n"
    (folder / "shop" / "memories.py").write_text(second)
    assert "This folder has several" in invoke("init", "--url", url, exit_code=2)
    assert "✓ a Memory" in invoke("init", "--url", url, "--dry-run", "--app", "shop.memories:memory")
    (folder / "shop" / "memories.py").unlink()
    assert "No module of this folder has a Memory" in invoke("init", "--url", url, exit_code=2)


def test_a_module_that_cannot_be_imported_is_named(folder: Path, url: str) -> None:
    (folder / "shop" / "broken.py").write_text("from memstate_sa import Memory\nimport nowhere\nmemory = Memory(1)\n")
    shown = invoke("init", "--url", url, exit_code=1)
    assert "Cannot import 'shop.broken'" in shown and "nowhere" in shown


@pytest.mark.parametrize(
    ("locations", "to_do"),
    [
        ("%(here)s/migrations/versions", "revision --autogenerate"),
        ("a memstate_sa:_migrations/versions", "upgrade heads"),
    ],
)
def test_our_branch_needs_no_metadata(folder: Path, url: str, locations: str, to_do: str) -> None:
    """The revisions are among the application's, so init tells it to upgrade to all heads."""
    (folder / "migrations").mkdir()
    (folder / "migrations" / "env.py").write_text("")
    config = f"[alembic]\nscript_location = migrations\nversion_locations = {locations}\nsqlalchemy.url = memstate_sa\n"
    (folder / "alembic.ini").write_text(config)
    assert to_do in invoke("init", "--url", url)


def test_only_modules_that_make_a_memory_are_imported(folder: Path) -> None:
    """Importing a script runs it. init skips scripts that only use a Memory, or make one only as a main program."""
    for name, content in {
        "seed": "from memstate_sa import Memory\nfrom shop.facts import memory\nhow = 'by Memory(…)'\n",
        "demo": "from memstate_sa import Memory\ndef main():\n    memory = Memory(1)\n",
        "main": "from memstate_sa import Memory\nif __name__ == '__main__':\n    memory = Memory(1)\n",
        "broken": "from memstate_sa import Memory\nmemory = Memory(\n",
    }.items():
        (folder / "shop" / f"{name}.py").write_text(
            f"{content}raise RuntimeError('nobody has a reason to import this')\n"
        )
    assert find_memories(folder) == ["shop.facts:memory"]


@pytest.mark.parametrize(
    ("imported", "made"),
    [
        ("from memstate_sa import Memory as Remembering", "memory: Remembering = Remembering"),
        ("import memstate_sa", "memory = memstate_sa.Memory"),
        ("from memstate_sa.memory import Memory", "memory = same = Memory"),
    ],
)
def test_memory_is_found_in_any_form_of_construction(folder: Path, imported: str, made: str) -> None:
    facts = folder / "shop" / "facts.py"
    facts.write_text(facts.read_text().replace("memory = Memory", f"{imported}\n{made}"))
    assert find_memories(folder) == ["shop.facts:memory"]


def test_modules_in_src_are_found(folder: Path) -> None:
    """Modules have the name under which the application imports them."""
    (folder / "src").mkdir()
    (folder / "shop").rename(folder / "src" / "shop")
    assert find_memories(folder) == ["shop.facts:memory"]


def test_folder_without_alembic_is_no_alembic_project() -> None:
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
        ("(Base.metadata,)", "(Base.metadata, memstate_sa.metadata)"),
        ("Base.metadata, more", "Base.metadata, more, memstate_sa.metadata"),
        ("[\n    Base.metadata,  # ours\n]", "[\n    Base.metadata, memstate_sa.metadata  # ours\n]"),
        ("{'é': Base.metadata}['é']", "[{'é': Base.metadata}['é'], memstate_sa.metadata]"),
    ],
)
@pytest.mark.parametrize("has_plugins", [True, False])
def test_edited_env_py_keeps_its_own_lines(before: str, after: str, has_plugins: bool) -> None:
    """Its own lines stay. A second edit changes nothing."""
    source = CONFIGURED.format(before=before).replace("  # all of it", "")
    new = edited(source, has_plugins=has_plugins)
    assert f"target_metadata = {after}\n" in new
    kept = [
        line
        for line in source.replace(before, "").splitlines()
        if line and not line.startswith("target_metadata = ") and "configure(connection" not in line
    ]
    remaining = iter(new.splitlines())
    assert all(line in remaining for line in kept)
    assert "import memstate_sa\n" in new or "import memstate_sa.migrations\n" in new
    if has_plugins:
        named = 'autogenerate_plugins=["alembic.autogenerate.*", "memstate_sa"],'
        one_a_line = f"{named}\n        connection=connection,\n        target_metadata=target_metadata,\n    )\n"
        assert f"    context.configure(\n        {one_a_line}" in new  # it was one line, which became too long
        assert f"context.configure(\n        {named}\n        url=url,\n" in new
    else:
        assert "memstate_sa.migrations.register()\n" in new
    assert edited(new, has_plugins=has_plugins) == new


def test_env_py_is_edited_without_a_url(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A value of target_metadata that is no metadata is left, and init says so."""
    monkeypatch.delenv("MEMSTATE_URL", raising=False)
    run_alembic(folder, command.init, directory=str(folder / "migrations"), template="async")
    env = folder / "migrations" / "env.py"
    told = invoke("init", "--apply", "--yes")
    assert "Cannot edit target_metadata: its value names no metadata of yours." in told
    assert "Not checked. Give --url to check the database." in told
    assert "target_metadata = None\n" in env.read_text()
    assert env.read_text().count("autogenerate_plugins") == 2
    assert max(map(len, env.read_text().splitlines())) <= 88


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ("['alembic.autogenerate.*', 'audit']", "['alembic.autogenerate.*', 'audit', \"memstate_sa\"]"),
        ('[\n        "audit",\n    ]', '[\n        "audit", "memstate_sa"\n    ]'),
        ('[\n        "audit",\n        "memstate_sa",\n    ]', '[\n        "audit",\n        "memstate_sa",\n    ]'),
        ("PLUGINS", "PLUGINS"),
    ],
)
def test_other_plugins_stay(tmp_path: Path, before: str, after: str) -> None:
    """This includes the form of formatters. A list that is built elsewhere is left to the reader if we are missing."""
    source = f"target_metadata = memstate_sa.metadata\ncontext.configure(autogenerate_plugins={before})\n"
    new = edited(source, has_plugins=True)
    assert new == source.replace(before, after)
    (tmp_path / "env.py").write_text(new)
    assert AlembicProject(tmp_path, tmp_path / "env.py").knows_plugin == ("memstate_sa" in after)
    (tmp_path / "env.py").write_text(f"{new}\nPLUGINS = ['memstate_sa']\n")
    assert AlembicProject(tmp_path, tmp_path / "env.py").knows_plugin


def test_commented_lines_of_env_py_do_not_count(tmp_path: Path) -> None:
    env = tmp_path / "env.py"
    env.write_text("# target_metadata = memstate_sa.metadata\n# autogenerate_plugins=['memstate_sa']\n")
    project = AlembicProject(tmp_path / "alembic.ini", env)
    assert not (project.knows_tables or project.knows_plugin)


@pytest.mark.parametrize(
    "source", ["", "target_metadata = None\n", "context.configure(*arguments)\ntarget_metadata: X = Y\n"]
)
def test_an_env_py_that_is_not_understood_stays_as_it_is(source: str) -> None:
    """Half an edit would be worse."""
    assert "target_metadata = [" not in edited(source, has_plugins=True)
    compile(edited(source, has_plugins=True), "env.py", "exec")
