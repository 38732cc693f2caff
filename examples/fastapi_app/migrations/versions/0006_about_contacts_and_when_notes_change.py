"""about contacts, and when notes change"""

import sqlalchemy as sa
from alembic import op

revision = "0006"
down_revision = "0005"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.add_column("contact", sa.Column("about", sa.Text(), nullable=True))
    with op.batch_alter_table("note") as batch:
        batch.add_column(sa.Column("updated_at", sa.DateTime(timezone=True), nullable=True))
    op.execute("UPDATE note SET updated_at = created_at")
    with op.batch_alter_table("note") as batch:
        batch.alter_column(
            "updated_at",
            existing_type=sa.DateTime(timezone=True),
            nullable=False,
            server_default=sa.func.now(),
        )


def downgrade() -> None:
    with op.batch_alter_table("note") as batch:
        batch.drop_column("updated_at")
    with op.batch_alter_table("contact") as batch:
        batch.drop_column("about")
