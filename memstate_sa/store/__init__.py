"""Memory for applications without models of their own: a thin layer over `Memory` and `Fact`."""

from memstate_sa.store.asynchronous import AsyncMemoryStore
from memstate_sa.store.store import MemoryStore

__all__ = ["AsyncMemoryStore", "MemoryStore"]
