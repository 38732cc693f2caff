"""Convergence of the indexes to the committed rows.

`plan`, `slot_owner` and `protocol` decide, and do no I/O. `claims` and `ledger` remember. `delivery` and `loop` act.
"""

from memstate_sa.relay.deadletters import DeadLetter
from memstate_sa.relay.loop import Relay
from memstate_sa.relay.retention import Retention
from memstate_sa.relay.retry import RetryPolicy

__all__ = ["DeadLetter", "Relay", "Retention", "RetryPolicy"]
