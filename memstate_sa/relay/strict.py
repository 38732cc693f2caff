"""Strict delivery: the indexes are written before COMMIT, and their failure vetoes it.

No one knows yet whether that transaction will commit. So first an intent is made durable where its rollback does not
reach: "what the indexes hold for these keys is not known". When the transaction has ended, however it ends, the relay
finds the intent and converges its keys; until then searches go by the fingerprint, and do not show what SQL lacks.
"""

from __future__ import annotations

import json
import os
import threading
from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple, ParamSpec, Protocol, TypeVar
from weakref import WeakKeyDictionary, WeakSet

from sqlalchemy import BigInteger, Insert, Text, bindparam, cast, func, insert, literal_column, select, true
from sqlalchemy.engine import Connection, Engine
from sqlalchemy.exc import SQLAlchemyError
from sqlalchemy.orm import Session

from memstate_sa.capture.transaction import OpenTransaction
from memstate_sa.db import sqlite
from memstate_sa.db.codec import FactKey, by_entity
from memstate_sa.db.engines import with_separate_pool
from memstate_sa.db.json_params import as_array, as_json, row_value, unnest_rows, unnest_strings
from memstate_sa.db.statements import batches, take_write_lock
from memstate_sa.db.tables import cursor, index_state, log, outbox, utcnow
from memstate_sa.embedding import cache
from memstate_sa.embedding.batches import Destination, Vectors
from memstate_sa.errors import DeliveryRetryable
from memstate_sa.indexes.base import Point, Vector, is_fenced
from memstate_sa.log.outbox import slots
from memstate_sa.log.positions import slot_of
from memstate_sa.relay.claims import limit_transaction
from memstate_sa.relay.index_key import IndexKey, of_index
from memstate_sa.relay.protocol import ENTITY
from memstate_sa.relay.retry import classify, guarded
from memstate_sa.runtime import forks, listening
from memstate_sa.runtime.printable import printable_logger
from memstate_sa.tracking import committed
from memstate_sa.tracking.projection import Projection, point_id
from memstate_sa.tracking.registry import Registry

logger = printable_logger("memstate_sa.relay.strict")
P = ParamSpec("P")
R = TypeVar("R")

LOCK_TIMEOUT_S = 10.0
"""The longest wait for a lock that an intent cannot get; the transaction it announces may be who holds it."""

_txs = unnest_strings("txs")
# From the log, which has an index on tx. A SAVEPOINT that rolled back took its entries with it: these keys are locked.
_changed = (
    select(log.c.entity, log.c.key)
    .where(log.c.tx.in_(select(_txs.c.value)), log.c.op != "baseline")
    .distinct()
    .order_by(log.c.entity, log.c.key)
)
_read_xid = select(cast(func.pg_current_xact_id(), Text))
_marked = select(index_state.c.marked).where(of_index(index_state)).scalar_subquery()
_standing = select(cursor.c.slot, cursor.c.epoch, _marked).where(of_index(cursor))

_INTENDED = ("slot", "entity", "key")
_given = unnest_rows("intended")


def _intending(xid: Any) -> Insert:
    return insert(outbox).from_select(
        ["tx", "created_at", "intent", "xid", *_INTENDED],
        select(
            bindparam("tx", type_=outbox.c.tx.type),
            bindparam("at", type_=outbox.c.created_at.type),
            true(),
            xid,
            *(row_value(_given, n, outbox.c[name].type) for n, name in enumerate(_INTENDED)),
        ),
        include_defaults=False,
    )


_intend = {
    "sqlite": _intending(literal_column("0")),
    "postgresql": _intending(cast(bindparam("the_xid", type_=Text()), BigInteger())),
}


def intend(connection: Connection, tx: str, facts: Sequence[FactKey], **xid: str) -> None:
    """Add an intent for each of *facts*; on PostgreSQL *xid* is that of their transaction."""
    for some in batches([(slot_of(*fact), *fact) for fact in facts], 8_000):
        given = {"tx": tx, "at": utcnow(), "intended": as_json(some), **xid}
        connection.execute(_intend[connection.dialect.name], given)


class Standing(NamedTuple):
    """What relays know of an index: the epoch of each slot's claim, and whether points carry their entity."""

    epochs: Mapping[int, int]
    marked: bool


def read_standing(connection: Connection, index: IndexKey) -> Standing:
    slots = connection.execute(_standing, index.parameters()).all()
    return Standing({slot: epoch for slot, epoch, _ in slots}, any(marked for _, _, marked in slots))


