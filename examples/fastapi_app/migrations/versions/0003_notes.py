"""notes"""

import sqlalchemy as sa
from alembic import op

revision = "0003"
down_revision = "0002"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.create_table(
        "note",
        sa.Column("id", sa.Integer(), nullable=False),
        sa.Column("owner_id", sa.Integer(), nullable=False),
        sa.Column("contact_id", sa.Integer(), nullable=False),
        sa.Column("body", sa.Text(), nullable=False),
        sa.Column("created_at", sa.DateTime(timezone=True), server_default=sa.func.now(), nullable=False),
        sa.ForeignKeyConstraint(["contact_id"], ["contact.id"], name=op.f("fk_note_contact_id_contact")),
        sa.ForeignKeyConstraint(["owner_id"], ["user_account.id"], name=op.f("fk_note_owner_id_user_account")),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_note")),
    )
    op.create_index(op.f("ix_note_contact_id"), "note", ["contact_id"])
    op.create_index(op.f("ix_note_owner_id"), "note", ["owner_id"])


def downgrade() -> None:
    op.drop_table("note")
