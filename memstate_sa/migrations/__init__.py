"""memstate_sa in an application's Alembic: where our migrations are, and the plugin that knows tables and triggers.

Alembic 1.18 and later find the plugin by its entry point, and load this module whenever anybody imports Alembic: so it
imports no Alembic by itself, and nothing that fails here may stop them. Its comparator runs where env.py names it::

    context.configure(..., autogenerate_plugins=["alembic.autogenerate.*", "memstate_sa"])

An env.py of an older Alembic calls `register` instead.
"""

from __future__ import annotations

from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from memstate_sa import metadata  # with all tables, whoever imports this module
from memstate_sa.db.amendments import RENAMED
from memstate_sa.errors import MemstateError
from memstate_sa.runtime.printable import printable_logger

logger = printable_logger("memstate_sa.migrations")

VERSION_TABLE = "memstate_version"
"""Where our migrations, run alone, keep which of them ran: an application has an ``alembic_version`` of its own."""


def location() -> Path:
    """The folder of our own migrations: of the wheel, or of the checkout that is installed.

    Its ``versions`` are a branch "memstate" for an application's ``version_locations``.
    """
    package = Path(__file__).parent.parent
    for folder in (package / "_migrations", package.parent / "alembic"):
        if (folder / "env.py").is_file():
            return folder
    raise MemstateError(f"the migrations of memstate_sa are not beside {package}: install its wheel, or its checkout")


def is_ours(name: str) -> bool:
    """Whether a table *name* is one of memstate_sa's, of today or of an older version."""
    return name in metadata.tables or name in RENAMED or name == VERSION_TABLE


def register() -> None:
    """Make ``op.memstate_track`` and its like known to Alembic, and what is ours to autogenerate. Idempotent.

    For an env.py of Alembic before 1.18. With a later one it does nothing: there, env.py names the plugin.
    """
    if has_plugins():
        return
    from alembic.autogenerate import comparators

    from memstate_sa.migrations import comparing

    _know_operations()
    _know_comparator(comparators, comparing.compare)


def has_plugins() -> bool:
    """Whether the Alembic that is installed loads them."""
    return find_spec("alembic") is None or find_spec("alembic.runtime.plugins") is not None


def setup(plugin: Any) -> None:
    """What Alembic calls with its Plugin."""
    try:
        from alembic.util import DispatchPriority

        from memstate_sa.migrations import comparing

        _know_operations()
        # After Alembic's own, whose findings it puts right.
        plugin.add_autogenerate_comparator(comparing.compare, _EVENT, priority=DispatchPriority.LAST)
    except Exception as error:  # noqa: BLE001  # of another project in this environment, perhaps, which has no use for us
        logger.warning("autogenerate will not know memstate_sa: %s", type(error).__name__)


_EVENT = "schema"


@cache
def _know_operations() -> None:
    from memstate_sa.migrations import operations, rendering

    operations.register()
    rendering.register()


@cache
def _know_comparator(comparators: Any, compare: Any) -> None:
    comparators.dispatch_for(_EVENT)(compare)
