"""The tables of memstate_sa: the log, the outbox, and what the relay knows of each index.

They live in a MetaData of their own (`memstate_sa.metadata`), so that an application's tables need no change. Alembic
renders them into migrations that need no import of ours and run on both databases, whichever they were made on: so no
type, default or condition here is of ours, or compiled for one database.
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
    """The writing transaction's xid, of 64 bits; 0 where the single writer makes id order commit order (SQLite)."""

    type = BigInteger()
    inherit_cache = True


@compiles(current_xid)
def _current_xid(element: Any, compiler: Any, **kw: Any) -> str:
    return "0"


@compiles(current_xid, "postgresql")
def _current_xid_postgresql(element: Any, compiler: Any, **kw: Any) -> str:
    return "CAST(CAST(pg_current_xact_id() AS TEXT) AS BIGINT)"


class statement_snapshot(FunctionElement[str]):
    """The snapshot of an INSERT … SELECT, in the first of its rows; nothing on SQLite."""

    type = Text()
    inherit_cache = True


@compiles(statement_snapshot)
def _statement_snapshot(element: Any, compiler: Any, **kw: Any) -> str:
    return "NULL"


@compiles(statement_snapshot, "postgresql")
def _statement_snapshot_postgresql(element: Any, compiler: Any, **kw: Any) -> str:
    return "CASE WHEN row_number() OVER () = 1 THEN CAST(pg_current_snapshot() AS TEXT) END"


class InvalidTime(ValidationFailed, DontWrapMixin):
    """A time needs a time zone; nothing was written."""


def in_utc(value: Any, name: str = "a time") -> datetime:
    """*value* in UTC. Raises InvalidTime for a naive datetime, which may be meant as local time or as UTC."""
    if isinstance(value, datetime) and value.utcoffset() is not None:
        try:
            return value.astimezone(UTC)
        except OverflowError:
            pass
    given = value.isoformat() if isinstance(value, datetime) else f"of type {type(value).__name__}"
    message = f"{name} is {given}. Give an aware datetime, for example datetime.now(UTC) + timedelta(hours=1)."
    raise InvalidTime(
        f"Cannot take the time: {message}", errors=[{"type": "timezone_aware", "loc": (name,), "msg": message}]
    )


class UTCDateTime(TypeDecorator[datetime]):
    """An aware datetime, in UTC on both databases (SQLite stores no offset)."""

    # Alembic renders a type by its module and its repr: in the database this one is SQLAlchemy's own.
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
    # On SQLite, Alembic prints PostgreSQL's variant as its repr has it, in which Text() is of no module.
    __module__ = JSONB.__module__

    def __repr__(self) -> str:
        return f"JSONB(none_as_null={self.none_as_null})"


# SQLite has AUTOINCREMENT for INTEGER alone. Without it the id of a deleted last row is given out again, below the
# relay's cursor, and that change is never delivered.
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
    Column("tx", String(32), nullable=False, comment="client-generated; the rows sharing it are one transaction"),
    Column("entity", _Name, nullable=False),
    Column("key", Text, nullable=False, comment="JSON array of primary key values"),
    Column("op", String(8), nullable=False, comment="baseline, insert, update or delete"),
    Column("image", StoredJson, comment="the row after the change, by column name; null after a delete"),
    Column("version", SmallInteger, nullable=False, comment="shape of the image"),
    Column("reverts", String(32), comment="the transaction that this row undoes"),
    Column("step", Boolean(create_constraint=False), nullable=False, comment="whether rollback counts its transaction"),
    Column("at", UTCDateTime, nullable=False),
    Column("xid", BigInteger, default=current_xid(), comment="of the database's transaction; null in older entries"),
    Column("snapshot", Text, comment="what the transaction saw then, in one entry of each statement (PostgreSQL)"),
    sqlite_autoincrement=True,
)
Index("ix_memstate_log_key", log.c.entity, log.c.key, log.c.id)
Index("ix_memstate_log_tx", log.c.tx)
# rollback() walks backwards over the steps; a backfill of a million baselines must not stand in its way.
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
    comment="labels of a transaction, written when it commits; a transaction may lack one",
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
        comment="of a strict transaction, whose xid it carries: what the index holds is not known",
    ),
    # The order of delivery, of every slot: one that leads with the slot would be read in as many places as a holder has
    # slots, and sorted. SQLite pages by id alone, and would pay for the index at every commit: there it stays empty.
    Index("ix_memstate_outbox_xid", "xid", "id", "slot", sqlite_where=text("xid <> 0")),
    # A search looks for what is undelivered of one class, however long the backlog of the others is.
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
    Column("cluster", Text, comment="PostgreSQL's, and its timeline: of which the positions are"),
    comment="every lifetime of every index that has been delivered to",
)

