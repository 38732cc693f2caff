"""The installed package: the wheel with our migrations, and the entry point that Alembic loads at each import."""

from __future__ import annotations

import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
from sqlalchemy import create_engine

import memstate_sa
from tests.adapters.alembic.application import contents

ROOT = Path(__file__).parents[3]


def python(code: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)


@pytest.mark.deep
def test_the_wheel_carries_our_migrations(tmp_path: Path) -> None:
    """They are inside the package, not in alembic/, which would land inside Alembic. They run from there."""
    build = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(tmp_path), str(ROOT)]
    subprocess.run(build, check=True, capture_output=True)
    [wheel] = tmp_path.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        names = [name for name in archive.namelist() if "__pycache__" not in name]
        archive.extractall(tmp_path / "site")
    assert {name.split("/")[0] for name in names if ".dist-info" not in name} == {"memstate_sa"}
    carried = {name.removeprefix("memstate_sa/_migrations/") for name in names if "/_migrations/" in name}
    there = {str(path.relative_to(ROOT / "alembic")) for path in (ROOT / "alembic").rglob("*") if path.is_file()}
    assert carried == {name for name in there if "__pycache__" not in name}
    assert not any(name.endswith("__init__.py") for name in carried)
    assert {f"memstate_sa/capture/sql/{dialect}.sql" for dialect in ("postgresql", "sqlite")} <= set(names)
    environment = {**os.environ, "PYTHONPATH": str(tmp_path / "site")}
    shown = subprocess.run(
        [sys.executable, "-c", "from memstate_sa.migrations import location; print(location())"],
        check=True, capture_output=True, text=True, env=environment, cwd=tmp_path,
    )  # fmt: skip
    assert Path(shown.stdout.strip()) == tmp_path / "site" / "memstate_sa" / "_migrations"
    url = f"url=sqlite:///{tmp_path / 'wheel.db'}"
    upgrade = [sys.executable, "-m", "memstate_sa.migrations", "-x", url, "upgrade", "head"]
    subprocess.run(upgrade, check=True, env=environment, cwd=tmp_path)
    engine = create_engine(f"sqlite:///{tmp_path / 'wheel.db'}")
    assert set(contents(engine, ours=True)) == set(memstate_sa.metadata.tables)
    engine.dispose()


@pytest.mark.deep_on("alembic", "alembic.autogenerate.render")
@pytest.mark.parametrize("first", ["alembic", "alembic.autogenerate.render", "memstate_sa.migrations"])
def test_operations_exist_after_imports_in_any_order(first: str) -> None:
    """Alembic loads plugins in the middle of its own imports."""
    python(f"import {first}; from alembic import op; op.memstate_track, op.memstate_untrack, op.memstate_protect_log")


def test_importing_memstate_sa_imports_no_alembic() -> None:
    shown = python("import sys, memstate_sa, memstate_sa.migrations; print('alembic' in sys.modules)")
    assert shown.stdout.strip() == "False"


@pytest.mark.deep_on("comparing", "rendering")
@pytest.mark.parametrize("missing", ["operations", "comparing", "rendering"])
def test_broken_plugin_does_not_stop_alembic(missing: str) -> None:
    """An environment may hold our package and an unrelated Alembic."""
    shown = python(
        f"import sys; sys.modules['memstate_sa.migrations.{missing}'] = None\n"
        "import alembic.command; from alembic import op; print(hasattr(op, 'create_table'))"
    )
    assert shown.stdout.strip() == "True"
    assert "Could not load the Alembic plugin of memstate_sa: ModuleNotFoundError" in shown.stderr
