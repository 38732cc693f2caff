"""Transactional memory for AI agents, as a SQLAlchemy extension.

A fact is a mapped row; when its transaction commits, its history and its delivery to the vector index commit with it;
when it rolls back, none of them ever existed.
"""

from memstate_sa import sqlite
from memstate_sa.capture import UntrackedWriteWarning
from memstate_sa.changes import Change
from memstate_sa.doctor import Diagnosis
from memstate_sa.errors import (
    ConflictError,
    DeliveryError,
    DeliveryRejected,
    DeliveryRetryable,
    HistoryMissing,
    IndexMismatch,
    MemstateError,
    MissingExtra,
    NotFound,
    UntrackedWrite,
    ValidationFailed,
)
from memstate_sa.facts import Fact
from memstate_sa.integrations import checkpoint_tables, items  # noqa: F401  # metadata is the same for everybody
from memstate_sa.memory import Memory
from memstate_sa.search import Hit, Hits
from memstate_sa.store import MemoryStore
from memstate_sa.tables import metadata
from memstate_sa.verify import DriftReport

__version__ = "0.1.0"

__all__ = [
    "Change",
    "ConflictError",
    "DeliveryError",
    "DeliveryRejected",
    "DeliveryRetryable",
    "Diagnosis",
    "DriftReport",
    "Fact",
    "HistoryMissing",
    "Hit",
    "Hits",
    "IndexMismatch",
    "Memory",
    "MemoryStore",
    "MemstateError",
    "MissingExtra",
    "NotFound",
    "UntrackedWrite",
    "UntrackedWriteWarning",
    "ValidationFailed",
    "metadata",
    "sqlite",
]
