"""`MemoryStore`: memory for applications without models of their own. A thin layer over `Memory` and `Fact`."""

from memstate_sa.store.store import MemoryStore

__all__ = ["MemoryStore"]
