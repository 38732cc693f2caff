"""`reindex` and `forget-index`: an index that takes another's place, and one that is no longer there."""

from __future__ import annotations

import math
from typing import Annotated

import typer
from rich.markup import escape
from rich.progress import Progress

from memstate_sa.cli.display import Console, progress_of
from memstate_sa.cli.opening import App, Url, open_memory


def reindex(
    app: App,
    url: Url,
    index: Annotated[
        str | None, typer.Argument(help="The index to be replaced. Default: the only one that has a successor.")
    ] = None,
    back: Annotated[bool, typer.Option("--back", help="Have searches ask the old index again.")] = False,
    timeout: Annotated[float | None, typer.Option(help="Seconds that it may take. Default: no limit.")] = None,
) -> None:
    """Fill another index beside the old one, with another embedder or not, then have searches ask it, all at once.

    Writes and searches go on meanwhile. Can be interrupted and run again. What replaces what, the Memory says:

    \b
    memory = Memory({"memory": old, "memory_v2": new},
                    embedder={"memory": old_embedder, "memory_v2": new_embedder},
                    successors={"memory": "memory_v2"})

    1. Deploy that, everywhere. 2. memstate-sa reindex. 3. Deploy a Memory with the new index alone.
    4. memstate-sa forget-index memory, and delete the old index by its own tools.
    """
    with open_memory(app, url) as (memory, engine):
        console = Console()
        if back:
            console.print(f"Searches ask {escape(memory.reindex_back(engine, index))} again.")
            return
        with Progress(console=console) as progress:
            update = progress_of(progress, "delivering")
            other = memory.reindex(engine, index, timeout=math.inf if timeout is None else timeout, progress=update)
        console.print(f"Searches ask {escape(other)} now.")


def forget_index(
    app: App, url: Url, name: Annotated[str, typer.Argument(help="Of an index that --app no longer has.")]
) -> None:
    """Forget what relays know of an index that is no longer in use. What it holds, its own tools delete."""
    with open_memory(app, url) as (memory, engine):
        memory.forget_index(engine, name)
        Console().print(f"Index {escape(name)} is forgotten.")
