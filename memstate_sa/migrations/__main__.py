"""Alembic's commands on our own migrations: ``python -m memstate_sa.migrations -x url=sqlite:///app.db upgrade head``.

MEMSTATE_URL may hold the URL as well. Use this for a database without Alembic, or to keep our migrations separate.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

from alembic.config import CommandLine, Config

from memstate_sa.migrations import location


def main(arguments: Sequence[str]) -> None:
    line = CommandLine(prog="python -m memstate_sa.migrations")
    options = line.parser.parse_args(arguments)
    if not hasattr(options, "cmd"):
        line.parser.error("too few arguments")
    config = Config(cmd_opts=options)
    config.set_main_option("script_location", str(location()).replace("%", "%%"))
    line.run_cmd(config, options)


if __name__ == "__main__":
    main(sys.argv[1:])
