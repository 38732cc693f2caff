"""The table in docs/how-to/indexes.md agrees with the suite."""

from __future__ import annotations

from importlib import import_module

import pytest

from tests.adapters.indexes import table

ALIKE = {
    "test_indexes.TestFlaky",
    "test_qdrant.TestQdrantEngine",
    "test_qdrant.TestQdrantGraph",
}
"""Suites of a listed index under other conditions. No wheel has Qdrant's server, but one has its engine."""


@pytest.fixture(autouse=True)
def _everything_is_installed() -> None:
    for package in ("chromadb", "faiss", "psycopg", "qdrant_client", "redis"):
        pytest.importorskip(package)


def test_the_table_is_up_to_date() -> None:
    """If this fails, run python -m tests.adapters.indexes.table."""
    assert table.DOCUMENT.read_text() == table.written()


def test_every_suite_is_in_the_table() -> None:
    """The modules of the table's suites have no other suites, except `ALIKE`."""
    suites = {
        f"{module}.{name}"
        for module in {row.partition(".")[0] for row in table.ROWS.values()}
        for name, found in vars(import_module(f"tests.adapters.indexes.{module}")).items()
        if name.startswith("Test") and hasattr(found, "test_index_has_exactly_the_declared_parts")
    }
    assert suites - ALIKE == set(table.ROWS.values())
