"""Locks and checks for keys without a row, while other transactions may be adding the row.

A row can be locked, but an absent row cannot. So an undo, an erasure, an import or `doctor` writes the history of such
a key in three parts. Ordinary writers need no change.

1. It locks the key against other undos and erasures (`lock_absent_keys`). The lock ends with the transaction.
2. It writes its entries of the log.
3. It waits for all transactions that are writing to the table at that time. Then it reads the row (`require_absent`).

Part 3 finds a row that was added before. A row that is added later is also logged later, which is the right order.
"""

from __future__ import annotations

import time
from collections.abc import Collection, Iterable, Iterator
from contextlib import contextmanager
from hashlib import sha256

from sqlalchemy import Integer, bindparam, cast, func, select, text
from sqlalchemy.engine import Connection
from sqlalchemy.exc import DBAPIError

from memstate_sa.db.codec import FactKey, by_entity
from memstate_sa.db.dialects import database_of
from memstate_sa.db.engines import with_separate_pool
from memstate_sa.db.json_params import as_array, unnest_strings
from memstate_sa.db.tables import log
from memstate_sa.errors import ConflictError
from memstate_sa.tracking.tracked import Tracked

LOCK_WAIT_S = 5.0
"""The time to wait for others before a ConflictError, in seconds."""

_PAUSE_S = 0.02
_LOCK_NOT_AVAILABLE = "55P03"
_MOST_KEYS = 500
"""The most keys with a lock each. Locks take shared memory of PostgreSQL, so for more keys the class is locked."""


class KeyInserted(ConflictError):
    """A row appeared under a key that had none."""

    def __init__(self, message: str, keys: Collection[str]) -> None:
        super().__init__(message)
        self.keys = keys


# -- locks against each other ------------------------------------------------------------------------------------------

# The first numbers of our advisory locks: for classes, and for keys.
_CLASSES, _KEYS = 0x6D656D01, 0x6D656D02
_keys = unnest_strings("keys")
_lock_class = select(func.pg_advisory_xact_lock(_CLASSES, bindparam("number", type_=Integer)))
_share_class = select(func.pg_advisory_xact_lock_shared(_CLASSES, bindparam("number", type_=Integer)))
_lock_keys = select(func.pg_advisory_xact_lock(_KEYS, cast(_keys.c.value, Integer))).select_from(_keys)
_lock_timeout = select(func.current_setting("lock_timeout"))
_set_lock_timeout = select(func.set_config("lock_timeout", bindparam("timeout"), True))


def lock_absent_keys(connection: Connection, facts: Iterable[FactKey]) -> None:
    """Lock *facts* against other undos and erasures until the transaction ends. ConflictError if this takes long.

    SQLite has one writer, so there is nothing to do.
    """
    groups = sorted(by_entity(facts).items())
    if not groups or database_of(connection).has_one_writer:
        return
    try:
        with _limited_lock_wait(connection):
            for entity, keys in groups:
                number = {"number": _number(entity)}
                if len(keys) > _MOST_KEYS:
                    connection.execute(_lock_class, number)
                else:
                    connection.execute(_share_class, number)
                    numbers = sorted({_number(entity + key) for key in keys})
                    connection.execute(_lock_keys, {"keys": as_array(map(str, numbers))})
    except DBAPIError as error:
        if getattr(error.orig, "sqlstate", None) != _LOCK_NOT_AVAILABLE:
            raise
        raise ConflictError(
            f"Cannot write the history of {groups[0][0]}. Another undo or erasure has locked these keys. Wait for its "
            "end, and run this transaction again."
        ) from error


def _number(name: str) -> int:
    """The second number of a lock, with 32 bits and a sign."""
    return int.from_bytes(sha256(name.encode("utf-8", "surrogatepass")).digest()[:4], signed=True)


@contextmanager
def _limited_lock_wait(connection: Connection) -> Iterator[None]:
    """Limit waits for locks in this block to `LOCK_WAIT_S`, unless the application has set a limit."""
    with connection.begin_nested():
        unlimited = connection.scalar(_lock_timeout) == "0"
        if unlimited:
            connection.execute(_set_lock_timeout, {"timeout": f"{int(LOCK_WAIT_S * 1000)}ms"})
        yield
        if unlimited:
            connection.execute(_set_lock_timeout, {"timeout": "0"})


# -- waits for ordinary writers ----------------------------------------------------------------------------------------

