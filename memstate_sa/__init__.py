"""Transactional memory for AI agents, as a SQLAlchemy extension.

A fact is a mapped row; when its transaction commits, its history and its delivery to the vector index commit with it;
when it rolls back, none of them ever existed.
"""

from memstate_sa import sqlite
from memstate_sa.capture.guard import UntrackedWriteWarning
from memstate_sa.db.tables import metadata
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
from memstate_sa.fact import Fact
from memstate_sa.integrations.langgraph import item_rows as _item_rows
from memstate_sa.integrations.langgraph import tables as _tables
from memstate_sa.log.changes import Change
from memstate_sa.maintenance.doctor import Diagnosis
from memstate_sa.maintenance.verify import DriftReport
from memstate_sa.memory import Memory
from memstate_sa.search.hits import Hit, Hits
from memstate_sa.store import AsyncMemoryStore, MemoryStore

__version__ = "0.1.0"

del _item_rows, _tables  # imported for their tables: the metadata is complete for every application

__all__ = [
    "AsyncMemoryStore",
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
