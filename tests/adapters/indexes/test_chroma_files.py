"""Files of a Chroma collection that a crash has damaged: the damage is found, and the collection is made again."""

from __future__ import annotations

import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

chromadb = pytest.importorskip("chromadb")
ROOT = Path(__file__).resolve().parents[3]
FILES = ("header.bin", "data_level0.bin", "length.bin", "link_lists.bin", "index_metadata.pickle")

# A separate process: Chroma caches its files while its process lives, and damaged files may crash it.
SCRIPT = """
import sys, chromadb
from sqlalchemy import create_engine
from memstate_sa import sqlite
from memstate_sa.errors import IndexBroken
from memstate_sa.indexes import ChromaIndex
from tests.support import Tag, World

folder, url, mode = sys.argv[1:]
client = chromadb.PersistentClient(folder)
engine = sqlite.configure(create_engine(url))
world = World(engine, ChromaIndex(client, "memory"))
if mode == "fill":
    with world.session() as session:
        session.add_all(Tag(name=f"n{n}", meaning=f"m{n * 7919 % 1000}") for n in range(1050))
        session.commit()
    world.relay.drain(60)
else:
    session = world.session()
    for call in (lambda: world.memory.verify(engine), lambda: world.memory.search(session, "n5 means m595", Tag)):
        try:
            call()
        except IndexBroken as error:
            print(error)
    world.memory.verify(engine, repair=True)
    world.assert_in_step()
    print([hit.fact.name for hit in world.memory.search(world.session(), "n5 means m595", Tag, limit=1)])
world.memory.close()
"""


def run(folder: Path, mode: str) -> str:
    command = [sys.executable, "-W", "ignore", "-c", SCRIPT, str(folder / "chroma"), f"sqlite:///{folder / 'a.db'}"]
    done = subprocess.run([*command, mode], cwd=ROOT, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


@pytest.fixture(scope="module")
def filled(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("filled")
    run(folder, "fill")
    return folder


def cut(file: Path) -> None:
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])


def zero(file: Path) -> None:
    """Overwrite with zeros, like a file system that reserved the space and lost the writes."""
    data = file.read_bytes()
    file.write_bytes(data[: len(data) // 2] + bytes(len(data) - len(data) // 2))


def empty(file: Path) -> None:
    file.write_bytes(b"")


@pytest.mark.deep_on("header.bin")
@pytest.mark.deep_on("cut")
@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("damage", [cut, zero, empty, Path.unlink])
def test_damage_is_found(filled: Path, tmp_path: Path, name: str, damage: Callable[[Path], None]) -> None:
    """It is found before Chroma reads the files. The same kind: a full disk, a restored backup that is incomplete."""
    from memstate_sa.indexes._chroma_files import _damage

    [segment] = [path for path in (filled / "chroma").iterdir() if path.is_dir()]
    copy = Path(shutil.copytree(segment, tmp_path / "segment"))
    assert _damage(copy) is None
    damage(copy / name)
    found = _damage(copy)
    if (name, damage) == ("length.bin", zero):
        assert found is None  # Chroma does not read the collection's content
    else:
        assert found is not None
        assert name in found


@pytest.mark.deep
def test_damaged_collection_is_reported_and_rebuilt(filled: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(filled, tmp_path / "copy"))
    [data] = (folder / "chroma").glob("*/data_level0.bin")
    cut(data)
    *told, found = run(folder, "repair").splitlines()
    assert len(told) == 2
    assert all("data_level0.bin has" in line and "verify(engine, repair=True)" in line for line in told)
    assert found == "['n5']"
