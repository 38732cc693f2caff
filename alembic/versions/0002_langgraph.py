"""The tables of LangGraph's checkpoints and store items."""

import sqlalchemy as sa
from alembic import op
from sqlalchemy.dialects import postgresql

revision = "memstate_0002"
down_revision = "memstate_0001"
branch_labels = None
depends_on = None


def upgrade():
    op.create_table(
        "memstate_checkpoint",
        sa.Column("thread_id", sa.Text(), nullable=False),
        sa.Column("ns", sa.Text(), nullable=False, comment="'' of a graph itself; of a subgraph, the path to it"),
        sa.Column("id", sa.Text(), nullable=False, comment="sorts by time"),
        sa.Column("parent_id", sa.Text(), nullable=True),
        sa.Column("run_id", sa.Text(), nullable=True),
        sa.Column(
            "position",
            sa.String(length=40),
            nullable=True,
            comment="the log's last transaction then; null: it was empty, or nobody asked",
        ),
        sa.Column(
            "metadata",
            sa.JSON(none_as_null=True).with_variant(postgresql.JSONB(none_as_null=True), "postgresql"),
            nullable=False,
        ),
        sa.Column(
            "channels",
            sa.Text(),
            nullable=False,
            comment="JSON: the version of each channel's blob, null: it is in here",
        ),
        sa.Column("type", sa.Text(), nullable=False),
        sa.Column("payload", sa.LargeBinary(), nullable=False),
        sa.PrimaryKeyConstraint("thread_id", "ns", "id", name=op.f("pk_memstate_checkpoint")),
        comment="what a graph was between two steps",
    )
    op.create_index(
        "ix_memstate_checkpoint_run_id",
        "memstate_checkpoint",
        ["run_id"],
        unique=False,
        postgresql_where=sa.text("run_id IS NOT NULL"),
        sqlite_where=sa.text("run_id IS NOT NULL"),
    )
    op.create_table(
        "memstate_checkpoint_blob",
        sa.Column("thread_id", sa.Text(), nullable=False),
        sa.Column("ns", sa.Text(), nullable=False),
        sa.Column("channel", sa.Text(), nullable=False),
        sa.Column("version", sa.Text(), nullable=False),
        sa.Column("type", sa.Text(), nullable=False),
        sa.Column("value", sa.LargeBinary(), nullable=False),
        sa.PrimaryKeyConstraint("thread_id", "ns", "channel", "version", name=op.f("pk_memstate_checkpoint_blob")),
        comment="a channel's value, once for each of its versions",
    )
    op.create_table(
        "memstate_checkpoint_write",
        sa.Column("thread_id", sa.Text(), nullable=False),
        sa.Column("ns", sa.Text(), nullable=False),
        sa.Column("checkpoint_id", sa.Text(), nullable=False),
        sa.Column("task_id", sa.Text(), nullable=False),
        sa.Column(
            "idx", sa.Integer(), autoincrement=False, nullable=False, comment="negative: of an error, an interrupt …"
        ),
        sa.Column("task_path", sa.Text(), nullable=False),
        sa.Column("channel", sa.Text(), nullable=False),
        sa.Column("type", sa.Text(), nullable=False),
        sa.Column("value", sa.LargeBinary(), nullable=False),
        sa.PrimaryKeyConstraint(
            "thread_id", "ns", "checkpoint_id", "task_id", "idx", name=op.f("pk_memstate_checkpoint_write")
        ),
        comment="what a task that ran at a checkpoint wrote, for the next one",
    )
    op.create_table(
        "memstate_item",
        sa.Column("id", sa.String(length=40), nullable=False, comment="the item's, and n in hex if it is not 0"),
        sa.Column("item", sa.String(length=32), nullable=False, comment="a digest of namespace and key"),
        sa.Column("n", sa.Integer(), nullable=False),
        sa.Column(
            "scope",
            sa.Text(),
            nullable=False,
            comment="the namespace's labels in UTF-8, each ended by NUL, in hex: sorts as they do",
        ),
        sa.Column("key", sa.Text(), nullable=False),
        sa.Column(
            "value",
            sa.JSON(none_as_null=True).with_variant(postgresql.JSONB(none_as_null=True), "postgresql"),
            nullable=True,
            comment="of row 0",
        ),
        sa.Column("text", sa.Text(), nullable=True, comment="what is embedded"),
        sa.Column("created_at", sa.DateTime(timezone=True), nullable=False),
        sa.Column("updated_at", sa.DateTime(timezone=True), nullable=False),
        sa.Column("expires_at", sa.DateTime(timezone=True), nullable=True, comment="unless it is read before"),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_memstate_item")),
        comment="items of a LangGraph store",
    )
    op.create_index(
        "ix_memstate_item_expires_at",
        "memstate_item",
        ["expires_at"],
        unique=False,
        postgresql_where=sa.text("expires_at IS NOT NULL"),
        sqlite_where=sa.text("expires_at IS NOT NULL"),
    )
    op.create_index(op.f("ix_memstate_item_item"), "memstate_item", ["item"], unique=False)
    op.create_index(op.f("ix_memstate_item_scope"), "memstate_item", ["scope"], unique=False)
    op.create_table(
        "memstate_item_kept",
        sa.Column("id", sa.String(length=32), nullable=False),
        sa.Column(
            "of",
            sa.DateTime(timezone=True),
            nullable=False,
            comment="updated_at of what was read: another put, another life",
        ),
        sa.Column("until", sa.DateTime(timezone=True), nullable=False),
        sa.PrimaryKeyConstraint("id", "of", name=op.f("pk_memstate_item_kept")),
        comment="items that live longer because they were read: no history, and no writer in the way of an undo",
    )
    op.create_index(op.f("ix_memstate_item_kept_until"), "memstate_item_kept", ["until"], unique=False)
    op.create_table(
        "memstate_thread_lease",
        sa.Column("thread_id", sa.Text(), nullable=False),
        sa.Column("owner", sa.Text(), nullable=False),
        sa.Column("lease_until", sa.DateTime(timezone=True), nullable=False),
        sa.PrimaryKeyConstraint("thread_id", name=op.f("pk_memstate_thread_lease")),
        comment="which run may write a thread's checkpoints, where runs ask for it",
    )


def downgrade():
    op.drop_table("memstate_thread_lease")
    op.drop_table("memstate_item_kept")
    op.drop_table("memstate_item")
    op.drop_table("memstate_checkpoint_write")
    op.drop_table("memstate_checkpoint_blob")
    op.drop_table("memstate_checkpoint")