class Strict:
    """Writes the indexes of one Memory before its transactions commit, and keeps their intents."""

    def __init__(
        self,
        registry: Registry,
        destinations: Mapping[str, Destination],
        *,
        blocking: Callable[[Engine], Engine],
        wake: Callable[[Engine], None],
    ) -> None:
        """*blocking* makes of an asynchronous engine one that a thread can use; *wake* is told of due intents."""
        self._registry = registry
        self._destinations = destinations
        self._blocking = blocking
        self._wake = wake
        self._journals: WeakKeyDictionary[Engine, Journal] = WeakKeyDictionary()
        self._watched: WeakSet[Engine] = WeakSet()
        self._make_lock()
        forks.in_child(self, Strict._make_lock)

    def _make_lock(self) -> None:
        self._recovering = threading.Lock()

    # -- the transaction ---------------------------------------------------------------------------------------------

    def write(self, session: Session, unit: OpenTransaction) -> None:
        """Bring the indexes to where *unit*'s transaction, flushed and about to commit, will leave its rows.

        Whatever fails, that transaction is rolled back at once. Raises DeliveryError when an index or the embedder
        fails, or an intent cannot be recorded.
        """
        try:
            self._write(unit)
        except BaseException:
            _roll_back(session)
            self.ended(unit)
            raise

    def _write(self, unit: OpenTransaction) -> None:
        connection = unit.written_on
        assert connection is not None
        call = _in_thread if connection.dialect.is_async else _directly
        with unit.writing():
            txs = as_array({unit.tx, *unit.txs})
            ours = self._registry.by_entity  # triggers of another Memory may have logged under our transaction
            changed = connection.execute(_changed, {"txs": txs}).all()
            facts = [(entity, key) for entity, key in changed if entity in ours]
            if not facts:
                return
            # All that can fail without a trace comes before the intent, which costs the relay some work.
            going = {name: [fact for fact in facts if name in ours[fact[0]].indexes] for name in self._destinations}
            of_vectors: dict[Vectors, dict[FactKey, None]] = {}
            for name, some in going.items():
                of_vectors.setdefault(self._destinations[name].vectors, {}).update(dict.fromkeys(some))
            wanted = {
                vectors: self._embedded(connection, list(some), vectors, call) for vectors, some in of_vectors.items()
            }
            keys = call(self._open, [name for name, some in going.items() if some])
            standings = self._announce(connection, unit, facts, keys, call)
        of = len(slots(connection.dialect.name))
        for name, standing in standings.items():
            deletes: dict[int, list[str]] = {}
            points: list[Point] = []
            projections, embedded = wanted[self._destinations[name].vectors]
            for fact in going[name]:
                # Of the claim that stands: a relay that has claimed since is not overwritten, and delivers the key.
                epoch = standing.epochs.get(slot_of(*fact) % of, 0)
                projection = projections.get(fact)
                if projection is None:
                    deletes.setdefault(epoch, []).append(point_id(*fact))
                else:
                    points.append(_point(fact, projection, embedded, epoch, marked=standing.marked))
            call(self._put, name, deletes, points)

    def _embedded(
        self, connection: Connection, facts: Sequence[FactKey], vectors: Vectors, call: Call
    ) -> tuple[dict[FactKey, Projection], dict[str, Vector]]:
        """What an index should hold for *facts*, as their transaction sees them, and the vectors by text fingerprint.

        Nothing for a blank text. New vectors are remembered in this process, not stored: two transactions that store
        the same one would wait for each other.
        """
        found: dict[FactKey, Projection] = {}
        for entity, keys in by_entity(facts).items():
            tracked = self._registry.by_entity[entity]
            for row in committed.project(connection, tracked, keys, vectors.embedder.fingerprint):
                if not isinstance(row, Projection):
                    raise classify(row[1], "the text callable") from row[1]
                if row.fingerprint is not None:
                    found[entity, row.key] = row
        texts = {p.text_fingerprint: p.text for p in found.values() if p.text_fingerprint and p.text}
        known = cache.known(connection, vectors, texts)
        new = {digest: text for digest, text in texts.items() if digest not in known}
        return found, known | call(vectors.embed, new, remember=True)

    def _open(self, names: Collection[str]) -> dict[str, IndexKey]:
        return {name: IndexKey(name, guarded(self._destinations[name].open, f"index {name!r}")) for name in names}

    def _put(self, name: str, deletes: Mapping[int, list[str]], points: Sequence[Point]) -> None:
        index = self._destinations[name].index

        def put() -> None:
            size = index.max_batch
            for epoch, ids in deletes.items():
                for some in batches(ids, size):
                    if is_fenced(index):
                        index.delete(some, epoch=epoch)
                    else:
                        index.delete(some)
            for some_points in batches(points, size):
                index.upsert(some_points)

        guarded(put, f"index {name!r}")

    # -- intents -----------------------------------------------------------------------------------------------------

    def _announce(
        self,
        connection: Connection,
        unit: OpenTransaction,
        facts: Sequence[FactKey],
        keys: Mapping[str, IndexKey],
        call: Call,
    ) -> dict[str, Standing]:
        """Make the intent durable. Returns how the indexes stand once it is."""
        try:
            if connection.dialect.name == "postgresql":
                xid: str = connection.execute(_read_xid).scalar_one()
                unit.has_intents = True
                return call(self._announce_beside, connection.engine, xid, unit.tx, facts, keys)
            journal = self._journal(connection)
            unit.has_intents = True
            call(journal.write, unit.tx, facts)
            intend(connection, unit.tx, facts)  # if this commits, they are delivered with it
            return {name: read_standing(connection, key) for name, key in keys.items()}
        except (OSError, SQLAlchemyError) as error:
            raise DeliveryRetryable(f"the intent was not recorded: {type(error).__name__}") from error

    def _announce_beside(
        self, engine: Engine, xid: str, tx: str, facts: Sequence[FactKey], keys: Mapping[str, IndexKey]
    ) -> dict[str, Standing]:
        """PostgreSQL: committed at once, under the xid of the transaction: no window passes it before that ends."""
        with self._other(engine).begin() as connection:
            limit_transaction(connection, LOCK_TIMEOUT_S)
            intend(connection, tx, facts, the_xid=xid)
            # Read here: the transaction itself may look at an older snapshot.
            return {name: read_standing(connection, key) for name, key in keys.items()}

    def committed(self, unit: OpenTransaction) -> None:
        """The intent of *unit* was committed with it, unless a transaction around it is still open (SQLite)."""
        if unit.has_intents:
            assert unit.written_on is not None
            journal = self._journals.get(unit.written_on.engine)
            if journal is None:
                unit.has_intents = False
            elif not sqlite.in_transaction(unit.written_on):
                unit.has_intents = False
                journal.drop(unit.tx)

    def ended(self, unit: OpenTransaction) -> None:
        """Whatever became of *unit*'s transaction, its intent is the relay's now."""
        if unit.has_intents:
            assert unit.written_on is not None
            unit.has_intents = False
            self._recover(unit.written_on.engine)
            self._wake(unit.written_on.engine)

    def _other(self, engine: Engine) -> Engine:
        return self._blocking(engine) if engine.dialect.is_async else with_separate_pool(engine)

    # -- SQLite ------------------------------------------------------------------------------------------------------

    def watch(self, engine: Engine) -> None:
        """Have intents that a transaction left behind, in whatever process, found whenever *engine* is used."""
        if engine.dialect.name == "sqlite" and engine not in self._watched:
            self._watched.add(engine)
            listening.listen(engine, "engine_connect", self._connected)

    def stop(self) -> None:
        """Watch no engine any more."""
        for engine in list(self._watched):
            listening.stop(engine, "engine_connect", self._connected)
        self._watched.clear()

    def _connected(self, connection: Connection) -> None:
        self._journal(connection)
        self._recover(connection.engine)

    def _journal(self, connection: Connection) -> Journal:
        journal = self._journals.get(connection.engine)
        if journal is None:
            path, engine = _database_file(connection), connection.engine
            journal = self._journals.setdefault(engine, Volatile() if path is None else Sidecar(path))
        return journal

    def intended(self, engine: Engine) -> set[FactKey]:
        """What transactions on SQLite may be about to commit, or have left behind; elsewhere the outbox has it."""
        journal = self._journals.get(engine)
        return set() if journal is None else journal.facts()

    def _recover(self, engine: Engine) -> None:
        """Turn what was left behind into entries of the outbox, if nobody is writing; else whoever comes next will."""
        journal = self._journals.get(engine)
        if journal is None or not self._recovering.acquire(blocking=False):
            return
        try:
            if not journal.is_empty:
                journal.replay(engine if isinstance(journal, Volatile) else self._other(engine))
        except (OSError, SQLAlchemyError) as error:
            logger.debug("intents are left for later: %s", type(error).__name__)
        finally:
            self._recovering.release()


