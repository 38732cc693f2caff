"""Convergence of the indexes to the committed rows: `plan` decides, `state` remembers, `delivery` and `loop` act."""

from memstate_sa.relay.loop import Relay
from memstate_sa.relay.plan import RetryPolicy

__all__ = ["Relay", "RetryPolicy"]
