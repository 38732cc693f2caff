"""The old import path of `MemStateStore`. Import it from `memstate_sa.integrations.langgraph`."""

from memstate_sa.integrations.langgraph.store import MemStateStore

__all__ = ["MemStateStore"]
