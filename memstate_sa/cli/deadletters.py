"""`dead list`, `dead retry`, `dead drop`: keys that an index refused too often."""

from __future__ import annotations

from typing import Annotated

import typer
from rich.table import Table

from memstate_sa.cli.display import Console, cell
from memstate_sa.cli.opening import App, Indexes, Url, open_memory

Keys = Annotated[
    list[str] | None,
    typer.Option("--key", help="As in `dead list`, or shop_item[7]; may be repeated. Default: all."),
]


def dead_list(
    app: App,
    url: Url,
    index: Indexes = None,
    limit: Annotated[int, typer.Option("--limit", "-n", min=1, help="Show at most N.")] = 100,
) -> None:
    """Show the keys that an index refused too often, and why."""
    with open_memory(app, url) as (memory, engine):
        table = Table("index", "fact", "key", "attempts", "error")
        letters = memory.relay(engine).dead(*(index or ()), limit=limit)
        for letter in letters:
            index_name, entity, key, error = map(cell, (letter.index, letter.entity, letter.key, letter.error))
            table.add_row(index_name, entity, key, str(letter.attempts), error)
        Console().print(table if letters else "No key is dead.")


def dead_retry(app: App, url: Url, index: Indexes = None, key: Keys = None) -> None:
    """Try dead keys again."""
    with open_memory(app, url) as (memory, engine):
        Console().print(f"{memory.relay(engine).retry_dead(*(index or ()), keys=key)} keys are tried again.")


def dead_drop(app: App, url: Url, index: Indexes = None, key: Keys = None) -> None:
    """Forget dead keys. They are tried again when their rows change."""
    with open_memory(app, url) as (memory, engine):
        Console().print(f"{memory.relay(engine).drop_dead(*(index or ()), keys=key)} keys are forgotten.")
