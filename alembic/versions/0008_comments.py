"""Rewrite the comments of tables and columns in plain English."""

from alembic import op

revision = "memstate_0008"
down_revision = "memstate_0007"
branch_labels = None
depends_on = None

# (table, column or None for the table itself, old comment, new comment)
COMMENTS = (
    (
        "memstate_log",
        "tx",
        "client-generated; the rows sharing it are one transaction",
        "made by the client; the entries with the same tx are one transaction",
    ),
    (
        "memstate_log",
        "xid",
        "of the database's transaction; null in older entries",
        "the database's transaction id; null in old entries",
    ),
    (
        "memstate_log",
        "snapshot",
        "what the transaction saw then, in one entry of each statement (PostgreSQL)",
        "the snapshot of the statement, in one of its entries (PostgreSQL)",
    ),
    (
        "memstate_transaction",
        None,
        "labels of a transaction, written when it commits; a transaction may lack one",
        "labels of a transaction, written at its commit; a transaction without labels has no row",
    ),
    (
        "memstate_outbox",
        "intent",
        "of a strict transaction, whose xid it carries: what the index holds is not known",
        "announced by a strict transaction (xid): the index may or may not have the change",
    ),
    (
        "memstate_index",
        "cluster",
        "PostgreSQL's, and its timeline: of which the positions are",
        "the PostgreSQL cluster and timeline of the positions",
    ),
    (
        "memstate_index",
        None,
        "every lifetime of every index that has been delivered to",
        "the incarnations of the indexes",
    ),
    (
        "memstate_holder",
        None,
        "who delivers to an index; one lease for all of its slots",
        "the owners that deliver to an index, with one lease for all of their slots",
    ),
    (
        "memstate_cursor",
        "snapshot",
        "all that this snapshot sees is delivered",
        "every dirty key that this snapshot sees is delivered",
    ),
    (
        "memstate_cursor",
        "xid",
        "and of this transaction",
        "dirty keys of this transaction are delivered up to position",
    ),
    ("memstate_cursor", "position", "the entries up to this id", "the last delivered id, of the transaction xid"),
    (
        "memstate_cursor",
        "owner",
        "who holds the slot, or held it last and did not let it go",
        "the owner that claims the slot, or claimed it last and did not release it",
    ),
    ("memstate_cursor", "epoch", "counts the owners", "grows whenever the slot changes hands"),
    (
        "memstate_refill",
        None,
        "progress of delivering in full to an index that is new",
        "progress of the refill of a new index",
    ),
    (
        "memstate_past",
        "page",
        "counts the pages; one begins before the index is written to",
        "the number of the page; a new page begins before writes to the index",
    ),
    (
        "memstate_past",
        "names",
        "random: of this page and of those before; the index keeps one too",
        "random names of this page and of earlier ones; the index keeps the name of its page",
    ),
    (
        "memstate_past",
        "refused",
        "the index's mark that did not belong to this database, when it was last compared",
        "the index's mark at the last comparison, if it did not belong to this database",
    ),
    (
        "memstate_past",
        None,
        "which past of this database each index was filled from: a restore takes this row back, not the index",
        "the past of this database that filled each index; a restore takes back this row, but not the index",
    ),
    (
        "memstate_projection",
        "owner",
        "a relay that delivers it so; '': what the index holds",
        "a relay that delivers this projection; '' for the projection that the index holds",
    ),
    (
        "memstate_projection",
        "since",
        "when the class was tracked that projects it so",
        "when the class was tracked with this projection",
    ),
    (
        "memstate_projection",
        "seen_at",
        "when a relay last claimed the index with it",
        "when a relay with this projection last claimed the index",
    ),
    ("memstate_projection", None, "what of each class an index holds", "the projection of each class in an index"),
    (
        "memstate_backfill",
        "start",
        "a range of rows: those after this key; '': from the first",
        "the range of rows begins after this key; '' for the first row",
    ),
    (
        "memstate_backfill",
        "until",
        "up to this key; null: to the end",
        "the range ends with this key; null for the last row",
    ),
    ("memstate_backfill", "position", "the last key that was looked at", "the last key that was read"),
    (
        "memstate_backfill",
        "total",
        "how many rows there were, of the first range; 0 of others",
        "the number of rows, in the first range; 0 in the others",
    ),
    ("memstate_backfill", "seen", "how many were looked at", "the number of rows that were read"),
    (
        "memstate_backfill",
        "added",
        "how many of them were new to the log",
        "the number of rows that were new to the log",
    ),
    (
        "memstate_backfill",
        None,
        "how far rows that are older than tracking have been taken in",
        "progress of the backfill of rows that are older than tracking",
    ),
    (
        "memstate_parked",
        "state",
        "again: to be delivered once more; parked: refused; dead: refused too often",
        "again (deliver once more), parked (refused) or dead (refused too often)",
    ),
    (
        "memstate_ledger",
        None,
        "what each index was last given for each key",
        "the fingerprint that each index holds for each key",
    ),
    (
        "memstate_successor",
        "incarnation",
        "of the successor, as it was then",
        "the incarnation of the successor at the switch",
    ),
    (
        "memstate_successor",
        None,
        "indexes whose searches ask another one",
        "indexes whose searches go to their successor",
    ),
    ("memstate_embedding", "id", "the oldest are the first to go", "the oldest rows are deleted first"),
    (
        "memstate_embedding",
        "text_fingerprint",
        "of the embedder and the text",
        "the fingerprint of the embedder and the text",
    ),
    (
        "memstate_embedding",
        None,
        "vectors that were paid for once, to be used again; may be emptied at any time",
        "a cache of vectors, which may be emptied at any time",
    ),
    (
        "memstate_trigger_context",
        None,
        "what triggers are told of the transaction that writes; empty outside of it",
        "tells triggers about the transaction that writes; empty outside of it",
    ),
    (
        "memstate_item",
        "id",
        "the item's, and n in hex if it is not 0",
        "the id of the item, followed by n in hex if n is not 0",
    ),
    ("memstate_item", "item", "a digest of namespace and key", "a hash of namespace and key"),
    (
        "memstate_item",
        "scope",
        "the namespace's labels in UTF-8, each ended by NUL, in hex: sorts as they do",
        "the labels of the namespace in UTF-8, each followed by NUL, in hex; sorts like the labels",
    ),
    ("memstate_item", "value", "of row 0", "the value of the item, in row 0"),
    ("memstate_item", "text", "what is embedded", "the text for embedding"),
    ("memstate_item", "expires_at", "unless it is read before", "the end of the item's life, if no read extends it"),
    (
        "memstate_item_kept",
        "of",
        "updated_at of what was read: another put, another life",
        "updated_at of the item at the read; a later put begins another life",
    ),
    (
        "memstate_item_kept",
        None,
        "items that live longer because they were read: no history, and no writer in the way of an undo",
        "items that live longer because they were read, without history and without conflicts for undo",
    ),
    (
        "memstate_checkpoint",
        "ns",
        "'' of a graph itself; of a subgraph, the path to it",
        "'' for the graph itself, the path for a subgraph",
    ),
    (
        "memstate_checkpoint",
        "position",
        "the log's last transaction then; null: it was empty, or nobody asked",
        "the last transaction in the log at that time; null if the log was empty or not read",
    ),
    (
        "memstate_checkpoint",
        "channels",
        "JSON: the version of each channel's blob, null: it is in here",
        "JSON: the version of each channel's blob, or null if the payload has the value",
    ),
    (
        "memstate_checkpoint",
        "snapshot",
        "what was committed at the position (PostgreSQL)",
        "the transactions that had committed by then (PostgreSQL)",
    ),
    ("memstate_checkpoint", None, "what a graph was between two steps", "the state of a graph between two supersteps"),
    (
        "memstate_checkpoint_blob",
        None,
        "a channel's value, once for each of its versions",
        "the value of a channel, stored once for each version",
    ),
    (
        "memstate_checkpoint_write",
        "idx",
        "negative: of an error, an interrupt …",
        "the number of the write; negative for an error, an interrupt …",
    ),
    (
        "memstate_checkpoint_write",
        None,
        "what a task that ran at a checkpoint wrote, for the next one",
        "the writes of a task that ran at a checkpoint",
    ),
    (
        "memstate_thread_lease",
        None,
        "which run may write a thread's checkpoints, where runs ask for it",
        "the run that may write a thread's checkpoints, if runs use leases",
    ),
)


def upgrade():
    for table, column, old, new in COMMENTS:
        set_comment(table, column, old, new)


def downgrade():
    for table, column, old, new in COMMENTS:
        set_comment(table, column, new, old)


def set_comment(table, column, old, new):
    if op.get_context().dialect.name != "postgresql":
        return  # SQLite has no comments
    if column is None:
        op.create_table_comment(table, new, existing_comment=old)
    else:
        op.alter_column(table, column, comment=new, existing_comment=old)
