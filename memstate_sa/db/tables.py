"""The tables of memstate_sa: the log, the outbox, and the relay's state for each index.

They have a MetaData of their own (`memstate_sa.metadata`), so that an application's tables need no change.

A migration that Alembic generates from them must run on both databases, without an import of memstate_sa. So types,
defaults and conditions here are SQLAlchemy's own, and are not compiled for one database.
"""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Any

from sqlalchemy import (
    JSON,
    BigInteger,
    Boolean,
    Column,
    DateTime,
    Identity,
    Index,
    Integer,
    LargeBinary,
    MetaData,
    SmallInteger,
    String,
    Table,
    Text,
    false,
    text,
)
from sqlalchemy.dialects.postgresql import JSONB
from sqlalchemy.engine import Dialect
from sqlalchemy.exc import DontWrapMixin
from sqlalchemy.ext.compiler import compiles
from sqlalchemy.sql.expression import FunctionElement
from sqlalchemy.types import TypeDecorator

from memstate_sa.errors import ValidationFailed

metadata = MetaData(
    naming_convention={
        "ix": "ix_%(table_name)s_%(column_0_N_name)s",
        "uq": "uq_%(table_name)s_%(column_0_N_name)s",
        "pk": "pk_%(table_name)s",
    }
)


class current_xid(FunctionElement[int]):
    """The xid (64 bits) of the writing transaction. On SQLite it is 0: with one writer, ids are in commit order."""

    type = BigInteger()
    inherit_cache = True


@compiles(current_xid)
def _current_xid(element: Any, compiler: Any, **kw: Any) -> str:
    return "0"


@compiles(current_xid, "postgresql")
def _current_xid_postgresql(element: Any, compiler: Any, **kw: Any) -> str:
    return "CAST(CAST(pg_current_xact_id() AS TEXT) AS BIGINT)"


class statement_snapshot(FunctionElement[str]):
    """The snapshot of an INSERT … SELECT, for its first row only. NULL on SQLite."""

    type = Text()
    inherit_cache = True


@compiles(statement_snapshot)
def _statement_snapshot(element: Any, compiler: Any, **kw: Any) -> str:
    return "NULL"


@compiles(statement_snapshot, "postgresql")
def _statement_snapshot_postgresql(element: Any, compiler: Any, **kw: Any) -> str:
    return "CASE WHEN row_number() OVER () = 1 THEN CAST(pg_current_snapshot() AS TEXT) END"


class InvalidTime(ValidationFailed, DontWrapMixin):
    """A time needs a time zone. Nothing was written."""


def in_utc(value: Any, name: str = "a time") -> datetime:
    """*value* in UTC. Raises InvalidTime for a naive datetime, which may be meant as local time or as UTC."""
    if isinstance(value, datetime) and value.utcoffset() is not None:
        try:
            return value.astimezone(UTC)
        except OverflowError:
            pass
    description = value.isoformat() if isinstance(value, datetime) else f"of type {type(value).__name__}"
    message = f"{name} is {description}. Give an aware datetime, for example datetime.now(UTC) + timedelta(hours=1)."
    raise InvalidTime(
        f"Cannot use this time: {message}", errors=[{"type": "timezone_aware", "loc": (name,), "msg": message}]
    )


class UTCDateTime(TypeDecorator[datetime]):
    """An aware datetime, in UTC on both databases (SQLite stores no offset)."""

    # Alembic renders a type from its module and its repr. With these, it renders SQLAlchemy's own DateTime.
    __module__ = "sqlalchemy.types"
    impl = DateTime(timezone=True)
    cache_ok = True

    def __repr__(self) -> str:
        return repr(self.impl)

    def process_bind_param(self, value: datetime | None, dialect: Dialect) -> datetime | None:
        return None if value is None else in_utc(value)

    def process_result_value(self, value: datetime | None, dialect: Dialect) -> datetime | None:
        if value is None:
            return None
        return value.replace(tzinfo=UTC) if value.tzinfo is None else value.astimezone(UTC)


class _Jsonb(JSONB):
    # On SQLite, Alembic prints the repr of PostgreSQL's variant, and the default repr has a Text() without its module.
    __module__ = JSONB.__module__

    def __repr__(self) -> str:
        return f"JSONB(none_as_null={self.none_as_null})"


# SQLite has AUTOINCREMENT only for INTEGER. Otherwise a new row can get the id of a deleted last row. The relay would
# never deliver that change, because its position covers the id already.
_Id = BigInteger().with_variant(Integer(), "sqlite")
StoredJson = JSON(none_as_null=True).with_variant(_Jsonb(none_as_null=True), "postgresql")
_Name = String(128)
_Digest = String(32)


def utcnow() -> datetime:
    return datetime.now(UTC)


