"""`MemStateStore` under its first import path; `memstate_sa.integrations.langgraph` has it as well."""

from memstate_sa.integrations.langgraph.store import MemStateStore

__all__ = ["MemStateStore"]
