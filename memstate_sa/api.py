"""The public names of `memstate_sa`, which imports this module when the first of them is needed.

The tables of the LangGraph integration are imported too, so that `memstate_sa.metadata` is complete.
"""

# ruff: noqa: F401, PLC0414, PLR0402  # each name is imported for others
import memstate_sa.sqlite as sqlite  # `from memstate_sa import sqlite` would ask for this module again
from memstate_sa.capture.guard import UntrackedWriteWarning as UntrackedWriteWarning
from memstate_sa.db.tables import metadata as metadata
from memstate_sa.errors import (
    ConflictError as ConflictError,
)
from memstate_sa.errors import (
    DeliveryError as DeliveryError,
)
from memstate_sa.errors import (
    DeliveryRejected as DeliveryRejected,
)
from memstate_sa.errors import (
    DeliveryRetryable as DeliveryRetryable,
)
from memstate_sa.errors import (
    HistoryMissing as HistoryMissing,
)
from memstate_sa.errors import (
    IndexMismatch as IndexMismatch,
)
from memstate_sa.errors import (
    MemstateError as MemstateError,
)
from memstate_sa.errors import (
    MissingExtra as MissingExtra,
)
from memstate_sa.errors import (
    NotFound as NotFound,
)
from memstate_sa.errors import (
    UntrackedWrite as UntrackedWrite,
)
from memstate_sa.errors import (
    ValidationFailed as ValidationFailed,
)
from memstate_sa.fact import Fact as Fact
from memstate_sa.integrations.langgraph import item_rows as _item_rows
from memstate_sa.integrations.langgraph import tables as _tables
from memstate_sa.log.changes import Change as Change
from memstate_sa.maintenance.doctor import Diagnosis as Diagnosis
from memstate_sa.maintenance.verify import DriftReport as DriftReport
from memstate_sa.memory import Memory as Memory
from memstate_sa.search.hits import Hit as Hit
from memstate_sa.search.hits import Hits as Hits
from memstate_sa.store import MemoryStore as MemoryStore
