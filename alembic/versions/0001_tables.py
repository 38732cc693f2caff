"""The tables of memstate_sa, and the triggers that keep its log append-only."""

import sqlalchemy as sa
from alembic import op
from sqlalchemy.dialects import postgresql

revision = "memstate_0001"
down_revision = None
branch_labels = ("memstate",)
depends_on = None

# Copied from the version of that time, because the package creates other triggers today.
REFUSED = (
    "memstate_log is append-only: memory.rollback() undoes a change, memory.erase() forgets a fact, "
    "Retention(log=...) folds old entries"
)
ON_POSTGRESQL = (
    f"""CREATE OR REPLACE FUNCTION memstate_append_only() RETURNS trigger LANGUAGE plpgsql AS $memstate$
BEGIN
  IF current_setting('memstate.rewrite', true) IS DISTINCT FROM 'on' THEN
    RAISE EXCEPTION USING ERRCODE = 'restrict_violation', MESSAGE = '{REFUSED}';
  END IF;
  RETURN NULL;
END
$memstate$""",
    """CREATE OR REPLACE TRIGGER memstate_append_only BEFORE UPDATE OR DELETE OR TRUNCATE ON memstate_log \
FOR EACH STATEMENT EXECUTE FUNCTION memstate_append_only()""",
)
ON_SQLITE = (("UPDATE", "1"), ("DELETE", "1"), ("INSERT", "EXISTS (SELECT 1 FROM memstate_log WHERE id = NEW.id)"))


def append_only(dialect):
    if dialect == "postgresql":
        yield from ON_POSTGRESQL
        return
    for change, when in ON_SQLITE:
        yield (
            f"CREATE TRIGGER memstate_append_only_{change.lower()} BEFORE {change} ON memstate_log FOR EACH ROW "
            f"WHEN {when} AND NOT EXISTS (SELECT 1 FROM memstate_current WHERE name = 'rewrite') "
            f"BEGIN SELECT RAISE(ABORT, '{REFUSED}'); END"
        )


