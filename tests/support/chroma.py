"""Clients of Chroma."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import chromadb
from chromadb.api import ClientAPI


@contextmanager
def persistent(path: Path) -> Iterator[ClientAPI]:
    client = chromadb.PersistentClient(str(path))
    try:
        yield client
    finally:
        client.close()  # type: ignore[attr-defined]  # ClientAPI does not declare it
