"""``memstate-sa relay --workers`` keeps its processes running. They end with the process that started them."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator

import pytest

pytest.importorskip("typer")
pytest.importorskip("prometheus_client")

from tests.support.commands import ROOT, Application, app, bare

__all__ = ["app", "bare"]

# The command refuses several workers for an index inside one process, and this application has no other index.
SUPERVISE = """
import os
from memstate_sa.cli.processes import supervise
supervise([["--log-json"]] * 2, {name: os.environ[name] for name in ("MEMSTATE_APP", "MEMSTATE_URL")})
"""


@pytest.fixture
def supervisor(app: Application) -> Iterator[subprocess.Popen[str]]:
    """Start the supervisor as the leader of a process group, which is killed at the end."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "MEMSTATE_APP": f"{app.name}:memory", "MEMSTATE_URL": app.url}
    process = subprocess.Popen(
        [sys.executable, "-c", SUPERVISE], env=environment, stderr=subprocess.PIPE, text=True, start_new_session=True
    )
    yield process
    if process.poll() is None:
        os.killpg(process.pid, signal.SIGKILL)
    process.communicate()


@pytest.mark.deep
def test_a_worker_that_is_killed_is_started_again(supervisor: subprocess.Popen[str]) -> None:
    """All workers end with the supervisor."""
    assert supervisor.stderr is not None
    told: list[str] = []

    def delivering() -> int:
        """The next process that reports that it delivers."""
        for line in supervisor.stderr or ():
            told.append(line)
            if line.startswith("{") and (record := json.loads(line))["message"].startswith("delivering"):
                return int(record["process"])
        raise AssertionError(told)

    first = {delivering(), delivering()}
    for pid in first:
        os.kill(pid, signal.SIGKILL)
    again = {delivering(), delivering()}
    assert len(first | again) == 4
    assert {f"worker {n} ended with -9. It starts again in 1 s.\n" for n in (1, 2)} <= set(told)
    supervisor.terminate()
    supervisor.communicate(timeout=60)
    assert supervisor.returncode == 0
    with pytest.raises(ProcessLookupError):
        os.killpg(supervisor.pid, 0)
