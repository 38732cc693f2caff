"""The command line: the demo, and the upkeep of an application's memory.

Without the extra "cli" this can be imported all the same: for `main`, which says what is missing.
"""

from __future__ import annotations

import sys

from memstate_sa.errors import MissingExtra

try:
    from memstate_sa.cli.commands import application
except ImportError as error:  # main() shows it: raised here, the hint would be buried in the console script's traceback
    if (error.name or "").startswith("memstate_sa"):
        raise
    _missing: str | None = str(MissingExtra(error.name or "typer", "cli"))
else:
    _missing = None

__all__ = ["application", "main"]


def main() -> None:
    """The console script ``memstate-sa``."""
    if _missing:
        sys.exit(_missing)
    application()()
