"""The index of docs/indexes.md passes the suite, in the words of the document."""

from __future__ import annotations

import re
import sys
import tempfile
from pathlib import Path
from typing import Any

import pytest

BLOCKS = re.findall(r"^```python\n(.*?)^```$", Path("docs/indexes.md").read_text(), re.MULTILINE | re.DOTALL)
[SOURCE] = [block for block in BLOCKS if "class SqliteIndex" in block]
[TEST] = [block for block in BLOCKS if "class TestSqliteIndex" in block]

FOLDER = tempfile.TemporaryDirectory(prefix="memstate-docs-")
Path(FOLDER.name, "my_index.py").write_text(SOURCE)


def documented() -> dict[str, Any]:
    names: dict[str, Any] = {"__name__": __name__}
    sys.path.insert(0, FOLDER.name)
    try:
        exec(compile(TEST, "docs/indexes.md", "exec"), names)
    finally:
        sys.path.remove(FOLDER.name)
    return names


class TestSqliteIndex(documented()["TestSqliteIndex"]):  # type: ignore[misc]
    @pytest.fixture(autouse=True)
    def _importable(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """For the process that is killed."""
        monkeypatch.setenv("PYTHONPATH", FOLDER.name)
