"""FaissIndex on a real folder."""

from __future__ import annotations

import errno
import os
import shutil
import stat
import struct
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("faiss")

from memstate_sa.errors import DeliveryRetryable, MemstateError, MissingExtra
from memstate_sa.indexes import FaissIndex, VectorIndex, _journal
from memstate_sa.testing import IndexConformance
from memstate_sa.testing.churn import EMBEDDER
from memstate_sa.testing.points import X, contents, fingerprints, point, vector


class TestFaiss(IndexConformance):
    marked = True
    persistent = True
    fenced = True
    purgeable = True

    @pytest.fixture
    def files(self, tmp_path: Path) -> Path:
        return tmp_path / "index"

    @pytest.fixture
    def make(self, files: Path) -> Callable[[], VectorIndex]:
        return lambda: FaissIndex(files)

    @pytest.fixture
    def program(self, files: Path) -> str:
        return f"from memstate_sa.indexes import FaissIndex\nindex = FaissIndex({str(files)!r})"


# -- changes of the folder ---------------------------------------------------------------------------------------------


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "index"


@pytest.fixture
def journal(folder: Path) -> Path:
    return folder / "points.journal"


@contextmanager
def opened(folder: Path, **options: Any) -> Iterator[FaissIndex]:
    index = FaissIndex(folder, **options)
    index.open(embedder=EMBEDDER, dimension=3)
    try:
        yield index
    finally:
        index.close()


def written(folder: Path) -> str:
    """Make five calls. Returns the incarnation."""
    with opened(folder) as index:
        for n in range(4):
            index.upsert([point(f"p{n}", (1, n, 0), fingerprint=f"f{n}", metadata={"n": n})])
        index.delete(["p1"])
        return index.incarnation


def states(steps: int) -> dict[str, str]:
    """The fingerprints after *steps* of these calls."""
    held = {f"p{n}": f"f{n}" for n in range(min(steps, 4))}
    return {id_: mark for id_, mark in held.items() if steps < 5 or id_ != "p1"}


@pytest.mark.deep
def test_a_kill_in_the_middle_of_a_call_cuts_off_that_call(folder: Path, journal: Path, tmp_path: Path) -> None:
    """The journal is cut at every byte. All complete calls are there, under the same incarnation, and writes work."""
    before = written(folder)
    whole = journal.read_bytes()
    ends = [*record_ends(whole)]
    assert len(ends) == 6  # the header, and five calls
    for cut in range(ends[0], len(whole)):
        torn = tmp_path / f"cut{cut}"
        torn.mkdir()
        (torn / journal.name).write_bytes(whole[:cut])
        with opened(torn) as index:
            done = sum(end <= cut for end in ends) - 1
            assert (index.incarnation, fingerprints(index)) == (before, states(done)), cut
            index.delete(["p0"])  # shorter than the record that was cut off
        with opened(torn) as index:
            assert index.incarnation == before
            assert fingerprints(index) == {id_: mark for id_, mark in states(done).items() if id_ != "p0"}
        shutil.rmtree(torn)


def test_damaged_journal_gives_a_new_incarnation(folder: Path, journal: Path, tmp_path: Path) -> None:
    """Any byte is changed. Records after it may be lost, so a new incarnation makes the relay compare."""
    before = written(folder)
    whole = journal.read_bytes()
    ends = [0, *record_ends(whole)]
    for place in range(0, len(whole), 7):
        rotten = tmp_path / f"rot{place}"
        rotten.mkdir()
        (rotten / journal.name).write_bytes(whole[:place] + bytes([whole[place] ^ 0x10]) + whole[place + 1 :])
        with opened(rotten) as index:
            assert index.incarnation != before
            assert fingerprints(index) == states(max(0, sum(end <= place for end in ends) - 2)), place
            again = index.incarnation
        with opened(rotten) as index:
            assert index.incarnation == again
        shutil.rmtree(rotten)


def record_ends(whole: bytes) -> Iterator[int]:
    end = 0
    while end < len(whole):
        data, text = struct.unpack_from("<QI", whole, end)
        end += 20 + text + data
        yield end


def test_killed_replacement_leaves_no_trace(folder: Path, journal: Path) -> None:
    """The next opening removes its file, which may hold facts that are erased later."""
    before = written(folder)
    left = journal.with_suffix(".new")
    left.write_bytes(b"half of a journal")
    with opened(folder) as index:
        assert (index.incarnation, fingerprints(index)) == (before, states(5))
    assert not left.exists()


