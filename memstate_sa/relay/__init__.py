"""Delivery of the committed rows to the indexes.

`plan`, `slot_owner` and `protocol` decide, without I/O. `claims` and `ledger` keep state in the database. `delivery`
and `loop` act.
"""

from memstate_sa.relay.deadletters import DeadLetter
from memstate_sa.relay.loop import Relay
from memstate_sa.relay.retention import Retention
from memstate_sa.relay.retry import RetryPolicy

__all__ = ["DeadLetter", "Relay", "Retention", "RetryPolicy"]
