"""Parts for tests: an embedder without a model, an index that fails, and what every index must do.

`IndexConformance` needs pytest, and is imported when it is asked for; the others need NumPy alone.
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

    # For a failed comparison to show both sides, as in the test modules themselves.
    pytest.register_assert_rewrite("memstate_sa.testing.conformance")
    from memstate_sa.testing.conformance import IndexConformance

    return IndexConformance
