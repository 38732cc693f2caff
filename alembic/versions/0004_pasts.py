"""The past of the database that filled each index, and the projections of classes in it."""

import sqlalchemy as sa
from alembic import op

revision = "memstate_0004"
down_revision = "memstate_0003"
branch_labels = None
depends_on = None


def upgrade():
    op.create_table(
        "memstate_past",
        sa.Column("index", sa.String(length=128), nullable=False),
        sa.Column("incarnation", sa.String(length=128), nullable=False),
        sa.Column(
            "page",
            sa.BigInteger(),
            nullable=False,
            comment="counts the pages; one begins before the index is written to",
        ),
        sa.Column(
            "names",
            sa.Text(),
            nullable=False,
            comment="random: of this page and of those before; the index keeps one too",
        ),
        sa.Column(
            "refused",
            sa.Text(),
            nullable=True,
            comment="the index's mark that did not belong to this database, when it was last compared",
        ),
        sa.PrimaryKeyConstraint("index", "incarnation", name=op.f("pk_memstate_past")),
        comment="which past of this database each index was filled from: a restore takes this row back, not the index",
    )
    op.create_table(
        "memstate_projection",
        sa.Column("index", sa.String(length=128), nullable=False),
        sa.Column("incarnation", sa.String(length=128), nullable=False),
        sa.Column("entity", sa.String(length=128), nullable=False),
        sa.Column("owner", sa.Text(), nullable=False, comment="a relay that delivers it so; '': what the index holds"),
        sa.Column("projection", sa.Text(), nullable=False, comment="JSON: the text and the metadata of the class"),
        sa.Column(
            "since",
            sa.DateTime(timezone=True),
            nullable=False,
            comment="when the class was tracked that projects it so",
        ),
        sa.Column(
            "seen_at",
            sa.DateTime(timezone=True),
            nullable=False,
            comment="when a relay last claimed the index with it",
        ),
        sa.PrimaryKeyConstraint("index", "incarnation", "entity", "owner", name=op.f("pk_memstate_projection")),
        comment="what of each class an index holds",
    )


def downgrade():
    op.drop_table("memstate_projection")
    op.drop_table("memstate_past")
