"""SIGKILL at random moments of a process that writes and relays: no lost commit, and the contents are equal."""

from __future__ import annotations

import multiprocessing
import os
import random
import signal
import time
from pathlib import Path

import pytest

pytest.importorskip("chromadb")

from tests.integration import kill_child

KILLS = int(os.environ.get("MEMSTATE_KILLS", "25"))


@pytest.mark.timeout(60 + 10 * KILLS)
def test_sigkill_at_random_moments(tmp_path: Path) -> None:
    """Killed again and again on one database and one Chroma folder; the next run compares, by content."""
    chance = random.Random(int(os.environ.get("MEMSTATE_SEED", "11")))
    processes = multiprocessing.get_context("forkserver")  # imports once what every run needs
    processes.set_forkserver_preload([kill_child.__name__])
    for kill in range(KILLS):
        receiver, sender = processes.Pipe(duplex=False)
        child = processes.Process(target=kill_child.run, args=(tmp_path, kill, sender))
        child.start()
        sender.close()
        try:
            assert receiver.recv() == "ready"
        except EOFError:
            pytest.fail(f"run {kill} found something wrong, or did not start")
        time.sleep(chance.uniform(0.0, 0.4))
        child.kill()
        child.join()
        assert child.exitcode == -signal.SIGKILL
    last = processes.Process(target=kill_child.check, args=(tmp_path,))
    last.start()
    last.join()
    assert last.exitcode == 0
