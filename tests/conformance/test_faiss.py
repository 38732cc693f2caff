"""FaissIndex on a real folder."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

pytest.importorskip("faiss")

from memstate_sa.indexes import VectorIndex
from memstate_sa.indexes.faiss import FaissIndex
from memstate_sa.testing import IndexConformance


class TestFaiss(IndexConformance):
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
        return f"from memstate_sa.indexes.faiss import FaissIndex\nindex = FaissIndex({str(files)!r})"
