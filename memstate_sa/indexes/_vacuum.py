"""Remove deleted points from the files of a Chroma folder: ``python _vacuum.py FOLDER``, in a separate process.

Python and Chroma each bring a copy of SQLite. In one process, each copy would release the other's locks on a file
(https://sqlite.org/howtocorrupt.html, "Multiple copies of SQLite linked into the same application").
"""

from __future__ import annotations

import shutil
import sqlite3
import sys
from contextlib import closing
from pathlib import Path


def main(folder: Path) -> None:
    # List the files before reading the rows. Chroma writes a new segment's row before its files, so every listed
    # segment that is in use has its row.
    vectors = [path for path in folder.iterdir() if (path / "header.bin").is_file()]
    with closing(sqlite3.connect(folder / "chroma.sqlite3", timeout=30, isolation_level=None)) as connection:
        # Chroma never empties this queue in a folder that is older than its setting "automatically_purge".
        connection.execute(
            "DELETE FROM embeddings_queue WHERE NOT EXISTS (SELECT 1 FROM collections WHERE topic LIKE '%' || id)"
        )
        # The full-text index holds the words of deleted documents until it is rebuilt.
        connection.execute("INSERT INTO embedding_fulltext_search (embedding_fulltext_search) VALUES ('rebuild')")
        connection.execute("VACUUM")
        connection.execute("PRAGMA wal_checkpoint(TRUNCATE)")  # this does nothing if there is no WAL file
        segments = {id_ for (id_,) in connection.execute("SELECT id FROM segments")}
    for path in vectors:
        if path.name not in segments:  # Chroma leaves the vectors of a deleted collection there
            shutil.rmtree(path)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
