"""Transactional memory for AI agents, as a SQLAlchemy extension.

A fact is a mapped row. Its history, and its delivery to the vector index, commit with the application's transaction. If
the transaction rolls back, none of them ever existed.
"""

# ruff: noqa: F403, F405  # type checkers find the names in memstate_sa.api
from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from memstate_sa.api import *

__version__ = "0.1.0"

__all__ = [
    "AsyncMemoryStore",
    "BackfillOptions",
    "Backlog",
    "Change",
    "Changes",
    "ConflictError",
    "DeadLetter",
    "DeliveryError",
    "DeliveryRejected",
    "DeliveryRetryable",
    "Diagnosis",
    "DriftReport",
    "Embedder",
    "Fact",
    "HistoryMissing",
    "HistoryOptions",
    "Hit",
    "Hits",
    "Incomplete",
    "IndexBroken",
    "IndexMismatch",
    "Labels",
    "Memory",
    "MemoryOptions",
    "MemoryStore",
    "MemstateError",
    "MissingExtra",
    "NotFound",
    "PastSession",
    "Relay",
    "RelayOptions",
    "Retention",
    "RetryPolicy",
    "Revocation",
    "RevokeOptions",
    "RollbackOptions",
    "SearchOptions",
    "StoreOptions",
    "TrackOptions",
    "UntrackedWrite",
    "UntrackedWriteWarning",
    "ValidationFailed",
    "VectorIndex",
    "metadata",
    "sqlite",
]


def __getattr__(name: str) -> Any:
    """Import the public names when the first of them is needed: `memstate-sa --help` needs none."""
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = globals()[name] = getattr(import_module("memstate_sa.api"), name)
    return value


def __dir__() -> list[str]:
    return [*__all__, "__version__"]
