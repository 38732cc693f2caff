"""SIGKILL at random moments of a graph whose nodes write facts: after the resume, each fact exists once."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from sqlalchemy import Engine

pytest.importorskip("langgraph.graph")

from benchmarks.langgraph_crashes import kill_again_and_again
from tests.support import PATIENCE_S, sizes

KILLS = int(os.environ.get("MEMSTATE_GRAPH_KILLS", "12"))


@pytest.mark.deep_on("postgres")
@pytest.mark.timeout(PATIENCE_S)
@pytest.mark.parametrize("kills", sizes(2, KILLS))
def test_graph_resumed_after_sigkill_has_each_fact_once(engine: Engine, tmp_path: Path, kills: int) -> None:
    """The next process resumes the killed thread. In the end all facts are compared with the expected ones."""
    url = engine.url.render_as_string(hide_password=False)
    verdict = kill_again_and_again(url, tmp_path, "step", kills, int(os.environ.get("MEMSTATE_SEED", "7")))
    assert verdict.doubled == [] and verdict.lost == [] and verdict.threads >= kills