def test_a_journal_does_not_grow_for_ever(folder: Path, journal: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same points are written often. The content and the incarnation stay."""
    monkeypatch.setattr("memstate_sa.indexes.faiss._SPARE", 100)
    sizes = []
    with opened(folder) as index:
        before = index.incarnation
        for n in range(100):
            index.upsert([point(f"p{m}", (1, m, n), fingerprint=f"f{n}") for m in range(20)])
            index.delete(["p7"])
            sizes.append(journal.stat().st_size)
    assert max(sizes[50:]) <= max(sizes[:50])
    with opened(folder) as index:
        assert index.incarnation == before
        assert contents(index, ["p3", "p7"]) == {"p3": ("f99", [1, 3, 99])}
        assert fingerprints(index) == {f"p{m}": "f99" for m in range(20) if m != 7}


def test_vectors_do_not_change_when_they_are_copied(folder: Path) -> None:
    """The copies are equal bit by bit."""
    rng = np.random.default_rng(1)
    vectors = rng.standard_normal((50, 3)).astype(np.float32) * 1e5
    ids = [f"p{n}" for n in range(50)]
    with opened(folder) as index:
        index.upsert([point(id_, vector_.tolist()) for id_, vector_ in zip(ids, vectors, strict=True)])
        first = {each.id: each.vector.tobytes() for each in index.get(ids)}
    for _ in range(5):
        with opened(folder) as index:
            index.purge()
            assert {each.id: each.vector.tobytes() for each in index.get(ids)} == first


def test_full_disk_leaves_no_partial_write(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The error is retryable. The partial write is removed, and the next write is complete."""
    with opened(folder) as index:
        index.upsert([point("a")])
        with monkeypatch.context() as full:

            def half(file: Any, value: Any, data: bytes) -> None:
                file.write(b"half of a record")
                raise OSError(errno.ENOSPC, "No space left on device")

            full.setattr("memstate_sa.indexes._journal._write", half)
            with pytest.raises(DeliveryRetryable) as caught:
                index.upsert([point("b")])
            assert isinstance(caught.value.__cause__, OSError)
            with pytest.raises(DeliveryRetryable):
                index.purge()
        assert fingerprints(index) == {"a": "f"}
        before = index.incarnation
        index.upsert([point("c")])
    with opened(folder) as index:
        assert (index.incarnation, fingerprints(index)) == (before, {"a": "f", "c": "f"})


def test_writes_continue_without_room_for_a_second_journal(
    folder: Path, journal: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Writes continue in the long journal. It is shortened later, and not tried again with every write."""
    monkeypatch.setattr("memstate_sa.indexes.faiss._SPARE", 20)
    write, tried = _journal._write, []

    def full(file: Any, value: Any, data: bytes) -> None:
        if file.name.endswith(".new"):
            tried.append(file.name)
            raise OSError(errno.ENOSPC, "No space left on device")
        write(file, value, data)

    with opened(folder) as index:
        before = index.incarnation
        with monkeypatch.context() as disk:
            disk.setattr(_journal, "_write", full)
            for n in range(60):
                index.upsert([point("a", (1, n, 0), fingerprint=f"f{n}")])
        assert len(tried) == 2
        ours = [record for record in caplog.records if record.name == "memstate_sa.indexes"]
        assert [record.args[-1] for record in ours] == ["No space left on device"] * 2  # type: ignore[index]
        long = journal.stat().st_size
        for n in range(60, 70):
            index.upsert([point("a", (1, n, 0), fingerprint=f"f{n}")])
        assert journal.stat().st_size < long / 5
    with opened(folder) as index:
        assert index.incarnation == before
        assert contents(index, ["a"]) == {"a": ("f69", [1, 69, 0])}


def test_write_fails_while_the_folder_cannot_be_synchronised(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No write is acknowledged while the new journal's name may not be on the disk. Later all works again."""
    said: list[str] = []
    data, whole, failing = os.fdatasync, os.fsync, False

    def synchronise(file: int) -> None:
        kind = "folder" if stat.S_ISDIR(os.fstat(file).st_mode) else "file"
        if kind == "folder" and failing:
            raise OSError(errno.EIO, "Input/output error")
        said.append(kind)
        whole(file)

    monkeypatch.setattr(os, "fdatasync", lambda file: (said.append("data"), data(file)))
    monkeypatch.setattr(os, "fsync", synchronise)
    with opened(folder) as index:
        index.upsert([point("a"), point("gone")])
        index.delete(["gone"])
        before, failing = index.incarnation, True
        for call in (index.purge, lambda: index.upsert([point("b")]), lambda: index.delete(["a"])):
            with pytest.raises(DeliveryRetryable) as caught:
                call()
            assert isinstance(caught.value.__cause__, OSError)
        failing = False
        said.clear()
        index.upsert([point("c")])
        index.upsert([point("d")])
        assert said == ["folder", "data", "data"]
        index.purge()
        said.clear()
    with opened(folder) as index:  # the process that replaced it was killed before its name was on the disk
        assert said == ["folder"]
        assert (index.incarnation, fingerprints(index)) == (before, {"a": "f", "c": "f", "d": "f"})


def test_acknowledged_write_is_on_the_disk(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each write syncs the journal. A replacement is synced before it takes the old journal's place."""
    said: list[str] = []
    data, whole, rename = os.fdatasync, os.fsync, Path.replace
    monkeypatch.setattr(os, "fdatasync", lambda file: (said.append("data"), data(file)))
    monkeypatch.setattr(os, "fsync", lambda file: (said.append("whole"), whole(file)))
    monkeypatch.setattr(Path, "replace", lambda path, to: (said.append("rename"), rename(path, to)))
    with opened(folder) as index:
        for call in (lambda: index.upsert([point("a")]), lambda: index.delete(["a"])):
            said.clear()
            call()
            assert said == ["data"]
        said.clear()
        index.purge()
        assert said == ["whole", "rename", "whole"]  # the file, and then the folder that names it


def test_a_deleted_folder_is_noticed(folder: Path) -> None:
    """Every call notices it. A new index on the folder is empty, with another incarnation."""
    index = FaissIndex(folder)
    index.open(embedder=EMBEDDER, dimension=3)
    index.upsert([point("a")])
    before = index.incarnation
    shutil.rmtree(folder)
    for call in (lambda: index.query(vector(*X), 1), lambda: index.upsert([point("b")]), lambda: index.incarnation):
        with pytest.raises(DeliveryRetryable, match="deleted or replaced"):
            call()
    index.close()
    with opened(folder) as anew:
        assert anew.incarnation != before
        assert fingerprints(anew) == {}


@pytest.mark.deep
def test_a_second_process_is_refused(folder: Path) -> None:
    """One process has the folder open. The error names an alternative."""
    code = f"""
from memstate_sa.errors import MemstateError
from memstate_sa.indexes import FaissIndex
try:
    FaissIndex({str(folder)!r}).open(embedder={EMBEDDER!r}, dimension=3)
    print("opened")
except MemstateError as error:
    print(error)
"""
    with opened(folder):
        refused = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    accepted = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "PgVectorIndex" in refused.stdout
    assert accepted.stdout == "opened\n"


def test_a_forked_child_is_refused(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It inherits an open index, and would write beside its parent."""
    with opened(folder) as index:
        with monkeypatch.context() as child:
            child.setattr("memstate_sa.indexes._folder.os.getpid", lambda: -1)
            with pytest.raises(MemstateError, match="fork"):
                index.upsert([point("a")])
        assert fingerprints(index) == {}


def test_a_selective_filter_is_exact(folder: Path) -> None:
    """None of the nearest points matches. All matching points are found, nearest first."""
    with opened(folder) as index:
        index.upsert([point(f"p{n}", (1, n / 1000, 0), metadata={"rare": n >= 2990}) for n in range(3000)])
        found = index.query(vector(*X), 4, where={"rare": {"$eq": True}})
        assert [match.id for match in found] == ["p2990", "p2991", "p2992", "p2993"]


@pytest.mark.parametrize("absent", ["faiss", "filelock"])
def test_a_missing_package_names_its_extra(absent: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The error comes at construction, not at import."""
    monkeypatch.setitem(sys.modules, absent, None)
    with pytest.raises(MissingExtra, match=r"memstate-sa\[faiss\]"):
        FaissIndex(folder)
