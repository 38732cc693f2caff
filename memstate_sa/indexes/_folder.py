"""The folder of a Chroma PersistentClient or a FAISS index, locked for one process."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from pathlib import Path
from typing import TYPE_CHECKING

from filelock import BaseFileLock, FileLock, Timeout

from memstate_sa.errors import DeliveryRetryable, MemstateError
from memstate_sa.indexes._adapter import file_identity

if TYPE_CHECKING:
    from chromadb.api import ClientAPI

_counting = threading.Lock()  # filelock counts the users of one lock file, but not atomically


def lock(client: ClientAPI) -> LockedFolder | None:
    """Lock the folder of *client*. Return None if it has no folder. Several indexes in one process share the lock.

    Raises MemstateError if another process holds the lock. The message explains how to use a server instead.
    """
    settings = client.get_settings()
    if not settings.is_persistent:
        return None
    path = Path(settings.persist_directory).resolve()
    advice = (
        f"Run a server (chroma run --path {path}) and give every process a chromadb.HttpClient. Create the client "
        "after the fork, in the child process."
    )
    folder = LockedFolder(path / "chroma.sqlite3", _file_lock(path, is_singleton=True), "Chroma", advice)
    folder.check()
    folder.acquire()
    return folder


def lock_alone(file: Path, kind: str, advice: str) -> LockedFolder:
    """Lock the folder of *file* for one index. Other indexes in this process cannot share the lock."""
    folder = LockedFolder(file, _file_lock(file.parent, is_singleton=False), kind, advice)
    folder.acquire()
    return folder


def _file_lock(path: Path, *, is_singleton: bool) -> BaseFileLock:
    return FileLock(path / "memstate.lock", thread_local=False, is_singleton=is_singleton)


class LockedFolder:
    """A locked folder. *file* is the index's file in it. *advice* tells a second process how to share the index."""

    def __init__(self, file: Path, file_lock: BaseFileLock, kind: str, advice: str) -> None:
        self._file = file
        self._lock = file_lock
        self._kind, self._advice = kind, advice
        self._pid = os.getpid()
        self.watch()

    def watch(self) -> None:
        """Remember the present file. `check` fails when another file takes its place."""
        self._identity = file_identity(self._file)

    def acquire(self) -> None:
        try:
            with _counting:
                self._lock.acquire(blocking=False)
        except Timeout as error:
            raise MemstateError(
                f"Cannot open the {self._kind} folder {str(self._file.parent)!r}. It is already open, perhaps in "
                f"the other process of a reloader, and a second user would corrupt it. {self._advice}"
            ) from error

    def vacuum(self) -> None:
        """Remove deleted points from the files. Chroma's own connections wait until this is done."""
        script = Path(__file__).with_name("_vacuum.py")
        command = [sys.executable, str(script), str(self._file.parent)]
        process = subprocess.run(command, capture_output=True, text=True, check=False)  # noqa: S603  # no shell reads it
        if process.returncode:
            reason = process.stderr.strip().rpartition("\n")[2]
            raise DeliveryRetryable(
                f"Could not vacuum the Chroma folder {str(self._file.parent)!r}: {reason}. Try again."
            )

    def release(self) -> None:
        if os.getpid() == self._pid:  # a forked child must not release its parent's lock
            with _counting:
                self._lock.release()

    def check(self) -> None:
        """Raise an error after a fork, or if the files were deleted. The index would go on with the old files."""
        if os.getpid() != self._pid:
            raise MemstateError(
                f"Cannot use this index after a fork. Its {self._kind} folder belongs to the parent process. "
                f"{self._advice}"
            )
        if self._identity is None or file_identity(self._file) != self._identity:
            raise DeliveryRetryable(
                f"The {self._kind} folder {str(self._file.parent)!r} was deleted or replaced while it was open. Close "
                "every client that uses it, then open it again."
            )
