"""Leases on threads: who may write their checkpoints. A late writer and a fork look alike; a lease tells them apart."""

from __future__ import annotations

from datetime import timedelta

from sqlalchemy import bindparam, delete, select, update
from sqlalchemy.engine import Connection

from memstate_sa.db.leases import database_now, is_gone
from memstate_sa.db.statements import upsert
from memstate_sa.errors import ConflictError
from memstate_sa.integrations.langgraph.tables import lease


class StaleRun(ConflictError):
    """Another run has this thread; nothing was written."""


_held = select(lease.c.owner, lease.c.lease_until).where(lease.c.thread_id == bindparam("of")).with_for_update()
_mine = (lease.c.thread_id == bindparam("of"), lease.c.owner == bindparam("me"))
_renew = update(lease).where(*_mine).values(lease_until=bindparam("until"))
_take = (
    update(lease)
    .where(lease.c.thread_id == bindparam("of"))
    .values(owner=bindparam("me"), lease_until=bindparam("until"))
)
_release = delete(lease).where(*_mine)


def acquire(connection: Connection, thread_id: str, owner: str, lease_s: float, *, take_over: bool) -> None:
    """Raises StaleRun while another run has the thread: its lease has not ended, and its process may be alive."""
    now = database_now(connection)
    until = now + timedelta(seconds=lease_s)
    new = upsert(connection.dialect.name, lease).on_conflict_do_nothing()
    row = {"thread_id": thread_id, "owner": owner, "lease_until": until}
    held = None
    while held is None:  # released in between, and by now perhaps somebody else's
        connection.execute(new, row)
        held = connection.execute(_held, {"of": thread_id}).one_or_none()
    if held.owner != owner and held.lease_until > now and not take_over and not is_gone(held.owner):
        raise StaleRun(f"thread {thread_id!r} has a run elsewhere, whose lease ends at {held.lease_until:%H:%M:%S} UTC")
    connection.execute(_take, {"of": thread_id, "me": owner, "until": until})


def renew(connection: Connection, thread_id: str, owner: str, lease_s: float) -> None:
    """In the transaction that writes: whoever takes over waits for it, or it is refused. Raises StaleRun."""
    until = database_now(connection) + timedelta(seconds=lease_s)
    if connection.execute(_renew, {"of": thread_id, "me": owner, "until": until}).rowcount != 1:
        raise StaleRun(f"thread {thread_id!r} was taken over by another run: this one came too late, and wrote nothing")


def release(connection: Connection, thread_id: str, owner: str) -> None:
    connection.execute(_release, {"of": thread_id, "me": owner})
