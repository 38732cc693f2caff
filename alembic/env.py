"""Runs the migrations of memstate_sa alone: `python -m memstate_sa.migrations -x url=… upgrade head`.

An application that has them in its version_locations uses its own env.py instead.
"""

import os

from alembic import context
from alembic.util import CommandError
from sqlalchemy import create_engine, make_url, pool

import memstate_sa
from memstate_sa.db.engines import engine_of
from memstate_sa.errors import MemstateError
from memstate_sa.migrations import VERSION_TABLE, is_ours, register

register()


def include_name(name, type_, _):
    return type_ != "table" or is_ours(name)


options = {
    "target_metadata": memstate_sa.metadata,
    "version_table": VERSION_TABLE,
    "include_name": include_name,
    "autogenerate_plugins": ["alembic.autogenerate.*", "memstate_sa"],
}
url = context.get_x_argument(as_dictionary=True).get("url") or os.environ.get("MEMSTATE_URL")
if not url:
    raise CommandError("No database URL. Give -x url=postgresql+psycopg://user@host/app, or set MEMSTATE_URL.")

if context.is_offline_mode():
    # The name of the dialect is enough, because nothing connects to the database.
    context.configure(dialect_name=make_url(url).get_backend_name(), literal_binds=True, **options)
    with context.begin_transaction():
        context.run_migrations()
else:
    try:
        engine = create_engine(engine_of(url).url, poolclass=pool.NullPool)
    except MemstateError as error:
        raise CommandError(str(error)) from error
    with engine.connect() as connection:
        context.configure(connection=connection, **options)
        with context.begin_transaction():
            context.run_migrations()
