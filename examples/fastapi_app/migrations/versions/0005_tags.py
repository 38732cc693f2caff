"""tags"""

import sqlalchemy as sa
from alembic import op

revision = "0005"
down_revision = "0004"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.create_table(
        "tag",
        sa.Column("id", sa.Integer(), nullable=False),
        sa.Column("account_id", sa.Integer(), nullable=False),
        sa.Column("name", sa.String(length=40), nullable=False),
        sa.ForeignKeyConstraint(["account_id"], ["account.id"], name=op.f("fk_tag_account_id_account")),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_tag")),
        sa.UniqueConstraint("account_id", "name", name=op.f("uq_tag_account_id_name")),
    )
    op.create_table(
        "note_tag",
        sa.Column("note_id", sa.Integer(), nullable=False),
        sa.Column("tag_id", sa.Integer(), nullable=False),
        sa.ForeignKeyConstraint(["note_id"], ["note.id"], name=op.f("fk_note_tag_note_id_note")),
        sa.ForeignKeyConstraint(["tag_id"], ["tag.id"], name=op.f("fk_note_tag_tag_id_tag")),
        sa.PrimaryKeyConstraint("note_id", "tag_id", name=op.f("pk_note_tag")),
    )
    op.create_index(op.f("ix_note_tag_tag_id"), "note_tag", ["tag_id"])


def downgrade() -> None:
    op.drop_table("note_tag")
    op.drop_table("tag")
