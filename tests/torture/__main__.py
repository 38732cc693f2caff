"""`python -m tests.torture`: writers, relays, databases and indexes are killed, stopped and cut off. Then the audit."""

from __future__ import annotations

import argparse
import shutil
import sys
import tempfile
import time
from pathlib import Path

from rich.console import Console

from tests.torture.run import Torture, show


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.torture", description=__doc__)
    length = parser.add_mutually_exclusive_group()
    length.add_argument("--seconds", type=float, help="inject faults for this many seconds (default: 180)")
    length.add_argument("--faults", type=int, help="stop after this many faults of all kinds")
    parser.add_argument("--seed", type=int, default=int(time.time()), help="seed of the schedule of faults")
    parser.add_argument("--keep", type=Path, metavar="DIR", help="keep logs, journals and indexes in this folder")
    options = parser.parse_args()
    console = Console()
    folder = options.keep or Path(tempfile.mkdtemp(prefix="memstate-torture-"))
    if folder.exists() and any(folder.iterdir()):
        parser.error(f"{folder} is not empty")
    limits = {"faults": options.faults} if options.faults else {"seconds": options.seconds or 180.0}
    report = Torture(folder.absolute(), options.seed, console).run(**limits)
    show(report, console)
    if options.keep is None and report.ok:
        shutil.rmtree(folder, ignore_errors=True)
    else:
        console.print(f"logs, journals and indexes: {folder}", highlight=False, soft_wrap=True)
    return 0 if report.ok else 1


if __name__ == "__main__":
    sys.exit(main())
