"""The snapshot of each log entry's transaction, so that a late commit does not change a moment in the past."""

import sqlalchemy as sa
from alembic import op

revision = "memstate_0006"
down_revision = "memstate_0005"
branch_labels = None
depends_on = None


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
    op.add_column(
        "memstate_checkpoint",
        sa.Column("snapshot", sa.Text(), nullable=True, comment="what was committed at the position (PostgreSQL)"),
    )


def downgrade():
    op.drop_column("memstate_checkpoint", "snapshot")
    op.drop_column("memstate_log", "snapshot")
    op.drop_column("memstate_log", "xid")
