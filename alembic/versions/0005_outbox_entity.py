"""An index for searches: it finds the undelivered keys of one class."""

from alembic import op

revision = "memstate_0005"
down_revision = "memstate_0004"
branch_labels = None
depends_on = None


def upgrade():
    op.create_index("ix_memstate_outbox_entity", "memstate_outbox", ["entity", "xid", "id"], unique=False)


def downgrade():
    op.drop_index("ix_memstate_outbox_entity", table_name="memstate_outbox")
