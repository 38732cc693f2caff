"""LangGraph's long-term memory (BaseStore) as facts: its items have history, can be undone, and are found by meaning.

``pip install 'memstate-sa[langgraph]'``. The tables are made by `setup`, or by Alembic.
"""

from __future__ import annotations

from memstate_sa.errors import MemstateError, MissingExtra

try:
    from langgraph.store.base import BaseStore
except ImportError as error:
    raise MissingExtra("langgraph", "langgraph") from error

__all__ = ["BaseStore", "MemstateError"]
