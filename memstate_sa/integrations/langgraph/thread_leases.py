"""Leases on threads, which decide which run may write. Without one, a late writer looks like a fork."""

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
    """Another run has this thread. Nothing was written."""


# Names in a config. They begin with underscores, so that LangGraph leaves them out of metadata.
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

    Raises StaleRun if another run has the thread: its lease has not ended, and its process may be alive.
    """
    now = database_now(connection)
    until = now + timedelta(seconds=lease_s)
    new = database_of(connection).upsert(lease).on_conflict_do_nothing()
    row = {"thread_id": thread_id, "owner": owner, "lease_until": until}
    current = None
    while current is None:  # another run released the lease between the two statements
        connection.execute(new, row)
        current = connection.execute(_select_lease, {"of": thread_id}).one_or_none()
    if current.owner != owner and current.lease_until > now and not take_over and not is_gone(current.owner):
        raise StaleRun(
            f"Cannot run thread {thread_id!r}: another run has it, and its lease ends at "
            f"{current.lease_until:%H:%M:%S} UTC. Wait for that, or use take_over=True."
        )
    connection.execute(_take, {"of": thread_id, "me": owner, "until": until})


def renew(connection: Connection, thread_id: str, owner: str, lease_s: float) -> None:
    """Renew a lease in the transaction that writes. Raises StaleRun if another run has taken over the thread.

    A run that takes over at this moment waits for the transaction.
    """
    until = database_now(connection) + timedelta(seconds=lease_s)
    if connection.execute(_renew, {"of": thread_id, "me": owner, "until": until}).rowcount != 1:
        raise StaleRun(f"Cannot save: another run has taken over thread {thread_id!r}. This run wrote nothing.")


def release(connection: Connection, thread_id: str, owner: str) -> None:
    connection.execute(_release, {"of": thread_id, "me": owner})


def leased(config: RunnableConfig, owner: str, lease_s: float) -> RunnableConfig:
    """*config* with the lease of its thread."""
    return cast(
        "RunnableConfig", {**config, "configurable": {**config["configurable"], _OWNER: owner, _LEASE_S: lease_s}}
    )


def is_leased(config: RunnableConfig) -> bool:
    """Whether the run of *config* has a lease."""
    return _OWNER in config["configurable"]


def renew_configured(connection: Connection, config: RunnableConfig) -> None:
    """Renew the lease of the run of *config*, if it has one."""
    conf = config["configurable"]
    if _OWNER in conf:
        renew(connection, thread_id_of(conf["thread_id"]), conf[_OWNER], conf[_LEASE_S])