log = Table(
    "memstate_log",
    metadata,
    Column("id", _Id, Identity(), primary_key=True),
    Column(
        "tx", String(32), nullable=False, comment="made by the client; the entries with the same tx are one transaction"
    ),
    Column("entity", _Name, nullable=False),
    Column("key", Text, nullable=False, comment="JSON array of primary key values"),
    Column("op", String(8), nullable=False, comment="baseline, insert, update or delete"),
    Column("image", StoredJson, comment="the row after the change, by column name; null after a delete"),
    Column("version", SmallInteger, nullable=False, comment="shape of the image"),
    Column("reverts", String(32), comment="the transaction that this row undoes"),
    Column("step", Boolean(create_constraint=False), nullable=False, comment="whether rollback counts its transaction"),
    Column("at", UTCDateTime, nullable=False),
    Column("xid", BigInteger, default=current_xid(), comment="the database's transaction id; null in old entries"),
    Column("snapshot", Text, comment="the snapshot of the statement, in one of its entries (PostgreSQL)"),
    sqlite_autoincrement=True,
)
Index("ix_memstate_log_key", log.c.entity, log.c.key, log.c.id)
Index("ix_memstate_log_tx", log.c.tx)
# rollback() walks back over the steps, and must not read a million baselines of a backfill.
Index("ix_memstate_log_step", log.c.step, log.c.id)
_reverting = text("reverts IS NOT NULL")
Index("ix_memstate_log_reverts", log.c.reverts, postgresql_where=_reverting, sqlite_where=_reverting)

transaction = Table(
    "memstate_transaction",
    metadata,
    Column("tx", String(32), primary_key=True),
    Column("actor", Text),
    Column("reason", Text),
    Column("session_id", Text),
    Column("at", UTCDateTime, nullable=False),
    Index(None, "session_id", "at"),
    Index(None, "actor", "at"),
    comment="labels of a transaction, written at its commit; a transaction without labels has no row",
)

outbox = Table(
    "memstate_outbox",
    metadata,
    Column("id", _Id, Identity(), primary_key=True),
    Column("xid", BigInteger, nullable=False, default=current_xid()),
    Column("slot", SmallInteger, nullable=False),
    Column("entity", _Name, nullable=False),
    Column("key", Text, nullable=False),
    Column("tx", String(32), nullable=False),
    Column("created_at", UTCDateTime, nullable=False),
    Column(
        "intent",
        Boolean(create_constraint=False),
        nullable=False,
        default=false(),
        comment="announced by a strict transaction (xid): the index may or may not have the change",
    ),
    # The index has the order of delivery for all slots. An index that begins with the slot would be read once per slot,
    # and then sorted. SQLite pages by id alone, so its index stays empty and costs nothing at a commit.
    Index("ix_memstate_outbox_xid", "xid", "id", "slot", sqlite_where=text("xid <> 0")),
    # A search reads the undelivered keys of one class. The backlog of other classes must not slow it down.
    Index("ix_memstate_outbox_entity", "entity", "xid", "id"),
    sqlite_autoincrement=True,
    comment="dirty keys, insert-only: 'this key may have changed'",
)

index_state = Table(
    "memstate_index",
    metadata,
    Column("index", _Name, primary_key=True),
    Column("incarnation", _Name, primary_key=True),
    Column("embedder", Text, nullable=False),
    Column("dimension", Integer, nullable=False),
    Column("marked", Boolean(create_constraint=False), nullable=False, comment="whether points carry their entity"),
    Column("paused", Boolean(create_constraint=False), nullable=False),
    Column("created_at", UTCDateTime, nullable=False),
    Column("active_at", UTCDateTime, nullable=False, comment="when a relay last claimed or left it"),
    Column("cluster", Text, comment="the PostgreSQL cluster and timeline of the positions"),
    comment="the incarnations of the indexes",
)

holder = Table(
    "memstate_holder",
    metadata,
    Column("index", _Name, primary_key=True),
    Column("incarnation", _Name, primary_key=True),
    Column("owner", Text, primary_key=True),
    Column("lease_until", UTCDateTime, nullable=False),
    comment="the owners that deliver to an index, with one lease for all of their slots",
)

cursor = Table(
    "memstate_cursor",
    metadata,
    Column("index", _Name, primary_key=True),
    Column("incarnation", _Name, primary_key=True),
    Column("slot", SmallInteger, primary_key=True, autoincrement=False),
    Column("snapshot", Text, nullable=False, comment="every dirty key that this snapshot sees is delivered"),
    Column("xid", BigInteger, nullable=False, comment="dirty keys of this transaction are delivered up to position"),
    Column("position", BigInteger, nullable=False, comment="the last delivered id, of the transaction xid"),
    Column("owner", Text, comment="the owner that claims the slot, or claimed it last and did not release it"),
    Column("epoch", BigInteger, nullable=False, comment="grows whenever the slot changes hands"),
)

refill = Table(
    "memstate_refill",
    metadata,
    Column("index", _Name, primary_key=True),
    Column("incarnation", _Name, primary_key=True),
    Column("entity", _Name, primary_key=True, comment="a tracked entity, or '' for the scan of the index itself"),
    Column("slot", SmallInteger, primary_key=True, autoincrement=False),
    Column("position", Text),
    Column("done", Boolean(create_constraint=False), nullable=False),
    comment="progress of the refill of a new index",
)

