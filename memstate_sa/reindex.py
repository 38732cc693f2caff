"""Moving to another index, or to another embedder, while the application runs.

The successor is filled beside the index that it replaces, which relays go on delivering to. Then one row says, to every
process, which of the two searches ask: a search asks one index, with the embedder that filled it.
"""

from __future__ import annotations

from collections.abc import Mapping

from sqlalchemy import bindparam, delete, insert, or_, select
from sqlalchemy.engine import Connection

from memstate_sa.changes import FactKey
from memstate_sa.errors import DeliveryError, MemstateError, NotFound
from memstate_sa.outbox import take_write_lock
from memstate_sa.relay import claims
from memstate_sa.relay.claims import IndexKey, of_index
from memstate_sa.relay.plan import AGAIN
from memstate_sa.tables import holder, index_state, parked, successor, utcnow

_switched = select(successor.c.successor).where(successor.c.index == bindparam("index"))
_refused = select(parked.c.entity, parked.c.key).where(of_index(parked), parked.c.state != AGAIN)


def check(successors: Mapping[str, str], indexes: Mapping[str, object]) -> None:
    """Raise MemstateError when *successors* are not among *indexes*, or go in a circle."""
    for name, other in successors.items():
        for each in (name, other):
            if each not in indexes:
                raise MemstateError(f"successors={dict(successors)!r}: this Memory has no index {each!r}")
        seen = {name}
        while other not in seen and other in successors:
            seen.add(other)
            other = successors[other]  # noqa: PLW2901
        if other in seen:
            raise MemstateError(f"successors={dict(successors)!r}: {other!r} would be its own successor")


def searched(connection: Connection, name: str, successors: Mapping[str, str]) -> str:
    """The index that searches of *name* ask: itself, or the one that has taken its place."""
    while name in successors:
        if connection.scalar(_switched, {"index": name}) != successors[name]:
            return name
        name = successors[name]
    return name


def replacement(connection: Connection, name: str, successors: Mapping[str, str]) -> str | None:
    """The index that searches of *name* ask instead of it."""
    asked = searched(connection, name, successors)
    return None if asked == name else asked


def switch(connection: Connection, old: IndexKey, new: IndexKey) -> None:
    """Have searches of *old* ask *new*, from this transaction's COMMIT on.

    Raises DeliveryError when *new* refused facts that *old* holds: nobody would find them any more.
    """
    take_write_lock(connection)
    lost = _refusals(connection, new) - _refusals(connection, old)
    if lost:
        raise DeliveryError(
            f"index {new.name!r} refused {len(lost)} facts that {old.name!r} has, so searches still ask {old.name!r}: "
            f"`memstate-sa dead list --index {new.name}` says why, `dead drop` gives them up"
        )
    switch_back(connection, old.name)
    connection.execute(insert(successor).values(index=old.name, successor=new.name, switched_at=utcnow()))


def _refusals(connection: Connection, index: IndexKey) -> set[FactKey]:
    return {(entity, key) for entity, key in connection.execute(_refused, index.parameters())}


def switch_back(connection: Connection, name: str) -> None:
    """Have searches of *name* ask *name* itself."""
    connection.execute(delete(successor).where(successor.c.index == name))


def forget(connection: Connection, name: str) -> None:
    """Forget what relays know of the index *name*.

    Raises NotFound for one that was never delivered to, and MemstateError while a relay holds it.
    """
    take_write_lock(connection)
    known = select(index_state.c.incarnation).where(index_state.c.index == name).with_for_update()
    keys = [IndexKey(name, incarnation) for incarnation in connection.scalars(known)]
    if not keys:
        raise NotFound(f"nothing was ever delivered from this database to an index {name!r}")
    now = claims.database_now(connection)
    live = select(holder.c.owner).where(holder.c.index == name, holder.c.lease_until > now).limit(1)
    if connection.scalar(live) is not None:
        raise MemstateError(f"a relay delivers to index {name!r}: take the index out of that application first")
    for key in keys:
        claims.forget(connection, key)
    connection.execute(delete(successor).where(or_(successor.c.index == name, successor.c.successor == name)))
