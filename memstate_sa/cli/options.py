"""The options that several commands share. `--help` needs this module, so it imports nothing heavy."""

from __future__ import annotations

from typing import Annotated

import typer

App = Annotated[
    str,
    typer.Option(
        "--app",
        envvar="MEMSTATE_APP",
        metavar="MODULE:NAME",
        help="Your Memory or MemoryStore: shop.memory:memory.",
    ),
]
Url = Annotated[
    str | None,
    typer.Option(
        "--url",
        envvar="MEMSTATE_URL",
        metavar="URL",
        help="Your database: sqlite:///shop.db or postgresql+psycopg://… A MemoryStore does not need it.",
    ),
]
Indexes = Annotated[
    list[str] | None,
    typer.Option("--index", metavar="NAME", help="Only this index. May be repeated. Default: all indexes."),
]
OfModel = Annotated[
    str | None,
    typer.Option("--model", metavar="MODEL", help="Only facts of this class: its name, its entity or module:Class."),
]
OfSession = Annotated[
    str | None, typer.Option("--session-id", metavar="ID", help="Only changes of this agent session.")
]
OfActor = Annotated[str | None, typer.Option("--actor", metavar="NAME", help="Only changes of this actor.")]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Show the changes that would be undone. Undo nothing.")]
Yes = Annotated[bool, typer.Option("--yes", "-y", help="Do not ask for confirmation.")]
JsonLines = Annotated[bool, typer.Option("--json", help="Print one JSON object a line.")]
JsonDocument = Annotated[bool, typer.Option("--json", help="Print one JSON document.")]
Timeout = Annotated[float, typer.Option("--timeout", min=0, metavar="SECONDS", help="Give up after this time.")]
