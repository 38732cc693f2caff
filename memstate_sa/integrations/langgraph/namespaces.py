"""List the namespaces of a store by conditions on their beginnings and ends."""

from __future__ import annotations

from datetime import datetime

from langgraph.store.base import ListNamespacesOp, MatchCondition
from sqlalchemy.orm import Session

from memstate_sa.integrations.langgraph import item_rows
from memstate_sa.integrations.langgraph.item_validation import InvalidItem, scope_of, wants_results


def list_namespaces(session: Session, op: ListNamespacesOp, now: datetime | None) -> list[tuple[str, ...]]:
    """The namespaces for *op*, with items that are alive at the time *now*. None includes expired items."""
    if not wants_results(op):
        return []
    if op.max_depth is not None and op.max_depth < 1:
        raise InvalidItem(f"Invalid max_depth={op.max_depth!r}: it must be at least 1.")
    conditions = op.match_conditions or ()
    for condition in conditions:
        if condition.match_type not in ("prefix", "suffix"):
            raise InvalidItem(f"Invalid match_type={condition.match_type!r}: use 'prefix' or 'suffix'.")
    prefix = max(map(_plain_prefix, conditions), key=len, default=())
    # If every condition is a beginning of `prefix`, the database can cut namespaces at max_depth.
    is_range = all(_plain_prefix(other) == other.path == prefix[: len(other.path)] for other in conditions)
    depth = op.max_depth if is_range and op.max_depth is not None and len(prefix) <= op.max_depth else None
    namespaces: dict[tuple[str, ...], None] = {}
    for scope in item_rows.scopes(session, scope_of(prefix), now, depth):
        namespace = item_rows.namespace_of(scope)
        if all(_fits(namespace, condition) for condition in conditions):
            namespaces[namespace[: op.max_depth]] = None
            if len(namespaces) == op.offset + op.limit:
                break
    return list(namespaces)[op.offset :]


def _plain_prefix(condition: MatchCondition) -> tuple[str, ...]:
    """The beginning of every matching namespace."""
    if condition.match_type != "prefix":
        return ()
    path = tuple(condition.path)
    return path[: path.index("*")] if "*" in path else path


def _fits(namespace: tuple[str, ...], condition: MatchCondition) -> bool:
    path = condition.path
    if len(path) > len(namespace):
        return False
    part = namespace[: len(path)] if condition.match_type == "prefix" else namespace[len(namespace) - len(path) :]
    return all(pattern in ("*", name) for name, pattern in zip(part, path, strict=True))
