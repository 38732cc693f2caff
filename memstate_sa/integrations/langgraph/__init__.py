"""LangGraph on memstate_sa: a checkpointer and a store in the application's own database.

``import memstate_sa`` imports the tables of this package. So this module imports LangGraph only when a name is used.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from memstate_sa.integrations.langgraph.checkpointer import MemStateCheckpointer
    from memstate_sa.integrations.langgraph.item_validation import InvalidItem
    from memstate_sa.integrations.langgraph.state_classes import StateSerializer
    from memstate_sa.integrations.langgraph.store import MemStateStore
    from memstate_sa.integrations.langgraph.thread_ids import InvalidThread
    from memstate_sa.integrations.langgraph.thread_leases import StaleRun

__all__ = [
    "InvalidItem",
    "InvalidThread",
    "MemStateCheckpointer",
    "MemStateStore",
    "StaleRun",
    "StateSerializer",
]

_MODULES = {
    "InvalidItem": "item_validation",
    "InvalidThread": "thread_ids",
    "MemStateCheckpointer": "checkpointer",
    "MemStateStore": "store",
    "StaleRun": "thread_leases",
    "StateSerializer": "state_classes",
}


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    import_module("memstate_sa.api")  # this completes `memstate_sa.metadata`
    return getattr(import_module(f"{__name__}.{_MODULES[name]}"), name)
