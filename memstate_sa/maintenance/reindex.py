"""Moving to another index, or to another embedder, while the application runs.

The successor is filled beside the index that it replaces, which relays go on delivering to. Then one row says, to every
process, which of the two searches ask: a search asks one index, with the embedder that filled it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

from sqlalchemy import bindparam, delete, not_, or_, select
from sqlalchemy.engine import Connection

from memstate_sa.db import leases
from memstate_sa.db.codec import FactKey
from memstate_sa.db.statements import take_write_lock, upsert
from memstate_sa.db.tables import holder, index_state, ledger, parked, refill, successor, utcnow
from memstate_sa.errors import DeliveryError, MemstateError, NotFound
from memstate_sa.relay import refills, registration
from memstate_sa.relay.index_key import IndexKey, of_index
from memstate_sa.relay.plan import ParkedState

_switched = select(successor.c.successor, successor.c.incarnation).where(successor.c.index == bindparam("index"))
_refused = select(parked.c.entity, parked.c.key).where(of_index(parked), parked.c.state != ParkedState.AGAIN)


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


def searched(
    connection: Connection, name: str, successors: Mapping[str, str], incarnation_of: Callable[[str], str]
) -> str:
    """The index that searches of *name* ask: itself, or the one that has taken its place.

    One that was lost or made anew since has not: the old one is asked until it is filled, and takes its place again.
    """
    while name in successors:
        found = connection.execute(_switched, {"index": name}).one_or_none()
        if found is None or tuple(found) != (successors[name], incarnation_of(successors[name])):
            return name
        name = successors[name]
    return name


def switch(connection: Connection, old: IndexKey, new: IndexKey) -> None:
    """Have searches of *old* ask *new*, from this transaction's COMMIT on.

    Raises DeliveryError when *new* lacks facts that *old* has, because it refused them, or because they are of classes
    that another Memory delivers: nobody would find them any more.
    """
    take_write_lock(connection)
    lost = _refusals(connection, new) - _refusals(connection, old)
    if lost:
        raise DeliveryError(
            f"index {new.name!r} refused {len(lost)} facts that {old.name!r} has, so searches still ask {old.name!r}: "
            f"`memstate-sa dead list --index {new.name}` says why, `dead drop` gives them up"
        )
    of_others = [
        entity
        for entity in connection.scalars(_entities, old.parameters()).all()
        if connection.scalar(_held, {**old.parameters(), "entity": entity})
        and not refills.is_filled(connection, new, [entity])
    ]
    if of_others:
        raise DeliveryError(
            f"index {new.name!r} is not filled with {', '.join(of_others)}, which {old.name!r} has, so searches still "
            f"ask {old.name!r}: a Memory that tracks it has to deliver to {new.name!r}, too"
        )
    values = {"successor": new.name, "incarnation": new.incarnation, "switched_at": utcnow()}
    statement = upsert(connection.dialect.name, successor).values(index=old.name, **values)
    connection.execute(statement.on_conflict_do_update(index_elements=[successor.c.index], set_=values))


_entities = select(refill.c.entity).where(of_index(refill), refill.c.entity != refills.SCAN).distinct()
_held = select(
    select(ledger.c.key)
    .where(of_index(ledger), ledger.c.entity == bindparam("entity"), not_(ledger.c.deleted))
    .exists()
)


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
    now = leases.database_now(connection)
    live = select(holder.c.owner).where(holder.c.index == name, holder.c.lease_until > now)
    if not all(leases.is_gone(owner) or leases.is_dropped(owner) for owner in connection.scalars(live)):
        raise MemstateError(f"a relay delivers to index {name!r}: take the index out of that application first")
    for key in keys:
        registration.forget_index(connection, key)
    connection.execute(delete(successor).where(or_(successor.c.index == name, successor.c.successor == name)))