class Journal(Protocol):
    """Where SQLite's intents are durable: its one writer is the transaction that they announce."""

    @property
    def is_empty(self) -> bool: ...

    def write(self, tx: str, facts: Sequence[FactKey]) -> None: ...

    def drop(self, tx: str) -> None: ...

    def facts(self) -> set[FactKey]:
        """All that is announced."""
        ...

    def replay(self, engine: Engine) -> None:
        """Make entries of the outbox of what transactions left that have ended; raises OperationalError during one."""
        ...


class Sidecar:
    """Intents in a folder beside the database's file, one file a transaction.

    It is written under the database's write lock, which is held until the transaction ends. So whoever has that lock
    knows that the files it finds are of transactions that have ended, in this process or in one that was killed.
    """

    def __init__(self, database: Path) -> None:
        self.folder = database.with_name(database.name + ".memstate-intents")
        self._database = database

    @property
    def is_empty(self) -> bool:
        try:
            with os.scandir(self.folder) as entries:
                return next(entries, None) is None
        except FileNotFoundError:
            return True

    def write(self, tx: str, facts: Sequence[FactKey]) -> None:
        """Append, and wait for the disk: what is not complete there announces no write."""
        if not self.folder.exists():
            self.folder.mkdir(exist_ok=True)
            _sync(self.folder.parent)
        mode = self._database.stat().st_mode & 0o666
        file = os.open(self.folder / tx, os.O_WRONLY | os.O_APPEND | os.O_CREAT, mode)
        try:
            with open(file, "w", encoding="utf-8", closefd=False) as stream:
                stream.write(json.dumps(facts) + "\n")
            os.fsync(file)
        finally:
            os.close(file)
        _sync(self.folder)

    def drop(self, tx: str) -> None:
        (self.folder / tx).unlink(missing_ok=True)

    def facts(self) -> set[FactKey]:
        found: set[FactKey] = set()
        with suppress(FileNotFoundError):  # the folder
            for path in list(self.folder.iterdir()):
                with suppress(FileNotFoundError):  # by now it has ended
                    found.update(_complete_lines(path))
        return found

    def replay(self, engine: Engine) -> None:
        with engine.connect() as connection:
            connection.exec_driver_sql("PRAGMA busy_timeout = 0")
            if not sqlite.in_transaction(connection):
                connection.exec_driver_sql("BEGIN IMMEDIATE")
            take_write_lock(connection)
            found = {path.name: _complete_lines(path) for path in self.folder.iterdir()}
            for tx, facts in found.items():
                intend(connection, tx, facts)
            connection.commit()
        for tx in found:
            self.drop(tx)


