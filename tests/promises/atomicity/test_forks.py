"""A process that forks: gunicorn --preload, uWSGI, multiprocessing."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import Engine, create_engine

pytestmark = pytest.mark.sa20
ROOT = Path(__file__).resolve().parents[3]


def run(scenario: str, engine: Engine) -> dict[str, Any]:
    url = engine.url.render_as_string(hide_password=False)
    command = [sys.executable, "-W", "ignore", "-m", "tests.promises.atomicity.fork_master", scenario, url]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)  # type: ignore[no-any-return]


@pytest.mark.deep
@pytest.mark.deep_on("sqlite")
def test_child_that_closes_its_memory_leaves_the_parents_relay_alone(engine: Engine) -> None:
    """The same kind: stop(), drain() and run_once() in a child, a child that exits, a child of a child."""
    seen = run("relay", engine)
    assert seen == {
        "the lease stays": True,
        "the listener was not woken": True,
        "the child has another name": True,
        "slots lost": 0,
        "indexed": ['tag["after"]', 'tag["before"]', 'tag["in the child"]'],
    }


@pytest.mark.deep_on("sqlite")
def test_children_have_connections_of_their_own(engine: Engine) -> None:
    """The same kind: the checkpointer's and the store's engines, engines beside an AsyncEngine, and own pools."""
    assert run("store", engine) == {"children": [[0, 1, 2, 3, 4]] * 2, "parent": 11}


@pytest.mark.deep
@pytest.mark.deep_on("sqlite")
def test_search_in_a_child_does_not_believe_the_parents_index(engine: Engine) -> None:
    """A fork copies an in-memory index, which then changes separately. The same kind: any state of one process."""
    seen = run("search", engine)
    assert "late" in seen["found"]
    assert seen["complete"] is False


@pytest.mark.deep
def test_parent_that_closes_sqlite_leaves_a_child_its_log(sqlite_engine: Engine) -> None:
    """SQLite would treat the child's connections as closed, and delete the file that they write to."""
    assert run("wal", sqlite_engine) == {"found": [0, 1, 2]}


@pytest.mark.deep
def test_child_does_not_wait_for_a_lock_of_a_database_in_memory() -> None:
    assert run("memory", create_engine("sqlite://")) == {"child": [True, 1], "parent": 0}


@pytest.mark.deep
@pytest.mark.deep_on("postgres")
def test_graphs_of_a_child_have_threads_of_their_own(engine: Engine) -> None:
    """The parent's threads and the holders of its locks are not in the child. The same kind: objects with threads."""
    pytest.importorskip("langgraph.graph")
    assert run("graph", engine) == {"child": ["before", "child"], "parent": ["before", "child", "parent"]}
