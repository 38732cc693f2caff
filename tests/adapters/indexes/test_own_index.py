"""The code in docs/how-to/indexes.md runs, and its custom index passes the suite as documented."""

from __future__ import annotations

import re
import sys
import tempfile
from pathlib import Path
from typing import Any

import pytest

BLOCKS = re.findall(
    r"^```python\n(.*?)^```$",
    (Path(__file__).parents[3] / "docs" / "how-to" / "indexes.md").read_text(),
    re.MULTILINE | re.DOTALL,
)
[SOURCE] = [block for block in BLOCKS if "class SqliteIndex" in block]
[TEST] = [block for block in BLOCKS if "class TestSqliteIndex" in block]

FOLDER = tempfile.TemporaryDirectory(prefix="memstate-docs-")
Path(FOLDER.name, "my_index.py").write_text(SOURCE)


def documented() -> dict[str, Any]:
    names: dict[str, Any] = {"__name__": __name__}
    sys.path.insert(0, FOLDER.name)
    try:
        exec(compile(TEST, "docs/how-to/indexes.md", "exec"), names)
    finally:
        sys.path.remove(FOLDER.name)
    return names


class TestSqliteIndex(documented()["TestSqliteIndex"]):  # type: ignore[misc]
    @pytest.fixture(autouse=True)
    def _importable(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """Let the process that is killed import the index."""
        monkeypatch.setenv("PYTHONPATH", FOLDER.name)


def test_other_blocks_of_the_document_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """These blocks open no index."""
    for package in ("faiss", "psycopg", "qdrant_client", "redis"):
        pytest.importorskip(package)
    monkeypatch.chdir(tmp_path)
    others = [block for block in BLOCKS if block not in (SOURCE, TEST)]
    assert others
    for block in others:
        names: dict[str, Any] = {}
        exec(block, names)
        if "client" in names:
            names["client"].close()