class Volatile:
    """Intents of an in-memory database, which dies with the process."""

    def __init__(self) -> None:
        self._intents: dict[str, list[FactKey]] = {}

    @property
    def is_empty(self) -> bool:
        return not self._intents

    def write(self, tx: str, facts: Sequence[FactKey]) -> None:
        self._intents[tx] = list(facts)

    def drop(self, tx: str) -> None:
        self._intents.pop(tx, None)

    def facts(self) -> set[FactKey]:
        return {fact for facts in list(self._intents.values()) for fact in facts}

    def replay(self, engine: Engine) -> None:
        if sqlite.open_transaction(engine):
            return
        found = dict(self._intents)
        with engine.begin() as connection:
            for tx, facts in found.items():
                intend(connection, tx, facts)
        for tx in found:
            self.drop(tx)


def _complete_lines(path: Path) -> list[FactKey]:
    """The keys in a file of intents; of a line that is not whole, nothing was written to an index yet."""
    found: list[FactKey] = []
    for line in path.read_bytes().split(b"\n"):
        with suppress(ValueError):
            found += [(entity, key) for entity, key in json.loads(line)]
    return found


def _sync(folder: Path) -> None:
    file = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(file)
    finally:
        os.close(file)


def _database_file(connection: Connection) -> Path | None:
    """The file of a SQLite database; None when it is in memory. By the driver: SQLAlchemy would begin a transaction."""
    reading = connection.connection.cursor()
    reading.execute("PRAGMA database_list")
    path = next((Path(file) for _, name, file in reading.fetchall() if name == "main" and file), None)
    reading.close()
    return path.resolve() if path is not None and path.is_file() else None


# -- calls ------------------------------------------------------------------------------------------------------------


class Call(Protocol):
    def __call__(self, function: Callable[P, R], /, *args: P.args, **kwargs: P.kwargs) -> R: ...


def _directly(function: Callable[P, R], /, *args: P.args, **kwargs: P.kwargs) -> R:
    return function(*args, **kwargs)


def _in_thread(function: Callable[P, R], /, *args: P.args, **kwargs: P.kwargs) -> R:
    """The event loop goes on meanwhile. If the commit is cancelled, the call may still land: the intent stands."""
    import asyncio

    from sqlalchemy.util import await_only

    return await_only(asyncio.to_thread(function, *args, **kwargs))


def _point(fact: FactKey, projection: Projection, vectors: Mapping[str, Vector], epoch: int, *, marked: bool) -> Point:
    assert projection.fingerprint is not None
    assert projection.text_fingerprint is not None
    metadata = {ENTITY: fact[0], **projection.metadata} if marked else projection.metadata
    vector = vectors[projection.text_fingerprint]
    return Point(point_id(*fact), vector, projection.fingerprint, epoch, metadata, projection.text)


def _roll_back(session: Session) -> None:
    """Now, as a flush does that fails: an event of a commit cannot call rollback().

    The Session asks for its rollback() before it is used again.
    """
    transaction = session._transaction  # noqa: SLF001
    assert transaction is not None
    transaction._begin().rollback(_capture_exception=True)  # noqa: SLF001
