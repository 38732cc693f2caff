"""The public names of `memstate_sa`, which imports this module when the first of them is needed.

The tables of the LangGraph integration are imported too, so that `memstate_sa.metadata` is complete.
"""

# ruff: noqa: F401, PLC0414, PLR0402  # each name is imported for others
import memstate_sa.integrations.langgraph.item_rows
import memstate_sa.integrations.langgraph.tables
import memstate_sa.sqlite as sqlite  # `from memstate_sa import sqlite` would import this module again
from memstate_sa.capture.guard import UntrackedWriteWarning as UntrackedWriteWarning
from memstate_sa.db.tables import metadata as metadata
from memstate_sa.embedders import Embedder as Embedder
from memstate_sa.errors import (
    ConflictError as ConflictError,
    DeliveryError as DeliveryError,
    DeliveryRejected as DeliveryRejected,
    DeliveryRetryable as DeliveryRetryable,
    HistoryMissing as HistoryMissing,
    IndexBroken as IndexBroken,
    IndexMismatch as IndexMismatch,
    MemstateError as MemstateError,
    MissingExtra as MissingExtra,
    NotFound as NotFound,
    UntrackedWrite as UntrackedWrite,
    ValidationFailed as ValidationFailed,
)
from memstate_sa.fact import Fact as Fact
from memstate_sa.indexes.base import VectorIndex as VectorIndex
from memstate_sa.log.changes import Change as Change, Changes as Changes
from memstate_sa.maintenance.doctor import Diagnosis as Diagnosis
from memstate_sa.maintenance.verify import DriftReport as DriftReport
from memstate_sa.memory import Memory as Memory
from memstate_sa.options import (
    BackfillOptions as BackfillOptions,
    HistoryOptions as HistoryOptions,
    Labels as Labels,
    MemoryOptions as MemoryOptions,
    RelayOptions as RelayOptions,
    RevokeOptions as RevokeOptions,
    RollbackOptions as RollbackOptions,
    SearchOptions as SearchOptions,
    StoreOptions as StoreOptions,
    TrackOptions as TrackOptions,
)
from memstate_sa.relay import (
    DeadLetter as DeadLetter,
    Relay as Relay,
    Retention as Retention,
    RetryPolicy as RetryPolicy,
)
from memstate_sa.relay.backlog import Backlog as Backlog
from memstate_sa.search.hits import Hit as Hit, Hits as Hits, Incomplete as Incomplete
from memstate_sa.search.time_travel import PastSession as PastSession
from memstate_sa.store import AsyncMemoryStore as AsyncMemoryStore, MemoryStore as MemoryStore
from memstate_sa.undo.undo import Revocation as Revocation
