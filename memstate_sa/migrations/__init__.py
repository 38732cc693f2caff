"""memstate_sa in an application's Alembic: the place of our migrations, and a plugin for our tables and triggers.

Alembic 1.18 and later find the plugin by its entry point, and load this module with every import of Alembic. So this
module does not import Alembic itself, and a failure here must not stop other projects. env.py must name the plugin::

    context.configure(..., autogenerate_plugins=["alembic.autogenerate.*", "memstate_sa"])

With an older Alembic, env.py calls `register` instead.
"""

from __future__ import annotations

from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from memstate_sa import metadata  # importing it from here makes sure that it has all tables
from memstate_sa.db.amendments import RENAMED
from memstate_sa.errors import MemstateError
from memstate_sa.runtime.printable import printable_logger

logger = printable_logger("memstate_sa.migrations")

VERSION_TABLE = "memstate_version"
"""The version table of our migrations when they run alone. The application may have an ``alembic_version`` already."""


def location() -> Path:
    """The folder of our own migrations, in the installed wheel or in the checkout.

    Its folder ``versions`` is a branch "memstate", which an application can add to its ``version_locations``.
    """
    package = Path(__file__).parent.parent
    for folder in (package / "_migrations", package.parent / "alembic"):
        if (folder / "env.py").is_file():
            return folder
    raise MemstateError(
        f"Cannot find the migrations of memstate_sa near {package}. The installation is incomplete. Install the wheel "
        "or the checkout again."
    )


def is_ours(name: str) -> bool:
    """Whether *name* is a table of memstate_sa, in this version or an older one."""
    return name in metadata.tables or name in RENAMED or name == VERSION_TABLE


def register() -> None:
    """Add our operations (``op.memstate_track`` …) and our comparator to Alembic. Idempotent.

    Call it in env.py if Alembic is older than 1.18. With a later one it does nothing, because env.py names the plugin.
    """
    if has_plugins():
        return
    from alembic.autogenerate import comparators

    from memstate_sa.migrations import comparing

    _know_operations()
    _know_comparator(comparators, comparing.compare)


def has_plugins() -> bool:
    """Whether the installed Alembic loads plugins."""
    return find_spec("alembic") is None or find_spec("alembic.runtime.plugins") is not None


def setup(plugin: Any) -> None:
    """Add our operations and comparator to Alembic. Alembic calls this with its Plugin."""
    try:
        from alembic.util import DispatchPriority

        from memstate_sa.migrations import comparing

        _know_operations()
        # Run after Alembic's own comparators, because ours corrects their results.
        plugin.add_autogenerate_comparator(comparing.compare, _EVENT, priority=DispatchPriority.LAST)
    except Exception as error:  # noqa: BLE001  # the project may use Alembic without memstate_sa
        logger.warning("Could not load the Alembic plugin of memstate_sa: %s", type(error).__name__)


_EVENT = "schema"


@cache
def _know_operations() -> None:
    from memstate_sa.migrations import operations, rendering

    operations.register()
    rendering.register()


@cache
def _know_comparator(comparators: Any, compare: Any) -> None:
    comparators.dispatch_for(_EVENT)(compare)
