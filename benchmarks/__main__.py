"""``python -m benchmarks [--quick] [NAME ...]``"""

from __future__ import annotations

import argparse
import os

from benchmarks import (
    backfill,
    capture,
    commits,
    drain,
    far,
    indexes,
    langgraph,
    latency,
    relay,
    search,
    startup,
    strict,
    undo,
)
from benchmarks.report import console

BENCHMARKS = {
    "backfill": backfill.run,
    "capture": capture.run,
    "commits": commits.run,
    "relay": relay.run,
    "drain": drain.run,
    "far": far.run,
    "indexes": indexes.run,
    "langgraph": langgraph.run,
    "latency": latency.run,
    "search": search.run,
    "startup": startup.run,
    "strict": strict.run,
    "undo": undo.run,
}


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument(
        "names", nargs="*", metavar="NAME", help=f"the benchmarks to run: {', '.join(BENCHMARKS)} (default: all)"
    )
    parser.add_argument("--quick", action="store_true", help="a few rounds with less data, to see that it runs")
    options = parser.parse_args()
    for name in options.names or BENCHMARKS:
        if name not in BENCHMARKS:
            parser.error(f"Unknown benchmark {name!r}. Choose from {', '.join(BENCHMARKS)}.")
    for name in options.names or BENCHMARKS:
        console.rule(f"[bold]{name}[/]  ({os.cpu_count()} cores)")
        BENCHMARKS[name](quick=options.quick)


if __name__ == "__main__":
    main()
