"""Our own migrations create exactly the metadata's tables. Their downgrade leaves nothing."""

from __future__ import annotations

import io
from typing import Any

import pytest
from alembic import command
from alembic.autogenerate import compare_metadata
from alembic.config import Config
from alembic.migration import MigrationContext
from sqlalchemy import Engine, inspect
from sqlalchemy.orm import sessionmaker

import memstate_sa
from memstate_sa import Memory
from memstate_sa.indexes import InMemoryIndex
from memstate_sa.migrations import VERSION_TABLE, __main__, location
from memstate_sa.testing import HashEmbedder
from tests.adapters.alembic.application import contents, routines

pytestmark = pytest.mark.sa20


@pytest.fixture
def engine(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> Engine:
    monkeypatch.setenv("MEMSTATE_URL", engine.url.render_as_string(hide_password=False))
    return engine


def differences(engine: Engine) -> Any:
    with engine.connect() as connection:
        has_identity = engine.dialect.name == "postgresql"
        known = {"compare_type": True, "compare_server_default": has_identity, "version_table": VERSION_TABLE}
        return compare_metadata(MigrationContext.configure(connection, opts=known), memstate_sa.metadata)


def emptied(engine: Engine) -> None:
    if engine.dialect.name == "postgresql":
        with engine.begin() as connection:
            connection.exec_driver_sql("DROP SCHEMA public CASCADE; CREATE SCHEMA public")
    else:
        memstate_sa.metadata.drop_all(engine)


def test_migrations_make_the_tables_of_the_metadata(engine: Engine) -> None:
    """Nothing is missing and nothing is extra: each column, index and trigger is the same."""
    __main__.main(["upgrade", "head"])
    assert differences(engine) == []
    migrated = (contents(engine, ours=True), routines(engine))
    memory = Memory(InMemoryIndex(), embedder=HashEmbedder())
    memory.attach(sessionmaker(engine))
    assert memory.doctor(engine).healthy
    with engine.begin() as connection:
        connection.exec_driver_sql(f"DROP TABLE {VERSION_TABLE}")
    emptied(engine)
    memstate_sa.metadata.create_all(engine)
    created = (contents(engine, ours=True), routines(engine))
    assert migrated == created
    assert set(created[0]) == set(memstate_sa.metadata.tables)


def test_url_may_name_a_driver_for_asyncio(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    driver = "sqlite+aiosqlite" if engine.dialect.name == "sqlite" else "postgresql+psycopg_async"
    url = engine.url.set(drivername=driver).render_as_string(hide_password=False)
    monkeypatch.setenv("MEMSTATE_URL", url)
    __main__.main(["upgrade", "head"])
    assert set(contents(engine, ours=True)) == set(memstate_sa.metadata.tables)


def test_url_of_another_database_is_refused(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("MEMSTATE_URL", "mysql://ada:s3cr3t@host/db")
    with pytest.raises(SystemExit):
        __main__.main(["upgrade", "head"])
    shown = "".join(capsys.readouterr())
    assert "memstate_sa does not support mysql" in shown and "s3cr3t" not in shown


def test_downgrading_leaves_nothing(engine: Engine) -> None:
    """Neither a table nor a function is left. A second upgrade works."""
    before = routines(engine)
    for _ in range(2):
        __main__.main(["upgrade", "head"])
        __main__.main(["downgrade", "base"])
        assert contents(engine, ours=True) == {}
        assert routines(engine) == before
    assert inspect(engine).get_table_names() == [VERSION_TABLE]


def test_offline_script_makes_and_drops_the_same_tables(engine: Engine) -> None:
    """`--sql` connects to no database. Its script creates and drops the same objects as the migrations."""

    def printed(run: Any, revisions: str) -> str:
        out = io.StringIO()
        config = Config(output_buffer=out)
        config.set_main_option("script_location", str(location()))
        run(config, revisions, sql=True)
        return out.getvalue()

    def execute(script: str) -> None:
        connection: Any = engine.raw_connection()
        if engine.dialect.name == "sqlite":
            connection.driver_connection.executescript(script)
        else:
            connection.cursor().execute(script)
        connection.commit()
        connection.close()

    before = routines(engine)
    execute(printed(command.upgrade, "head"))
    assert differences(engine) == []
    offline = (contents(engine, ours=True), routines(engine))
    execute(printed(command.downgrade, "head:base"))
    assert (contents(engine, ours=True), routines(engine)) == ({}, before)
    __main__.main(["upgrade", "head"])
    assert (contents(engine, ours=True), routines(engine)) == offline


def test_migrations_ignore_tables_of_the_application(engine: Engine) -> None:
    """`check` of our migrations reports only our own tables. The application's alembic_version stays as it is."""
    with engine.begin() as connection:
        connection.exec_driver_sql("CREATE TABLE alembic_version (version_num VARCHAR(32) NOT NULL)")
        connection.exec_driver_sql("INSERT INTO alembic_version VALUES ('theirs')")
        connection.exec_driver_sql("CREATE TABLE theirs (id INTEGER PRIMARY KEY)")
    __main__.main(["upgrade", "head"])
    __main__.main(["check"])
    with engine.connect() as connection:
        assert connection.exec_driver_sql("SELECT * FROM alembic_version").scalars().all() == ["theirs"]
    assert set(contents(engine)) == {"theirs"}


def test_command_without_a_url_says_what_to_give(monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    monkeypatch.delenv("MEMSTATE_URL", raising=False)
    with pytest.raises(SystemExit):
        __main__.main(["upgrade", "head"])
    assert "MEMSTATE_URL" in "".join(capsys.readouterr())
    with pytest.raises(SystemExit):
        __main__.main([])