def upgrade():
    op.create_table(
        "memstate_backfill",
        sa.Column("entity", sa.String(length=128), nullable=False),
        sa.Column(
            "start", sa.Text(), nullable=False, comment="a range of rows: those after this key; '': from the first"
        ),
        sa.Column("until", sa.Text(), nullable=True, comment="up to this key; null: to the end"),
        sa.Column("position", sa.Text(), nullable=False, comment="the last key that was looked at"),
        sa.Column(
            "total",
            sa.BigInteger(),
            nullable=False,
            comment="how many rows there were, of the first range; 0 of others",
        ),
        sa.Column("seen", sa.BigInteger(), nullable=False, comment="how many were looked at"),
        sa.Column("added", sa.BigInteger(), nullable=False, comment="how many of them were new to the log"),
        sa.Column("done", sa.Boolean(), nullable=False),
        sa.PrimaryKeyConstraint("entity", "start", name=op.f("pk_memstate_backfill")),
        comment="how far rows that are older than tracking have been taken in",
    )
    op.create_table(
        "memstate_current",
        sa.Column("name", sa.Text(), nullable=False),
        sa.Column("value", sa.Text(), nullable=True),
        sa.PrimaryKeyConstraint("name", name=op.f("pk_memstate_current")),
        comment="what triggers are told of the transaction that writes; empty outside of it",
        sqlite_with_rowid=False,
    )
    op.create_table(
        "memstate_cursor",
        sa.Column("index", sa.String(length=128), nullable=False),
        sa.Column("incarnation", sa.String(length=128), nullable=False),
        sa.Column("slot", sa.SmallInteger(), autoincrement=False, nullable=False),
        sa.Column("snapshot", sa.Text(), nullable=False, comment="all that this snapshot sees is delivered"),
        sa.Column("xid", sa.BigInteger(), nullable=False, comment="and of this transaction"),
        sa.Column("position", sa.BigInteger(), nullable=False, comment="the entries up to this id"),
        sa.Column(
            "owner", sa.Text(), nullable=True, comment="who holds the slot, or held it last and did not let it go"
        ),
        sa.Column("epoch", sa.BigInteger(), nullable=False, comment="counts the owners"),
        sa.PrimaryKeyConstraint("index", "incarnation", "slot", name=op.f("pk_memstate_cursor")),
    )
    op.create_table(
        "memstate_embedding",
        sa.Column(
            "id",
            sa.BigInteger().with_variant(sa.Integer(), "sqlite"),
            sa.Identity(always=False),
            nullable=False,
            comment="the oldest are the first to go",
        ),
        sa.Column("text_fingerprint", sa.String(length=32), nullable=False, comment="of the embedder and the text"),
        sa.Column("embedder", sa.Text(), nullable=False),
        sa.Column("vector", sa.LargeBinary(), nullable=False, comment="float32, little-endian"),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_memstate_embedding")),
        sa.UniqueConstraint("text_fingerprint", name=op.f("uq_memstate_embedding_text_fingerprint")),
        comment="vectors that were paid for once, to be used again; may be emptied at any time",
    )
    op.create_table(
        "memstate_fact",
        sa.Column("id", sa.String(length=64), nullable=False),
        sa.Column("type", sa.String(length=128), nullable=False),
        sa.Column(
            "payload",
            sa.JSON(none_as_null=True).with_variant(postgresql.JSONB(none_as_null=True), "postgresql"),
            nullable=False,
        ),
        sa.Column("session_id", sa.Text(), nullable=True),
        sa.Column("ephemeral", sa.Boolean(), nullable=False),
        sa.Column("created_at", sa.DateTime(timezone=True), nullable=False),
        sa.Column("updated_at", sa.DateTime(timezone=True), nullable=False),
        sa.Column("expires_at", sa.DateTime(timezone=True), nullable=True),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_memstate_fact")),
    )
    op.create_index(op.f("ix_memstate_fact_expires_at"), "memstate_fact", ["expires_at"], unique=False)
    op.create_index(op.f("ix_memstate_fact_session_id"), "memstate_fact", ["session_id"], unique=False)
    op.create_index(op.f("ix_memstate_fact_type"), "memstate_fact", ["type"], unique=False)
    op.create_table(
        "memstate_holder",
        sa.Column("index", sa.String(length=128), nullable=False),
        sa.Column("incarnation", sa.String(length=128), nullable=False),
        sa.Column("owner", sa.Text(), nullable=False),
        sa.Column("lease_until", sa.DateTime(timezone=True), nullable=False),
        sa.PrimaryKeyConstraint("index", "incarnation", "owner", name=op.f("pk_memstate_holder")),
        comment="who delivers to an index; one lease for all of its slots",
    )
    op.create_table(
        "memstate_index",
        sa.Column("index", sa.String(length=128), nullable=False),
        sa.Column("incarnation", sa.String(length=128), nullable=False),
        sa.Column("embedder", sa.Text(), nullable=False),
        sa.Column("dimension", sa.Integer(), nullable=False),
        sa.Column("marked", sa.Boolean(), nullable=False, comment="whether points carry their entity"),
        sa.Column("paused", sa.Boolean(), nullable=False),
        sa.Column("created_at", sa.DateTime(timezone=True), nullable=False),
        sa.Column(
            "active_at", sa.DateTime(timezone=True), nullable=False, comment="when a relay last claimed or left it"
        ),
        sa.Column(
            "cluster", sa.Text(), nullable=True, comment="PostgreSQL's, and its timeline: of which the positions are"
        ),
        sa.PrimaryKeyConstraint("index", "incarnation", name=op.f("pk_memstate_index")),
        comment="every lifetime of every index that has been delivered to",
    )
    op.create_table(
        "memstate_ledger",
        sa.Column("index", sa.String(length=128), nullable=False),
        sa.Column("incarnation", sa.String(length=128), nullable=False),
        sa.Column("entity", sa.String(length=128), nullable=False),
        sa.Column("key", sa.Text(), nullable=False),
        sa.Column("epoch", sa.BigInteger(), nullable=False),
        sa.Column("fingerprint", sa.String(length=32), nullable=True),
        sa.Column("text_fingerprint", sa.String(length=32), nullable=True),
        sa.Column("deleted", sa.Boolean(), nullable=False),
        sa.Column("at", sa.DateTime(timezone=True), nullable=False),
        sa.PrimaryKeyConstraint("index", "incarnation", "entity", "key", name=op.f("pk_memstate_ledger")),
        comment="what each index was last given for each key",
    )
    op.create_index(
        "ix_memstate_ledger_deleted",
        "memstate_ledger",
        ["at"],
        unique=False,
        postgresql_where=sa.text("deleted"),
        sqlite_where=sa.text("deleted"),
    )
    op.create_table(
        "memstate_log",
        sa.Column(
            "id", sa.BigInteger().with_variant(sa.Integer(), "sqlite"), sa.Identity(always=False), nullable=False
        ),
        sa.Column(
            "tx",
            sa.String(length=32),
            nullable=False,
            comment="client-generated; the rows sharing it are one transaction",
        ),
        sa.Column("entity", sa.String(length=128), nullable=False),
        sa.Column("key", sa.Text(), nullable=False, comment="JSON array of primary key values"),
        sa.Column("op", sa.String(length=8), nullable=False, comment="baseline, insert, update or delete"),
        sa.Column(
            "image",
            sa.JSON(none_as_null=True).with_variant(postgresql.JSONB(none_as_null=True), "postgresql"),
            nullable=True,
            comment="the row after the change, by column name; null after a delete",
        ),
        sa.Column("version", sa.SmallInteger(), nullable=False, comment="shape of the image"),
        sa.Column("reverts", sa.String(length=32), nullable=True, comment="the transaction that this row undoes"),
        sa.Column("step", sa.Boolean(), nullable=False, comment="whether rollback counts its transaction"),
        sa.Column("at", sa.DateTime(timezone=True), nullable=False),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_memstate_log")),
        sqlite_autoincrement=True,
    )
    op.create_index("ix_memstate_log_key", "memstate_log", ["entity", "key", "id"], unique=False)
    op.create_index(
        "ix_memstate_log_reverts",
        "memstate_log",
        ["reverts"],
        unique=False,
        postgresql_where=sa.text("reverts IS NOT NULL"),
        sqlite_where=sa.text("reverts IS NOT NULL"),
    )
    op.create_index("ix_memstate_log_step", "memstate_log", ["step", "id"], unique=False)
    op.create_index("ix_memstate_log_tx", "memstate_log", ["tx"], unique=False)
    op.create_table(
        "memstate_outbox",
        sa.Column(
            "id", sa.BigInteger().with_variant(sa.Integer(), "sqlite"), sa.Identity(always=False), nullable=False
        ),
        sa.Column("xid", sa.BigInteger(), nullable=False),
        sa.Column("slot", sa.SmallInteger(), nullable=False),
        sa.Column("entity", sa.String(length=128), nullable=False),
        sa.Column("key", sa.Text(), nullable=False),
        sa.Column("tx", sa.String(length=32), nullable=False),
        sa.Column("created_at", sa.DateTime(timezone=True), nullable=False),
        sa.Column(
            "intent",
            sa.Boolean(),
            nullable=False,
            comment="of a strict transaction, whose xid it carries: what the index holds is not known",
        ),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_memstate_outbox")),
        comment="dirty keys, insert-only: 'this key may have changed'",
        sqlite_autoincrement=True,
    )
    op.create_index(
        "ix_memstate_outbox_xid",
        "memstate_outbox",
        ["xid", "id", "slot"],
        unique=False,
        sqlite_where=sa.text("xid <> 0"),
    )
    op.create_table(
        "memstate_parked",
        sa.Column("index", sa.String(length=128), nullable=False),
        sa.Column("incarnation", sa.String(length=128), nullable=False),
        sa.Column("entity", sa.String(length=128), nullable=False),
        sa.Column("key", sa.Text(), nullable=False),
        sa.Column("slot", sa.SmallInteger(), nullable=False),
        sa.Column("attempts", sa.Integer(), nullable=False),
        sa.Column("next_at", sa.DateTime(timezone=True), nullable=False),
        sa.Column("error", sa.Text(), nullable=True),
        sa.Column(
            "state",
            sa.String(length=8),
            nullable=False,
            comment="again: to be delivered once more; parked: refused; dead: refused too often",
        ),
        sa.Column("mark", sa.String(length=32), nullable=False, comment="changes whenever the key is parked again"),
        sa.Column("repeat", sa.Boolean(), nullable=False),
        sa.PrimaryKeyConstraint("index", "incarnation", "entity", "key", name=op.f("pk_memstate_parked")),
    )
    op.create_index(
        op.f("ix_memstate_parked_index_incarnation_state_next_at"),
        "memstate_parked",
        ["index", "incarnation", "state", "next_at"],
        unique=False,
    )
    op.create_table(
        "memstate_refill",
        sa.Column("index", sa.String(length=128), nullable=False),
        sa.Column("incarnation", sa.String(length=128), nullable=False),
        sa.Column(
            "entity",
            sa.String(length=128),
            nullable=False,
            comment="a tracked entity, or '' for the scan of the index itself",
        ),
        sa.Column("slot", sa.SmallInteger(), autoincrement=False, nullable=False),
        sa.Column("position", sa.Text(), nullable=True),
        sa.Column("done", sa.Boolean(), nullable=False),
        sa.PrimaryKeyConstraint("index", "incarnation", "entity", "slot", name=op.f("pk_memstate_refill")),
        comment="progress of delivering in full to an index that is new",
    )
    op.create_table(
        "memstate_successor",
        sa.Column("index", sa.String(length=128), nullable=False),
        sa.Column("successor", sa.String(length=128), nullable=False),
        sa.Column("incarnation", sa.String(length=128), nullable=False, comment="of the successor, as it was then"),
        sa.Column("switched_at", sa.DateTime(timezone=True), nullable=False),
        sa.PrimaryKeyConstraint("index", name=op.f("pk_memstate_successor")),
        comment="indexes whose searches ask another one",
    )
    op.create_table(
        "memstate_transaction",
        sa.Column("tx", sa.String(length=32), nullable=False),
        sa.Column("actor", sa.Text(), nullable=True),
        sa.Column("reason", sa.Text(), nullable=True),
        sa.Column("session_id", sa.Text(), nullable=True),
        sa.Column("at", sa.DateTime(timezone=True), nullable=False),
        sa.PrimaryKeyConstraint("tx", name=op.f("pk_memstate_transaction")),
        comment="labels of a transaction, written when it commits; a transaction may lack one",
    )
    op.create_index(op.f("ix_memstate_transaction_actor_at"), "memstate_transaction", ["actor", "at"], unique=False)
    op.create_index(
        op.f("ix_memstate_transaction_session_id_at"), "memstate_transaction", ["session_id", "at"], unique=False
    )
    op.create_table(
        "memstate_unique",
        sa.Column("entity", sa.String(length=128), nullable=False),
        sa.Column("value", sa.Text(), nullable=False, comment="JSON array of the values that must be unique together"),
        sa.Column("key", sa.Text(), nullable=False),
        sa.PrimaryKeyConstraint("entity", "value", name=op.f("pk_memstate_unique")),
    )
    op.create_index(op.f("ix_memstate_unique_entity_key"), "memstate_unique", ["entity", "key"], unique=False)
    for statement in append_only(op.get_context().dialect.name):
        op.execute(statement)


def downgrade():
    op.drop_table("memstate_unique")
    op.drop_table("memstate_transaction")
    op.drop_table("memstate_successor")
    op.drop_table("memstate_refill")
    op.drop_table("memstate_parked")
    op.drop_table("memstate_outbox")
    op.drop_table("memstate_log")
    op.drop_table("memstate_ledger")
    op.drop_table("memstate_index")
    op.drop_table("memstate_holder")
    op.drop_table("memstate_fact")
    op.drop_table("memstate_embedding")
    op.drop_table("memstate_cursor")
    op.drop_table("memstate_current")
    op.drop_table("memstate_backfill")
    if op.get_context().dialect.name == "postgresql":
        op.execute("DROP FUNCTION memstate_append_only()")
