"""The folder of a Chroma PersistentClient, locked for one process."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from pathlib import Path
from typing import TYPE_CHECKING

from filelock import BaseFileLock, FileLock, Timeout

from memstate_sa.errors import DeliveryRetryable, MemstateError

if TYPE_CHECKING:
    from chromadb.api import ClientAPI

_counting = threading.Lock()  # filelock counts the holders of one lock file, but not atomically


def lock(client: ClientAPI) -> LockedFolder | None:
    """Lock the folder of *client*, or None when it has none. Several holders in one process share the lock.

    Raises MemstateError, naming server mode, when another process holds it.
    """
    settings = client.get_settings()
    if not settings.is_persistent:
        return None
    path = Path(settings.persist_directory).resolve()
    folder = LockedFolder(
        path / "chroma.sqlite3", FileLock(path / "memstate.lock", thread_local=False, is_singleton=True)
    )
    folder.check()
    folder.acquire()
    return folder


class LockedFolder:
    def __init__(self, database: Path, file_lock: BaseFileLock) -> None:
        self._database = database
        self._lock = file_lock
        self._identity = _identity(database)
        self._pid = os.getpid()

    def acquire(self) -> None:
        try:
            with _counting:
                self._lock.acquire(blocking=False)
        except Timeout as error:
            path = self._database.parent
            raise MemstateError(
                f"another process has the Chroma folder {str(path)!r} open, and two would corrupt it. Run a server "
                f"(chroma run --path {path}) and give every process a chromadb.HttpClient"
            ) from error

    def vacuum(self) -> None:
        """Remove from the files what was deleted. Chroma's own connections wait meanwhile."""
        script = Path(__file__).with_name("_vacuum.py")
        command = [sys.executable, str(script), str(self._database.parent)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)  # noqa: S603  # no shell reads it
        if done.returncode:
            reason = done.stderr.strip().rpartition("\n")[2]
            raise DeliveryRetryable(f"the Chroma folder {str(self._database.parent)!r} was not vacuumed: {reason}")

    def release(self) -> None:
        if os.getpid() == self._pid:  # after a fork it is the parent's
            with _counting:
                self._lock.release()

    def check(self) -> None:
        """Raise for what Chroma does not notice: a fork, and files deleted under it, which it goes on reading."""
        if os.getpid() != self._pid:
            raise MemstateError(
                "this ChromaIndex was opened before a fork, and its folder is the parent's. Open it after the fork, in "
                "one process, or run a server (chroma run) and give every process a chromadb.HttpClient"
            )
        if self._identity is None or _identity(self._database) != self._identity:
            raise DeliveryRetryable(
                f"the Chroma folder {str(self._database.parent)!r} was deleted or replaced under its client; close "
                "every client on it and open it anew"
            )


def _identity(path: Path) -> tuple[int, int] | None:
    try:
        status = path.stat()
    except OSError:
        return None
    return status.st_dev, status.st_ino