past = Table(
    "memstate_past",
    metadata,
    Column("index", _Name, primary_key=True),
    Column("incarnation", _Name, primary_key=True),
    Column(
        "page",
        BigInteger,
        nullable=False,
        comment="the number of the page; a new page begins before writes to the index",
    ),
    Column(
        "names",
        Text,
        nullable=False,
        comment="random names of this page and of earlier ones; the index keeps the name of its page",
    ),
    Column("refused", Text, comment="the index's mark at the last comparison, if it did not belong to this database"),
    comment="the past of this database that filled each index; a restore takes back this row, but not the index",
)

projection = Table(
    "memstate_projection",
    metadata,
    Column("index", _Name, primary_key=True),
    Column("incarnation", _Name, primary_key=True),
    Column("entity", _Name, primary_key=True),
    Column(
        "owner",
        Text,
        primary_key=True,
        comment="a relay that delivers this projection; '' for the projection that the index holds",
    ),
    Column("projection", Text, nullable=False, comment="JSON: the text and the metadata of the class"),
    Column("since", UTCDateTime, nullable=False, comment="when the class was tracked with this projection"),
    Column("seen_at", UTCDateTime, nullable=False, comment="when a relay with this projection last claimed the index"),
    comment="the projection of each class in an index",
)

backfill = Table(
    "memstate_backfill",
    metadata,
    Column("entity", _Name, primary_key=True),
    Column("start", Text, primary_key=True, comment="the range of rows begins after this key; '' for the first row"),
    Column("until", Text, comment="the range ends with this key; null for the last row"),
    Column("position", Text, nullable=False, comment="the last key that was read"),
    Column("total", BigInteger, nullable=False, comment="the number of rows, in the first range; 0 in the others"),
    Column("seen", BigInteger, nullable=False, comment="the number of rows that were read"),
    Column("added", BigInteger, nullable=False, comment="the number of rows that were new to the log"),
    Column("done", Boolean(create_constraint=False), nullable=False),
    comment="progress of the backfill of rows that are older than tracking",
)

parked = Table(
    "memstate_parked",
    metadata,
    Column("index", _Name, primary_key=True),
    Column("incarnation", _Name, primary_key=True),
    Column("entity", _Name, primary_key=True),
    Column("key", Text, primary_key=True),
    Column("slot", SmallInteger, nullable=False),
    Column("attempts", Integer, nullable=False),
    Column("next_at", UTCDateTime, nullable=False),
    Column("error", Text),
    Column(
        "state",
        String(8),
        nullable=False,
        comment="again (deliver once more), parked (refused) or dead (refused too often)",
    ),
    Column("mark", String(32), nullable=False, comment="changes whenever the key is parked again"),
    Column("repeat", Boolean(create_constraint=False), nullable=False, default=false()),
    Index(None, "index", "incarnation", "state", "next_at"),
)

ledger = Table(
    "memstate_ledger",
    metadata,
    Column("index", _Name, primary_key=True),
    Column("incarnation", _Name, primary_key=True),
    Column("entity", _Name, primary_key=True),
    Column("key", Text, primary_key=True),
    Column("epoch", BigInteger, nullable=False),
    Column("fingerprint", _Digest),
    Column("text_fingerprint", _Digest),
    Column("deleted", Boolean(create_constraint=False), nullable=False),
    Column("at", UTCDateTime, nullable=False),
    comment="the fingerprint that each index holds for each key",
)
# SQLite uses a partial index only if the query has the same condition, in the same words.
is_deleted = text("deleted")
Index("ix_memstate_ledger_deleted", ledger.c.at, postgresql_where=is_deleted, sqlite_where=is_deleted)

successor = Table(
    "memstate_successor",
    metadata,
    Column("index", _Name, primary_key=True),
    Column("successor", _Name, nullable=False),
    Column("incarnation", _Name, nullable=False, comment="the incarnation of the successor at the switch"),
    Column("switched_at", UTCDateTime, nullable=False),
    comment="indexes whose searches go to their successor",
)

embedding = Table(
    "memstate_embedding",
    metadata,
    Column("id", _Id, Identity(), primary_key=True, comment="the oldest rows are deleted first"),
    Column(
        "text_fingerprint", _Digest, nullable=False, unique=True, comment="the fingerprint of the embedder and the text"
    ),
    Column("embedder", Text, nullable=False),
    Column("vector", LargeBinary, nullable=False, comment="float32, little-endian"),
    comment="a cache of vectors, which may be emptied at any time",
)

trigger_context = Table(
    "memstate_trigger_context",
    metadata,
    Column("name", Text, primary_key=True),
    Column("value", Text),
    sqlite_with_rowid=False,  # this keeps the application's last_insert_rowid()
    comment="tells triggers about the transaction that writes; empty outside of it",
)

unique = Table(
    "memstate_unique",
    metadata,
    Column("entity", _Name, primary_key=True),
    Column("value", Text, primary_key=True, comment="JSON array of the values that must be unique together"),
    Column("key", Text, nullable=False),
    Index(None, "entity", "key"),
)
