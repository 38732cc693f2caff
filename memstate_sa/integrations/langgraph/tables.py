"""The tables of LangGraph's checkpoints. Checkpoints are not facts: they are in no log, no outbox and no index."""

from __future__ import annotations

from sqlalchemy import Column, Index, Integer, LargeBinary, String, Table, Text, text

from memstate_sa.db.tables import StoredJson, UTCDateTime, metadata

checkpoint = Table(
    "memstate_checkpoint",
    metadata,
    Column("thread_id", Text, primary_key=True),
    Column("ns", Text, primary_key=True, comment="'' for the graph itself, the path for a subgraph"),
    Column("id", Text, primary_key=True, comment="sorts by time"),
    Column("parent_id", Text),
    Column("run_id", Text),
    Column(
        "position",
        String(40),
        comment="the last transaction in the log at that time; null if the log was empty or not read",
    ),
    Column("metadata", StoredJson, nullable=False),
    Column(
        "channels",
        Text,
        nullable=False,
        comment="JSON: the version of each channel's blob, or null if the payload has the value",
    ),
    Column("type", Text, nullable=False),
    Column("payload", LargeBinary, nullable=False),
    Column("snapshot", Text, comment="the transactions that had committed by then (PostgreSQL)"),
    comment="the state of a graph between two supersteps",
)
_of_run = text("run_id IS NOT NULL")
Index("ix_memstate_checkpoint_run_id", checkpoint.c.run_id, postgresql_where=_of_run, sqlite_where=_of_run)

blob = Table(
    "memstate_checkpoint_blob",
    metadata,
    Column("thread_id", Text, primary_key=True),
    Column("ns", Text, primary_key=True),
    Column("channel", Text, primary_key=True),
    Column("version", Text, primary_key=True),
    Column("type", Text, nullable=False),
    Column("value", LargeBinary, nullable=False),
    comment="the value of a channel, stored once for each version",
)

# There is no foreign key to the checkpoint, because the writes of a task may be committed before it.
write = Table(
    "memstate_checkpoint_write",
    metadata,
    Column("thread_id", Text, primary_key=True),
    Column("ns", Text, primary_key=True),
    Column("checkpoint_id", Text, primary_key=True),
    Column("task_id", Text, primary_key=True),
    Column(
        "idx",
        Integer,
        primary_key=True,
        autoincrement=False,
        comment="the number of the write; negative for an error, an interrupt …",
    ),
    Column("task_path", Text, nullable=False),
    Column("channel", Text, nullable=False),
    Column("type", Text, nullable=False),
    Column("value", LargeBinary, nullable=False),
    comment="the writes of a task that ran at a checkpoint",
)

lease = Table(
    "memstate_thread_lease",
    metadata,
    Column("thread_id", Text, primary_key=True),
    Column("owner", Text, nullable=False),
    Column("lease_until", UTCDateTime, nullable=False),
    comment="the run that may write a thread's checkpoints, if runs use leases",
)
