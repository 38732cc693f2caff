"""Tables of points are in no metadata and do not belong to the application. Autogenerate leaves them alone."""

from __future__ import annotations

from pathlib import Path

import pytest
from sqlalchemy import Engine, inspect

from memstate_sa.indexes import PgVectorIndex
from tests.adapters.alembic.application import HAS_PLUGINS, Application

NAMES = {"memory_points": None, 'odd "name" 🎈': None, "vectors": "ai"}


def write_env(app: Application, *, knows_us: bool) -> None:
    app.write_env(knows_us=knows_us)
    path = app.folder / "env.py"
    path.write_text(path.read_text().replace("render_as_batch", "include_schemas=True, render_as_batch"))


@pytest.mark.filterwarnings("ignore:Did not recognize type 'vector'")
def test_autogenerate_does_not_drop_tables_of_points(tmp_path: Path, postgres_engine: Engine) -> None:
    """This holds for any name and schema. A table of the application with similar columns is still dropped as usual."""
    app = Application(tmp_path / "app", postgres_engine)
    app.write_models("")
    write_env(app, knows_us=False)
    app.execute("CREATE SCHEMA ai")
    try:
        for name, schema in NAMES.items():
            index = PgVectorIndex(postgres_engine, name, schema=schema)
            index.open(embedder="e", dimension=8)
            index.close()
        app.execute("CREATE TABLE other (key BYTEA PRIMARY KEY, id TEXT, epoch BIGINT, fingerprint TEXT, norm FLOAT)")
        if HAS_PLUGINS:
            assert "memory_points" in app.differences()
        write_env(app, knows_us=True)
        source = app.revise("r1")
        assert "drop_table('other')" in source and source.count("drop_table") == 1 and "drop_index" not in source
        app.upgrade()
        found = inspect(postgres_engine)
        assert all(found.has_table(name, schema=schema) for name, schema in NAMES.items())
        assert app.differences() == ""
    finally:
        app.execute("DROP SCHEMA ai CASCADE")
