"""A database as made by the version before memstate_0007: one table, and the triggers that use it, differ."""

from __future__ import annotations

from sqlalchemy import Engine, text

from memstate_sa.migrations import VERSION_TABLE, __main__
from tests.adapters.alembic.application import routines

OLD, NEW = "memstate_current", "memstate_trigger_context"


def migrate(engine: Engine, command: str, revision: str) -> None:
    """Run our own migrations on the database of *engine*."""
    __main__.main(["-x", f"url={engine.url.render_as_string(hide_password=False)}", command, revision])


def make_older(engine: Engine) -> None:
    """Take a current database back to the version before memstate_0007, triggers included."""
    sources = routines(engine)
    migrate(engine, "stamp", "memstate_0007")
    migrate(engine, "downgrade", "memstate_0006")
    assert routines(engine) == [tuple(part.replace(NEW, OLD) for part in routine) for routine in sources]
    with engine.begin() as connection:
        connection.execute(text(f"DROP TABLE {VERSION_TABLE}"))
