"""The cost of an import, measured by the modules that it loads, because times depend on the machine."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

import memstate_sa

SHOW_MODULES = "import json, sys; print(json.dumps(sorted({name for name in sys.modules})))"
EXTRAS = {
    "aiosqlite",
    "alembic",
    "chromadb",
    "greenlet",
    "langgraph",
    "psycopg",
    "rich",
    "typer",
    "wordllama",
}


def modules_after(statement: str) -> set[str]:
    command = [sys.executable, "-c", f"{statement}; {SHOW_MODULES}"]
    return set(json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout))


@pytest.mark.parametrize(
    ("statement", "heavy"),
    [
        ("import memstate_sa", {"sqlalchemy", "pydantic", "numpy", "memstate_sa.api"}),
        (
            "from memstate_sa import Memory",
            {"memstate_sa.maintenance.export_import", "memstate_sa.indexes.chroma", "difflib"},
        ),
    ],
)
def test_an_import_loads_nothing_heavy(statement: str, heavy: set[str]) -> None:
    assert modules_after(statement) & (heavy | EXTRAS) == set()


def test_the_package_shows_its_public_names_alone() -> None:
    assert dir(memstate_sa) == sorted([*memstate_sa.__all__, "__version__"])
    names: dict[str, object] = {}
    exec("from memstate_sa import *", names)
    assert set(names) - {"__builtins__"} == set(memstate_sa.__all__)
    with pytest.raises(AttributeError, match="no attribute 'Memmory'"):
        _ = memstate_sa.Memmory
