"""The command line: the demo, and the upkeep of an application's memory.

`main` can be imported without the extra "cli". It then says what to install.
"""

from __future__ import annotations

import sys

from memstate_sa.errors import MissingExtra

try:
    from memstate_sa.cli.commands import application
except ImportError as error:  # raising it here would show a traceback
    if (error.name or "").startswith("memstate_sa"):
        raise
    _missing: str | None = str(MissingExtra(error.name or "typer", "cli"))
else:
    _missing = None

__all__ = ["application", "main"]


def main() -> None:
    """Run the console script ``memstate-sa``."""
    if _missing:
        sys.exit(_missing)
    application()(prog_name="memstate-sa")
