"""Leases on threads: who may write their checkpoints. A late writer and a fork look alike; a lease tells them apart."""

from __future__ import annotations

from datetime import timedelta
from typing import TYPE_CHECKING, cast

from sqlalchemy import bindparam, delete, select, update
from sqlalchemy.engine import Connection

from memstate_sa.db.dialects import database_of
from memstate_sa.db.leases import database_now, is_gone
from memstate_sa.errors import ConflictError
from memstate_sa.integrations.langgraph.tables import lease
from memstate_sa.integrations.langgraph.thread_ids import thread_id_of

if TYPE_CHECKING:
    from langchain_core.runnables import RunnableConfig


class StaleRun(ConflictError):
    """Another run has this thread; nothing was written."""


# Names in a config. LangGraph shows none in metadata that begins with underscores.
_OWNER, _LEASE_S = "__memstate_run", "__memstate_lease"

_select_lease = select(lease.c.owner, lease.c.lease_until).where(lease.c.thread_id == bindparam("of")).with_for_update()
_mine = (lease.c.thread_id == bindparam("of"), lease.c.owner == bindparam("me"))
_renew = update(lease).where(*_mine).values(lease_until=bindparam("until"))
_take = (
    update(lease)
    .where(lease.c.thread_id == bindparam("of"))
    .values(owner=bindparam("me"), lease_until=bindparam("until"))
)
_release = delete(lease).where(*_mine)


def acquire(connection: Connection, thread_id: str, owner: str, lease_s: float, *, take_over: bool) -> None:
    """Take the lease of a thread.

    Raises StaleRun while another run has the thread: its lease has not ended, and its process may be alive.
    """
    now = database_now(connection)
    until = now + timedelta(seconds=lease_s)
    new = database_of(connection).upsert(lease).on_conflict_do_nothing()
    row = {"thread_id": thread_id, "owner": owner, "lease_until": until}
    current = None
    while current is None:  # released in between, and by now perhaps somebody else's
        connection.execute(new, row)
        current = connection.execute(_select_lease, {"of": thread_id}).one_or_none()
    if current.owner != owner and current.lease_until > now and not take_over and not is_gone(current.owner):
        raise StaleRun(
            f"thread {thread_id!r} has a run elsewhere, whose lease ends at {current.lease_until:%H:%M:%S} UTC"
        )
    connection.execute(_take, {"of": thread_id, "me": owner, "until": until})


def renew(connection: Connection, thread_id: str, owner: str, lease_s: float) -> None:
    """Renew a lease in the transaction that writes. Raises StaleRun when another run has taken the thread over.

    A run that takes over at this moment waits for the transaction.
    """
    until = database_now(connection) + timedelta(seconds=lease_s)
    if connection.execute(_renew, {"of": thread_id, "me": owner, "until": until}).rowcount != 1:
        raise StaleRun(f"thread {thread_id!r} was taken over by another run: this one came too late, and wrote nothing")


def release(connection: Connection, thread_id: str, owner: str) -> None:
    connection.execute(_release, {"of": thread_id, "me": owner})


def leased(config: RunnableConfig, owner: str, lease_s: float) -> RunnableConfig:
    """*config* for a run that has the lease of its thread."""
    return cast(
        "RunnableConfig", {**config, "configurable": {**config["configurable"], _OWNER: owner, _LEASE_S: lease_s}}
    )


def is_leased(config: RunnableConfig) -> bool:
    """Whether *config* is of a run that has a lease."""
    return _OWNER in config["configurable"]


def renew_configured(connection: Connection, config: RunnableConfig) -> None:
    """Renew the lease of the run that *config* is of, if it has one."""
    conf = config["configurable"]
    if _OWNER in conf:
        renew(connection, thread_id_of(conf["thread_id"]), conf[_OWNER], conf[_LEASE_S])
