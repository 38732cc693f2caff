"""SIGKILL at random moments of a process that writes and relays: no lost commit, and the contents are equal."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

pytest.importorskip("chromadb")

ROOT = Path(__file__).parents[2]
KILLS = int(os.environ.get("MEMSTATE_KILLS", "25"))
CHILD = [sys.executable, "-m", "tests.integration.kill_child"]


@pytest.mark.timeout(60 + 10 * KILLS)
def test_sigkill_at_random_moments(tmp_path: Path) -> None:
    """Killed again and again on one database and one Chroma folder; the next run compares, by content."""
    chance = random.Random(int(os.environ.get("MEMSTATE_SEED", "11")))
    for kill in range(KILLS):
        with subprocess.Popen([*CHILD, str(tmp_path), str(kill)], cwd=ROOT, stdout=subprocess.PIPE, text=True) as child:
            assert child.stdout is not None
            assert child.stdout.readline() == "ready\n", f"run {kill} found something wrong, or did not start"
            time.sleep(chance.uniform(0.0, 0.4))
            child.send_signal(signal.SIGKILL)
            assert child.wait() == -signal.SIGKILL
    subprocess.run([*CHILD, str(tmp_path)], cwd=ROOT, check=True)
