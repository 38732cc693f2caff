"""Dead keys, which an index refused too often, and paused indexes."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from uuid import uuid4

from sqlalchemy import ColumnElement, and_, delete, or_, select, update
from sqlalchemy.engine import Connection

from memstate_sa.db.json_params import as_array, unnest_strings
from memstate_sa.db.leases import database_now
from memstate_sa.db.statements import take_write_lock
from memstate_sa.db.tables import index_state, parked
from memstate_sa.errors import MemstateError
from memstate_sa.relay.index_key import IndexKey, of_index
from memstate_sa.relay.plan import ParkedState


@dataclass(frozen=True, slots=True)
class DeadLetter:
    """A key that ``index`` refused ``attempts`` times.

    The key is tried again when its row changes, or by `Relay.retry_dead`. ``key`` is the primary key as a JSON array.
    ``error`` names types of errors, and shows no data of the fact.
    """

    index: str
    entity: str
    key: str
    attempts: int
    error: str


_full_name = parked.c.entity + parked.c.key


def _dead(keys: Collection[str] | None) -> ColumnElement[bool]:
    """The criterion of the dead keys among *keys* (default: all). A key may follow its entity, as in log lines."""
    dead = and_(of_index(parked), parked.c.state == ParkedState.DEAD)
    names = select(unnest_strings("keys").c.value)
    return dead if keys is None else and_(dead, or_(parked.c.key.in_(names), _full_name.in_(names)))


def read_dead(connection: Connection, index: IndexKey, limit: int) -> list[DeadLetter]:
    columns = (parked.c.entity, parked.c.key, parked.c.attempts, parked.c.error)
    statement = select(*columns).where(_dead(None)).order_by(parked.c.entity, parked.c.key).limit(limit)
    return [DeadLetter(index.name, *row) for row in connection.execute(statement, index.parameters()).all()]


def retry_dead(connection: Connection, index: IndexKey, keys: Collection[str] | None) -> int:
    """Let dead keys be tried again, with a new count of attempts. Return their number."""
    take_write_lock(connection)
    statement = update(parked).where(_dead(keys))
    statement = statement.values(
        state=ParkedState.PARKED, attempts=0, next_at=database_now(connection), mark=uuid4().hex
    )
    return connection.execute(statement, {**index.parameters(), "keys": as_array(keys or ())}).rowcount


def drop_dead(connection: Connection, index: IndexKey, keys: Collection[str] | None) -> int:
    """Drop dead keys, and return their number. The old point of such a key stays until its row changes."""
    take_write_lock(connection)
    statement = delete(parked).where(_dead(keys))
    return connection.execute(statement, {**index.parameters(), "keys": as_array(keys or ())}).rowcount


def set_paused(connection: Connection, index: IndexKey, *, paused: bool) -> None:
    take_write_lock(connection)
    statement = update(index_state).where(of_index(index_state)).values(paused=paused)
    if connection.execute(statement, index.parameters()).rowcount == 0:
        raise MemstateError(
            f"Cannot pause or resume index {index.name!r}: no relay has delivered to it yet. Run a relay first."
        )
