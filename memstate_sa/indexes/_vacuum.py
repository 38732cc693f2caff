"""Run in a process of its own: ``python _vacuum.py FOLDER`` removes from a Chroma folder what was deleted there.

Two copies of SQLite in one process, Python's and Chroma's, would let go of each other's locks on the same file
(https://sqlite.org/howtocorrupt.html, "Multiple copies of SQLite linked into the same application").
"""

from __future__ import annotations

import shutil
import sqlite3
import sys
from contextlib import closing
from pathlib import Path


def main(folder: Path) -> None:
    # Before the segments are read: of one that is made meanwhile, the row comes first.
    vectors = [path for path in folder.iterdir() if (path / "header.bin").is_file()]
    with closing(sqlite3.connect(folder / "chroma.sqlite3", timeout=30, isolation_level=None)) as connection:
        # A folder of before "automatically_purge" keeps every write that there ever was.
        connection.execute(
            "DELETE FROM embeddings_queue WHERE NOT EXISTS (SELECT 1 FROM collections WHERE topic LIKE '%' || id)"
        )
        # Until its pieces are merged, the index of words holds those of documents that are gone.
        connection.execute("INSERT INTO embedding_fulltext_search (embedding_fulltext_search) VALUES ('rebuild')")
        connection.execute("VACUUM")
        connection.execute("PRAGMA wal_checkpoint(TRUNCATE)")  # does nothing where there is none
        segments = {id_ for (id_,) in connection.execute("SELECT id FROM segments")}
    for path in vectors:
        if path.name not in segments:  # Chroma leaves the vectors of a deleted collection there
            shutil.rmtree(path)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
