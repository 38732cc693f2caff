"""Tools for tests: an embedder without a model, an index that fails, and a test suite for every index.

`IndexConformance` needs pytest, and is imported at its first use. The other tools need only NumPy.
"""

from typing import TYPE_CHECKING, Any

from memstate_sa.testing.embedder import HashEmbedder
from memstate_sa.testing.flaky import FlakyFencedIndex, FlakyIndex

if TYPE_CHECKING:
    from memstate_sa.testing.conformance import IndexConformance

__all__ = ["FlakyFencedIndex", "FlakyIndex", "HashEmbedder", "IndexConformance"]


def __getattr__(name: str) -> Any:
    if name != "IndexConformance":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    import pytest

    # With this, pytest shows both sides of a failed comparison, as in test modules.
    pytest.register_assert_rewrite("memstate_sa.testing.conformance")
    from memstate_sa.testing.conformance import IndexConformance

    return IndexConformance