holder = Table(
    "memstate_holder",
    metadata,
    Column("index", _Name, primary_key=True),
    Column("incarnation", _Name, primary_key=True),
    Column("owner", Text, primary_key=True),
    Column("lease_until", UTCDateTime, nullable=False),
    comment="who delivers to an index; one lease for all of its slots",
)

cursor = Table(
    "memstate_cursor",
    metadata,
    Column("index", _Name, primary_key=True),
    Column("incarnation", _Name, primary_key=True),
    Column("slot", SmallInteger, primary_key=True, autoincrement=False),
    Column("snapshot", Text, nullable=False, comment="all that this snapshot sees is delivered"),
    Column("xid", BigInteger, nullable=False, comment="and of this transaction"),
    Column("position", BigInteger, nullable=False, comment="the entries up to this id"),
    Column("owner", Text, comment="who holds the slot, or held it last and did not let it go"),
    Column("epoch", BigInteger, nullable=False, comment="counts the owners"),
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
    comment="progress of delivering in full to an index that is new",
)

past = Table(
    "memstate_past",
    metadata,
    Column("index", _Name, primary_key=True),
    Column("incarnation", _Name, primary_key=True),
    Column("page", BigInteger, nullable=False, comment="counts the pages; one begins before the index is written to"),
    Column("names", Text, nullable=False, comment="random: of this page and of those before; the index keeps one too"),
    Column("refused", Text, comment="the index's mark that did not belong to this database, when it was last compared"),
    comment="which past of this database each index was filled from: a restore takes this row back, not the index",
)

projection = Table(
    "memstate_projection",
    metadata,
    Column("index", _Name, primary_key=True),
    Column("incarnation", _Name, primary_key=True),
    Column("entity", _Name, primary_key=True),
    Column("owner", Text, primary_key=True, comment="a relay that delivers it so; '': what the index holds"),
    Column("projection", Text, nullable=False, comment="JSON: the text and the metadata of the class"),
    Column("since", UTCDateTime, nullable=False, comment="when the class was tracked that projects it so"),
    Column("seen_at", UTCDateTime, nullable=False, comment="when a relay last claimed the index with it"),
    comment="what of each class an index holds",
)

backfill = Table(
    "memstate_backfill",
    metadata,
    Column("entity", _Name, primary_key=True),
    Column("start", Text, primary_key=True, comment="a range of rows: those after this key; '': from the first"),
    Column("until", Text, comment="up to this key; null: to the end"),
    Column("position", Text, nullable=False, comment="the last key that was looked at"),
    Column("total", BigInteger, nullable=False, comment="how many rows there were, of the first range; 0 of others"),
    Column("seen", BigInteger, nullable=False, comment="how many were looked at"),
    Column("added", BigInteger, nullable=False, comment="how many of them were new to the log"),
    Column("done", Boolean(create_constraint=False), nullable=False),
    comment="how far rows that are older than tracking have been taken in",
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
        comment="again: to be delivered once more; parked: refused; dead: refused too often",
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
    comment="what each index was last given for each key",
)
# Queries have to say it in the same words, for SQLite to see that the index is of use.
is_deleted = text("deleted")
Index("ix_memstate_ledger_deleted", ledger.c.at, postgresql_where=is_deleted, sqlite_where=is_deleted)

successor = Table(
    "memstate_successor",
    metadata,
    Column("index", _Name, primary_key=True),
    Column("successor", _Name, nullable=False),
    Column("incarnation", _Name, nullable=False, comment="of the successor, as it was then"),
    Column("switched_at", UTCDateTime, nullable=False),
    comment="indexes whose searches ask another one",
)

embedding = Table(
    "memstate_embedding",
    metadata,
    Column("id", _Id, Identity(), primary_key=True, comment="the oldest are the first to go"),
    Column("text_fingerprint", _Digest, nullable=False, unique=True, comment="of the embedder and the text"),
    Column("embedder", Text, nullable=False),
    Column("vector", LargeBinary, nullable=False, comment="float32, little-endian"),
    comment="vectors that were paid for once, to be used again; may be emptied at any time",
)

trigger_context = Table(
    "memstate_trigger_context",
    metadata,
    Column("name", Text, primary_key=True),
    Column("value", Text),
    sqlite_with_rowid=False,  # whoever asks for last_insert_rowid() asks for another row
    comment="what triggers are told of the transaction that writes; empty outside of it",
)

unique = Table(
    "memstate_unique",
    metadata,
    Column("entity", _Name, primary_key=True),
    Column("value", Text, primary_key=True, comment="JSON array of the values that must be unique together"),
    Column("key", Text, nullable=False),
    Index(None, "entity", "key"),
)
