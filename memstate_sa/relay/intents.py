"""Intents: durable records of keys whose points a strict transaction may write before it commits.

On PostgreSQL an intent is an entry of the outbox, committed on another connection. SQLite has only one writer, so there
an intent is a file beside the database, until a relay turns it into outbox entries.
"""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, Protocol

from sqlalchemy import BigInteger, Insert, Text, bindparam, cast, insert, literal_column, select, true
from sqlalchemy.engine import Connection, Engine

from memstate_sa.db import sqlite
from memstate_sa.db.codec import FactKey
from memstate_sa.db.dialects import POSTGRESQL, SQLITE, database_of
from memstate_sa.db.json_params import as_json, row_value, unnest_rows
from memstate_sa.db.sqlite_database import in_transaction
from memstate_sa.db.statements import batches, take_write_lock
from memstate_sa.db.tables import outbox, utcnow
from memstate_sa.log.positions import slot_of

_COLUMNS = ("slot", "entity", "key")
_intent_rows = unnest_rows("intended")


def _insert_intents(xid: Any) -> Insert:
    return insert(outbox).from_select(
        ["tx", "created_at", "intent", "xid", *_COLUMNS],
        select(
            bindparam("tx", type_=outbox.c.tx.type),
            bindparam("at", type_=outbox.c.created_at.type),
            true(),
            xid,
            *(row_value(_intent_rows, n, outbox.c[name].type) for n, name in enumerate(_COLUMNS)),
        ),
        include_defaults=False,
    )


_add_intents = {
    SQLITE: _insert_intents(literal_column("0")),
    POSTGRESQL: _insert_intents(cast(bindparam("the_xid", type_=Text()), BigInteger())),
}


def add_intents(connection: Connection, tx: str, facts: Sequence[FactKey], **xid: str) -> None:
    """Add an intent for each of *facts* to the outbox. On PostgreSQL, *xid* is the xid of their transaction."""
    for rows in batches([(slot_of(*fact), *fact) for fact in facts], 8_000):
        parameters = {"tx": tx, "at": utcnow(), "intended": as_json(rows), **xid}
        connection.execute(_add_intents[database_of(connection)], parameters)


class IntentJournal(Protocol):
    """The durable intents of a SQLite database. The transaction that they announce is its only writer."""

    @property
    def is_empty(self) -> bool: ...

    def write(self, tx: str, facts: Sequence[FactKey]) -> None: ...

    def drop(self, tx: str) -> None: ...

    def facts(self) -> set[FactKey]:
        """The keys of all intents."""
        ...

    def replay(self, engine: Engine) -> None:
        """Turn the intents of ended transactions into entries of the outbox.

        Raises OperationalError while a transaction is writing.
        """
        ...


class IntentFiles:
    """Intents in a folder beside the database's file, with one file per transaction.

    A file is written under the database's write lock, which lasts until the transaction ends. So all files belong to
    ended transactions when another process gets the lock, even if their process was killed.
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
        """Append a line, and wait for the disk. No index is written before the line is complete."""
        if not self.folder.exists():
            self.folder.mkdir(exist_ok=True)
            _sync_folder(self.folder.parent)
        mode = self._database.stat().st_mode & 0o666
        file = os.open(self.folder / tx, os.O_WRONLY | os.O_APPEND | os.O_CREAT, mode)
        try:
            with open(file, "w", encoding="utf-8", closefd=False) as stream:
                stream.write(json.dumps(facts) + "\n")
            os.fsync(file)
        finally:
            os.close(file)
        _sync_folder(self.folder)

    def drop(self, tx: str) -> None:
        (self.folder / tx).unlink(missing_ok=True)

    def facts(self) -> set[FactKey]:
        facts: set[FactKey] = set()
        with suppress(FileNotFoundError):  # the folder may not exist
            for path in list(self.folder.iterdir()):
                with suppress(FileNotFoundError):  # the transaction may have ended, and removed its file
                    facts.update(read_complete_lines(path))
        return facts

    def replay(self, engine: Engine) -> None:
        with engine.connect() as connection:
            connection.exec_driver_sql("PRAGMA busy_timeout = 0")
            if not in_transaction(connection):
                connection.exec_driver_sql("BEGIN IMMEDIATE")
            take_write_lock(connection)
            intents = {path.name: read_complete_lines(path) for path in self.folder.iterdir()}
            for tx, facts in intents.items():
                add_intents(connection, tx, facts)
            connection.commit()
        for tx in intents:
            self.drop(tx)


class IntentsInMemory:
    """Intents of an in-memory database, which is lost with the process anyway."""

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
        intents = dict(self._intents)
        with engine.begin() as connection:
            for tx, facts in intents.items():
                add_intents(connection, tx, facts)
        for tx in intents:
            self.drop(tx)


def read_complete_lines(path: Path) -> list[FactKey]:
    """The keys in a file of intents. An incomplete line is left out, because no index was written after it."""
    facts: list[FactKey] = []
    for line in path.read_bytes().split(b"\n"):
        with suppress(ValueError):
            facts += [(entity, key) for entity, key in json.loads(line)]
    return facts


def _sync_folder(folder: Path) -> None:
    file = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(file)
    finally:
        os.close(file)


def open_journal(connection: Connection) -> IntentJournal:
    """The journal of a SQLite database."""
    path = _database_file(connection)
    return IntentsInMemory() if path is None else IntentFiles(path)


def _database_file(connection: Connection) -> Path | None:
    """The file of a SQLite database, or None if it is in memory.

    The driver's own cursor is used, because SQLAlchemy would begin a transaction.
    """
    reader = connection.connection.cursor()
    reader.execute("PRAGMA database_list")
    path = next((Path(file) for _, name, file in reader.fetchall() if name == "main" and file), None)
    reader.close()
    return path.resolve() if path is not None and path.is_file() else None
