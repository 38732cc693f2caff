"""The documentation is true: its Python blocks run, in order, as a reader would run them."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
BLOCK = re.compile(r"^```python\n(.*?)^```$", re.MULTILINE | re.DOTALL)


@pytest.mark.deep_on("docs/reindex.md", "docs/langgraph.md")
@pytest.mark.parametrize("document", ["README.md", "docs/reindex.md", "docs/langgraph.md"])
def test_python_blocks_run(document: str, tmp_path: Path) -> None:
    """All blocks of a document, one after the other as one script in an empty folder; no warning either."""
    pytest.importorskip("chromadb")
    pytest.importorskip("wordllama")
    pytest.importorskip("langgraph.graph")
    script = tmp_path / "document.py"
    script.write_text("\n".join(match.group(1) for match in BLOCK.finditer((ROOT / document).read_text())))
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    subprocess.run([sys.executable, "-W", "error", script.name], cwd=tmp_path, env=environment, check=True)


def test_links_lead_somewhere() -> None:
    """Every relative link of the documents."""
    for document in (ROOT / "README.md", *(ROOT / "docs").glob("*.md")):
        for target in re.findall(r"\]\((?!http)([^)#]+)", document.read_text()):
            assert (document.parent / target).exists(), f"{document.name}: {target}"


def test_each_guarantee_links_to_its_tests() -> None:
    """A folder with tests in it, for each row of the README's table."""
    table = (ROOT / "README.md").read_text().split("| | guarantee | limit |\n")[1].split("\n\n")[0]
    rows = table.splitlines()[1:]
    assert len(rows) >= 12
    for row in rows:
        link = re.match(r"\| \[[^]]+\]\((tests/[^)]+)\) \| ", row)
        assert link, f"no link to tests: {row[:60]}"
        assert any((ROOT / link.group(1)).glob("test_*.py")), link.group(1)
