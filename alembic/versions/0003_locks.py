"""Which transactions each entry of the log was written beside: moments that do not change when one commits late."""

import sqlalchemy as sa
from alembic import op

revision = "memstate_locks"
down_revision = "memstate_0002"
branch_labels = None
depends_on = None

WAS = "the log's last transaction then; null: it was empty, or nobody asked"
IS = "the log's last transaction then, and its snapshot; null: it was empty, or nobody asked"


def upgrade():
    op.add_column(
        "memstate_log",
        sa.Column(
            "xid", sa.BigInteger(), nullable=True, comment="of the database's transaction; null in older entries"
        ),
    )
    op.add_column(
        "memstate_log",
        sa.Column(
            "snapshot",
            sa.Text(),
            nullable=True,
            comment="what the transaction saw then, in one entry of each statement (PostgreSQL)",
        ),
    )
    if op.get_context().dialect.name == "postgresql":  # SQLite knows no lengths, and no comments
        op.alter_column(
            "memstate_checkpoint",
            "position",
            existing_type=sa.String(length=40),
            type_=sa.Text(),
            existing_nullable=True,
            existing_comment=WAS,
            comment=IS,
        )


def downgrade():
    if op.get_context().dialect.name == "postgresql":
        op.execute(sa.text("UPDATE memstate_checkpoint SET position = split_part(position, '@', 1)"))
        op.alter_column(
            "memstate_checkpoint",
            "position",
            existing_type=sa.Text(),
            type_=sa.String(length=40),
            existing_nullable=True,
            existing_comment=IS,
            comment=WAS,
        )
    op.drop_column("memstate_log", "snapshot")
    op.drop_column("memstate_log", "xid")
