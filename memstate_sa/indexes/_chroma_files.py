"""Check that the vector files of a Chroma collection are complete. A crash or a copy during use can truncate them.

Chroma does not report such damage. It searches the rest, fails some queries, or crashes the process. This module knows
the file layout that the hnswlib of Chroma 1.x writes. Files with a newer layout count as complete.
"""

from __future__ import annotations

import sqlite3
import struct
import time
from contextlib import closing
from pathlib import Path

import numpy as np

_HEADER = struct.Struct("<iQQQQQQiIQQQdQ")
_VERSION = 1
_FILES = ("header.bin", "data_level0.bin", "length.bin", "link_lists.bin", "index_metadata.pickle")
# Only segments with a row in max_seq_id have files. Chroma reads the points of other segments from its own log.
_SEGMENTS = (
    "SELECT s.id FROM segments AS s JOIN max_seq_id AS m ON m.segment_id = s.id "
    "WHERE s.scope = 'VECTOR' AND s.collection = ?"
)
_LONGEST_ZEROS = 4096
_PAUSES_S = (0.05, 0.2, 0.5)
"""Chroma writes a file in place, so it may look damaged during a write. It is checked again after these pauses."""


def find_damage(folder: Path, collection_id: str) -> str | None:
    """The damage of the collection's files in *folder*. None if they are complete, or not written yet."""
    with closing(sqlite3.connect(f"{(folder / 'chroma.sqlite3').as_uri()}?mode=ro", uri=True)) as connection:
        segments = [folder / id_ for (id_,) in connection.execute(_SEGMENTS, (collection_id,))]
    for pause in _PAUSES_S:
        if _damage_of(segments) is None:
            return None
        time.sleep(pause)
    return _damage_of(segments)


def _damage_of(segments: list[Path]) -> str | None:
    return next((damage for segment in segments if (damage := _damage(segment)) is not None), None)


def _damage(segment: Path) -> str | None:
    if missing := [name for name in _FILES if not (segment / name).is_file()]:
        return f"{', '.join(missing)} is missing"
    header = (segment / "header.bin").read_bytes()
    if len(header) < _HEADER.size:
        return f"header.bin has {len(header)} bytes instead of {_HEADER.size}"
    if len(header) > _HEADER.size or int.from_bytes(header[:4], "little") != _VERSION:
        return None
    _, _, _, count, size, label_at, _, _, _, _, _, links, _, effort = _HEADER.unpack(header)
    if not (links and effort and size >= label_at + 8 > 8):
        return "header.bin holds zeros"
    for name, needed in (("data_level0.bin", count * size), ("length.bin", count * 4)):
        size_on_disk = (segment / name).stat().st_size
        if size_on_disk < needed:
            return f"{name} has {size_on_disk} bytes instead of {needed}"
    if count and not _has_labels(segment / "data_level0.bin", count, size, label_at):
        return "data_level0.bin holds zeros"
    if not _has_links(segment / "link_lists.bin", count):
        return "link_lists.bin is cut, or holds zeros"
    return None if _ends(segment / "index_metadata.pickle") else "index_metadata.pickle is cut"


def _has_labels(file: Path, count: int, size: int, label_at: int) -> bool:
    """Whether the points have the unique numbers, from 1 on, that hnswlib gave them."""
    rows = np.memmap(file, np.uint8, "r", shape=(count, size))
    labels = np.ascontiguousarray(rows[:, label_at : label_at + 8]).view("<u8")
    return bool(labels.all()) and len(np.unique(labels)) == count


def _has_links(file: Path, count: int) -> bool:
    """Whether the file holds a whole list of links for each point. A list begins with its length.

    Most lists are empty, so short runs of zeros are normal. Longer ones mean damage.
    """
    data, at = file.read_bytes(), 0
    if bytes(_LONGEST_ZEROS) in data:
        return False
    for _ in range(count):
        if at + 4 > len(data):
            return False
        at += 4 + int.from_bytes(data[at : at + 4], "little")
    return at <= len(data)


def _ends(pickle: Path) -> bool:
    """Whether the file ends like a pickle. It is not loaded: loading a pickle can run any code."""
    return pickle.read_bytes()[-1:] == b"."