# Each writer of a table holds this lock until its transaction ends.
_writers = text(
    "SELECT virtualtransaction, coalesce(pg_blocking_pids(pid) @> ARRAY[pg_backend_pid()], false) FROM pg_locks "
    "WHERE locktype = 'relation' AND relation = to_regclass(:table) AND mode = 'RowExclusiveLock' AND granted "
    "AND database = (SELECT oid FROM pg_database WHERE datname = current_database()) "
    "AND pid IS DISTINCT FROM pg_backend_pid()"
)
_sleep = select(func.pg_sleep(_PAUSE_S))  # the database waits, so that an event loop can run tasks


def require_absent(connection: Connection, tracked: Tracked, keys: Collection[str]) -> None:
    """Raise `KeyInserted` if a row has one of *keys*. Raise ConflictError if a writer may still add one.

    Call it after the entries of *keys* are written. The module's docstring says why.
    """
    if not keys or database_of(connection).has_one_writer:
        return
    _wait_for_writers(connection, tracked)
    columns = tracked.columns_for(connection.dialect)
    with _connection_to_committed(connection) as present:
        rows = columns.find_rows(present, keys)
    if rows:
        raise KeyInserted(
            f"Another transaction added {tracked.entity} {min(rows)} again. Run this transaction again.", rows
        )
    require_current(connection, tracked, keys)


def _wait_for_writers(connection: Connection, tracked: Tracked) -> None:
    table = connection.dialect.identifier_preparer.format_table(tracked.table).replace("%%", "%")
    deadline = time.monotonic() + LOCK_WAIT_S
    writers: set[str] | None = None
    while True:
        waits_for_us: dict[str, bool] = dict(map(tuple, connection.execute(_writers, {"table": table})))
        writers = set(waits_for_us) if writers is None else writers & waits_for_us.keys()
        if not writers:
            return
        if time.monotonic() > deadline or any(waits_for_us[writer] for writer in writers):
            raise ConflictError(
                f"Cannot write the history of a key of {tracked.entity} that has no row. Another transaction is "
                "writing to the table, and may be adding it. Wait for its end, and run this transaction again."
            )
        connection.execute(_sleep)


def require_current(connection: Connection, tracked: Tracked, keys: Collection[str]) -> None:
    """Raise ConflictError if others have logged or erased entries of *keys* that our snapshot does not show.

    In READ COMMITTED each statement sees all commits, so there is nothing to do.
    """
    if not keys or not _is_in_snapshot(connection):
        return
    entries = select(log.c.id, log.c.version).where(
        log.c.entity == tracked.entity, log.c.key.in_(select(_keys.c.value))
    )
    parameters = {"keys": as_array(keys)}
    with _connection_to_committed(connection) as present:
        committed = set(map(tuple, present.execute(entries, parameters)))
    if not committed.issubset(map(tuple, connection.execute(entries, parameters))):
        raise ConflictError(
            f"Cannot write the history of {tracked.entity}: others changed these facts after the snapshot of this "
            "transaction was taken. Run the transaction again."
        )


def _is_in_snapshot(connection: Connection) -> bool:
    """Whether all statements of the transaction see the database as it was at the first one."""
    if database_of(connection).has_one_writer:
        return False
    return connection.get_isolation_level() in ("REPEATABLE READ", "SERIALIZABLE")


@contextmanager
def _connection_to_committed(connection: Connection) -> Iterator[Connection]:
    """A connection that sees all commits up to now."""
    if not _is_in_snapshot(connection):
        yield connection
        return
    with with_separate_pool(connection.engine).connect().execution_options(isolation_level="READ COMMITTED") as present:
        present.detach()  # afterwards it is closed: it is rarely needed again
        yield present


# -- the keys ----------------------------------------------------------------------------------------------------------

_last = select(func.max(log.c.id)).where(log.c.entity == bindparam("entity"), log.c.key == _keys.c.value)
_deleted = select(log.c.key, log.c.tx).where(
    log.c.op == "delete", log.c.id.in_(select(_last.correlate(_keys).scalar_subquery()).select_from(_keys))
)


def keys_others_can_insert(
    connection: Connection, tracked: Tracked, keys: Collection[str], own: Collection[str]
) -> list[str]:
    """The *keys* (without a row) for which others can add a row.

    *own* are the `tx` values of this transaction. If it deleted the row, others cannot add one: they wait for us.
    """
    if not keys or database_of(connection).has_one_writer:
        return []
    parameters = {"entity": tracked.entity, "keys": as_array(keys)}
    ours = {row.key for row in connection.execute(_deleted, parameters) if row.tx in own}
    return [key for key in keys if key not in ours]
