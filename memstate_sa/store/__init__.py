"""Memory for applications without models of their own: a thin layer over `Memory` and `Fact`.

`AsyncMemoryStore` is in `asynchronous`, which is imported when it is needed.
"""

from memstate_sa.store.store import MemoryStore

__all__ = ["MemoryStore"]
