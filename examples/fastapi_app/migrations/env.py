"""Alembic's environment: the database is the service's own (CRM_DATABASE_URL)."""

import asyncio

from alembic import context
from sqlalchemy.engine import Connection
from sqlalchemy.ext.asyncio import create_async_engine

import memstate_sa
from crm.database import DATABASE_URL
from crm.models import Base

target_metadata = [Base.metadata, memstate_sa.metadata]


def migrate(connection: Connection | None = None) -> None:
    context.configure(
        connection=connection,
        url=DATABASE_URL,
        target_metadata=target_metadata,
        autogenerate_plugins=["alembic.autogenerate.*", "memstate_sa"],
        render_as_batch=True,  # SQLite alters tables by copying them
        literal_binds=connection is None,
    )
    with context.begin_transaction():
        context.run_migrations()


async def migrate_online() -> None:
    engine = create_async_engine(DATABASE_URL)
    async with engine.connect() as connection:
        await connection.run_sync(migrate)
        await connection.commit()
    await engine.dispose()


if context.is_offline_mode():
    migrate()
else:
    asyncio.run(migrate_online())
