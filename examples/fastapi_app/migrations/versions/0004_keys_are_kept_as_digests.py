"""keys are kept as digests"""

import hashlib

import sqlalchemy as sa
from alembic import op

revision = "0004"
down_revision = "0003"
branch_labels = None
depends_on = None

user = sa.table(
    "user_account",
    sa.column("id", sa.Integer()),
    sa.column("api_key", sa.String()),
    sa.column("key_digest", sa.String()),
)


def upgrade() -> None:
    op.add_column("user_account", sa.Column("key_digest", sa.String(length=64), nullable=True))
    connection = op.get_bind()
    for id_, key in connection.execute(sa.select(user.c.id, user.c.api_key)).all():
        digest = hashlib.sha256(key.encode()).hexdigest()
        connection.execute(sa.update(user).where(user.c.id == id_).values(key_digest=digest))
    with op.batch_alter_table("user_account") as batch:
        batch.drop_constraint(batch.f("uq_user_account_api_key"), type_="unique")
        batch.drop_column("api_key")
        batch.alter_column("key_digest", existing_type=sa.String(length=64), nullable=False)
        batch.create_unique_constraint(batch.f("uq_user_account_key_digest"), ["key_digest"])


def downgrade() -> None:
    """Restore the column, but not the keys: a digest does not contain them, so users need new ones."""
    with op.batch_alter_table("user_account") as batch:
        batch.drop_constraint(batch.f("uq_user_account_key_digest"), type_="unique")
        batch.alter_column("key_digest", new_column_name="api_key", existing_type=sa.String(length=64))
        batch.create_unique_constraint(batch.f("uq_user_account_api_key"), ["api_key"])
